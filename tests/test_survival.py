"""The server's own death and upgrade are not events in an agent's life.

Owns:    SIGKILL of the core at awkward moments, a keeper's death and its successor; see test_reload.py, too.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of how it is done; the chaos suite does it at random, and counts.
"""
from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable

import pytest
from support import DEADLINE_SECS, MAIN, Server, agent, wait_until
from test_faults import back, zmq_answers
from test_tree import grown
from wire import LineWire, alive, new_id, states

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


@pytest.mark.parametrize("shell", ["stopped", "dead"])
def test_agents_live_on_where_the_next_keeper_cannot_have_the_address_yet(
        shell: str, start_server: Callable[..., Server]) -> None:
    """A stopped shell, or a program of somebody's, has it. The keeper goes on without, and has a shell when it can."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        each, parts = wire.spawn("echo"), server.pids()
        pid = wire.info(each)["pid"]
    port = int(server.endpoint.rpartition(":")[2])
    server.process.kill()
    server.process.wait(DEADLINE_SECS)
    os.kill(parts["shell"], signal.SIGSTOP if shell == "stopped" else signal.SIGKILL)
    with contextlib.ExitStack() as taken:
        if shell == "dead":
            wait_until(lambda: not alive(parts["shell"]), what="the shell to be dead")
            squatter = taken.enter_context(socket.socket())
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wait_until(lambda: bound(squatter, port), what="the port")
            squatter.listen()
            threading.Thread(target=leave_when_missed, args=(server.state_dir / "shell.log", squatter)).start()
        heir = start_server(state_dir=server.state_dir)
    assert heir.endpoint == server.endpoint and heir.pids()["core"] == parts["core"]
    assert zmq_answers(heir.endpoint)
    with LineWire(heir.socket_path) as wire:
        assert wire.info(each)["pid"] == pid
        wire.control(each, "write_stdin", data="still\n", eof=True)
        assert wire.output(each) == b"ready\nstill\n"
    server.process.stdout.close()  # type: ignore[union-attr]


def bound(sock: socket.socket, port: int) -> bool:
    """Try to bind; return whether it is."""
    try:
        sock.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def leave_when_missed(log: Path, squatter: socket.socket) -> None:
    """Let go of an address when a shell has said that it cannot have it."""
    wait_until(lambda: log.exists() and "already listens" in log.read_text(), what="a shell that complains")
    squatter.close()


@pytest.mark.parametrize("happens", [kill_core, lambda server: reload(server, by_signal)], ids=["kill", "reload"])
def test_an_agent_that_asks_to_be_signalled_when_its_parent_dies(server: Server,
                                                                 happens: Callable[[Server], None]) -> None:
    """The kernel sends it when the core ends, and who asks why is told so; other ends are not put down to that."""
    with LineWire(server.socket_path) as wire:
        asked, other = wire.spawn("orphan_signal"), wire.spawn("sleeper")
    happens(server)
    with LineWire(server.socket_path) as wire:
        record = wire.exit(asked)
        assert record["signal"] == "SIGTERM" and record["reason"] == "signaled" and record["by"] is None
        assert "PR_SET_PDEATHSIG" in record["message"]
        wire.control(other, "kill")
        assert "message" not in wire.exit(other)
    said = subprocess.run([sys.executable, str(MAIN), "why", asked], text=True, stdout=subprocess.PIPE,
                          env={**os.environ, "AGENTSERVER_SERVER": f"unix:{server.socket_path}"}).stdout
    assert "PR_SET_PDEATHSIG" in said
