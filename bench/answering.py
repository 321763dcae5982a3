"""How fast requests are answered: alone, among eight, under floods of output, and about a hundred agents.

Owns:    the benchmarks `requests`, `flood` and `status`.
Runs in: the benchmark process; the clients of `requests` and `flood` are processes of their own.
Unaware: of how the server does it.
"""
from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Tuple

import bare
from caller import open_client
from harness import TREE, BenchError, Server, expect, request
from table import Benchmark, Figures, Row, least, most, ratio_least

CALLER = str(Path(__file__).with_name("caller.py"))
AGENT_CLIENT = """
import sys, time
from agentserver import AgentClient
with AgentClient(sys.argv[1]) as client:
    client.health()
    began, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < began + float(sys.argv[2]):
        client.health()
        count += 1
    print(count / (now - began))
"""


def callers(address: str, count: int, secs: float) -> Tuple[float, float]:
    """Return requests per second of `count` client processes together, and the worst p99 of them in seconds."""
    clients = [subprocess.Popen([sys.executable, CALLER, address, str(secs)], text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    found = [[float(word) for word in said.split()] for said in _go(clients)]
    if not all(found):
        raise BenchError(f"a client of {address} failed")
    return sum(rate for rate, _p99 in found), max(p99 for _rate, p99 in found)


def _go(clients: "List[subprocess.Popen[str]]") -> List[str]:
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    return [client.communicate()[0] for client in clients]


def rate_of(address: str, secs: float, **fields: object) -> float:
    """Return how often per second one request is answered, replies only looked at, not parsed."""
    client = open_client(address)
    message = request(**fields)  # type: ignore[arg-type]
    expect(client.ask(message))
    began, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < began + secs:
        count += 1
        if b'"success":true' not in client.ask(message)[:4096].replace(b": ", b":"):
            raise BenchError("a reply in the middle of the run was not a success")
    client.close()
    return count / (now - began)


class Requests(Benchmark):
    """A trivial request, against a bare REP/REQ loop that parses it and builds a reply of the same size."""

    name = "requests"
    about = "trivial request, 1 and 8 clients"
    secs = 0.6
    rows = (
        Row("zmq1", "trivial request, 1 client, ZeroMQ", "1/s", "bare1", ratio_least(0.5)),
        Row("unix1", "trivial request, 1 client, Unix socket", "1/s", "bare1", ratio_least(2)),
        Row("zmq8", "trivial request, 8 clients, ZeroMQ", "1/s", "bare8", ratio_least(0.65)),
        Row("unix8", "trivial request, 8 clients, Unix socket", "1/s", "bare8", ratio_least(2)),
        Row("client_zmq", "the same with AgentClient, ZeroMQ", "1/s", "bare1"),
        Row("client_unix", "the same with AgentClient, Unix socket", "1/s", "bare1"),
    )

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        reply = None
        if not self.limits_only:
            self._server = self._stack.enter_context(Server())
            reply = self._server.health()
        file = self._stack.enter_context(bare.sample(reply))
        self._bare = self._stack.enter_context(bare.Served("bare", "rep", file))

    def stop(self) -> None:
        self._stack.close()

    def base(self) -> Figures:
        return {"bare1": callers(self._bare, 1, self.secs)[0], "bare8": callers(self._bare, 8, self.secs)[0]}

    def ours(self) -> Figures:
        server = self._server
        return {"zmq1": callers(server.endpoint, 1, self.secs)[0],
                "zmq8": callers(server.endpoint, 8, self.secs)[0],
                "unix1": callers(server.path, 1, self.secs)[0],
                "unix8": callers(server.path, 8, self.secs)[0],
                "client_zmq": self._agent_client(server.endpoint),
                "client_unix": self._agent_client("unix:" + server.path)}

    def _agent_client(self, address: str) -> float:
        done = subprocess.run([sys.executable, "-c", AGENT_CLIENT, address, str(self.secs)],
                              cwd=TREE, stdout=subprocess.PIPE, check=True)
        return float(done.stdout)


class Flood(Benchmark):
    """The 99th percentile of a trivial request while agents print as fast as anybody reads them."""

    name = "flood"
    about = "p99 of a trivial request while 1 and 20 agents print flat out"
    secs = 1.0
    rows = (
        Row("quiet", "p99 of a trivial request, ZeroMQ, idle agents", "ms", "bare"),
        Row("zmq_1", "p99 while one child prints flat out, ZeroMQ", "ms", "bare", most(3)),
        Row("unix_1", "p99 while one child prints flat out, Unix socket", "ms", "bare", most(3)),
        Row("zmq_20", "p99 while 20 print flat out, ZeroMQ", "ms", "bare", most(10)),
        Row("unix_20", "p99 while 20 print flat out, Unix socket", "ms", "bare", most(10)),
        Row("rate_1", "captured meanwhile from the one", "MB/s"),
        Row("rate_20", "captured meanwhile from the 20", "MB/s"),
    )

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        self._bare = self._stack.enter_context(bare.Served("bare", "rep", self._stack.enter_context(bare.sample())))
        if not self.limits_only:
            self._server = self._stack.enter_context(Server())

    def stop(self) -> None:
        self._stack.close()

    def base(self) -> Figures:
        return {"bare": callers(self._bare, 1, self.secs)[1] * 1e3}

    def ours(self) -> Figures:
        return {"quiet": callers(self._server.endpoint, 1, self.secs)[1] * 1e3,
                **self._under(1), **self._under(20)}

    def _under(self, count: int) -> Figures:
        agents = self._server.spawn_many(count, ("yes", "x" * 79), stdin="null")
        before, began = self._captured(), time.monotonic()
        found = {f"zmq_{count}": callers(self._server.endpoint, 1, self.secs)[1] * 1e3,
                 f"unix_{count}": callers(self._server.path, 1, self.secs)[1] * 1e3}
        found[f"rate_{count}"] = (self._captured() - before) / (time.monotonic() - began) / 1e6
        self._server.kill(agents)
        return found

    def _captured(self) -> float:
        return float(self._server.ask("stats_request")["stats"]["bytes_captured"])


class Status(Benchmark):
    """The status of all of 100 agents in one request, as a list and as a batch."""

    name = "status"
    about = "status of all of 100 agents"
    secs = 0.6
    rows = (
        Row("batch_zmq", "status of all of 100 (batch get_status), ZeroMQ", "1/s", "bare_batch", least(3000)),
        Row("batch_unix", "status of all of 100 (batch get_status), Unix", "1/s", "bare_batch", least(3000)),
        Row("list_zmq", "everything about all of 100 (list), ZeroMQ", "1/s", "bare_list", least(3000)),
        Row("list_unix", "everything about all of 100 (list), Unix", "1/s", "bare_list", least(3000)),
        Row("list_bytes", "size of that list", "KiB"),
    )

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        if self.limits_only:
            return
        self._server = self._stack.enter_context(Server())
        agents = self._server.spawn_many(100)
        self._batch = {"kind": "batch_control_command", "command_type": "get_status", "agent_ids": agents}
        self._list = {"kind": "list_agents_request"}
        self._bare_batch = self._bare("batch", self._batch)
        self._bare_list = self._bare("list", self._list)

    def _bare(self, name: str, fields: dict) -> str:  # type: ignore[type-arg]
        """Serve a reply of the same size without a server behind it."""
        file = self._server.directory / f"{name}.json"
        file.write_bytes(self._server.client.ask(request(**fields)))
        return self._stack.enter_context(bare.Served("bare", "rep", str(file)))

    def stop(self) -> None:
        self._stack.close()

    def base(self) -> Figures:
        if self.limits_only:
            return {}
        return {"bare_batch": rate_of(self._bare_batch, self.secs, **self._batch),
                "bare_list": rate_of(self._bare_list, self.secs, **self._list)}

    def ours(self) -> Figures:
        server = self._server
        return {"batch_zmq": rate_of(server.endpoint, self.secs, **self._batch),
                "batch_unix": rate_of(server.path, self.secs, **self._batch),
                "list_zmq": rate_of(server.endpoint, self.secs, **self._list),
                "list_unix": rate_of(server.path, self.secs, **self._list),
                "list_bytes": len(server.client.ask(request(**self._list))) / 1024}
