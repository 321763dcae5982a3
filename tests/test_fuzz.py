"""10,000 random and mutated messages; the server answers each, and a good one after it.

Owns:    a fixed, printed seed; mutation of every kind of request; the count of replies.
Runs in: the test process; the server is real and a fresh one.
Unaware: of what is wrong with a message: any answer will do but `internal`, silence, or two.
"""
from __future__ import annotations

import json
import os
import random
from typing import Callable

import pytest
from support import Server, agent
from wire import LineWire, Wire, ZmqWire, checked, new_id

SEED = int(os.environ.get("FUZZ_SEED", "20261123"))
MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "10000"))
BATCH = 50
ODD = [None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1, -2 ** 63, 1e308, 0.5, "", "\0", "\ud800", "x" * 300,
       "é", [], [None], [[]], {}, {"": None}, ["a", 1], {"a": {"b": []}}, "running", "SIGTERM", "*", "../../etc"]


def corpus(ref: str, finished: str) -> list[dict]:  # type: ignore[type-arg]
    """Return one of every request (but a proper shutdown), all of them in order."""
    commands = {
        "pause": {}, "resume": {}, "stop": {"grace_secs": 1000}, "get_status": {}, "inspect": {}, "stream_logs": {},
        "write_stdin": {"data": "x", "encoding": "utf-8"}, "read_stdout": {"offset": 0, "max_bytes": 10},
        "read_stderr": {"times": True}, "signal": {"signal": "SIGWINCH"}, "resize": {"rows": 1, "cols": 1},
        "custom_action": {"action": "ping"}, "restart": {}, "remove": {}, "kill": {},
        "query_output": {"max_lines": 3, "stdout": True, "stderr": False}}
    spawn = {"command": ["/nonexistent/x", "y"], "name": "n", "environment": {"A": "b"}, "labels": {"a": "b"},
             "cwd": "/", "stdin": "pipe", "grace_secs": 1, "limits": {"runtime_secs": 5}, "task": "t", "model": "m"}
    return [
        {"type": "health_check_request"}, {"type": "stats_request"},
        {"type": "spawn_request", "config": spawn, "timeout_secs": 5, "metadata": {"k": [1]}},
        {"type": "spawn_request", "config": {"model_backend": "nonsense-backend", "task": "x", "tool_level": "full"}},
        {"type": "list_agents_request", "filter_status": "running", "limit": 5, "offset": 0, "labels": {}, "all": True},
        {"type": "events_request", "since": 0, "limit": 3, "agent_id": ref},
        {"type": "subscribe_request", "topics": ["nothing"], "since": 0},
        {"type": "custom_action_request", "agent_id": ref, "action": "echo", "params": {"m": 1}, "timeout_secs": 1},
        {"type": "batch_control_command", "agent_ids": [ref, finished], "command_type": "get_status", "payload": {}},
        {"type": "batch_control_command", "labels": {"no": "such"}, "command_type": "pause", "fail_fast": True},
        {"type": "output_query_request", "agent_id": ref, "stream": "both", "filter": "(rea|x)dy?", "limit": 3,
         "offset": 0, "tail": True},
        {"type": "shutdown_request", "mode": "no such mode"},
        *({"type": "control_command", "agent_id": finished if name in ("kill", "stop", "restart", "remove", "signal")
           else ref, "command_type": name, "payload": payload} for name, payload in commands.items()),
    ]


def mutate_value(rng: random.Random, value: object) -> object:
    """Change one place somewhere inside a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        how = rng.random()
        if how < 0.15:
            del changed[key]
        elif how < 0.25:
            changed[str(rng.choice(ODD))[:20]] = changed[key]
        else:
            changed[key] = mutate_value(rng, changed[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], mutate_value(rng, value[place]), *value[place + rng.randrange(2):]]
    return rng.choice(ODD)


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flip, cut, repeat or insert a few bytes."""
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(data) + 1)
        how = rng.randrange(5)
        if how == 0 and place < len(data):
            data[place] = rng.randrange(256)
        elif how == 1:
            del data[place:place + rng.randrange(1, 9)]
        elif how == 2:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif how == 3:
            data[place:place] = data[place:place + rng.randrange(40)]
        else:
            data[place:place] = rng.choice([b"{", b"[", b'"', b"\\", b",", b":", b"}", b"]", b"null", b"1e9",
                                            b"\\u0000"])
    return bytes(data)


