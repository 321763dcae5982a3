"""Between two descriptors and a core: what `agentserver stdio` does.

Owns:    the copying both ways, line by line; what was asked and is not answered yet; going on with the next core.
Runs in: a process of its own, started by ssh or by a client; one thread, one poll, nothing here blocks.
Unaware: of what a request means, beyond its id, and that the last subscription has to be asked for again.

A core that dies or is reloaded is a pause for the client: what it had not answered is sent to the next one,
which is safe because a request id is done once; and the subscription is renewed with the last sequence that was
seen. Only whole lines are passed on, so that nobody gets the first half of one core's reply and the second of
another's. Who does not read is not read from: what waits is bounded both ways.
"""
from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections import deque
from contextlib import contextmanager
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Set, Union

from ..errors import LinkError, RequestError
from ..messages import read_request_id
from ..wire import MAX_WIRE, decode, encode, new_id
from .audience import answered, parsed
from .framing import LineDecoder
from .link import NotThere, dial, socket_path
from .lock import is_held

Json = Dict[str, Any]
Piece = Union[bytes, memoryview]

UNANSWERED_BYTES = 16 * 1024 * 1024   # of requests; above it no more are read
UNREAD_BYTES = 4 * 1024 * 1024        # of lines for a client that does not read them; above it the core is not read
PIECE = 256 * 1024
FIRST_SECS = 1.0                      # for a core whose socket is there and that does not answer at the beginning
AWAY_SECS = 30.0                      # for one that was there: it is being started again
SURE_SECS = 0.5                       # after which it is asked whether anybody is there to start it again
_AGAIN_MS = 20


class Unanswered:
    """What another core has to be told to go on where this one stopped. Pure: lines in, lines out."""

    def __init__(self) -> None:
        self._lines: Dict[Optional[str], List[bytes]] = {}
        self._topics: List[Any] = []
        self._sequence = 0
        self._ours: Set[str] = set()
        self.size = 0

    def asked(self, line: bytes) -> None:
        """Note a request."""
        self._lines.setdefault(_id_of(line), []).append(line)
        self.size += len(line) + 1

    def told(self, line: bytes) -> bool:
        """Note what the core sent; return whether it is for the client."""
        reply, request_id = answered(line)
        if not reply:
            self._heard(line)
        elif request_id in self._ours:
            self._ours.discard(str(request_id))
            return False
        else:
            self._answered(request_id, line)
        return True

    def _answered(self, request_id: Optional[str], line: bytes) -> None:
        if request_id is None and None not in self._lines:  # only a request that is too large is not even looked at
            request_id = max(self._lines, key=lambda name: len(self._lines[name][0]), default=None)
        waiting = self._lines.get(request_id)
        if not waiting:
            return
        request = waiting.pop(0)
        if not waiting:
            del self._lines[request_id]
        self.size -= len(request) + 1
        if line.startswith(b'{"type":"subscribe_response"'):
            reply = parsed(line)
            if reply.get("success"):
                self._topics, self._sequence = parsed(request)["topics"], int(reply.get("sequence") or 0)

    def _heard(self, line: bytes) -> None:
        if line.startswith(b'{"type":"log_stream"'):  # those are found again by their offsets; and they are many
            return
        event = parsed(line)
        if event.get("type") != "log_stream":
            self._sequence = max(self._sequence, int(event.get("sequence") or 0))

    def again(self) -> List[bytes]:
        """Return what to send first on a new connection."""
        self._ours.clear()
        lines = [line for waiting in self._lines.values() for line in waiting]
        if not self._topics:
            return lines
        renewal: Json = {"type": "subscribe_request", "request_id": new_id(), "topics": self._topics,
                         "since": self._sequence}
        self._ours.add(renewal["request_id"])
        return [encode(renewal), *lines]


class Outbox:
    """Bytes on their way to a descriptor that may take few of them at a time."""

    def __init__(self) -> None:
        self._pieces: Deque[Piece] = deque()
        self.size = 0

    def add(self, line: bytes) -> None:
        """Queue a line, to which its end is added."""
        self._pieces.append(line + b"\n")
        self.size += len(line) + 1

    def flush(self, write: Callable[[Piece], int]) -> None:
        """Write once, as much as is taken."""
        piece = self._joined()
        try:
            sent = write(piece)
        except BlockingIOError:
            sent = 0
        self.size -= sent
        if sent < len(piece):
            self._pieces.appendleft(memoryview(piece)[sent:])

    def _joined(self) -> Piece:
        piece, size = self._pieces.popleft(), 0
        pieces = [piece]
        size = len(piece)
        while self._pieces and size + len(self._pieces[0]) <= PIECE:
            pieces.append(self._pieces.popleft())
            size += len(pieces[-1])
        return b"".join(pieces) if len(pieces) > 1 else piece

    def clear(self) -> None:
        """Forget all of it."""
        self._pieces.clear()
        self.size = 0


