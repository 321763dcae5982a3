"""A cleaner of old files removes what a server has in its state directory, and the server puts it back.

Owns:    `core.sock`, the locks and the core's notes, removed or replaced while the server runs.
Runs in: the test process.
Unaware: of the registry and of agents' files.
"""
from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Callable

import pytest
import zmq
from support import Server, serve, wait_until
from test_faults import published, zmq_answers
from test_survival import by_request, kill_core, reload, successor, told
from wire import LineWire, ZmqWire, alive

PORTS = ("--endpoint", "tcp://127.0.0.1:0", "--pub-endpoint", "tcp://127.0.0.1:0")


def strange_file(path: Path) -> None:
    path.unlink()
    path.write_text("not a socket")


@pytest.mark.parametrize("sweep", [Path.unlink, strange_file], ids=["removed", "replaced"])
def test_the_socket_comes_back(server: Server, sweep: Callable[[Path], None]) -> None:
    with LineWire(server.socket_path) as before:
        each = before.spawn("echo")
        sweep(server.socket_path)
        wait_until(lambda: told(server), what="the socket to be back")
        assert server.socket_path.stat().st_mode & 0o777 == 0o600
        assert before.status(each) == "running", "who was connected stays"
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert wire.status(each) == "running"
    assert zmq_answers(server.endpoint)


def test_the_sockets_of_the_network_come_back(start_server: Callable[..., Server], run_dir: Path) -> None:
    """Those of `ipc://` addresses: for requests and for subscribers. Who was connected stays."""
    files = [run_dir / name for name in ("requests", "events")]
    endpoints = [f"ipc://{path}" for path in files]
    server = start_server(endpoint=endpoints[0], pub_endpoint=endpoints[1])
    with ZmqWire(endpoints[0]) as before:
        for _ in range(2):
            before.ok("health_check_request")
            for path in files:
                path.unlink()
            wait_until(lambda: all(path.exists() for path in files), what="the sockets to be back")
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
            assert zmq_answers(endpoints[0])
            before.ok("health_check_request")
    shell = server.pids()["shell"]
    os.kill(shell, signal.SIGKILL)
    wait_until(lambda: not alive(shell), what="the shell to die")
    with socket.socket(socket.AF_UNIX) as comes_meanwhile:
        comes_meanwhile.connect(str(files[0]))  # the keeper holds what is listened on now
    wait_until(lambda: zmq_answers(endpoints[0]), what="the next shell")
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.connect(endpoints[1])
        sub.subscribe(b"")
        wait_until(lambda: published(server, sub), what="an event to arrive")
    reload(server, by_request)
    assert zmq_answers(endpoints[0])
    server.close()
    assert not any(path.exists() for path in files)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")
def test_locks_and_notes_come_back(start_server: Callable[..., Server]) -> None:
    """Else a second server would take itself for the only one; and reload, shell and the next keeper need them."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
    files = [server.state_dir / name for name in ("spawning", "ends.jsonl")]
    locks = [server.state_dir / f"{part}.lock" for part in ("keeper", "core", "shell")]
    for path in (*locks, *files):
        path.unlink()
    wait_until(lambda: all(path.exists() for path in (*locks, *files)), what="the locks to be back")
    code, _, error = serve("--state-dir", str(server.state_dir), *PORTS)
    assert code == 1 and "already served" in error
    with LineWire(server.socket_path) as wire:
        assert wire.exit(wire.spawn("exit_with", 3))["code"] == 3
    reload(server, by_request)
    heir = successor(start_server, server)
    wait_until(lambda: zmq_answers(heir.endpoint), what="the shell of the next keeper")
    with LineWire(heir.socket_path) as wire:
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n"
    assert os.path.exists(locks[0])
    server.process.stdout.close()  # type: ignore[union-attr]
