"""What is hard to end: processes without a main thread, daemons without a trace, those that we may not signal.

Owns:    that each of them is ended with its agent and named, or named as what could not be ended.
Runs in: the test process; servers and agents are real. Some need root.
Unaware: of how descendants are found.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
from support import MAIN, Server, wait_until
from wire import LineWire, alive, here, process_state

from agentserver.core import inherited, process, tree

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


def gone(pid: int) -> None:
    """Wait until nothing of a process runs."""
    wait_until(lambda: not alive(pid), what=f"{pid} to be gone")


# ---------------------------------------------------------------- without a main thread

@pytest.mark.parametrize("kind", ["child", "daemon"])
@pytest.mark.parametrize("end", ["exit", "stop", "kill"])
def test_a_process_without_its_main_thread_is_ended_and_named(unix: LineWire, kind: str, end: str) -> None:
    agent = unix.spawn("headless", kind, *(["exit"] if end == "exit" else []), grace_secs=0.3)
    pid = int(unix.lines(agent, 2)[1])
    if end != "exit":
        assert alive(pid) and process_state(pid) == "Z"
        unix.control(agent, end)
    record = unix.exit(agent)
    assert not alive(pid)
    if end != "stop":  # SIGTERM ends it in time, perhaps
        assert [one["pid"] for one in record["leaked"]] == [pid] and "headless" in record["leaked"][0]["command"]


def test_an_agent_without_its_main_thread_runs(unix: LineWire) -> None:
    agent = unix.spawn("headless", "leader")
    pid = int(unix.lines(agent, 2)[1])
    wait_until(lambda: process_state(pid) == "Z")
    proc = tree.look(pid)
    assert proc is not None and proc.lives and proc.state == "S" and tree.mark_of(pid) == agent
    assert "headless" in tree.command_of(pid)
    unix.control(agent, "pause")
    wait_until(lambda: (now := tree.look(pid)) is not None and now.state == "T")
    unix.control(agent, "resume")
    wait_until(lambda: (now := tree.look(pid)) is not None and now.state == "S")
    assert unix.status(agent) == "running"
    unix.control(agent, "stop")
    gone(pid)
    assert unix.exit(agent)["reason"] == "stop"


def test_a_zombie_is_dead() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        wait_until(lambda: process_state(child) == "Z")
        proc = tree.look(child)
        assert proc is not None and not proc.lives and proc.state == "Z"
    finally:
        os.waitpid(child, 0)


# ---------------------------------------------------------------- daemons without a trace

DAEMON = """import os, sys, time
if os.fork():
    while not os.path.exists(sys.argv[1]): time.sleep(0.01)
    {after}
os.setsid()
if os.fork(): os._exit(0)
open(sys.argv[1] + '.new', 'w').write(str(os.getpid()))
os.rename(sys.argv[1] + '.new', sys.argv[1])
os.closerange(0, 64)
os.execve('/bin/sleep', ['sleep', '1000'], {{}})"""


def daemon_of(wire: LineWire, note: Path, after: str) -> tuple[str, int]:
    """Spawn an agent that leaves a daemon without environment, descriptors and session of its own; return both."""
    command = [sys.executable, "-c", DAEMON.format(after=after), str(note)]
    agent = wire.ok("spawn_request", config={"command": command})["agent_info"]["id"]
    wait_until(note.exists)
    pid = int(note.read_text())
    wait_until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"))
    return agent, pid


@pytest.fixture
def tagging() -> None:
    """Only where tags work."""
    if not inherited.tags_work():
        pytest.skip("RLIMIT_RTTIME cannot be set freely here")


@pytest.mark.usefixtures("tagging")
def test_a_daemon_without_a_trace_ends_with_its_agent_though_an_older_one_lives(
        start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        older, other = wire.spawn("sleeper"), daemon_of(wire, tmp_path / "other", "time.sleep(1000)")
        agent, daemon = daemon_of(wire, tmp_path / "pid", "os._exit(3)")
        record = wire.exit(agent)
        assert record["code"] == 3 and not alive(daemon)
        assert [one["pid"] for one in record["leaked"]] == [daemon] and record["survivors"] == []
        assert wire.status(older) == wire.status(other[0]) == "running" and alive(other[1])


@pytest.mark.usefixtures("tagging")
def test_a_new_core_knows_the_tags_of_the_one_before(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        wire.spawn("sleeper")
        agent, daemon = daemon_of(wire, tmp_path / "pid", "time.sleep(1000)")
        core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    wait_until(lambda: _core_of(server) not in (0, core))
    with LineWire(server.socket_path) as wire:
        wire.control(agent, "kill")
        assert [one["pid"] for one in wire.exit(agent)["leaked"]] == [daemon] and not alive(daemon)


@pytest.mark.usefixtures("tagging")
def test_a_daemon_without_a_trace_is_found_when_all_of_the_server_died(start_server: Callable[..., Server],
                                                                       tmp_path: Path) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        agent, daemon = daemon_of(wire, tmp_path / "pid", "time.sleep(1000)")
        parts = server.pids()
    for part in ("keeper", "core", "shell"):
        os.kill(parts[part], signal.SIGSTOP)  # so that none of them sees another one's end
    for part in ("keeper", "core", "shell"):
        os.kill(parts[part], signal.SIGKILL)
    server.process.wait()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        record = wire.exit(agent)
        assert record["reason"] == "lost" and not alive(daemon)
        assert daemon in [one["pid"] for one in record["leaked"]]


def _core_of(server: Server) -> int:
    try:
        return server.pids()["core"]
    except OSError:
        return 0


@pytest.mark.usefixtures("tagging")
def test_each_start_has_a_tag_of_its_own_and_leaves_none_in_the_core(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        pids = [wire.info(wire.spawn("sleeper"))["pid"] for _ in range(3)]
        tags = {tree.tag_of(pid) for pid in pids}
        assert len(tags) == 3 and min(tags) >= inherited.LEAST_TAG
        assert tree.tag_of(server.pids()["core"]) == 0


def test_limits_and_umask_are_put_back() -> None:
    code = ("import os, resource, sys; from agentserver.core.inherited import *\n"
            "before = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0o077)\n"
            "with around_start(Inherited(64, 0o027, new_tag())):\n"
            "    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64 and os.umask(0o027) == 0o027\n"
            "    try:\n"
            "        with around_start(Inherited(32, 0)): raise KeyError\n"
            "    except KeyError: assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64\n"
            "assert (resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0)) == (before[0], 0o077)\n"
            "print(tag_in(open('/proc/self/limits', 'rb').read()))")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(MAIN.parent.parent)},
                          capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_what_a_limit_says_is_a_tag_only_if_we_can_have_given_it() -> None:
    def line(value: str) -> bytes:
        return f"Max cpu time  unlimited\nMax realtime timeout      {value}    unlimited    us\n".encode()
    assert inherited.tag_in(line("unlimited")) == inherited.tag_in(line("200000")) == inherited.tag_in(b"") == 0
    assert inherited.tag_in(line(str(inherited.LEAST_TAG + 7))) == inherited.LEAST_TAG + 7


# ---------------------------------------------------------------- what we may not signal

@pytest.fixture
def powerless(start_server: Callable[..., Server]) -> Iterator[LineWire]:
    """A server that may not signal other users' processes, as those of all users but root may not."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("only root can start what it then may not signal")
    server = start_server(program=[sys.executable, here("without_kill.py"), sys.executable, str(MAIN)])
    with LineWire(server.socket_path) as wire:
        yield wire


