"""Under a service manager: what is said to it, what it stores, and what a start after the death of all gets back.

Owns:    the protocol of sd_notify(3) as `serve` speaks it, the descriptor store, and the unit files in examples/.
Runs in: the test process; the manager is a stand-in (manager.py), servers and agents are real.
Unaware: of how the keeper does it; but the pieces of core/notify.py are also tried alone.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest
from manager import Manager, manager_in
from support import MAIN, ROOT, Server, wait_until
from wire import LineWire, alive, child_environ, new_id

from agentserver.core import notify, pidfd

MINE = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE")


@pytest.fixture
def manager(run_dir: Path) -> Iterator[Manager]:
    """A stand-in manager that hears."""
    manager = manager_in(run_dir)
    yield manager
    manager.close()


def kill_all(server: Server) -> None:
    """SIGKILL keeper, core and shell before any of them can start another."""
    parts = server.pids()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in parts.values():
            os.kill(pid, number)
    server.process.wait()
    wait_until(lambda: not any(map(alive, parts.values())), what="all of the server to be dead")


def names_of(manager: Manager, agent: str) -> set[str]:
    """Return the names of what is stored for one agent."""
    return {name.partition(".")[2] for name in list(manager.store) if name.startswith(agent + ".")}


# ---------------------------------------------------------------- what is said

@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_ready_status_watchdog_and_stopping(start_server: Callable[..., Server], run_dir: Path, abstract: bool) -> None:
    manager = manager_in(run_dir, abstract=abstract)
    try:
        server = start_server(environ={**manager.environ(), "WATCHDOG_USEC": "200000"})
        manager.await_word("READY", "1")
        with LineWire(server.socket_path) as wire:
            wire.spawn("sleeper")
            manager.await_word("STATUS", "1 agents are held")
            count = len(manager.heard("WATCHDOG"))
            wait_until(lambda: len(manager.heard("WATCHDOG")) >= count + 3, what="the watchdog to be fed")
        server.close()
        manager.await_word("STOPPING", "1")
        assert manager.heard("READY") == ["1"] and not manager.heard("MAINPID")
        assert int(manager.heard("EXTEND_TIMEOUT_USEC")[0]) > 20e6
        wait_until(lambda: not manager.store, what="nothing to be stored any more")
    finally:
        manager.close()


def test_main_pid_is_said_where_the_manager_started_something_else(
        start_server: Callable[..., Server], manager: Manager) -> None:
    server = start_server(environ={**manager.environ(), "SYSTEMD_EXEC_PID": str(os.getpid())})
    manager.await_word("MAINPID", str(server.process.pid))


def test_the_watchdog_of_somebody_else_is_not_ours() -> None:
    assert notify._beat_secs({"WATCHDOG_USEC": "30000000"}) == 15
    assert notify._beat_secs({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}) == 15
    assert notify._beat_secs({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) == 0
    assert notify._beat_secs({"WATCHDOG_USEC": "soon"}) == notify._beat_secs({}) == 0


def test_nothing_of_it_reaches_parts_and_agents(start_server: Callable[..., Server], manager: Manager) -> None:
    given = {**manager.environ(), "WATCHDOG_USEC": "30000000", "LISTEN_PID": "1", "LISTEN_FDS": "2",
             "LISTEN_FDNAMES": "a:b", "FDSTORE": "100",
             "AGENTSERVER_PASS_ENVIRONMENT": "TEST_RUN_MARK,NOTIFY_*,WATCHDOG_*,LISTEN_*,FDSTORE"}
    server = start_server(environ=given)
    with LineWire(server.socket_path) as wire:
        agent = wire.info(wire.spawn("sleeper"))["pid"]
    pids = server.pids()
    for pid in (agent, pids["core"], pids["shell"]):
        environ = child_environ(pid)
        assert not [name for name in MINE if name.encode() in environ]


def test_a_detached_keeper_does_not_speak_for_the_program_that_started_it(manager: Manager, state_dir: Path) -> None:
    """An embedded AgentServer may live in somebody's service; its keeper is no part of that."""
    code = ("import sys\nfrom agentserver import AgentClient, ServerConfig\nfrom agentserver.core import serving\n"
            "serving.start_detached(ServerConfig(state_dir=sys.argv[1]))\n"
            "client = AgentClient('unix:' + sys.argv[1])\nclient.spawn(['sleep', '100'])\nclient.shutdown()")
    from support import clean_environ
    environ = clean_environ(state_dir, manager.environ())
    subprocess.run([sys.executable, "-c", code, str(state_dir)], env=environ, check=True)
    wait_until(lambda: not (state_dir / "core.sock").exists(), what="the server to be gone")
    assert manager.messages == []


