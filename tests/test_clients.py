"""Both clients, over every link, against real servers: each method does what it says, and a follower gets everything.

Owns:    the contract of AgentClient and AsyncAgentClient: what they return, and following: each byte and event once, in
         order, or an explicit gap; nothing asked while nothing happens.
Runs in: the test process; servers and agents are real. The asynchronous client is driven by driven.py.
Unaware: of lies and lost messages (test_client.py), and of cancellation (test_async.py).
"""
from __future__ import annotations

import datetime
import hashlib
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Set, Tuple

import pytest
from support import Server, agent, wait_until
from wire import LineWire

from agentserver import AgentClient, EventsDropped, OutputDropped, RequestError, RequestTimeout

MIB = 1024 * 1024


def together(items: Iterator[Any]) -> Dict[Tuple[str, str], bytes]:
    """Put together what a follower yields; each piece begins where the one before ended."""
    got: Dict[Tuple[str, str], bytes] = {}
    reached: Dict[Tuple[str, str], int] = {}
    for agent_id, stream, what in items:
        key = agent_id, stream
        assert what.offset == reached.get(key, what.offset)
        got[key] = got.get(key, b"") + what.data
        reached[key] = what.next_offset
    return got


# ---------------------------------------------------------------- each method

def test_a_life(client: AgentClient, shared_server: Server) -> None:
    assert client.health().healthy and client.health().metadata["server_id"]
    before = client.stats().spawn_requests
    echo = client.spawn(agent("echo"), name="an echo", labels={"a": "b"}, metadata={"n": 1}, request_id="x" * 20)
    assert client.spawn(agent("echo"), name="an echo", labels={"a": "b"}, metadata={"n": 1},
                        request_id="x" * 20).id == echo.id
    assert client.stats().spawn_requests > before
    lines = echo.lines()
    assert next(lines) == "ready"
    assert [info.id for info in client.list(labels={"a": "b"})] == [echo.id] == [client.resolve("an echo")]
    assert client.agent("an echo").id == echo.id and client.list(limit=0) == []
    assert client.command(echo.id, "get_status")["status"] == echo.status == "running"
    assert client.control(echo.id, "custom_action", action="ping") == {"pong": True}
    assert client.custom_action(echo.id, "echo", {"x": [1]}) == {"echo": {"x": [1]}}
    assert echo.info().metadata == {"n": 1} and echo.inspect()["spec"]["name"] == "an echo"
    assert echo.pause()["paused"] and echo.status == "paused" and echo.resume()["resumed"]
    assert client.batch("pause", labels={"a": "b"}).successful == 1
    assert client.batch("pause", [echo.id]).failed == 1 and client.batch("resume", [echo.id]).success
    assert echo.write("grüße\n") == 8 and echo.write(b"\xff\n") == 2
    assert [next(lines), next(lines)] == ["grüße", "\ufffd"]
    chunk = echo.read(offset=6, times=True)
    assert (chunk.data, chunk.offset, chunk.next_offset, chunk.eof) == ("grüße\n".encode() + b"\xff\n", 6, 16, False)
    assert chunk.times
    echo.close_stdin()
    assert list(lines) == [] and echo.wait(30).code == 0 and echo.status == "completed"
    assert list(echo.lines(follow=False)) == ["ready", "grüße", "\ufffd"]
    page = client.events(agent=echo.id, limit=2)
    assert len(page.events) == 2 and page.more and page.next == page.events[-1]["sequence"] >= page.first_kept
    assert echo.restart()["attempt"] == 2
    wait_until(lambda: echo.read(offset=16).data == b"ready\n", what="Python to be there before the signal is")
    assert echo.signal("INT")["signal_sent"] == "SIGINT"
    assert echo.wait(30).signal == "SIGINT"
    echo.remove()
    with pytest.raises(RequestError) as caught:
        echo.info()
    assert caught.value.code == "agent_not_found" and caught.value.reply


def test_ways_to_end(client: AgentClient) -> None:
    agents = [client.spawn(agent("sleeper")) for _ in range(3)]
    with pytest.raises(RequestTimeout, match="had not ended"):
        agents[0].wait(0.01)
    agents[0].stop(0)
    assert client.wait([each.id for each in agents], any=True, timeout=30)[0].id == agents[0].id
    agents[1].kill()
    client.request({"type": "control_command", "agent_id": agents[2].id, "command_type": "kill"})
    infos = client.wait([each.id for each in agents], timeout=30)
    assert [info.id for info in infos] == [each.id for each in agents]
    assert {info.status for info in infos} == {"terminated"}


