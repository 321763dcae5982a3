"""How many connections there may be: so many that accepting one more never fails.

Owns:    the bound of all connections together, and the choice of who is cut off when they come near it.
Runs in: the thread that hears of connections (zap.py).
Unaware: of what connections are for.

libzmq spins when it cannot accept for want of descriptors, and who comes then waits in silence. So some are kept free:
when connections take more, those that have never sent anything are cut off, oldest first, then those that have been
quiet for longest.
"""
from __future__ import annotations

import heapq
import os
import resource
from typing import Sequence, Tuple

from .connections import Connection, Connections

KEPT_FREE = 64       # descriptors
_AT_ONCE = 16        # connections that are cut off together, so that not each new one has to look for one
_UNKNOWN_OWN = 64    # descriptors of our own, where the system does not list them


def raise_limit() -> None:
    """Raise our soft RLIMIT_NOFILE to the hard one. For a process of ours, not for one that we are embedded in."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS reports an infinite hard limit that cannot be set
        pass


class Descriptors:
    """See the module. Made when all that we need ourselves is open."""

    def __init__(self, sockets: Sequence[Connections]) -> None:
        self._sockets = sockets
        self._limit, self._own = resource.getrlimit(resource.RLIMIT_NOFILE)[0], _open()
        self._leaving: set[Tuple[int, int]] = set()   # cut off already: descriptor and serial number

    @property
    def most(self) -> int:
        """How many connections may stay."""
        return max(self._limit - self._own - KEPT_FREE, 1)

    def make_room(self) -> None:
        """Cut some off if there are too many."""
        too_many = sum(map(len, self._sockets)) - self.most
        if too_many <= 0:
            self._leaving.clear()
            return
        there = [(connection.heard, connection.since, connection.serial, sock, connection)
                 for sock in self._sockets for connection in sock]
        self._leaving &= {(connection.fd, connection.serial) for *_order, connection in there}
        wanted = too_many - len(self._leaving)
        if wanted > 0:
            stay = [each for each in there if (each[-1].fd, each[-1].serial) not in self._leaving]
            for *_order, sock, connection in heapq.nsmallest(wanted + _AT_ONCE, stay, key=_order_of):
                sock.cut(connection)
                self._leaving.add((connection.fd, connection.serial))


def _order_of(each: Tuple[float, float, int, Connections, Connection]) -> Tuple[float, float, int]:
    """Who goes first: `heard` is 0.0 for those who never sent anything."""
    return each[:3]


def _open() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return _UNKNOWN_OWN
