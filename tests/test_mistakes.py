"""A mistake of ours in one place costs that place: one call, one connection, one agent, never the others or the loop.

Owns:    mistakes, put into a copy of the code; and what a lack of descriptors looks like from outside.
Runs in: the test process; the servers are real.
Unaware: of which mistakes there really are.
"""
from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
from support import MAIN, Server, short_dir, wait_until
from test_reload import copied
from wire import LineWire, ZmqWire

from agentserver.core.framing import PREFACE, frame
from agentserver.core.reactor import PAUSE_SECS, READ, Reactor

#: (server with this mistake) = flawed(file, text, its replacement)
Flawed = Callable[[str, str, str], Server]


@pytest.fixture
def flawed(start_server: Callable[..., Server], run_dir: Path) -> Flawed:
    """Start a server whose code has a mistake."""
    def start(file: str, text: str, mistake: str) -> Server:
        package = copied(short_dir(run_dir))
        code = (package / file).read_text()
        assert code.count(text) == 1, f"adapt this test to {file}"
        (package / file).write_text(code.replace(text, mistake))
        return start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    return start


def descriptors(server: Server) -> int:
    """How many descriptors the core has; those of who asks are the same each time."""
    return int(server.ask({"type": "stats_request"})["stats"]["core"]["fds"])


# ---------------------------------------------------------------- the loop

class Loop:
    """A reactor with a clock of its own, and what it said."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.calls: list[str] = []
        self.reactor = Reactor(lambda: self.now)
        self.reactor.say = self.said.append

    def wrong(self, *_: object) -> None:
        """Fail."""
        self.calls.append("wrong")
        raise ValueError("a mistake")

    def right(self, *_: object) -> None:
        """Do well."""
        self.calls.append("right")


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.reactor.close()


def test_a_handler_that_fails_is_called_again_after_a_pause(loop: Loop) -> None:
    ends = [os.pipe() for _ in range(2)]
    try:
        for (read, write), call in zip(ends, (loop.wrong, loop.right)):
            os.write(write, b"x")
            loop.reactor.watch(read, READ, call)
        for _ in range(3):
            loop.reactor.turn(wait=False)
        assert (loop.calls.count("wrong"), loop.calls.count("right")) == (1, 3)
        loop.now += PAUSE_SECS
        for _ in range(3):
            loop.reactor.turn(wait=False)
        assert loop.calls.count("wrong") == 2 and len(loop.said) == 1, "and it is told once"
    finally:
        for fd in sum(ends, ()):
            os.close(fd)


def test_what_is_to_be_waited_for_can_change_while_a_handler_rests(loop: Loop) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"x")
        watch = loop.reactor.watch(read, READ, loop.wrong)
        loop.reactor.turn(wait=False)
        loop.reactor.change(watch, 0)
        loop.now += PAUSE_SECS
        for _ in range(2):
            loop.reactor.turn(wait=False)
        assert loop.calls == ["wrong"]
        loop.reactor.change(watch, READ)
        loop.reactor.turn(wait=False)
        assert loop.calls == ["wrong"] * 2
        loop.reactor.unwatch(watch)
        loop.now += PAUSE_SECS
        loop.reactor.turn(wait=False)
        assert loop.calls == ["wrong"] * 2
    finally:
        os.close(read)
        os.close(write)


def test_each_mistake_is_named_as_what_it_is_and_told_once(loop: Loop) -> None:
    loop.reactor.end_of_turn = loop.wrong
    loop.reactor.on_signal(signal.SIGUSR2, loop.wrong)
    loop.reactor.after(0, loop.wrong)
    loop.reactor.after(0, loop.right)
    loop.reactor.soon(loop.wrong)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGUSR2)
        loop.reactor.turn(wait=False)
    assert "right" in loop.calls and loop.calls.count("wrong") == 3 + 3 + 2
    for what in ("the end of a turn", "the handler of a signal", "a deadline", "a call that was due in this turn"):
        assert sum(said.startswith(f"{what} failed") for said in loop.said) == 1, loop.said
    assert len(loop.said) == 4


# ---------------------------------------------------------------- connections

def test_a_mistake_about_one_connection_ends_that_one(flawed: Flawed) -> None:
    server = flawed("core/connection.py", "        self._role = hello.role\n",
                    "        self._role = {'': 'requests', 'requests': '', 'monitor': 'monitor'}[hello.role]\n")
    before = 0
    for _ in range(5):
        before = before or descriptors(server)
        with server.connect() as link:
            link.sendall(PREFACE + frame(0, b'{"role":"wrong"}', b""))
            assert link.recv(100) == b""
    wait_until(lambda: descriptors(server) <= before + 1, what="all connections to be closed")
    assert server.logs().count("a connection failed") == 1


@pytest.mark.parametrize("mistake", ["raise ValueError('a mistake')", "raise MemoryError"])
@pytest.mark.parametrize("where", ["    reply = yield from self._answer(request, obj, peer)\n",
                                   "self._tell_others(request_id, obj, reply)\n",
                                   "return self._supervisor.standstill.hold(reply)\n"])
def test_a_mistake_about_one_request_is_one_reply(flawed: Flawed, where: str, mistake: str) -> None:
    """Also over the shell's connection, which many share: it is not cut."""
    indent = 8 * " " + " " * (len(where) - len(where.lstrip()))
    server = flawed("core/control.py", 8 * " " + where, f"{indent}if (obj or {{}}).get('request_id') == 'wrong':\n"
                                                        f"{indent}    {mistake}\n{8 * ' '}{where}")
    before, shell = 0, server.pids()["shell"]
    wrong = json.dumps({"type": "list_agents_request", "request_id": "wrong"}).encode()
    with LineWire(server.socket_path) as near, ZmqWire(server.endpoint) as far:
        for wire in (near, far) * 3:
            reply = wire.raw(wrong)
            assert not reply["success"] and reply["error_code"] == "internal"
            assert wire.ok("health_check_request")["healthy"]
            before = before or descriptors(server)
    assert server.pids()["shell"] == shell
    wait_until(lambda: descriptors(server) <= before, what="all connections to be closed")
    assert "a mistake" in server.logs() or "MemoryError" in server.logs()


