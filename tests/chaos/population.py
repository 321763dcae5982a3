"""A thousand quiet agents that live through the whole run, whatever is done to the server.

Owns:    their spawning, their end, and the comparison of each with what it was at the beginning.
Runs in: the chaos process, before the first fault and after the last.
Unaware: of the faults. That there are so many is the point: what each of our processes hands to its successor is
         then larger than any socket's buffer.
"""
from __future__ import annotations

from typing import Dict, Optional

from accounting import Entry, Ledger

from agentserver import Agent, AgentClient, AgentInfo

CODE = 7
WAIT_SECS = 120.0
SCRIPT = f'echo "$0 lives"; read -r line; echo "$line" >&2; exit {CODE}'


class Population:
    """`size` agents that print a line, wait for one on their stdin, repeat it, and exit with `CODE`."""

    def __init__(self, address: str, size: int, ledger: Ledger) -> None:
        self._address, self._ledger = address, ledger
        self._pids: Dict[str, Optional[int]] = {}
        with AgentClient(address, timeout=WAIT_SECS) as client:
            for n in range(size):
                self._spawn(client, f"quiet-{n}")

    def _spawn(self, client: AgentClient, key: str) -> None:
        agent = client.spawn(["/bin/sh", "-c", SCRIPT, key], name=key, stdin="pipe", metadata={"key": key})
        self._ledger.others[key] = Entry(key, "", CODE, 0, "quiet", "population", id=agent.id, checked=True)
        self._pids[key] = agent.info().pid

    def end(self) -> None:
        """Let each agent read its line and end; compare its process, its bytes and its exit code."""
        entries = self._ledger.others.values()
        with AgentClient(self._address, timeout=WAIT_SECS) as client:
            for entry in entries:
                agent = client.agent(entry.id)
                self._check_alive(entry, agent.info())
                agent.write(f"{entry.key} ends\n")
            client.wait([entry.id for entry in entries], timeout=WAIT_SECS)
            for entry in entries:
                self._check_end(entry, client.agent(entry.id))
        self._ledger.add("quiet agents that lived through all", len(entries))

    def _check_alive(self, entry: Entry, info: AgentInfo) -> None:
        if (info.status, info.pid, info.attempt) != ("running", self._pids[entry.key], 1):
            self._ledger.loss("lost status", f"{entry.key} ({entry.id}) is {info.status}, pid {info.pid}, attempt "
                                             f"{info.attempt}; it was pid {self._pids[entry.key]}: {info.exit}")

    def _check_end(self, entry: Entry, agent: Agent) -> None:
        entry.exits = [attempt["exit"] for attempt in agent.inspect()["attempts"]]
        code = entry.exits[-1].get("code") if entry.exits else None
        if code is None and self._ledger.fostered:
            self._ledger.add("ends without a code, of agents that outlived a keeper")
        elif code != CODE:
            self._ledger.loss("missing", f"exit code: {entry.key} ({entry.id}): {entry.exits}, should be {CODE}")
        for stream, due in (("stdout", f"{entry.key} lives\n"), ("stderr", f"{entry.key} ends\n")):
            data = agent.read(stream).data
            if data != due.encode():
                self._ledger.loss("wrong", f"{entry.key} ({entry.id}): {stream} is {data!r}, should be {due!r}")
