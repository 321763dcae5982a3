"""How a server starts, and what it says when it cannot: one sentence, exit code 1, nothing left behind.

Owns:    ports, state directories, descriptor limits, addresses, settings from every source; `AgentServer` in a program.
Runs in: the test process; servers are real.
Unaware: of each setting's parsing (test_config.py).
"""
from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from support import MAIN, ROOT, Server, clean_environ, marked_processes, serve, short_dir, wait_until
from wire import LineWire, ZmqWire

from agentserver.config import ServerConfig
from agentserver.core import tree
from agentserver.core.facts import Facts

PORTS = ("--endpoint", "tcp://127.0.0.1:0", "--pub-endpoint", "tcp://127.0.0.1:0")


def refused(state_dir: Path, *flags: str, code: tuple[int, ...] = (1,), **options: object) -> str:
    """Run a `serve` that must not start; return its one sentence."""
    got, out, error = serve("--state-dir", str(state_dir), *flags, **options)  # type: ignore[arg-type]
    assert got in code, (got, out, error)
    assert out == "" and len(error.strip().splitlines()) == 1 and "Traceback" not in error, (out, error)
    return error


def nothing_left(state_dir: Path) -> None:
    """The directory can be served by the next one: no socket, no lock is in the way."""
    assert not list(state_dir.glob("*.sock")) if state_dir.is_dir() else True


@pytest.mark.parametrize("which", ["--endpoint", "--pub-endpoint"])
def test_a_port_in_use(state_dir: Path, which: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        ports = dict(zip(PORTS[::2], PORTS[1::2]))
        ports[which] = address
        error = refused(state_dir, *[item for pair in ports.items() for item in pair])
        assert address in error
    nothing_left(state_dir)


def test_a_port_of_another_server(server: Server, state_dir: Path) -> None:
    error = refused(state_dir, "--endpoint", server.endpoint, *PORTS[2:])
    assert server.endpoint in error
    assert server.ask({"type": "health_check_request"})["healthy"]


def test_a_state_directory_that_is_served(server: Server) -> None:
    before = server.pids()
    error = refused(server.state_dir, *PORTS)
    assert str(server.state_dir) in error
    assert server.pids() == before and server.socket_path.exists(), "the one that serves it is untouched"
    with LineWire(server.socket_path) as wire:
        assert wire.ok("health_check_request")["healthy"]


def test_directories_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below", Path("/proc/agentserver-state"), Path("/dev/null/x")):
        assert str(path) in refused(path, *PORTS)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_directory_of_another_user(tmp_path: Path) -> None:
    """As nobody: no permission to write."""
    closed = short_dir()
    try:
        code = "import os,sys; os.setgid(65534); os.setuid(65534); os.execv(sys.argv[1], sys.argv[1:])"
        python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
        visible = subprocess.run([sys.executable, "-c", code, sys.executable, "-c", f"open({str(MAIN)!r})"],
                                 stderr=subprocess.DEVNULL).returncode == 0
        if not visible or not python:
            pytest.skip("another user cannot read this checkout or this Python")
        error = refused(closed, *PORTS, program=[sys.executable, "-c", code, sys.executable, str(MAIN)])
        assert str(closed) in error
    finally:
        closed.rmdir()


def test_more_agents_than_descriptors(state_dir: Path) -> None:
    limited = ["/bin/sh", "-c", 'ulimit -n 300; exec "$@"', "sh", sys.executable, str(MAIN)]
    error = refused(state_dir, *PORTS, "--max-agents", "200", program=limited)
    assert "max_agents" in error and "200" in error
    nothing_left(state_dir)
    code, out, error = serve("--state-dir", str(state_dir), *PORTS, "--max-agents", "10", program=limited,
                             until_ready=True)
    assert code == 0, (out, error)


def test_the_soft_limit_is_raised(start_server: Callable[..., Server]) -> None:
    server = start_server("--max-agents", "200",
                          program=["/bin/sh", "-c", 'ulimit -Sn 100; exec "$@"', "sh", sys.executable, str(MAIN)])
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("", command=["/bin/sleep", "1000"], ready=False) for _ in range(60)]
        assert len(wire.agents()) == len(ids)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.1:5555", "tcp://[::]:0",
                                     "tcp://example.org:5555", "tcp://127.0.0.1.example.org:0", "inproc://x", "pgm://x",
                                     "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "nonsense", "tcp://eth0:5555"])
@pytest.mark.parametrize("which", ["--endpoint", "--pub-endpoint"])
def test_addresses_that_are_refused(state_dir: Path, address: str, which: str) -> None:
    ports = {**dict(zip(PORTS[::2], PORTS[1::2])), which: address}
    error = refused(state_dir, *[item for pair in ports.items() for item in pair], code=(1, 2))
    assert (address if "://" not in address else address.partition("://")[2].rpartition(":")[0]) in error
    if "0.0.0.0" in address or "192" in address:
        assert "key" in error and "loopback" in error, "says why"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://127.9.8.7:0", "tcp://localhost:0"])
