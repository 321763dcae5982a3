"""Querying output over the wire: what is found, and what a query costs the others.

Owns:    `output_query_request` and `query_output` over every link; patterns and processes that misbehave; deaths of the
         processes that search, of the core, and of who asked.
Runs in: the test process; servers and agents are real. It signals only processes of the servers that it started.
Unaware: of how lines are found (test_query.py).
"""
from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import Server, marked_processes, wait_until
from wire import LineWire, Wire, ZmqWire, new_id, process_state

from agentserver import AgentClient
from agentserver.errors import RequestError
from agentserver.messages import COMMANDS, MAX_PATTERN

SEED = int(os.environ.get("FUZZ_SEED", "20261125"))
HOSTILE = "(a+)+$"
#: for ten seconds, which is as long as a pattern can be given
SLOW = ("--pattern-timeout-secs", "10")


def written(wire: Wire, tmp_path: Path, out: bytes, err: bytes = b"") -> str:
    """Return an agent that has written just this, and has ended."""
    for name, data in (("out", out), ("err", err)):
        (tmp_path / name).write_bytes(data)
    command = ["/bin/sh", "-c", "cat out; cat err >&2"]
    ended = wire.spawn("exit_with", 0, command=command, cwd=str(tmp_path), ready=False)
    wire.ended(ended)
    return ended


def find(wire: Wire, ref: str, stream: str = "stdout", **what: Any) -> tuple[list[str], int, bool]:
    """Return lines, total_lines and has_more."""
    reply = wire.ok("output_query_request", agent_id=ref, stream=stream, **what)
    assert set(reply) == {"type", "request_id", "success", "lines", "total_lines", "has_more"}
    return reply["lines"], reply["total_lines"], reply["has_more"]


def searchers(server: Server) -> list[int]:
    """Return the processes of a server that search in output."""
    return [pid for pid, command in marked_processes(server.mark).items() if command.endswith(" _query")]


def at_work(server: Server, count: int = 1) -> list[int]:
    """Wait until so many processes search, and are past the beginning of Python."""
    def busy() -> list[int]:
        found = [pid for pid in searchers(server) if _cpu_ticks(pid) >= 5]
        return found if len(found) == count else []
    return wait_until(busy, what=f"{count} searches to be at work")


def _cpu_ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return int(f.read().rpartition(")")[2].split()[11])
    except OSError:
        return 0


def none_left(server: Server) -> None:
    """Wait until nobody searches, and no zombie of who did is left with the core."""
    def none() -> bool:
        core = server.pids()["core"]
        with open(f"/proc/{core}/task/{core}/children") as f:
            return not searchers(server) and not [pid for pid in f.read().split() if process_state(int(pid)) == "Z"]
    wait_until(none, what="the end of all searches")


def asking(wire: LineWire, ref: str, request_id: str = "", **what: Any) -> str:
    """Ask without waiting; return the request id."""
    request_id = request_id or new_id()
    wire.send(json.dumps({"type": "output_query_request", "request_id": request_id, "agent_id": ref, "stream": "stdout",
                          **what}).encode())
    return request_id


def reply(wire: LineWire) -> dict[str, Any]:
    """Return the next reply."""
    got: dict[str, Any] = json.loads(wire.receive())
    return got


@pytest.fixture
def slow(start_server: Callable[..., Server]) -> Server:
    """A server on which a hostile pattern may be at work for long, one at a time."""
    return start_server(*SLOW, "--queries", "1")


@pytest.fixture
def hostile(slow: Server, tmp_path: Path) -> Iterator[tuple[Server, LineWire, str]]:
    """The slow server, a connection, and an agent on whose output the hostile pattern is at work for ever."""
    with LineWire(slow.socket_path) as wire:
        yield slow, wire, written(wire, tmp_path, b"a" * 5000 + b"!\n", b"oh\n")


# ---------------------------------------------------------------- what is found