def test_what_is_refused_and_what_is_not_there(client: AgentClient) -> None:
    for call in (lambda: client.agent("nobody"), lambda: client.wait("nobody"),
                 lambda: next(client.follow("nobody")), lambda: next(client.follow_events(agent="nobody")),
                 lambda: client.spawn(["/no/such/program"])):
        with pytest.raises(RequestError):
            call()
    with pytest.raises(TypeError, match="comand"):
        client.spawn(comand=["x"])


@pytest.mark.parametrize("arguments, sentence", [
    ({"streams": ["stdin"]}, "no stream 'stdin'; there are stdout and stderr"),
    ({"streams": "out"}, "no stream 'out'"),
    ({"since": 5}, "since is 5; give a time"),
    ({"since": {"out": 1}}, "an offset is given for 'out'"),
    ({"offsets": {("a", "b", "stdout"): 1}}, "pair of agent id and name"),
    ({"offsets": {"stdout": "1"}}, "the offset for 'stdout' is '1'; give a whole number"),
    ({"offsets": {"stdout": -1}}, "0 or more")], ids=str)
def test_what_cannot_be_followed_is_refused_at_once(client: AgentClient, arguments: Any, sentence: str) -> None:
    """It would be waited for for ever, or be followed from another place than was meant."""
    one = client.spawn(agent("exit_with", "0"))
    with pytest.raises(RequestError, match=sentence):
        next(client.follow(one.id, **arguments))
    assert together(client.follow(one.id, streams="stdout")) == {(one.id, "stdout"): b"ready\n"}


# ---------------------------------------------------------------- following output

def test_early_and_late_followers_get_every_byte(client: AgentClient, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    lines = client.spawn(agent("lines", "40000", "0", str(sums)))
    early = together(client.follow(lines.id, timeout=60))
    late = together(client.follow(lines.id, timeout=60))
    assert early == late
    out, err = early[lines.id, "stdout"], early[lines.id, "stderr"]
    assert sums.read_text().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                        str(len(err)), hashlib.sha256(err).hexdigest()]


def test_several_agents_are_followed_at_once(client: AgentClient) -> None:
    agents = [client.spawn(agent("burst", str(100_000 * n), str(1000 * n)), name=f"b{n}") for n in range(4)]
    got = together(client.follow([f"b{n}" for n in range(4)], timeout=60))
    assert {key: len(data) for key, data in got.items()} == {
        key: size for n, each in enumerate(agents)
        for key, size in (((each.id, "stdout"), 6 + 100_000 * n), ((each.id, "stderr"), 1000 * n)) if size}


def test_output_past_the_cap_is_one_gap(twin: Any, link: str, start_server: Callable[..., Server]) -> None:
    if link == "ipc":
        pytest.skip("as over tcp")
    server = start_server("--output-cap-bytes", str(2 * MIB))
    with twin(server.address(link)) as client:
        burst = client.spawn(agent("burst", "10000000", "0"))
        burst.wait(60)
        (_, _, gap), *rest = client.follow(burst.id, streams=["stdout"], since={"stdout": 100})
        first = client.agent(burst.id).info().output["stdout"].first_offset
        assert gap == OutputDropped(burst.id, "stdout", 100, first) and first > 7 * MIB
        data = b"".join(chunk.data for _, _, chunk in rest)
        assert data == bytes((first - 6 + i) % 251 for i in range(10_000_006 - first))
        assert not [chunk for _, _, chunk in rest if chunk.dropped]


def pass_time() -> float:
    """Return a moment that has just passed, milliseconds from anything else: within one, times are shared."""
    moment = time.time() + 0.005
    wait_until(lambda: time.time() > moment + 0.005)
    return moment


