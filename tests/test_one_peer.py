"""One peer cannot end, fool or starve the shell: each attack by one, with an honest client beside it.

Owns:    bounds on frames, on bytes before a message is whole, on requests that wait, on replies nobody reads, on
         connections; and whose turn it is.
Runs in: the test process; most servers are threads of it with a core that is none, some are real.
Unaware: of subscribers (test_fuzz_topics.py) and of peers that speak something else (test_strangers.py).
"""
from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from fakecore import Connection
from served import Served, answer
from support import DEADLINE_SECS, MAIN, Server, short_dir, wait_until
from wire import LineWire
from zmtp import GREETING, RawSubscriber, message

zmq = pytest.importorskip("zmq")

from agentserver.shell import peers  # noqa: E402
from agentserver.shell.endpoints import failed_reply  # noqa: E402

MIB = 1024 * 1024


@pytest.fixture
def serve(state_dir: Path) -> Iterator[Callable[..., Served]]:
    """Serve with a core that answers as a test wants."""
    with contextlib.ExitStack() as running:
        def start(handler: Any = answer, **settings: Any) -> Served:
            return running.enter_context(contextlib.closing(Served(state_dir, handler, **settings)))
        yield start


def dealer(endpoint: str, room: int = 256 * 1024) -> RawSubscriber:
    """Return a DEALER that reads only when told to."""
    return RawSubscriber(endpoint, kind=b"DEALER", room=room)


def request(n: object, **fields: object) -> bytes:
    return json.dumps({"type": "health_check_request", "request_id": str(n), **fields}).encode()


def framed(raw: bytes) -> bytes:
    """Return a request as it travels: the empty frame and itself."""
    return message(b"", more=True) + message(raw)


def reply_of(peer: RawSubscriber) -> Dict[str, Any]:
    assert peer.frame() == b"", "a reply comes back in its envelope"
    reply: Dict[str, Any] = json.loads(peer.frame())
    return reply


