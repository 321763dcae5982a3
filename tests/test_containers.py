"""Where containers run us: as pid 1, on a read-only root, without /proc.

Owns:    servers in namespaces of their own (unshare(1)): of pids, and of mounts that are made read-only or hidden.
Runs in: the test process, outside of the namespaces; it sees the processes inside by pids of its own.
Unaware: of any container engine. Where namespaces may not be made, all of this is skipped, and says so.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import AGENTS, MAIN, MARK, Server, wait_until
from wire import LineWire, alive, process_state

UNSHARE = ["unshare"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
INSIDE = [sys.executable, str(MAIN)]
AS_INIT = [*UNSHARE, "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", *INSIDE]


def cannot(*how: str) -> str:
    """Return why namespaces of this kind cannot be made here; empty when they can."""
    if shutil.which("unshare") is None:
        return "unshare(1) is not there: no Linux, or no util-linux"
    done = subprocess.run([*UNSHARE, *how, "true"], capture_output=True, text=True)
    return f"this user may not make namespaces here ({done.stderr.strip()})" if done.returncode else ""


NO_PIDS = cannot("--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
NO_MOUNTS = cannot("--mount", "sh", "-c", "mount -t tmpfs none /proc")
pids = pytest.mark.skipif(bool(NO_PIDS), reason=NO_PIDS)
mounts = pytest.mark.skipif(bool(NO_MOUNTS), reason=NO_MOUNTS)


def after(script: str) -> list[str]:
    """Return what runs the server in a mount namespace of its own, after a script has changed the mounts."""
    return [*UNSHARE, "--mount", "--propagation", "private", "sh", "-ec", f'{script}\nexec "$@"', "sh", *INSIDE]


def children(pid: int) -> list[int]:
    """Return the children of a process, by the pids that count out here."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry))
    return found


