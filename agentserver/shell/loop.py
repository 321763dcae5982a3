"""The REP loop: take a request, ask the core, give the reply.

Owns:    the order of receive and send on the REP socket, so that each request gets exactly one reply.
Runs in: the thread that called `AgentServer.start`, or the main thread of the shell process.
Unaware: of what a request means. Who may end the loop, and when, is the owner's business.

Waiting: the socket is asked first, and only when it has nothing the loop sleeps in one poll on the
socket's descriptor (edge-triggered: valid just then), the wake descriptor and the core's.
"""
from __future__ import annotations

import select
import time
from typing import Any, Callable, Optional, Protocol

import zmq

from ..core.framelink import FrameLink
from ..core.link import NotThere
from ..errors import LinkError
from ..wire import encode, new_id
from .endpoints import failed_reply

PEER = encode({"kind": "zmq", "name": "tcp client"})
_SLICE_SECS = 1.0      # how often a held request looks at whether the server is to end
_SOON_SECS = 5.0       # so long a lost core is looked for eagerly
_LAST_SECS = 5.0       # for the last request to be answered, when another shell is to follow this one
_MEET_MS = 5           # between two tries to reach a core that is starting beside us
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


class RepLoop:
    """Serve until the owner says that it is over."""

    def __init__(self, rep: zmq.Socket[Any], link: FrameLink, owner: Owner, request_secs: float) -> None:
        self._rep = rep
        self._link = link
        self._owner = owner
        self._request_secs = request_secs
        self._poll = select.poll()
        self._rep_fd = int(rep.getsockopt(zmq.FD))
        self._watched = (-1, -1)
        self._over = False
        self._gone_at: Optional[float] = time.monotonic()
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
        self._settle()
        if self._tend():
            return
        recv, send = self._rep.recv, self._rep.send
        option: Callable[[int], Any] = self._rep.getsockopt
        events, more, readable = zmq.EVENTS, zmq.RCVMORE, zmq.POLLIN
        while True:
            if not option(events) & readable:
                if self._wait():
                    return
                continue
            raw = recv()
            reply = self._refuse_parts() if option(more) else self._ask(raw)
            if reply is None:
                return
            send(reply)
            if self._over:  # it was noticed while somebody waited for this reply, and nothing wakes us again
                return

    def _settle(self) -> None:
        """Give the reply that is owed if an exception (Ctrl-C) came between a request and its reply."""
        try:
            self._rep.send(failed_reply(b"", "shutting_down", "the server is shutting down"))
        except zmq.ZMQError:
            pass  # nothing is owed

    def _refuse_parts(self) -> bytes:
        while self._rep.getsockopt(zmq.RCVMORE):
            self._rep.recv()
        return failed_reply(b"", "bad_request", "a request is one frame with one JSON object; several frames came")

    # ---------------------------------------------------------------- asking the core

    def _ask(self, raw: bytes) -> Optional[bytes]:
        now = time.monotonic()
        final = now + self._request_secs
        try:
            reply = self._link.request(PEER, raw, min(final, now + _SLICE_SECS), self._owner.wake_fd)
        except LinkError:
            reply = None
        return self._hold(raw, final) if reply is None else reply

    def _hold(self, raw: bytes, final: float) -> Optional[bytes]:
        """Go on asking: the core is slow, or being started again, or we were woken meanwhile. Return `None` if it is
        over and whoever asked has to ask the one that follows us, which the client library does by itself."""
        leave_by = 0.0
        while not (over := self._tend()) or self._owner.followed:
            now = time.monotonic()
            leave_by = leave_by or (now + _LAST_SECS if over else 0.0)
            if over and now >= leave_by:
                return None
            if now >= final:
                return failed_reply(raw, "unavailable", "the server's core is away and did not come back in "
                                    f"{self._request_secs:g} s; ask again with the same request_id, which is safe")
            try:
                reply = self._link.resume(min(final, now + _SLICE_SECS), self._owner.wake_fd)
            except LinkError:
                continue
            if reply is not None:
                return reply
        return failed_reply(raw, "shutting_down", "the server is shutting down; nothing was done")

    # ---------------------------------------------------------------- sleeping, and looking after core and owner

    def _wait(self) -> bool:
        """Sleep until something happens; return whether it is over."""
        self._watch()
        ready = self._poll.poll(self._patience())
        if len(ready) == 1 and ready[0][0] == self._rep_fd:
            return False
        if any(fd == self._link.fd for fd, _events in ready):
            try:
                self._link.take()  # late replies to requests that were given up
            except LinkError:
                pass
        return self._tend()

    def _patience(self) -> Optional[int]:
        if self._gone_at is not None:
            return 50 if time.monotonic() - self._gone_at < _SOON_SECS else 500
        return 200 if self._owner.closing else None

    def _watch(self) -> None:
        want = (self._owner.wake_fd, self._link.fd)
        if want == self._watched:
            return
        self._poll = select.poll()
        for fd in (self._rep_fd,) + want:
            if fd >= 0:
                self._poll.register(fd, select.POLLIN)
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
                self._link.post(PEER, self._shutdown)
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


def _readable(fd: int, millis: int = 0) -> bool:
    probe = select.poll()
    probe.register(fd, select.POLLIN)
    return any(events & _READABLE for _fd, events in probe.poll(millis))
