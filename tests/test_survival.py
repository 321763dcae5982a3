"""The server's own death and upgrade are not events in an agent's life.

Owns:    SIGKILL of the core at awkward moments, a keeper's death and its successor, reload.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of how it is done; the chaos suite does it at random, and counts.
"""
from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import pytest
from driven import Driven
from support import DEADLINE_SECS, MAIN, Server, agent, marked_processes, short_dir, wait_until
from test_faults import back, zmq_answers
from test_tree import grown
from wire import LineWire, alive, new_id, process_state, states

from agentserver import AgentClient, AgentServerError
from agentserver.core.pidfd import tells_exit_codes
from agentserver.core.tree import become_subreaper

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")


def told(server: Server) -> dict[str, str]:
    """Return what it says of itself, nothing while nobody answers."""
    try:
        return dict(server.ask({"type": "health_check_request"})["metadata"])
    except (OSError, ValueError):
        return {}


def kill_core(server: Server) -> None:
    core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)


def reload(server: Server, how: Callable[[Server], None]) -> None:
    """Reload, and wait until the next generation serves."""
    after = str(int(told(server)["generation"]) + 1)
    how(server)
    wait_until(lambda: told(server).get("generation") == after and told(server).get("endpoint"), what="the next one")


def by_signal(server: Server) -> None:
    server.process.send_signal(signal.SIGHUP)


def by_request(server: Server) -> None:
    assert server.ask({"type": "reload_request"})["success"]


@pytest.mark.parametrize("happens", [kill_core, lambda server: reload(server, by_signal)], ids=["kill", "reload"])
def test_busy_agents_lose_nothing(server: Server, tmp_path: Path, happens: Callable[[Server], None]) -> None:
    """Every byte of both streams, in order, and the exit code, across three deaths (or upgrades) of the core."""
    with LineWire(server.socket_path) as wire:
        agents = {wire.spawn("lines", 0, 2000, tmp_path / f"sums{n}"): tmp_path / f"sums{n}" for n in range(8)}
    for _ in range(3):
        happens(server)
        with LineWire(server.socket_path) as wire:
            ends = {each: wire.info(each)["output"]["stdout"]["end_offset"] for each in agents}
            for each, end in ends.items():
                wait_until(lambda: wire.info(each)["output"]["stdout"]["end_offset"] > end, what="an agent to go on")
    with LineWire(server.socket_path) as wire:
        for each in agents:
            wire.control(each, "stop")
        for each, sums in agents.items():
            assert wire.exit(each)["code"] == 0 and wire.info(each)["attempt"] == 1
            out, err = wire.output(each), wire.output(each, "stderr")
            assert sums.read_text().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                                str(len(err)), hashlib.sha256(err).hexdigest()]


def test_an_end_while_there_is_no_core(server: Server, tmp_path: Path) -> None:
    """The keeper reaps, and the new core records the true code; also of one that a signal ended."""
    with LineWire(server.socket_path) as wire:
        left, killed = wire.spawn("ticker", 0.01, tmp_path / "go"), wire.spawn("sleeper")
        pids = [wire.info(each)["pid"] for each in (left, killed)]
    core = server.pids()["core"]
    os.kill(core, signal.SIGSTOP)
    os.kill(pids[1], signal.SIGKILL)
    (tmp_path / "go").touch()
    wait_until(lambda: states(pids) == {"Z"}, what="the agents to be zombies of the stopped core")
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.exit(left)["code"] == 0
        said = wire.output(left) + wire.output(left, "stderr")
        numbers = sorted(int(line.split()[1]) for line in said.splitlines() if line.startswith(b"tick"))
        assert numbers == list(range(len(numbers))) and numbers
        record = wire.exit(killed)
        assert record["signal"] == "SIGKILL" and record["reason"] == "signaled" and record["by"] is None
        assert wire.status(killed) == "failed"


def test_the_stop_ladder_goes_on(server: Server) -> None:
    """SIGTERM was sent by a core that died; SIGKILL comes from the next, for the same reason, by the same client."""
    with LineWire(server.socket_path) as wire:
        stubborn = wire.spawn("stubborn", grace_secs=1.0)
        wire.control(stubborn, "stop")
        by = "local uid"
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        record = wire.exit(stubborn)
        assert record["signal"] == "SIGKILL" and record["reason"] == "stop" and record["by"].startswith(by)


def test_a_limit_goes_on(server: Server) -> None:
    with LineWire(server.socket_path) as wire:
        limited = wire.spawn("sleeper", limits={"runtime_secs": 1.0})
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        assert wire.exit(limited)["reason"] == "limit:runtime_secs"


def test_a_spawn_is_done_once(server: Server) -> None:
    """The same request to the core before and after: one agent, one process."""
    request = {"type": "spawn_request", "request_id": new_id(), "config": {"command": agent("sleeper")}}
    first = server.ask(request)
    kill_core(server)
    again = server.ask(request)
    assert first == again and first["success"]
    agents = server.ask({"type": "list_agents_request"})["agents"]
    assert [each["pid"] for each in agents] == [first["agent_info"]["pid"]]


