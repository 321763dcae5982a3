"""Requests that could be dear: those that once were, those at the bounds, and generated ones.

Owns:    the list of them, and how each is asked.
Runs in: the benchmark process.
Unaware: of how long others have to wait meanwhile (waiting.py), and of how the server does it.
"""
from __future__ import annotations

import json
import random
import select
import socket
import sqlite3
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Union

from caller import open_client
from harness import BenchError, Server, UnixClient, request, until

MIB = 1024 * 1024
SMALL_MS, PER_MIB_MS, TREE_MS = 50.0, 20.0, 100.0
AGENTS, TREE_PROCESSES = 1000, 500
HOSTILE = "(x+x+)+y"
TREE = f"i=0; while [ $i -lt {TREE_PROCESSES} ]; do sleep 1000 & i=$((i+1)); done; wait"
PRINT = "import sys; sys.stdout.reconfigure(encoding='utf-8'); sys.stdout.write((%s * 4194304)[:4194304])"
GENERATED = 24
FLOOD_SECS = 1.5

#: what is sent: a message, or (a list) several at once from connections of their own; or what to do instead
Deed = Union[bytes, List[bytes], Callable[[], None]]


@dataclass(frozen=True)
class Case:
    """One request, or some that belong together, and what others may wait for it at most (ms; 0: by its size)."""

    name: str
    deed: Deed
    target: float = 0.0

    def bound(self) -> float:
        """Return the target for others' waits in milliseconds."""
        return self.target or SMALL_MS + PER_MIB_MS * max(0.0, self.size() / MIB - 1)

    def size(self) -> int:
        """Return the bytes of the largest message that is sent."""
        if callable(self.deed):
            return 0
        return max(map(len, self.deed)) if isinstance(self.deed, list) else len(self.deed)

    def do(self, server: Server) -> None:
        """Send it over the Unix socket and wait for the reply."""
        if callable(self.deed):
            self.deed()
        else:
            at_once(server.path, self.deed if isinstance(self.deed, list) else [self.deed])


def all_cases(server: Server) -> Iterator[Case]:
    """Yield every case; some are prepared only when they are reached."""
    yield from parsed()
    yield from spawns()
    yield from reads(server)
    yield from inputs(server)
    yield from searches(server)
    yield from disturbed(server)
    agents = [server.spawn(["sleep", "1000"], name=f"agent-{n}", labels={"n": str(n)}) for n in range(AGENTS)]
    yield from generated(agents)
    yield from many(server, agents)


# ---------------------------------------------------------------- what is asked

def health(**fields: Any) -> bytes:
    return request("health_check_request", **fields)


def raw(body: bytes) -> bytes:
    """A health check with one more field, whose value is given as JSON."""
    return health()[:-1] + b',"x":' + body + b"}"


def spawn(metadata: Any = None, **config: Any) -> bytes:
    return request("spawn_request", config={"command": ["/nowhere/at/all"], **config}, metadata=metadata or {})


def control(agent: str, command: str, **payload: Any) -> bytes:
    return request("control_command", agent_id=agent, command_type=command, payload=payload)


def batch(command: str, agents: List[str], **payload: Any) -> bytes:
    return request("batch_control_command", agent_ids=agents, command_type=command, payload=payload)


