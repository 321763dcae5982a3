"""What one peer asks on one connection: its requests in their order, one after another.

Owns:    the requests of this peer that wait, and the promises of replies that are being made for it.
Runs in: the core's thread: at once where nobody else waits for a turn, else as a task of the scheduler; a request is a
         step, a large one several.
Unaware: of sockets, framing, and what a request means.

While a request is at work in steps, the next one of the same peer waits, so that their effects come in the order in
which they were asked for. A promise (a search, a tree that is still moving) does not hold the next ones, until there
are too many. Other peers are not held by either.
"""
from __future__ import annotations

from collections import deque
from typing import Deque, Generator, Protocol, Tuple

from ..wire import encode
from .control import Peer, Steps
from .pending import Pending
from .scheduler import Scheduler, Task

PROMISED_MOST = 8     # replies that are being made for one peer; until then no further request of it is handled
FAILED = encode({"type": "error_response", "request_id": None, "success": False, "error_code": "internal",
                 "error": "something failed inside the server; its core.log says what"})
QUICK_BYTES = 64 * 1024  # a longer request is never done at once
SECS_PER_BYTE = 2e-8  # about what a large request costs before it is known what it asks for


_Request = Tuple[int, int, Steps]  # its tag, its size, and what makes its reply


class Host(Protocol):
    """What an inbox needs of its connection."""

    scheduler: Scheduler

    @property
    def takes_replies(self) -> bool:
        """Whether there is room for more replies; if not, `go_on` is called when there is."""

    @property
    def abandoned(self) -> bool:
        """Whether nobody is there any more who could get a reply."""

    def asked(self, raw: bytes | None, peer: Peer) -> Steps:
        """Return the steps that make a reply."""

    def answer(self, tag: int, reply: bytes) -> None:
        """Send a reply."""

    def later(self, tag: int) -> None:
        """The reply to this request comes later, maybe after those to the next ones."""

    def handled(self, size: int) -> None:
        """One request, of so many bytes, is done."""

    def mistake(self, error: Exception) -> None:
        """Log what was wrong with us."""


class Inbox:
    """See the module. The work is charged to whose turns the peer takes."""

    __slots__ = ("_host", "_peer", "_promised", "_task", "_waiting")

    def __init__(self, peer: Peer, host: Host) -> None:
        self._peer, self._host = peer, host
        self._waiting: Deque[tuple[int, bytes | None]] = deque()
        self._promised: set[Pending] = set()
        self._task: Task | None = None

    def put(self, tag: int, raw: bytes | None) -> None:
        """Take one request."""
        self._waiting.append((tag, raw))
        self.go_on()

    @property
    def working(self) -> bool:
        """Whether a request is at work or waits."""
        return bool(self._waiting) or (self._task is not None and not self._task.done)

    @property
    def idle(self) -> bool:
        """Whether nothing of this peer is owed."""
        return not (self.working or self._promised)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def _ready(self) -> bool:
        return bool(self._waiting) and len(self._promised) < PROMISED_MOST and self._host.takes_replies

    def go_on(self) -> None:
        """Work on what waits, if that is possible and not under way."""
        scheduler = self._host.scheduler
        while self._ready and (self._task is None or self._task.done):
            size = len(self._waiting[0][1] or b"")
            if size > QUICK_BYTES or not scheduler.free:
                self._task = scheduler.add(self._peer.turn, self._work(None), size * SECS_PER_BYTE)
                return
            request = self._next()
            if self._step(request):
                self._task = scheduler.add(self._peer.turn, self._work(request))
            else:
                self._host.handled(size)

    def _next(self) -> _Request:
        tag, raw = self._waiting.popleft()
        return tag, len(raw or b""), self._host.asked(raw, self._peer)

    def _work(self, request: _Request | None) -> Generator[None, None, None]:
        """Do one request after another; the first may be at work already."""
        while request is not None or self._waiting:  # nothing waits where the connection was closed between two steps
            request = request or self._next()
            while self._step(request):
                yield
            self._host.handled(request[1])
            if not self._ready:
                return
            request = None
            yield

    def _step(self, request: _Request) -> bool:
        """Do one step of a request; return whether there are more."""
        tag, _, steps = request
        try:
            if not next(steps) or not self._host.abandoned:
                return True
            steps.close()
        except StopIteration as made:
            self._reply(tag, made.value)
        except Exception as e:
            self._host.mistake(e)
            self._host.answer(tag, FAILED)
        return False

    def _reply(self, tag: int, reply: bytes | Pending) -> None:
        if isinstance(reply, bytes):
            self._host.answer(tag, reply)
        else:
            self._await(tag, reply)

    def _await(self, tag: int, promise: Pending) -> None:
        """Send a reply when it is made."""
        def made(reply: bytes) -> None:
            self._promised.discard(promise)
            self._host.answer(tag, reply)
            self.go_on()
        promise.then = made
        self._promised.add(promise)
        self._host.later(tag)

    def clear(self) -> None:
        """Drop what waits and what is being looked up. A request that is at work is done to its end, unless it only
        looks."""
        self._waiting.clear()
        for promise in self._promised:
            promise.drop()
        self._promised.clear()
