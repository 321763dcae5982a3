"""The registry is damaged, deleted or replaced while agents run: what runs is listed or ended, and named.

Owns:    damage to any cell of any table, to any page, and to the whole file; what is said of it, and what is not lost.
Runs in: the test process; it edits the files of servers that run, and kills their cores.
Unaware: of a disk that is full and of locks (test_core_survives.py, test_backlog.py).
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import Server, wait_until
from test_faults import back
from wire import LineWire, alive, new_id

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")
GARBAGE = ("{broken", "", None, -1, 2 ** 60, 1.5, b"\xff\xfe\x00", "[" * 2000, '{"id":5}', "\U0001f600")
LARGE = {f"label {n}": "x" * 200 for n in range(50)}  # such a record is stored in two parts
FILES = ("registry.db", "registry.db-wal", "registry.db-shm")


@contextlib.contextmanager
def database(server: Server) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(str(server.state_dir / "registry.db"), isolation_level=None)) as db:
        db.execute("PRAGMA busy_timeout = 10000")
        yield db


def kill_core(server: Server) -> None:
    core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)


def overwrite(server: Server) -> None:
    for name in FILES[1:]:
        with contextlib.suppress(FileNotFoundError):
            (server.state_dir / name).unlink()
    with open(server.state_dir / "registry.db", "r+b") as file:
        file.write(b"not a database " * 4096)


def delete(server: Server) -> None:
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            (server.state_dir / name).unlink()


def garble_records(server: Server) -> None:
    with database(server) as db:
        db.execute("UPDATE agents SET record = '{broken'")


def forget(server: Server) -> None:
    with database(server) as db:
        db.execute("DELETE FROM agents")


# ---------------------------------------------------------------- what runs is listed

def test_a_core_that_died_in_a_repair_has_lost_nothing(start_server: Callable[..., Server]) -> None:
    """The damaged file is aside already, and the new one does not have its name yet."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 3, ready=False)
        wire.ended(ended)
    core = server.pids()["core"]
    with database(server) as db:
        db.execute("VACUUM INTO ?", (str(server.state_dir / "registry.db.new"),))
    os.kill(core, signal.SIGSTOP)
    for name in FILES[:1]:
        (server.state_dir / name).rename(server.state_dir / f"{name}.unreadable-1")
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.exit(ended)["code"] == 3
    assert not list(server.state_dir.glob("registry.db.new*"))


@pytest.mark.parametrize("damage", [overwrite, delete, garble_records, forget], ids=lambda damage: damage.__name__)
def test_an_agent_whose_record_is_lost_goes_on(start_server: Callable[..., Server], damage: Callable[[Server], None],
                                               tmp_path: Path) -> None:
    """It is listed with its id, reads its stdin, writes its output at the right offsets, and its end is known."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        echo = wire.spawn("echo", cwd=str(tmp_path))
        terminal = wire.spawn("at_terminal", ready=False, pty={"rows": 7, "cols": 33})
        wire.control(echo, "write_stdin", data="before\n")
        said = wire.until_output(echo, b"before")
        pids = {ref: wire.info(ref)["pid"] for ref in (echo, terminal)}
        daemon = wire.spawn("sleeper")
        wire.control(daemon, "kill")
        wire.ended(daemon)
    damage(server)
    core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        listed = {each["id"]: each for each in wire.agents()}
        assert {ref: listed[ref]["pid"] for ref in listed} == pids
        assert all(each["status"] == "running" and each["command"] and each["created_at"] for each in listed.values())
        assert listed[echo]["cwd"] == str(tmp_path) and listed[terminal]["pty"] == {"rows": 7, "cols": 33}
        wire.control(echo, "write_stdin", data="after\n")
        assert wire.until_output(echo, b"after").startswith(said)
        wire.control(echo, "close_stdin")
        assert wire.exit(echo)["code"] == 0
        events = [event for event in wire.ok("events_request")["events"] if event.get("agent_id") == terminal]
        assert any("listed again" in event["message"] for event in events)
    assert echo in server.logs() or "could not be read" in server.logs() or "deleted" in server.logs()
    assert server.stop() == 0 and not any(map(alive, pids.values()))


def test_a_record_that_is_lost_gets_back_what_was_asked_for(start_server: Callable[..., Server]) -> None:
    """What the agent was spawned with stands beside its record: its name, its labels, its limits; it restarts."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper", name="worker", labels={"a": "b"}, grace_secs=0.5)
        garble_records(server)
        kill_core(server)
    with LineWire(server.socket_path) as wire:
        info = wire.info("worker")
        assert info["id"] == ref and info["labels"] == {"a": "b"}
        wire.control(ref, "restart")
        wait_until(lambda: wire.info(ref)["attempt"] == 2 and wire.status(ref) == "running", what="attempt 2")