def test_a_signal_that_is_not_permitted_was_not_sent(powerless: LineWire) -> None:
    agent = powerless.spawn("other_user", "leader", name="other")
    pid = int(powerless.lines(agent, 2)[1])
    try:
        for command, payload in (("signal", {"signal": "USR1"}), ("signal", {"signal": "STOP"}), ("pause", {})):
            assert "not permitted" in powerless.cannot("not_permitted", agent, command, **payload)
        assert powerless.status(agent) == "running", "the status is what is"
        assert powerless.control(agent, "kill")["not_permitted"] == [pid]
        info = powerless.info(agent)
        assert info["status"] == "running" and info["want"] == "down" and alive(pid)
        assert [(one["pid"], one["signal"]) for one in info["not_permitted"]] == [(pid, "SIGKILL")]
        told = [event for event in powerless.ok("events_request", agent_id=agent, since=0, limit=100)["events"]
                if event["data"].get("not_permitted")]
        assert len(told) == 1 and "not permitted" in told[0]["message"]
    finally:
        os.kill(pid, signal.SIGKILL)
    record = powerless.exit(agent)
    assert record["reason"] == "kill" and record["signal"] == "SIGKILL" and record["survivors"] == []
    assert powerless.info(agent)["not_permitted"] == []


def test_what_outlives_its_agent_is_named_apart_from_what_was_ended(powerless: LineWire) -> None:
    older = powerless.spawn("sleeper")
    agent = powerless.spawn("other_user", "child")
    pid = int(powerless.lines(agent, 2)[1])
    try:
        assert powerless.control(agent, "signal", signal="WINCH")["not_permitted"] == [pid]
        powerless.control(agent, "stop", grace_secs=30)
        record = powerless.exit(agent)
        assert record["leaked"] == [] and alive(pid)
        assert [(one["pid"], one["why"]) for one in record["survivors"]] == [(pid, "not_permitted")]
        assert "other_user" in record["survivors"][0]["command"]
        powerless.control(older, "kill")
        assert powerless.exit(older)["survivors"] == [], "it is none of another agent's business"
    finally:
        os.kill(pid, signal.SIGKILL)


def test_what_could_not_be_ended_at_a_start_is_returned() -> None:
    one = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(1000)"],
                           stdout=subprocess.PIPE)
    with one:
        assert one.stdout is not None and one.stdout.readline()
        proc = tree.look(one.pid)
        assert proc is not None and tree.living([proc]) == [proc]
        assert tree.end([proc]) == []
        assert tree.send(proc._replace(start=0), signal.SIGKILL) == tree.MISSING
        assert process.reap_within(one.pid, 10) == -signal.SIGKILL or one.wait()