def test_port_zero_reports_the_real_port_everywhere(start_server: Callable[..., Server], address: str) -> None:
    server = start_server(endpoint=address, pub_endpoint=address)
    metadata = server.metadata
    for name in ("endpoint", "pub_endpoint"):
        assert int(metadata[name].rpartition(":")[2]) > 0 and metadata[name] in server.ready
    with ZmqWire(metadata["endpoint"]) as wire:
        assert wire.ok("health_check_request")["metadata"]["endpoint"] == metadata["endpoint"]
        sleeper = wire.spawn("sleeper")
        assert wire.control(sleeper, "stream_logs")["pub_endpoint"] == metadata["pub_endpoint"]


def test_ipc_endpoints(start_server: Callable[..., Server], state_dir: Path) -> None:
    """Only the owner can reach them, and they are gone with the server."""
    ends = [state_dir.with_name(state_dir.name + suffix) for suffix in (".req", ".pub")]
    server = start_server(state_dir=state_dir, endpoint=f"ipc://{ends[0]}", pub_endpoint=f"ipc://{ends[1]}")
    assert server.endpoint == f"ipc://{ends[0]}"
    assert all(end.stat().st_mode & 0o077 == 0 for end in ends)
    with ZmqWire(server.endpoint) as wire:
        assert wire.ok("health_check_request")["healthy"]
    server.close()
    assert not any(end.exists() for end in ends)


def test_without_publishing(start_server: Callable[..., Server]) -> None:
    server = start_server(pub_endpoint="none")
    with LineWire(server.socket_path) as wire:
        data = wire.control(wire.spawn("sleeper"), "stream_logs")
        assert data["enabled"] is False and not data["pub_endpoint"]


def test_a_state_directory_with_a_long_path(start_server: Callable[..., Server], run_dir: Path) -> None:
    """107 bytes is all a socket's name may have; directories may be longer."""
    long = short_dir(run_dir) / ("x" * 100) / ("y" * 100)
    long.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, str(MAIN), "serve", "--state-dir", str(long), *PORTS],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(long.parent))
    try:
        assert process.stdout is not None and process.stdout.readline()
        from agentserver import AgentClient
        with AgentClient(f"unix:{long}") as client:
            assert client.health().healthy
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_settings_come_from_file_environment_and_flags(start_server: Callable[..., Server], tmp_path: Path) -> None:
    config = tmp_path / "server.ini"
    config.write_text("[server]\nmax_agents = 11\nserver_id = from-file\ngrace_secs = 3\n")
    server = start_server("--config", str(config),
                          environ={"AGENTSERVER_MAX_AGENTS": "12", "AGENTSERVER_SERVER_ID": "from-env"})
    assert (server.metadata["max_agents"], server.metadata["server_id"]) == ("12", "from-env")
    server.close()
    server = start_server("--config", str(config), "--max-agents", "13", environ={"AGENTSERVER_MAX_AGENTS": "12"})
    assert (server.metadata["max_agents"], server.metadata["server_id"]) == ("13", "from-file")


