"""A part of the server that stands still is said to, and then replaced; one that is not to blame is let alone.

Owns:    stopped and traced parts, a keeper that was stopped itself, parts of a version that does not answer.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of how agents are handed over (test_survival.py).
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import DEADLINE_SECS, Server, assert_nothing_left, clean_environ, wait_until
from test_survival import by_request, reload, told
from wire import LineWire, process_state

from agentserver.config import ServerConfig
from agentserver.core.part import Part
from agentserver.core.pulse import ASK_SECS, GAP_SECS, GIVEN_UP_SECS, LEAVE_SECS, START_SECS, Pulse

TURN = 0.5  # seconds between two turns of a keeper whose parts say nothing, as if something else woke it
PTRACE_ATTACH, PTRACE_DETACH = 16, 17


class Asked:
    """The channel of a part that keeps what it is asked."""

    def __init__(self) -> None:
        self.words: list[dict[str, Any]] = []

    def send(self, word: dict[str, Any]) -> None:
        self.words.append(word)


class Watch:
    """A pulse whose clock the test moves, and one part: this process, which nobody may kill."""

    def __init__(self, **ready: object) -> None:
        self.now, self.said = 100.0, list[str]()
        self.part = Part("core", ServerConfig())
        self.part.pid, self.part.ready = os.getpid(), dict(ready)
        self.channel = self.part.channel = Asked()  # type: ignore[assignment]
        self.pulse = Pulse(lambda part, sentence: self.said.append(sentence), lambda: self.now)

    def turn(self, secs: float) -> bool:
        """Let time pass; return whether the part is to be killed."""
        self.now += secs
        return self.pulse.work([self.part]) == [self.part]

    def killed_after(self, most: float) -> float:
        """Return after how many seconds the part is to be killed."""
        began = self.now
        while not self.turn(TURN):
            assert self.now - began < most, "it is not killed"
        return self.now - began


def test_a_part_that_does_not_answer() -> None:
    watch = Watch(answers=True)
    took = watch.killed_after(3 * GIVEN_UP_SECS)
    assert GIVEN_UP_SECS <= took <= GIVEN_UP_SECS + ASK_SECS + 2 * TURN
    assert [sentence.partition(" has ")[0] for sentence in watch.said] == [f"the core (process {os.getpid()})"]
    assert "did not answer" in watch.part.killed and watch.channel.words == [{"ping": 1}], "it is asked once"


def test_a_part_that_answers_lives_on() -> None:
    watch = Watch(answers=True)
    for number in range(1, 100):
        assert not watch.turn(ASK_SECS)
        assert watch.channel.words.pop() == {"ping": number}
        watch.part.hear({"pong": number})
    assert watch.said == []


def test_a_part_that_answers_late_is_said_to() -> None:
    watch = Watch(answers=True)
    while not watch.said:
        assert not watch.turn(TURN)
    watch.part.hear({"pong": watch.channel.words[0]["ping"]})
    assert not watch.turn(TURN) and watch.said[1:] == [""]


def test_a_version_that_does_not_answer_is_not_asked() -> None:
    watch = Watch(server_id="old")
    for _ in range(1000):
        assert not watch.turn(TURN)
    assert watch.channel.words == [] == watch.said and watch.pulse.due([watch.part]) == []


def test_a_part_that_never_begins_to_serve() -> None:
    watch = Watch()
    assert START_SECS <= watch.killed_after(2 * START_SECS) <= START_SECS + 2 * TURN
    assert "begin" in watch.part.killed


def test_a_part_that_was_told_to_leave_and_does_not() -> None:
    watch = Watch(answers=True)
    watch.part.leave()
    assert not watch.channel.words
    assert LEAVE_SECS <= watch.killed_after(2 * LEAVE_SECS) <= LEAVE_SECS + 2 * TURN


def test_a_keeper_that_was_stopped_begins_anew() -> None:
    """Each time all but ten seconds, then a pause of its own."""
    watch = Watch(answers=True)
    for _ in range(5):
        began = watch.now
        while watch.now - began < GIVEN_UP_SECS - TURN:
            assert not watch.turn(TURN)
        assert not watch.turn(ASK_SECS + GAP_SECS + TURN)
        assert watch.part.silent == 0.0


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Be the tracer of a process, which is stopped by it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, pid, None, None):
        pytest.skip("this user may not trace its own processes")
    try:
        os.waitpid(pid, os.WUNTRACED | 0x40000000)  # __WALL
        yield
    finally:
        libc.ptrace(PTRACE_DETACH, pid, None, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_program_that_is_the_shell_is_only_spoken_of(state_dir: Path) -> None:
    code = ("import agentserver as a; a.AgentServer(a.ServerConfig(endpoint='tcp://127.0.0.1:0', "
            f"pub_endpoint='tcp://127.0.0.1:0', state_dir={str(state_dir)!r})).start()")
    program = subprocess.Popen([sys.executable, "-c", code], env=clean_environ(state_dir))

    def stands_still() -> str:
        with LineWire(state_dir / "core.sock") as wire:
            return str(wire.ok("health_check_request")["metadata"]["stands_still"])
    try:
        wait_until((state_dir / "core.sock").exists, what="the core")
        with LineWire(state_dir / "core.sock") as wire:
            wait_until(lambda: wire.ok("health_check_request")["metadata"]["endpoint"], what="the shell")
        program.send_signal(signal.SIGSTOP)
        assert f"process {program.pid}" in wait_until(stands_still, what="the core to see it")
        program.send_signal(signal.SIGCONT)
        wait_until(lambda: not stands_still(), what="the core to see that it goes on")
        assert "runs again" in (state_dir / "core.log").read_text()
    finally:
        program.send_signal(signal.SIGINT)
        program.wait(DEADLINE_SECS)
    assert_nothing_left(str(state_dir))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper and ptrace(2)")
def test_parts_that_stand_still(start_server: Callable[..., Server]) -> None:
    """Four servers at once, as it takes its time: a stopped core, a stopped shell, a core that is traced, and a core
    that is stopped with its keeper."""
    core, shell, traced_core, both = servers = [start_server() for _ in range(4)]
    agents = {}
    for server in servers:
        with LineWire(server.socket_path) as wire:
            agents[server] = wire.spawn("echo")
    before = {server: server.pids() for server in servers}
    with traced(before[traced_core]["core"]):
        for pid in (before[core]["core"], before[shell]["shell"], before[both]["core"], before[both]["keeper"]):
            os.kill(pid, signal.SIGSTOP)
        sentence = wait_until(lambda: told(shell)["stands_still"], what="the core to know of its shell")
        assert "the shell" in sentence and "is stopped" in sentence
        wait_until(lambda: told(core).get("core_pid", "") not in ("", str(before[core]["core"])), what="another core")
        wait_until(lambda: told(shell).get("shell_pid") not in ("", str(before[shell]["shell"])), what="a shell")
        wait_until(lambda: "tracer" in traced_core.logs(), what="the traced one to be spoken of")
        for pid in (before[both]["keeper"], before[both]["core"]):
            os.kill(pid, signal.SIGCONT)
    assert f"process {before[core]['core']}) has not answered" in core.logs()
    assert "did not answer" in told(core)["last_killed"] and "the shell" in told(shell)["last_killed"]
    assert told(shell)["stands_still"] == ""
    wait_until(lambda: "answers again" in traced_core.logs(), what="the traced one to answer")
    for server in servers:
        with LineWire(server.socket_path) as wire:
            wire.control(agents[server], "write_stdin", data="x\n", eof=True)
            assert wire.output(agents[server]) == b"ready\nx\n" and wire.exit(agents[server])["code"] == 0
    assert traced_core.pids() == before[traced_core] and both.pids() == before[both]
    assert process_state(before[shell]["core"]) != "", "a shell that stands still costs no core"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")
def test_a_core_that_stands_still_while_the_server_is_to_end(start_server: Callable[..., Server]) -> None:
    """Another one ends the agents; the time that they may take is not waited out for nothing."""
    server = start_server("--shutdown-timeout-secs", "1000")
    with LineWire(server.socket_path) as wire:
        wire.spawn("sleeper")
    os.kill(server.pids()["core"], signal.SIGSTOP)
    server.process.terminate()
    assert server.process.wait(3 * DEADLINE_SECS) == 0
    assert "did not answer" in server.logs()
    server.close()


def test_a_shell_that_stands_still_while_it_is_to_leave(start_server: Callable[..., Server]) -> None:
    """A reload has told it to; nobody would serve the network as long as it stays."""
    server = start_server()
    shell = server.pids()["shell"]
    os.kill(shell, signal.SIGSTOP)
    reload(server, by_request)
    wait_until(lambda: told(server).get("shell_pid") not in (None, "", str(shell)), 2 * DEADLINE_SECS)
    assert "was told to leave" in told(server)["last_killed"]
