"""Reload: a server becomes its newer version, and what may come in between.

Owns:    `reload_request` and SIGHUP, deaths, ends, words and broken code at every step of them, and the keeper that
         becomes its own new code.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of the words that are said meanwhile (test_handover.py).
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, Tuple

import pytest
from driven import Driven
from support import (
    MAIN,
    ROOT,
    Server,
    clean_environ,
    marked_processes,
    short_dir,
    wait_until,
)
from test_faults import back, zmq_answers
from test_survival import by_request, by_signal, kill_core, reload, successor, told
from wire import LineWire, alive, new_id, process_state

from agentserver import AgentClient, AgentServerError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")


@pytest.mark.parametrize("millis", [0, 20, 60])
def test_an_agent_that_ends_during_a_reload_takes_nobody_along(server: Server, millis: int) -> None:
    """Since a death of the core the keeper has what agents leave, among its own children. The next core is one, too."""
    with LineWire(server.socket_path) as wire:
        last = wire.spawn("echo")
    kill_core(server)
    generation = server.ask({"type": "health_check_request"})["metadata"]["generation"]
    with LineWire(server.socket_path) as wire:
        wire.ok("reload_request")
        time.sleep(millis / 1000)  # not to wait for anything: the end is to come at different moments
        with contextlib.suppress(BrokenPipeError):  # the core that took the first request has gone already
            wire.send(json.dumps({"type": "control_command", "request_id": new_id(), "agent_id": last,
                                  "command_type": "close_stdin"}).encode())

    def over() -> dict[str, str]:
        now = told(server)
        return now if now and (now["reload_failed"] or now["generation"] != generation) else {}
    assert wait_until(over, what="the reload")["reload_failed"] == ""
    with LineWire(server.socket_path) as wire:
        wire.ask("control_command", agent_id=last, command_type="close_stdin")
        assert wire.exit(last)["code"] == 0


def test_a_keeper_that_is_not_the_first_reloads(start_server: Callable[..., Server]) -> None:
    """Also a second time: the core that it found is no child of its own, and yet it sees it leave."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
    heir = successor(start_server, server)
    for _ in range(2):
        core = heir.pids()["core"]
        reload(heir, by_request)
        wait_until(lambda: not alive(core), what="the core before to leave")
    assert "the core ended" not in heir.logs()
    with LineWire(heir.socket_path) as wire:
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n"
    server.process.stdout.close()  # type: ignore[union-attr]


def test_reload_keeps_the_keeper_and_renews_the_rest(server: Server) -> None:
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
    before = server.pids()
    reload(server, by_request)
    wait_until(lambda: zmq_answers(server.endpoint), what="the new shell to answer")
    after = server.pids()
    assert after["keeper"] == before["keeper"] and after["core"] != before["core"] and after["shell"] != before["shell"]
    wait_until(lambda: not alive(before["core"]) and not alive(before["shell"]), what="the old ones to leave")
    with LineWire(server.socket_path) as wire:
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n" and wire.exit(each)["code"] == 0


def test_who_comes_during_a_reload_is_served(link: str, start_server: Callable[..., Server], state_dir: Path) -> None:
    """A server that is being renewed is there: of clients that never met it, with one request each, none fails."""
    ipc = {"endpoint": f"ipc://{state_dir}.req", "pub_endpoint": f"ipc://{state_dir}.pub"} if link == "ipc" else {}
    server = start_server(state_dir=state_dir, **ipc)
    address, served, failed, over = server.address(link), [0], [], threading.Event()

    def come() -> None:
        for client in itertools.cycle((AgentClient, Driven)):
            if over.is_set():
                return
            try:
                with client(address) as new:
                    served[0] += new.health().healthy
            except AgentServerError as e:
                failed.append(e)
    coming = threading.Thread(target=come)
    coming.start()
    try:
        for how in (by_request, by_signal, by_request):
            before, shell = served[0], server.pids()["shell"]
            reload(server, how)
            back(server, "shell", shell)
            wait_until(lambda: failed or served[0] > before + 2, what="clients to be served")
    finally:
        over.set()
        coming.join()
    assert not failed, failed[0]


