"""What waits to be written into the registry, who waits for it, and what is left of what was removed.

Owns:    bounds of what waits, locks of other processes, how much a small change writes, and the registry's clock.
Runs in: the test process; a second connection to a registry's file plays the other process.
Unaware: of damage (test_damage.py).
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import Server, agent, wait_until
from test_core_survives import locked
from test_faults import back
from wire import Json, LineWire, new_id

from agentserver.core.backlog import BACKLOG_BYTES, REFUSED_BYTES, Backlog
from agentserver.core.registry import SPLIT_BYTES, Ask, Registry
from agentserver.errors import RequestError

SECRET = "Ohb5quaeXahz9aiz"
LARGE = {f"label {n}": "x" * 250 for n in range(900)}


class Record:
    """An agent as the registry sees it."""

    def __init__(self, agent_id: str, fixed: int = 10) -> None:
        self.id, self.created_at, self.finished_at = agent_id, 1.0, None
        self.stage: tuple[object, ...] = ("running",)
        self._fixed, self.changing = json.dumps({"fixed": "x" * fixed}), 0

    def texts(self) -> tuple[str, str]:
        return self._fixed, json.dumps({"changing": self.changing})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def registry(tmp_path: Path, said: list[str]) -> Iterator[Registry]:
    made = Registry(str(tmp_path / "registry.db"), said.append, 1000, 60.0, 1000)
    assert made.commit()
    yield made
    made.close()


@contextlib.contextmanager
def other(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(str(tmp_path / "registry.db"), isolation_level=None)) as db:
        yield db


# ---------------------------------------------------------------- what waits

def test_the_newest_state_of_a_thing_takes_the_place_of_the_one_before() -> None:
    backlog = Backlog()
    for n in range(1000):
        backlog.put("a", "x", "y" * 1000, n)
    backlog.put("b", "x", b"12345")
    assert [values[-1] for _sql, values in backlog.statements()] == [999, b"12345"] and 1000 < backlog.bytes < 2000
    backlog.drop("a")
    backlog.drop("b")
    assert backlog.bytes == 0 and not backlog


def test_what_waits_is_bounded_and_ends_are_kept(registry: Registry, tmp_path: Path, said: list[str]) -> None:
    """Many changes of large records, events without end, and then the ends: the ends and the requests are all there."""
    agents = [Record(f"agent {n}", 1_000_000) for n in range(50)]
    with other(tmp_path) as db:
        db.execute("BEGIN IMMEDIATE")
        for each in agents:
            registry.add_agent(each, {})
        given = [registry.add_event(1.0, "agent 0", {"message": "x" * 100_000}) for _ in range(1000)]
        for n in range(100):
            for each in agents:
                each.changing = n
                registry.save_agent(each)
            registry.commit()
        for n in range(50):
            registry.save_attempt(f"agent {n}", 1, {"attempt": 1, "exit": n})
            registry.remember(Ask("me", f"request {n}", b"d" * 32), b'{"request_id":"request %d"}' % n, f"agent {n}")
        kept = [text for text in given if text]
        assert 0.9 * BACKLOG_BYTES < sum(map(len, kept)) < 1.1 * BACKLOG_BYTES
        assert registry._backlog.bytes < 1.1 * BACKLOG_BYTES, "records wait by reference"
        assert any("no event is kept" in sentence for sentence in said)
        db.execute("ROLLBACK")
    assert registry.commit() and any(f"{1000 - len(kept)} events were not kept" in sentence for sentence in said)
    with other(tmp_path) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone()[0] == 50
        assert db.execute("SELECT count(*) FROM requests").fetchone()[0] == 50
        assert db.execute("SELECT count(*), max(sequence) FROM events").fetchone() == (len(kept), len(kept))
        records = [json.loads(row[0]) for row in db.execute("SELECT record FROM agents")]
        assert len(records) == 50 and {record["changing"] for record in records} == {99}


def test_new_work_is_refused_when_too_much_waits(registry: Registry, tmp_path: Path) -> None:
    with other(tmp_path) as db:
        db.execute("BEGIN IMMEDIATE")
        n = 0
        while registry._backlog.bytes < REFUSED_BYTES:
            registry.check_room()
            registry.remember(Ask("me", str(n), b""), b"x" * 1_000_000)
            n += 1
        registry.commit()
        with pytest.raises(RequestError, match="lock"):
            registry.check_room()
        db.execute("ROLLBACK")
    assert registry.commit()
    registry.check_room()


def test_reading_commits_nothing(registry: Registry, tmp_path: Path) -> None:
    """One transaction a turn; and yet who reads sees what this turn has done."""
    each = Record("agent")
    registry.add_agent(each, {"command": ["x"]})
    registry.save_attempt("agent", 1, {"attempt": 1})
    text = registry.add_event(1.0, "agent", {"message": "hello"})
    registry.remember(Ask("me", "request", b"d"), b"reply")
    assert registry.spec("agent") == {"command": ["x"]} and registry.attempts("agent") == [{"attempt": 1}]
    assert registry.events(0, 10) == [text] and registry.has_events_of("agent") and registry.first_kept == 1
    remembered = registry.recall("request")
    assert remembered is not None and not remembered.durable and remembered.reply == b"reply"
    with other(tmp_path) as db:
        for table in ("agents", "attempts", "events", "requests"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0
        assert registry.commit()
        for table in ("agents", "attempts", "events", "requests"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 1


def test_a_request_that_was_refused_is_not_taken_for_one_that_was_begun(registry: Registry) -> None:
    ask = Ask("me", "request", b"d" * 32)
    assert registry.begin(ask, "agent")
    registry.settle("request")
    assert registry.recall("request") is None, "in the same turn, too"
    assert registry.begin(ask, "agent") and registry.commit()
    found = registry.recall("request")
    assert found is not None and found.begun == {"agent"}


# ---------------------------------------------------------------- how much is written

def test_a_small_change_of_a_large_record_writes_little(registry: Registry, tmp_path: Path) -> None:
    each = Record("agent", 4_000_000)
    registry.add_agent(each, {})
    assert registry.commit()
    wal = tmp_path / "registry.db-wal"
    with other(tmp_path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for n in range(100):
            each.changing = n
            registry.save_agent(each)
            assert registry.commit()
        assert wal.stat().st_size < 2_000_000
        state, = db.execute("SELECT record FROM states").fetchone()
        assert json.loads(state) == {"changing": 99}
        each.stage = ("completed",)
        registry.save_agent(each)
        assert registry.commit()
        record, = db.execute("SELECT record FROM agents").fetchone()
        assert json.loads(record)["changing"] == 99 and not db.execute("SELECT * FROM states").fetchall()


def test_a_version_that_knows_one_part_only_writes_what_counts(registry: Registry, tmp_path: Path) -> None:
    """It reads and writes `agents.record`: whole before it takes over, and newer than `states` after it has written."""
    each = Record("agent", 2 * SPLIT_BYTES)
    registry.add_agent(each, {})
    registry.commit()
    each.changing = 1
    registry.save_agent(each)
    registry.commit()
    assert [row.record["changing"] for row in registry.agents() if row.record] == [1]
    assert registry.make_whole()
    with other(tmp_path) as db:
        assert json.loads(db.execute("SELECT record FROM agents").fetchone()[0])["changing"] == 1
        each.changing = 2
        registry.save_agent(each)
        registry.commit()
        assert db.execute("SELECT count(*) FROM states").fetchone()[0] == 1
        db.execute("UPDATE agents SET finished = ?, record = ? WHERE id = ?", (None, '{"changing":3}', "agent"))
    assert [row.record for row in registry.agents()] == [{"changing": 3}]
    with other(tmp_path) as db:
        db.execute("DELETE FROM agents")
        assert db.execute("SELECT count(*) FROM states").fetchone()[0] == 0


def test_keys_that_are_typed_into_a_large_agent(start_server: Callable[..., Server]) -> None:
    """They write little, and are there once after the core has died."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.ok("spawn_request", config={"command": agent("echo"), "labels": LARGE})["agent_info"]["id"]
        wire.until_output(ref, b"ready")
        wal = server.state_dir / "registry.db-wal"
        before = wal.stat().st_size
        for n in range(50):
            wire.control(ref, "write_stdin", data=f"{n}\n")
        assert wal.stat().st_size - before < 50 * len(json.dumps(LARGE)) // 4
    core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        wire.control(ref, "write_stdin", data="last\n")
        wire.control(ref, "close_stdin")
        said = "ready\n" + "".join(f"{n}\n" for n in range(50)) + "last\n"
        assert wire.output(ref) == said.encode() and wire.info(ref)["labels"] == LARGE


