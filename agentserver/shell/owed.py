"""Replies on their way out: given to libzmq, or kept for who does not take them, for a while.

Owns:    sending to the ROUTER socket, and the bounds on what is kept for one client and for all.
Runs in: the thread of the request loop.
Unaware: of what a reply says.

libzmq keeps some replies for each connection and refuses the next one (EAGAIN). When it would take it does not say, so
what is owed is tried again, every 20 ms. How many bytes it keeps it does not say either, so of large replies no more
are given to it while the kernel still has something for the same client. A client that takes nothing for too long, or
that is owed too much, is cut off: it has not read what it asked for.
"""
from __future__ import annotations

import errno
import fcntl
import termios
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq
import zmq.backend

from .connections import INFINITE
from .peers import Peer

OWED_MOST = 16 * 1024 * 1024         # bytes of one connection's replies, beside those that libzmq has
OWED_SECS = 10.0                     # for which nothing of them was taken
IN_LIBZMQ_MOST = 8 * 1024 * 1024     # of large replies that libzmq may have for one connection, and one more
ALL_MOST = 256 * 1024 * 1024         # of all connections, with those that libzmq has; who has most of them is cut off
AGAIN_SECS = 0.02
_MORE, _LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)  # of an enum they would be made anew for each frame
_LARGE = 64 * 1024                   # smaller replies are not counted among what libzmq has: they are few


class Owed:
    """See the module. `cut` cuts a client off; `freed` is told of one that is owed nothing any more."""

    def __init__(self, router: zmq.Socket[Any], cut: Callable[[Peer], None], freed: Callable[[Peer], None]) -> None:
        self._router, self._cut, self._freed = router, cut, freed
        self._put = partial(zmq.backend.Socket.send, router)  # spares checks that other kinds of sockets need
        self._debts: dict[Peer, None] = {}
        self._large: dict[Peer, None] = {}   # who was sent large replies of late
        self.bytes = 0                       # owed
        self.again_at = INFINITE             # when `pay` is due (monotonic)

    def send(self, peer: Peer, frames: list[bytes]) -> None:
        """Send a reply, or keep it; one to a client that has gone is dropped."""
        if peer.owed or not self._sent(peer, frames):
            self._keep(peer, frames)

    def _sent(self, peer: Peer, frames: list[bytes]) -> bool:
        """Return False if libzmq takes no more for this client now, or has enough."""
        size = len(frames[-1])
        if size > _LARGE and sum(peer.sizes) > IN_LIBZMQ_MOST:
            if _has_unsent(peer.connection.fd):
                return False
            peer.sizes.clear()
        send, begun = self._put, False
        try:
            for frame in frames[:-1]:
                send(frame, _MORE)
                begun = True
            send(frames[-1], _LAST)
        except zmq.Again:
            return False
        except MemoryError:
            if begun:  # or the next reply would become a part of this one
                send(b"", _LAST)
            self._cut(peer)
            return True
        except zmq.ZMQError as e:
            if e.errno != errno.EHOSTUNREACH:
                raise
            return True  # it has gone
        if size > _LARGE:
            self._count(peer, size)
        return True

    def _keep(self, peer: Peer, frames: list[bytes]) -> None:
        now, size = time.monotonic(), len(frames[-1])
        if not peer.owed:
            peer.owed_since = now
            self._debts[peer] = None
            self.again_at = now + AGAIN_SECS
        peer.owed.append(frames)
        peer.owed_bytes += size
        self.bytes += size
        if peer.owed_bytes > OWED_MOST:
            self._write_off(peer)
        self._bound()

    # ------------------------------------------------------------ again

    def pay(self) -> None:
        """Try again to send what is owed; cut off who has taken nothing for too long."""
        now = time.monotonic()
        for peer in list(self._debts):
            while peer.owed and self._sent(peer, peer.owed[0]):
                self.bytes -= len(peer.owed[0][-1])
                peer.owed_bytes -= len(peer.owed.popleft()[-1])
                peer.owed_since = now
            if not peer.owed:
                del self._debts[peer]
                self._freed(peer)
            elif now - peer.owed_since > OWED_SECS:
                self._write_off(peer)
        self.again_at = now + AGAIN_SECS if self._debts else INFINITE

    def _write_off(self, peer: Peer) -> None:
        self.bytes -= peer.owed_bytes
        peer.owed_bytes = 0
        peer.owed.clear()
        self._debts.pop(peer, None)
        self._large.pop(peer, None)
        self._cut(peer)
        self._freed(peer)

    # ------------------------------------------------------------ all together

    def _count(self, peer: Peer, size: int) -> None:
        """Note a large reply, which libzmq has now, or has sent already."""
        peer.sizes.append(size)
        self._large[peer] = None
        self._bound()

    def _bound(self) -> None:
        if self._unread() > ALL_MOST:
            self._large = {peer: None for peer in self._large if _has_unsent(peer.connection.fd) or peer.owed}
            while self._unread() > ALL_MOST:
                self._write_off(max([*self._large, *self._debts], key=lambda peer: peer.owed_bytes + sum(peer.sizes)))

    def _unread(self) -> int:
        return self.bytes + sum(sum(peer.sizes) for peer in self._large)


def _has_unsent(fd: int) -> bool:
    """Whether the kernel has something that the other end has not got (tcp(7), SIOCOUTQ, which is TIOCOUTQ)."""
    try:
        return any(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))
    except OSError:
        return False
