"""How soon 10,000 events are told again.

Owns:    the benchmark `replay`.
Runs in: the benchmark process.
Unaware: of how the server keeps them.
"""
from __future__ import annotations

import contextlib
import json
import time

import publishing
from following import Follower
from harness import BenchError, Server, UnixClient, ZmqClient, expect, request
from table import Benchmark, Figures, Row, most

EVENTS = 10_000


class Replay(Benchmark):
    """10,000 stored events, asked for at once and page by page, against sqlite → JSON → parsed in one process."""

    name = "replay"
    about = "10,000 events replayed"
    runs = 3
    rows = (
        Row("zmq", "10,000 events in one page, ZeroMQ", "s", "whole", most(0.3)),
        Row("unix", "10,000 events in one page, Unix socket", "s", "whole", most(0.3)),
        Row("zmq_client", "10,000 events by AgentClient, page by page, ZeroMQ", "s", "whole", most(0.3)),
        Row("unix_client", "10,000 events by AgentClient, page by page, Unix", "s", "whole", most(0.3)),
    )

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        if not self.limits_only:
            self.server = self._stack.enter_context(Server())
            self._make()

    def stop(self) -> None:
        self._stack.close()

    def _make(self) -> None:
        """Pause and continue agents until there are as many events."""
        server, agents = self.server, self.server.spawn_many(50)
        while int(server.ask("events_request", since=2 ** 62)["next"]) < EVENTS:
            for command in ("pause", "resume"):
                server.ask("batch_control_command", command_type=command, agent_ids=agents)
        server.kill(agents)

    def base(self) -> Figures:
        return {"whole": publishing.replayed(EVENTS)}

    def ours(self) -> Figures:
        found: Figures = {}
        for link, raw in (("zmq", ZmqClient(self.server.endpoint)), ("unix", UnixClient(self.server.path))):
            began = time.monotonic()
            reply = expect(json.loads(raw.ask(request("events_request", limit=EVENTS))))
            found[link] = time.monotonic() - began
            _check(len(reply["events"]))
            raw.close()
        for link, address in (("zmq", self.server.endpoint), ("unix", f"unix:{self.server.path}")):
            follower = Follower("events", address, EVENTS)
            try:
                told = follower.told()
            finally:
                follower.close()
            found[f"{link}_client"] = told["secs"]
            _check(told["count"])
        return found


def _check(count: int) -> None:
    if count != EVENTS:
        raise BenchError(f"{count} of {EVENTS} events came")
