"""What is known is known again: history, outputs and events after a restart; one bad record is one bad record.

Owns:    restarts of a server on the same state directory, and damage to its registry and files in between.
Runs in: the test process; it edits the sqlite3 file of a server that has ended.
Unaware: of how the registry is written.
"""
from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Callable

from support import Server, agent, marked_processes, serve, wait_until
from wire import LineWire, alive

STABLE = ("id", "name", "status", "created_at", "started_at", "finished_at", "exit", "labels", "metadata", "command",
          "cwd", "stdin", "attempt", "output", "model_backend", "task")


def stable(info: dict) -> dict:  # type: ignore[type-arg]
    """Return the fields of an ended agent that must never change again."""
    return {name: info[name] for name in STABLE}


def test_history_and_outputs_survive(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("burst", 100_000, 50, name="burst", labels={"a": "b"}), wire.spawn("exit_with", 3, "sorry"),
               wire.spawn("die_by", 9), wire.spawn("daemoniser", "exit", "keep"), wire.spawn("binary", 2)]
        for each in ids:
            wire.ended(each)
        infos = {each: stable(wire.info(each)) for each in ids}
        outputs = {(each, stream): wire.output(each, stream) for each in ids for stream in ("stdout", "stderr")}
        events = wire.ok("events_request")
        server_id = wire.ok("health_check_request")["metadata"]["server_id"]
    server.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert [a["id"] for a in wire.agents(all=True)] == ids and wire.agents() == []
        assert {each: stable(wire.info(each)) for each in ids} == infos
        for (each, stream), text in outputs.items():
            assert wire.output(each, stream) == text
        page = wire.ok("events_request")
        assert page["events"][:len(events["events"])] == events["events"]
        sequences = [e["sequence"] for e in page["events"]]
        assert sequences == list(range(1, len(sequences) + 1)), "one gap-free count, also across the restart"
        assert wire.ok("health_check_request")["metadata"]["server_id"] == server_id
        assert wire.info("burst")["id"] == ids[0]
        assert wire.control(ids[1], "restart")["attempt"] == 2
        wait_until(lambda: wire.info(ids[1])["attempt"] == 2 and wire.status(ids[1]) == "failed")
        assert wire.output(ids[1], "stderr") == b"sorry\n" * 2, "offsets go on where they were"


