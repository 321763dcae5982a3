"""`agentserver stdio`: the protocol on stdin and stdout, across the deaths of the core behind it.

Owns:    the tests of agentserver/core/relay.py and agentserver/cli/stdio.py.
Runs in: the test process, against a core that is a thread; `stdio` is a process of its own.
Unaware: of ssh (test_ssh.py) and of what requests mean; the contract suite runs over stdio, too.
"""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest
from fakecore import Connection, FakeCore, echo
from support import DEADLINE_SECS, MAIN, Server, clean_environ, wait_until
from wire import LineWire, StdioWire

from agentserver.core.link import socket_path
from agentserver.core.relay import UNANSWERED_BYTES, Outbox, Unanswered
from agentserver.wire import MAX_WIRE, encode


@pytest.fixture
def path(state_dir: Path) -> str:
    return socket_path(str(state_dir))


@pytest.fixture
def stdio(path: str, state_dir: Path) -> Iterator[Callable[[], StdioWire]]:
    """Start `agentserver stdio` for the core at `path`; at the end it has to have ended."""
    wires: List[StdioWire] = []

    def start() -> StdioWire:
        wires.append(StdioWire(str(state_dir)))
        return wires[-1]
    yield start
    for wire in wires:
        wire.close()


def run(state_dir: Path, stdin: bytes = b"", *args: str) -> "subprocess.CompletedProcess[bytes]":
    """Run `agentserver stdio` to its end."""
    return subprocess.run([sys.executable, str(MAIN), "stdio", "--state-dir", str(state_dir), *args], input=stdin,
                          capture_output=True, timeout=DEADLINE_SECS, env=clean_environ(state_dir))


def asked(request_id: str, **fields: Any) -> bytes:
    return encode({"type": "x", "request_id": request_id, **fields})


# ---------------------------------------------------------------- copying

def test_what_was_asked_is_answered_before_the_end(path: str, state_dir: Path) -> None:
    """Also where stdin is a file, and where a line is as long as it may be."""
    requests = [asked(str(n), text="x" * size) for n, size in enumerate((1, 100, 5_000_000, 10))]
    text = state_dir / "requests"
    text.write_bytes(b"".join(request + b"\n" for request in requests))
    with FakeCore(path), open(text, "rb") as stdin:
        done = subprocess.run([sys.executable, str(MAIN), "stdio"], stdin=stdin, capture_output=True,
                              env=clean_environ(state_dir, {"AGENTSERVER_STATE_DIR": str(state_dir)}))
    assert (done.returncode, done.stderr) == (0, b"")
    assert [json.loads(line)["was"] for line in done.stdout.splitlines()] == [json.loads(r) for r in requests]