def command(pid: int) -> str:
    """Return the command line of a process."""
    try:
        return Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def end(server: Server, keeper: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to a server in a namespace; it has to end well, and everything in the namespace with it."""
    os.kill(keeper, number)
    assert server.process.wait(60) == 0, server.logs()
    wait_until(lambda: not alive(keeper))


def new_core(server: Server, before: int) -> int:
    """Wait for another core than `before`, and return its pid inside."""
    def found() -> int:
        try:
            core = server.pids()["core"]
        except (OSError, ValueError, KeyError):
            return 0
        return core if core != before else 0
    return wait_until(found, what="a new core")


# ---------------------------------------------------------------- pid 1

@pids
def test_as_pid_1(start_server: Callable[..., Server]) -> None:
    """It serves, its core may die, and SIGTERM, which pid 1 gets only if it asked for it, ends everything in order."""
    server = start_server(program=AS_INIT)
    keeper, = children(server.process.pid)
    assert server.pids()["keeper"] == 1
    with LineWire(server.socket_path) as wire:
        assert wire.exit(wire.spawn("exit_with", 5))["code"] == 5
        family, daemon = wire.spawn("tree", 2, 2, "ignore"), wire.spawn("daemoniser", "wait", "keep")
        sleeper = wire.spawn("sleeper")
    core = server.pids()["core"]
    outside, = (pid for pid in children(keeper) if "_core" in command(pid))
    os.kill(outside, signal.SIGKILL)
    new_core(server, core)
    with LineWire(server.socket_path) as wire:
        for each in (family, daemon, sleeper):
            assert wire.status(each) == "running"
        for each in (family, daemon):
            wire.control(each, "kill")
            assert wire.ended(each)["exit"]["signal"] == "SIGKILL"
        wait_until(lambda: not [c for c in map(command, children(keeper)) if "daemoniser" in c or "tree" in c],
                   what="what they left to be ended")
    end(server, keeper)
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.info(sleeper)["exit"]["reason"] == "shutdown"


@pids
def test_pid_1_reaps_strangers_and_lets_them_live(start_server: Callable[..., Server]) -> None:
    """Somebody enters the container and leaves a daemon behind: it is nobody's agent, and it is reaped when it ends."""
    if shutil.which("nsenter") is None:
        pytest.skip("nsenter(1) is not there")
    server = start_server(program=AS_INIT)
    keeper, = children(server.process.pid)
    enter = ["nsenter", *(["--user", "--preserve-credentials"] if os.geteuid() else []), "-t", str(keeper), "-p", "-m"]
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("sleeper")
        core = server.pids()["core"]
        os.kill(next(pid for pid in children(keeper) if "_core" in command(pid)), signal.SIGKILL)
    new_core(server, core)  # from now on pid 1 is the parent of agents, too
    subprocess.run([*enter, sys.executable, "-S", str(AGENTS / "daemoniser.py"), "exit", "clear"],
                   env={MARK: server.mark}, stdout=subprocess.DEVNULL, check=True)

    def strangers() -> list[int]:
        return [pid for pid in children(keeper) if "signal.pause" in command(pid)]
    stranger, = wait_until(strangers, what="the daemon to be a child of pid 1")
    with LineWire(server.socket_path) as wire:
        wire.control(agent, "kill")
        assert wire.ended(agent)["exit"]["leaked"] == []
        assert wire.exit(wire.spawn("exit_with", 0))["leaked"] == []
        assert process_state(stranger) not in ("", "Z")
        os.kill(stranger, signal.SIGKILL)
        wait_until(lambda: process_state(stranger) == "", what="the stranger to be reaped")
    end(server, keeper, signal.SIGINT)


# ---------------------------------------------------------------- a read-only root

@mounts
def test_on_a_read_only_root(start_server: Callable[..., Server], state_dir: Path) -> None:
    """Nothing but the state directory can be written; the server and agents live with that."""
    script = (f"mount --bind {state_dir} {state_dir}; mount -o remount,bind,ro /; "
              f"! touch /x {state_dir.parent}/x 2>/dev/null")
    if cannot("--mount", "--propagation", "private", "sh", "-ec", script):
        pytest.skip("/ cannot be made read-only here: it is no mount of its own, or its mount is locked")
    server = start_server(state_dir=state_dir, program=after(script))
    with LineWire(server.socket_path) as wire:
        talker = wire.spawn("echo", stdin="pipe")
        wire.control(talker, "write_stdin", data="hello\n", eof=True)
        assert wire.output(talker) == b"ready\nhello\n"
        burst = wire.spawn("burst", 2000, 100)
        assert wire.exit(burst)["code"] == 0
        core = server.pids()["core"]
        os.kill(core, signal.SIGKILL)
    new_core(server, core)
    with LineWire(server.socket_path) as wire:
        assert len(wire.agents(all=True)) == 2
        assert wire.exit(wire.spawn("exit_with", 4))["code"] == 4


@mounts
def test_a_state_directory_that_cannot_be_written_is_one_sentence(state_dir: Path) -> None:
    script = f"mount --bind {state_dir} {state_dir}; mount -o remount,bind,ro {state_dir}"
    done = subprocess.run([*after(script), "serve", "--state-dir", str(state_dir)], capture_output=True, text=True)
    assert done.returncode not in (0, -signal.SIGKILL) and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and str(state_dir) in done.stderr, done.stderr


# ---------------------------------------------------------------- without /proc

@mounts
def test_without_proc(start_server: Callable[..., Server]) -> None:
    """Groups are ended instead of trees; the rest is as ever, the death of the core included."""
    server = start_server(program=after("mount -t tmpfs none /proc"))
    with LineWire(server.socket_path) as wire:
        assert wire.exit(wire.spawn("exit_with", 5))["code"] == 5
        ids = [wire.spawn("sleeper"), wire.spawn("tree", 1, 2), wire.spawn("echo", stdin="pipe"),
               wire.spawn("stubborn")]
        processes = [wire.info(each)["pid"] for each in ids] + json.loads(wire.lines(ids[1], 2)[1])
        wire.control(ids[3], "pause")
        wire.control(ids[3], "resume")
        core = server.pids()["core"]
        os.kill(core, signal.SIGKILL)
    new_core(server, core)
    with LineWire(server.socket_path) as wire:
        wire.control(ids[2], "write_stdin", data="still here\n", eof=True)
        assert wire.output(ids[2]) == b"ready\nstill here\n"
        assert wire.exit(ids[2])["code"] == 0
        for each in (ids[0], ids[1]):
            assert wire.status(each) == "running"
            wire.control(each, "stop")
            assert wire.exit(each)["reason"] == "stop"
        wire.control(ids[3], "kill")
        assert wire.exit(ids[3])["signal"] == "SIGKILL"
        wait_until(lambda: not any(map(alive, processes)), what="all of them to be gone")


@pids
def test_with_the_proc_of_another_pid_namespace(start_server: Callable[..., Server]) -> None:
    """It shows strangers under pids that mean agents here: as good as none, and nobody in it is touched."""
    server = start_server(program=[*UNSHARE, "--pid", "--fork", "--kill-child=SIGKILL", *INSIDE])
    keeper, = children(server.process.pid)
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("sleeper"), wire.spawn("stubborn")]
        core = server.pids()["core"]
        os.kill(next(pid for pid in children(keeper) if "_core" in command(pid)), signal.SIGKILL)
    new_core(server, core)
    with LineWire(server.socket_path) as wire:
        assert [wire.status(each) for each in ids] == ["running"] * 2
        wire.control(ids[0], "stop")
        assert wire.exit(ids[0])["reason"] == "stop"
        wire.control(ids[1], "kill")
        assert wire.exit(ids[1])["signal"] == "SIGKILL"
    end(server, keeper)
