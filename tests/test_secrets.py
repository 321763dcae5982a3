"""Values of environment variables, hunted in replies, events, logs and files.

Owns:    one needle, and all the places where it must not be.
Runs in: the test process; the server is real.
Unaware: of what an agent itself prints.
"""
from __future__ import annotations

import json

from support import Server, agent, wait_until
from wire import LineWire, Wire

NEEDLE = "needle-4711-in-the-hay"


def places(server: Server) -> set[str]:
    """Return the files of the server that hold the needle."""
    found = set()
    for path in server.state_dir.rglob("*"):
        if path.is_file() and NEEDLE.encode() in path.read_bytes():
            found.add(path.name)
    return found


def test_a_value_is_told_to_nobody(wire: Wire, shared_server: Server) -> None:
    config = {"command": agent("sleeper"), "name": "secretive", "environment": {"KEY": NEEDLE}}
    started = wire.ok("spawn_request", config=config)["agent_info"]["id"]
    told = [wire.agents(all=True), wire.control(started, "inspect"), wire.ok("events_request", agent_id=started),
            wire.ok("custom_action_request", agent_id=started, action="get_env"), wire.ok("stats_request"),
            wire.ok("health_check_request"), wire.ask("spawn_request", config={**config, "command": ["/no/program"]}),
            wire.ask("spawn_request", config={**config, "environment": {"KEY": [NEEDLE]}}),
            wire.ask("spawn_request", config={**config, "environment": {"KEY": NEEDLE + "\0"}})]
    assert "KEY" in json.dumps(told) and NEEDLE not in json.dumps(told)
    wire.control(started, "kill")
    assert NEEDLE not in json.dumps(wire.ended(started)) and NEEDLE not in shared_server.logs()


def test_what_is_removed_is_in_no_file_a_moment_later(server: Server) -> None:
    """Nor is it in the free pages of the registry, or in its log of what was written last."""
    with LineWire(server.socket_path) as wire:
        started = wire.ok("spawn_request", config={"command": ["true"], "task": NEEDLE, "environment": {"KEY": NEEDLE},
                                                   "labels": {"a": NEEDLE}})["agent_info"]["id"]
        wire.ended(started)
        assert places(server)
        wire.control(started, "remove")
        wait_until(lambda: not places(server), what="it to be overwritten")
