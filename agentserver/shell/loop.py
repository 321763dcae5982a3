"""The request loop: take requests, ask the core, give the replies.

Owns:    the ROUTER socket, and every request from its receipt until its reply, of which each gets exactly one.
Runs in: the thread that called `AgentServer.start`, or the main thread of the shell process.
Unaware: of what a request means. Who may end the loop, and when, is the owner's business.

Each turn takes what has come, passes on whose turn it is, and sleeps in one poll until there is more, or a reply. With
one request under way the loop waits for its answer directly. Replies come in any order: one that the core makes later
holds nobody else.

Waiting: the socket is asked first, and only when it has nothing the loop sleeps on the socket's descriptor
(edge-triggered: valid just then), the wake descriptor, the core's, and the one that tells of what arrives.
"""
from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from ..core.framelink import Frame, FrameLink
from ..core.framing import DEFERRED
from ..core.link import NotThere
from ..errors import LinkError
from ..wire import encode, new_id
from .connections import INFINITE, Connection, Connections
from .endpoints import QUEUED_REQUESTS, failed_reply
from .envelope import Inlet, Message
from .owed import Owed
from .peers import LINE_MOST, Peer, Request, Turns

TAKEN_AT_ONCE = 64         # messages of one turn, before replies have theirs
ALONE = 8                  # times in a row that there was no more than one message: then one client asks, most likely
UNDECIDED_MOST = 1000      # requests that the core has and has said nothing of
_COPIES = 3                # of a request that the core has: it, its frame, and what of that waits to be sent
UNDECIDED_BYTES = 12 * 1024 * 1024  # of them; beyond, only small ones are passed on
RETRY_SECS = 1             # what a client is told that sends too much
_SHELL = encode({"kind": "zmq", "name": "shell"})
_SOON_SECS = 5.0           # so long a lost core is looked for eagerly
_LAST_SECS = 5.0           # for replies that are being made, when another shell is to follow this one
_QUIET_SECS = 1.0          # the same, for a moment in which nobody asks any more
_MOMENT_SECS = 0.002       # so long a moment is
_MADE_SECS = 0.05          # between two looks at whether replies are still being made
_MEET_MS = 5               # between two tries to reach a core that is starting beside us
_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class Owner(Protocol):
    """Who decides when a loop ends."""

    wake_fd: int       # readable when `woken` should be called
    closing: bool      # the core is to be asked to shut down
    followed: bool     # when it is over, another loop takes our place

    def woken(self) -> None:
        """Read what is to be read from `wake_fd`."""

    def over(self, absent: bool, gone_secs: float) -> bool:
        """Whether to end now. `absent`: the core took its socket away; `gone_secs`: how long it is out of reach."""


