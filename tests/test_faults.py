"""Parts of the server die, stall and come back; agents, bytes and answers do not get lost.

Owns:    SIGKILL and SIGSTOP of shell, core and keeper, amid work.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of how the keeper does it.
"""
from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Callable

import zmq
from support import Server, marked_processes, wait_until
from wire import LineWire, ZmqWire, alive, data_of, new_id


def back(server: Server, part: str, before: int) -> int:
    """Wait for a new process of `part`, and return its pid."""
    def new() -> int:
        try:
            pid = server.pids().get(part, 0)
        except (OSError, ValueError):
            return 0
        return pid if pid != before and pid and alive(pid) else 0
    return wait_until(new, what=f"a new {part}")


def zmq_answers(endpoint: str) -> bool:
    """Whether a fresh REQ socket gets an answer within a second."""
    with ZmqWire(endpoint) as wire:
        wire.send(b'{"type":"health_check_request","request_id":"x"}')
        return wire.socket.poll(1000) != 0 and json.loads(wire.receive())["success"]


def test_shell_killed_amid_twenty_busy_agents(server: Server, tmp_path: Path) -> None:
    """Nothing happens to any agent; every byte is accounted for; endpoints stay; a client goes on."""
    from agentserver import AgentClient
    with LineWire(server.socket_path) as wire:
        agents = {wire.spawn("lines", 0, 2000, tmp_path / f"sums{n}"): tmp_path / f"sums{n}" for n in range(20)}
        answers, going = [], True

        def ask() -> None:
            with AgentClient(server.endpoint) as client:
                while going:
                    answers.append(client.health().healthy)
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(3):
                shell = server.pids()["shell"]
                ends = {each: wire.info(each)["output"]["stdout"]["end_offset"] for each in agents}
                os.kill(shell, signal.SIGKILL)
                back(server, "shell", shell)
                wait_until(lambda: zmq_answers(server.endpoint), what="the new shell to answer")
                for each, end in ends.items():
                    wait_until(lambda: wire.info(each)["output"]["stdout"]["end_offset"] > end,
                               what="an agent to go on")
            count = len(answers)
            wait_until(lambda: len(answers) > count, what="the client to go on")
        finally:
            going = False
            asking.join()
        assert all(answers)
        health = wire.ok("health_check_request")
        assert health["metadata"]["endpoint"] == server.endpoint and health["active_agents"] == 20
        assert health["metadata"]["pub_endpoint"] == server.pub_endpoint
        for each in agents:
            wire.control(each, "stop")
        for each, sums in agents.items():
            record = wire.exit(each)
            assert record["code"] == 0 and record["reason"] == "stop"
            out, err = wire.output(each), wire.output(each, "stderr")
            assert sums.read_text().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                                str(len(err)), hashlib.sha256(err).hexdigest()]
            assert wire.info(each)["attempt"] == 1


def test_core_killed(server: Server) -> None:
    """Agents do not notice; the whole tree can still be ended; history, counters and service go on."""
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("burst", 1000, 10)
        wire.ended(ended)
        before_output, uptime = wire.output(ended), wire.ok("health_check_request")["uptime_secs"]
        requests = wire.ok("stats_request")["stats"]["requests"]
        ids = [wire.spawn("sleeper"), wire.spawn("stubborn", grace_secs=0.2), wire.spawn("tree", 2, 2, "ignore"),
               wire.spawn("daemoniser", "wait", "keep"), wire.spawn("daemoniser", "wait", "clear"), wire.spawn("echo")]
        leaders = [wire.info(each)["pid"] for each in ids]
        pids = leaders + json.loads(wire.lines(ids[2], 2)[1]) + [int(wire.lines(each, 2)[1]) for each in ids[3:5]]
        wire.control(ids[1], "pause")
        wire.control(ids[5], "write_stdin", data="before\n")
        events = wire.ok("events_request")["events"]
    core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert [wire.info(each)["pid"] for each in ids] == leaders and all(map(alive, pids))
        assert wire.status(ids[1]) == "paused"
        wire.control(ids[5], "write_stdin", data="after\n", eof=True)
        assert wire.output(ids[5]) == b"ready\nbefore\nafter\n" and wire.exit(ids[5])["code"] == 0
        for each in ids[:5]:
            wire.control(each, "stop", grace_secs=0.2)
        for each in ids[:5]:
            assert wire.exit(each)["reason"] == "stop"
        wait_until(lambda: not any(map(alive, pids)), what="every tree to be gone")
        named = {left["pid"] for each in ids for left in wire.exit(each)["leaked"]}
        assert named >= set(pids) - set(leaders)
        assert wire.output(ended) == before_output and wire.info(ended)["exit"]["code"] == 0
        page = wire.ok("events_request")["events"]
        assert page[:len(events)] == events and [e["sequence"] for e in page] == list(range(1, len(page) + 1))
        health = wire.ok("health_check_request")
        assert health["uptime_secs"] > uptime and health["active_agents"] == 0
        assert wire.ok("stats_request")["stats"]["requests"] > requests, "counters are the server's"
    assert zmq_answers(server.endpoint)


