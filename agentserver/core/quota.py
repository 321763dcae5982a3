"""What local clients make the core keep, and the bound of all together.

Owns:    an account of what is kept for each connection, who has the most, and that what is freed is given back.
Runs in: the core's thread.
Unaware: of sockets and of what the bytes are.

Each connection has bounds of its own, but a thousand of them could still take all memory: by requests that are never
whole, by replies that are never read. Beyond the bound the one that makes us keep the most is cut off.
"""
from __future__ import annotations

from contextlib import suppress
from typing import Generic, TypeVar

BYTES_MOST = 256 * 1024 * 1024
_LARGE = 1024 * 1024
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD, malloc.h of glibc

T = TypeVar("T")


class Quota(Generic[T]):
    """See the module."""

    def __init__(self, most: int = BYTES_MOST) -> None:
        self._most = most
        self._total = 0
        self._kept: dict[T, int] = {}

    def note(self, who: T, kept: int) -> None:
        """Note how many bytes are kept for somebody now."""
        self._total += kept - self._kept.get(who, 0)
        self._kept[who] = kept

    def forget(self, who: T) -> None:
        """Nothing is kept for somebody any more."""
        self._total -= self._kept.pop(who, 0)

    @property
    def greediest(self) -> T | None:
        """Who has to go, if the bound is passed."""
        return max(self._kept, key=lambda who: self._kept[who]) if self._total > self._most else None


def give_back() -> None:
    """Have glibc give large blocks back to the system when they are freed (mallopt(3)). By default it stops to do that
    after the first one, and what many clients sent in part then leaves holes of several times its size."""
    with suppress(OSError, AttributeError):  # another C library
        import ctypes
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
