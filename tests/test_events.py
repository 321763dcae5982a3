"""Every kind of event, from outside: in one sequence, in the registry before it is told, replayed while it is kept.

Owns:    what is an event and what it says; the sequence across deaths, reloads and a disk that refuses; retention.
Runs in: the test process; servers and agents are real.
Unaware: of how a subscriber follows events without loss (test_following.py).
"""
from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import Server, wait_until
from wire import LineWire

from agentserver.core.backlog import BACKLOG_BYTES
from agentserver.core.registry import Registry

Json = dict  # type: ignore[type-arg]
STORED = ("status_changed", "error", "completed", "terminated")


def history(wire: LineWire, since: int = 0) -> list[Json]:
    """Return the stored events, checked to be one sequence without a gap."""
    found: list[Json] = []
    while True:
        page = wire.ok("events_request", since=since)
        found += page["events"]
        since = page["next"]
        if not page["more"]:
            break
    numbers = [event["sequence"] for event in found]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    return found


def latest(wire: LineWire) -> int:
    """Return the number of the newest event."""
    return int(wire.ok("events_request", since=2 ** 62)["next"])


def of(wire: LineWire, ref: str) -> list[Json]:
    """Return the events of one agent."""
    found: list[Json] = wire.ok("events_request", agent_id=ref)["events"]
    assert all(event["update_type"] in STORED and event["message"] for event in found)
    return found


def told(wire: LineWire, ref: str, fits: Callable[[Json], bool]) -> Json:
    """Return the first event of an agent that fits, once there is one."""
    return wait_until(lambda: next((event for event in of(wire, ref) if fits(event)), None))  # type: ignore[return-value]


# ---------------------------------------------------------------- the kinds

def test_start_pause_resume_and_end(unix: LineWire) -> None:
    ref = unix.spawn("sleeper")
    unix.control(ref, "pause")
    unix.control(ref, "resume")
    unix.control(ref, "kill")
    record = unix.exit(ref)
    events = of(unix, ref)
    assert [(e["update_type"], e["status"]) for e in events] == [
        ("status_changed", "running"), ("status_changed", "paused"), ("status_changed", "running"),
        ("terminated", "terminated")]
    assert events[0]["data"]["attempt"] == 1 and events[0]["data"]["pid"] > 1
    assert events[-1]["data"] == {"exit": record}


@pytest.mark.parametrize("code, kind, status", [(0, "completed", "completed"), (7, "error", "failed")])
def test_an_end_by_itself(unix: LineWire, code: int, kind: str, status: str) -> None:
    ref = unix.spawn("exit_with", code)
    unix.ended(ref)
    assert (of(unix, ref)[-1]["update_type"], of(unix, ref)[-1]["status"]) == (kind, status)


def test_a_stdin_that_is_closed_by_either_side(unix: LineWire) -> None:
    by_client = unix.spawn("sleeper")
    unix.control(by_client, "close_stdin")
    by_agent = unix.spawn("", command=["/bin/sh", "-c", "exec <&-; echo ready; sleep 1000"], stdin="pipe")
    unix.cannot("stdin_closed", by_agent, "write_stdin", data="x")
    for ref in (by_client, by_agent):
        event = told(unix, ref, lambda e: e["data"].get("stdin") == "closed")
        assert event["status"] == "running" and "stdin" in event["message"]


def test_a_limit_is_told_when_it_is_reached(unix: LineWire) -> None:
    ref = unix.spawn("stubborn", limits={"runtime_secs": 0.3}, grace_secs=0.5)
    unix.ended(ref)
    reached, end = of(unix, ref)[-2:]
    assert reached["data"] == {"limit": "runtime_secs"} and reached["status"] == "running"
    assert end["data"]["exit"]["reason"] == "limit:runtime_secs"


def test_a_restart_says_which_attempt(unix: LineWire) -> None:
    ref = unix.spawn("sleeper")
    unix.control(ref, "restart", grace_secs=0)
    again = told(unix, ref, lambda e: e["data"].get("attempt") == 2)
    assert again["status"] == "running" and "attempt 2" in again["message"]
    kinds = [e["status"] for e in of(unix, ref)]
    assert kinds == ["running", "terminated", "running"]


