"""What subscribers cost us: libzmq keeps whatever they send, so whoever sends far too much is cut off.

Owns:    an account of what each connection has spent, of memory or of our time, and the bound of all.
Runs in: the monitor thread.
Unaware: of what a message means, and of how libzmq keeps a prefix: about `NODE_BYTES` for each byte.

A connection is known by its descriptor, which libzmq tells with each message, and by the number
of the socket behind that, since descriptors are used again. One that is cut off connects anew by
itself; where it is honest it subscribes to what it needs now, and reads what it has missed.
"""
from __future__ import annotations

import os
import socket
from typing import Dict, Tuple

MOST_BYTES = 64 * 1024 * 1024
NODE_BYTES = 48     # for each byte of a prefix that is new
JOIN_BYTES = 128    # for each subscriber of a prefix, and for any other message
#: messages heard in one go. Beyond it they come faster than we hear, and wait in a queue that libzmq does not bound.
MOST_UNHEARD = 20_000


class Crowd:
    """See the module."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._total = 0
        self._spent: Dict[int, Tuple[int, int]] = {}   # descriptor -> the socket's number, cost

    def spend(self, fd: int, cost: int) -> None:
        """A connection has cost something; beyond the bound the one that has cost most is cut off."""
        number = _number(fd)
        before, spent = self._spent.get(fd, (number, 0))
        if before != number:       # the descriptor is another connection's now
            self._total -= spent
            spent = 0
        self._spent[fd] = (number, spent + cost)
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
        self._spent = {fd: (number, spent) for fd, (number, spent) in self._spent.items() if _number(fd) == number}
        self._total = sum(spent for _number_, spent in self._spent.values())

    def _cut_greediest(self) -> None:
        fd = max(self._spent, key=lambda fd: self._spent[fd][1])
        self._total -= self._spent.pop(fd)[1]
        try:
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has gone by itself


def _number(fd: int) -> int:
    """Return the number of the socket behind a descriptor, 0 if there is none."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0