class RequestLoop:
    """Serve until the owner says that it is over."""

    def __init__(self, router: zmq.Socket[Any], connections: Connections, endpoint: str, link: FrameLink, owner: Owner,
                 request_secs: float) -> None:
        self._router, self._connections, self._link = router, connections, link
        self._kind = endpoint.partition("://")[0]
        self._owner, self._request_secs = owner, request_secs
        self._inlet, self._turns = Inlet(router), Turns()
        self._owed = Owed(router, self._cut, self._turns.again)
        self._last: list[tuple[Peer, list[bytes]]] | None = None  # replies that leave together, at the end
        self._pending: dict[Request, None] = {}    # all without a reply, oldest first
        self._asked: dict[int, Request] = {}       # those of them that the core has, by tag
        self._undecided = self._undecided_bytes = 0
        self._awaited = 0          # the latest tag that was waited for directly
        self._more = False         # there may be more to receive
        self._singles = 0          # how often in a row there was no more than one message
        self._measured: list[tuple[Connection, int]] | None = None   # what arrived, to be judged
        self._unheard = 0          # so many messages later all has been received that was whole then
        self._poll, self._watched = select.poll(), (-1, 0, -1)
        self._router_fd = int(router.getsockopt(zmq.FD))
        self._over = False
        self._gone_at: float | None = time.monotonic()
        self._shutdown = encode({"type": "shutdown_request", "request_id": new_id()})
        self._shutdown_on = 0  # the connection to the core on which it was sent

    def meet(self) -> bool:
        """Wait until the core knows us, so that it can tell where we listen; return False if it is over before."""
        while not self._tend():
            if self._gone_at is None:
                return True
            _readable(self._owner.wake_fd, _MEET_MS)
        return False

    def run(self) -> None:
        """Serve; may be called again after an exception."""
        self._inlet.settle()
        self._tend()
        while not self._over:
            self._receive()
            self._pass_on()
            if self._undecided == 1 and self._awaited != self._link.tag and self._owed.again_at == INFINITE \
                    and (not self._more or self._singles >= ALONE):
                self._awaited = self._link.tag
                self._deliver(self._link.await_frames)
            else:
                self._sleep(INFINITE)
        if self._owner.followed:
            self._leave()
        self._refuse_all()

    # ---------------------------------------------------------------- in

    def _receive(self) -> None:
        """Take what has come, up to a bound. While there is one client that asks, its next request comes after the
        reply: nobody else is looked for before that."""
        now, taken = time.monotonic(), 0
        if self._inlet.draining:
            self._inlet.drain()
        while taken < TAKEN_AT_ONCE and not self._inlet.draining:
            message = self._inlet.take()
            if message is None:
                self._singles, self._more = self._singles + 1 if taken <= 1 else 0, False
                if self._measured is not None:
                    self._judge()
                return
            taken += 1
            self._unheard -= 1
            self._accept(message, now)
            if self._singles >= ALONE and self._undecided == 0:
                break
        self._singles, self._more = 0 if self._more else self._singles, True

    def _accept(self, message: Message, now: float) -> None:
        """Put a request into its client's line, or refuse it."""
        connection = self._connections.sent(message.fd, message.way[0] if message.way else b"", message.size, now)
        peer: Peer = connection.client or self._met(connection)
        if message.flood:
            self._cut(peer)
            return
        if message.wrong:
            self._send(peer, [*message.way, failed_reply(message.body, "bad_request", message.wrong)])
            return
        request = Request(peer, message.way, message.body, now + self._request_secs)
        if self._undecided < UNDECIDED_MOST and self._link.fd >= 0 and self._turns.at_once(request):
            self._pending[request] = None
            self._ask(request)
        elif self._turns.join(request):
            self._pending[request] = None
        else:
            self._send(peer, [*message.way, failed_reply(
                message.body, "rate_limited", f"this connection has {LINE_MOST} requests, or 12 MiB, waiting already; "
                "ask again when some of them are answered", retry_after_secs=RETRY_SECS)])

    def _met(self, connection: Connection) -> Peer:
        peer = connection.client = Peer(connection, encode({"kind": "zmq", "name": f"{self._kind} client",
                                                            "connection": str(connection.serial)}))
        return peer

    def _cut(self, peer: Peer) -> None:
        self._connections.cut(peer.connection)

    # ---------------------------------------------------------------- the core

    def _pass_on(self) -> None:
        """Give the core the requests whose turn it is, as long as it has not too many."""
        if self._link.fd < 0:
            return
        while self._turns.waiting and self._undecided < UNDECIDED_MOST:
            request = self._turns.next(self._undecided_bytes < UNDECIDED_BYTES)
            if request is None:
                break
            self._ask(request)
        try:
            self._link.flush()
        except LinkError:
            pass  # asked again on the next connection

    def _ask(self, request: Request) -> None:
        self._undecided += 1
        self._undecided_bytes += len(request.body)
        try:
            request.tag = self._link.ask(request.peer.header, request.body)
        except MemoryError:
            request.tag = -1
            self._answer(request, failed_reply(b"", "unavailable", "the server is out of memory; send less at once"))
            self._cut(request.peer)
            return
        self._asked[request.tag] = request

    def _deliver(self, take: Callable[[], list[Frame]]) -> None:
        """Read what the core says."""
        try:
            frames = take()
        except LinkError:
            return  # asked again on the next connection
        except MemoryError:
            self._link.close()
            return
        for tag, header, body in frames:
            request = self._asked.get(tag)
            if request is None:
                continue  # a late reply to a request that was given up
            if header == DEFERRED:
                self._decided(request)
                self._turns.later(request)
            else:
                self._answer(request, body)

    def _decided(self, request: Request) -> None:
        if not request.deferred:
            self._undecided -= 1
            self._undecided_bytes -= len(request.body)

    def _answer(self, request: Request, reply: bytes) -> None:
        """Give a request its reply, whoever made it."""
        del self._pending[request]
        if request.tag:
            self._decided(request)
            self._asked.pop(request.tag, None)
            self._link.forget(request.tag)
            self._turns.done(request)
        else:
            self._turns.leave(request)
        self._send(request.peer, [*request.way, reply])

    def _send(self, peer: Peer, frames: list[bytes]) -> None:
        if self._last is None:
            self._owed.send(peer, frames)
        else:
            self._last.append((peer, frames))

    def _expire(self, now: float) -> None:
        """Refuse what has waited for too long: the core is away, or too slow."""
        while self._pending and (request := next(iter(self._pending))).until <= now:
            if request.tag and not self._link.idle:
                self._link.close()  # the core has half a frame, maybe; only a new connection gets it out of that
            self._answer(request, failed_reply(
                request.body, "unavailable", "the server's core is away and did not come back in "
                f"{self._request_secs:g} s; ask again with the same request_id, which is safe"))

    # ---------------------------------------------------------------- sleeping, and looking after everything

    def _sleep(self, until: float) -> None:
        """Sleep until something happens, or `until` then, and see to it."""
        if self._link.fd < 0:
            self._tend()
            self._pass_on()
        self._watch()
        due = min(until, self._due())
        ready = self._poll.poll(None if due == INFINITE else max(int((due - time.monotonic()) * 1000) + 1, 0))
        if len(ready) != 1 or ready[0][0] != self._router_fd:
            self._see_to(ready)
        if due < INFINITE:
            self._look_after(time.monotonic())

    def _see_to(self, ready: list[tuple[int, int]]) -> None:
        for fd, events in ready:
            if fd == self._link.fd:
                if events & select.POLLOUT:
                    self._pass_on()
                if events & _READABLE:
                    self._deliver(self._link.take)
            elif fd == self._connections.traffic_fd:
                self._connections.arrived()
        if any(fd == self._owner.wake_fd for fd, _events in ready) or self._owner.closing or self._link.fd < 0:
            self._tend()

    def _due(self) -> float:
        """Return when there is something to do, also if nothing happens (monotonic)."""
        if self._more or self._measured is not None:
            return 0.0
        due = min(self._connections.look_at, self._owed.again_at)
        if self._pending:
            due = min(due, next(iter(self._pending)).until)
        if self._gone_at is not None:
            now = time.monotonic()
            due = min(due, now + (0.05 if now - self._gone_at < _SOON_SECS else 0.5))
        return min(due, time.monotonic() + 0.2) if self._owner.closing else due

    def _look_after(self, now: float) -> None:
        """Do what the time has come for."""
        if self._connections.look_at <= now:
            self._measured = self._connections.measure()
            self._unheard = 2 * QUEUED_REQUESTS * (len(self._connections) + 1)  # clients take turns in libzmq
        elif self._measured is not None and self._unheard <= 0:
            self._judge()
        if self._owed.again_at <= now:
            self._owed.pay()
        if self._pending:
            self._expire(now)

    def _judge(self) -> None:
        measured, self._measured = self._measured or [], None
        held = self._turns.bytes + self._owed.bytes + _COPIES * self._undecided_bytes
        self._connections.judge(measured, held)

    def _watch(self) -> None:
        want = (self._owner.wake_fd, self._link.fd, -1 if self._link.idle else 0)
        if want == self._watched:
            return
        self._poll = select.poll()
        for fd in (self._router_fd, self._owner.wake_fd, self._connections.traffic_fd):
            if fd >= 0:
                self._poll.register(fd, select.POLLIN)
        if self._link.fd >= 0:
            self._poll.register(self._link.fd, select.POLLIN if self._link.idle else select.POLLIN | select.POLLOUT)
        self._watched = want

    def _tend(self) -> bool:
        """Hear the owner, keep the link to the core up, pass a shutdown on; return whether it is over."""
        owner = self._owner
        if _readable(owner.wake_fd):
            owner.woken()
        absent = self._reach()
        if owner.closing and self._gone_at is None and self._shutdown_on != self._link.connections:
            self._shutdown_on = self._link.connections
            try:
                self._link.post(_SHELL, self._shutdown)
            except LinkError:
                pass  # the next connection gets it
        self._over = owner.over(absent, 0.0 if self._gone_at is None else time.monotonic() - self._gone_at)
        return self._over

    def _reach(self) -> bool:
        """Connect to the core if it is not; return whether its socket is absent."""
        try:
            self._link.connect()
            self._gone_at = None
        except LinkError as e:
            self._gone_at = self._gone_at or time.monotonic()
            return isinstance(e, NotThere)
        return False

    # ---------------------------------------------------------------- the end

    def _leave(self) -> None:
        """Another shell follows: answer what has come, and give the last replies together, in a moment in which
        whoever has asked waits for one. Then all connections are closed at once: no request is lost in between."""
        until = time.monotonic() + _LAST_SECS
        while any(request.deferred for request in self._pending) and time.monotonic() < until:
            self._turn(_MADE_SECS)
        self._last, quiet_until = [], time.monotonic() + _QUIET_SECS
        while self._turn(_MOMENT_SECS) or self._pending or self._connections.unfinished(_QUIET_SECS):
            if time.monotonic() > max(quiet_until, until if self._pending else 0.0):
                break
        last, self._last = self._last, None
        for peer, frames in last:
            self._connections.cork(peer.connection)
            self._owed.send(peer, frames)

    def _turn(self, most: float) -> bool:
        """Serve one turn of `most` seconds; return whether somebody asked in it."""
        before = len(self._pending)
        self._receive()
        asked = len(self._pending) > before
        self._pass_on()
        self._sleep(time.monotonic() + most)
        return asked

    def _refuse_all(self) -> None:
        if not self._owner.followed:  # or who asked has to ask the one that follows us, as the client library does
            for request in list(self._pending):
                self._answer(request, failed_reply(request.body, "shutting_down",
                                                   "the server is shutting down; nothing was done"))
        self._owed.pay()


def _readable(fd: int, millis: int = 0) -> bool:
    probe = select.poll()
    probe.register(fd, select.POLLIN)
    return any(events & _READABLE for _fd, events in probe.poll(millis))