def copied(where: Path) -> Path:
    """Return a copy of the package that a test may change."""
    package = where / "agentserver"
    shutil.copytree(MAIN.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def test_a_bug_in_the_keeper_ends_no_agent(start_server: Callable[..., Server], run_dir: Path, state_dir: Path) -> None:
    """It is as if it had been killed: the next one finds all that was there."""
    package = copied(run_dir / "bug")
    keeper = package / "core" / "keeper.py"
    keeper.write_text(keeper.read_text().replace("self._reload_asked = True", "raise RuntimeError('a bug')"))
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""},
                          state_dir=state_dir)
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
    by_signal(server)
    assert server.process.wait(60) == 1
    heir = start_server(state_dir=state_dir)
    with LineWire(heir.socket_path) as wire:
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n"
    server.process.stdout.close()  # type: ignore[union-attr]


def test_the_keeper_becomes_its_new_code_in_place(start_server: Callable[..., Server], run_dir: Path) -> None:
    """Same pid, same children, agents adopted by it included; twice; and it still ends well."""
    package, told = copied(run_dir / "renewed"), run_dir / "renewed" / "told"
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    with LineWire(server.socket_path) as wire:
        each, ending = wire.spawn("echo"), wire.spawn("ticker", 0.01, run_dir / "renewed" / "go")
    kill_core(server)  # so that the agents are the keeper's children
    for version in ("one", "two"):
        with open(package / "core" / "keeper.py", "a") as file:
            file.write(f"\nopen({str(told)!r}, 'a').write('%d {version}\\n' % os.getpid())\n")
        reload(server, by_request)
        wait_until(lambda: told.exists() and f"{server.process.pid} {version}" in told.read_text(),
                   what="the new keeper")
    (run_dir / "renewed" / "go").touch()
    with LineWire(server.socket_path) as wire:
        assert wire.exit(ending)["code"] == 0
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n" and wire.exit(each)["code"] == 0
    kill_core(server)
    wait_until(lambda: zmq_answers(server.endpoint), what="the shell to answer")


def test_a_word_during_the_renewal_is_heard(start_server: Callable[..., Server], run_dir: Path) -> None:
    """SIGTERM may come at any moment around the exec of the keeper; the server ends, and well."""
    for number in range(4):
        package = copied(run_dir / f"heard{number}")
        server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
        with open(package / "core" / "keeper.py", "a") as file:
            file.write("\n# newer\n")
        generation = server.ask({"type": "health_check_request"})["metadata"]["generation"]
        by_request(server)
        wait_until(lambda: told(server).get("generation", generation) != generation, what="the new core")
        for _ in range(number * 200):  # a little later each time
            os.getppid()
        server.close()


class Interrupted:
    """A reload whose successor stops itself before a certain line of the core's service; and what the server had."""

    def __init__(self, start_server: Callable[..., Server], where: Path, shutdown_timeout: int = 1000) -> None:
        self.package = copied(where)
        self._service = self.package / "core" / "service.py"
        self._good = self._service.read_text()
        self.server = start_server("--shutdown-timeout-secs", str(shutdown_timeout), environ={"PYTHONPATH": ""},
                                   program=[sys.executable, str(self.package / "__main__.py")])
        self.core, self._parts = self.server.pids()["core"], set(self.server.pids().values())
        with LineWire(self.server.socket_path) as wire:
            self.agent = wire.spawn("echo")

    def reload(self, before: str) -> int:
        """Begin it, and return the successor that has stopped."""
        code, found = re.subn(f"\n( +){re.escape(before)}", r"\n\1os.kill(os.getpid(), signal.SIGSTOP)\g<0>",
                              self._good)
        assert found == 1
        self._service.write_text(code)
        by_signal(self.server)
        try:
            return wait_until(self._stopped, what="the successor to stop itself")
        finally:
            self._service.write_text(self._good)

    def _stopped(self) -> int:
        new = set(marked_processes(self.server.mark)) - self._parts
        return next((pid for pid in new if process_state(pid) == "T"), 0)


