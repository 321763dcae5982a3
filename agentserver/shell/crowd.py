"""What subscribers cost us: libzmq keeps whatever they send, so whoever sends far too much is cut off.

Owns:    an account of what each connection has spent, of memory or of our time, and the bound of all.
Runs in: the monitor thread.
Unaware: of what a message means, and of how libzmq keeps a prefix: about `NODE_BYTES` for each byte.

A connection is known by its descriptor, which libzmq tells with each message, and by the number
of the socket behind that, since descriptors are used again. One that is cut off connects anew by
itself; where it is honest it subscribes to what it needs now, and reads what it has missed.
"""
from __future__ import annotations

from typing import Dict, Tuple

from .cutting import Cutter, number

MOST_BYTES = 64 * 1024 * 1024
NODE_BYTES = 48     # for each byte of a prefix that is new
JOIN_BYTES = 128    # for each subscriber of a prefix, and for any other message
#: messages heard in one go. Beyond it they come faster than we hear, and wait in a queue that libzmq does not bound.
MOST_UNHEARD = 20_000


class Crowd:
    """See the module."""

    def __init__(self, most: int, cutter: Cutter) -> None:
        self._most, self._cutter = most, cutter
        self._total = 0
        self._spent: Dict[int, Tuple[int, int]] = {}   # descriptor -> the socket's number, cost

    def spend(self, fd: int, cost: int) -> None:
        """A connection has cost something; beyond the bound the one that has cost most is cut off."""
        now = number(fd)
        before, spent = self._spent.get(fd, (now, 0))
        if before != now:          # the descriptor is another connection's now
            self._total -= spent
            spent = 0
        self._spent[fd] = (now, spent + cost)
        self._total += cost
        if self._total > self._most:
            self._forget_closed()
            if self._total > self._most:
                self._cut_greediest()

    def forget(self) -> None:
        """Begin anew."""
        self._total = 0
        self._spent.clear()

    def _forget_closed(self) -> None:
        self._spent = {fd: (socket, spent) for fd, (socket, spent) in self._spent.items() if number(fd) == socket}
        self._total = sum(spent for _socket, spent in self._spent.values())

    def _cut_greediest(self) -> None:
        fd = max(self._spent, key=lambda fd: self._spent[fd][1])
        socket, spent = self._spent.pop(fd)
        self._total -= spent
        self._cutter.cut(fd, socket)
