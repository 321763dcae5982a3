"""How soon a subscriber knows: that an agent ended, and what it printed.

Owns:    the benchmarks `exit` and `lines`.
Runs in: the benchmark process; the agents say themselves when they ended or printed (CLOCK_MONOTONIC).
Unaware: of how the server does it.
"""
from __future__ import annotations

import json
import time
from typing import Any, Callable, Dict, List

import bare
import publishing
import zmq
from harness import BenchError, Server, Subscriber, percentile, until
from printing import clock
from table import Benchmark, Figures, Row, most

ENDED = ("completed", "failed", "terminated")


class SubSocket:
    """A bare SUB socket; gives the bodies of what is published."""

    def __init__(self, endpoint: str, topic: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 30_000)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._socket.connect(endpoint)

    def next(self) -> Dict[str, Any]:
        try:
            message: Dict[str, Any] = json.loads(self._socket.recv_multipart()[1])
        except zmq.Again:
            raise BenchError("nothing was published within 30 s") from None
        return message

    def body(self) -> bytes:
        body: bytes = self._socket.recv_multipart()[1]
        return body

    def quiet(self) -> bool:
        """Say whether nothing is waiting."""
        return not self._socket.poll(0)

    def close(self) -> None:
        self._socket.close()


class Exit(Benchmark):
    """From an agent's last instruction to the event at a subscriber, against a pidfd."""

    name = "exit"
    about = "exit to event"
    count = 40
    rows = (
        Row("unix_p50", "exit → event, p50, Unix socket", "ms", "p50", most(1)),
        Row("unix_p99", "exit → event, p99, Unix socket", "ms", "p99", most(3)),
        Row("zmq_p50", "exit → event, p50, ZeroMQ", "ms", "p50", most(1)),
        Row("zmq_p99", "exit → event, p99, ZeroMQ", "ms", "p99", most(3)),
    )

    def start(self) -> None:
        self._server = None if self.limits_only else Server().__enter__()

    def stop(self) -> None:
        if self._server is not None:
            self._server.__exit__()

    def base(self) -> Figures:
        return _p50_p99("", [bare.exit_notice() for _ in range(self.count)])

    def ours(self) -> Figures:
        assert self._server is not None
        local = Subscriber(self._server.path, ["status."])
        found = _p50_p99("unix_", [self._one(local.next) for _ in range(self.count)])
        local.close()
        remote = SubSocket(self._server.pub_endpoint, "status.")
        self._settle(remote)
        found.update(_p50_p99("zmq_", [self._one(remote.next) for _ in range(self.count)]))
        remote.close()
        return found

    def _settle(self, remote: SubSocket) -> None:
        """Wait until the subscription has arrived: until an agent's end is heard of."""
        assert self._server is not None
        server = self._server
        until(lambda: (server.spawn(("true",)), time.sleep(0.05), not remote.quiet())[-1], 20, "subscription")
        until(lambda: server.health()["active_agents"] == 0, 20, "agents did not end")
        time.sleep(0.05)
        while not remote.quiet():
            remote.body()

    def _one(self, hear: Callable[[], Dict[str, Any]]) -> float:
        assert self._server is not None
        agent = self._server.spawn(bare.LAST_WORDS)
        until(lambda: self._read(agent, 0), 20, "the agent said nothing")
        self._server.control(agent, "close_stdin")
        while True:
            event = hear()
            heard = time.monotonic_ns()
            if event.get("agent_id") == agent and event.get("status") in ENDED:
                break
        return (heard - int(self._read(agent, bare.READY))) / 1e9

    def _read(self, agent: str, offset: int) -> str:
        assert self._server is not None
        data: str = self._server.control(agent, "read_stdout", offset=offset)["data"]
        return data


class Lines(Benchmark):
    """From an agent's `write` to a SUB socket, against a process that reads a pipe and publishes."""

    name = "lines"
    about = "printed line to subscriber"
    count = 400
    pause = 0.002
    rows = (
        Row("zmq_p50", "printed line → subscriber, p50, ZeroMQ", "ms", "p50", most(0.8)),
        Row("zmq_p99", "printed line → subscriber, p99, ZeroMQ", "ms", "p99", most(3)),
        Row("unix_p50", "printed line → subscriber, p50, Unix socket", "ms", "p50"),
        Row("unix_p99", "printed line → subscriber, p99, Unix socket", "ms", "p99"),
    )

    def start(self) -> None:
        self._server = None if self.limits_only else Server().__enter__()

    def stop(self) -> None:
        if self._server is not None:
            self._server.__exit__()

    def base(self) -> Figures:
        with bare.Served("publishing", "relay", str(self.count), str(self.pause), "0", "1") as endpoint:
            return _p50_p99("", publishing.ages(endpoint, self.count))

    def ours(self) -> Figures:
        return {**self._over("zmq_"), **self._over("unix_")}

    def _over(self, link: str) -> Figures:
        server = self._server
        assert server is not None
        agent = server.spawn(clock(self.count, self.pause))
        topic = f"{agent}.stdout"
        subscriber = SubSocket(server.pub_endpoint, topic) if link == "zmq_" else Subscriber(server.path, [topic])
        while (first := subscriber.next())["topic"] != topic or first["data"]:
            pass  # the empty message that says: the subscription is there
        server.control(agent, "close_stdin")
        found = _p50_p99(link, self._ages(lambda: subscriber.next()["data"].encode()))
        subscriber.close()
        until(lambda: server.health()["active_agents"] == 0, 20, "the agent did not end")
        return found

    def _ages(self, hear: Callable[[], bytes]) -> List[float]:
        """Return how old each line was when it was heard."""
        ages: List[float] = []
        while len(ages) < self.count:
            data = hear()
            heard = time.monotonic_ns()
            ages += [(heard - int(line)) / 1e9 for line in data.split()]
        return ages


def _p50_p99(prefix: str, times: List[float]) -> Figures:
    return {f"{prefix}p50": percentile(times, 0.5) * 1e3, f"{prefix}p99": percentile(times, 0.99) * 1e3}