def test_lines_by_pattern_limit_and_offset(wire: Wire, tmp_path: Path) -> None:
    ref = written(wire, tmp_path, b"".join(b"line %d\n" % n for n in range(20)) + b"line 20", b"oh\nno\n")
    every = [f"line {n}" for n in range(21)]
    assert find(wire, ref) == (every, 21, False), "an unfinished last line counts"
    assert find(wire, ref, limit=3) == (every[:3], 21, True)
    assert find(wire, ref, limit=3, offset=2) == (every[2:5], 21, True)
    assert find(wire, ref, limit=3, offset=18) == (every[18:], 21, False)
    assert find(wire, ref, offset=21) == find(wire, ref, offset=2 ** 63 - 1) == ([], 21, False)
    assert find(wire, ref, limit=0) == ([], 21, True)
    assert find(wire, ref, tail=True, limit=3) == (every[-3:], 21, True), "the last, in their order"
    assert find(wire, ref, tail=True, limit=3, offset=3) == (every[-6:-3], 21, True), "offset counts from the end"
    assert find(wire, ref, tail=True, limit=30, offset=19) == (every[:2], 21, False)
    ones = [line for line in every if "1" in line]
    assert find(wire, ref, filter="1") == (ones, 11, False)
    assert find(wire, ref, filter="1", limit=2, offset=1) == (ones[1:3], 11, True), "both count matching lines"
    assert find(wire, ref, filter="1", tail=True, limit=2, offset=1) == (ones[-3:-1], 11, True)
    assert find(wire, ref, filter=r"^line 1\d$", limit=1) == (["line 10"], 10, True)
    assert find(wire, ref, filter="nothing") == ([], 0, False)
    assert find(wire, ref, filter="") == find(wire, ref, filter=None) == (every, 21, False)
    assert find(wire, ref, "stderr") == (["oh", "no"], 2, False)
    assert find(wire, ref[:8]) == (every, 21, False)
    assert len(find(wire, written(wire, tmp_path, b"x\n" * 1500))[0]) == 1000, "unless said"


def test_what_is_a_line_and_what_is_text(wire: Wire, tmp_path: Path) -> None:
    ref = written(wire, tmp_path, b"dos\r\n\r\nbar\rbar\r\r\nform\x0cfeed \xe2\x80\xa8 \x85\nbad \xff\xc3\nend\r")
    lines = ["dos", "", "bar\rbar\r", "form\x0cfeed \u2028 \ufffd", "bad \ufffd\ufffd", "end\r"]
    assert find(wire, ref) == (lines, 6, False)
    assert find(wire, ref, filter="s$") == (["dos"], 1, False)
    assert find(wire, ref, filter="^$") == ([""], 1, False)
    assert find(wire, ref, filter="\ufffd")[1] == 2
    assert find(wire, ref, filter="d\nf") == ([], 0, False), "no pattern reaches over the end of a line"


def test_both_streams_in_the_order_of_writing(wire: Wire) -> None:
    ref = wire.spawn("print_when")
    for number in range(12):
        name = "err" if number % 3 == 2 else "out"
        wire.control(ref, "write_stdin", data=f"{name} {name} {number}\n")
        wire.until_output(ref, f"{name} {number}\n".encode(), f"std{name}")
    lines = ["ready", *(f"{'err' if n % 3 == 2 else 'out'} {n}" for n in range(12))]
    assert find(wire, ref, "both") == (lines, 13, False), "of an agent that lives, to its last line"
    assert find(wire, ref, "both", tail=True, limit=4, offset=1) == (lines[-5:-1], 13, True)
    assert find(wire, ref, "both", filter="err|1", offset=1, limit=2) == (["err 2", "err 5"], 6, True)
    data = wire.control(ref, "query_output")
    assert data == {"stdout": [line for line in lines if "err" not in line], "stdout_lines": 9,
                    "stderr": [line for line in lines if "err" in line], "stderr_lines": 4}
    data = wire.control(ref, "query_output", max_lines=2, stderr=False)
    assert data == {"stdout": ["out 9", "out 10"], "stdout_lines": 9, "stderr": [], "stderr_lines": None}
    assert wire.control(ref, "query_output", max_lines=0)["stdout_lines"] == 9
    assert wire.read(ref, "stdout")["data"].startswith("ready"), "nothing was consumed"


def test_an_agent_that_has_written_nothing(wire: Wire) -> None:
    quiet = wire.spawn("sleeper", ready=False, command=["/bin/sleep", "1000"])
    assert find(wire, quiet, "both") == find(wire, quiet, "both", filter="x", tail=True) == ([], 0, False)
    assert wire.control(quiet, "query_output") == {"stdout": [], "stdout_lines": 0, "stderr": [], "stderr_lines": 0}


