"""What one request may cost: bounds before the work, replies bounded while they are made, large work in steps.

Owns:    the bounds of a request, batches that are long or large, and who is served while one is at work.
Runs in: the test process; the servers are real. Work is counted, not timed: bench/waiting.py measures.
Unaware: of our client library.
"""
from __future__ import annotations

import json
import os
import random
import select
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from support import AGENTS, MAIN, Server, wait_until
from test_faults import back
from wire import LineWire, ZmqWire, new_id

from agentserver import wire as strict
from agentserver.core.batch import Batch, Work
from agentserver.core.registry import ATTEMPTS_MOST, Ask, Registry
from agentserver.core.scheduler import Pace

HEALTH = b'{"type":"health_check_request","request_id":"h"}'
TRUE = ["/bin/true"]
MIB = 1024 * 1024
Json = dict  # type: ignore[type-arg]


# ---------------------------------------------------------------- how many values

def separators(raw: bytes) -> int:
    """Count commas and opening brackets outside texts, byte by byte."""
    count, inside, escaped = 0, False, False
    for byte in raw.decode("latin-1"):
        if inside:
            inside, escaped = escaped or byte != '"', byte == "\\" and not escaped
        elif byte == '"':
            inside = True
        else:
            count += byte in ",[{"
    return count


def some_json(dice: random.Random, depth: int = 0) -> Any:
    """Return a value whose texts hold what a counter could take for something else."""
    if depth > 4 or dice.random() < 0.4:
        return "".join(dice.choice(['"', "\\", ",", "[", "{", "a", "\n", "é"]) for _ in range(dice.randrange(12)))
    if dice.random() < 0.5:
        return [some_json(dice, depth + 1) for _ in range(dice.randrange(6))]
    return {str(some_json(dice, 9)): some_json(dice, depth + 1) for _ in range(dice.randrange(6))}


@pytest.mark.parametrize("seed", range(200))
def test_values_are_counted_outside_texts(seed: int) -> None:
    dice = random.Random(seed)
    raw = json.dumps(some_json(dice), ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 1])).encode()
    count = separators(raw)
    assert not strict.too_many(raw, count)
    assert count == 0 or strict.too_many(raw, count - 1), raw


@pytest.mark.parametrize("body", [
    b"[" + b"1," * 5_000_000 + b"1]", b"[" + b"[]," * 3_000_000 + b"[]]",
    b"{" + b",".join(b'"%d":1' % n for n in range(800_000)) + b"}", b"[" + b'"",' * 3_000_000 + b'""]',
], ids=["numbers", "lists", "names", "texts"])
def test_a_message_of_very_many_values_is_refused_unread(unix: LineWire, body: bytes) -> None:
    reply = unix.raw(HEALTH[:-1] + b',"x":' + body + b"}")
    assert (reply["error_code"], reply["request_id"], reply["type"]) == ("bad_request", "h", "health_check_response")
    assert "100000 values" in reply["error"]
    reply = unix.raw(b'{"x":' + body + b"," + HEALTH[1:])
    assert (reply["error_code"], reply["request_id"]) == ("bad_request", "h"), "what it is may stand at the end, too"


@pytest.mark.parametrize("text", [b",[{" * 3_000_000, b"\\\\" * 4_000_000, b'\\",' * 3_000_000],
                         ids=["plain", "backslash", "mark"])
def test_a_text_may_hold_any_number_of_what_looks_like_values(unix: LineWire, text: bytes) -> None:
    assert unix.raw(HEALTH[:-1] + b',"x":"' + text + b'"}')["success"]


# ---------------------------------------------------------------- bounds of a request