def test_stdin_is_written_once(server: Server) -> None:
    """More than a pipe holds waits in front of an agent that does not read yet, across two deaths of the core."""
    with LineWire(server.socket_path) as wire:
        late = wire.spawn("echo")
        wire.control(late, "pause")
        sent = b"".join(b"%07d\n" % n for n in range(50_000))
        for start in range(0, len(sent), 100_000):
            wire.control(late, "write_stdin", data=sent[start:start + 100_000].decode())
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        wire.control(late, "resume")
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        wire.control(late, "close_stdin")
        assert wire.output(late) == b"ready\n" + sent


def successor(start_server: Callable[..., Server], server: Server) -> Server:
    """SIGKILL the keeper, and start `serve` on its state directory again."""
    server.process.kill()
    server.process.wait(DEADLINE_SECS)
    return start_server(state_dir=server.state_dir)


def test_a_keeper_dies_and_another_comes(start_server: Callable[..., Server]) -> None:
    """Core and agents are the same; the shell is a new one on the same endpoints; then the core dies as well."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("echo"), wire.spawn("exit_with", 7, ready=False), wire.spawn("sleeper")]
        pid, core = wire.info(ids[0])["pid"], server.pids()["core"]
    heir = successor(start_server, server)
    assert heir.endpoint == server.endpoint and heir.pub_endpoint == server.pub_endpoint
    assert heir.pids()["core"] == core and heir.pids()["keeper"] == heir.process.pid
    assert zmq_answers(heir.endpoint)
    kill_core(heir)
    with LineWire(heir.socket_path) as wire:
        assert wire.info(ids[0])["pid"] == pid and wire.exit(ids[1])["code"] == 7
        wire.control(ids[0], "write_stdin", data="still\n", eof=True)
        assert wire.output(ids[0]) == b"ready\nstill\n"
        record = wire.exit(ids[0])
        assert (record["code"], record["reason"]) in ((0, "exited"), (None, "lost")), "the kernel tells, or nobody does"
    server.process.stdout.close()  # type: ignore[union-attr]


def test_ends_while_there_is_no_core_that_had_lost_its_keeper(start_server: Callable[..., Server],
                                                              request: pytest.FixtureRequest) -> None:
    """Their parent is init then (here: we), which tells nobody; but the new keeper holds what does, of agents old
    and new."""
    if not tells_exit_codes():
        pytest.skip("this kernel does not tell exit codes by pidfd (Linux 6.15)")
    request.addfinalizer(lambda: ctypes.CDLL(None).prctl(36, 0, 0, 0, 0))
    assert become_subreaper()
    server = start_server()
    with LineWire(server.socket_path) as wire:
        old = wire.spawn("print_when")
        trees = [grown(wire, 2, 2)]
    heir = successor(start_server, server)
    with LineWire(heir.socket_path) as wire:
        new = wire.spawn("catcher", 1, 5)
        trees += [grown(wire, 2, 2), grown(wire, 2, 2)]
        pids = [wire.info(each)["pid"] for each in (old, new, trees[0][0], trees[1][0])]
    core = heir.pids()["core"]
    os.kill(core, signal.SIGSTOP)
    os.kill(pids[0], signal.SIGKILL)
    os.kill(pids[1], signal.SIGUSR1)
    for leader in pids[2:]:
        os.kill(leader, signal.SIGTERM)
    wait_until(lambda: states(pids) == {"Z"}, what="the agents to be zombies of the stopped core")
    os.kill(core, signal.SIGKILL)
    for pid in (core, *pids):
        os.waitpid(pid, 0)
    back(heir, "core", core)
    with LineWire(heir.socket_path) as wire:
        assert wire.exit(old)["signal"] == "SIGKILL" and wire.exit(new)["code"] == 5
        wire.control(trees[2][0], "kill")  # its leader runs on
        for each, all_of_it in trees:
            assert wire.exit(each)["reason"] == ("kill" if each == trees[2][0] else "exited")
            wait_until(lambda: states(all_of_it) <= {"", "Z"}, what="its tree to be ended")
            for pid in all_of_it[1:]:
                os.waitpid(pid, 0)
    server.process.stdout.close()  # type: ignore[union-attr]


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

    def __init__(self, start_server: Callable[..., Server], where: Path) -> None:
        self._service = copied(where) / "core" / "service.py"
        self._good = self._service.read_text()
        program = [sys.executable, str(where / "agentserver" / "__main__.py")]
        self.server = start_server("--shutdown-timeout-secs", "1000", program=program, environ={"PYTHONPATH": ""})
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
    os.kill(interrupted.reload("left = inherit("), signal.SIGKILL)
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