def test_without_a_manager_nothing_is_done() -> None:
    environ = {"PATH": "/bin"}
    quiet = notify.Notify(environ)
    for say in (quiet.ready, quiet.reloading, quiet.stopping, quiet.work, quiet.close):
        say()
    quiet.status("x")
    quiet.store("a.stdin", 0)
    quiet.remove("a.stdin")
    assert quiet.due == [] and not quiet._queue and environ == {"PATH": "/bin"}
    assert notify.Notify({"NOTIFY_SOCKET": "/nonexistent/socket"}).due == []
    assert notify.Notify({"NOTIFY_SOCKET": "vsock:2:1234", "WATCHDOG_USEC": "1000"}).due == []


# ---------------------------------------------------------------- the pieces alone

def test_reloading_is_said_with_the_time(run_dir: Path, manager: Manager) -> None:
    speaker = notify.Notify(manager.environ())
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    speaker.reloading()
    speaker.ready()
    manager.await_word("READY")
    assert [sorted(words) for words in manager.messages] == [["MONOTONIC_USEC", "RELOADING"], ["READY"]]
    assert before <= int(manager.heard("MONOTONIC_USEC")[0]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    speaker.close()


def test_a_stuck_manager_holds_nobody_up_and_hears_all_in_order_later(run_dir: Path) -> None:
    """Its queue is full at once; what was stored and removed again meanwhile is never sent."""
    manager = manager_in(run_dir, hear=False)
    speaker = notify.Notify(manager.environ())
    read, write = os.pipe()
    names = [f"agent.{number}" for number in range(600)]
    for name in names:
        speaker.store(name, write)
    for name in names[500:]:
        speaker.remove(name)
    os.close(write)
    speaker.ready()
    assert speaker.due, "it knows that something is left to do"
    manager.resume()

    def over() -> bool:
        speaker.work()
        return bool(manager.heard("READY"))
    wait_until(over, what="everything to be said")
    assert list(manager.store) == names[:500] and speaker.due == []
    speaker.close()
    manager.close()
    assert os.read(read, 1) == b"", "no copy of it is left anywhere"
    os.close(read)


def test_a_manager_that_never_listens_costs_a_bounded_number_of_descriptors(run_dir: Path) -> None:
    manager = manager_in(run_dir, hear=False)
    speaker = notify.Notify(manager.environ())
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(notify.QUEUE_MOST + 100):
        speaker.store(f"agent.{number}", 0)
    assert len(speaker._queue) == notify.QUEUE_MOST
    speaker.close(within_secs=0)
    manager.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) < before


@pytest.mark.parametrize("name", ["", "a.stdin", "x" * 255, "3f.stdin.12", "~ !"])
def test_names_that_can_be_stored(name: str) -> None:
    assert notify.fd_name(name) == name


@pytest.mark.parametrize("name", ["a:b", "x" * 256, "a\nb", "ä", "\x7f", "\0"])
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        notify.fd_name(name)


def test_descriptors_come_back_by_name_and_only_to_whom_they_are_meant_for() -> None:
    code = ("import json, os\nfrom agentserver.core import notify\n"
            "os.environ['LISTEN_PID'] = str(os.getpid() + int(os.environ.pop('OFF')))\n"
            "found = notify.stored(os.environ)\n"
            "print(json.dumps([found, [os.get_inheritable(fd) for fd in found.values()],"
            " [name for name in os.environ if name.startswith('LISTEN')]]))")

    def run(off: int, **environ: str) -> object:
        ends = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
        high = [os.dup2(end, 300 + n) for n, end in enumerate(ends)]
        launch = "for n in 3 4 5 6; do eval \"exec $n<&$((n + 297))\"; done; exec \"$@\""
        try:
            done = subprocess.run(["bash", "-c", launch, "bash", sys.executable, "-c", code], pass_fds=high, check=True,
                                  env={"OFF": str(off), "PYTHONPATH": str(ROOT), "PATH": "/bin:/usr/bin", **environ},
                                  stdout=subprocess.PIPE)
        finally:
            for fd in ends + high:
                os.close(fd)
        return json.loads(done.stdout)

    names = "a.stdin:a.stdout:b.stdin"
    found = {"a.stdin": 3, "a.stdout": 4, "b.stdin": 5}
    assert run(0, LISTEN_FDS="3", LISTEN_FDNAMES=names) == [found, [False] * 3, []]
    assert run(0, LISTEN_FDS="4", LISTEN_FDNAMES="a:b:a:c") == [{"a": 5, "b": 4, "c": 6}, [False] * 3, []]
    assert run(1, LISTEN_FDS="3", LISTEN_FDNAMES=names) == [{}, [], []], "they are another process's"
    assert run(0, LISTEN_FDS="many") == [{}, [], []]