class Relay:
    """See the module. `run` returns when all that was asked is answered; it raises when the server is not there."""

    def __init__(self, state_dir: str, source: int, target: int) -> None:
        self._state_dir, self._source, self._target = state_dir, source, target
        self._path = socket_path(state_dir)
        self._core: Optional[socket.socket] = None
        self._from_client, self._from_core = LineDecoder(MAX_WIRE), LineDecoder(MAX_WIRE)
        self._to_client, self._to_core = Outbox(), Outbox()
        self._unanswered = Unanswered()
        self._ended = False                       # the client asks nothing more
        self._met = False
        self._away_since = time.monotonic()

    def run(self) -> None:
        """Copy until the client has gone; raise `LinkError` or `BrokenPipeError`."""
        self._reach()
        with _unblocked(self._target):
            while not (self._ended and not self._unanswered.size and not self._to_client.size):
                self._turn()
                if self._core is None:
                    self._reach()
        if self._core is not None:
            self._core.close()

    def _turn(self) -> None:
        """Wait until something can be done, and do it."""
        poller = select.poll()
        poller.register(self._target, select.POLLOUT if self._to_client.size else 0)
        if not self._ended and self._unanswered.size < UNANSWERED_BYTES:
            poller.register(self._source, select.POLLIN)
        if self._core is not None:
            reading = select.POLLIN if self._to_client.size < UNREAD_BYTES else 0
            poller.register(self._core, reading | (select.POLLOUT if self._to_core.size else 0))
        for fd, mask in poller.poll(None if self._core else _AGAIN_MS):
            if fd == self._target:
                self._client_ready(mask)
            elif fd == self._source:
                self._asked()
            elif self._core is not None:
                self._core_ready(self._core, mask)

    # ------------------------------------------------------------ the client

    def _client_ready(self, mask: int) -> None:
        try:
            if mask & select.POLLOUT and self._to_client.size:
                return self._to_client.flush(lambda piece: os.write(self._target, piece))
        except ConnectionError:
            raise BrokenPipeError from None
        if mask & (select.POLLERR | select.POLLHUP):
            raise BrokenPipeError

    def _asked(self) -> None:
        try:
            data = os.read(self._source, PIECE)
        except BlockingIOError:
            return
        self._ended = not data
        for line in self._from_client.feed(data):
            if line is None:
                self._to_client.add(_too_large())
            else:
                self._unanswered.asked(line)
                if self._core is not None:
                    self._to_core.add(line)

    # ------------------------------------------------------------ the core

    def _core_ready(self, core: socket.socket, mask: int) -> None:
        try:
            if mask & select.POLLOUT:
                self._to_core.flush(core.send)
            if mask & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._told(core.recv(PIECE))
        except BlockingIOError:
            pass
        except OSError:
            self._lost()

    def _told(self, data: bytes) -> None:
        if not data:
            return self._lost()
        for line in self._from_core.feed(data):
            if line is None:
                raise LinkError(f"the server at {self._path} sent a line of more than {MAX_WIRE} bytes")
            if self._unanswered.told(line):
                self._to_client.add(line)

    def _lost(self) -> None:
        """The core has gone; what it did not finish saying is not passed on."""
        if self._core is not None:
            self._core.close()
        self._core = None
        self._to_core.clear()
        self._from_core = LineDecoder(MAX_WIRE)
        self._away_since = time.monotonic()

    def _reach(self) -> None:
        """Connect, if a core is there; raise when it is of no use to wait for one any longer."""
        try:
            self._core = dial(self._path)
        except LinkError as e:
            if self._hopeless(e):
                raise
            return
        self._core.setblocking(False)
        self._met = True
        for line in self._unanswered.again():
            self._to_core.add(line)

    def _hopeless(self, error: LinkError) -> bool:
        away = time.monotonic() - self._away_since
        if not self._met:
            return isinstance(error, NotThere) or away > FIRST_SECS
        return away > AWAY_SECS or (away > SURE_SECS and not self._kept())

    def _kept(self) -> bool:
        """Whether a process of the server is there that could bring a core back, or is one."""
        return any(is_held(os.path.join(self._state_dir, name)) for name in ("keeper.lock", "core.lock"))


@contextmanager
def _unblocked(fd: int) -> Iterator[None]:
    """Let no write to a pipe or socket wait; others may have it too, so it gets its way back."""
    mode = os.fstat(fd).st_mode
    before = os.get_blocking(fd)
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        os.set_blocking(fd, False)
    try:
        yield
    finally:
        os.set_blocking(fd, before)


def _id_of(line: bytes) -> Optional[str]:
    """Return the id that the reply to this line will carry: `None` where the core cannot read one."""
    try:
        return read_request_id(decode(line, MAX_WIRE))
    except RequestError:
        return None


def _too_large() -> bytes:
    return encode({"type": "error_response", "request_id": None, "success": False, "error_code": "message_too_large",
                   "error": f"the message has more than {MAX_WIRE} bytes; send less at once"})