LABELS = {f"l{n}": "" for n in range(1000)}
BOUNDS: dict[str, tuple[str, Json]] = {
    "argv": ("bad_request", {"config": {"command": ["x"] * 10_001}}),
    "variables": ("bad_request", {"config": {"command": TRUE, "environment": {f"N{n}": "" for n in range(10_001)}}}),
    "labels": ("bad_request", {"config": {"command": TRUE, "labels": {**LABELS, "more": ""}}}),
    "label name": ("bad_request", {"config": {"command": TRUE, "labels": {"k" * 257: ""}}}),
    "label": ("bad_request", {"config": {"command": TRUE, "labels": {"k": "v" * 257}}}),
    "PATH": ("bad_request", {"config": {"command": ["x"], "environment": {"PATH": "/" + "x" * 65_536}}}),
    "directories": ("bad_request", {"config": {"command": ["x"], "environment": {"PATH": ":".join(["/x"] * 1001)}}}),
    "command and environment": ("spawn_failed", {"config": {"command": [*TRUE, "x" * 600_000],
                                                            "environment": {"X": "x" * 600_000}}}),
    "task": ("message_too_large", {"config": {"model_backend": "claude", "task": "x" * (MIB + 1)}}),
    "metadata": ("message_too_large", {"config": {"command": TRUE}, "metadata": {"x": "x" * MIB}}),
    "all together": ("message_too_large", {"config": {"command": [*TRUE, "x" * 400_000], "labels": LABELS},
                                           "metadata": {"x": "x" * 700_000}}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_spawn_beyond_a_bound_is_refused(unix: LineWire, name: str) -> None:
    code, fields = BOUNDS[name]
    assert len(unix.refused(code, "spawn_request", **fields)) < 1000
    assert unix.agents(all=True) == []


def test_a_spawn_at_the_bounds_is_served(unix: LineWire) -> None:
    directories = ":".join(f"/{n}" for n in range(998)) + ":/bin"
    labels = {**{f"l{n}": "" for n in range(999)}, "k" * 256: "v" * 256}
    config = {"command": ["true", *["x"] * 9_999], "labels": labels,
              "environment": {**{f"N{n}": "" for n in range(9_999)}, "PATH": directories}}
    reply = unix.ok("spawn_request", config=config, metadata={"x": "x" * 600_000})
    assert unix.exit(reply["agent_info"]["id"])["code"] == 0


@pytest.mark.parametrize("kind, fields", [
    ("list_agents_request", {"labels": {f"l{n}": "" for n in range(1001)}}),
    ("batch_control_command", {"command_type": "get_status", "labels": {"k" * 257: ""}}),
    ("batch_control_command", {"command_type": "get_status", "agent_ids": ["x"] * 10_001}),
])
def test_a_choice_beyond_a_bound_is_refused(unix: LineWire, kind: str, fields: Json) -> None:
    unix.refused("bad_request", kind, **fields)


# ---------------------------------------------------------------- replies that are bounded while they are made

def test_a_batch_reads_what_fits_and_says_of_the_rest_that_it_was_not_tried(unix: LineWire) -> None:
    agents = [unix.spawn("zeros", 3 * MIB, ready=False) for _ in range(8)]
    for each in agents:
        unix.ended(each)
    batch: Json = {"command_type": "read_stdout", "payload": {"max_bytes": 4 * MIB}}
    seen: dict[str, int] = {}
    for _ in agents:
        if not (left := [each for each in agents if each not in seen]):
            break
        unix.send(json.dumps({"type": "batch_control_command", "request_id": "b", "agent_ids": left, **batch}).encode())
        raw = unix.receive()
        assert len(raw) <= 10 * MIB
        results = json.loads(raw)["results"]
        assert [result["agent_id"] for result in results] == left
        done = [result["success"] for result in results]
        assert done == sorted(done, reverse=True) and done[0], "in their order: first what was done, then the rest"
        for result in results:
            if result["success"]:
                seen[result["agent_id"]] = result["data"]["offset"]
            else:
                assert result["error_code"] == "message_too_large" and "not tried" in result["error"]
    assert seen == {each: 0 for each in agents}, "what was not tried has not moved where the next read begins"


def test_a_batch_of_large_replies_takes_bounded_memory(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        big = wire.spawn("zeros", 4 * MIB, ready=False)
        wire.ended(big)
        core = server.pids()["core"]
        before = peak_mib(core)
        wire.ask("batch_control_command", command_type="read_stdout", agent_ids=[big] * 300,
                 payload={"offset": 0, "max_bytes": 4 * MIB})
        assert peak_mib(core) - before < 200, "a reply has 10 MiB at most"


def peak_mib(pid: int) -> int:
    """Return the most memory that a process has had."""
    found = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(found.split()[1]) // 1024


def test_a_batch_whose_refusals_alone_would_not_fit_does_nothing(unix: LineWire) -> None:
    request = {"type": "batch_control_command", "request_id": "b", "command_type": "kill",
               "agent_ids": ["\U0001f600" * 250] * 9_000}
    reply = unix.raw(json.dumps(request, ensure_ascii=False).encode())
    assert reply["error_code"] == "message_too_large" and "fewer" in reply["error"] and "results" not in reply


def test_a_deed_is_tried_only_while_its_result_fits(start_server: Callable[..., Server]) -> None:
    server = start_server("--message-bytes", "65536")
    with LineWire(server.socket_path) as wire:
        deaf = wire.spawn("sleeper", name="\U0001f600" * 250, stdin="null")  # so that refusals are long
        echo = wire.spawn("echo")
        batch = wire.ask("batch_control_command", command_type="write_stdin", agent_ids=[echo, *[deaf] * 40, echo],
                         payload={"data": "x\n"})
        codes = [result["error_code"] for result in batch["results"]]
        tried = codes.count("stdin_closed")
        assert codes == [None] + ["stdin_closed"] * tried + ["message_too_large"] * (41 - tried) and 0 < tried < 40
        wire.control(echo, "close_stdin")
        assert wire.output(echo) == b"ready\nx\n"


@pytest.mark.parametrize("error, code", [(KeyError("a mistake"), "internal"), (OSError(24, "no room"), "unavailable")])
def test_what_fails_inside_for_one_agent_costs_that_one(error: Exception, code: str) -> None:
    logged: list[Exception] = []

    def do(agent: Any, command: str, payload: Any, ask: Any) -> Json:
        if agent.id == "b":
            raise error
        return {"status": "running"}

    commands: Any = SimpleNamespace(do=do, now=lambda: 0.0, recent=lambda since: None)
    standstill: Any = SimpleNamespace(take=set, give_back=lambda begun: None)
    registry: Any = None
    work = Work("get_status", None, Ask("me", "r"), False, 10_000)
    batch = Batch(work, lambda ref: SimpleNamespace(id=ref, status="running", cursors={}),  # type: ignore[arg-type]
                  commands, registry, standstill, lambda what, mistake: logged.append(mistake))
    list(batch.steps(["a", "b", "c"], lambda: iter(()), Pace(lambda: 0.0)))  # type: ignore[arg-type,return-value]
    assert [json.loads(text)["error_code"] for text in batch.results] == [None, code, None] and batch.failed == [code]
    assert logged == ([error] if code == "internal" else [])


def test_a_damaged_part_of_what_a_batch_had_done_puts_nothing_in_the_place_of_another() -> None:
    """What came after it is done again, by who knows what was begun."""
    done: list[str] = []

    def do(agent: Any, command: str, payload: Any, ask: Any) -> Json:
        done.append(agent.id)
        return {}

    texts = {ref: json.dumps({"agent_id": ref, "error_code": None}) for ref in "abcd"}
    commands: Any = SimpleNamespace(do=do, now=lambda: 0.0, recent=lambda since: None)
    standstill: Any = SimpleNamespace(take=set, give_back=lambda begun: None)
    registry: Any = SimpleNamespace(progress=lambda request_id: {0: [texts["a"]], 2: [texts["c"]]})  # that of b is lost
    batch = Batch(Work("stop", None, Ask("me", "r"), False, 100_000),
                  lambda ref: SimpleNamespace(id=ref, status="running", cursors={}),  # type: ignore[arg-type,return-value]
                  commands, registry, standstill, lambda what, mistake: None)
    list(batch.steps(list(texts), lambda: iter(()), Pace(lambda: 0.0)))  # type: ignore[arg-type,return-value]
    assert done == ["b", "c", "d"] and [json.loads(text)["agent_id"] for text in batch.results] == list(texts)


# ---------------------------------------------------------------- names

def test_many_names_cost_no_more_than_many_ids(unix: LineWire) -> None:
    """Each name was once compared with that of each agent."""
    for number in range(30):
        unix.ok("spawn_request", config={"command": ["/bin/sleep", "1000"], "name": f"n{number}"})
    names = [f"n{n % 30}" for n in range(10_000)]
    batch = unix.ok("batch_control_command", command_type="get_status", agent_ids=names)
    assert batch["successful"] == 10_000 and len({result["agent_id"] for result in batch["results"]}) == 30


def test_of_an_agent_the_last_attempts_are_kept(tmp_path: Path) -> None:
    kept = Registry(str(tmp_path / "registry.db"), lambda sentence: None, 1000, 60.0, 1000)
    for attempt in range(1, ATTEMPTS_MOST + 500):
        kept.save_attempt("a", attempt, {"attempt": attempt})
        if attempt % 100 == 0:
            kept.commit()
    found = [each["attempt"] for each in kept.attempts("a")]
    assert found == list(range(500, ATTEMPTS_MOST + 500))
    kept.close()


# ---------------------------------------------------------------- others meanwhile

def test_who_sends_thousands_of_requests_at_once_holds_nobody(shared: Server) -> None:
    listing = b'{"type":"list_agents_request","request_id":"l","all":true}\n'
    with LineWire(shared.socket_path) as greedy, LineWire(shared.socket_path) as other:
        for _ in range(20):
            other.ok("spawn_request", config={"command": TRUE, "labels": LABELS})
        greedy.socket.sendall(listing * 64)
        assert other.raw(HEALTH)["success"]
        came = 0
        while select.select([greedy.socket], [], [], 0)[0]:
            came += greedy.socket.recv(MIB).count(b"\n")
        assert came < 64, "the other had its turn before all of them were done"


def test_what_one_client_asks_comes_in_its_order(unix: LineWire) -> None:
    agents = [unix.spawn("echo", ready=False) for _ in range(40)]
    wanted = b""
    for number in range(50):
        for request in ({"type": "batch_control_command", "agent_ids": agents, "payload": {"data": f"many {number}\n"}},
                        {"type": "control_command", "agent_id": agents[-1], "payload": {"data": f"one {number}\n"}}):
            unix.send(json.dumps({**request, "command_type": "write_stdin", "request_id": new_id()}).encode())
        wanted += b"many %d\none %d\n" % (number, number)
    assert all(json.loads(unix.receive())["success"] for _ in range(100))
    wait_until(lambda: wanted in unix.so_far(agents[-1])[0], what="all in its order")


def test_the_same_batch_on_two_connections_is_done_once(shared: Server) -> None:
    with LineWire(shared.socket_path) as first, ZmqWire(shared.endpoint) as second:
        agents = [first.spawn("echo", ready=False) for _ in range(100)]
        batch = json.dumps({"type": "batch_control_command", "request_id": new_id(), "command_type": "write_stdin",
                            "agent_ids": agents, "payload": {"data": "once\n", "eof": True}}).encode()
        first.send(batch)
        second.send(batch)
        replies = [json.loads(first.receive()), json.loads(second.receive())]
        assert replies[0] == replies[1] and replies[0]["success"]
        for each in agents:
            assert first.output(each).count(b"once") == 1


def test_a_batch_of_one_who_left_is_done_to_its_end(shared: Server) -> None:
    with LineWire(shared.socket_path) as wire:
        agents = [wire.spawn("echo", ready=False) for _ in range(100)]
        with LineWire(shared.socket_path) as gone:
            gone.send(json.dumps({"type": "batch_control_command", "request_id": "g", "command_type": "write_stdin",
                                  "agent_ids": agents, "payload": {"data": "done\n", "eof": True}}).encode())
            before = wire.ok("stats_request")["stats"]["control_commands"]
            wait_until(lambda: wire.ok("stats_request")["stats"]["control_commands"] > before - 1, what="its begin")
        for each in agents:
            assert wire.output(each).count(b"done") == 1


# ---------------------------------------------------------------- a core that dies in the middle of a batch

def test_a_batch_goes_on_where_the_core_died(start_server: Callable[..., Server], tmp_path: Path) -> None:
    dies = tmp_path / "dies"
    path = f"{AGENTS / 'dying'}:{MAIN.parent.parent}"
    server = start_server("--max-agents", "200", environ={"PYTHONPATH": path, "AGENTSERVER_DIES": str(dies)})
    with LineWire(server.socket_path) as wire:
        agents = [wire.spawn("echo", ready=False, labels={"all": "yes"}) for _ in range(150)]
    request = {"type": "batch_control_command", "request_id": new_id(), "command_type": "write_stdin",
               "labels": {"all": "yes"}, "payload": {"data": "once\n", "eof": True}}
    core = server.pids()["core"]
    dies.write_text("after sendfile")  # the first that was accepted was written
    with pytest.raises((OSError, EOFError, ValueError)):
        server.ask(request)
    back(server, "core", core)
    reply = server.ask(request)
    assert reply["success"], reply["error"]
    assert [result["agent_id"] for result in reply["results"]] == agents
    assert server.ask(request) == reply
    with LineWire(server.socket_path) as wire:
        for each in agents:
            assert wire.output(each).count(b"once") == 1, each
    assert server.ask({**request, "command_type": "kill", "payload": {}})["error_code"] == "request_id_conflict"


def test_removals_of_a_batch_are_told_though_the_core_died_after_some(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        agents = [wire.ok("spawn_request", config={"command": TRUE})["agent_info"]["id"] for _ in range(200)]
        for each in agents:
            wire.ended(each)
        request = {"type": "batch_control_command", "request_id": new_id(), "command_type": "remove",
                   "agent_ids": agents}
        core = server.pids()["core"]
        wire.send(json.dumps(request).encode())
        wait_until(lambda: wire_total(server) < 200, what="the first to be removed")
        os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    reply = server.ask(request)
    assert reply["success"] and reply["successful"] == 200, reply["error"]


def wire_total(server: Server) -> int:
    """How many agents there are."""
    return int(server.ask({"type": "list_agents_request", "request_id": new_id(), "all": True, "limit": 0})["total"])
