"""Whose request is next: those of each connection wait in a line of their own, and the lines take turns.

Owns:    the lines, their bounds, and how many requests of one client are under way at once.
Runs in: the thread of the request loop; it is pure.
Unaware: of sockets, and of what a request says.

A socket that many send to gives what comes in the order of arrival, and cannot be told whose messages to leave: so all
is taken, and waits here. Who sends much fills its own line, and is refused beyond it; the others have their turns
meanwhile.
"""
from __future__ import annotations

from collections import deque

from .connections import Connection
from .endpoints import QUEUED_REPLIES

LINE_MOST = 64                        # requests of one connection that wait
LINE_BYTES = 12 * 1024 * 1024
ALL_BYTES = 128 * 1024 * 1024         # that wait of all connections; beyond, only small requests may wait
SMALL_BYTES = 64 * 1024
AT_ONCE = 2                           # requests of one connection that the core has and has not looked at
DEFERRED_MOST = 8                     # requests of one connection whose replies are being made


class Request:
    """One request, from its receipt until its reply. `tag`: what the core knows it by; 0 while it waits."""

    __slots__ = ("body", "deferred", "peer", "tag", "until", "way")

    def __init__(self, peer: Peer, way: list[bytes], body: bytes, until: float) -> None:
        self.peer, self.way, self.body, self.until = peer, way, body, until
        self.tag, self.deferred = 0, False


class Peer:
    """One client's connection: its line, and what of it is under way and owed."""

    __slots__ = ("asked", "bytes", "connection", "deferred", "header", "in_turn", "line", "owed", "owed_bytes",
                 "owed_since", "sizes")

    def __init__(self, connection: Connection, header: bytes) -> None:
        self.connection, self.header = connection, header
        self.line: deque[Request] = deque()
        self.bytes = 0           # of the line
        self.asked = 0           # under way
        self.deferred = 0        # of these
        self.in_turn = False     # it has its place among the turns
        self.owed: deque[list[bytes]] = deque()      # see owed.py
        self.owed_bytes, self.owed_since = 0, 0.0
        self.sizes: deque[int] = deque(maxlen=QUEUED_REPLIES + 1)   # of the latest large replies that libzmq was given

    @property
    def may_ask(self) -> bool:
        """Whether its next request may go to the core now. One that does not read its replies asks for no more, and one
        that was given large ones asks for one at a time."""
        most = 1 if self.sizes else AT_ONCE
        return self.asked - self.deferred < most and self.deferred < DEFERRED_MOST and not self.owed


class Turns:
    """See the module."""

    def __init__(self) -> None:
        self.waiting: deque[Peer] = deque()   # who has a request that may go to the core
        self.bytes = 0      # of all that wait

    def join(self, request: Request) -> bool:
        """Put a request into its line; return False if that is full."""
        peer, size = request.peer, len(request.body)
        if len(peer.line) >= LINE_MOST or (peer.line and peer.bytes + size > LINE_BYTES) \
                or (self.bytes + size > ALL_BYTES and size > SMALL_BYTES):
            return False
        peer.line.append(request)
        peer.bytes += size
        self.bytes += size
        self.again(peer)
        return True

    def at_once(self, request: Request) -> bool:
        """Whether a request may go to the core without a turn, since nobody waits for one; it counts as under way."""
        peer = request.peer
        if self.waiting or peer.line or not peer.may_ask or len(request.body) > SMALL_BYTES:
            return False
        peer.asked += 1
        return True

    def again(self, peer: Peer) -> None:
        """Something may have changed for this peer: let it have a turn if it can use one."""
        if not peer.in_turn and peer.line and peer.may_ask:
            peer.in_turn = True
            self.waiting.append(peer)

    def next(self, large: bool) -> Request | None:
        """Return the request whose turn it is, or `None` if none may go to the core now. `large`: whether a large one
        may; a client with one waits for that and keeps its place."""
        for _ in range(len(self.waiting)):
            peer = self.waiting.popleft()
            if peer.line and peer.may_ask and not large and len(peer.line[0].body) > SMALL_BYTES:
                self.waiting.append(peer)
                continue
            peer.in_turn = False
            if peer.line and peer.may_ask:
                request = peer.line.popleft()
                self._gone(request)
                peer.asked += 1
                self.again(peer)
                return request
        return None

    def leave(self, request: Request) -> None:
        """It waits no more."""
        request.peer.line.remove(request)
        self._gone(request)

    def _gone(self, request: Request) -> None:
        size = len(request.body)
        request.peer.bytes -= size
        self.bytes -= size

    def later(self, request: Request) -> None:
        """The core said that the reply to this request comes later."""
        if not request.deferred:
            request.deferred = True
            request.peer.deferred += 1
            self.again(request.peer)

    def done(self, request: Request) -> None:
        """A request that was under way has its reply."""
        peer = request.peer
        peer.asked -= 1
        peer.deferred -= request.deferred
        self.again(peer)