def test_nothing_asked_is_nothing_answered(path: str, state_dir: Path) -> None:
    with FakeCore(path):
        done = run(state_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_a_server_one_sentence_says_so(state_dir: Path) -> None:
    done = run(state_dir, asked("a") + b"\n")
    assert (done.returncode, done.stdout) == (3, b"") and done.stderr.count(b"\n") == 1
    assert b"error (unavailable): no server runs at" in done.stderr and b"agentserver serve" in done.stderr


@pytest.mark.parametrize("flags", [("--server", "tcp://127.0.0.1:1"), ("--timeout", "3"), ("more",)])
def test_it_is_a_way_to_one_server_only(state_dir: Path, flags: tuple[str, ...]) -> None:
    done = run(state_dir, b"", *flags)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1


def test_a_line_without_end_is_answered_once_and_passed_over(path: str, stdio: Callable[[], StdioWire]) -> None:
    with FakeCore(path) as core:
        wire = stdio()
        wire.send(b"x" * (MAX_WIRE + 1_000_000))
        assert json.loads(wire.receive())["error_code"] == "message_too_large"
        wire.send(asked("b"))
        assert json.loads(wire.receive())["request_id"] == "b" and core.heard == [asked("b")]


def test_replies_may_come_out_of_order(path: str, stdio: Callable[[], StdioWire]) -> None:
    def late(raw: bytes, connection: Connection) -> Optional[bytes]:
        if b'"late"' in raw:
            return None
        connection.reply(echo(raw, connection) or b"")
        return echo(asked("late"), connection)

    with FakeCore(path, late):
        wire = stdio()
        wire.send(asked("late"))
        wire.send(asked("soon"))
        assert [json.loads(wire.receive())["request_id"] for _ in range(2)] == ["soon", "late"]


# ---------------------------------------------------------------- bounds

def memory_of(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def test_who_does_not_read_is_not_read_from(path: str, stdio: Callable[[], StdioWire]) -> None:
    """All of it comes when it is read at last, and meanwhile little is held."""
    count, size = 60, 2_000_000

    def large(raw: bytes, connection: Connection) -> bytes:
        return encode({"type": "x", "request_id": json.loads(raw)["request_id"], "data": "y" * size})

    with FakeCore(path, large) as core:
        wire = stdio()
        before = memory_of(wire.process.pid)
        for n in range(count):
            wire.send(asked(str(n)))
        with pytest.raises(AssertionError):
            wait_until(lambda: len(core.heard) > count // 2, 1.0)
        for n in range(count):
            reply = json.loads(wire.receive())
            assert (reply["request_id"], len(reply["data"])) == (str(n), size)
        if os.path.isdir("/proc/self"):
            assert memory_of(wire.process.pid) - before < 40_000_000


def test_a_core_that_does_not_read_stops_the_client(path: str, stdio: Callable[[], StdioWire]) -> None:
    go_on = threading.Event()

    def waits(raw: bytes, connection: Connection) -> Optional[bytes]:
        go_on.wait(DEADLINE_SECS)
        return echo(encode({"request_id": json.loads(raw)["request_id"]}), connection)

    line, sent = asked("a", text="x" * 1_000_000) + b"\n", 0
    with FakeCore(path, waits):
        wire = stdio()
        wire.socket.settimeout(2.0)
        with pytest.raises(socket.timeout):
            while sent < 10 * UNANSWERED_BYTES:
                wire.socket.sendall(line)
                sent += len(line)
        assert sent < 2 * UNANSWERED_BYTES
        go_on.set()
        wire.socket.settimeout(DEADLINE_SECS)
        for _ in range(sent // len(line)):
            assert json.loads(wire.receive())["request_id"] == "a"


def test_events_do_not_hold_up_a_request(path: str, stdio: Callable[[], StdioWire]) -> None:
    """A client that only writes, while the core only tells, is heard."""
    def flood(connection: Connection) -> None:
        try:
            for n in range(200):
                connection.push({"topic": "x", "data": "z" * 100_000, "n": n})
        except OSError:
            pass  # the test is over

    with FakeCore(path) as core:
        wire = stdio()
        wire.raw(asked("a"))
        flooding = threading.Thread(target=flood, args=(core.connections[0],), daemon=True)
        flooding.start()
        wire.send(asked("b", text="x" * 3_000_000))
        wait_until(lambda: len(core.heard) == 2)
        assert json.loads(wire.receive())["request_id"] == "b"


def test_it_ends_with_its_client(path: str, stdio: Callable[[], StdioWire]) -> None:
    with FakeCore(path, lambda raw, _: None) as core:
        wire = stdio()
        wire.send(asked("a"))
        wait_until(lambda: core.heard)
        wire.close()   # waits for the process
        assert wire.process.returncode in (0, 141)


# ---------------------------------------------------------------- another core

def test_a_request_is_asked_again_when_the_core_dies(path: str, stdio: Callable[[], StdioWire]) -> None:
    def dies(raw: bytes, connection: Connection) -> Optional[bytes]:
        if b'"second"' in raw:
            connection._send(b'{"type":"x","request_id":"second","half')
            connection.cut()
            return None
        return echo(raw, connection) if b'"first"' in raw else None

    first = FakeCore(path, dies)
    wire = stdio()
    wire.raw(asked("first"))
    for name in ("third", "fourth", "second"):
        wire.send(asked(name))
    wait_until(lambda: asked("second") in first.heard)
    first.close(crash=True)
    with FakeCore(path) as core:
        assert [json.loads(wire.receive())["request_id"] for _ in range(3)] == ["third", "fourth", "second"]
        assert core.heard == [asked("third"), asked("fourth"), asked("second")]


def subscribed(raw: bytes, connection: Connection) -> Optional[bytes]:
    message = json.loads(raw)
    if message["type"] != "subscribe_request":
        return echo(raw, connection)
    return encode({"type": "subscribe_response", "request_id": message["request_id"], "success": True, "sequence": 7,
                   "topics": message["topics"]})


def test_a_subscription_goes_on_at_its_last_event(path: str, stdio: Callable[[], StdioWire]) -> None:
    first = FakeCore(path, subscribed)
    wire = stdio()
    wire.subscribe("status.", "a.stdout")
    first.connections[0].push({"type": "status_update", "topic": "status.a", "sequence": 9})
    first.connections[0].push({"type": "log_stream", "topic": "a.stdout", "sequence": 12})
    assert [wire.event()["sequence"], wire.event()["sequence"]] == [9, 12]
    first.close(crash=True)
    with FakeCore(path, subscribed) as core:
        wait_until(lambda: core.heard)
        renewal = core.messages()[0]
        assert (renewal["topics"], renewal["since"]) == (["status.", "a.stdout"], 9)
        core.connections[0].push({"type": "status_update", "topic": "status.a", "sequence": 10})
        assert wire.event()["sequence"] == 10, "and the reply to the renewal is for nobody"
        wire.raw(asked("b"))


def test_a_server_that_does_not_come_back_is_said(path: str, state_dir: Path) -> None:
    core = FakeCore(path, lambda raw, _: None)
    with subprocess.Popen([sys.executable, str(MAIN), "stdio", "--state-dir", str(state_dir)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin
        process.stdin.write(asked("a") + b"\n")
        wait_until(lambda: core.heard)
        core.close()
        out, error = process.communicate(timeout=DEADLINE_SECS)
    assert (process.returncode, out) == (3, b"") and b"no server runs" in error and error.count(b"\n") == 1


def test_a_reload_is_a_pause(server: Server) -> None:
    """A real server: its core is killed, and replaced, between and during requests."""
    with StdioWire(str(server.state_dir)) as wire:
        wire.subscribe("status.")
        before = wire.ok("health_check_request")["metadata"]
        os.kill(int(before["core_pid"]), 9)
        agent = wire.spawn("lines", 200, 200, server.state_dir / "sum")
        wire.ok("reload_request")
        wait_until(lambda: wire.ok("health_check_request")["metadata"]["generation"] > before["generation"])
        assert wire.output(agent) and wire.exit(agent)["code"] == 0
        with LineWire(server.socket_path) as other:
            stored = other.ok("events_request", since=0, limit=10_000)["events"]
        mine = [event["sequence"] for event in stored if event.get("agent_id") == agent]
        told: List[int] = []
        while mine[-1] not in told:
            told.append(wire.event(lambda e: e["agent_id"] == agent and e["update_type"] != "heartbeat")["sequence"])
        assert told == mine


# ---------------------------------------------------------------- what is remembered

def reply(request_id: Optional[str], **fields: Any) -> bytes:
    return encode({"type": "x_response", "request_id": request_id, "success": True, **fields})


def test_what_cannot_be_read_is_answered_without_an_id() -> None:
    memory = Unanswered()
    for line in (b"not JSON", b'{"request_id": 5}', b"", b'{"request_id":"%s"}' % (b"x" * 200)):
        memory.asked(line)
        assert memory.size == len(line) + 1
        assert memory.told(reply(None)) and memory.size == 0 and memory.again() == []


def test_what_was_too_large_is_known_by_its_size() -> None:
    memory = Unanswered()
    for name, size in (("a", 10), ("b", 1000), ("c", 100)):
        memory.asked(asked(name, text="x" * size))
    memory.told(reply(None))
    assert memory.again() == [asked("a", text="x" * 10), asked("c", text="x" * 100)]


def test_one_id_twice_is_two_replies() -> None:
    memory = Unanswered()
    memory.asked(asked("a"))
    memory.asked(asked("a"))
    memory.told(reply("a"))
    assert memory.again() == [asked("a")]
    memory.told(b'{ "request_id" : "a", "type" : "written by somebody else" }')
    assert memory.size == 0
    memory.told(reply("a"))
    assert memory.size == 0


def test_an_outbox_hands_over_as_much_as_is_taken() -> None:
    outbox, got = Outbox(), bytearray()
    lines = [b"x" * size for size in (0, 10, 400_000, 3, 200_000, 100_000)]
    for line in lines:
        outbox.add(line)

    def write(piece: Any) -> int:
        got.extend(bytes(piece[:70_001]))
        return min(len(piece), 70_001)
    while outbox.size:
        outbox.flush(write)
    assert got == b"".join(line + b"\n" for line in lines)
