"""How the shell talks to a core: frames over the core's Unix socket.

Owns:    a connection that speaks frames and never blocks, and what was asked on it and is not answered.
Runs in: the shell: one for the request loop, one for the monitor thread.
Unaware: of what a message means, and of whether asking again is safe (it is: the core knows request ids).
"""
from __future__ import annotations

import socket
import struct
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Tuple

from ..errors import LinkError
from ..wire import MAX_WIRE, encode
from .framing import PREFACE, FrameDecoder, FramingError, frame
from .link import dial

Json = Dict[str, Any]
Frame = Tuple[int, bytes, bytes]

_PIECE = 128 * 1024        # bytes per recv
_QUICK_MS = 4              # nearly every reply is there by then; a wake-up may be noticed this much later
_JOIN_BYTES = 64 * 1024    # small frames that wait are put together, to be sent at once
_TIMEVAL = struct.Struct("@ll")


class FrameStream:
    """A connection to a core that speaks frames and never blocks; `fd` is -1 while there is none."""

    def __init__(self, path: str, hello: Json) -> None:
        self._path = path
        self._hello = hello
        self._sock: Optional[socket.socket] = None
        self._decoder = FrameDecoder(MAX_WIRE)
        self._out: Deque[bytes | memoryview] = deque()   # accepted but not yet taken by the kernel
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
        self._queue(PREFACE)
        self.send(frame(0, encode(self._hello), b""))

    def send(self, data: bytes) -> None:
        """Queue whole frames behind what is waiting and hand over what the kernel takes; `LinkError` if cut off."""
        self._queue(data)
        self.flush()

    def _queue(self, data: bytes) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, bytes) and len(last) + len(data) <= _JOIN_BYTES:
            self._out[-1] = last + data
        else:
            self._out.append(data)

    def flush(self) -> bool:
        """Hand over what the kernel takes; return whether that was everything."""
        while self._out:
            if self._sock is None:
                raise self._cut("there is no connection")
            data = self._out[0]
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as e:
                raise self._cut(e.strerror or str(e)) from None
            if sent < len(data):
                self._out[0] = memoryview(data)[sent:]
                return False
            self._out.popleft()
        return True

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
        self._out.clear()
        self.fd = -1


class FrameLink(FrameStream):
    """The request loop's way to the core: many requests under way, each known by its tag.

    What was asked and is not answered is asked again on every new connection: the core knows request ids, and does once
    what is asked twice. A reply that nobody waits for any more is dropped by whoever reads it.
    """

    def __init__(self, path: str, hello: Json) -> None:
        super().__init__(path, hello)
        self.tag = 0                         # of the latest request
        self._asked: Dict[int, bytes] = {}   # whole frames by tag

    def connect(self) -> None:
        """As `FrameStream.connect`, and ask again what is not answered."""
        if self._sock is None:
            super().connect()
            for asked in self._asked.values():
                self.send(asked)

    def ask(self, header: bytes, body: bytes) -> int:
        """Queue a request and return its tag; `push` sends it."""
        self.tag += 1
        asked = self._asked[self.tag] = frame(self.tag, header, body)
        if self._sock is not None:
            self._queue(asked)
        return self.tag

    def forget(self, tag: int) -> None:
        """This request is answered, or given up."""
        self._asked.pop(tag, None)

    def post(self, header: bytes, body: bytes) -> None:
        """Send a request whose reply nobody waits for; `LinkError` when there is no connection."""
        self.tag += 1
        self.send(frame(self.tag, header, body))

    def await_frames(self) -> List[Frame]:
        """Return the frames that one read completes, and wait `_QUICK_MS` for it: for who has nothing else to do."""
        return self.take(0)