def test_a_restart_that_cannot_be(unix: LineWire, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho ready\n")
    program.chmod(0o700)
    ref = unix.spawn("", command=[str(program)])
    unix.ended(ref)
    program.unlink()
    unix.cannot("spawn_failed", ref, "restart")
    end = of(unix, ref)[-1]
    assert (end["update_type"], end["status"], end["data"]["exit"]["reason"]) == ("error", "failed", "not_started")


def test_what_the_server_does(start_server: Callable[..., Server]) -> None:
    """Up at each start of a core, with its generation; draining and down at the end; all in the one sequence."""
    server = start_server()
    os.kill(server.pids()["core"], signal.SIGKILL)
    with LineWire(wait_until(lambda: _ready(server))) as wire:
        wire.ok("reload_request")
    with LineWire(wait_until(lambda: _ready(server, "2"))) as wire:
        wire.ended(wire.spawn("exit_with", 0))
    server.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        said = [event for event in history(wire) if event["type"] == "server_update"]
        assert [(e["state"], e["generation"]) for e in said] == [
            ("up", 1), ("up", 1), ("up", 2), ("draining", 2), ("down", 2), ("up", 1)]
        assert all(e["update_type"] == "status_changed" and e["server_id"] and e["timestamp"] for e in said)


def _ready(server: Server, generation: str = "1") -> Path | None:
    try:
        metadata = server.ask({"type": "health_check_request"})["metadata"]
    except (OSError, ValueError):  # nobody there, or no more
        return None
    return server.socket_path if metadata["generation"] == generation else None


# ---------------------------------------------------------------- output that is gone

def drops(wire: LineWire, ref: str) -> list[Json]:
    """Return what was told to be gone of an agent's output."""
    return [event["data"]["output_dropped"] for event in of(wire, ref) if "output_dropped" in event["data"]]


def covered(told_of: list[Json], stream: str) -> list[tuple[int, int]]:
    """Return the ranges of one stream."""
    return [(each["from_offset"], each["to_offset"]) for each in told_of if each["stream"] == stream]


def test_output_past_the_cap_is_told_and_does_not_flush_the_history(start_server: Callable[..., Server]) -> None:
    server = start_server("--output-cap-bytes", str(256 * 1024))
    with LineWire(server.socket_path) as wire:
        burst = wire.spawn("burst", 20_000_000, 0, ready=False)
        wire.ended(burst)
        first = wire.info(burst)["output"]["stdout"]["first_offset"]
        assert first > 19_000_000
        wait_until(lambda: covered(drops(wire, burst), "stdout")[-1][1] == first, what="all of it to be told")
        told_of = covered(drops(wire, burst), "stdout")
        assert told_of[0][0] == 0 and [start for start, _ in told_of[1:]] == [stop for _, stop in told_of[:-1]]
        events = [event for event in of(wire, burst) if "output_dropped" in event["data"]]
        assert len(events) <= 4, "hundreds of segments went"
        assert {e["update_type"] for e in events} == {"status_changed"}
        assert {e["data"]["output_dropped"]["reason"] for e in events} == {"output_cap"}
        assert wire.read(burst, offset=0)["dropped_reason"] == "output_cap"
        assert all(later["timestamp"][:-8] != before["timestamp"][:-8] or _apart(before, later) >= 0.99
                   for before, later in zip(events, events[1:]))


def _apart(before: Json, later: Json) -> float:
    from agentserver.wire import from_rfc3339
    return from_rfc3339(later["timestamp"], "") - from_rfc3339(before["timestamp"], "")


def test_a_drop_that_a_dead_core_could_not_tell_is_told_by_the_next(start_server: Callable[..., Server]) -> None:
    server = start_server("--output-cap-bytes", str(256 * 1024))
    with LineWire(server.socket_path) as wire:
        told_by_both = wire.spawn("", ready=False, command=[
            sys.executable, "-S", "-E", "-c", "import os\nfor _ in range(2):\n os.read(0, 1); os.write(1, b'x'*600000)"
                                              "\nos.write(2, b'done')\nos.read(0, 1)"])
        wire.control(told_by_both, "write_stdin", data="1")
        wait_until(lambda: drops(wire, told_by_both))
        before = covered(drops(wire, told_by_both), "stdout")[-1][1]
        core = server.pids()["core"]
        wire.control(told_by_both, "write_stdin", data="2")
        wire.until_output(told_by_both, b"done", "stderr")
        os.kill(core, signal.SIGKILL)
    with LineWire(wait_until(lambda: _ready(server))) as wire:
        first = wait_until(lambda: wire.info(told_by_both)["output"]["stdout"]["first_offset"])
        assert first > before
        wait_until(lambda: covered(drops(wire, told_by_both), "stdout")[-1][1] == first)
        told_of = covered(drops(wire, told_by_both), "stdout")
        assert [start for start, _ in told_of] == [0, *(stop for _, stop in told_of[:-1])], "each byte once"
        history(wire)


class FullDisk:
    """The core may write no file beyond so many bytes (setrlimit(2): EFBIG, as Python ignores SIGXFSZ)."""

    def __init__(self, core: int, most: int) -> None:
        self._core = core
        self._before = resource.prlimit(core, resource.RLIMIT_FSIZE, (most, resource.getrlimit(
            resource.RLIMIT_FSIZE)[1]))

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        resource.prlimit(self._core, resource.RLIMIT_FSIZE, self._before)


needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can limit another process")


@needs_prlimit
def test_bytes_that_the_disk_did_not_take(server: Server) -> None:
    most = 2 * 1024 * 1024
    with LineWire(server.socket_path) as wire, FullDisk(server.pids()["core"], most):
        burst = wire.spawn("burst", 3_000_000, 0, ready=False)
        wire.ended(burst)
        assert wire.info(burst)["output"]["stdout"] == {"first_offset": 0, "end_offset": 3_000_006}
        wait_until(lambda: covered(drops(wire, burst), "stdout")[-1][1] == 3_000_006)
        told_of = covered(drops(wire, burst), "stdout")
        assert told_of[0][0] == most and [start for start, _ in told_of[1:]] == [stop for _, stop in told_of[:-1]]
        event = told(wire, burst, lambda e: "output_dropped" in e["data"])
        assert event["update_type"] == "error" and "could not be recorded" in event["message"]
        chunk = wire.read(burst, offset=most)
        assert chunk["dropped"] == 3_000_006 - most and chunk["eof"]


def test_output_that_no_disk_took_from_the_first_byte_on_is_not_blamed_on_the_cap(server: Server) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(server.state_dir / "agents")
    (server.state_dir / "agents").touch()  # no directory of an agent can be made
    with LineWire(server.socket_path) as wire:
        burst = wire.spawn("burst", 1000, 0, ready=False)
        wire.ended(burst)
        wait_until(lambda: (covered(drops(wire, burst), "stdout") or [(0, 0)])[-1][1] == 1006)
        event = told(wire, burst, lambda e: "output_dropped" in e["data"])
        lost = event["data"]["output_dropped"]
        assert (lost["stream"], lost["from_offset"], lost["reason"]) == ("stdout", 0, "disk")
        assert event["update_type"] == "error" and "could not be recorded" in event["message"]
        chunk = wire.read(burst, offset=0)
        assert (chunk["dropped"], chunk["dropped_reason"]) == (1006, "disk")


# ---------------------------------------------------------------- kept before told

def on_disk(server: Server) -> int:
    """Return the newest sequence that is in the registry's file."""
    with contextlib.closing(sqlite3.connect(f"file:{server.state_dir / 'registry.db'}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT max(sequence) FROM events").fetchone()[0])


def test_an_event_is_on_disk_before_it_is_told(shared: Server, unix: LineWire) -> None:
    with LineWire(shared.socket_path) as other:
        other.subscribe("status.")
        ref = unix.spawn("sleeper")
        for _ in range(50):
            unix.control(ref, "pause")
            assert other.event()["sequence"] <= on_disk(shared)
            unix.control(ref, "resume")
            assert other.event()["sequence"] <= on_disk(shared)


@needs_prlimit
def test_nothing_is_told_that_the_registry_does_not_take(start_server: Callable[..., Server]) -> None:
    """Nor does a heartbeat carry its number. When the disk takes it again it is told, in its place."""
    server = start_server("--status-update-interval-secs", "0.2")
    with LineWire(server.socket_path) as wire, LineWire(server.socket_path) as listener:
        ref = wire.spawn("sleeper")
        listener.subscribe("status.", "server")
        before, pid = latest(wire), wire.info(ref)["pid"]
        with FullDisk(server.pids()["core"], 100):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: wire.status(ref) == "failed")
            beats = [listener.event() for _ in range(6)]
            assert {event["update_type"] for event in beats} <= {"heartbeat", "output_available"}
            assert {event["sequence"] for event in beats} == {before}
            assert latest(wire) == before == on_disk(server)
        end = wait_until(lambda: history(wire, before))
        assert [(e["agent_id"], e["status"], e["sequence"]) for e in end] == [(ref, "failed", before + 1)]
        listener.event(lambda e: e["sequence"] == before + 1)


