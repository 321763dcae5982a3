"""How fast agents are started, and whether that depends on how many there are.

Owns:    the benchmark `spawn`.
Runs in: the benchmark process.
Unaware: of how the server does it.
"""
from __future__ import annotations

import subprocess
import time
from typing import List

import bare
from caller import open_client
from harness import Server, expect, percentile, request
from table import Benchmark, Figures, Row, ratio_least, ratio_most

SLEEP = ("sleep", "1000")
IN_A_ROW = 200
AT_EACH_COUNT = 60


class Spawn(Benchmark):
    """From request to reply (the program is running then), against `Popen` with three pipes and a session."""

    name = "spawn"
    about = "add and start a process"
    rows = (
        Row("unix_p50", "add + start a process, p50, Unix socket", "ms", "p50", ratio_most(2.5)),
        Row("unix_p99", "add + start a process, p99, Unix socket", "ms", "p99", ratio_most(2.5)),
        Row("zmq_p50", "add + start a process, p50, ZeroMQ", "ms", "p50", ratio_most(2.5)),
        Row("zmq_p99", "add + start a process, p99, ZeroMQ", "ms", "p99", ratio_most(2.5)),
        Row("unix_rate", "200 in a row, Unix socket", "1/s", "rate", ratio_least(0.5)),
        Row("zmq_rate", "200 in a row, ZeroMQ", "1/s", "rate", ratio_least(0.5)),
        Row("at_10", "p50 at 10 agents, Unix socket", "ms", "at_10", ratio_most(2.5)),
        Row("at_500", "p50 at 500 agents, Unix socket", "ms", "at_500", ratio_most(2.5)),
        Row("flat", "flat with count: p50 at 500 / p50 at 10", "×", "flat", ratio_most(1.25)),
    )

    def start(self) -> None:
        self._server = None if self.limits_only else Server().__enter__()

    def stop(self) -> None:
        if self._server is not None:
            self._server.__exit__()

    def base(self) -> Figures:
        processes: List["subprocess.Popen[bytes]"] = []
        times = popen_times(IN_A_ROW, processes)
        at_10 = percentile(times[10:10 + AT_EACH_COUNT], 0.5)
        popen_times(500 - IN_A_ROW, processes)
        at_500 = percentile(popen_times(AT_EACH_COUNT, processes), 0.5)
        bare.discard(processes)
        return {**_ms("", times), "rate": IN_A_ROW / sum(times),
                "at_10": at_10 * 1e3, "at_500": at_500 * 1e3, "flat": at_500 / at_10}

    def ours(self) -> Figures:
        assert self._server is not None
        found: Figures = {}
        for link, address in (("unix", self._server.path), ("zmq", self._server.endpoint)):
            agents: List[str] = []
            times = spawn_times(address, IN_A_ROW, agents)
            found.update({**_ms(link + "_", times), f"{link}_rate": IN_A_ROW / sum(times)})
            self._server.kill(agents)
        at_10, at_500 = self._at_counts(self._server)
        return {**found, "at_10": at_10 * 1e3, "at_500": at_500 * 1e3, "flat": at_500 / at_10}

    @staticmethod
    def _at_counts(server: Server) -> "tuple[float, float]":
        agents = server.spawn_many(10, SLEEP)
        at_10 = percentile(spawn_times(server.path, AT_EACH_COUNT, agents), 0.5)
        agents += server.spawn_many(500 - len(agents), SLEEP)
        at_500 = percentile(spawn_times(server.path, AT_EACH_COUNT, agents), 0.5)
        server.kill(agents)
        return at_10, at_500


def popen_times(count: int, processes: List["subprocess.Popen[bytes]"]) -> List[float]:
    """Start processes one after the other; return how long each took; append them to `processes`."""
    times = []
    before = time.perf_counter()
    for _ in range(count):
        processes.append(bare.popen(SLEEP))
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return times


def spawn_times(address: str, count: int, agents: List[str]) -> List[float]:
    """Spawn agents one after the other; return how long each took; append their ids to `agents`."""
    client = open_client(address)
    client.ask(request("health_check_request"))
    questions = [request("spawn_request", config={"command": list(SLEEP)}) for _ in range(count)]
    replies, times = [], []
    before = time.perf_counter()
    for question in questions:
        replies.append(client.ask(question))
        now = time.perf_counter()
        times.append(now - before)
        before = now
    client.close()
    agents += [expect(reply)["agent_info"]["id"] for reply in replies]
    return times


def _ms(prefix: str, times: List[float]) -> Figures:
    return {f"{prefix}p50": percentile(times, 0.5) * 1e3, f"{prefix}p99": percentile(times, 0.99) * 1e3}
