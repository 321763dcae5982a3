"""How messages are cut out of a stream of bytes, and put into one.

Owns:    the two framings of the core's Unix socket: lines, and frames with a header.
Runs in: any thread; it is sans-IO (bytes in, messages out) and pure.
Unaware: of JSON, sockets and what a message means.

Lines are for local clients: one message, one `\\n`. Every line is a message, an empty one too.
Frames are for the shell, which must pass something beside a message without touching it:

    0        4        8               16        16+header            +body
    | header | body   | tag           | header  | body               |
    | u32 BE | u32 BE | u64 BE        | bytes   | bytes              |

`tag` is chosen by the asker and comes back with the answer; 0 marks an event, whose header is its
topic. A connection speaks lines until its first line is exactly `PREFACE`.
"""
from __future__ import annotations

import struct

PREFACE = b"AGENTSERVER/1 FRAMES\n"
KEEPER = b"AGENTSERVER/1 KEEPER\n"  # a new keeper, in place of one that died: the connection becomes its channel
#: header of a frame that answers nothing yet: its reply comes later, maybe after those to later requests. Only a shell
#: that said `pipelined` gets such frames.
DEFERRED = b'{"deferred":true}'
MAX_HEADER = 64 * 1024
#: what a decoder yields in place of a message that was over the limit and was skipped
TOO_LARGE = None

_HEAD = struct.Struct("!IIQ")
HEAD_BYTES = _HEAD.size


class FramingError(Exception):
    """The stream makes no sense any more; the connection has to be closed."""


class LineDecoder:
    """Cut lines from a stream; a line over `limit` bytes is skipped and yields `TOO_LARGE` once."""

    __slots__ = ("_buffer", "_limit", "_scanned", "_skipping")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._scanned = 0       # no newline before this position
        self._skipping = False  # inside a line that was already answered as too large

    @property
    def unfinished(self) -> int:
        """How many bytes are kept of a line that is not whole yet."""
        return len(self._buffer)

    def forget(self) -> None:
        """Let go of that."""
        self._buffer.clear()

    def feed(self, data: bytes) -> list[bytes | None]:
        """Return the messages that `data` completes, without their newline."""
        if not self._buffer and not self._skipping and data.endswith(b"\n") and data.count(b"\n") == 1 \
                and len(data) <= self._limit:
            return [data[:-1]]
        self._buffer += data
        found: list[bytes | None] = []
        start = 0
        while (end := self._buffer.find(b"\n", max(start, self._scanned))) >= 0:
            if self._skipping:
                self._skipping = False
            else:
                found.append(bytes(self._buffer[start:end]) if end - start <= self._limit else TOO_LARGE)
            start = end + 1
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        if self._scanned > self._limit:
            if not self._skipping:
                found.append(TOO_LARGE)
            self._skipping = True
        if self._skipping:
            self._buffer.clear()
            self._scanned = 0
        return found


class FrameDecoder:
    """Cut `(tag, header, body)` from a stream; raise `FramingError` for sizes over the limits."""

    __slots__ = ("_buffer", "_limit")

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit

    @property
    def unfinished(self) -> int:
        """How many bytes are kept of a frame that is not whole yet."""
        return len(self._buffer)

    def forget(self) -> None:
        """Let go of that."""
        self._buffer.clear()

    def feed(self, data: bytes) -> list[tuple[int, bytes, bytes]]:
        """Return the frames that `data` completes."""
        buffer = self._buffer
        if not buffer and len(data) >= HEAD_BYTES:  # just one whole frame: nearly always, so no copy for it
            header, body, tag = _HEAD.unpack_from(data)
            middle = HEAD_BYTES + header
            if middle + body == len(data) and header <= MAX_HEADER and body <= self._limit:
                return [(tag, data[HEAD_BYTES:middle], data[middle:])]
        buffer += data
        found: list[tuple[int, bytes, bytes]] = []
        start = 0
        while len(buffer) - start >= HEAD_BYTES:
            header, body, tag = _HEAD.unpack_from(buffer, start)
            if header > MAX_HEADER or body > self._limit:
                raise FramingError(f"a frame of {header} + {body} bytes is over the limit")
            middle = start + HEAD_BYTES + header
            end = middle + body
            if end > len(buffer):
                break
            found.append((tag, bytes(buffer[start + HEAD_BYTES:middle]), bytes(buffer[middle:end])))
            start = end
        if start:
            del buffer[:start]
        return found


def frame(tag: int, header: bytes, body: bytes) -> bytes:
    """Return one frame."""
    return b"".join((frame_head(tag, header, len(body)), body))


def frame_head(tag: int, header: bytes, size: int) -> bytes:
    """Return what comes before a body of so many bytes, which is too large to be copied."""
    return _HEAD.pack(len(header), size, tag) + header
