"""A deed is done once, whatever the core dies of, and whoever asked again is told the truth.

Owns:    the moments between what a request begins and its reply: the core is made to die just before and just after
         the system call that does the deed, and the same request is sent again.
Runs in: the test process.
Unaware: of deaths at random moments (chaos/).
"""
from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest
from support import AGENTS, MAIN, Server, agent, wait_until
from test_faults import back
from test_terminals import at_terminal, keys, next_told, told
from wire import Json, LineWire, new_id

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")
MOMENTS = ("before", "after")


class Mortal:
    """A server whose core dies at a given moment of the next request, and what was told by the one after it."""

    def __init__(self, server: Server, dies: Path) -> None:
        self.server, self.dies = server, dies

    def twice(self, message: Json, moment: str) -> Json:
        """Send a request that the core dies of, then the same again to the next core; return the reply."""
        core = self.server.pids()["core"]
        self.dies.write_text(moment)
        with pytest.raises((OSError, EOFError, ValueError)):
            self.server.ask(message)
        assert not self.dies.exists()
        back(self.server, "core", core)
        return self.server.ask(message)


@pytest.fixture
def mortal(start_server: Callable[..., Server], tmp_path: Path) -> Iterator[Mortal]:
    dies = tmp_path / "dies"
    path = f"{AGENTS / 'dying'}:{MAIN.parent.parent}"
    yield Mortal(start_server(environ={"PYTHONPATH": path, "AGENTSERVER_DIES": str(dies)}), dies)


def command(agent_id: str, name: str, **payload: object) -> Json:
    return {"type": "control_command", "request_id": new_id(), "agent_id": agent_id, "command_type": name,
            "payload": payload}


def says(wire: LineWire, agent_id: str, what: bytes) -> int:
    """How often an agent has printed a line."""
    return wire.so_far(agent_id)[0].split(b"\n").count(what)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_spawn(mortal: Mortal, moment: str) -> None:
    request = {"type": "spawn_request", "request_id": new_id(), "config": {"command": agent("sleeper")}}
    reply = mortal.twice(request, moment + " posix_spawn")
    assert reply["success"] and reply["agent_info"]["attempt"] == 1
    other = mortal.server.ask({**request, "config": {"command": agent("sleeper", "else")}})
    assert other["error_code"] == "request_id_conflict", "the contents are compared, whoever began it"
    with LineWire(mortal.server.socket_path) as wire:
        assert [each["id"] for each in wire.agents(all=True)] == [reply["agent_info"]["id"]]
        wait_until(lambda: says(wire, reply["agent_info"]["id"], b"ready") == 1, what="it to be ready")
    assert mortal.server.ask(request) == reply


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_restart_of_one_that_ended(mortal: Mortal, moment: str) -> None:
    with LineWire(mortal.server.socket_path) as wire:
        ended = wire.spawn("exit_with", 3)
        wire.ended(ended)
    reply = mortal.twice(command(ended, "restart"), moment + " posix_spawn")
    assert reply["success"] and reply["data"]["attempt"] == 2
    with LineWire(mortal.server.socket_path) as wire:
        assert wire.exit(ended)["code"] == 3, wire.exit(ended)
        assert wire.info(ended)["attempt"] == 2
        assert len(wire.control(ended, "inspect")["attempts"]) == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_restart_of_one_that_runs(mortal: Mortal, moment: str) -> None:
    with LineWire(mortal.server.socket_path) as wire:
        running = wire.spawn("sleeper")
    reply = mortal.twice(command(running, "restart"), moment + " kill")
    assert reply["success"] and reply["data"]["attempt"] == 2
    with LineWire(mortal.server.socket_path) as wire:
        wait_until(lambda: wire.info(running)["attempt"] == 2 and wire.status(running) == "running", what="attempt 2")
        first, = wire.control(running, "inspect")["attempts"]
        assert first["exit"]["reason"] == "stop" and first["exit"]["by"].startswith("local")


@pytest.mark.parametrize("running", [True, False], ids=["running", "ended"])
def test_an_attempt_has_nothing_of_the_one_before(mortal: Mortal, running: bool) -> None:
    """A core that dies before it has noted the new pid leaves neither the old stop ladder, nor the old time, nor who
    sent which signal to the one before."""
    server = mortal.server
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("catcher", 9, 0, grace_secs=0.3, limits={"runtime_secs": 1000.0})
        wire.control(ref, "signal", signal="SIGUSR1")
        if not running:
            wire.control(ref, "kill")
            wire.ended(ref)
    core, begun = server.pids()["core"], time.monotonic()
    mortal.dies.write_text("after posix_spawn")
    with contextlib.suppress(OSError, ValueError):
        server.ask(command(ref, "restart"))
    wait_until(lambda: not mortal.dies.exists(), what="the core to die at the new attempt")
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.info(ref)["attempt"] == 2 and wire.status(ref) == "running"
        os.kill(wire.info(ref)["pid"], signal.SIGUSR1)
        wait_until(lambda: says(wire, ref, b"SIGUSR1") >= 1 + running, what="the signal to the new attempt")
        assert wire.status(ref) == "running", "it is not ended as the one before was"
        wire.control(ref, "kill")
        record = wire.exit(ref)
        assert record["reason"] == "kill" and record["signal"] == "SIGKILL"
        ticks = 0.02  # the kernel counts starts in hundredths of a second
        assert record["duration"] < time.monotonic() - begun + ticks, "its own time, not that of both"