# ---------------------------------------------------------------- how long they are kept

def test_events_are_kept_by_number(start_server: Callable[..., Server]) -> None:
    server = start_server("--events-kept", "100")
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
        for _ in range(80):
            wire.control(ref, "pause")
            wire.control(ref, "resume")
        kept = history(wire)
        page = wire.ok("events_request")
        assert page["first_kept"] == kept[0]["sequence"] > 1
        assert 100 <= len(kept) <= 150 and kept[-1]["sequence"] == latest(wire) == 162
        assert wire.ok("events_request", since=162)["first_kept"] == page["first_kept"]


def test_events_are_kept_by_age(start_server: Callable[..., Server]) -> None:
    server = start_server("--events-secs", "1")
    with LineWire(server.socket_path) as wire:
        old = wire.spawn("sleeper")
        newest = latest(wire)
        wait_until(lambda: wire.ok("events_request")["first_kept"] == newest + 1, what="all of them to be too old")
        assert wire.ok("events_request")["events"] == [] and latest(wire) == newest, "the count goes on"
        wire.control(old, "pause")
        assert [event["sequence"] for event in history(wire)] == [newest + 1]
    server.close()
    again = start_server("--events-secs", "1", state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert latest(wire) > newest + 1


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Any]:
    """A registry that keeps 100 events for 60 seconds, with a clock."""
    class Clocked(Registry):
        at = 1000.0

        def __init__(self) -> None:
            super().__init__(str(tmp_path / "registry.db"), lambda _: None, 100, 60.0, 1000, now=lambda: self.at)

        def add(self, count: int = 1) -> None:
            for _ in range(count):
                self.add_event(self.at, None, {"topic": "server"})

        def numbers(self) -> list[int]:
            return [json.loads(text)["sequence"] for text in self.events(0, 100_000)]
    made = Clocked()
    yield made
    made.close()