@pytest.mark.parametrize("text, words", [
    ("[server]\nmax_agents = many\n", ["line 2", "max_agents"]),
    ("[server]\n\nmax_agents = 0\n", ["line 3", "max_agents"]),
    ("[server]\nno_such_setting = 1\n", ["line 2", "no_such_setting"]), ("[servr]\n", ["line 1", "servr"]),
    ("max_agents = 5\n", ["line 1"]), ("[server]\nendpoint = tcp://0.0.0.0:1\n", ["line 2", "loopback"]),
    ("[server]\nmax_agents = 5\nmax_agents = 6\n", ["line 3"]), ("[backend x]\nnonsense = 1\n", ["line 2", "nonsense"]),
])
def test_a_wrong_value_names_file_and_line(state_dir: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "wrong.ini"
    config.write_text(text)
    error = refused(state_dir, "--config", str(config), *(() if "endpoint" in text else PORTS), code=(1, 2))
    assert str(config) in error and all(word in error for word in words), error


def test_wrong_flags_and_variables_are_named(state_dir: Path, tmp_path: Path) -> None:
    assert "--max-agents" in refused(state_dir, *PORTS, "--max-agents", "-5", code=(1, 2))
    assert "AGENTSERVER_MAX_AGENTS" in refused(state_dir, *PORTS, environ={"AGENTSERVER_MAX_AGENTS": "x"}, code=(1, 2))
    assert "missing.ini" in refused(state_dir, *PORTS, "--config", str(tmp_path / "missing.ini"), code=(1, 2))


def test_the_second_start_finds_what_a_crash_left(start_server: Callable[..., Server]) -> None:
    """Stale sockets and lock files of dead processes are in nobody's way."""
    server = start_server()
    for pid in server.pids().values():
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    wait_until(lambda: not marked_processes(server.mark))
    assert server.socket_path.exists()
    again = start_server(state_dir=server.state_dir)
    assert again.ask({"type": "health_check_request"})["healthy"]


def test_the_start_is_remembered_whatever_the_clock_is_set_to() -> None:
    """By the time since boot, of this boot; what makes no sense is not believed."""
    started = {"started_at": time.time() - 5, "generation": 1}
    first = Facts(ServerConfig(), started, 1)
    told = first.remember_start("", "boot")
    later = Facts(ServerConfig(), started, 1)
    later._since -= 86400 * tree.TICKS  # as when the clock was set forward by a day in between
    assert later.remember_start(told, "boot") == told and 4 < later.uptime() < 60
    for damaged in (told.replace("boot", "other"), told.rpartition(" ")[0] + " nan", "boot", "", told + "x"):
        again = Facts(ServerConfig(), started, 1)
        again.remember_start(damaged, "boot")
        assert 4 < again.uptime() < 60


def test_a_start_right_after_the_death_of_keeper_and_core(start_server: Callable[..., Server]) -> None:
    """Their shell is still there for some seconds, and holds its lock: the next one waits for it."""
    server = start_server()
    pids = server.pids()
    os.kill(pids["keeper"], signal.SIGKILL)
    server.process.wait()
    os.kill(pids["core"], signal.SIGKILL)
    again = start_server(state_dir=server.state_dir)
    assert again.pids()["shell"] != pids["shell"]
    assert again.ask({"type": "health_check_request"})["healthy"]
    server.process.stdout.close()  # type: ignore[union-attr]


def test_a_registry_of_a_newer_version_is_refused_and_left_alone(start_server: Callable[..., Server]) -> None:
    """Who goes back to an older version by mistake loses nothing: the newer one finds its agents again."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("exit_with", 3)
        wire.ended(ref)
    server.close()
    registry = str(server.state_dir / "registry.db")

    def version(number: int) -> int:
        with contextlib.closing(sqlite3.connect(registry)) as db:
            before = db.execute("PRAGMA user_version").fetchone()[0]
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (str(number),))  # both tell the version
            db.commit()
        return int(before)
    ours = version(1000)
    error = refused(server.state_dir, *PORTS)
    assert registry in error and "newer version" in error and "another state directory" in error
    assert version(ours) == 1000
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.info(ref)["exit"]["code"] == 3


def test_serve_says_where_it_listens(server: Server) -> None:
    assert server.endpoint in server.ready
    assert server.errors.read_text() == ""


def test_serve_without_anybody_to_read_its_output(run_dir: Path) -> None:
    """A closed stdout (a service manager's pipe that went away) is no reason to end."""
    home = short_dir(run_dir)
    read_end, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, str(MAIN), "serve", "--state-dir", str(home), *PORTS], stdout=write_end,
                               stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=clean_environ(home),
                               cwd=str(ROOT))
    os.close(write_end)
    os.close(read_end)
    try:
        wait_until(lambda: (home / "core.sock").exists(), what="the server")
        with LineWire(home / "core.sock") as wire:
            assert wire.ok("health_check_request")["healthy"]
            assert wire.exit(wire.spawn("exit_with", 0))["code"] == 0
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_state_directory_made_at_start_is_the_owners(start_server: Callable[..., Server], state_dir: Path) -> None:
    server = start_server(state_dir=state_dir / "made")
    assert server.state_dir.stat().st_mode & 0o777 == 0o700
    assert server.socket_path.stat().st_mode & 0o177 == 0


# ---------------------------------------------------------------- the Python API

def test_agentserver_as_an_object(run_dir: Path) -> None:
    """`start()` blocks the calling thread; everything else may be asked from any other."""
    from agentserver import AgentServer, ServerConfig
    home = short_dir(run_dir)
    before = set(threading.enumerate())
    server = AgentServer(ServerConfig(state_dir=str(home), endpoint=PORTS[1], pub_endpoint=PORTS[3], max_agents=5))
    assert server.is_running() is False
    thread = threading.Thread(target=server.start)
    thread.start()
    try:
        wait_until(server.is_running, what="the server to run")
        with LineWire(home / "core.sock") as wire:
            wire.spawn("sleeper")
            assert server.active_agent_count() == 1 and server.uptime_secs() > 0
            stats = server.stats()
            assert stats.successful_spawns == 1 and stats.core["pid"] > 1
            endpoint = wire.ok("health_check_request")["metadata"]["endpoint"]
        with ZmqWire(endpoint) as wire:
            assert wire.ok("health_check_request")["metadata"]["max_agents"] == "5"
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive() and server.is_running() is False
    server.stop()  # again, and harmless
    assert set(threading.enumerate()) == before
    assert not (home / "core.sock").exists()


def test_agentserver_that_cannot_start(run_dir: Path, server: Server) -> None:
    from agentserver import AgentServer, ConfigError, ServerConfig, StartError
    with pytest.raises(ConfigError):
        ServerConfig(state_dir=str(run_dir / "never"), max_agents=0)
    with pytest.raises(ConfigError):
        ServerConfig(state_dir=str(run_dir / "never"), endpoint="tcp://0.0.0.0:5555")
    one = AgentServer(ServerConfig(state_dir=str(short_dir(run_dir)), endpoint=server.endpoint, pub_endpoint="none"))
    with pytest.raises(StartError, match="tcp://"):
        one.start()
    assert one.is_running() is False
    assert not marked_processes("never")