def test_core_killed_many_times(server: Server) -> None:
    """With backoff, but it comes back."""
    for _ in range(4):
        core = server.pids()["core"]
        os.kill(core, signal.SIGKILL)
        back(server, "core", core)
        with LineWire(server.socket_path) as wire:
            wire.spawn("exit_with", 0)
    assert zmq_answers(server.endpoint)


def test_core_and_shell_killed_together(server: Server) -> None:
    pids = server.pids()
    os.kill(pids["core"], signal.SIGKILL)
    os.kill(pids["shell"], signal.SIGKILL)
    back(server, "core", pids["core"])
    wait_until(lambda: zmq_answers(server.endpoint), what="both to be back on the same endpoint")


def test_subscribers_are_served_after_a_death_of_the_core(server: Server) -> None:
    """A PUB subscriber stays connected to the shell and sees what comes after."""
    context = zmq.Context()
    sub = context.socket(zmq.SUB)
    try:
        sub.linger, sub.rcvtimeo = 0, 30_000
        sub.connect(server.pub_endpoint)
        sub.subscribe(b"status.")
        wait_until(lambda: published(server, sub), what="the subscription to work")
        core = server.pids()["core"]
        os.kill(core, signal.SIGKILL)
        back(server, "core", core)
        wait_until(lambda: published(server, sub), what="events of the new core")
    finally:
        sub.close()
        context.term()


def published(server: Server, sub: zmq.Socket) -> bool:  # type: ignore[type-arg]
    """Whether the end of a fresh agent arrives at `sub` within half a second."""
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("exit_with", 0, ready=False)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            if sub.poll(100) and sub.recv_multipart()[0] == b"status." + each.encode():
                return True
    return False


def test_a_stalled_core_delays_and_loses_nothing(server: Server) -> None:
    core = server.pids()["core"]
    with LineWire(server.socket_path) as line, ZmqWire(server.endpoint) as wire:
        told = line.spawn("print_when")
        os.kill(core, signal.SIGSTOP)
        try:
            request = json.dumps({"type": "health_check_request", "request_id": "waits"}).encode()
            wire.send(request)
            line.send(request)
            assert wire.socket.poll(300) == 0, "nobody answers for the core"
        finally:
            os.kill(core, signal.SIGCONT)
        assert json.loads(wire.receive())["request_id"] == "waits"
        assert json.loads(line.receive())["request_id"] == "waits"
        assert server.pids()["core"] == core, "stalled is not dead"
        line.control(told, "write_stdin", data="out still here\nexit 0\n")
        assert line.output(told) == b"ready\nstill here\n"


