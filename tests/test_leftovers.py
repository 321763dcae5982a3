"""No core comes back, and the server is told to end: its agents end all the same, and are named.

Owns:    broken code and a registry that no core here understands, with agents that resist.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of how a core ends agents (test_shutdown.py).
"""
from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import DEADLINE_SECS, Server, assert_nothing_left, short_dir, wait_until
from test_reload import copied
from test_tree import grown
from wire import LineWire, alive

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")


def broken_code(package: Path, server: Server) -> None:
    (package / "core" / "service.py").write_text("raise RuntimeError('broken')\n")


def newer_registry(package: Path, server: Server) -> None:
    with contextlib.closing(sqlite3.connect(server.state_dir / "registry.db")) as db:
        db.execute("PRAGMA user_version = 1000000")
        db.execute("INSERT OR REPLACE INTO meta VALUES ('schema', '1000000')")
        db.commit()


@pytest.mark.parametrize("broken", [broken_code, newer_registry])
@pytest.mark.parametrize("hurry", [False, True], ids=["", "hurried"])
def test_no_core_comes_back(broken: Callable[[Path, Server], None], hurry: bool, start_server: Callable[..., Server],
                            run_dir: Path) -> None:
    package = copied(short_dir(run_dir))
    server = start_server("--grace-secs", "1000" if hurry else "1", "--shutdown-timeout-secs", "1000",
                          program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    with LineWire(server.socket_path) as wire:
        agents = [wire.spawn("sleeper"), wire.spawn("stubborn"), wire.spawn("echo")]
        wire.control(agents[0], "pause")
        tree, pids = grown(wire, 2, 2)
        leaders = [wire.info(each)["pid"] for each in (*agents, tree)]
    broken(package, server)
    os.kill(server.pids()["core"], signal.SIGKILL)
    wait_until(lambda: "starting it again" in server.logs(), what="the keeper to see it")
    assert all(map(alive, (*leaders, *pids)))
    server.process.send_signal(signal.SIGTERM)
    if hurry:
        wait_until(lambda: not alive(leaders[2]) and alive(leaders[1]), what="the first rung of the ladder")
        server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(DEADLINE_SECS) == 1
    assert_nothing_left(server.mark)
    said = server.errors.read_text()
    assert all(f"process {pid} (" in said for pid in leaders) and all(each in said for each in agents)
    assert "could not be ended" not in said and "Traceback" not in said.partition("--- core.log")[0]
    server.process.stdout.close()  # type: ignore[union-attr]