# ---------------------------------------------------------------- the store

def test_what_is_held_is_stored_and_what_is_released_is_removed(
        start_server: Callable[..., Server], manager: Manager) -> None:
    server = start_server(environ=manager.environ())
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("echo", stdin="pipe")
        wait_until(lambda: {"stdin", "stdout", "stderr"} <= names_of(manager, agent), what="its pipes to be stored")
        wire.control(agent, "write_stdin", data="hello\n")
        wait_until(lambda: "stdin.1" in names_of(manager, agent), what="the file of its stdin to be stored")
        wire.control(agent, "close_stdin")
        assert wire.exit(agent)["code"] == 0, "the end of its input reached it, through every copy"
        wait_until(lambda: not names_of(manager, agent), what="nothing of it to be stored any more")
        quiet = wire.spawn("sleeper", stdin="null")
        wait_until(lambda: {"stdout", "stderr"} <= names_of(manager, quiet))
        assert "stdin" not in names_of(manager, quiet)
        os.kill(server.pids()["core"], signal.SIGKILL)
        wait_until(lambda: zero_lag(server), what="a new core")
        wire_again = LineWire(server.socket_path)
        with wire_again:
            assert wire_again.status(quiet) == "running"
        assert {"stdout", "stderr"} <= names_of(manager, quiet), "a core's death changes nothing in the store"


def zero_lag(server: Server) -> bool:
    """Whether the server answers."""
    try:
        return bool(server.ask({"type": "health_check_request"})["success"])
    except (OSError, ValueError):
        return False


def test_all_killed_at_once_and_no_byte_lost(
        start_server: Callable[..., Server], manager: Manager, tmp_path: Path) -> None:
    """The pipes live in the store; who still runs is adopted by (pid, start), who ended meanwhile is known as far as
    the kernel tells."""
    server = start_server(environ=manager.environ())
    stop = tmp_path / "stop"
    with LineWire(server.socket_path) as wire:
        writers = {wire.spawn("lines", 0, 500, tmp_path / f"sums{n}"): tmp_path / f"sums{n}" for n in range(3)}
        ticker = wire.spawn("ticker", 0.01, stop)
        talker = wire.spawn("echo", stdin="pipe")
        family = wire.spawn("tree", 2, 2)
        wire.control(talker, "write_stdin", data="before\n")
        wire.until_output(talker, b"before\n")
        pids = {each: wire.info(each)["pid"] for each in (*writers, ticker, talker, family)}
        members = json.loads(wire.lines(family, 2)[1])
        for each in pids:
            wait_until(lambda: {"stdout", "stderr"} <= names_of(manager, each), what="its pipes to be stored")
        wait_until(lambda: {"stdin", "stdin.1"} <= names_of(manager, talker))
    kill_all(server)
    assert all(alive(pid) for pid in (*pids.values(), *members)), "no agent noticed"
    stop.write_text("")  # this one ends while nobody is there
    wait_until(lambda: not alive(pids[ticker]), what="the ticker to end")

    again = manager.start_again(start_server, server.state_dir)
    wait_until(lambda: manager.heard("READY") == ["1", "1"], what="the second start to be told")
    with LineWire(again.socket_path) as wire:
        for each in (*writers, talker, family):
            info = wire.info(each)
            assert (info["status"], info["pid"], info["attempt"]) == ("running", pids[each], 1)
        info = wire.ended(ticker)
        ticks = wire.output(ticker).split(b"\n")[1:-1] + wire.output(ticker, "stderr").split(b"\n")[:-1]
        assert sorted(int(line.split()[1]) for line in ticks) == list(range(len(ticks))), "its last words were kept"
        assert info["exit"]["code"] in (0, None)

        wire.control(talker, "write_stdin", data="after\n")
        wire.until_output(talker, b"before\nafter\n")
        wire.control(talker, "close_stdin")
        assert wire.output(talker) == b"ready\nbefore\nafter\n"
        if pidfd.tells_exit_codes():
            assert wire.exit(talker)["code"] == 0
        for each, sums in writers.items():
            wire.control(each, "stop")
            record = wire.exit(each)
            assert record["reason"] == "stop" and record["by"]
            out, err = wire.output(each), wire.output(each, "stderr")
            assert sums.read_text().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                                str(len(err)), hashlib.sha256(err).hexdigest()]
        wire.control(family, "kill")
        wire.ended(family)
        wait_until(lambda: not any(map(alive, members)), what="its tree to be ended")
        wait_until(lambda: not manager.store, what="nothing to be stored any more")
        assert wire.exit(wire.spawn("exit_with", 3))["code"] == 3