@pytest.mark.parametrize("fields, said", [
    ({"stream": "stdin"}, "stream must be one of"), ({"stream": None}, "stream is missing"), ({"limit": -1}, "limit"),
    ({"offset": -1}, "offset"), ({"offset": 1.5}, "offset"), ({"tail": 1}, "tail"), ({"filter": 1}, "must be text"),
    ({"filter": "x" * (MAX_PATTERN + 1)}, "0 to 4096 characters"),
    ({"filter": "a("}, "^'a\\(' is not a regular expression: .* at character 1"), ({"filter": "a{2,1}"}, "min repeat"),
    ({"filter": "(" * 2000 + ")" * 2000}, "' is no"), ({"filter": "x{99999999999999999999}"}, "too large")])
def test_refusals_say_what_is_wrong(unix: LineWire, fields: dict[str, Any], said: str) -> None:
    ref = unix.spawn("exit_with", 0, ready=False)
    sentence = unix.refused("bad_request", "output_query_request", **{"agent_id": ref, "stream": "stdout", **fields})
    assert re.search(said, sentence), sentence


def test_refusals_of_query_output(unix: LineWire) -> None:
    ref = unix.spawn("sleeper")
    unix.cannot("bad_request", ref, "query_output", max_lines=-1)
    assert "both false" in unix.cannot("bad_request", ref, "query_output", stdout=False, stderr=False)
    batch = {"command_type": "query_output", "agent_ids": [ref]}
    assert "one agent" in unix.refused("bad_request", "batch_control_command", **batch)
    unix.cannot("agent_not_found", "nobody", "query_output")
    unix.refused("agent_not_found", "output_query_request", agent_id="nobody", stream="both")
    assert "query_output" in COMMANDS