@pytest.fixture
def interrupted(start_server: Callable[..., Server], run_dir: Path, request: pytest.FixtureRequest) -> Interrupted:
    """A server whose reload is to be interrupted."""
    return Interrupted(start_server, short_dir(run_dir))


@pytest.mark.parametrize("before", ['channel.send({"standby"', 'with held("core.lock")'],
                         ids=["while the core before it serves", "after that has yielded"])
@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_a_server_that_is_ended_while_it_is_reloaded(interrupted: Interrupted, before: str,
                                                     then: signal.Signals) -> None:
    """Whoever is the core then is told; the time that agents may take to end is not waited out for nothing."""
    successor = interrupted.reload(before)
    interrupted.server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "ending the server" in interrupted.server.logs(), what="the keeper to hear of it")
    os.kill(successor, then)
    assert interrupted.server.stop(0) == 0


def test_both_cores_die_in_a_reload_and_one_in_the_next(interrupted: Interrupted) -> None:
    """The third core is nobody's successor; the fourth is, and takes over at once."""
    server = interrupted.server
    second = interrupted.reload('with held("core.lock")')
    os.kill(interrupted.core, signal.SIGKILL)
    wait_until(lambda: process_state(interrupted.core) == "", what="the keeper to see it")
    os.kill(second, signal.SIGKILL)
    third, = wait_until(lambda: {int(told(server).get("core_pid", 0))} - {interrupted.core, 0}, what="the third")
    fourth = interrupted.reload('channel.send({"standby"')
    os.kill(third, signal.SIGKILL)
    os.kill(fourth, signal.SIGCONT)
    wait_until(lambda: told(server).get("core_pid") == str(fourth), what="the fourth")
    with LineWire(server.socket_path) as wire:
        wire.control(interrupted.agent, "write_stdin", data="x\n", eof=True)
        assert wire.output(interrupted.agent) == b"ready\nx\n" and wire.exit(interrupted.agent)["code"] == 0


def test_a_successor_that_dies_before_the_core_has_yielded(interrupted: Interrupted) -> None:
    """The word to yield is under way then, and cannot be taken back."""
    server, core = interrupted.server, interrupted.core
    os.kill(core, signal.SIGSTOP)
    os.kill(interrupted.reload("left = inherit(keeper.channel)\n        while"), signal.SIGKILL)
    wait_until(lambda: "the reload failed" in server.logs(), what="the keeper to see it")
    os.kill(core, signal.SIGCONT)
    wait_until(lambda: "going on" in server.logs(), what="the core to go on")
    assert "-9" in wait_until(lambda: told(server).get("reload_failed"), what="why") and server.pids()["core"] == core
    with LineWire(server.socket_path) as wire:
        wire.control(interrupted.agent, "write_stdin", data="x\n", eof=True)
        assert wire.output(interrupted.agent) == b"ready\nx\n" and wire.exit(interrupted.agent)["code"] == 0


def test_a_broken_new_version_leaves_the_old_one_serving(start_server: Callable[..., Server], run_dir: Path) -> None:
    """The package is replaced underneath by one that cannot be imported, then by one that fails to serve."""
    package = copied(run_dir / "broken")
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    with LineWire(server.socket_path) as wire:
        each, core = wire.spawn("echo"), server.pids()["core"]
    for file, broken in (("core/service.py", "raise RuntimeError('broken')\n"),
                         ("core/registry.py", "SCHEMA_VERSION = 0  # older than what is on disk\n")):
        good = (package / file).read_text()
        (package / file).write_text(re.sub("SCHEMA_VERSION = .*\n", broken, good) if "SCHEMA" in broken else broken)
        by_request(server)
        why = wait_until(lambda: server.ask({"type": "health_check_request"})["metadata"]["reload_failed"],
                         what="the reload to fail")
        assert why and server.pids()["core"] == core
        (package / file).write_text(good)
    reload(server, by_request)
    assert server.pids()["core"] != core
    with LineWire(server.socket_path) as wire:
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n"


