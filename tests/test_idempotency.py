"""The same request again is the same answer, never a second deed: after death of client, shell, core and server.

Owns:    what a client does that got no answer: ask again, with the same request id.
Runs in: the test process; it kills parts of servers that it started.
Unaware: of the contract's simple cases (test_contract.py).
"""
from __future__ import annotations

import json
import os
import signal
from typing import Callable

from support import Server, agent, wait_until
from wire import LineWire, ZmqWire, new_id


def spawn_request(request_id: str, *args: str) -> bytes:
    """Return a spawn of the sleeper as one message."""
    return json.dumps({"type": "spawn_request", "request_id": request_id,
                       "config": {"command": agent("sleeper", *args)}}).encode()


def test_a_client_that_died_before_the_reply(server: Server) -> None:
    request_id = new_id()
    for _ in range(3):
        dying = LineWire(server.socket_path)
        dying.send(spawn_request(request_id))
        dying.close()
    with LineWire(server.socket_path) as wire:
        wait_until(lambda: wire.agents(), what="the spawn that nobody waits for")
        info = wire.raw(spawn_request(request_id))["agent_info"]
        assert [a["id"] for a in wire.agents(all=True)] == [info["id"]]


def test_the_same_request_over_another_link(server: Server) -> None:
    request_id = new_id()
    with LineWire(server.socket_path) as wire, ZmqWire(server.endpoint) as other:
        first = wire.raw(spawn_request(request_id))
        assert other.raw(spawn_request(request_id)) == first and len(wire.agents(all=True)) == 1
        assert other.raw(spawn_request(request_id, "else"))["error_code"] == "request_id_conflict"


def test_pipelined_twins_are_one(server: Server) -> None:
    request_id = new_id()
    with LineWire(server.socket_path) as wire:
        wire.socket.sendall((spawn_request(request_id) + b"\n") * 20)
        replies = [wire.receive() for _ in range(20)]
        assert len(set(replies)) == 1 and len(wire.agents(all=True)) == 1


def test_a_restart_of_the_server_remembers(start_server: Callable[..., Server]) -> None:
    server = start_server()
    spawned, written, stopped = new_id(), new_id(), new_id()
    with LineWire(server.socket_path) as wire:
        first = wire.raw(spawn_request(spawned))
        ref = first["agent_info"]["id"]
        write = {"agent_id": ref, "command_type": "write_stdin", "payload": {"data": "x"}, "request_id": written}
        wrote = wire.ok("control_command", **write)
        stop = {"agent_id": ref, "command_type": "kill", "request_id": stopped}
        killed = wire.ok("control_command", **stop)
        wire.ended(ref)
    server.close()
    server = start_server(state_dir=server.state_dir)
    with LineWire(server.socket_path) as wire:
        assert wire.raw(spawn_request(spawned)) == first, "the same reply, and no second agent"
        assert wire.raw(spawn_request(spawned, "else"))["error_code"] == "request_id_conflict"
        assert wire.ok("control_command", **write) == wrote and wire.ok("control_command", **stop) == killed
        assert len(wire.agents(all=True)) == 1 and wire.agents() == []


def test_a_death_of_the_core_remembers(server: Server) -> None:
    request_id = new_id()
    with LineWire(server.socket_path) as wire:
        first = wire.raw(spawn_request(request_id))
    before = server.pids()["core"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: core_answers(server, before), what="a new core")
    with LineWire(server.socket_path) as wire:
        again = wire.raw(spawn_request(request_id))
        assert again["success"] and again["agent_info"]["id"] == first["agent_info"]["id"]
        assert len(wire.agents(all=True)) == 1


def core_answers(server: Server, before: int) -> bool:
    """Whether a core that is not `before` answers."""
    try:
        return server.pids()["core"] != before
    except (OSError, ValueError):
        return False


def test_a_core_that_dies_with_requests_in_hand(start_server: Callable[..., Server]) -> None:
    """Sent over ZeroMQ while the core dies: each is answered once, each spawn is one agent."""
    server = start_server()
    ids, core = [new_id() for _ in range(30)], int(server.metadata["core_pid"])
    for round_ in range(3):
        with ZmqWire(server.endpoint) as wire:
            for n, each in enumerate(ids[round_ * 10:round_ * 10 + 10]):
                wire.send(spawn_request(each))
                if n == 5:
                    os.kill(core, signal.SIGKILL)
                reply = json.loads(wire.receive())
                assert reply["request_id"] == each and reply["success"], reply
            core = int(wire.ok("health_check_request")["metadata"]["core_pid"])
    with LineWire(server.socket_path) as wire:
        replies = [wire.raw(spawn_request(each)) for each in ids]
        assert len({r["agent_info"]["id"] for r in replies}) == len(ids)
        assert wire.ok("list_agents_request", all=True)["total"] == len(ids)


def test_a_shell_that_dies_with_requests_in_hand(server: Server) -> None:
    """The client library asks again with the same id; here by hand."""
    ids = [new_id() for _ in range(5)]
    for each in ids:
        with ZmqWire(server.endpoint) as wire:
            wire.send(spawn_request(each))
            os.kill(server.pids()["shell"], signal.SIGKILL)

        def answered(request: bytes = spawn_request(each)) -> bool:
            with ZmqWire(server.endpoint) as again:
                again.send(request)
                return again.socket.poll(500) != 0 and json.loads(again.receive())["success"]
        wait_until(answered, what="the new shell")
    with LineWire(server.socket_path) as line:
        assert len(line.agents(all=True)) == len(ids)


def test_shutdown_again_is_the_same_shutdown(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        stubborn = wire.spawn("stubborn", grace_secs=2)
        request_id = new_id()
        first = wire.ok("shutdown_request", request_id=request_id)
        assert wire.ok("shutdown_request", request_id=request_id) == first and stubborn
        wire.refused("request_id_conflict", "shutdown_request", mode="drain", request_id=request_id)
        os.kill(wire.info(stubborn)["pid"], signal.SIGKILL)
    assert server.process.wait(30) == 0
