"""What the keeper holds for the next core: copies of agents' descriptors, and ends that only it saw.

Owns:    the copies, by agent and name, and the ends of processes that became the keeper's children.
         Each copy is also given to the service manager's store, if there is one, and taken back from it at the start.
Runs in: the keeper.
Unaware: of what an agent is: an id is a word, a descriptor a number.

First start, a crash of the core and its upgrade are one path: the new core is handed all of this, then
`go`. An end is kept until a core says that it is known.
"""
from __future__ import annotations

import os
import time
from typing import Iterator, Mapping, Sequence

from .channel import LOST, Channel, Json
from .notify import Notify
from .process import Ended, descriptor_limit
from .tree import Proc

ENDS_MOST = 10_000
WITH_CORE_SECS = 1.0  # after the end of a core, in which an end is put down to it
AGAIN_SECS = 2.0  # between two tries to have descriptors for which there was no room
KEPT_FREE = 32  # descriptors that are not taken up by copies: without any no core could be started again


class Held:
    """See the module. `stored` is what the manager gave back, by `<agent id>.<name>`."""

    def __init__(self, manager: Notify, stored: Mapping[str, int]) -> None:
        self._manager = manager
        self._fds: dict[str, dict[str, int]] = {}
        self._lost: set[str] = set()  # agents of which we had no room for a descriptor
        self._lost_at = 0.0           # when to ask for them next
        self._ends: dict[int, list[object]] = {}
        self._with_core: set[int] = set()   # who ended in the moment in which a core did
        self._core_ended = float("-inf")    # monotonic
        for both, fd in stored.items():
            agent_id, dot, name = both.partition(".")
            if dot:
                self._fds.setdefault(agent_id, {})[name] = fd
            else:  # nothing that we ever stored
                os.close(fd)
        self._tell()

    @property
    def agents(self) -> set[str]:
        """The agents of which something is held."""
        return set(self._fds)

    def hear(self, word: Json) -> None:
        """Do what the core asks: hold, release, or forget an end."""
        if "hold" in word:
            self._fds.setdefault(word["hold"], {})
            for name, fd in zip(word["names"], word.get("fds", ())):
                self._hold(word["hold"], name, fd)
            self._tell()
        elif "release" in word:
            for name in word["names"] or list(self._fds.get(word["release"], {})):
                self._release(word["release"], name)
            if not word["names"]:  # until then an agent of which nothing is held is still one that lives
                self._fds.pop(word["release"], None)
                self._lost.discard(word["release"])
            self._tell()
        elif "known" in word:
            self._forget(word["known"])

    def lost(self, now: float) -> list[str]:
        """Return of which agents a descriptor was lost, for the core to give it to us again; not all the time."""
        if not self._lost or now < self._lost_at:
            return []
        lost, self._lost, self._lost_at = sorted(self._lost), set(), now + AGAIN_SECS
        return lost

    def drop(self) -> None:
        """Let go of everything: a core that lives has all that is true, and gives it to us."""
        for agent_id, held in self._fds.items():
            for name in list(held):
                self._release(agent_id, name)
        self._fds.clear()

    def _hold(self, agent_id: str, name: str, fd: int) -> None:
        self._release(agent_id, name)  # of one name there is one
        if fd == LOST or fd >= descriptor_limit() - KEPT_FREE:  # the kernel gives the lowest number that is free
            self._lost.add(agent_id)
            if fd != LOST:
                os.close(fd)
            return
        self._fds.setdefault(agent_id, {})[name] = fd
        self._manager.store(f"{agent_id}.{name}", fd)

    def _release(self, agent_id: str, name: str) -> None:
        fd = self._fds.get(agent_id, {}).pop(name, -1)
        if fd >= 0:
            os.close(fd)
            self._manager.remove(f"{agent_id}.{name}")

    def _tell(self) -> None:
        self._manager.status(f"{len(self._fds)} agents are held")

    def core_ended(self) -> None:
        """A core has ended. The kernel signals those of its children that asked for that (PR_SET_PDEATHSIG)."""
        self._core_ended = time.monotonic()

    def ended(self, pid: int, ended: Ended, seen: Proc | None, core: Channel | None) -> None:
        """A process that is no part of the server has ended: tell the core, and remember it until it is known."""
        start, leader = (seen.start, seen.session == pid) if seen is not None else (0, False)
        self._ends[pid] = [pid, start, leader, *ended[:4]]
        if time.monotonic() - self._core_ended < WITH_CORE_SECS:
            self._with_core.add(pid)
        if len(self._ends) > ENDS_MOST:
            self._forget(next(iter(self._ends)))
        if core is not None:
            core.send(self._told(pid))

    def _told(self, pid: int) -> Json:
        return {"ended": self._ends[pid], "with_core": pid in self._with_core}

    def _forget(self, pid: int) -> None:
        self._ends.pop(pid, None)
        self._with_core.discard(pid)

    def state(self) -> tuple[dict[str, dict[str, int]], list[list[object]]]:
        """Return everything, for a newer version of us; the numbers of the descriptors stay as they are."""
        return self._fds, list(self._ends.values())

    def restore(self, fds: dict[str, dict[str, int]], ends: list[list[object]]) -> None:
        """Take back what `state` returned in an older version of us."""
        self._fds, self._ends = fds, {int(str(end[0])): end for end in ends}
        for names in fds.values():
            for fd in names.values():
                os.set_inheritable(fd, False)

    def hand_over(self, core: Channel) -> None:
        """Give everything to a core that was just started."""
        core.send_each(self._everything())

    def _everything(self) -> Iterator[tuple[Json, Sequence[int]]]:
        for agent_id in list(self._fds):
            if agent_id in self._fds:
                yield {"held": agent_id, "names": list(self._fds[agent_id])}, list(self._fds[agent_id].values())
        for pid in list(self._ends):
            if pid in self._ends:
                yield self._told(pid), ()
        yield {"go": True}, ()