def test_where_to_begin(client: AgentClient) -> None:
    told = client.spawn(agent("print_when"))
    lines = told.lines()
    assert next(lines) == "ready"
    pass_time()
    told.write("out first\n")
    assert next(lines) == "first"
    between = told.read(offset=6, times=True).times[-1][0]
    moment = pass_time()
    told.write("out second\nerr oh\nexit 0\n")
    told.wait(30)
    after = datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)
    key, other = (told.id, "stdout"), (told.id, "stderr")
    assert together(client.follow(told.id, since=after)) == {key: b"second\n", other: b"oh\n"}
    assert together(client.follow(told.id, since=between)) == {key: b"first\nsecond\n", other: b"oh\n"}
    assert together(client.follow(told.id, since={"stdout": 12, other: 1})) == {key: b"second\n", other: b"h\n"}
    assert together(client.follow(told.id, streams=["stdout"], offsets={key: 14})) == {key: b"cond\n"}
    assert together(client.follow(told.id, since={"stdout": 10 ** 9, "stderr": 3})) == {}


# ---------------------------------------------------------------- following events

def test_events_come_once_and_in_order_from_any_point(client: AgentClient) -> None:
    start = client.events(2 ** 62, limit=1).next
    ended = [client.spawn(agent("exit_with", str(n % 2))).id for n in range(5)]
    client.wait(ended, timeout=30)
    latest = client.events(2 ** 62, limit=1).next
    stored = client.events(start).events
    followed = client.follow_events(since=start)
    assert [next(followed) for _ in stored] == stored
    assert [event["sequence"] for event in stored] == list(range(start + 1, latest + 1))
    one = [event for event in stored if event["agent_id"] == ended[2]]
    of_one = client.follow_events(since=start, agent=ended[2])
    assert [next(of_one) for _ in one] == one
    of_one.close()  # type: ignore[attr-defined]
    more = client.spawn(agent("exit_with", "0")).id
    client.wait(more, timeout=30)
    rest = client.events(latest).events
    assert len(rest) >= 2 and [next(followed) for _ in rest] == rest
    followed.close()  # type: ignore[attr-defined]


def test_events_that_are_gone_are_one_gap(twin: Any, link: str, start_server: Callable[..., Server]) -> None:
    if link == "ipc":
        pytest.skip("as over tcp")
    server = start_server("--events-kept", "100")
    with twin(server.address(link)) as client:
        echo = client.spawn(agent("echo"))
        while client.events(0, limit=1).first_kept < 50:
            for _ in range(20):
                echo.pause()
                echo.resume()
        events = client.follow_events(since=5)
        gap, first = next(events), next(events)
        assert isinstance(gap, EventsDropped) and gap.from_sequence == 6
        assert first["sequence"] == gap.to_sequence + 1 >= 50
        events.close()


# ---------------------------------------------------------------- at rest

class Idle:
    """Everything that can be followed or waited for, each in a thread of its own."""

    def __init__(self, twin: Any, address: str, ref: str) -> None:
        self.heard: Set[int] = set()  # which of them have been told anything: the last is so of the end alone
        works = [lambda client: client.follow(ref), lambda client: client.follow_events(),
                 lambda client: client.follow_events(agent=ref), lambda client: client.wait(ref)]
        self._threads = [threading.Thread(target=self._run, args=(twin, address, which, work), daemon=True)
                         for which, work in enumerate(works)]
        for thread in self._threads:
            thread.start()

    def _run(self, twin: Any, address: str, which: int, work: Callable[[Any], Any]) -> None:
        with twin(address) as client:
            for item in work(client):
                self.heard.add(which)
                if isinstance(item, dict) and item.get("status") == "terminated":
                    return

    def finished(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("way", ["unix", "tcp", "stdio"])
def test_who_follows_and_waits_asks_nothing_while_nothing_happens(
        twin: Any, way: str, start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "0.2")
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper", "hello")
        wire.until_output(sleeper, b"hello\n")
        idle = Idle(twin, server.address(way), sleeper)

        def all_heard() -> bool:
            for command in ("pause", "resume"):
                wire.control(sleeper, command)
            return idle.heard >= {0, 1, 2}
        wait_until(all_heard, what="everybody who follows to be told of it")
        wire.subscribe("server")

        def asked_during(beats: int) -> int:
            before = wire.ok("stats_request")["stats"]["requests"]
            for _ in range(beats):
                wire.event(lambda event: event.get("update_type") == "heartbeat")
            return int(wire.ok("stats_request")["stats"]["requests"]) - before - 1
        # Who asks now and then never leaves ten beats alone; who still begins, or was kept from a beat, soon does.
        wait_until(lambda: asked_during(10) == 0, what="ten heartbeats of which nobody asks")
        wire.control(sleeper, "kill")
        idle.finished()
