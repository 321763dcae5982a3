"""Neither a client nor a full disk nor a damaged file ends the core or keeps it from answering others.

Owns:    hostile frames, costly requests, and a registry, a disk, a descriptor table or a Python that fails for a while.
Runs in: the test process; it limits and signals only the parts of servers that it started.
Unaware: of what is done when all is well.
"""
from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import MAIN, Server, serve, wait_until
from wire import LineWire, new_id

from agentserver.core.counters import Counters
from agentserver.core.framing import PREFACE, frame

TRUE = {"command": ["/bin/true"]}


@contextlib.contextmanager
def locked(server: Server) -> Iterator[None]:
    """Keep the core from writing its registry, as a full disk does."""
    db = sqlite3.connect(str(server.state_dir / "registry.db"), isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")
    finally:
        db.close()


def answered_within(server: Server, secs: float) -> bool:
    """Whether somebody else is answered in time."""
    began = time.monotonic()
    assert server.ask({"type": "health_check_request"})["success"]
    return time.monotonic() - began < secs


# ---------------------------------------------------------------- clients

@pytest.mark.parametrize("tag", [0, 1], ids=["hello", "request"])
@pytest.mark.parametrize("header", [b"5", b"[1]", b"{", b"[" * 60_000], ids=["number", "list", "cut", "deep"])
def test_a_header_that_makes_no_sense_costs_its_connection_only(shared: Server, tag: int, header: bytes) -> None:
    core = shared.pids()["core"]
    with shared.connect() as link:
        link.sendall(PREFACE + frame(tag, header, b"{}"))
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(65536) == b""
    assert shared.pids()["core"] == core


def test_many_topics_do_not_keep_others_waiting(shared: Server) -> None:
    topics = [f"{n:036d}.stdout" for n in range(10_000)]
    with LineWire(shared.socket_path) as wire:
        wire.subscribe(*topics)
        more = [topic + "x" for topic in topics]
        wire.send(json.dumps({"type": "subscribe_request", "request_id": "x", "topics": more}).encode())
        assert answered_within(shared, 2.0)
        wire.receive()
        assert "10000" in wire.refused("bad_request", "subscribe_request", topics=["x"] * 20_000)


def test_a_long_batch_does_not_keep_others_waiting(shared: Server) -> None:
    batch: dict[str, Any] = {"type": "batch_control_command", "command_type": "get_status"}
    with LineWire(shared.socket_path) as wire:
        for _ in range(20):
            wire.ok("spawn_request", config={"command": ["/bin/sleep", "1000"]})
        wire.send(json.dumps({**batch, "request_id": "x", "agent_ids": ["none"] * 10_000}).encode())
        assert answered_within(shared, 2.0)
        wire.receive()
        wire.refused("bad_request", "batch_control_command", command_type="get_status", agent_ids=["none"] * 1_000_000)


# ---------------------------------------------------------------- the registry

def test_a_checkpoint_on_a_full_disk(start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "1")
    core = server.pids()["core"]
    with LineWire(server.socket_path) as wire:
        for _ in range(40):
            wire.ended(wire.ok("spawn_request", config=TRUE, metadata={"ballast": "x" * 10_000})["agent_info"]["id"])
    now = (server.state_dir / "registry.db").stat().st_size
    resource.prlimit(core, resource.RLIMIT_FSIZE, (now, resource.RLIM_INFINITY))
    wait_until(lambda: "cannot be moved" in server.logs() or "Traceback" in server.logs(), what="a failed checkpoint")
    resource.prlimit(core, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert server.pids()["core"] == core


def test_nothing_is_started_that_cannot_be_remembered(server: Server) -> None:
    """A death of the core right after would make a ghost of it."""
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 0)
        wire.ended(ended)
        with locked(server):
            wire.refused("unavailable", "spawn_request", config={"command": ["/bin/sleep", "1000"]})
            wire.cannot("unavailable", ended, "restart")
            assert wire.ok("health_check_request")["active_agents"] == 0
        assert wire.info(ended)["exit"]["reason"] == "exited" and wire.info(ended)["attempt"] == 1
        wire.ended(wire.spawn("exit_with", 0))


def test_what_was_done_while_the_registry_refused_is_not_done_again(server: Server) -> None:
    """Nobody is told before it is on disk; who asks again then gets the reply, not a second deed."""
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 0)
        wire.ended(ended)
    request = {"type": "control_command", "request_id": new_id(), "agent_id": ended, "command_type": "remove"}
    with locked(server):
        for _ in range(3):
            with pytest.raises((OSError, EOFError, ValueError)):
                server.ask(request)
    assert server.ask(request)["data"] == {"removed": True} == server.ask(request)["data"]