def test_strangers_among_the_children_of_init_are_left_alone(
        start_server: Callable[..., Server], manager: Manager, run_dir: Path) -> None:
    """After such a start init is the parent of agents; it is also that of everybody's daemons."""
    server = start_server(environ=manager.environ())
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("sleeper")
        wait_until(lambda: {"stdout", "stderr"} <= names_of(manager, agent))
    daemon = subprocess.run([sys.executable, "-S", str(ROOT / "tests/agents/daemoniser.py"), "exit", "clear"],
                            env={"TEST_RUN_MARK": str(run_dir)}, stdout=subprocess.PIPE, check=True)
    stranger = int(daemon.stdout.split()[1])
    try:
        kill_all(server)
        again = manager.start_again(start_server, server.state_dir)
        with LineWire(again.socket_path) as wire:
            wire.control(agent, "stop")
            assert wire.ended(agent)["exit"]["leaked"] == []
            assert alive(stranger)
            wire.spawn("stubborn")
        again.close()
        assert alive(stranger), "nor when the server ends"
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_what_is_stored_for_nobody_is_let_go(start_server: Callable[..., Server], manager: Manager) -> None:
    """Of agents that nobody knows, and what is no agent's at all; and a registry that is gone."""
    read, write = os.pipe()
    manager.store.update({f"{new_id()}.stdout": read, "stored": write})
    server = manager.start_again(start_server, manager_dir := Path(manager.address).parent / "state")
    with LineWire(server.socket_path) as wire:
        assert wire.agents(all=True) == []
    wait_until(lambda: list(manager.store) == ["stored"], what="the store to be cleaned")
    assert manager_dir.exists()


