"""What subscriptions cost: libzmq keeps every prefix that it is sent, so whoever sends far too many is cut off.

Owns:    an estimate of the memory that the subscriptions of each connection take, and the bound of all.
Runs in: the monitor thread.
Unaware: of what a prefix means, and of how libzmq keeps it: about `NODE_BYTES` for each byte.

A connection is known by its descriptor, which libzmq tells with each subscription, and by the number
of the socket behind that, since descriptors are used again. One that is cut off connects anew by
itself; where it is honest it subscribes to what it needs now, and reads what it has missed.
"""
from __future__ import annotations

import os
import socket
from typing import Dict, Tuple

MOST_BYTES = 64 * 1024 * 1024
NODE_BYTES = 48     # for each byte of a prefix that is new
JOIN_BYTES = 128    # for each subscriber of a prefix


class Crowd:
    """See the module."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._total = 0
        self._spent: Dict[int, Tuple[int, int]] = {}   # descriptor -> the socket's number, bytes

    def joined(self, fd: int, new_bytes: int) -> None:
        """A prefix came over a connection, with so many bytes that nobody had subscribed to before."""
        cost, number = JOIN_BYTES + NODE_BYTES * new_bytes, _number(fd)
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