def test_a_disk_without_a_byte_left_leaves_nothing_half_started(server: Server) -> None:
    """Not even the name of who is being started can be written; and then it can."""
    core = server.pids()["core"]
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 0)
        wire.ended(ended)
        resource.prlimit(core, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        wire.refused("unavailable", "spawn_request", config=TRUE)
        wire.cannot("unavailable", ended, "restart")
        assert wire.status(ended) == "completed" and wire.ok("health_check_request")["active_agents"] == 0
        resource.prlimit(core, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert wire.control(ended, "restart")["attempt"] == 2, "what was refused has changed nothing"
        assert wire.exit(ended)["code"] == 0


def test_a_writer_from_outside_does_not_stop_the_core(server: Server) -> None:
    with LineWire(server.socket_path) as wire, locked(server):
        wire.send(json.dumps({"type": "spawn_request", "request_id": "x", "config": TRUE}).encode())
        assert answered_within(server, 1.0)


def test_a_locked_registry_is_not_put_aside(start_server: Callable[..., Server]) -> None:
    """Nothing is wrong with it; to begin a new one would lose the history."""
    server = start_server()
    server.close()
    db = sqlite3.connect(str(server.state_dir / "registry.db"), isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("CREATE TABLE stranger (x)")
    try:
        code, _, error = serve("--state-dir", str(server.state_dir), "--endpoint", "tcp://127.0.0.1:0",
                               "--pub-endpoint", "none", until_ready=True)
    finally:
        db.execute("ROLLBACK")
        db.close()
    assert not list(server.state_dir.glob("*unreadable*"))
    assert code == 1 and "registry" in error and len(error.strip().splitlines()) == 1, (code, error)


def test_a_damaged_page(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        for _ in range(20):
            wire.ended(wire.ok("spawn_request", config=TRUE, metadata={"ballast": "x" * 10_000})["agent_info"]["id"])
    server.close()
    path = server.state_dir / "registry.db"
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'agents'").fetchone()[0]
        size = db.execute("PRAGMA page_size").fetchone()[0]
    with open(path, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        wire.ended(wire.spawn("exit_with", 0))
    assert list(server.state_dir.glob("*unreadable*")) and "could not be read" in again.logs()


@pytest.mark.parametrize("key, value", [("status", "hibernating"), ("created_at", "x"), ("labels", None),
                                        ("finished_at", "x"), ("", None), ("", b"\xff\xfe"), ("", "{}")])
def test_one_odd_record(start_server: Callable[..., Server], key: str, value: Any) -> None:
    """Written by another version, or damaged: it is put aside, and the rest is served."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        odd, good = wire.spawn("exit_with", 0), wire.spawn("exit_with", 0)
        wire.ended(odd), wire.ended(good)
    server.close()
    with contextlib.closing(sqlite3.connect(str(server.state_dir / "registry.db"))) as db, db:
        record = json.loads(db.execute("SELECT record FROM agents WHERE id = ?", (odd,)).fetchone()[0])
        stored = json.dumps({**record, key: value}) if key else value
        db.execute("UPDATE agents SET record = CAST(? AS TEXT) WHERE id = ?", (stored, odd))
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert [a["id"] for a in wire.agents(all=True)] == [good]
        assert wire.agents(all=True, labels={"a": "b"}) == []
    assert odd in again.logs() and "put aside" in again.logs()


# ---------------------------------------------------------------- files, descriptors, programs

def test_files_of_an_agent_that_cannot_be_written(start_server: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "a.ini").write_text("[backend mine]\nargv = /bin/sh -c true\nfile.PROMPT = {system_prompt}\n")
    server = start_server("--config", str(tmp_path / "a.ini"))
    config = {"model_backend": "mine", "system_prompt": "x"}
    agents = server.state_dir / "agents"
    with LineWire(server.socket_path) as wire:
        each = wire.ok("spawn_request", config=config)["agent_info"]["id"]
        wire.ended(each)
        agents.rename(tmp_path / "away")
        agents.write_text("in the way")
        try:
            wire.refused("spawn_failed", "spawn_request", config=config)
            wire.cannot("spawn_failed", each, "restart")
            assert wire.exit(each)["reason"] == "not_started"
            assert wire.control(each, "inspect")["attempts"][1]["started_at"] is None
            assert wire.ok("health_check_request")["active_agents"] == 0
        finally:
            agents.unlink()
    server.close()
    with contextlib.closing(sqlite3.connect(str(server.state_dir / "registry.db"))) as db:
        assert db.execute("SELECT id FROM agents").fetchall() == [(each,)], "the spawn that failed left nothing"


def test_an_argument_that_the_locale_could_not_express(start_server: Callable[..., Server]) -> None:
    server = start_server(environ={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    with LineWire(server.socket_path) as wire:
        agent = wire.ok("spawn_request", config={"command": ["/bin/echo", "\u6f22"]})["agent_info"]["id"]
        assert wire.output(agent) == "\u6f22\n".encode()


def test_output_while_there_is_no_descriptor_left(start_server: Callable[..., Server]) -> None:
    server = start_server("--output-cap-bytes", "65536")
    core = server.pids()["core"]
    flood = ("printf x; read a; read a; i=0; while [ $i -lt 50 ]; do printf '" + "\u00e9" * 200
             + "'; i=$((i+1)); done; echo; read b")
    with LineWire(server.socket_path) as wire:
        each = wire.ok("spawn_request", config={"command": ["/bin/sh", "-c", flood]})["agent_info"]["id"]
        wire.subscribe(each)
        wire.until_output(each, b"x")
        wire.control(each, "write_stdin", data="opens the file in which it waits\n")
        used = set(map(int, os.listdir(f"/proc/{core}/fd")))
        soft, hard = resource.prlimit(core, resource.RLIMIT_NOFILE)
        resource.prlimit(core, resource.RLIMIT_NOFILE, (min(set(range(10_000)) - used), hard))
        wire.control(each, "write_stdin", data="go\n")
        wait_until(lambda: wire.agents()[0]["output"]["stdout"]["end_offset"] == 20_002, what="the flood to be taken")
        resource.prlimit(core, resource.RLIMIT_NOFILE, (soft, hard))
    assert server.pids()["core"] == core


def test_connections_leave_the_agents_their_descriptors(start_server: Callable[..., Server]) -> None:
    """Without one the core could neither start an agent nor see what is left of another's tree."""
    limited = ["/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh", sys.executable, str(MAIN)]
    server = start_server("--max-agents", "10", program=limited)
    with LineWire(server.socket_path) as wire, contextlib.ExitStack() as crowd:
        daemoniser = wire.spawn("daemoniser", "wait", "keep")

        def connected() -> Any:
            with contextlib.suppress(BlockingIOError):  # too many wait to be accepted
                return server.connect()
        for _ in range(200):
            crowd.enter_context(wait_until(connected))
        assert len(os.listdir(f"/proc/{wire.ok('health_check_request')['metadata']['core_pid']}/fd")) < 190
        for _ in range(9):
            wire.spawn("sleeper")
        wire.control(daemoniser, "kill")
        assert len(wire.exit(daemoniser)["leaked"]) == 1


def test_a_keeper_outlives_a_python_that_is_being_replaced(start_server: Callable[..., Server], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    server = start_server(program=[str(python), str(MAIN)])
    core = server.pids()["core"]
    python.rename(tmp_path / "away")
    os.kill(core, signal.SIGKILL)
    wait_until(lambda: "cannot be started" in server.logs(), what="the keeper to say so")
    assert server.process.poll() is None
    (tmp_path / "away").rename(python)

    def back() -> bool:
        with contextlib.suppress(OSError, ValueError):
            return server.pids()["core"] != core
        return False
    wait_until(back, what="a new core")


def test_the_counters_have_their_place_on_the_disk_from_the_start(tmp_path: Path) -> None:
    """A hole in a mapped file is a SIGBUS when the disk is full."""
    Counters(str(tmp_path / "counters"), 0.0).close()
    assert (tmp_path / "counters").stat().st_blocks > 0
