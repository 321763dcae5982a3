"""How the shell talks to a core: frames over the core's Unix socket.

Owns:    a connection that speaks frames and never blocks, and on it one request at a time.
Runs in: the shell: one for the REP loop, one for the monitor thread.
Unaware: of what a message means, and of whether asking again is safe (it is: the core knows request ids).
"""
from __future__ import annotations

import select
import socket
import struct
import time
from typing import Any, Dict, List, Optional, Tuple

from ..errors import LinkError
from ..wire import MAX_WIRE, encode
from .framing import PREFACE, FrameDecoder, FramingError, frame
from .link import dial

Json = Dict[str, Any]
Frame = Tuple[int, bytes, bytes]

_PIECE = 128 * 1024        # bytes per recv
_QUICK_MS = 50             # nearly every reply is there by then; a wake-up may be noticed this much later
_AGAIN_MS = 20             # between two tries to reach a core that is being started again
_TIMEVAL = struct.Struct("@ll")


class FrameStream:
    """A connection to a core that speaks frames and never blocks; `fd` is -1 while there is none."""

    def __init__(self, path: str, hello: Json) -> None:
        self._path = path
        self._hello = hello
        self._sock: Optional[socket.socket] = None
        self._decoder = FrameDecoder(MAX_WIRE)
        self._out = b""           # accepted but not yet taken by the kernel
        self.fd = -1
        self.connections = 0      # grows with each; the shell re-subscribes when it does

    def connect(self) -> None:
        """Dial and say who we are, if not connected; raise `NotThere` or `LinkError`."""
        if self._sock is not None:
            return
        self._sock = dial(self._path)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, _QUICK_MS * 1000))
        self.fd = self._sock.fileno()
        self._decoder = FrameDecoder(MAX_WIRE)
        self.connections += 1
        self._out = PREFACE
        self.send(frame(0, encode(self._hello), b""))

    def send(self, data: bytes) -> None:
        """Queue whole frames behind what is waiting and hand over what the kernel takes; `LinkError` if cut off."""
        self._out = self._out + data if self._out else data
        self.flush()

    def flush(self) -> bool:
        """Hand over what the kernel takes; return whether that was everything."""
        if self._out:
            if self._sock is None:
                raise self._cut("there is no connection")
            try:
                sent = self._sock.send(self._out, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as e:
                raise self._cut(e.strerror or str(e)) from None
            self._out = b"" if sent == len(self._out) else self._out[sent:]
        return not self._out

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._out

    def take(self, flags: int = socket.MSG_DONTWAIT) -> List[Frame]:
        """Return the frames that one read completes, if any; `LinkError` when the core closed the connection."""
        if self._sock is None:
            raise self._cut("there is no connection")
        try:
            data = self._sock.recv(_PIECE, flags)
            frames = self._decoder.feed(data)
        except BlockingIOError:
            return []
        except FramingError as e:
            raise self._cut(str(e)) from None
        except OSError as e:
            raise self._cut(e.strerror or str(e)) from None
        if not data:
            raise self._cut("it closed the connection")
        return frames

    def _cut(self, why: str) -> LinkError:
        self.close()
        return LinkError(f"the link to the core at {self._path} broke: {why}")

    def close(self) -> None:
        """Close the connection; what was not sent is forgotten."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        self._out = b""
        self.fd = -1


class FrameLink(FrameStream):
    """The REP loop's way to the core: one request at a time, held while the core is being started again.

    In the normal case a request is two system calls: send, and a recv that the kernel ends after
    `_QUICK_MS`. What takes longer is awaited together with the wake descriptor, so that a stop is
    never missed. A reply is known by its tag; late ones of an older request are dropped.
    """

    def __init__(self, path: str, hello: Json) -> None:
        super().__init__(path, hello)
        self._tag = 0
        self._asked = b""     # the outstanding request, sent again on every new connection
        self._asked_on = 0    # the connection it was last sent on
        self._poll = select.poll()
        self._polled: Tuple[int, int, int] = (-1, 0, -1)

    def request(self, header: bytes, body: bytes, deadline: float, wake_fd: int) -> Optional[bytes]:
        """Return the reply to `body`, or `None` when `wake_fd` became readable first: then `resume`.

        Raises `LinkError` when `deadline` (monotonic) passes without one.
        """
        self._tag += 1
        self._asked = frame(self._tag, header, body)
        self._asked_on = 0
        reply = self._quick() if self._sock is not None and not self._out else None
        return self.resume(deadline, wake_fd) if reply is None else reply

    def _quick(self) -> Optional[bytes]:
        """Ask on the connection that is there; `None` when the reply is late, long, or the core is gone."""
        try:
            self._asked_on = self.connections
            self.send(self._asked)
            for tag, _header, body in self.take(0):
                if tag == self._tag:
                    return body
        except LinkError:
            pass  # closed: `resume` asks on a new connection
        return None

    def resume(self, deadline: float, wake_fd: int) -> Optional[bytes]:
        """Go on waiting for the reply to the outstanding request; as `request`."""
        while True:
            try:
                self.connect()
                if self._asked_on != self.connections:
                    self._asked_on = self.connections
                    self.send(self._asked)
                return self._await(deadline, wake_fd)
            except _Late:
                if self._out:     # the core has half a frame; only a new connection gets it out of that
                    self.close()
                raise LinkError("the core does not answer; ask again later, the same request_id is safe") from None
            except LinkError:
                if self._pause(deadline, wake_fd):
                    return None

    def post(self, header: bytes, body: bytes) -> None:
        """Send a request whose reply nobody waits for; `LinkError` when there is no connection."""
        self._tag += 1        # an outstanding request keeps its own, smaller tag: see _await
        self.send(frame(self._tag, header, body))

    def _await(self, deadline: float, wake_fd: int) -> Optional[bytes]:
        tag = int.from_bytes(self._asked[8:16], "big")
        while True:
            self._watch(wake_fd)
            ready = self._poll.poll(_millis(deadline))
            if not ready:
                raise _Late
            for fd, _events in ready:
                if fd == self.fd:
                    if self._out:
                        self.flush()
                    for got, _header, body in self.take():
                        if got == tag:
                            return body
            if any(fd == wake_fd for fd, _events in ready):
                return None

    def _watch(self, wake_fd: int) -> None:
        want = (self.fd, select.POLLIN | select.POLLOUT if self._out else select.POLLIN, wake_fd)
        if want != self._polled:
            self._poll = select.poll()
            self._poll.register(want[0], want[1])
            self._poll.register(wake_fd, select.POLLIN)
            self._polled = want

    def _pause(self, deadline: float, wake_fd: int) -> bool:
        """Wait a moment before the next try; return whether we were woken, raise when the time is over."""
        left = _millis(deadline)
        if left <= 0:
            raise LinkError("the core is away and did not come back in time; ask again later, "
                            "the same request_id is safe")
        waiter = select.poll()
        waiter.register(wake_fd, select.POLLIN)
        return bool(waiter.poll(min(_AGAIN_MS, left)))


class _Late(Exception):
    """The deadline passed on a connection that is up."""


def _millis(deadline: float) -> int:
    left = deadline - time.monotonic()
    return int(left * 1000) + 1 if left > 0 else 0