def test_a_python_that_is_away_costs_the_reload_only(start_server: Callable[..., Server], run_dir: Path) -> None:
    """As while an upgrade replaces it; a server that could not begin its next version goes on with this one."""
    where = short_dir(run_dir)
    package, python = copied(where), where / "python"
    python.symlink_to(os.path.realpath(sys.executable))
    packages = ":".join(path for path in sys.path if "site-packages" in path)
    server = start_server(program=[str(python), str(package / "__main__.py")], environ={"PYTHONPATH": packages})
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
    python.unlink()
    by_signal(server)
    assert "cannot be started" in wait_until(lambda: told(server)["reload_failed"], what="the reload to fail")
    python.symlink_to(os.path.realpath(sys.executable))
    reload(server, by_request)
    with LineWire(server.socket_path) as wire:
        assert wire.status(each) == "running"


def test_a_file_that_leads_nowhere_is_no_code(start_server: Callable[..., Server], run_dir: Path) -> None:
    package = copied(short_dir(run_dir))
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    (package / "core" / ".#keeper.py").symlink_to("me@host.1234")  # as Emacs marks what is being edited
    for _ in range(2):  # the keeper looks for new code of its own after the first
        reload(server, by_request)


@pytest.mark.parametrize("before", ['channel.send({"standby"', 'with held("core.lock")'],
                         ids=["while the core before it serves", "after that has yielded"])
def test_a_successor_that_hangs_does_not_keep_the_server_from_ending(start_server: Callable[..., Server],
                                                                     run_dir: Path, before: str) -> None:
    stuck = Interrupted(start_server, short_dir(run_dir), shutdown_timeout=1)
    stuck.reload(before)
    assert stuck.server.stop() in (0, 1)


def test_a_server_that_is_shut_down_while_its_successor_comes(interrupted: Interrupted) -> None:
    """A core that has ended everything is done, and with it the server."""
    interrupted.reload('channel.send({"standby"')
    assert interrupted.server.ask({"type": "shutdown_request"})["success"]
    assert interrupted.server.stop(0) == 0


@pytest.mark.parametrize("mode", ["graceful", "drain"])
@pytest.mark.parametrize("happens", [kill_core, lambda server: reload(server, by_signal)], ids=["kill", "reload"])
def test_a_shutdown_goes_on_in_the_next_core(server: Server, mode: str, happens: Callable[[Server], None]) -> None:
    """Also one that waits for the agents to end by themselves."""
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("stubborn", grace_secs=2.0)
        wire.ok("shutdown_request", mode=mode)
    happens(server)
    with LineWire(server.socket_path) as wire:
        assert wire.ask("spawn_request", config={"command": ["true"]})["error_code"] == "shutting_down"
        if mode == "drain":
            wire.control(each, "kill")
    assert server.stop(0) == 0


@contextlib.contextmanager
def with_a_late_shell(state_dir: Path, run_dir: Path) -> Iterator[Tuple[Server, int]]:
    """A server that never said that it is ready, and the pid of its shell, which stopped itself before. The next shell
    is a good one."""
    package = copied(short_dir(run_dir))
    child = package / "shell" / "child.py"
    good = child.read_text()
    assert good.count("loop = front.loop(owner)") == 1
    child.write_text(good.replace("loop = front.loop(owner)",
                                  "os.kill(os.getpid(), 19); loop = front.loop(owner)"))
    server = Server.__new__(Server)
    server.state_dir, server.mark = state_dir, str(state_dir)
    server.errors = state_dir.with_name(state_dir.name + ".stderr")
    with open(server.errors, "wb") as errors:
        server.process = subprocess.Popen(
            [sys.executable, str(package / "__main__.py"), "serve", "--state-dir", str(state_dir),
             "--endpoint", "tcp://127.0.0.1:0", "--pub-endpoint", "tcp://127.0.0.1:0"],
            env=clean_environ(state_dir, {"PYTHONPATH": ""}), cwd=str(ROOT), stdout=subprocess.PIPE, stderr=errors)
    try:
        shell = wait_until(lambda: next((pid for pid, said in marked_processes(server.mark).items()
                                         if said.endswith("_shell") and process_state(pid) == "T"), 0), what="a shell")
        child.write_text(good)
        wait_until(lambda: told(server).get("generation") == "1", what="the core")
        yield server, shell
        assert server.stop() == 0, server.logs()
    finally:
        server.abandon()


