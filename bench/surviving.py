"""How soon a server with very many agents serves again, when a part of it dies or is replaced.

Owns:    the benchmark `many`.
Runs in: the benchmark process.
Unaware: of how the server does it.
"""
from __future__ import annotations

import json
import os
import signal
import time
from typing import Any, Dict

from harness import BenchError, Server, UnixClient, expect, request, until
from table import Benchmark, Figures, Row, least, most

PAGE = 500


class Many(Benchmark):
    """2,000 agents; the core is SIGKILLed, the server is reloaded, the keeper is SIGKILLed and served again."""

    name = "many"
    about = "2,000 agents: served again after a death of the core, a reload, a death of the keeper"
    runs = 1
    agents = 2000
    rows = (
        Row("core", "core SIGKILLed → served again, 2,000 agents", "ms", "", most(2000)),
        Row("reload", "reload asked for → served by the next core", "ms", "", most(2000)),
        Row("keeper", "keeper SIGKILLed, serve → adopted", "ms", "", most(2000)),
        Row("left", "agents that are as they were after all that", "of 2000", "", least(2000)),
    )

    def ours(self) -> Figures:
        with Server(max_agents=self.agents + 1) as server:
            server.spawn_many(self.agents)
            before = _all(server)
            found = {"core": self._core(server), "reload": self._reload(server), "keeper": self._keeper(server)}
            after = _all(server)
            found["left"] = sum(after.get(each) == facts for each, facts in before.items())
            return found

    @staticmethod
    def _core(server: Server) -> float:
        return _replaced(server, "core_pid", lambda core: os.kill(core, signal.SIGKILL))

    @staticmethod
    def _reload(server: Server) -> float:
        return _replaced(server, "core_pid", lambda core: expect(server.ask("reload_request")))

    @staticmethod
    def _keeper(server: Server) -> float:
        def again(keeper: int) -> None:
            os.kill(keeper, signal.SIGKILL)
            os.waitpid(keeper, 0)
            server.launch()
        return _replaced(server, "pid", again)


def _replaced(server: Server, who: str, deed: Any) -> float:
    """Do a deed to a process; return after how many ms a health check names another in its place."""
    victim = _metadata(server)[who]
    began = time.monotonic()
    deed(int(victim))
    until(lambda: _metadata(server).get(who, victim) != victim, 60, f"no other {who}")
    took = (time.monotonic() - began) * 1e3
    server.close_client()
    until(lambda: _metadata(server).get("endpoint"), 60, "no shell")
    return took


def _metadata(server: Server) -> Dict[str, str]:
    """Ask on a connection of its own; nothing while nobody answers."""
    try:
        client = UnixClient(server.path)
        try:
            found: Dict[str, str] = json.loads(client.ask(request("health_check_request")))["metadata"]
        finally:
            client.close()
    except (OSError, BenchError):
        return {}
    return found


def _all(server: Server) -> Dict[str, Any]:
    """Return pid and status of every agent."""
    found: Dict[str, Any] = {}
    while True:
        agents = expect(server.ask("list_agents_request", limit=PAGE, offset=len(found)))["agents"]
        found.update({each["id"]: (each["pid"], each["status"]) for each in agents})
        if len(agents) < PAGE:
            return found