def test_what_was_asked_for_is_lost_too(start_server: Callable[..., Server]) -> None:
    """Then a restart is refused, and the agent is not ended for it."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
    delete(server)
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert "spawn another" in wire.cannot("invalid_state", ref, "restart")
        assert wire.status(ref) == "running" and wire.control(ref, "inspect")["spec"].get("command") is None
        assert server.ask({"type": "reload_request"})["success"]


def test_an_agent_that_is_paused_when_its_record_is_lost(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
        wire.control(ref, "pause")
    delete(server)
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert wire.status(ref) == "paused"
        wire.control(ref, "resume")
        assert wire.status(ref) == "running"


def test_one_that_ended_while_its_record_was_lost(start_server: Callable[..., Server]) -> None:
    """Nobody knows any more how; its output is there."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
        pid = wire.info(ref)["pid"]
    core, keeper = server.pids()["core"], server.pids()["keeper"]
    os.kill(keeper, signal.SIGSTOP)
    os.kill(core, signal.SIGKILL)
    delete(server)
    os.kill(pid, signal.SIGKILL)
    os.kill(keeper, signal.SIGCONT)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.exit(ref)["reason"] == "lost" and wire.output(ref) == b"ready\n"


def test_all_of_ours_dead_and_the_registry_deleted(start_server: Callable[..., Server]) -> None:
    """The directory of an agent tells that its mark is ours: it is ended, and named. Another server's goes on."""
    other = start_server()
    with LineWire(other.socket_path) as wire:
        stranger = wire.info(wire.spawn("sleeper"))["pid"]
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.ok("spawn_request", config={"command": ["/bin/sleep", "1000"]})["agent_info"]["id"]
        pid = wire.info(ref)["pid"]
    parts = server.pids()
    for part in parts.values():
        os.kill(part, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(map(alive, parts.values())))
    delete(server)
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert [(a["id"], a["exit"]["reason"]) for a in wire.agents(all=True)] == [(ref, "lost")]
        assert not alive(pid) and alive(stranger)


# ---------------------------------------------------------------- the file goes while the core lives

@pytest.mark.parametrize("names", [FILES, FILES[:1], FILES[1:2]], ids=["all", "database", "log"])
def test_a_file_that_is_deleted_is_written_again(start_server: Callable[..., Server], names: tuple[str, ...]) -> None:
    """The open database is still there to be read, so that nothing is lost, not even what was done once."""
    server = start_server("--status-update-interval-secs", "0.2")
    request = {"type": "spawn_request", "request_id": new_id(), "config": {"command": ["/bin/sleep", "1000"]}}
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 3)
        wire.ended(ended)
        ref = server.ask(request)["agent_info"]["id"]
        history = wire.ok("events_request")["events"]
    for name in names:
        (server.state_dir / name).unlink()
    wait_until(lambda: "a new one was begun" in server.logs(), what="the loss to be noticed, with nothing to write")
    assert "deleted" in server.logs()
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert [each["id"] for each in wire.agents(all=True)] == [ended, ref]
        assert wire.exit(ended)["code"] == 3 and wire.status(ref) == "running"
        assert wire.ok("events_request")["events"][:len(history)] == history
        assert server.ask(request)["agent_info"]["id"] == ref
        assert len(wire.control(ended, "inspect")["attempts"]) == 1