def test_age_and_number_together(registry: Any) -> None:
    registry.add(30)
    registry.at += 50
    registry.add(30)
    registry.trim()
    assert registry.numbers() == list(range(1, 61))
    registry.at += 20
    registry.trim()
    assert registry.numbers() == list(range(31, 61)) and registry.first_kept == 31
    registry.add(90)
    registry.trim()
    assert registry.numbers() == list(range(51, 151)), "an event more than that is one too many"
    registry.at += 100
    registry.trim()
    assert registry.numbers() == [] and registry.first_kept == 151 and registry.sequence == 150
    registry.add()
    assert registry.numbers() == [151]


def test_a_clock_that_was_wrong_for_a_while_makes_no_gap(registry: Any) -> None:
    registry.add(5)
    registry.at += 1e6
    registry.add(5)
    registry.at -= 1e6
    registry.add(5)
    registry.at += 70
    registry.trim()
    assert registry.numbers() == list(range(6, 16)), "the oldest go, never some from the middle"


def test_no_number_is_given_in_vain(registry: Any) -> None:
    """While the disk refuses, events of so many bytes wait; what is beyond them is no event at all."""
    registry.add(3)
    registry.commit()
    message, given = {"topic": "server", "message": "x" * 100_000}, 3
    while registry.add_event(registry.at, None, message):
        given += 1
    assert registry.sequence == 3, "only what is on disk counts"
    assert 0.9 < (given - 3) * 100_000 / BACKLOG_BYTES < 1.1
    assert registry.commit() and registry.sequence == given
    registry.add()
    assert registry.commit() and registry.numbers()[-1] == registry.sequence == given + 1
    assert registry.first_kept == registry.numbers()[0]


# ---------------------------------------------------------------- asking for them

def test_a_page_is_cut_to_what_fits_into_a_reply(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server("--message-bytes", str(64 * 1024))
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
        for _ in range(120):
            wire.control(ref, "pause")
            wire.control(ref, "resume")
        page = wire.ok("events_request", limit=10_000)
        assert page["more"] and 10 < len(page["events"]) < 240 and page["next"] == page["events"][-1]["sequence"]
        assert len(history(wire)) == latest(wire)


def test_a_long_replay_and_what_happens_meanwhile_come_in_one_order(unix: LineWire, shared: Server) -> None:
    """It is done in steps, so that others are served; who had topics before hears nothing newer in between."""
    each = [unix.spawn("sleeper") for _ in range(20)]

    def more(times: int) -> None:
        for _ in range(times):
            for command in ("pause", "resume"):
                assert unix.ok("batch_control_command", agent_ids=each, command_type=command)["success"]
    start = unix.ok("events_request", since=2 ** 40)["next"]
    more(15)
    with LineWire(shared.socket_path) as listener:
        listener.subscribe("")
        listener.events.clear()
        listener.send(json.dumps({"type": "subscribe_request", "request_id": "again", "topics": ["status.", "server"],
                                  "since": start}).encode())
        more(3)
        last = unix.ok("events_request", since=2 ** 40)["next"]
        got = [start]
        while got[-1] < last:
            event = listener.line()
            if event.get("update_type") == "status_changed" and (len(got) > 1 or event["sequence"] == start + 1):
                got.append(event["sequence"])
        assert got == list(range(start, last + 1))


def test_events_of_an_agent_that_is_forgotten(unix: LineWire) -> None:
    ref = unix.spawn("exit_with", 0)
    unix.ended(ref)
    unix.control(ref, "remove")
    assert [e["status"] for e in of(unix, ref)] == ["running", "completed"]
    for wrong in (ref[:8], "\ud800", "nobody"):
        unix.refused("agent_not_found", "events_request", agent_id=wrong)



