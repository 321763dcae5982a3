"""Keeper, core and shell show their memory to nobody but root, and leave no core dump; agents are as they ever were.

Owns:    a server that runs as an ordinary user, to whom that makes a difference: all that reads /proc still works.
Runs in: the test process, as root, where there is a Python that an ordinary user may start; else it is skipped.
Unaware: of what the parts keep in their memory.
"""
from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterator

import pytest
import zmq
from support import MAIN, Server, scratch, wait_until
from test_faults import back
from wire import LineWire, alive

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and prctl(2)")
NOBODY = 65534

PLACES = os.pathsep.join([str(MAIN.parent.parent), str(Path(zmq.__file__).resolve().parent.parent)])


def as_nobody(*argv: str) -> list[str]:
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *argv]


def python_for_nobody() -> str:
    """Return a Python that an ordinary user may start; skip the test where there is none, or we are not root."""
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin") or ""):
        code = ("import os, sys, ctypes, sqlite3, zmq, agentserver.__main__; "
                "sys.exit(sys.version_info < (3, 9) or not os.access(sys.executable, os.X_OK))")
        if python and os.getuid() == 0 and shutil.which("setpriv") and subprocess.run(
                as_nobody(python, "-c", code), capture_output=True, cwd="/",
                env={"PYTHONPATH": PLACES}).returncode == 0:
            return python
    pytest.skip("this needs root, setpriv, and a Python that an ordinary user may start, with pyzmq and this checkout")


@pytest.fixture
def ordinary() -> Iterator[Server]:
    """A server of an ordinary user."""
    python = python_for_nobody()
    home = Path(tempfile.mkdtemp(prefix="as-", dir="/tmp"))
    home.chmod(0o755)
    state_dir = home / "state"
    for path in (state_dir, scratch(state_dir)):
        path.mkdir(exist_ok=True)
        os.chown(path, NOBODY, NOBODY)
    server = Server(state_dir, program=as_nobody(python, str(MAIN)), cwd=home,
                    environ={"PYTHONPATH": PLACES, "HOME": str(home), "AGENTSERVER_PASS_ENVIRONMENT": "TEST_RUN_MARK"})
    try:
        yield server
        server.close_if_running()
    finally:
        server.abandon()
        shutil.rmtree(home, ignore_errors=True)


def owner(pid: int) -> int:
    """Whose the environment of a process is in /proc: root's, where the process is not dumpable."""
    return os.stat(f"/proc/{pid}/environ").st_uid


def test_an_ordinary_users_server_is_shielded_and_works(ordinary: Server) -> None:
    with LineWire(ordinary.socket_path) as wire:
        script = "(setsid sleep 1000 &); (env -i setsid sleep 1000 &); echo ready; read x; echo $x; sleep 1000"
        config = {"command": ["/bin/sh", "-c", script], "stdin": "pipe"}
        ref = wire.ok("spawn_request", config=config)["agent_info"]["id"]
        wire.until_output(ref, b"ready\n")
        parts = ordinary.pids()
        agent = wire.info(ref)["pid"]
        assert {owner(pid) for pid in parts.values()} == {0} and owner(agent) == NOBODY

        def tree() -> list[int]:
            return [agent, *(each["pid"] for each in wire.control(ref, "inspect")["tree"])]
        wait_until(lambda: len(tree()) == 3, what="the agent's descendants")
        before_death = set(tree())
        used = wait_until(lambda: _counted(wire, len(parts)), what="each to have told what it has open")
        assert all(each["rss_bytes"] > 1_000_000 and each["cpu_secs"] >= 0 for each in used)
    os.kill(parts["core"], signal.SIGKILL)
    back(ordinary, "core", parts["core"])
    with LineWire(ordinary.socket_path) as wire:
        wire.control(ref, "write_stdin", data="on\n")
        wire.until_output(ref, b"ready\non\n")
        pids = [agent, *(each["pid"] for each in wire.control(ref, "inspect")["tree"])]
        assert before_death <= set(pids), "descendants are found by the core that took over"
        assert {owner(pid) for pid in ordinary.pids().values()} == {0}
        wire.control(ref, "stop", grace_secs=1)
        wire.ended(ref)
        assert not any(map(alive, pids))
        before = ordinary.pids()["core"]
        wire.ok("reload_request")
    back(ordinary, "core", before)
    wait_until(lambda: len(ordinary.pids()) == len(parts), what="the parts after a reload")


def _counted(wire: LineWire, parts: int) -> list[dict[str, float]]:
    stats = wire.ok("stats_request")["stats"]
    used = [stats[part] for part in ("keeper", "core", "shell") if stats[part]]
    return used if len(used) == parts and all(each["fds"] > 2 for each in used) else []


def test_a_keeper_of_an_ordinary_user_can_be_followed(ordinary: Server) -> None:
    """The next one knows the core by its socket and lock, and holds the leaders by pidfd, not by what /proc shows."""
    with LineWire(ordinary.socket_path) as wire:
        ref = wire.ok("spawn_request", config={"command": ["/bin/sleep", "1000"]})["agent_info"]["id"]
        pid = wire.info(ref)["pid"]
    parts = ordinary.pids()
    os.kill(parts["keeper"], signal.SIGKILL)
    ordinary.process.wait()
    python = python_for_nobody()
    again = subprocess.Popen(as_nobody(python, str(MAIN), "serve", "--state-dir", str(ordinary.state_dir)),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                             env={"PATH": os.environ["PATH"], "TEST_RUN_MARK": ordinary.mark})
    try:
        wait_until(lambda: ordinary.pids()["keeper"] == again.pid, what="the keeper that follows")
        with LineWire(ordinary.socket_path) as wire:
            assert wire.info(ref)["pid"] == pid
            wire.control(ref, "kill")
            assert wire.exit(ref)["signal"] == "SIGKILL"
    finally:
        again.terminate()
        assert again.wait(40) == 0


def test_no_core_dumps_of_ours_and_agents_may_have_theirs(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = wire.ok("spawn_request", config={"command": ["/bin/sh", "-c", "ulimit -S -c"]})["agent_info"]["id"]
        wire.ended(ref)
        soft = resource.getrlimit(resource.RLIMIT_CORE)[0]
        want = b"unlimited" if soft == resource.RLIM_INFINITY else b"%d" % (soft // 512)
        assert wire.output(ref).strip() == want
        before = server.pids()
        for pid in before.values():
            assert resource.prlimit(pid, resource.RLIMIT_CORE)[0] == 0
        wire.ok("reload_request")
    back(server, "core", before["core"])
    with LineWire(server.socket_path) as wire:
        ref = wire.ok("spawn_request", config={"command": ["/bin/sh", "-c", "ulimit -S -c"]})["agent_info"]["id"]
        wire.ended(ref)
        assert wire.output(ref).strip() == want