def test_more_than_fits_into_a_reply(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server("--message-bytes", "65536")
    with LineWire(server.socket_path) as wire, ZmqWire(server.endpoint) as network:
        ref = written(wire, tmp_path, b"x" * 99 + b"\n" + b"y" * 70_000 + b"\n" + b"z" * 99 * 1000)
        for link in (wire, network):
            every = {"agent_id": ref, "stream": "stdout"}
            assert "fewer lines" in link.refused("message_too_large", "output_query_request", **every)
            assert "fewer lines" in link.cannot("message_too_large", ref, "query_output")
            assert find(link, ref, limit=1) == (["x" * 99], 3, True)
            assert find(link, ref, filter="y", limit=0) == ([], 1, True)


def test_the_default_cap_full_of_output(unix: LineWire, tmp_path: Path) -> None:
    """As much as is kept of one agent unless one says, and one line of that length."""
    line = b"the quick brown fox jumps over the lazy dog 0123456789\n"
    many = written(unix, tmp_path, line * 1_000_000 + b"a needle")
    assert find(unix, many, filter=r"\bneedle\b") == (["a needle"], 1, False)
    assert find(unix, many, tail=True, limit=1) == (["a needle"], 1_000_001, True)
    assert find(unix, many, "both", limit=1)[1:] == (1_000_001, True)
    long = written(unix, tmp_path, b"x" * 60_000_000 + b"needle\n" + b"short\n")
    assert find(unix, long, filter="short|other") == (["short"], 1, False)
    assert find(unix, long, filter="needle", limit=0) == ([], 1, True)
    assert unix.control(long, "query_output", max_lines=1)["stdout"] == ["short"]


def test_output_that_goes_while_it_is_searched(start_server: Callable[..., Server]) -> None:
    server = start_server("--output-cap-bytes", "1048576")
    with LineWire(server.socket_path) as wire:
        flood = "i=0; while :; do i=$((i+1)); echo line $i; done"
        ref = wire.spawn("sleeper", ready=False, command=["/bin/sh", "-c", flood])
        wait_until(lambda: wire.info(ref)["output"]["stdout"]["first_offset"], what="output to be dropped")
        last = 0
        for _ in range(10):
            lines, total, more = find(wire, ref, tail=True, limit=50)
            numbers = [int(line.split()[1]) for line in lines[1:-1]]
            assert len(numbers) == 48, "it is not so fast that all is gone before it is read"
            assert numbers == list(range(numbers[0], numbers[0] + 48)) and numbers[-1] >= last
            assert total >= 50 and more == (total > 50)
            last = numbers[-1]
            lines, count, more = find(wire, ref, filter="line")
            assert len(lines) == min(count, 1000) and more == (count > 1000)
        wire.control(ref, "kill")


def test_client(client: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"one\ntwo\nthree\n")
    agent = client.spawn(["/bin/sh", "-c", "cat out; echo oh >&2"], cwd=str(tmp_path))
    agent.wait()
    found = agent.query("t", limit=1)
    assert (found.lines, found.total_lines, found.has_more) == (["two"], 2, True)
    assert agent.query("^t", stream="stdout", offset=1).lines == ["three"]
    assert client.query(agent.id, tail=True, limit=2, stream="stdout").lines == ["two", "three"]
    assert agent.query().total_lines == 4
    last = agent.tail(1)
    assert (last.stdout, last.stdout_lines, last.stderr, last.stderr_lines) == (["three"], 3, ["oh"], 1)
    with pytest.raises(RequestError) as refused:
        agent.query("(")
    assert refused.value.code == "bad_request"


# ---------------------------------------------------------------- what it costs the others

def test_a_hostile_pattern_costs_its_asker_an_error(wire: Wire, shared_server: Server, tmp_path: Path) -> None:
    ref = written(wire, tmp_path, b"a" * 5000 + b"!\n")
    sentence = wire.refused("pattern_too_slow", "output_query_request", agent_id=ref, stream="stdout", filter=HOSTILE)
    assert "0.25" in sentence and "narrow" in sentence and "search it yourself" in sentence
    assert find(wire, ref, filter="a")[1] == 1
    none_left(shared_server)


@pytest.mark.parametrize("pattern", ["(?:(?:a{0,900}){0,900}){0,900}b", "(?:a?){30000}b", "(a|aa)+$", "(.*)*b",
                                     r"(\w+\s?)+!$"])
def test_other_hostile_patterns(unix: LineWire, tmp_path: Path, pattern: str) -> None:
    ref = written(unix, tmp_path, b"a" * 50_000 + b"\n")
    got = unix.ask("output_query_request", agent_id=ref, stream="stdout", filter=pattern)
    assert got["success"] or got["error_code"] in ("pattern_too_slow", "bad_request"), got


def test_a_pattern_that_takes_memory_without_end(slow: Server, tmp_path: Path) -> None:
    with LineWire(slow.socket_path) as wire:
        ref = written(wire, tmp_path, b"a" * 60_000_000 + b"\nshort\n")
        greedy = {"agent_id": ref, "stream": "stdout", "filter": "(a|b)*[cd]"}
        assert "needs more memory" in wire.refused("bad_request", "output_query_request", **greedy)
        assert find(wire, ref, filter="short")[1] == 1


def test_others_are_served_meanwhile(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    searching = asking(wire, ref, filter=HOSTILE)
    pid, = at_work(server)
    for _ in range(50):  # on the very connection that waits for its answer
        assert wire.ok("health_check_request")["healthy"]
    with ZmqWire(server.endpoint) as network:
        assert network.ok("health_check_request")["healthy"], "the network does not wait for a local query"
    os.kill(pid, 0)
    os.kill(pid, signal.SIGALRM)  # as its own timer does
    late = reply(wire)
    assert late["request_id"] == searching and late["error_code"] == "pattern_too_slow"


def test_over_the_network_it_holds_nobody(server: Server, tmp_path: Path) -> None:
    with ZmqWire(server.endpoint) as one, ZmqWire(server.endpoint) as other:
        ref = written(one, tmp_path, b"a" * 5000 + b"!\n")
        request = {"type": "output_query_request", "request_id": "x", "agent_id": ref, "stream": "stdout"}
        one.send(json.dumps({**request, "filter": HOSTILE}).encode())
        assert other.ok("health_check_request")["healthy"]
        assert json.loads(one.receive())["error_code"] == "pattern_too_slow"


def test_fifty_at_once(shared: Server, tmp_path: Path) -> None:
    with LineWire(shared.socket_path) as wire:
        ref = written(wire, tmp_path, b"".join(b"line %d\n" % n for n in range(100)))
    wires = [LineWire(shared.socket_path) for _ in range(25)]
    try:
        for number, each in enumerate(wires):
            for half in (0, 1):
                asking(each, ref, f"{number}/{half}", filter=f"^line {2 * number + half}$")
        most = 0
        for number, each in enumerate(wires):
            most = max(most, len(searchers(shared)))
            got = {got["request_id"]: got["lines"] for got in (reply(each), reply(each))}
            assert got == {f"{number}/{half}": [f"line {2 * number + half}"] for half in (0, 1)}
        assert most <= 4
    finally:
        for each in wires:
            each.close()
    none_left(shared)


def test_too_many_are_refused_and_the_others_answered(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    asking(wire, ref, filter=HOSTILE)
    pid, = at_work(server)
    os.kill(pid, signal.SIGSTOP)
    wires = [LineWire(server.socket_path) for _ in range(20)]
    try:
        for each in wires:
            for _ in range(7):
                asking(each, ref, filter="a", limit=0)
        said = b""

        def enough() -> bool:
            nonlocal said
            for each in wires:
                said += each.socket.recv(65536, socket.MSG_DONTWAIT) if readable(each) else b""
            return said.count(b"\n") == 20 * 7 - 100
        wait_until(enough, what="all but 100 to be refused")
        for got in map(json.loads, said.splitlines()):
            assert got["error_code"] == "rate_limited" and "ask again" in got["error"], got
        assert searchers(server) == [pid], "one at a time"
        os.kill(pid, signal.SIGKILL)
        assert reply(wire)["error_code"] == "unavailable"
        for each in wires[:3]:
            each.close()  # what those wait for is not looked for any more
        assert wire.ok("output_query_request", agent_id=ref, stream="stdout", filter="a", limit=0)["total_lines"] == 1
    finally:
        for each in wires:
            each.close()
    none_left(server)


def test_the_next_search_is_that_of_another_asker(hostile: tuple[Server, LineWire, str]) -> None:
    """Whoever asks much delays himself: the network does not wait behind all that a local client asks."""
    server, wire, ref = hostile
    for _ in range(4):
        asking(wire, ref, filter=HOSTILE)
    first, = at_work(server)
    with ZmqWire(server.endpoint) as network:
        asked = wire.ok("stats_request")["stats"]["requests"]
        network.send(json.dumps({"type": "output_query_request", "request_id": "x", "agent_id": ref, "stream": "stdout",
                                 "filter": "a{5}", "limit": 0}).encode())

        def arrived() -> bool:
            nonlocal asked
            asked += 1  # by looking
            return bool(wire.ok("stats_request")["stats"]["requests"] > asked)
        wait_until(arrived, what="the network's to be there")
        os.kill(first, signal.SIGALRM)
        assert reply(wire)["error_code"] == "pattern_too_slow"
        second, = at_work(server)
        os.kill(second, signal.SIGALRM)
        assert json.loads(network.receive())["total_lines"] == 1
        at_work(server)  # two of the four are still to be done


def readable(wire: LineWire) -> bool:
    """Whether a reply is there."""
    return bool(select.select([wire.socket], [], [], 0)[0])


def test_another_client_gets_in_when_one_has_asked_too_much(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    asking(wire, ref, filter=HOSTILE)
    pid, = at_work(server)
    os.kill(pid, signal.SIGSTOP)
    wires = [LineWire(server.socket_path) for _ in range(13)]
    try:
        for each in wires:
            for _ in range(8):
                asking(each, ref, filter="a", limit=0)
        wait_until(lambda: sum(map(readable, wires)) >= 1, what="some of 104 to be refused")
        with ZmqWire(server.endpoint) as network:
            network.send(json.dumps({"type": "output_query_request", "request_id": "x", "agent_id": ref,
                                     "stream": "stdout", "filter": "a{5}", "limit": 0}).encode())
            asked = wire.ok("stats_request")["stats"]["requests"]
            wait_until(lambda: wire.ok("stats_request")["stats"]["requests"] > asked, what="a moment")
            os.kill(pid, signal.SIGKILL)
            assert json.loads(network.receive())["total_lines"] == 1
        assert reply(wire)["error_code"] == "unavailable"
    finally:
        for each in wires:
            each.close()
    none_left(server)


def test_a_connection_handles_no_more_while_many_replies_are_made(hostile: tuple[Server, LineWire, str]) -> None:
    """What one peer can make us hold stays bounded: its further requests wait, others' do not."""
    server, wire, ref = hostile
    asking(wire, ref, filter=HOSTILE)
    pid, = at_work(server)
    os.kill(pid, signal.SIGSTOP)
    with LineWire(server.socket_path) as other:
        for _ in range(8):
            asking(other, ref, filter="a")
        other.send(b'{"type": "health_check_request", "request_id": "last"}')
        for _ in range(10):
            assert wire.ok("health_check_request")["healthy"]
        assert not readable(other)
        os.kill(pid, signal.SIGKILL)
        types = sorted(reply(other)["type"] for _ in range(9))
        assert types == ["health_check_response"] + ["output_query_response"] * 8


def test_replies_to_one_who_has_said_all(unix: LineWire, shared: Server, tmp_path: Path) -> None:
    """A client that ends its side still gets its replies."""
    ref = written(unix, tmp_path, b"x\n")
    with LineWire(shared.socket_path) as wire:
        for _ in range(2):
            asking(wire, ref, filter="x")
        wire.socket.shutdown(socket.SHUT_WR)
        assert [reply(wire)["lines"] for _ in range(2)] == [["x"], ["x"]]
        assert wire.socket.recv(100) == b""


# ---------------------------------------------------------------- deaths

def test_who_asked_is_gone(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    before = wire.ok("stats_request")["stats"]["errors"]
    with LineWire(server.socket_path) as gone:
        asking(gone, ref, filter=HOSTILE)
        asking(gone, ref, filter=HOSTILE)  # this one waits
        at_work(server)
    none_left(server)
    assert find(wire, ref, filter="a{3}")[1] == 1, "its place is free"
    assert wire.ok("stats_request")["stats"]["errors"] == before, "no pattern was at work until its time was over"


def test_a_search_that_is_killed(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    for number, name in ((signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")):
        asking(wire, ref, filter=HOSTILE)
        os.kill(at_work(server)[0], number)
        got = reply(wire)
        assert got["error_code"] == "unavailable" and name in got["error"], got
    assert find(wire, ref, "stderr") == (["oh"], 1, False)
    none_left(server)
    assert not list(server.state_dir.glob("core*[0-9]")), "no core dump"


def test_a_core_that_stands_still_does_not_keep_a_search_alive(
        start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server("--pattern-timeout-secs", "1")
    with LineWire(server.socket_path) as wire:
        ref = written(wire, tmp_path, b"a" * 5000 + b"!\n")
        core = server.pids()["core"]
        asking(wire, ref, filter=HOSTILE)
        pid, = at_work(server)
        os.kill(core, signal.SIGSTOP)
        try:
            wait_until(lambda: process_state(pid) in "Z", what="the search to end by its own timer")
        finally:
            os.kill(core, signal.SIGCONT)
        assert reply(wire)["error_code"] == "pattern_too_slow"
    none_left(server)


def test_no_search_outlives_its_core(hostile: tuple[Server, LineWire, str]) -> None:
    """It would be nobody's, and could be taken for what an agent has left."""
    server, wire, ref = hostile
    adopted = wire.spawn("sleeper", grace_secs=1)
    asking(wire, ref, filter=HOSTILE)
    pid, = at_work(server)
    os.kill(server.pids()["core"], signal.SIGKILL)
    wait_until(lambda: answers(server), what="the next core")
    assert process_state(pid) in "Z", "it did not wait for its timer"
    wait_until(lambda: process_state(pid) == "", what="the search to be reaped")
    with LineWire(server.socket_path) as again:
        again.control(adopted, "stop")
        assert again.exit(adopted)["leaked"] == []
        assert find(again, ref, "stderr")[1] == 1
    assert not searchers(server)


def answers(server: Server) -> bool:
    """Whether a core answers."""
    try:
        return bool(server.pids().get("core"))
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("way", ["unix", "tcp"])
@pytest.mark.parametrize("end", ["core", "shell", "reload"])
def test_the_client_asks_again_and_gets_its_answer(start_server: Callable[..., Server], way: str, end: str) -> None:
    server = start_server()
    with AgentClient(server.address("unix")) as other:
        agent = other.spawn(["/bin/sh", "-c", "yes | head -c 3000000"])
        agent.wait()
        found: list[Any] = []

        def ask() -> None:
            with AgentClient(server.address(way)) as client:
                client.health()  # who has met the server once has patience with it
                found.append(client.query(agent.id, offset=1_499_999))
        thread = threading.Thread(target=ask)
        thread.start()
        pid, = at_work(server)
        if end == "reload":
            generation = other.health().metadata["generation"]
            other.reload()
        else:
            os.kill(server.pids()[end], signal.SIGKILL)
        thread.join(60)
        assert found and found[0].lines == ["y"] and found[0].total_lines == 1_500_000 and not found[0].has_more
        wait_until(lambda: process_state(pid) == "", what="the first search to be gone")
        if end == "reload":
            wait_until(lambda: other.health().metadata["generation"] != generation, what="the reload")
    none_left(server)


def test_a_search_over_the_network_is_done_once(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """The client asks again when a shell may have died with its request, but gives a search its time."""
    server = start_server("--pattern-timeout-secs", "1")
    with AgentClient(server.endpoint) as client, LineWire(server.socket_path) as wire:
        ref = written(wire, tmp_path, b"a" * 5000 + b"!\n")
        before = wire.ok("stats_request")["stats"]["errors"]
        with pytest.raises(RequestError) as refused:
            client.query(ref, HOSTILE)
        assert refused.value.code == "pattern_too_slow"
        assert wire.ok("stats_request")["stats"]["errors"] == before + 1


def test_a_search_is_not_taken_for_an_agent_s(hostile: tuple[Server, LineWire, str]) -> None:
    """Neither when an agent ends whose stray it could be, nor as somebody's descendant."""
    server, wire, ref = hostile
    with LineWire(server.socket_path) as other:
        # with somebody left behind when it ends, so that it is looked who is there
        leaving = ["/bin/sh", "-c", "setsid sleep 1000 & echo $!; read x"]
        younger = other.spawn("sleeper", ready=False, command=leaving)
        left = int(other.lines(younger, 1)[0])
        searching = asking(wire, ref, filter=HOSTILE)
        pid, = at_work(server)
        for name in ("pause", "resume"):
            other.control(younger, name)
            assert not [p for p in other.control(younger, "inspect")["tree"] if p["pid"] == pid]
        other.control(younger, "close_stdin")
        assert [p["pid"] for p in other.exit(younger)["leaked"]] == [left] and process_state(pid) == "R"
    os.kill(pid, signal.SIGALRM)
    assert reply(wire)["request_id"] == searching


def test_the_end_of_the_server_is_told_to_who_waits(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    ids = {asking(wire, ref, filter=HOSTILE), asking(wire, ref, filter="a")}
    at_work(server)
    server.process.send_signal(signal.SIGTERM)
    got = [reply(wire), reply(wire)]
    assert {one["request_id"] for one in got} == ids
    assert {one["error_code"] for one in got} == {"shutting_down"}
    assert server.stop() == 0 and not searchers(server)


def test_an_agent_that_is_removed_meanwhile(hostile: tuple[Server, LineWire, str]) -> None:
    server, wire, ref = hostile
    asking(wire, ref, filter=HOSTILE)
    pid, = at_work(server)
    wire.control(ref, "remove")
    os.kill(pid, signal.SIGALRM)
    got = reply(wire)
    assert got["error_code"] == "agent_not_found" and "removed" in got["error"]


# ---------------------------------------------------------------- noise

PIECES = [
    "a", "b", "é", "\ud800", "\0", "\n", ".", "*", "+", "?", "{", "}", "{2}", "{1,}", "{,3}", "(", ")", "(?:", "(?i)",
    "(?P<n>", "(?P=n)", "(?=", "(?!", "(?<=", "(?<!", "(?(1)", "(?#", "(?x)", "(?a)", "(?L)", "(?>", "[", "]", "[^",
    "-", "|", "^", "$", "\\", "\\b", "\\w", "\\1", "\\Z", "\\N{DIGIT ONE}", "\\x41", "\\u00e9", "\\777", "*+", "++",
    "{99999}", "0", ":", ">", " "]


def test_noise_as_a_filter(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server("--pattern-timeout-secs", "0.05")
    before = server.pids()
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    with LineWire(server.socket_path) as wire:
        ref = written(wire, tmp_path, b"aab \xc3\xa9 ab\nab\x00\xff\r\n" * 50 + b"a" * 300)
        succeeded = 0
        for _ in range(20):
            patterns = {new_id(): "".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(8)}
            for request_id, pattern in patterns.items():
                asking(wire, ref, request_id, filter=pattern, limit=3)
            while patterns:
                got = reply(wire)
                pattern = patterns.pop(got["request_id"])
                succeeded += got["success"]
                assert got["success"] or got["error_code"] in ("bad_request", "pattern_too_slow"), (pattern, got)
        assert succeeded > 10
    assert server.pids() == before and "Traceback" not in server.logs()
    none_left(server)