# ---------------------------------------------------------------- a lock of another process

def asked(server: Server, message: Json) -> tuple[threading.Thread, list[Json]]:
    """Ask in a thread of its own; the reply comes into the list."""
    replies: list[Json] = []
    thread = threading.Thread(target=lambda: replies.append(server.ask(message)))
    thread.start()
    return thread, replies


def test_who_asks_for_something_waits_for_a_lock_and_nobody_else_does(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        running = wire.spawn("sleeper")
        with locked(server):
            spawn = asked(server, {"type": "spawn_request", "config": {"command": ["/bin/true"]}})
            kill = asked(server, {"type": "control_command", "agent_id": running, "command_type": "kill"})
            began = time.monotonic()
            for _ in range(200):
                wire.ok("health_check_request")
                assert not spawn[1] and not kill[1], "nothing is acknowledged before it is on disk"
                if time.monotonic() > began + 1.0:
                    break
            assert time.monotonic() - began < 10, "the loop did not wait with them"
        for thread, _replies in (spawn, kill):
            thread.join(10)
        assert spawn[1][0]["success"] and kill[1][0]["success"]
        assert wire.exit(running)["reason"] == "kill" and len(wire.agents(all=True)) == 2


def test_a_lock_that_stays_is_told(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with locked(server):
        reply = server.ask({"type": "spawn_request", "config": {"command": ["/bin/true"]}})
        assert reply["error_code"] == "unavailable" and "another process holds a lock" in reply["error"]
        assert "room" not in reply["error"] and "disk" not in reply["error"]
    wait_until(lambda: server.ask({"type": "spawn_request", "config": {"command": ["/bin/true"]}})["success"])
    assert server.ask({"type": "list_agents_request", "all": True})["total"] == 1, "the refused one left nothing"


def test_a_reload_waits_until_the_registry_can_be_written(start_server: Callable[..., Server]) -> None:
    """What only the old core knows, the end of an agent, would be lost."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref, core = wire.spawn("exit_with", 3, ready=False), server.pids()["core"]
        other_one = wire.spawn("sleeper")
        with locked(server):
            os.kill(wire.info(other_one)["pid"], signal.SIGKILL)
            wait_until(lambda: wire.status(other_one) == "failed")
            os.kill(server.pids()["keeper"], signal.SIGHUP)
            with pytest.raises(AssertionError):
                wait_until(lambda: server.pids()["core"] != core, deadline=1.5)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.exit(ref)["code"] == 3 and wire.exit(other_one)["signal"] == "SIGKILL"


# ---------------------------------------------------------------- what is left of what was removed

def test_nothing_of_a_removed_agent_stays_in_the_files(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        keeping = wire.spawn("sleeper")
        config = {"command": ["/bin/sh", "-c", "exit 3", SECRET], "environment": {"TOKEN": SECRET},
                  "labels": {"l": SECRET}}
        refs = [wire.ok("spawn_request", config=config, metadata={"m": SECRET * 1000})["agent_info"]["id"]
                for _ in range(3)]
        for ref in refs:
            wire.ended(ref)
        assert holding(server.state_dir)
        for ref in refs:
            wire.control(ref, "remove")
        wait_until(lambda: not holding(server.state_dir), deadline=10, what="the secret to be gone from every file")
        assert wire.status(keeping) == "running"


def holding(state_dir: Path) -> list[str]:
    return [path.name for path in state_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


# ---------------------------------------------------------------- time and order

def test_a_clock_that_is_set_forward_ages_nothing(tmp_path: Path) -> None:
    now = [1_700_000_000.0]

    def opened(boot: str) -> Any:
        return Registry(str(tmp_path / "registry.db"), lambda _: None, 1000, 60.0, 1000, now=lambda: now[0], boot=boot)
    registry = opened("boot")
    registry.add_event(now[0], None, {"a": 1})
    now[0] += 1e9
    assert registry.age_time() < now[0] - 1e8
    registry.trim()
    assert len(registry.events(0, 10)) == 1
    registry.close()
    again = opened("boot")  # a core that comes later in the same boot knows it, too
    again.trim()
    assert len(again.events(0, 10)) == 1
    again.close()
    later = opened("another boot")  # what the clock says then is all that can be known
    later.trim()
    assert later.events(0, 10) == []
    later.close()


def test_agents_are_listed_in_the_order_in_which_they_came(registry: Registry) -> None:
    """Whatever the clock said."""
    for n, created in enumerate((5.0, 1.0, 9.0, 0.0)):
        each = Record(f"agent {n}")
        each.created_at = created
        registry.add_agent(each, {})
    registry.commit()
    again = Record("agent 1")
    again.created_at = 20.0
    registry._agents["agent 1"].agent = again
    registry.save_agent(again)
    registry.commit()
    assert [row.id for row in registry.agents()] == [f"agent {n}" for n in range(4)]


def test_old_rows_are_removed_some_at_a_time(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry.db"), lambda _: None, 100_000, 60.0, 1000)
    for _ in range(2500):
        registry.add_event(1.0, None, {"a": 1})
    registry.commit()
    turns = 0
    while registry.trim():
        turns += 1
    assert turns == 2 and registry.events(0, 10) == []
    assert new_id() != registry.get("sequence") == "2500"
    registry.close()


def test_a_file_that_goes_before_the_first_write_is_noticed(tmp_path: Path, said: list[str]) -> None:
    """A core that has just begun has read its agents, and written nothing yet."""
    registry = Registry(str(tmp_path / "registry.db"), said.append, 1000, 60.0, 1000)
    registry.add_agent(Record("agent"), {"command": ["x"]})
    for path in tmp_path.iterdir():
        path.unlink()
    wait_until(lambda: registry.commit() and (registry.look() or said), what="the loss to be noticed")
    assert "deleted" in said[0]
    registry.close()
    again = Registry(str(tmp_path / "registry.db"), said.append, 1000, 60.0, 1000)
    assert [row.id for row in again.agents()] == ["agent"] and again.spec("agent") == {"command": ["x"]}
    again.close()
