"""The graceful end: new work refused, agents ended in parallel and in bounded time, exit code 0, nothing left.

Owns:    SIGTERM, SIGINT, `shutdown`, drain and the second Ctrl-C.
Runs in: the test process; servers and agents are real. `Server.close` checks that nothing is left.
Unaware: of how the parts tell each other.
"""
from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from typing import Callable

import pytest
from support import DEADLINE_SECS, MAIN, Server, agent, clean_environ, wait_until
from wire import LineWire, ZmqWire, alive


def history(start_server: Callable[..., Server], server: Server,
            refs: list[str]) -> list[dict]:  # type: ignore[type-arg]
    """Return what the next server on the same directory knows of these agents."""
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        return [wire.info(ref) for ref in refs]


def drained(server: Server) -> bool:
    """Whether the server refuses new work."""
    reply = server.ask({"type": "spawn_request", "config": {"command": agent("exit_with", "0")}})
    return not reply["success"] and reply["error_code"] == "shutting_down"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "unix", "tcp"])
def test_everything_ends_well(start_server: Callable[..., Server], how: str) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        refs = [wire.spawn("sleeper"), wire.spawn("catcher", 1, 0), wire.spawn("stubborn", grace_secs=0.3),
                wire.spawn("tree", 2, 2), wire.spawn("daemoniser", "wait", "clear", grace_secs=0.3),
                wire.spawn("sleeper")]
        wire.control(refs[5], "pause")
        pids = [wire.info(ref)["pid"] for ref in refs] + json.loads(wire.lines(refs[3], 2)[1])
        pids.append(int(wire.lines(refs[4], 2)[1]))
        if how == "unix":
            reply = wire.ok("shutdown_request")
            assert reply["type"] == "shutdown_response"
    if how == "tcp":
        with ZmqWire(server.endpoint) as over:
            over.ok("shutdown_request")
    if how.startswith("SIG"):
        server.process.send_signal(getattr(signal, how))
    assert server.process.wait(30) == 0
    assert not [pid for pid in pids if alive(pid)]
    server.close()
    infos = history(start_server, server, refs)
    assert {info["status"] for info in infos} == {"terminated"}
    assert {info["exit"]["reason"] for info in infos} == {"shutdown"}
    assert infos[1]["exit"]["code"] == 0 and infos[2]["exit"]["signal"] == "SIGKILL"
    # with its environment cleared and among others, the daemon is named by the last agent that could have started it
    assert pids[-1] in [left["pid"] for info in infos for left in info["exit"]["leaked"]]


def test_an_empty_server_ends_at_once(start_server: Callable[..., Server]) -> None:
    server = start_server()
    parts = server.pids()
    server.close()
    assert not any(map(alive, parts.values())) and not list(server.state_dir.glob("*.sock"))


