"""The shell: the request loop, the monitor thread, AgentServer and the keeper's child, against a core that is a thread.

Owns:    the tests of agentserver/shell.
Runs in: the test process; the child is a real process.
Unaware: of real cores and agents; the contract suite has those.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from fakecore import FakeCore
from served import ANY_PORT, Served, answer
from support import MAIN, wait_until

zmq = pytest.importorskip("zmq")

from agentserver import AgentServer, ServerConfig  # noqa: E402
from agentserver.core.link import socket_path  # noqa: E402
from agentserver.errors import LinkError, StartError  # noqa: E402
from agentserver.shell import endpoints, listening  # noqa: E402
from agentserver.shell.link import ZmqLink  # noqa: E402
from agentserver.shell.monitor import Topics  # noqa: E402
from agentserver.shell.zap import Zap  # noqa: E402

ID = "12345678-1234-4234-8234-123456789abc"


@pytest.fixture
def served(state_dir: Path) -> Iterator[Served]:
    with contextlib.closing(Served(state_dir)) as served:
        yield served


# ---------------------------------------------------------------- requests

def test_bytes_pass_untouched_and_each_message_has_one_reply(served: Served) -> None:
    messages = [b'{"request_id": "a"}', b"", b"\xff\xfe", b"not json\n", b"[" * 100, b"z" * (10 * 1024 * 1024 + 5)]
    with served.socket(zmq.REQ, served.server.endpoint) as sock:
        for raw in messages:
            sock.send(raw)
            assert json.loads(sock.recv())["type"] in ("reply", "error_response")
    assert [raw for raw in served.core.heard if b"subscribe" not in raw] == messages
    hello = next(hello for hello in served.core.hellos if hello["role"] == "requests")
    assert hello["endpoint"] == served.server.endpoint and hello["pub_endpoint"] == served.server.pub_endpoint
    assert not served.server.endpoint.endswith(":0")


def test_several_frames_are_one_clear_refusal(served: Served) -> None:
    assert served.ask(b"{}", b"{}", b"x")["error_code"] == "bad_request"
    assert served.ask(b'{"request_id": "b"}')["request_id"] == "b"


def test_a_message_over_the_wire_limit_cuts_only_its_sender(served: Served) -> None:
    with served.socket(zmq.REQ, served.server.endpoint) as sock:
        sock.rcvtimeo = 200
        sock.send(b"x" * (11 * 1024 * 1024 + 1))
        with pytest.raises(zmq.Again):
            sock.recv()
    assert served.ask(b'{"request_id": "b"}')["request_id"] == "b"


def test_a_request_is_held_while_the_core_is_started_again(served: Served) -> None:
    assert served.ask(b'{"request_id": "a"}')["success"]
    served.core.close(crash=True)
    with served.socket(zmq.REQ, served.server.endpoint) as sock:
        sock.send(b'{"request_id": "b"}')
        served.core = FakeCore(served.path, answer)
        assert json.loads(sock.recv())["request_id"] == "b"


def test_a_core_that_stays_away_is_unavailable(state_dir: Path) -> None:
    with contextlib.closing(Served(state_dir, request_timeout_secs=0.2)) as served:
        served.core.close(crash=True)
        reply = served.ask(b'{"type": "list_agents_request", "request_id": "q"}')
        assert (reply["type"], reply["request_id"], reply["success"], reply["error_code"]) == (
            "list_agents_response", "q", False, "unavailable")
        assert served.ask(b"\xff")["type"] == "error_response"
        served.core = FakeCore(served.path, answer)
        assert served.ask(b'{"request_id": "b"}')["request_id"] == "b"


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"type": ["a"]}', b'{"type": {}}', b'{"request_id": 7}', b"\xff"])
def test_a_refusal_can_be_built_from_anything(raw: bytes) -> None:
    reply = json.loads(endpoints.failed_reply(raw, "unavailable", "away"))
    assert reply == {"type": "error_response", "request_id": None, "success": False, "error": "away",
                     "error_code": "unavailable"}


# ---------------------------------------------------------------- AgentServer

def test_the_numbers_can_be_asked_from_any_thread(served: Served) -> None:
    server = served.server
    assert (server.stats().requests, server.active_agent_count(), server.uptime_secs()) == (5, 3, 1.5)


def test_a_server_that_does_not_run_has_no_numbers(state_dir: Path) -> None:
    server = AgentServer(ServerConfig(state_dir=str(state_dir)))
    assert not server.is_running() and server.active_agent_count() == 0 and server.uptime_secs() == 0.0
    assert server.stats().requests == 0


def test_stop_asks_the_core_and_serves_until_it_has_ended(served: Served) -> None:
    served.server.stop()
    wait_until(lambda: any(message.get("type") == "shutdown_request" for message in served.core.messages()))
    assert served.ask(b'{"request_id": "still"}')["request_id"] == "still"
    assert served.server.is_running()
    served.core.close()
    served.thread.join(20)
    assert not served.thread.is_alive() and not served.server.is_running() and not served.errors


def test_stop_before_start_means_not_to_start(state_dir: Path) -> None:
    server = AgentServer(ServerConfig(state_dir=str(state_dir / "new")))
    server.stop()
    server.start()
    assert not (state_dir / "new").exists()
    with pytest.raises(StartError, match="make a new one"):
        server.start()


def test_a_new_core_is_asked_to_shut_down_too(served: Served) -> None:
    served.server.stop()
    wait_until(lambda: any(message.get("type") == "shutdown_request" for message in served.core.messages()))
    first = [raw for raw in served.core.heard if b"shutdown_request" in raw]
    served.restart_core()
    wait_until(lambda: [raw for raw in served.core.heard if b"shutdown_request" in raw] == first)


def test_the_server_ends_when_somebody_else_ended_the_core(served: Served) -> None:
    served.core.close()
    served.thread.join(20)
    assert not served.thread.is_alive() and not served.errors


def test_a_served_directory_and_a_used_port_are_clear_errors(served: Served, state_dir: Path, run_dir: Path) -> None:
    with pytest.raises(StartError, match="already served"):
        AgentServer(ServerConfig(state_dir=str(state_dir), endpoint=ANY_PORT)).start()
    for settings in ({"endpoint": served.server.endpoint, "pub_endpoint": ANY_PORT},
                     {"endpoint": ANY_PORT, "pub_endpoint": served.server.pub_endpoint}):
        elsewhere = run_dir / "elsewhere"
        with pytest.raises(StartError, match="already listens"):
            AgentServer(ServerConfig(state_dir=str(elsewhere), **settings)).start()
        assert not [name for name in os.listdir(elsewhere) if name != "shell.lock"]


# ---------------------------------------------------------------- addresses

@pytest.fixture
def router() -> Iterator[Any]:
    context = zmq.Context()
    door = Zap(context)
    sock = endpoints.router_socket(context)
    yield sock
    sock.close()
    door.close()
    context.term()


def test_an_ipc_socket_is_ours_alone_and_goes_with_us(router: Any, state_dir: Path) -> None:
    path = state_dir / "rep"
    bound = listening.bind(router, f"ipc://{path}")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and bound.endpoint == f"ipc://{path}"
    with zmq.Context() as context, context.socket(zmq.REQ) as req:
        req.linger = 0
        req.connect(bound.endpoint)
        req.send(b"a")
        *way, request = router.recv_multipart()
        assert request == b"a"
        router.send_multipart([*way, b"b"])
        assert req.recv() == b"b"
    router.close()
    bound.release()
    assert not path.exists()


def test_an_ipc_socket_of_a_successor_is_left_alone(router: Any, state_dir: Path) -> None:
    path = state_dir / "rep"
    bound = listening.bind(router, f"ipc://{path}")
    os.unlink(path)
    path.write_text("a successor's")
    router.close()
    bound.release()
    assert path.exists()


def test_what_lies_at_an_ipc_path_is_looked_at_first(router: Any, state_dir: Path) -> None:
    path = state_dir / "rep"
    path.write_text("a file")
    with pytest.raises(StartError, match="not a socket"):
        listening.bind(router, f"ipc://{path}")
    assert path.read_text() == "a file"
    path.unlink()
    with FakeCore(str(path)), pytest.raises(StartError, match="already listens"):
        listening.bind(router, f"ipc://{path}")
    FakeCore(str(path)).close(crash=True)
    listening.bind(router, f"ipc://{path}").release()


@pytest.mark.parametrize("endpoint, sentence", [
    ("ipc:///no/such/directory/here", "does not exist"), ("tcp://192.0.2.1:0", "no such address"),
    ("ipc:///" + "x" * 200, "shorter"), ("nonsense", "not an address")])
def test_addresses_that_cannot_be_bound_are_explained(router: Any, endpoint: str, sentence: str) -> None:
    with pytest.raises(StartError, match=sentence):
        listening.bind(router, endpoint)


# ---------------------------------------------------------------- publishing

def subscriptions(core: FakeCore) -> List[Dict[str, Any]]:
    return [message for message in core.messages() if message.get("type") == "subscribe_request"]


def test_joins_reach_the_core_and_its_events_reach_the_joined(served: Served) -> None:
    with served.socket(zmq.SUB, served.server.pub_endpoint) as sub:
        sub.subscribe(f"{ID}.stdout")
        sub.subscribe("status.")
        wait_until(lambda: subscriptions(served.core)
                   and subscriptions(served.core)[-1]["topics"] == [f"{ID}.stdout", "status."])
        assert {topic for message in subscriptions(served.core) for topic in message["announce"]} == \
            {f"{ID}.stdout", "status."}, "the core knows which of them it can answer"
        monitor = next(c for c in served.core.connections if c.hello.get("role") == "monitor")
        monitor.push({"topic": f"{ID}.stdout", "offset": 3})
        topic, body = sub.recv_multipart()
        assert topic == f"{ID}.stdout".encode() and json.loads(body)["offset"] == 3
        served.restart_core()
        wait_until(lambda: subscriptions(served.core)
                   and subscriptions(served.core)[-1]["topics"] == [f"{ID}.stdout", "status."])
        sub.unsubscribe("status.")
        wait_until(lambda: subscriptions(served.core)[-1]["topics"] == [f"{ID}.stdout"])


def test_a_listener_with_the_smallest_queue_is_told_all_it_wants(served: Served) -> None:
    """A high-water mark is for what comes in: libzmq would drop the subscriptions beyond it, in silence."""
    with endpoints.sub_socket(served.context, 1) as sub:
        wanted = [f"status.{n}" for n in range(50)]
        for topic in wanted:
            sub.subscribe(topic)
        sub.connect(served.server.pub_endpoint)
        wait_until(lambda: subscriptions(served.core)
                   and subscriptions(served.core)[-1]["topics"] == sorted(wanted))


def test_a_second_listener_is_announced_too(served: Served) -> None:
    with contextlib.ExitStack() as open_sockets:
        for count in (1, 2):
            sub = open_sockets.enter_context(served.socket(zmq.SUB, served.server.pub_endpoint))
            sub.subscribe(f"{ID}.stderr")
            wait_until(lambda n=count: sum(f"{ID}.stderr" in m["announce"] for m in subscriptions(served.core)) == n)


def test_every_topic_is_subscribed_to_however_small_the_queue(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """libzmq drops subscriptions in silence where it may not queue as many."""
    monkeypatch.setattr(ZmqLink, "queued_events", 1)
    link = ZmqLink(served.server.endpoint)
    try:
        topics = [f"status.{n}" for n in range(1500)]
        link.subscribe(topics, endpoint=served.server.pub_endpoint)
        wait_until(lambda: subscriptions(served.core)
                   and subscriptions(served.core)[-1]["topics"] == sorted(topics))
    finally:
        link.close()


def test_nobody_at_the_publishing_port_is_an_error_not_silence(served: Served) -> None:
    link = ZmqLink(served.server.endpoint)
    try:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            link.subscribe(["status."], endpoint=f"tcp://127.0.0.1:{nobody.getsockname()[1]}")
            with pytest.raises(LinkError):
                link.next_event(20)
    finally:
        link.close()


def test_wild_subscriptions_do_no_harm(served: Served) -> None:
    with served.socket(zmq.SUB, served.server.pub_endpoint) as sub:
        with served.socket(zmq.SUB, served.server.pub_endpoint) as cut_off:
            cut_off.subscribe(b"x" * 5000)
            for topic in (b"\xff\xfe", b"x" * 900, b"\0", b"server"):
                sub.subscribe(topic)
            wait_until(lambda: subscriptions(served.core) and "server" in subscriptions(served.core)[-1]["topics"])
            assert subscriptions(served.core)[-1]["topics"] == ["server"]
    with served.socket(zmq.XSUB, served.server.pub_endpoint) as xsub:
        for message in (b"", b"\x02hello", b"\0never-joined"):
            xsub.send(message)
        xsub.send(b"\x01status.z")
        wait_until(lambda: "status.z" in subscriptions(served.core)[-1]["topics"])


def test_publishing_can_be_off(state_dir: Path) -> None:
    with contextlib.closing(Served(state_dir, pub_endpoint="none")) as served:
        assert served.server.pub_endpoint == ""
        assert served.ask(b'{"request_id": "b"}')["request_id"] == "b"
        assert [(hello["role"], hello["pub_endpoint"]) for hello in served.core.hellos] == [("requests", "")]


def test_topics_are_a_bounded_union() -> None:
    topics = Topics(most=3)
    for name in ("b", "a", "a", f"{ID}.stdout"):
        topics.hear(b"\1" + name.encode())
    asked = json.loads(topics.request())
    assert asked["topics"] == asked["announce"] == sorted(["a", "b", f"{ID}.stdout"])
    topics.hear(b"\1c")
    topics.hear(b"\1a")
    assert topics.changed
    asked = json.loads(topics.request())
    assert (asked["topics"], asked["announce"]) == ([""], ["a", "c"]), "too many: the core is asked for everything"
    topics.hear(b"\0b")
    assert json.loads(topics.request())["topics"] == sorted(["a", "c", f"{ID}.stdout"]), "until they are fewer"
    for name in ("d", "e", "f"):
        topics.hear(b"\1" + name.encode())
    topics.hear(b"\0e")
    assert json.loads(topics.request())["announce"] == ["d", "f"] and not topics.changed


@pytest.mark.parametrize("message, new_bytes", [
    (b"", 0), (b"\2x", 0), (b"\0x", 0), (b"\1", 0), (b"\1server", 6), (b"\1\xff\xfe", 2), (b"\1a\nb", 3),
    (b"\1" + b"x" * 64, 64), (b"\1" + b"x" * 900, 900), (b"\0" + b"x" * 900, 0)])
def test_what_is_no_topic_is_only_counted(message: bytes, new_bytes: int) -> None:
    topics = Topics()
    assert topics.hear(message) == new_bytes
    taken = message[:1] == b"\1" and len(message) < 66 and message[1:].decode("latin-1").isprintable() \
        and message[1:].isascii()
    assert json.loads(topics.request())["topics"] == ([message[1:].decode()] if taken else [])
    assert topics.hear(message) == (0 if taken else new_bytes), "what is known costs nothing more"


# ---------------------------------------------------------------- the keeper's child

class Child:
    """A `_shell` process and the keeper's end of its channel."""

    def __init__(self, config: ServerConfig, **more: Any) -> None:
        self.channel, theirs = socket.socketpair()
        self.process = subprocess.Popen([sys.executable, str(MAIN), "_shell"], stdin=theirs,
                                        stderr=subprocess.PIPE, start_new_session=True)
        theirs.close()
        self.say({"config": config.to_json(), "started_at": 0.0, "generation": 1, "keeper_pid": os.getpid(), **more})
        self.channel.settimeout(30)
        self.words = self.channel.makefile("rb")

    def say(self, word: Dict[str, Any]) -> None:
        self.channel.sendall(json.dumps(word).encode() + b"\n")

    def hear(self) -> Dict[str, Any]:
        word: Dict[str, Any] = json.loads(self.words.readline())
        return word

    def hang_up(self) -> None:
        self.words.close()
        self.channel.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        assert self.process.stderr
        self.process.stderr.close()
        self.hang_up()