def messages(rng: random.Random, seeds: list[dict], count: int) -> list[bytes]:  # type: ignore[type-arg]
    """Return `count` messages: noise, proper ones, and mutations of values and of bytes."""
    made = []
    while len(made) < count:
        kind = rng.random()
        message = {"request_id": str(rng.randrange(10 ** 9)), **rng.choice(seeds)}
        if kind < 0.1:
            raw = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        else:
            if kind < 0.7:
                for _ in range(rng.randrange(1, 4)):
                    message = mutate_value(rng, message)  # type: ignore[assignment]
            raw = json.dumps(message).encode()
            if kind > 0.6:
                raw = mutate_bytes(rng, raw)
        if b"shutdown" not in raw or b"no such mode" in raw:
            made.append(raw.replace(b"\n", b" "))
    return made


def fit_for_service(server: Server, wire: Wire, before: dict) -> None:  # type: ignore[type-arg]
    """The same core as before answers, nothing is in its log, memory is in bounds."""
    assert server.pids() == before, "a part of the server died of it"
    assert "Traceback" not in server.logs()
    assert wire.ok("stats_request")["stats"]["core"]["rss_bytes"] < 150 * 1024 * 1024


@pytest.fixture
def ready_server(start_server: Callable[..., Server]) -> tuple[Server, list[dict]]:  # type: ignore[type-arg]
    """A server with one agent that lives and one that does not, and the corpus for it."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        living, finished = wire.spawn("echo", name="living"), wire.spawn("exit_with", 0)
        wire.ended(finished)
    return server, corpus(living, finished)


def test_ten_thousand_messages_and_an_answer_after_each(ready_server) -> None:  # type: ignore[no-untyped-def]
    server, seeds = ready_server
    before = server.pids()
    print(f"seed {SEED}, {MESSAGES} messages")
    made = messages(random.Random(SEED), seeds, MESSAGES)
    with LineWire(server.socket_path) as wire:
        for start in range(0, MESSAGES, BATCH):
            batch = made[start:start + BATCH]
            health = {f"health-{start + i}" for i in range(len(batch))}
            for raw, each in zip(batch, sorted(health)):
                wire.send(raw + b"\n" + json.dumps({"type": "health_check_request", "request_id": each}).encode())
            answered = set()
            for _ in range(2 * len(batch)):
                reply = checked(json.loads(wire.receive()))
                assert reply.get("error_code") != "internal", (reply, batch)
                if reply["request_id"] in health:
                    assert reply["success"] and reply["request_id"] not in answered, reply
                    answered.add(reply["request_id"])
            assert answered == health, batch
        assert wire.socket is not None
        wire.events.clear()
    with LineWire(server.socket_path) as wire:
        fit_for_service(server, wire, before)
        assert wire.spawn("exit_with", 0, ready=False)


def test_hundreds_over_zeromq(ready_server) -> None:  # type: ignore[no-untyped-def]
    server, seeds = ready_server
    before = server.pids()
    rng = random.Random(SEED + 1)
    print(f"seed {SEED + 1}")
    with ZmqWire(server.endpoint) as wire:
        for raw in messages(rng, seeds, 500):
            if rng.random() < 0.1:
                wire.socket.send_multipart([raw, raw[:10]])
                reply = checked(json.loads(wire.receive()))
            else:
                reply = wire.raw(raw)
            assert reply.get("error_code") != "internal", (reply, raw)
            assert wire.ok("health_check_request")["healthy"]
        fit_for_service(server, wire, before)


def test_noise_in_place_of_frames(ready_server) -> None:  # type: ignore[no-untyped-def]
    """A peer that claims to be a shell and then speaks nonsense is cut off; the others are served."""
    server, _ = ready_server
    before = server.pids()
    rng = random.Random(SEED + 2)
    for _ in range(50):
        with LineWire(server.socket_path) as noisy:
            noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400)))
            try:
                noisy.socket.sendall(b"AGENTSERVER/1 FRAMES\n" + noise)
            except OSError:
                pass
    with LineWire(server.socket_path) as wire:
        fit_for_service(server, wire, before)


def test_spawns_stay_bounded_when_everything_is_asked_at_once(ready_server) -> None:  # type: ignore[no-untyped-def]
    server, _ = ready_server
    with LineWire(server.socket_path) as wire:
        ids = [new_id() for _ in range(60)]
        for each in ids:
            wire.send(json.dumps({"type": "spawn_request", "request_id": each,
                                  "config": {"command": agent("exit_with", "0")}}).encode())
        replies = {r["request_id"]: r for r in (json.loads(wire.receive()) for _ in ids)}
        assert set(replies) == set(ids) and all(r["success"] for r in replies.values())
        for reply in replies.values():
            assert wire.exit(reply["agent_info"]["id"])["code"] == 0