def test_new_work_is_refused_meanwhile_and_the_rest_served(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire, ZmqWire(server.endpoint) as over:
        stubborn = wire.spawn("stubborn", grace_secs=1000)
        done = wire.spawn("exit_with", 0)
        wire.ended(done)
        wire.ok("shutdown_request")
        for each in (wire, over):
            sentence = each.refused("shutting_down", "spawn_request", config={"command": agent("sleeper")})
            assert "shut" in sentence or "end" in sentence
            each.cannot("shutting_down", done, "restart")
            assert each.status(stubborn) == "running" and each.ok("health_check_request")["active_agents"] == 1
        wire.control(stubborn, "kill")
    assert server.process.wait(30) == 0


def test_time_is_bounded(start_server: Callable[..., Server]) -> None:
    """Whatever the agents' own grace: at shutdown_timeout_secs all is killed."""
    server = start_server("--shutdown-timeout-secs", "1")
    with LineWire(server.socket_path) as wire:
        refs = [wire.spawn("stubborn", grace_secs=1000) for _ in range(5)]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    server.close()
    infos = history(start_server, server, refs)
    assert {(i["exit"]["signal"], i["exit"]["reason"]) for i in infos} == {("SIGKILL", "shutdown")}


def test_the_shutdowns_own_grace(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        refs = [wire.spawn("stubborn", grace_secs=1000)]
        wire.ok("shutdown_request", grace_secs=0.1)
    assert server.process.wait(30) == 0
    assert history(start_server, server, refs)[0]["exit"]["signal"] == "SIGKILL"


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_hurries(start_server: Callable[..., Server], first: str, second: str) -> None:
    server = start_server("--shutdown-timeout-secs", "1000")
    with LineWire(server.socket_path) as wire:
        refs = [wire.spawn("stubborn", grace_secs=1000)]
    server.process.send_signal(getattr(signal, first))
    wait_until(lambda: drained(server), what="the end to begin")
    assert server.process.poll() is None
    server.process.send_signal(getattr(signal, second))
    assert server.process.wait(30) == 0
    server.close()
    assert history(start_server, server, refs)[0]["exit"]["signal"] == "SIGKILL"


def test_ctrl_c_in_a_terminal_reaches_every_process_of_the_group(start_server: Callable[..., Server]) -> None:
    """A terminal sends SIGINT to all of them at once; that is one Ctrl-C, not three."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        refs = [wire.spawn("catcher", 1, 0), wire.spawn("exit_with", 3)]
        wire.ended(refs[1])
    for pid in server.pids().values():
        os.kill(pid, signal.SIGINT)
    assert server.process.wait(30) == 0
    server.close()
    infos = history(start_server, server, refs)
    assert infos[0]["exit"]["code"] == 0 and infos[0]["exit"]["reason"] == "shutdown", "SIGTERM, not SIGINT, reached it"
    assert infos[1]["exit"]["code"] == 3


def test_drain_lets_agents_finish(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        told = wire.spawn("print_when")
        wire.ok("shutdown_request", mode="drain")
        wire.refused("shutting_down", "spawn_request", config={"command": agent("sleeper")})
        assert wire.status(told) == "running" and wire.ok("health_check_request")["healthy"] in (True, False)
        wire.control(told, "write_stdin", data="out in peace\nexit 5\n")
    assert server.process.wait(30) == 0
    server.close()
    info = history(start_server, server, [told])[0]
    assert info["status"] == "failed" and info["exit"]["code"] == 5 and info["exit"]["reason"] == "exited"


def test_drain_of_an_idle_server_ends_it(start_server: Callable[..., Server]) -> None:
    server = start_server()
    server.ask({"type": "shutdown_request", "mode": "drain"})
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("how", ["signal", "request"])
def test_a_drain_can_be_cut_short(start_server: Callable[..., Server], how: str) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper")
        wire.ok("shutdown_request", mode="drain")
        if how == "request":
            wire.ok("shutdown_request", mode="graceful")
    if how == "signal":
        server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    server.close()
    assert history(start_server, server, [sleeper])[0]["exit"]["reason"] == "shutdown"


def test_subscribers_are_told(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper")
        wire.subscribe("server", f"status.{sleeper}")
        with LineWire(server.socket_path) as other:
            other.ok("shutdown_request")
        wire.event(lambda e: e["topic"] == "server" and e.get("state") in ("draining", "down"))
        wire.event(lambda e: e["topic"].startswith("status.") and e["status"] == "terminated")
        wire.event(lambda e: e["topic"] == "server" and e.get("state") == "down")
    assert server.process.wait(30) == 0


def test_output_of_the_last_moment_is_kept(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        catcher = wire.spawn("catcher", 1, 0)
    server.close()
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.output(catcher) == b"ready\nSIGTERM\nbye\n"


def test_an_end_with_a_dead_shell_or_core(start_server: Callable[..., Server]) -> None:
    for part in ("shell", "core"):
        server = start_server()
        with LineWire(server.socket_path) as wire:
            wire.spawn("sleeper")
        os.kill(server.pids()[part], signal.SIGKILL)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        server.close()


def test_many_agents_end_in_parallel(start_server: Callable[..., Server]) -> None:
    """Forty ladders of a grace of 0.5 s each would be 20 s one after the other; the bound is 5."""
    server = start_server("--shutdown-timeout-secs", "5")
    with LineWire(server.socket_path) as wire:
        refs = [wire.spawn("stubborn", grace_secs=0.5, ready=False) for _ in range(40)]
        for ref in refs:
            wire.until_output(ref, b"ready\n")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    server.close()
    stamps = [info["exit"]["at"] for info in history(start_server, server, refs)]
    assert len(stamps) == 40


@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_the_command_ends_a_server_that_cannot_write_it_down(start_server: Callable[..., Server], link: str) -> None:
    """The disk is full: the reply would promise what is not on it, so it never comes; the end does."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        pid = wire.info(wire.spawn("stubborn", grace_secs=3))["pid"]
    resource.prlimit(server.pids()["core"], resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    address = server.endpoint if link == "tcp" else f"unix:{server.state_dir}"
    done = subprocess.run([sys.executable, str(MAIN), "--server", address, "shutdown"], capture_output=True, text=True,
                          timeout=DEADLINE_SECS, env=clean_environ(server.state_dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert server.process.wait(DEADLINE_SECS) == 0 and not alive(pid)
