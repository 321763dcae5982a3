"""A new keeper and the core that it finds: one that stands still, and what a person can do meanwhile.

Owns:    a stopped core, and the signals that end `serve` while it waits for it.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of what a keeper does with a core that answers (test_survival.py).
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
from support import DEADLINE_SECS, MAIN, Server, clean_environ, wait_until
from wire import LineWire, process_state

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")


@pytest.fixture
def orphan(start_server: Callable[..., Server]) -> Iterator[tuple[Server, str, int]]:
    """A server whose keeper was killed and whose core is stopped, its agent, and its core."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
    core = server.pids()["core"]
    os.kill(core, signal.SIGSTOP)
    server.process.kill()
    server.process.wait(DEADLINE_SECS)
    server.process.stdout.close()  # type: ignore[union-attr]
    wait_until(lambda: process_state(core) == "T", what="the core to stand still")
    yield server, each, core


def serve_again(state_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(MAIN), "serve", "--state-dir", str(state_dir), "--endpoint",
                             "tcp://127.0.0.1:0", "--pub-endpoint", "tcp://127.0.0.1:0"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(state_dir))


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGINT], ids=["in time", "SIGTERM", "SIGINT"])
def test_a_core_that_stands_still(orphan: tuple[Server, str, int], number: signal.Signals | None,
                                  start_server: Callable[..., Server]) -> None:
    """`serve` names it and gives up, at once if it is told to; and all is as it was when the core goes on."""
    server, each, core = orphan
    waiting = serve_again(server.state_dir)
    if number is not None:
        listening = f"/proc/{waiting.pid}/fd"
        wait_until(lambda: process_state(waiting.pid) == "S" and len(os.listdir(listening)) > 6, what="it to wait")
        waiting.send_signal(number)
    out, error = waiting.communicate(timeout=DEADLINE_SECS)
    assert waiting.returncode == 1 and out == "" and len(error.splitlines()) == 1, (out, error)
    assert str(server.state_dir) in error
    assert ("signal" in error) if number else (f"process {core}" in error and "kill -CONT" in error)
    os.kill(core, signal.SIGCONT)
    heir = start_server(state_dir=server.state_dir)
    assert heir.pids()["core"] == core
    with LineWire(heir.socket_path) as wire:
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n"