@pytest.mark.parametrize("name", ["stop", "kill"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_end(mortal: Mortal, name: str, moment: str) -> None:
    """It is carried out, and recorded as what it is, though the core died before it had sent or told anything."""
    with LineWire(mortal.server.socket_path) as wire:
        running = wire.spawn("sleeper")
    reply = mortal.twice(command(running, name), moment + " kill")
    assert reply["success"], reply
    with LineWire(mortal.server.socket_path) as wire:
        record = wire.exit(running)
        assert record["reason"] == name and record["by"].startswith("local") and wire.status(running) == "terminated"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal(mortal: Mortal, moment: str) -> None:
    """Nobody can know whether it was sent, and nobody says so; it is not sent a second time."""
    with LineWire(mortal.server.socket_path) as wire:
        running = wire.spawn("catcher", 9, 0, grace_secs=0.1)
        wait_until(lambda: says(wire, running, b"ready"), what="its handlers")
    reply = mortal.twice(command(running, "signal", signal="SIGUSR1"), moment + " kill")
    assert reply["error_code"] == "unavailable" and "not known" in reply["error"]
    with LineWire(mortal.server.socket_path) as wire:
        wire.control(running, "signal", signal="SIGUSR2")
        wait_until(lambda: says(wire, running, b"SIGUSR2"), what="the second signal")
        assert says(wire, running, b"SIGUSR1") == (moment == "after")


def test_a_restart_that_is_refused_can_be_asked_for_again(mortal: Mortal, tmp_path: Path) -> None:
    """What was begun and then refused is not remembered as done."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    with LineWire(mortal.server.socket_path) as wire:
        ended = wire.ok("spawn_request", config={"command": [str(program)]})["agent_info"]["id"]
        wire.ended(ended)
    program.rename(tmp_path / "away")
    request = command(ended, "restart")
    assert mortal.server.ask(request)["error_code"] == "spawn_failed"
    (tmp_path / "away").rename(program)
    assert mortal.server.ask(request)["data"] == {"attempt": 3}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_spawn_with_a_terminal(mortal: Mortal, moment: str) -> None:
    """One process, on one terminal, of the right size, whether it had begun or not."""
    reply = mortal.twice({"type": "spawn_request", "request_id": new_id(), "config": {
        "command": agent("at_terminal"), "pty": {"rows": 7, "cols": 33}}}, moment + " posix_spawn")
    ref = reply["agent_info"]["id"]
    with LineWire(mortal.server.socket_path) as wire:
        found = next_told(wire, ref, 1)
        assert found["size"] == [7, 33] and found["session"] and found["foreground"] and found["fds"] == [0, 1, 2]
        assert wire.info(ref)["attempt"] == 1 and [each["id"] for each in wire.agents(all=True)] == [ref]
        keys(wire, ref, "typed\n")
        assert next_told(wire, ref, 2) == {"read": "typed\n"}
        wire.control(ref, "resize", rows=8, cols=33)
        assert next_told(wire, ref, 3) == {"size": [8, 33]}
        wire.control(ref, "close_stdin")
        wire.ended(ref)
        assert [line.get("ready") for line in told(wire, ref)] == [True, None, None, None]


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_typed_at_a_terminal(mortal: Mortal, moment: str) -> None:
    with LineWire(mortal.server.socket_path) as wire:
        ref = at_terminal(wire)
    for request, heard in (("write_stdin", {"read": "typed\n"}), ("close_stdin", {"eof": 1})):
        payload = {"data": "typed\n"} if request == "write_stdin" else {}
        assert mortal.twice({"type": "control_command", "request_id": new_id(), "agent_id": ref,
                             "command_type": request, "payload": payload}, moment + " sendfile")["success"]
        with LineWire(mortal.server.socket_path) as wire:
            assert next_told(wire, ref, 2 + (request == "close_stdin")) == heard
    with LineWire(mortal.server.socket_path) as wire:
        wire.ended(ref)
        assert len(told(wire, ref)) == 3
