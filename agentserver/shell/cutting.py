"""Cutting off one connection of libzmq's, by its descriptor, and never another one.

Owns:    two descriptors that are kept for it, so that it works also when there are no more.
Runs in: any thread; one cut at a time.
Unaware: of why. An honest client that was cut off connects anew by itself, and asks again.

libzmq closes a descriptor as soon as its peer leaves, and the kernel uses the number again. So a copy is made, and it
is shut down only if it is the socket that was meant: each socket has a number of its own, which fstat(2) tells.
"""
from __future__ import annotations

import os
import socket
import struct
import threading

_AT_ONCE = struct.pack("@ii", 1, 0)  # what the kernel still has for a peer that does not read goes, too (socket(7))


def number(fd: int) -> int:
    """Return the number of the socket behind a descriptor, 0 if there is none."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0


class Cutter:
    """See the module."""

    def __init__(self) -> None:
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._copy = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def cut(self, fd: int, wanted: int) -> bool:
        """Shut the socket with the number `wanted` down if it is still behind this descriptor; return whether it was.
        """
        with self._lock:
            try:
                os.dup2(fd, self._copy, inheritable=False)
            except OSError:
                return False  # it has gone by itself
            try:
                return number(self._copy) == wanted and self._shut_down()
            finally:
                os.dup2(self._nothing, self._copy, inheritable=False)  # a copy would keep the connection open

    def _shut_down(self) -> bool:
        sock = socket.socket(fileno=self._copy)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # its peer has just left
        finally:
            sock.detach()
        return True

    def close(self) -> None:
        """Let go of both descriptors."""
        os.close(self._nothing)
        os.close(self._copy)