@pytest.mark.parametrize("part", ["self.supervisor.family.stale()", "self._feed.flush(self._durable)",
                                  "self.reactor.change(self._channel_watch, READ | (WRITE"])
def test_a_turn_that_fails_at_its_end_ends_nobody(flawed: Flawed, part: str) -> None:
    """The loop goes on, and who asks is answered; where nothing can be put on disk, the connection ends."""
    server = flawed("core/service.py", f"        {part}",
                    f"        if os.path.exists('wrong'): 1 / 0\n        {part}")
    core, wrong = server.pids()["core"], server.state_dir / "wrong"
    wrong.touch()
    with LineWire(server.socket_path) as wire, contextlib.suppress(AssertionError):
        wire.ok("spawn_request", config={"command": ["sleep", "1000"]})
        assert "stale" not in part, "what is not on disk is not acknowledged"
    for _ in range(3):
        assert server.ask({"type": "list_agents_request"})["success"]
    wrong.unlink()
    assert server.logs().count("ZeroDivisionError") == 1
    with LineWire(server.socket_path) as wire:
        wire.spawn("sleeper")
    assert server.pids()["core"] == core


# ---------------------------------------------------------------- agents

@pytest.mark.parametrize("where", ["run.drain()\n\n    def _look_again",
                                   "if run.killer is not None:"])
def test_a_mistake_about_the_end_of_one_agent_skips_no_other(flawed: Flawed, where: str) -> None:
    server = flawed("core/ending.py", where, f"if agent.name == 'cursed': 1 / 0\n        {where}")
    core = server.pids()["core"]
    with LineWire(server.socket_path) as wire:
        agents = [wire.spawn("sleeper", name=name) for name in ("one", "cursed", "two")]
        pids = [wire.info(each)["pid"] for each in agents]
    os.kill(core, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # so that all three are reaped in one call
    os.kill(core, signal.SIGCONT)
    with LineWire(server.socket_path) as wire:
        for each in agents:
            assert wire.exit(each)["signal"] == "SIGKILL"
    assert server.pids()["core"] == core


# ---------------------------------------------------------------- descriptors and crowds

def test_without_descriptors_nobody_new_comes_and_nobody_else_notices(server: Server) -> None:
    core = server.pids()["core"]
    with LineWire(server.socket_path) as wire:
        wire.ok("health_check_request")
        limits = resource.prlimit(core, resource.RLIMIT_NOFILE)
        resource.prlimit(core, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{core}/fd")), limits[1]))
        with server.connect() as waiting:
            waiting.sendall(b'{"type":"health_check_request","request_id":"x"}\n')
            wait_until(lambda: "no connection can be accepted" in server.logs(), what="the core to say so")
            for _ in range(100):
                assert wire.ok("health_check_request")["healthy"]
            assert server.logs().count("no connection can be accepted") == 1
            resource.prlimit(core, resource.RLIMIT_NOFILE, limits)
            assert b'"healthy":true' in waiting.recv(65536), "it only waited"


def test_an_idle_crowd_keeps_neither_newcomers_nor_the_shell_out(start_server: Callable[..., Server]) -> None:
    limited = ["/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh", sys.executable, str(MAIN)]
    server = start_server("--max-agents", "10", program=limited)
    shell = server.pids()["shell"]
    with LineWire(server.socket_path) as asks_now_and_then, contextlib.ExitStack() as crowd:
        def more() -> None:
            for _ in range(150):
                crowd.enter_context(wait_until(lambda: connected(server), what="room among those who wait"))
        asks_now_and_then.ok("health_check_request")
        more()
        assert server.ask({"type": "health_check_request"})["healthy"]
        os.kill(shell, signal.SIGKILL)
        more()
        wait_until(lambda: server.pids().get("shell", shell) != shell, what="the next shell")
        with ZmqWire(server.endpoint) as far:
            assert far.ok("health_check_request")["healthy"]
        assert asks_now_and_then.ok("health_check_request")["healthy"], "those who never asked go first"


def connected(server: Server) -> socket.socket | None:
    """Return a new connection, or nothing while too many wait to be accepted."""
    with contextlib.suppress(BlockingIOError):
        return server.connect()
    return None


def test_who_asks_for_much_and_hangs_up_is_closed(start_server: Callable[..., Server]) -> None:
    """What only looks is left undone then, so that there is no reply which could find nobody there."""
    server = start_server()
    before = descriptors(server)
    ask = {"type": "batch_control_command", "command_type": "get_status", "agent_ids": [f"no {n}" for n in range(9000)]}
    for n in range(20):
        with server.connect() as link:
            link.sendall(json.dumps({**ask, "request_id": f"r{n}"}).encode() + b"\n")
    wait_until(lambda: descriptors(server) < before + 10, what="their connections to be closed")  # others come and go
