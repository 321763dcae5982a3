"""A follower as a process of its own, so that it can be stopped, continued and killed like a person's laptop.

    follower.py ADDRESS HWM output AGENT…     follows the agents to their ends
    follower.py ADDRESS HWM events SINCE UNTIL  follows events after SINCE until one of the agent named UNTIL has ended

Owns:    the accounting of what it was given: order, size, SHA-256, what was said to be dropped.
Runs in: a process that a test starts; it says `following` first and one JSON object last.
Unaware: of what was written: the test compares.
"""
from __future__ import annotations

import hashlib
import json
import sys
from typing import Any, Dict, List

from agentserver import AgentClient, OutputDropped


class Account:
    """What came of one stream."""

    def __init__(self) -> None:
        self.size, self.sha, self.at = 0, hashlib.sha256(), 0
        self.dropped: List[List[int]] = []
        self.wrong: List[str] = []

    def take(self, what: Any) -> None:
        """Count a chunk, or a gap that was told."""
        if isinstance(what, OutputDropped):
            self.gap(what.from_offset, what.to_offset)
            return
        if what.offset != self.at:
            self.wrong.append(f"{what.offset} came where {self.at} was due")
        self.sha.update(what.data)
        self.size += len(what.data)
        self.at = what.next_offset

    def gap(self, start: int, stop: int) -> None:
        """Note a gap."""
        if start != self.at:
            self.wrong.append(f"a gap from {start} was told at {self.at}")
        self.dropped.append([start, stop])
        self.at = stop

    def told(self) -> Dict[str, Any]:
        """Return it as JSON."""
        return {"size": self.size, "sha256": self.sha.hexdigest(), "end": self.at, "dropped": self.dropped,
                "wrong": self.wrong}


def output(client: AgentClient, refs: List[str]) -> Dict[str, Any]:
    """Follow both streams of some agents."""
    accounts = {f"{ref}.{name}": Account() for ref in refs for name in ("stdout", "stderr")}
    following = client.follow(refs)
    print("following", flush=True)
    for ref, name, what in following:
        accounts[f"{ref}.{name}"].take(what)
    return {topic: account.told() for topic, account in accounts.items()}


def events(client: AgentClient, since: int, until: str) -> List[Any]:
    """Follow events; return them all."""
    found = []
    print("following", flush=True)
    for event in client.follow_events(since):
        found.append(event if isinstance(event, dict) else vars(event))
        if event.get("agent_id") == until and event.get("status") in ("completed", "failed", "terminated"):
            break
    return found


def main(argv: List[str]) -> None:
    """See the module."""
    address, hwm, what, *rest = argv
    if "://" in address:
        from agentserver.shell.link import ZmqLink
        ZmqLink.queued_events = int(hwm)
    with AgentClient(address) as client:
        print(json.dumps(output(client, rest) if what == "output" else events(client, int(rest[0]), rest[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