def test_a_file_that_is_replaced_is_put_aside(start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "0.2")
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
        (server.state_dir / "other").write_bytes(b"another file")
        (server.state_dir / "other").rename(server.state_dir / "registry.db")
        wait_until(lambda: "replaced" in server.logs(), what="it to be noticed")
        kill_core(server)
    aside, = [path for path in server.state_dir.glob("registry.db.unreadable-*")
              if path.read_bytes() == b"another file"]
    assert aside.stat().st_mode & 0o777 == 0o600
    with LineWire(server.socket_path) as wire:
        assert wire.status(ref) == "running"


def test_something_else_in_the_place_of_the_file(start_server: Callable[..., Server]) -> None:
    """A named pipe would make a core wait for ever; neither a reload nor a core that begins opens it."""
    server = start_server("--status-update-interval-secs", "86400")
    with LineWire(server.socket_path) as wire:
        ref, core = wire.spawn("sleeper"), server.pids()["core"]
    os.kill(core, signal.SIGSTOP)
    for name in FILES:
        (server.state_dir / name).unlink()
    os.mkfifo(server.state_dir / "registry.db")
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.status(ref) == "running" and "is not a file" in server.logs()
        core = server.pids()["core"]
        wire.ok("reload_request")
    back(server, "core", core)


# ---------------------------------------------------------------- one row