def test_agents_that_the_end_of_the_server_ended(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        living = wire.spawn("sleeper")
    server.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        info = wire.info(living)
        assert info["status"] == "terminated" and info["exit"]["reason"] == "shutdown" and info["pid"] is None
        assert info["exit"]["signal"] == "SIGTERM" and wire.output(living) == b"ready\n"


def test_everything_killed_at_once(start_server: Callable[..., Server]) -> None:
    """Survivors are found by identity, ended, and recorded as lost; output so far is kept."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 4)
        wire.ended(ended)
        ids = [wire.spawn("sleeper"), wire.spawn("stubborn"), wire.spawn("tree", 2, 2)]
        pids = [wire.info(each)["pid"] for each in ids] + json.loads(wire.lines(ids[2], 2)[1])
        events = wire.ok("events_request")["events"]
    parts = server.pids()
    for pid in parts.values():
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(map(alive, parts.values())))
    assert all(map(alive, pids)), "nobody else was touched"
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        wait_until(lambda: not any(map(alive, pids)), what="survivors to be ended")
        for each in ids:
            info = wire.ended(each)
            assert info["status"] == "failed" and info["exit"]["reason"] == "lost"
            assert wire.output(each).startswith(b"ready\n")
        assert wire.info(ended)["exit"]["code"] == 4
        page = wire.ok("events_request")["events"]
        assert page[:len(events)] == events and [e["sequence"] for e in page] == list(range(1, len(page) + 1))
        wire.spawn("exit_with", 0)


def test_survivors_can_be_left_alone(start_server: Callable[..., Server]) -> None:
    """With `orphans = leave` nothing is signalled; the record says the same."""
    server = start_server("--orphans", "leave")
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("sleeper")
        pid = wire.info(each)["pid"]
    parts = server.pids()
    for part in parts.values():
        os.kill(part, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not any(map(alive, parts.values())))
    again = start_server("--orphans", "leave", state_dir=server.state_dir)
    try:
        with LineWire(again.socket_path) as wire:
            assert wire.exit(each)["reason"] == "lost" and wire.status(each) == "failed"
            assert alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_stranger_with_a_reused_pid_is_left_alone(start_server: Callable[..., Server]) -> None:
    """The record names a pid that now belongs to somebody else: identity is more than a number."""
    import subprocess
    server = start_server()
    with LineWire(server.socket_path) as wire:
        lost = wire.spawn("sleeper")
        pid = wire.info(lost)["pid"]
    for each in (*server.pids().values(), pid):
        os.kill(each, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not marked_processes(server.mark))
    stranger = subprocess.Popen(["/bin/sleep", "1000"], env={}, start_new_session=True)
    try:
        replace_in_registry(server.state_dir, str(pid), str(stranger.pid))
        again = start_server(state_dir=server.state_dir)
        with LineWire(again.socket_path) as wire:
            info = wire.ended(lost)
            assert info["exit"]["reason"] == "lost"
        assert stranger.poll() is None, "the stranger lives"
    finally:
        stranger.kill()
        stranger.wait()


def replace_in_registry(state_dir: Path, old: str, new: str) -> None:
    """Replace a number wherever it stands as a value in the registry."""
    with sqlite3.connect(str(state_dir / "registry.db")) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            for column in columns:
                db.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (int(new), int(old)))
                db.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE typeof({column}) = 'text' "
                           f"AND {column} LIKE ?", (f'"pid":{old}', f'"pid":{new}', f'%"pid":{old}%'))
    db.close()


def record_table(db: sqlite3.Connection, ref: str) -> tuple[str, str, str]:
    """Return table, id column and the column with the JSON text of an agent's record."""
    for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table' AND name LIKE '%agent%'").fetchall():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        row = db.execute(f"SELECT * FROM {table} WHERE {columns[0]} = ?", (ref,)).fetchone()
        for column, value in reversed(list(zip(columns, row or ()))):
            if isinstance(value, str) and value.startswith("{") and len(value) > 50:
                return table, columns[0], column
    raise AssertionError("no JSON record found in the registry; adapt this test to its schema")


def test_one_bad_record_is_quarantined_and_the_rest_loads(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("exit_with", n) for n in range(3)]
        for each in ids:
            wire.ended(each)
    server.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        table, key, column = record_table(db, ids[1])
        db.execute(f"UPDATE {table} SET {column} = '{{broken' WHERE {key} = ?", (ids[1],))
    db.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert [a["id"] for a in wire.agents(all=True)] == [ids[0], ids[2]]
        assert ids[1] in again.logs(), "with a message that names it"
        wire.spawn("exit_with", 0)
    again.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        assert any("{broken" in str(row) for (t,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
                   for row in db.execute(f"SELECT * FROM {t}")), "quarantined, not thrown away"
    db.close()


def test_unknown_fields_of_a_newer_version_are_kept(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("exit_with", 1)
        wire.ended(ref)
    server.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        table, key, column = record_table(db, ref)
        record = json.loads(db.execute(f"SELECT {column} FROM {table} WHERE {key} = ?", (ref,)).fetchone()[0])
        record["from_the_future"] = {"kept": True}
        db.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (json.dumps(record), ref))
    db.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        wire.control(ref, "restart")  # so that the record is written again
        wait_until(lambda: wire.info(ref)["attempt"] == 2 and wire.status(ref) == "failed")
    again.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        record = json.loads(db.execute(f"SELECT {column} FROM {table} WHERE {key} = ?", (ref,)).fetchone()[0])
    db.close()
    assert record["from_the_future"] == {"kept": True}


def test_a_name_that_was_allowed_before_is_no_other_agents_id(start_server: Callable[..., Server]) -> None:
    """Older versions let an agent be named like another's id. That id still means the other, also when it is gone."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        gone, stranger = wire.spawn("exit_with", 0), wire.spawn("exit_with", 1, name="stranger")
        for each in (gone, stranger):
            wire.ended(each)
    server.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            for _, column, *_ in db.execute(f"PRAGMA table_info({table})").fetchall():
                db.execute(f"UPDATE {table} SET {column} = replace({column}, '\"stranger\"', ?) "
                           f"WHERE typeof({column}) = 'text'", (json.dumps(gone),))
    db.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.info(stranger)["name"] == gone
        assert wire.info(gone)["id"] == gone
        wire.control(gone, "remove")
        for ref in (gone, gone.upper()):
            wire.cannot("agent_not_found", ref, "get_status")
            batch = wire.ask("batch_control_command", agent_ids=[ref], command_type="remove")
            assert batch["error_code"] == "agent_not_found"
        events = wire.ok("events_request", agent_id=gone)["events"]
        assert events and {event["agent_id"] for event in events} == {gone}
        wire.control(stranger, "restart")  # under its id it goes on
        wait_until(lambda: wire.info(stranger)["attempt"] == 2 and wire.status(stranger) == "failed")


def test_a_registry_of_the_first_version_is_taken_over(start_server: Callable[..., Server]) -> None:
    """Its agents had a column more, and there was no table of what was begun."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("exit_with", 1)
        wire.ended(ref)
    server.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        db.executescript("""
            DROP TABLE begun;
            ALTER TABLE agents RENAME TO later;
            CREATE TABLE agents (id TEXT PRIMARY KEY, created REAL, finished REAL, request_id TEXT,
                                 spec TEXT, record TEXT);
            CREATE INDEX agents_by_request ON agents (request_id);
            INSERT INTO agents SELECT id, created, finished, '"r"', spec, record FROM later;
            DROP TABLE later;
            PRAGMA user_version = 1;""")
    db.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        wire.control(ref, "restart")
        wait_until(lambda: wire.info(ref)["attempt"] == 2 and wire.status(ref) == "failed")
        wire.ended(wire.spawn("exit_with", 0))
        assert len(wire.agents(all=True)) == 2


def test_a_bad_spec_costs_only_what_needs_it(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("exit_with", 1)
        wire.ended(ref)
    server.close()
    with sqlite3.connect(str(server.state_dir / "registry.db")) as db:
        db.execute("UPDATE agents SET spec = '{broken' WHERE id = ?", (ref,))
    db.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.output(ref) == b"ready\n" and wire.agents(all=True)[0]["id"] == ref
        for command in ("inspect", "restart"):
            reply = wire.ask("control_command", agent_id=ref, command_type=command)
            assert reply["success"] or reply["error_code"] != "internal", reply
        assert wire.status(ref) == "failed"


def test_lost_output_files_cost_only_that_output(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        one, two = wire.spawn("burst", 1000, 0), wire.spawn("burst", 1000, 0)
        wire.ended(one), wire.ended(two)
    server.close()
    for file in (server.state_dir / "agents" / one).iterdir():
        file.unlink()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.info(one)["status"] == "completed"
        chunk = wire.read(one, offset=0)
        assert chunk["bytes"] == 0 or chunk["dropped"] > 0
        assert len(wire.output(two)) == 1006


def test_a_registry_that_is_no_database_is_one_sentence(start_server: Callable[..., Server], state_dir: Path) -> None:
    """A clean state is never made up silently: either it says so and refuses, or it sets the file aside and says so."""
    (state_dir / "registry.db").write_bytes(b"this is no database" * 1000)
    code, _, error = serve("--state-dir", str(state_dir), until_ready=True)
    said = error + "".join(f.read_text() for f in state_dir.glob("*.log"))
    assert "registry" in said and "Traceback" not in error
    kept = [f for f in state_dir.iterdir() if f.is_file() and f.read_bytes().startswith(b"this is no database")]
    assert code in (0, 1) and kept, "the damaged file is kept"


def test_times_and_ids_are_the_users(start_server: Callable[..., Server]) -> None:
    """Only the state directory's owner can read what agents said and were given."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        wire.spawn("sleeper", environment={"TOKEN": "s3cret-value"})
        assert server.state_dir.stat().st_mode & 0o077 == 0
        for path in server.state_dir.rglob("*"):
            assert path.is_dir() or path.stat().st_mode & 0o077 == 0, path
    for log in server.state_dir.glob("*.log"):
        assert "s3cret-value" not in log.read_text()
    assert agent("sleeper")
