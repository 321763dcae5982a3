"""A reply that is not there yet.

Owns:    the mark of a reply that waits for the disk, and the meeting of who makes a reply and who waits for it: it is
         handed over once, or dropped.
Runs in: the core's thread.
Unaware: of what the reply says, how it is made, and where it goes.
"""
from __future__ import annotations

from typing import Callable


class Deed(bytes):
    """The reply to what was done. It must not leave before what was done is on disk."""

    __slots__ = ()


class Pending:
    """A promise. Who waits for the reply sets `then` at once, and may `drop` it; who makes it calls `complete`, later.

    `stop` ends the making of a reply that nobody wants any more."""

    __slots__ = ("_stop", "then")

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.then: Callable[[bytes], None] | None = None

    def complete(self, reply: bytes) -> None:
        """Hand the reply over to who still waits."""
        then, self.then = self.then, None
        if then is not None:
            then(reply)

    def drop(self) -> None:
        """Stop waiting: nobody is told, and the work is stopped."""
        if self.then is not None:
            self.then = None
            self._stop()