def test_a_core_that_stays_away_is_unavailable(start_server: Callable[..., Server]) -> None:
    server = start_server("--request-timeout-secs", "1")
    core = server.pids()["core"]
    with ZmqWire(server.endpoint) as wire:
        os.kill(core, signal.SIGSTOP)
        try:
            request_id = new_id()
            wire.send(json.dumps({"type": "list_agents_request", "request_id": request_id}).encode())
            reply = json.loads(wire.receive())
        finally:
            os.kill(core, signal.SIGCONT)
        assert reply["error_code"] == "unavailable" and reply["request_id"] == request_id, reply
        assert len(reply["error"]) > 10 and reply["success"] is False
        wait_until(lambda: wire.ask("health_check_request")["success"], what="service to go on")


def test_keeper_killed(start_server: Callable[..., Server]) -> None:
    """Shell and core go on; `shutdown` ends all."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper")
        daemoniser = wire.spawn("daemoniser", "wait", "keep")
        server.process.kill()
        server.process.wait()
        assert wire.ok("health_check_request")["active_agents"] == 2 and wire.status(sleeper) == "running"
        assert zmq_answers(server.endpoint)
        quick = wire.spawn("exit_with", 3)
        assert wire.exit(quick)["code"] == 3
        wire.control(daemoniser, "kill")
        assert len(wire.exit(daemoniser)["leaked"]) == 1
        wire.ok("shutdown_request")
    wait_until(lambda: not marked_processes(server.mark), what=f"the end of {marked_processes(server.mark)}")
    again = start_server(state_dir=server.state_dir)
    with LineWire(again.socket_path) as wire:
        assert wire.info(sleeper)["exit"]["reason"] == "shutdown"


def test_keeper_stalled(server: Server) -> None:
    """Its children do not need it to serve."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        with LineWire(server.socket_path) as wire:
            assert wire.exit(wire.spawn("exit_with", 1))["code"] == 1
        assert zmq_answers(server.endpoint)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_a_core_that_cannot_start_again_says_why(start_server: Callable[..., Server]) -> None:
    """With its registry gone bad meanwhile the server either goes on or ends; it does not spin in silence."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        wire.ended(wire.spawn("exit_with", 0))
    core = server.pids()["core"]
    moved = server.state_dir / "agents.away"
    os.kill(core, signal.SIGSTOP)
    (server.state_dir / "agents").rename(moved)
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("exit_with", 0)
        assert wire.output(each) == b"ready\n"


def test_strangers_are_reaped(server: Server) -> None:
    """Orphans of other origin come to a subreaper too; they must not pile up as zombies."""
    with LineWire(server.socket_path) as wire:
        script = "echo ready; for i in 1 2 3 4 5; do (sleep 0.05 &) ; done; sleep 1000"
        forker = wire.spawn("", command=["/bin/sh", "-c", script])
        assert wire.ok("stats_request")
        ours = set(server.pids().values())

        def zombies() -> list[str]:
            found = []
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[0] == "Z" and int(fields[1]) in ours:
                    found.append(pid)
            return found
        pid = wire.info(forker)["pid"]
        wait_until(lambda: str(wire.control(forker, "inspect")["tree"]).count("sleep") <= 1 and alive(pid))
        wait_until(lambda: not zombies(), what="strangers to be reaped")


def test_a_flood_over_zeromq_reads_back_whole(server: Server, tmp_path: Path) -> None:
    """Reading through the shell while it is killed: offsets make it whole."""
    with LineWire(server.socket_path) as line:
        lines = line.spawn("lines", 50_000, 0, tmp_path / "sums")
        line.ended(lines)
        text, offset, killed = b"", 0, False
        while True:
            try:
                with ZmqWire(server.endpoint) as wire:
                    wire.socket.rcvtimeo = 2000
                    while True:
                        chunk = wire.read(lines, offset=offset)
                        text += data_of(chunk)
                        offset = chunk["next_offset"]
                        if chunk["eof"]:
                            break
                        if offset > 300_000 and not killed:
                            killed = True
                            os.kill(server.pids()["shell"], signal.SIGKILL)
                break
            except zmq.Again:
                continue
        assert killed and hashlib.sha256(text).hexdigest() == (tmp_path / "sums").read_text().split()[1]
