"""A thousand agents are handed over like one: what core and keeper say to each other then fits into no buffer.

Owns:    deaths of core and keeper and a reload, with more agents than a socket holds messages.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of how long it takes, which `make bench` measures (`many`).
"""
from __future__ import annotations

import resource
import sys
from typing import Any, Callable

import pytest
from support import Server
from test_survival import by_request, kill_core, reload, successor
from wire import LineWire

AGENTS = 1000
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")


def listed(wire: LineWire) -> dict[str, Any]:
    """Return pid and status of every agent."""
    found: dict[str, Any] = {}
    while agents := wire.agents(limit=500, offset=len(found)):
        found.update({each["id"]: (each["pid"], each["status"]) for each in agents})
    return found


def test_a_thousand_agents_are_handed_over(start_server: Callable[..., Server]) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 9 * AGENTS:
        pytest.skip(f"{AGENTS} agents need more descriptors than this user may have (ulimit -Hn)")
    server = start_server("--max-agents", str(AGENTS + 2))
    with LineWire(server.socket_path) as wire:
        echo = wire.spawn("echo")
        for _ in range(AGENTS):
            wire.ok("spawn_request", config={"command": ["/bin/sleep", "1000"]})
        before = listed(wire)
    assert len(before) == AGENTS + 1

    def all_as_before() -> None:
        with LineWire(server.socket_path) as wire:
            assert listed(wire) == before
    kill_core(server)
    all_as_before()
    reload(server, by_request)
    all_as_before()
    heir = successor(start_server, server)
    all_as_before()
    kill_core(heir)
    all_as_before()
    with LineWire(heir.socket_path) as wire:
        wire.control(echo, "write_stdin", data="x\n", eof=True)
        assert wire.output(echo) == b"ready\nx\n"
    server.process.stdout.close()  # type: ignore[union-attr]