def parsed() -> Iterator[Case]:
    """Messages that cost something before it is known what they ask for."""
    size = 10 * MIB - 200
    yield Case("10 MiB of numbers", raw(b"[" + b"1," * (size // 2) + b"1]"))
    yield Case("10 MiB of lists", raw(b"[" + b"[]," * (size // 3) + b"[]]"))
    yield Case("10 MiB of names", raw(b"{" + b",".join(b'"%07d":1' % n for n in range(size // 12)) + b"}"))
    yield Case("10 MiB of short texts", raw(b"[" + b'"",' * (size // 3) + b'""]'))
    yield Case("100,000 numbers", raw(b"[" + b"1," * 99_000 + b"1]"))
    yield Case("100,000 numbers with fractions", raw(b"[" + b"1.5," * 99_000 + b"1]"))
    yield Case("100,000 names", raw(b"{" + b",".join(b'"%05d":[]' % n for n in range(49_000)) + b"}"))
    yield Case("10 MiB of 100,000 long names", raw(b"{" + b",".join(b'"%0100d":1' % n for n in range(90_000)) + b"}"))
    yield Case("one text of 10 MiB", raw(b'"' + b"x" * size + b'"'))
    yield Case("a text of 10 MiB of commas", raw(b'"' + b"," * size + b'"'))
    yield Case("a text of 10 MiB of escapes", raw(b'"' + b'\\",' * (size // 3) + b'"'))
    yield Case("a text of 10 MiB outside ASCII", raw(b'"' + "é".encode() * (size // 2) + b'"'))
    yield Case("10 MiB of blanks", b" " * size + health())
    yield Case("10 MiB that is no JSON", b"[" * size)
    yield Case("10 MiB of quotation marks", b'"' * size)
    yield Case("30 MiB in one line", b"x" * 30 * MIB)


def spawns() -> Iterator[Case]:
    """Agents that are refused, or that are as large as they may be."""
    yield Case("spawn: PATH of 5 MB", spawn(command=["nothing"], environment={"PATH": "/x:" * 1_700_000}))
    many = ":".join(f"/{'x' * 60}{n:04}" for n in range(999))
    yield Case("spawn: PATH of 1,000 directories", spawn(command=["nothing"], environment={"PATH": many}))
    yield Case("spawn: argv of two million", spawn(command=["x"] * 2_000_000))
    yield Case("spawn: argv of 10,000", spawn(command=["/bin/true", *["x"] * 9_999]))
    yield Case("spawn: 400,000 variables", spawn(environment={f"N{n}": "" for n in range(400_000)}))
    yield Case("spawn: 10,000 variables", spawn(command=["/bin/true"], environment={f"N{n}": "" for n in range(9_999)}))
    yield Case("spawn: 200,000 labels", spawn(labels={f"l{n}": "" for n in range(200_000)}))
    yield Case("spawn: 1,000 labels", spawn(command=["/bin/true"], labels={f"l{n}": "v" * 250 for n in range(1000)}))
    yield Case("spawn: 1 MiB of metadata in one text", spawn({"x": "x" * 1_000_000}, command=["/bin/true"]))
    yield Case("spawn: metadata of 90,000 values", spawn({"x": list(range(90_000))}, command=["/bin/true"]))
    yield Case("spawn: arguments of 1 MB", spawn(command=["/bin/true", *["x" * 100_000] * 9]))
    yield Case("spawn: 64 at once", [spawn(command=["/bin/true"]) for _ in range(64)])


def reads(server: Server) -> Iterator[Case]:
    """Output that is dear to send."""
    for name, what in (("lines", r"('x' * 63 + '\n')"), ("empty lines", r"'\n'"), ("control characters", r"'\1'"),
                       ("outside ASCII", "'é'")):
        agent = server.spawn([sys.executable, "-c", PRINT % what])
        ended(server, agent)
        yield Case(f"read 4 MiB, {name}", control(agent, "read_stdout", offset=0, max_bytes=4 * MIB))
        yield Case(f"read 4 MiB with times, {name}",
                   control(agent, "read_stdout", offset=0, max_bytes=4 * MIB, times=True))
    agent = server.spawn(["head", "-c", "4194304", "/dev/urandom"])
    ended(server, agent)
    yield Case("read 4 MiB, binary", control(agent, "read_stdout", offset=0, max_bytes=4 * MIB))
    yield Case("read 4 MiB of 300 agents", batch("read_stdout", [agent] * 300, offset=0, max_bytes=4 * MIB))
    yield Case("search 4 MiB", request("output_query_request", agent_id=agent, stream="stdout", filter="nowhere"))
    yield Case("all lines of 4 MiB", request("output_query_request", agent_id=agent, stream="stdout", limit=10 ** 6))


def inputs(server: Server) -> Iterator[Case]:
    """Input for an agent that does not read it."""
    agent = server.spawn(["sleep", "1000"])
    yield Case("write_stdin: a million numbers", control(agent, "write_stdin", data=[65] * 1_000_000))
    yield Case("write_stdin: 90,000 numbers", control(agent, "write_stdin", data=[65] * 90_000))
    yield Case("write_stdin: a text of 10 MiB", control(agent, "write_stdin", data="x" * (10 * MIB - 300)))
    other = json.dumps({"data": "é" * (5 * MIB - 300)}, ensure_ascii=False).encode()
    yield Case("write_stdin: a text of 10 MiB outside ASCII", control(agent, "write_stdin")[:-3] + other + b"}")
    yield Case("write_stdin: base64 of 10 MiB",
               control(agent, "write_stdin", data="eHh4" * 2_600_000, encoding="base64"))
    yield Case("write_stdin: 700 KiB", control(agent, "write_stdin", data="x" * 700 * 1024))


def many(server: Server, agents: List[str]) -> Iterator[Case]:
    """What concerns many agents."""
    names = [f"agent-{n % AGENTS}" for n in range(10_000)]
    yield Case("batch: status of 10,000 names", batch("get_status", names))
    yield Case("batch: status of 10,000 unknown names", batch("get_status", [f"nobody-{n}" for n in range(10_000)]))
    yield Case("batch: status of 10,000 prefixes", batch("get_status", [agents[n % AGENTS][:8] for n in range(10_000)]))
    yield Case("batch: inspect 1,000", batch("inspect", agents))
    yield Case("batch: echo 1 MB to 1,000", batch("custom_action", agents, action="echo", params="x" * 1_000_000))
    yield Case("batch: write to 1,000", batch("write_stdin", agents, data="x" * 500))
    yield Case("batch: write 500 KB to 100", batch("write_stdin", agents[:100], data="x" * 500_000))
    yield Case("batch: resize 1,000 that have no terminal", batch("resize", agents, rows=10, cols=10))
    yield Case("list 1,000", request("list_agents_request"))
    yield Case("list by 1,000 labels", request("list_agents_request", labels={f"l{n}": "" for n in range(1000)}))
    yield Case("64 lists at once", [request("list_agents_request")] * 64)
    yield Case("10,000 events", request("events_request", limit=10_000))
    topics = [f"{n:036d}.stdout" for n in range(10_000)]
    yield Case("subscribe to 10,000 topics", request("subscribe_request", topics=topics))
    yield Case("subscribe to 1,000 agents", request("subscribe_request", topics=[f"{agent}." for agent in agents]))
    yield Case("subscribe from the beginning", request("subscribe_request", topics=[""], since=0))
    yield Case("20,000 health checks in one write", lambda: flood(server, health(), 20_000))
    yield Case("2,000 lists in one write", lambda: flood(server, request("list_agents_request"), 2_000))
    yield Case("batch: pause 1,000", batch("pause", agents))
    yield Case("batch: resume 1,000", batch("resume", agents))
    yield Case("batch: signal 1,000", batch("signal", agents, signal="SIGCONT"))
    yield Case("batch: kill 350", lambda: gone(server, "kill", agents[:350]))
    yield Case("batch: stop 650", lambda: gone(server, "stop", agents[350:]))
    yield Case("batch: remove 1,000", batch("remove", agents))


def searches(server: Server) -> Iterator[Case]:
    """Patterns that never end, asked by twenty at once."""
    agent = server.spawn(["sh", "-c", "yes xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx | head -c 8000000"])
    ended(server, agent)
    asked = [request("output_query_request", agent_id=agent, stream="stdout", filter=HOSTILE) for _ in range(20)]
    yield Case("20 hostile patterns over the Unix socket", asked)
    yield Case("20 hostile patterns over ZeroMQ", lambda: at_once(server.endpoint, asked))


def disturbed(server: Server) -> Iterator[Case]:
    """What is not a large request: another program has the registry locked, and trees of many processes."""
    agent = server.spawn(["sleep", "1000"])
    yield Case("the registry is locked by another program", lambda: locked(server, agent))
    for command in ("pause", "kill"):
        tree = server.spawn(["sh", "-c", TREE])
        until(lambda tree=tree: len(server.control(tree, "inspect")["tree"]) >= TREE_PROCESSES, 60, "a tree")  # type: ignore[misc]
        yield Case(f"{command} a tree of {TREE_PROCESSES}", lambda tree=tree, command=command: gone(  # type: ignore[misc]
            server, command, [tree]), TREE_MS)
        if command == "pause":
            gone(server, "kill", [tree])


def generated(agents: List[str], seed: int = 11) -> Iterator[Case]:
    """Requests of any type with fields as large as they come, up to 1 MiB and up to 10 MiB."""
    dice = random.Random(seed)
    for number in range(GENERATED):
        most_bytes = dice.choice([MIB, MIB, 10 * MIB]) - 1000
        kind = dice.choice(["spawn_request", "list_agents_request", "control_command", "custom_action_request",
                            "batch_control_command", "output_query_request", "events_request", "subscribe_request",
                            "stats_request", "health_check_request"])
        message: Dict[str, Any] = {
            "config": {"command": ["/nowhere"]}, "agent_id": dice.choice(agents), "action": "echo", "topics": [],
            "command_type": dice.choice(["write_stdin", "inspect", "custom_action", "get_status"]), "stream": "both",
            "payload": {"action": "echo"}}
        if kind == "batch_control_command":
            del message["agent_id"]
            message["agent_ids"] = agents[:dice.choice([1, 100, 1000])]
        where = dice.choice(["config.task", "config.command", "config.environment", "config.labels", "metadata",
                             "payload.data", "payload.params", "params", "filter", "topics", "labels", "agent_id", "x"])
        place = message
        *path, last = where.split(".")
        for name in path:
            place = place[name]
        shape = dice.choice(["text", "wide", "numbers", "texts", "members", "nested"])
        place[last] = large(shape, most_bytes)
        yield Case(f"generated {number}: {kind} {where} {shape} {most_bytes // MIB + 1} MiB",
                   json.dumps({"type": kind, "request_id": f"{seed}-{number}-{time.time()}", **message},
                              ensure_ascii=False).encode("utf-8", "surrogatepass"))


def large(shape: str, size: int) -> Any:
    """Return a value of about so many bytes."""
    return {"text": lambda: "x" * size, "wide": lambda: "é" * (size // 2),
            "numbers": lambda: [7] * (size // 3), "texts": lambda: ["x" * 100] * (size // 104),
            "members": lambda: {f"{n:07}": "x" * 90 for n in range(size // 106)},
            "nested": lambda: [[[[["x"]]]]] * (size // 15)}[shape]()


# ---------------------------------------------------------------- how it is asked

def ended(server: Server, agent: str) -> None:
    until(lambda: server.control(agent, "inspect")["agent_info"]["exit"], 60, "an agent to end")


def at_once(address: str, messages: List[bytes]) -> None:
    """Send each message on a connection of its own, and wait for all replies."""
    threads = [threading.Thread(target=_ask, args=(address, message)) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ask(address: str, message: bytes) -> None:
    client = open_client(address)
    client.ask(message)
    client.close()


def flood(server: Server, message: bytes, count: int) -> None:
    """Send a message many times without waiting for replies, as fast as they are taken, for a moment; then leave."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(server.path)
    client.setblocking(False)
    data, sent, end = memoryview((message + b"\n") * count), 0, time.monotonic() + FLOOD_SECS
    while time.monotonic() < end:
        readable, writable, _ = select.select([client], [client] if sent < len(data) else [], [], 0.05)
        if readable:
            client.recv(MIB)
        if writable:
            sent += client.send(data[sent:sent + MIB])
    client.close()


def gone(server: Server, command: str, agents: List[str]) -> None:
    """Give a command to many agents, and wait until they have ended, if it ends them."""
    server.client.ask(batch(command, agents))
    if command != "pause":
        until(lambda: b'"status":"running"' not in server.client.ask(batch("get_status", agents)), 60, "their end")


def locked(server: Server, agent: str) -> None:
    """Have the registry locked for a second, and write to it meanwhile."""
    other = sqlite3.connect(server.state_dir / "registry.db", timeout=10)
    other.execute("BEGIN IMMEDIATE")
    until_then = time.monotonic() + 1.0
    client = UnixClient(server.path)
    while time.monotonic() < until_then:
        try:
            client.ask(control(agent, "write_stdin", data="x"))
        except (BenchError, OSError):
            client = UnixClient(server.path)
    other.rollback()
    other.close()