def asked(endpoint: str, raw: bytes) -> Dict[str, Any]:
    """Ask as a newcomer with a REQ socket."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.linger, sock.rcvtimeo = 0, int(DEADLINE_SECS * 1000)
        sock.connect(endpoint)
        sock.send(raw)
        reply: Dict[str, Any] = json.loads(sock.recv())
        return reply


def cut_off(peer: RawSubscriber) -> bool:
    """Whether the server ended this connection; what it had sent before is read first."""
    peer.socket.settimeout(DEADLINE_SECS)
    try:
        while peer.socket.recv(1 << 20):
            pass
    except ConnectionError:
        return True
    except socket.timeout:
        return False
    return True


# ---------------------------------------------------------------- envelopes

@pytest.mark.parametrize("before", [0, 1, 8])
def test_an_envelope_comes_back_as_it_was(serve: Callable[..., Served], before: int) -> None:
    served = serve()
    way = [b"hop %d" % n for n in range(before)]
    with contextlib.closing(dealer(served.server.endpoint)) as peer:
        peer.socket.sendall(b"".join(message(hop, more=True) for hop in way) + framed(request("a")))
        assert [peer.frame() for _ in way] == way
        assert reply_of(peer)["request_id"] == "a"


@pytest.mark.parametrize("frames, back, sentence", [
    ([b"{}"], 1, "one empty frame"),                                    # a DEALER that forgot the empty frame
    ([b"a", b"b"], 1, "one empty frame"),
    ([b"", b"{}", b"{}"], 2, "several frames"),
    ([b""], 2, "several frames"),
    ([b"x"] * 9 + [b"", b"{}"], 1, "one empty frame"),                  # one more than may be before it
    ([b"x"] * 500, 1, "one empty frame")])
def test_what_is_not_framed_right_is_told_how(serve: Callable[..., Served], frames: List[bytes], back: int,
                                              sentence: str) -> None:
    served = serve()
    with contextlib.closing(dealer(served.server.endpoint)) as peer:
        peer.socket.sendall(b"".join(message(part, more=True) for part in frames[:-1]) + message(frames[-1]))
        reply = json.loads([peer.frame() for _ in range(back)][-1])
        assert reply["error_code"] == "bad_request" and sentence in reply["error"]
        peer.socket.sendall(framed(request("b")))
        assert reply_of(peer)["request_id"] == "b"


def test_peers_without_an_envelope_that_have_gone_take_no_reply_of_others(serve: Callable[..., Served]) -> None:
    served = serve()
    for n in range(40):
        with contextlib.closing(dealer(served.server.endpoint)) as peer:
            peer.socket.sendall(message(request("junk")))
        assert asked(served.server.endpoint, request(n))["request_id"] == str(n)


# ---------------------------------------------------------------- before a message is whole

def test_a_message_of_a_million_frames_costs_its_sender_the_connection(serve: Callable[..., Served]) -> None:
    served = serve()
    with contextlib.closing(dealer(served.server.endpoint)) as peer:
        with contextlib.suppress(OSError):
            peer.socket.sendall(message(b"", more=True) * 1_000_000 + message(b"{}"))
        assert asked(served.server.endpoint, request("honest"))["success"]
        assert cut_off(peer)
    assert asked(served.server.endpoint, request("later"))["success"]


@pytest.mark.parametrize("part, most", [(b"", 12 * MIB), (bytes(60_000), 100 * MIB)])
def test_frames_without_end_are_cut_off(server: Server, part: bytes, most: int) -> None:
    before, sent, piece = server.pids(), 0, message(part, more=True) * (50_000 if not part else 10)
    with contextlib.closing(dealer(server.endpoint)) as peer, contextlib.suppress(OSError):
        while sent < 1024 * MIB:
            peer.socket.sendall(piece)
            sent += len(piece)
    assert sent < 1024 * MIB and asked(server.endpoint, request("a"))["success"]
    assert server.pids() == before and rss(before["shell"]) < 300 * MIB


def test_a_slow_sender_of_a_large_message_is_waited_for(serve: Callable[..., Served]) -> None:
    """What counts is what is not whole, however many messages were before."""
    served = serve()
    large = b'{"request_id": "large", "x": "' + b"x" * (9 * MIB) + b'"}'
    with contextlib.closing(dealer(served.server.endpoint)) as peer:
        for _ in range(4):
            data = framed(large)
            for at in range(0, len(data), MIB):
                peer.socket.sendall(data[at:at + MIB])
                assert asked(served.server.endpoint, request("meanwhile"))["success"]
            assert reply_of(peer)["request_id"] == "large"


def rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


# ---------------------------------------------------------------- turns

class Held:
    """A core that holds what asks to be held, and answers all else."""

    def __init__(self, deferred: bool = True) -> None:
        self.held: List[Tuple[Connection, int, bytes]] = []
        self._deferred = deferred

    def __call__(self, raw: bytes, connection: Connection) -> Optional[bytes]:
        if b'"hold"' not in raw:
            return answer(raw, connection)
        self.held.append((connection, connection.tag, raw))
        if self._deferred:
            connection.defer()
        return None

    def let_go(self) -> None:
        for connection, tag, raw in self.held:
            reply = answer(raw, connection)
            assert reply is not None
            connection.reply(reply, tag)


def test_what_the_core_answers_later_holds_nobody_else(serve: Callable[..., Served]) -> None:
    core = Held()
    served = serve(core)
    with contextlib.ExitStack() as open_peers:
        slow = [open_peers.enter_context(contextlib.closing(dealer(served.server.endpoint))) for _ in range(40)]
        for n, peer in enumerate(slow):
            peer.socket.sendall(framed(request(n, hold=True)))
        wait_until(lambda: len(core.held) == 40)
        for n in range(20):
            assert asked(served.server.endpoint, request(f"quick {n}"))["request_id"] == f"quick {n}"
        slow[0].socket.sendall(framed(request("mine")))
        assert reply_of(slow[0])["request_id"] == "mine", "nor the asker itself"
        core.let_go()
        assert [reply_of(peer)["request_id"] for peer in slow] == [str(n) for n in range(40)]


def test_a_core_that_says_nothing_of_later_replies_is_served_too(serve: Callable[..., Served]) -> None:
    """An older core, in the middle of a reload."""
    core = Held(deferred=False)
    served = serve(core)
    with contextlib.closing(dealer(served.server.endpoint)) as peer:
        peer.socket.sendall(framed(request("slow", hold=True)))
        wait_until(lambda: core.held)
        assert asked(served.server.endpoint, request("quick"))["request_id"] == "quick"
        core.let_go()
        assert reply_of(peer)["request_id"] == "slow"


def test_a_line_is_bounded_and_the_lines_take_turns(serve: Callable[..., Served]) -> None:
    core = Held(deferred=False)
    served = serve(core)
    with contextlib.closing(dealer(served.server.endpoint)) as greedy:
        total = peers.LINE_MOST + peers.AT_ONCE + 5
        greedy.socket.sendall(b"".join(framed(request(n, hold=True)) for n in range(total)))
        refused = [reply_of(greedy) for _ in range(5)]
        assert {reply["error_code"] for reply in refused} == {"rate_limited"}
        assert all(reply["retry_after_secs"] > 0 and reply["type"] == "health_check_response" for reply in refused)
        assert [reply["request_id"] for reply in refused] == [str(n) for n in range(total - 5, total)]
        assert len(core.held) == peers.AT_ONCE, "the rest waits where it holds nobody"
        assert asked(served.server.endpoint, request("honest"))["success"]


def test_large_requests_in_a_row_fill_only_their_senders_line(serve: Callable[..., Served]) -> None:
    served = serve()
    large = request("large", x="x" * (10 * MIB))
    with contextlib.closing(dealer(served.server.endpoint)) as greedy:
        sender = threading.Thread(target=lambda: [greedy.socket.sendall(framed(large)) for _ in range(10)])
        sender.start()
        for n in range(20):
            assert asked(served.server.endpoint, request(n))["request_id"] == str(n)
        replies = [reply_of(greedy) for _ in range(10)]
        assert all(reply["success"] or reply["error_code"] == "rate_limited" for reply in replies)
        assert {reply["request_id"] for reply in replies} == {"large"}
        sender.join(DEADLINE_SECS)


def test_what_waits_in_a_line_is_bounded_in_bytes(serve: Callable[..., Served]) -> None:
    core = Held(deferred=False)
    served = serve(core)
    with contextlib.closing(dealer(served.server.endpoint)) as greedy:
        for n in range(5):  # the core has two, and one waits
            greedy.socket.sendall(framed(request(n, hold=True, x="x" * (7 * MIB))))
            due = min(n + 1, 2)
            wait_until(lambda: len(core.held) == due)
        refused = [reply_of(greedy) for _ in range(2)]
        assert [(reply["request_id"], reply["error_code"]) for reply in refused] == [
            (str(n), "rate_limited") for n in (3, 4)]


def test_each_connection_is_an_asker_of_its_own(serve: Callable[..., Served]) -> None:
    """The core takes turns among those who search by this."""
    headers: List[Dict[str, Any]] = []

    def handler(raw: bytes, connection: Connection) -> Optional[bytes]:
        if b"health" in raw:
            headers.append(connection.header)
        return answer(raw, connection)
    served = serve(handler)
    with contextlib.closing(dealer(served.server.endpoint)) as peer:
        for _ in range(2):
            peer.socket.sendall(framed(request("a")))
            reply_of(peer)
        asked(served.server.endpoint, request("b"))
    one, two, three = headers
    assert one == two and {header["name"] for header in headers} == {"tcp client"}
    assert one["connection"] != three["connection"] and one["connection"]


def test_who_asks_over_ipc_is_called_so(serve: Callable[..., Served], run_dir: Path) -> None:
    names: List[str] = []

    def handler(raw: bytes, connection: Connection) -> Optional[bytes]:
        if b"health" in raw:
            names.append(connection.header["name"])
        return answer(raw, connection)
    served = serve(handler, endpoint=f"ipc://{short_dir(run_dir)}/req")
    asked(served.server.endpoint, request("a"))
    assert names == ["ipc client"]


@pytest.mark.parametrize("raw, kind, request_id", [
    (b'{"type":"spawn_request","request_id":"a","x":"%s"}', "spawn_response", "a"),
    (b' { "request_id": "b", "type" : "control_command","x":"%s"}', "command_response", "b"),
    (b'{"x":"%s","type":"spawn_request"}', "error_response", None)])
def test_a_large_request_is_refused_without_being_read(raw: bytes, kind: str, request_id: Optional[str]) -> None:
    reply = json.loads(failed_reply(raw.replace(b"%s", b"x" * MIB), "unavailable", "away"))
    assert (reply["type"], reply["request_id"]) == (kind, request_id)


# ---------------------------------------------------------------- replies that nobody reads

def test_replies_that_nobody_reads_are_bounded(server: Server) -> None:
    """440 MiB of them."""
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("burst", 8_000_000, 0, ready=False)
        wire.ended(agent)
    before = server.pids()
    read = json.dumps({"type": "control_command", "request_id": "r", "agent_id": agent, "command_type": "read_stdout",
                       "payload": {"offset": 0, "limit": 4 * MIB}}).encode()
    with contextlib.closing(dealer(server.endpoint, room=4096)) as peer:
        peer.socket.sendall(framed(read) * 60)
        worst = 0

        def cut() -> bool:
            nonlocal worst
            worst = max(worst, rss(before["shell"]))
            asked(server.endpoint, request("honest"))
            try:
                peer.socket.sendall(framed(request("more")))
            except ConnectionError:
                return True
            return False
        wait_until(cut, what="it to be cut off")
    assert worst < 200 * MIB and server.pids() == before


def test_a_slow_reader_gets_all_its_replies_in_order(serve: Callable[..., Served]) -> None:
    big = b"y" * 300_000
    served = serve(lambda raw, connection: answer(raw, connection) if b"sub" in raw else raw[:40] + big)
    with contextlib.closing(dealer(served.server.endpoint, room=4096)) as peer:
        for n in range(60):
            peer.socket.sendall(framed(b"%40d" % n))
        got = []
        for _ in range(60):
            assert peer.frame() == b""
            got.append(int(peer.frame()[:40]))
        assert got == list(range(60))


# ---------------------------------------------------------------- connections

@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process have as many as it may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("attacked", ["endpoint", "pub_endpoint"])
def test_idle_connections_lock_nobody_out(start_server: Callable[..., Server], many_descriptors: None,
                                          attacked: str) -> None:
    """More than there are descriptors: those that never said anything go first, oldest first."""
    few = ["sh", "-c", 'ulimit -n 400; exec "$0" "$@"', sys.executable, str(MAIN)]
    server = start_server("--max-agents", "5", program=few)
    before = server.pids()
    with contextlib.ExitStack() as open_sockets:
        honest = open_sockets.enter_context(contextlib.closing(dealer(server.endpoint)))
        honest.socket.sendall(framed(request("before")))
        reply_of(honest)
        host, _, port = getattr(server, attacked).partition("://")[2].rpartition(":")
        idle = [open_sockets.enter_context(socket.create_connection((host, int(port)), DEADLINE_SECS))
                for _ in range(1200)]
        assert asked(server.endpoint, request("newcomer"))["success"]
        honest.socket.sendall(framed(request("after")))
        assert reply_of(honest)["request_id"] == "after", "one that has asked is no stranger"
        idle[0].settimeout(DEADLINE_SECS)
        with contextlib.suppress(ConnectionError):
            while idle[0].recv(1000):
                pass  # our greeting, and then the end
        wait_until(lambda: len(os.listdir(f"/proc/{before['shell']}/fd")) <= 400 - 32, what="some to be free again")
        assert asked(server.endpoint, request("newcomer"))["success"]
    assert server.pids() == before and "Traceback" not in server.logs()


def test_a_handshake_that_does_not_end_is_ended(server: Server) -> None:
    host, _, port = server.endpoint.partition("://")[2].rpartition(":")
    with socket.create_connection((host, int(port)), DEADLINE_SECS) as slow:
        slow.sendall(GREETING[:20])
        while slow.recv(1000):
            pass


def test_an_idle_server_is_not_woken(server: Server) -> None:
    """Neither by connections that say nothing, nor by ones that have."""
    shell = server.pids()["shell"]
    with contextlib.closing(dealer(server.endpoint)) as peer, contextlib.closing(dealer(server.endpoint)):
        peer.socket.sendall(framed(request("a")))
        reply_of(peer)

        def switches() -> int:
            return sum(int(line.split()[1]) for task in os.listdir(f"/proc/{shell}/task")
                       for line in Path(f"/proc/{shell}/task/{task}/status").read_text().splitlines()
                       if line.startswith("voluntary_ctxt"))
        last = [switches()]

        def quiet() -> bool:
            last.append(switches())
            return len(last) > 60 and last[-1] == last[-50]
        wait_until(quiet, what="half a second without a wake-up")


# ---------------------------------------------------------------- between two shells

def test_a_raw_client_loses_nothing_in_reloads(server: Server) -> None:
    """Ordinary REQ sockets, which ask nothing twice, while the shell is replaced three times."""
    stop, counts, errors = threading.Event(), [0, 0, 0, 0], []

    def client(which: int) -> None:
        with zmq.Context() as context, context.socket(zmq.REQ) as sock:
            sock.linger, sock.rcvtimeo = 0, int(DEADLINE_SECS * 1000)
            sock.connect(server.endpoint)
            try:
                while not stop.is_set():
                    sock.send(request(f"{which}-{counts[which]}"))
                    assert json.loads(sock.recv())["request_id"] == f"{which}-{counts[which]}"
                    counts[which] += 1
            except BaseException as e:
                errors.append(e)

    clients = [threading.Thread(target=client, args=(which,)) for which in range(len(counts))]
    for each in clients:
        each.start()
    try:
        for _ in range(3):
            before, shell = list(counts), server.pids()["shell"]
            server.ask({"type": "reload_request"})

            def followed() -> bool:
                with contextlib.suppress(OSError, ValueError, KeyError):  # the core is being replaced, too
                    return server.pids()["shell"] not in (0, shell)
                return False
            wait_until(followed, what="the next shell")
            wait_until(lambda: errors or all(now > then for now, then in zip(counts, before)), what="all to go on")
            assert not errors, (counts, server.logs())
    finally:
        stop.set()
        for each in clients:
            each.join(DEADLINE_SECS)
    assert not errors, (errors, counts, server.logs())