def test_a_reload_before_the_shell_is_there(state_dir: Path, run_dir: Path) -> None:
    """The shell is told to make room for the next before it has said that it is ready."""
    with with_a_late_shell(state_dir, run_dir) as (server, shell):
        by_signal(server)
        wait_until(lambda: told(server).get("generation") == "2", what="the next core")
        os.kill(shell, signal.SIGCONT)
        wait_until(lambda: told(server).get("endpoint") or server.process.poll() is not None, what="the next shell")
        assert server.process.poll() is None, server.logs()


def test_a_shell_that_ends_before_it_was_there_while_the_server_ends(state_dir: Path, run_dir: Path) -> None:
    """It is not what the end is about: the core goes on ending its agents, and the exit code is 0."""
    with with_a_late_shell(state_dir, run_dir) as (server, shell):
        core = server.pids()["core"]
        os.kill(core, signal.SIGSTOP)
        server.process.terminate()
        wait_until(lambda: "ending the server" in server.errors.read_text(), what="the keeper to hear")
        os.kill(shell, signal.SIGKILL)
        wait_until(lambda: process_state(shell) == "", what="the keeper to see it")
        os.kill(core, signal.SIGCONT)


def test_the_look_at_new_code_is_nobodys_stray(interrupted: Interrupted) -> None:
    """The last agent ends in a reload, so that its core comes to look for what it left among the keeper's children."""
    server, main = interrupted.server, interrupted.package / "__main__.py"
    main.write_text(main.read_text().replace('if part == "_check":',
                                             'if part == "_check":\n        os.kill(os.getpid(), 19)'))
    successor = interrupted.reload("words, self._keeper.words = ")  # it is about to say that it is ready
    leader, = [pid for pid, said in marked_processes(server.mark).items() if "echo.py" in said]
    os.kill(leader, signal.SIGKILL)
    check = wait_until(lambda: next((pid for pid, said in marked_processes(server.mark).items()
                                     if said.endswith("_check") and process_state(pid) == "T"), 0), what="the look")
    os.kill(successor, signal.SIGCONT)
    wait_until(lambda: told(server).get("core_pid") == str(successor), what="the successor")
    with LineWire(server.socket_path) as wire:
        assert wire.exit(interrupted.agent)["leaked"] == []
    assert process_state(check) == "T"
    os.kill(check, signal.SIGCONT)


def test_new_code_that_does_not_load_holds_nobody_up(start_server: Callable[..., Server], run_dir: Path) -> None:
    """The keeper hears of everything while its new code is tried, and gives it up when it is told to end."""
    package = copied(short_dir(run_dir))
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    with open(package / "core" / "keeper.py", "a") as file:
        file.write("\nimport sys\n'_check' not in sys.argv or time.sleep(1000)\n")
    reload(server, by_request)
    wait_until(lambda: any(each.endswith("_check") for each in marked_processes(server.mark).values()), what="a trial")
    kill_core(server)
    assert server.stop() == 0


def test_a_keeper_sleeps_while_a_successor_comes(interrupted: Interrupted) -> None:
    successor = interrupted.reload('with held("core.lock")')
    os.kill(interrupted.core, signal.SIGKILL)
    wait_until(lambda: process_state(interrupted.core) == "", what="the keeper to see it")
    keeper = interrupted.server.process.pid
    wait_until(lambda: all(process_state(keeper) == "S" for _ in range(1000)), what="the keeper to sleep")
    os.kill(successor, signal.SIGCONT)
    wait_until(lambda: told(interrupted.server).get("core_pid") == str(successor), what="the successor")