def test_keeper_killed_under_a_manager(start_server: Callable[..., Server], manager: Manager) -> None:
    """The manager gives the new keeper what it has stored; but a core lives, and what that one says is true."""
    server = start_server(environ=manager.environ())
    with LineWire(server.socket_path) as wire:
        talker = wire.spawn("echo", stdin="pipe")
        wire.control(talker, "write_stdin", data="one\n")
        wire.until_output(talker, b"one\n")
        wait_until(lambda: {"stdin", "stdin.1", "stdout", "stderr"} <= names_of(manager, talker))
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    with LineWire(server.socket_path) as wire:
        wire.control(talker, "close_stdin")
    again = manager.start_again(start_server, server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.output(talker) == b"ready\none\n", "the stored copy of its stdin is closed, too"
        assert wire.exit(talker)["code"] == 0


# ---------------------------------------------------------------- the unit files

UNITS = sorted((ROOT / "examples").glob("*.service"))


def test_there_are_units() -> None:
    assert [unit.name for unit in UNITS] == ["agentserver-user.service", "agentserver.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_verified(unit: Path, tmp_path: Path) -> None:
    """By systemd itself, with a program in place of the installed one. What is only known to newer versions of it (the
    comments in the unit say which) may be unknown here; nothing else may be wrong."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "agentserver.service"
    copy.write_text(unit.read_text().replace("/usr/local/bin/agentserver", sys.executable)
                    .replace("%h/.local/bin/agentserver", sys.executable).replace("User=agentserver", "User=root"))
    done = subprocess.run([program, "verify", "--man=no", str(copy)], capture_output=True, text=True,
                          env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
    newer = ("'FileDescriptorStorePreserve'",)
    wrong = [line for line in done.stderr.splitlines() if str(copy) in line and not any(word in line for word in newer)]
    assert done.returncode == 0 and not wrong, done.stderr


def settings(unit: Path) -> dict[str, str]:
    """Return the settings of a unit."""
    lines = [line for line in unit.read_text().splitlines() if "=" in line and not line.startswith(("#", ";"))]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_say_what_survival_needs(unit: Path) -> None:
    from agentserver.config import ServerConfig
    from agentserver.core import keeper, process
    said = settings(unit)
    assert (said["Type"], said["KillMode"], said["OOMPolicy"]) == ("notify", "process", "continue")
    assert int(said["TimeoutStopSec"]) > ServerConfig().shutdown_timeout_secs + 2 * keeper.PART_STOP_SECS
    assert int(said["FileDescriptorStoreMax"]) >= ServerConfig().max_agents * process.FDS_PER_AGENT
    needed = ServerConfig().max_agents * process.FDS_PER_AGENT + process.FDS_RESERVE
    assert int(said["LimitNOFILE"].split(":")[-1]) >= needed
    assert said["Restart"] == "always" and MAIN.exists()


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_each_setting_of_a_unit_is_explained(unit: Path) -> None:
    """By a comment above it, or above the block that it stands in."""
    explained = False
    for line in unit.read_text().splitlines():
        if line.startswith("#"):
            explained = True
        elif not line.strip() or line.startswith("["):
            explained = False
        else:
            assert explained or line.split("=")[0] in ("Description", "Documentation", "WantedBy"), line


def test_the_protocol_is_the_one_that_systemd_notify_speaks(manager: Manager) -> None:
    """The stand-in understands the real thing, so that it can judge ours."""
    program = shutil.which("systemd-notify")
    if program is None:
        pytest.skip("systemd-notify is not installed")
    subprocess.run([program, "--ready", "--no-block", "--status=well"], check=True,
                   env={**os.environ, **manager.environ()})
    manager.await_word("READY", "1")
    assert manager.heard("STATUS") == ["well"]
    assert isinstance(manager._socket, socket.socket)


def test_a_reload_is_told_and_the_store_stays(start_server: Callable[..., Server], manager: Manager) -> None:
    server = start_server(environ=manager.environ())
    with LineWire(server.socket_path) as wire:
        talker = wire.spawn("echo", stdin="pipe")
        wait_until(lambda: {"stdin", "stdout", "stderr"} <= names_of(manager, talker))
    server.process.send_signal(signal.SIGHUP)
    manager.await_word("RELOADING", "1")
    wait_until(lambda: len(manager.heard("READY")) >= 2, what="the end of the reload to be told")
    with LineWire(server.socket_path) as wire:
        assert {"stdin", "stdout", "stderr"} <= names_of(manager, talker)
        wire.control(talker, "write_stdin", data="on\n", eof=True)
        assert wire.output(talker) == b"ready\non\n"
        assert wire.exit(talker)["code"] == 0


def test_a_keeper_that_becomes_its_newer_self_keeps_its_manager(manager: Manager) -> None:
    environ = {**manager.environ(), "WATCHDOG_USEC": "1000", "PATH": "/bin"}
    before = dict(environ)
    speaker = notify.Notify(environ)
    assert environ == {"PATH": "/bin"} and speaker.quiet
    with speaker.carried(environ):
        assert environ == before
    assert environ == {"PATH": "/bin"}, "it could not be executed"
    speaker.close()


def test_agents_are_killed_for_memory_before_the_server(start_server: Callable[..., Server], run_dir: Path) -> None:
    """Whoever protects the server (OOMScoreAdjust=) does not protect its agents. That takes a right that is rare."""
    shield = ["bash", "-c", "echo -100 > /proc/self/oom_score_adj && exec \"$@\"", "bash"]
    if subprocess.run([*shield, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not protect a process")
    server = start_server(program=[*shield, sys.executable, str(MAIN)])

    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    assert {score(pid) for pid in server.pids().values()} == {-100}
    with LineWire(server.socket_path) as wire:
        assert score(wire.info(wire.spawn("sleeper"))["pid"]) == 0


def test_a_protected_server_gives_each_child_a_score_of_its_own() -> None:
    """The same without that right: a score may be lowered to where it has been before."""
    code = ("import subprocess\nfrom agentserver.core import tree\n"
            "own = open('/proc/self/oom_score_adj', 'r+'); own.write('300'); own.flush()\n"
            "tree._own_score[:] = [{0}]\n"
            "with subprocess.Popen(['cat'], stdin=subprocess.PIPE) as child:\n"
            "    tree.unshield(child.pid)\n"
            "    print(open(f'/proc/{{child.pid}}/oom_score_adj').read())")
    for own, expected in ((-100, "0"), (0, "300")):
        done = subprocess.run([sys.executable, "-c", code.format(own)], capture_output=True, text=True, check=True,
                              env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]})
        assert done.stdout.strip() == expected
