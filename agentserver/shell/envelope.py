"""The envelope of a request: which frames of a message are the way back, and which one is the request.

Owns:    receiving from the ROUTER socket, one whole message at a time, with a bound on its frames.
Runs in: the thread of the request loop.
Unaware: of what a request says.

A REQ socket sends an empty frame and the request; proxies on the way, and sockets that number their requests, put
frames before the empty one. All up to the empty one go back with the reply, as a REP socket would do.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import zmq

from .endpoints import connection_of

MOST_FRAMES = 8            # before the empty one
CUT_FRAMES = 1000          # of a message; who sends more is cut off
_DRAIN_AT_ONCE = 2000      # frames of such a message that are dropped in one turn: about a millisecond
_NOW, _EVENTS, _READABLE = int(zmq.NOBLOCK), zmq.EVENTS, int(zmq.POLLIN)
_HOW = ("a request is one frame with one JSON object, after one empty frame: send two frames, b\"\" and the request, "
        "or use a REQ socket, which does that by itself")
_SEVERAL = "a request is one frame with one JSON object; several frames came"


class Message(NamedTuple):
    """One message: from where, the frames of the way back, the request, what is wrong with it (or nothing), its bytes
    on the wire, and whether its sender is to be cut off, for so many frames or bytes."""

    fd: int
    way: list[bytes]
    body: bytes
    wrong: str
    size: int
    flood: bool


class Inlet:
    """See the module."""

    def __init__(self, router: zmq.Socket[Any]) -> None:
        self._router = router
        self._option: Callable[[int], Any] = router.getsockopt
        self.draining = False   # the rest of a message is to be dropped first, before anything else can be received
        self._dropped = 0       # bytes of it so far

    def take(self) -> Message | None:
        """Return the next message, or `None` if there is none; not while `draining`."""
        if not int.__and__(self._option(_EVENTS), _READABLE):  # an exception for that, or an enum's own &, takes longer
            return None
        receive = self._router.recv
        frame: Any = receive(_NOW, copy=False)
        fd, parts, size = connection_of(frame), [frame.bytes], 0
        try:
            while frame.more and len(parts) < MOST_FRAMES + 3:
                frame = receive(_NOW, copy=False)
                part = frame.bytes
                parts.append(part)
                size += len(part) + (9 if len(part) > 255 else 2)
        except MemoryError:
            self.settle()
            return Message(fd, parts[:1], b"", _SEVERAL, size, True)
        return self._with_many(fd, parts, size) if frame.more else _read(fd, parts, size)

    def _with_many(self, fd: int, parts: list[bytes], size: int) -> Message:
        for _ in range(CUT_FRAMES):
            frame: Any = self._router.recv(_NOW, copy=False)
            size += len(frame) + 2
            if not frame.more:
                return _read(fd, parts, size)
        self.draining = True
        return Message(fd, parts[:1], b"", _SEVERAL, size, True)

    def drain(self) -> None:
        """Drop some frames of a message that has too many."""
        receive = self._router.recv
        for _ in range(_DRAIN_AT_ONCE):
            frame: Any = receive(_NOW, copy=False)
            if not frame.more:
                self.draining = False
                return

    def settle(self) -> None:
        """An exception may have come in the middle of a message: the rest of that is nobody's."""
        self.draining = bool(self._router.getsockopt(zmq.RCVMORE))


def _read(fd: int, parts: list[bytes], size: int) -> Message:
    """Tell the way back from the request; `parts`: at most `MOST_FRAMES` + 3, the first one names the peer."""
    try:
        empty = parts.index(b"", 1, MOST_FRAMES + 2)
    except ValueError:  # a DEALER socket that sends the request alone, and takes the reply alone
        return Message(fd, parts[:1], parts[-1], _HOW, size, False)
    body = parts[empty + 1:]
    return Message(fd, parts[:empty + 1], body[-1] if body else b"", "" if len(body) == 1 else _SEVERAL, size, False)
