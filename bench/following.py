"""Following with `AgentClient`: how soon, how much, how many, and what those cost who do not listen any more.

Owns:    the benchmarks `follow`, `torrent`, `crowd` and `dead`.
Runs in: the benchmark process; followers are processes of their own (follower.py).
Unaware: of how the server and the client do it.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Dict, List

import bare
import printing
import publishing
from harness import TREE, BenchError, Server, memory, percentile, until
from table import Benchmark, Figures, Row, least, most

MB = 1_000_000
SECS = 240  # after which a follower is given up


class Follower:
    """One process of follower.py. `close` it, whatever happened."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TREE / "bench" / "follower.py"), *map(str, arguments)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TREE)})

    def ready(self) -> "Follower":
        """Wait until it listens."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"ready\n":
            raise BenchError("a follower did not get as far as listening")
        return self

    def told(self) -> Any:
        """Return what it has to say at the end."""
        try:
            out, _ = self.process.communicate(timeout=SECS)
            return json.loads(out)
        except (subprocess.TimeoutExpired, ValueError):
            raise BenchError("a follower did not come to its end") from None

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class _Served(Benchmark):
    """What all of these share: a server, and things to close after a run."""

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        if not self.limits_only:
            self.server = self._stack.enter_context(Server())

    def stop(self) -> None:
        self._stack.close()

    def follower(self, *arguments: object) -> Follower:
        """Start a follower that is ended at the latest with the benchmark."""
        follower = Follower(*arguments)
        self._stack.callback(follower.close)
        return follower


class Follow(_Served):
    """From an agent's `write` to the follower's hands, while others print, against a process that does the same."""

    name = "follow"
    about = "printed line to follower, 50 other agents printing"
    runs = 3
    count, pause = 1000, 0.003
    others, other_pause = 50, 0.05
    rows = (
        Row("zmq_p50", "printed line → follower, p50, ZeroMQ, 50 others", "ms", "p50", most(1)),
        Row("zmq_p99", "printed line → follower, p99, ZeroMQ, 50 others", "ms", "p99", most(5)),
        Row("unix_p50", "printed line → follower, p50, Unix, 50 others", "ms", "p50"),
        Row("unix_p99", "printed line → follower, p99, Unix, 50 others", "ms", "p99"),
    )

    def base(self) -> Figures:
        with bare.Served("publishing", "relay", str(self.count), str(self.pause), str(self.others),
                         str(self.other_pause)) as endpoint:
            ages = publishing.ages(endpoint, self.count)
        return {"p50": percentile(ages, 0.5) * 1e3, "p99": percentile(ages, 0.99) * 1e3}

    def ours(self) -> Figures:
        server = self.server
        others = [server.spawn(printing.clock(1_000_000, self.other_pause)) for _ in range(self.others)]
        for other in others:
            server.control(other, "close_stdin")
        found: Figures = {}
        for link, address in (("zmq", server.endpoint), ("unix", f"unix:{server.path}")):
            agent = server.spawn(printing.clock(self.count, self.pause, word=printing.READY))
            follower = self.follower("ages", address, agent).ready()
            server.control(agent, "close_stdin")
            told = follower.told()
            if told["count"] != self.count:
                raise BenchError(f"{told['count']} of {self.count} lines came")
            found.update({f"{link}_p50": told["p50"] * 1e3, f"{link}_p99": told["p99"] * 1e3})
        server.kill(others)
        return found


class Torrent(_Served):
    """One follower of one agent that prints at 55 MB/s, then as fast as it can, against a bare pipe → PUB → SUB."""

    name = "torrent"
    about = "one follower of an agent that prints 55 MB/s, and of one that prints as fast as it can"
    runs = 3
    pace, secs, flat_out = 55, 5, 1000
    rows = (
        Row("rate", "one follower of 55 MB/s, ZeroMQ", "MB/s", "rate", least(50)),
        Row("lost", "  bytes that it missed, or that were wrong", "bytes", "", most(0)),
        Row("grown", "  memory of the server grown by", "MiB", "", most(16)),
        Row("client", "  peak memory of the follower grown by", "MiB", "", most(16)),
        Row("unix_rate", "one follower of 55 MB/s, Unix socket", "MB/s", "rate", least(50)),
        Row("unix_lost", "  bytes that it missed, or that were wrong", "bytes", "", most(0)),
        Row("flat_rate", "one follower of an agent that is flat out, ZeroMQ", "MB/s", "rate"),
        Row("flat_agent", "  the agent itself", "MB/s"),
        Row("flat_told", "  told to be dropped", "%"),
        Row("flat_untold", "  bytes neither given nor told to be dropped", "bytes", "", most(0)),
    )

    def base(self) -> Figures:
        return {"rate": publishing.poured(printing.torrent(0, self.flat_out * MB), self.flat_out * MB) / MB}

    def ours(self) -> Figures:
        server, size = self.server, self.pace * self.secs * MB
        server.kill(server.spawn_many(3))  # what is imported late has been imported now
        before = _rss(server)
        paced = self._follow(server.endpoint, self.pace, size)
        found = {"rate": paced["rate"], "lost": paced["lost"], "grown": (_rss(server) - before) / 1024,
                 "client": paced["grown"] / 1024}
        local = self._follow(f"unix:{server.path}", self.pace, size)
        found.update(unix_rate=local["rate"], unix_lost=local["lost"])
        flat = self._follow(server.endpoint, 0, self.flat_out * MB)
        return {**found, "flat_rate": flat["rate"], "flat_agent": flat["agent"], "flat_told": flat["told"],
                "flat_untold": flat["untold"]}

    def _follow(self, address: str, pace: int, size: int) -> Figures:
        server = self.server
        agent = server.spawn(printing.torrent(pace * MB, size, word=printing.READY))
        follower = self.follower("drink", address, agent).ready()
        server.control(agent, "close_stdin")
        told = follower.told()
        whole = size + len(printing.READY)
        said = json.loads(server.control(agent, "read_stderr", offset=0)["data"])
        missed = whole - told["bytes"]
        wrong = 0 if missed or told["sha256"] == said["sha256"] else whole
        return {"rate": told["bytes"] / told["secs"] / MB, "lost": missed + wrong,
                "grown": told["grown"], "agent": size / said["secs"] / MB, "told": 100 * told["dropped"] / whole,
                "untold": abs(missed - told["dropped"]) + wrong}


class Crowd(_Served):
    """100 followers of 100 agents each: every byte to everyone."""

    name = "crowd"
    about = "100 followers, each of 100 agents"
    runs = 1
    agents, processes, each = 100, 4, 25
    lines, pause = 20, 0.05
    rows = (
        Row("wrong", "streams with a byte missing or wrong, of 10,000", "streams", "", most(0)),
        Row("messages", "  lines delivered", "1/s", "messages"),
        Row("joined", "  until all 100 were listening to all 100", "s"),
        Row("late", "  from the last line to the end of the last follower", "s"),
    )

    def base(self) -> Figures:
        return {"messages": publishing.shouted(self.agents * self.lines, self.processes * self.each)}

    def ours(self) -> Figures:
        server = self.server
        agents = [server.spawn(printing.counter(self.lines, self.pause)) for _ in range(self.agents)]
        began = time.monotonic()
        followers = [self.follower("crowd", server.endpoint, self.each, *agents) for _ in range(self.processes)]
        for follower in followers:
            follower.ready()
        joined = time.monotonic() - began
        began = time.monotonic()
        for agent in agents:
            server.control(agent, "close_stdin")
        until(lambda: server.health()["active_agents"] == 0, SECS, "the agents did not end")
        ended = time.monotonic()
        told: List[Dict[str, str]] = [one for follower in followers for one in follower.told()]
        over = time.monotonic()
        right = hashlib.sha256(printing.counted(self.lines)).hexdigest()
        right_ones = sum(sha == right for one in told for sha in one.values())
        count = self.agents * self.processes * self.each
        return {"wrong": count - right_ones, "messages": count * self.lines / (over - began), "joined": joined,
                "late": over - ended}


class Dead(_Served):
    """50 subscribers that take nothing: some stopped, some connected and idle, some gone without a word."""

    name = "dead"
    about = "memory of the server with 50 subscribers that are stopped, idle or gone"
    runs = 1
    lines, agents, flood = 40, 100, 200 * MB
    rows = (
        Row("printing", "memory grown by 50 dead subscribers, agents printing", "MiB", "", most(8)),
        Row("flooding", "  after 200 MB more of output", "MiB"),
        Row("delay", "  p99 of a health check meanwhile", "ms"),
    )

    def ours(self) -> Figures:
        self._print_lines()  # what is imported and allocated late has been, and memory is what it is
        self._print_lines()
        before = _rss(self.server)
        stopped, idle, gone = (self.follower("asleep", self.server.pub_endpoint, count) for count in (17, 16, 17))
        for follower in (stopped, idle, gone):
            follower.ready()
        stopped.process.send_signal(signal.SIGSTOP)
        gone.close()
        self._print_lines()
        quiet = _rss(self.server) - before
        agent = self.server.spawn(printing.torrent(0, self.flood))
        self.server.control(agent, "close_stdin")
        times = []
        while self.server.health()["active_agents"]:
            began = time.monotonic()
            self.server.health()
            times.append(time.monotonic() - began)
        flooding = _rss(self.server) - before
        return {"printing": quiet / 1024, "flooding": flooding / 1024,
                "delay": sorted(times)[int(len(times) * 0.99)] * 1e3}

    def _print_lines(self) -> None:
        agents = [self.server.spawn(printing.counter(self.lines, 0.02)) for _ in range(self.agents)]
        for agent in agents:
            self.server.control(agent, "close_stdin")
        until(lambda: self.server.health()["active_agents"] == 0, SECS, "the agents did not end")
        self.server.ask("batch_control_command", command_type="remove", agent_ids=agents)


def _rss(server: Server) -> float:
    """Return the memory of the server's processes in KiB."""
    return sum(memory(pid)["rss"] for pid in server.pids().values())
