"""What the keeper holds for the next core: copies of agents' descriptors, and ends that only it saw.

Owns:    the copies, by agent and name, and the ends of processes that became the keeper's children.
Runs in: the keeper.
Unaware: of what an agent is: an id is a word, a descriptor a number.

First start, a crash of the core and its upgrade are one path: the new core is handed all of this, then
`go`. An end is kept until a core says that it is known.
"""
from __future__ import annotations

import os

from .channel import Channel, Json
from .process import Ended

ENDS_MOST = 10_000


class Held:
    """See the module."""

    def __init__(self) -> None:
        self._fds: dict[str, dict[str, int]] = {}
        self._ends: dict[int, list[object]] = {}

    def hear(self, word: Json) -> None:
        """Do what the core asks: hold, release, or forget an end."""
        if "hold" in word:
            self._fds.setdefault(word["hold"], {}).update(zip(word["names"], word["fds"]))
        elif "release" in word:
            held = self._fds.get(word["release"], {})
            for name in word["names"] or list(held):
                fd = held.pop(name, -1)
                if fd >= 0:
                    os.close(fd)
            if not held:
                self._fds.pop(word["release"], None)
        elif "known" in word:
            self._ends.pop(word["known"], None)

    def ended(self, pid: int, ended: Ended, start: int, core: Channel | None) -> None:
        """A process that is no part of the server has ended: tell the core, and remember it until it is known."""
        self._ends[pid] = [pid, start, *ended]
        if len(self._ends) > ENDS_MOST:
            del self._ends[next(iter(self._ends))]
        if core is not None:
            core.send({"ended": self._ends[pid]})

    def hand_over(self, core: Channel) -> None:
        """Give everything to a core that was just started."""
        for agent_id, fds in self._fds.items():
            core.send({"held": agent_id, "names": list(fds)}, list(fds.values()))
        for end in self._ends.values():
            core.send({"ended": end})
        core.send({"go": True})
