"""Which agents a name or the beginning of an id can mean, found without looking at all of them.

Owns:    an index of names and ids.
Runs in: the core's thread; it is pure.
Unaware: of what agents are, and of which one of several is meant (supervisor.py).
"""
from __future__ import annotations

from bisect import bisect_left, insort
from typing import Iterable, Tuple


class Names:
    """See the module."""

    def __init__(self, known: Iterable[Tuple[str, str]] = ()) -> None:
        self._ids: list[str] = []  # sorted
        self._named: dict[str, dict[str, None]] = {}  # by name: ids, the oldest first
        for agent_id, name in known:
            self._ids.append(agent_id)
            self._named.setdefault(name, {})[agent_id] = None
        self._ids.sort()

    def add(self, agent_id: str, name: str) -> None:
        """Enter a new agent."""
        insort(self._ids, agent_id)
        self._named.setdefault(name, {})[agent_id] = None

    def remove(self, agent_id: str, name: str) -> None:
        """Forget an agent."""
        at = bisect_left(self._ids, agent_id)
        if self._ids[at:at + 1] == [agent_id]:
            del self._ids[at]
        named = self._named.get(name, {})
        named.pop(agent_id, None)
        if not named:
            self._named.pop(name, None)

    def named(self, name: str) -> list[str]:
        """Return the ids of all agents of a name, the oldest first."""
        return list(self._named.get(name, ()))

    def beginning(self, prefix: str) -> list[str]:
        """Return all ids that begin so."""
        at = bisect_left(self._ids, prefix)
        found = []
        while at < len(self._ids) and self._ids[at].startswith(prefix):
            found.append(self._ids[at])
            at += 1
        return found