def test_one_damaged_event_costs_that_event(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        for _ in range(3):
            wire.ended(wire.spawn("exit_with", 0))
        whole = [event["sequence"] for event in wire.ok("events_request")["events"]]
        for number, damaged in ((3, "substr(message, 1, 40)"), (4, "CAST(x'fffe' AS TEXT)"), (5, "NULL")):
            with database(server) as db:
                db.execute(f"UPDATE events SET message = {damaged} WHERE sequence = ?", (number,))
            page = wire.ok("events_request", limit=1, since=number - 1)
            assert [event["sequence"] for event in page["events"]] == [number + 1]
            whole.remove(number)
            assert [event["sequence"] for event in wire.ok("events_request")["events"]] == whole
            assert f"event {number} cannot be read" in server.logs()
        wire.subscribe("status.", since=0)
        assert wire.event()["sequence"] == whole[1], "a replay, too"
    with database(server) as db:
        assert {row[0] for row in db.execute("SELECT source FROM quarantine")} == {"event 3", "event 4", "event 5"}


def test_a_damaged_attempt_and_a_damaged_reply(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("exit_with", 0)
        wire.ended(ref)
        wire.control(ref, "restart")
        wait_until(lambda: len(wire.control(ref, "inspect")["attempts"]) == 2, what="the second attempt's end")
        request = {"type": "control_command", "request_id": new_id(), "agent_id": ref, "command_type": "remove"}
        with database(server) as db:
            db.execute("UPDATE attempts SET record = '{' WHERE attempt = 1")
        assert [each["attempt"] for each in wire.control(ref, "inspect")["attempts"]] == [2]
        assert server.ask(request)["success"]
        with database(server) as db:
            db.execute("UPDATE requests SET reply = x'7b' WHERE agent_id IS NULL")
        again = server.ask(request)
        assert again["error_code"] == "unavailable" and "damaged" in again["error"], "it is not done again"


@pytest.mark.parametrize("key", ["server_id", "sequence", "ending", "clock", "schema"])
@pytest.mark.parametrize("value", [b"\xff\xfe", "{", "\x00", "9" * 400, '{"started_at":1}', None])
def test_a_damaged_word_about_the_server(start_server: Callable[..., Server], key: str, value: Any) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
    with database(server) as db:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert wire.status(ref) == "running"
        assert wire.ok("events_request")["next"] < 100


def test_a_header_that_names_a_version_it_is_not(start_server: Callable[..., Server]) -> None:
    """The version stands in the header and in the table meta; one damaged byte makes no newer version."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("sleeper")
    with database(server) as db:
        db.execute("PRAGMA user_version = 77")
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert wire.status(ref) == "running"


# ---------------------------------------------------------------- any cell, any page

class Watched:
    """A server with agents, of which each is listed or gone after each damage."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.pids: dict[str, int] = {}
        self.fill()

    def fill(self) -> None:
        with LineWire(self.server.socket_path) as wire:
            while len(self.pids) < 2:
                ref = wire.spawn("sleeper", name=f"n{new_id()[:8]}", labels=LARGE)
                wire.control(ref, "write_stdin", data="x")  # so that there is a row of each table
                self.pids[ref] = wire.info(ref)["pid"]
            for each in wire.agents(all=True):
                if each["status"] in ("completed", "failed", "terminated"):
                    wire.ask("control_command", agent_id=each["id"], command_type="remove", payload={})
            wire.ended(wire.spawn("exit_with", 0))

    def check(self, what: str) -> None:
        kill_core(self.server)
        with LineWire(self.server.socket_path) as wire:
            def settled() -> bool:
                listed = {each["pid"] for each in wire.agents()}
                return all(pid in listed or not alive(pid) for pid in self.pids.values())
            wait_until(settled, what=f"all that runs to be listed or ended after {what}")
            for request in ("health_check_request", "stats_request", "events_request"):
                wire.ok(request)
            for ref in list(self.pids):
                if not alive(self.pids[ref]):
                    assert ref in self.server.logs() or any(
                        str(self.pids[ref]) in json.dumps(each) or each["id"] == ref
                        for each in wire.agents(all=True)), f"{ref} was ended after {what} and nobody says so"
                    del self.pids[ref]
            assert len(wire.agents()) == len(self.pids), what
        self.fill()


def test_any_cell_can_be_damaged(start_server: Callable[..., Server]) -> None:
    watched = Watched(start_server())
    dice = random.Random(5)
    with database(watched.server) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        cells = [(table, row[1]) for table in tables if table != "quarantine"
                 for row in db.execute(f"PRAGMA table_info({table})")]
    for table, column in cells:
        value = dice.choice(GARBAGE)
        with database(watched.server) as db:
            keys = [row[0] for row in db.execute(f"PRAGMA table_info({table})")]
            rows = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            if not rows or not keys:
                continue
            key = {"meta": "key", "states": "agent_id"}.get(table, "rowid")
            at = dice.randrange(rows)
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = (SELECT {key} FROM {table} "
                           "LIMIT 1 OFFSET ?)", (value, at))
        watched.check(f"{table}.{column} = {value!r:.40}")


def test_text_that_is_none_costs_its_rows(start_server: Callable[..., Server]) -> None:
    """Bytes that are no UTF-8, in every column of all rows: a query that reads them as text is carried out."""
    watched = Watched(start_server())
    with database(watched.server) as db:
        for column in ("events.agent_id", "events.message", "attempts.attempt", "progress.position", "meta.value"):
            table, name = column.split(".")
            with contextlib.suppress(sqlite3.IntegrityError):
                db.execute(f"UPDATE {table} SET {name} = x'ff00'")
    watched.check("bytes that are no text")
    assert not list(watched.server.state_dir.glob("registry.db.unreadable-*"))


def test_any_page_can_be_damaged(start_server: Callable[..., Server]) -> None:
    watched = Watched(start_server())
    path, page = watched.server.state_dir / "registry.db", 0
    while True:
        with database(watched.server) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            size = db.execute("PRAGMA page_size").fetchone()[0]
        if page * size >= path.stat().st_size or page > 40:
            break
        with open(path, "r+b") as file:
            file.seek(page * size)
            file.write(os.urandom(size))
        watched.check(f"page {page}")
        page += 1
    assert page > 10