def config_in(state_dir: Path, **settings: Any) -> ServerConfig:
    return ServerConfig(**{"state_dir": str(state_dir), "endpoint": ANY_PORT, "pub_endpoint": ANY_PORT, **settings})


def test_the_child_serves_until_told_and_not_before(state_dir: Path) -> None:
    with FakeCore(socket_path(str(state_dir)), answer), contextlib.closing(Child(config_in(state_dir))) as child:
        ready = child.hear()["ready"]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child.process.send_signal(number)
        with zmq.Context() as context, context.socket(zmq.REQ) as req:
            req.linger = 0
            req.connect(ready["endpoint"])
            req.send(b'{"request_id": "a"}')
            assert json.loads(req.recv())["request_id"] == "a"
        assert ready["pub_endpoint"].startswith("tcp://127.0.0.1:")
        child.say({"stop": True})
        assert child.process.wait(20) == 0


def test_a_restarted_child_takes_the_same_addresses(state_dir: Path) -> None:
    with FakeCore(socket_path(str(state_dir)), answer):
        with contextlib.closing(Child(config_in(state_dir))) as child:
            ready = child.hear()["ready"]
        with contextlib.closing(Child(config_in(state_dir), **ready)) as child:
            assert child.hear()["ready"] == ready


def test_a_child_that_cannot_listen_says_why(state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with contextlib.closing(Child(config_in(state_dir, endpoint=endpoint))) as child:
            assert "already listens" in child.hear()["failed"]
            assert child.process.wait(20) == 1
            assert child.process.stderr and b"Traceback" not in child.process.stderr.read()


def test_an_orphaned_child_stays_while_there_is_a_core(state_dir: Path) -> None:
    with FakeCore(socket_path(str(state_dir)), answer) as core:
        with contextlib.closing(Child(config_in(state_dir))) as child:
            endpoint = child.hear()["ready"]["endpoint"]
            child.hang_up()
            with zmq.Context() as context, context.socket(zmq.REQ) as req:
                req.linger = 0
                req.connect(endpoint)
                for _ in range(3):
                    req.send(b'{"request_id": "a"}')
                    assert json.loads(req.recv())["request_id"] == "a"
            core.close()
            assert child.process.wait(30) == 0
