"""One connection to the core's socket: bytes in, replies and events out.

Owns:    its socket, its framing, what waits to be handled and what waits to be sent.
Runs in: the core's thread; nothing here blocks.
Unaware: of what requests mean; they go through `Desk.handle`.

A peer that does not read its replies is not read from any more; one that does not read its events
loses some (they are hints), and is told where as soon as it reads again. So no peer can make us hold
more than a bounded amount for it.
"""
from __future__ import annotations

import select
import socket
from collections import deque
from typing import Deque, Protocol

from ..wire import MAX_WIRE
from . import framing
from .control import Peer
from .peers import Asker, Caller, Hello, Shell, header
from .pending import Pending
from .reactor import READ, WRITE, Reactor

PIECE = 128 * 1024            # bytes read at once
PER_TURN = 64                 # requests of one connection in one turn, so that others get theirs
UNSENT_MOST = 16 * 1024 * 1024  # bytes of replies that may wait before we stop reading
MISSED_MOST = 10_000          # topics of which it is remembered that something was dropped
PEERS_MOST, HEAD_BYTES = 1000, 1024  # headers whose meaning is kept, and how long such a one may be
PROMISED_MOST = 8             # replies that are being made; until then no further request is handled


class Desk(Protocol):
    """What a connection needs from the service."""

    reactor: Reactor
    backlog_bytes: int
    message_bytes: int

    def handle(self, raw: bytes | None, peer: Peer) -> bytes | Pending:
        """Return the reply to one message, or a promise of it."""

    def hello(self, hello: Hello, caller: Caller) -> Shell | None:
        """A peer says that it is a shell; return it if it is."""

    def keeper_came(self, sock: socket.socket, caller: Caller) -> None:
        """A peer says that it is a new keeper, and gives this socket up for its channel."""

    def dirty(self, connection: "Connection") -> None:
        """This connection has something to send at the end of the turn."""

    def dropped(self) -> None:
        """One event was not pushed."""

    def caught_up(self, connection: "Connection", missed: list[str]) -> None:
        """The peer reads again; of these topics something was dropped."""

    def gone(self, connection: "Connection") -> None:
        """This connection is closed."""


class Connection:
    """See the module. `topics` and `push` make it a `feed.Subscriber`."""

    __slots__ = ("_caller", "_desk", "_eof", "_frames", "_inbox", "_lines", "_missed", "_out", "_peers", "_promised",
                 "_role", "_sock", "_unsent", "_watch", "shell", "topics")

    def __init__(self, sock: socket.socket, caller: Caller, desk: Desk) -> None:
        self._sock, self._caller, self._desk = sock, caller, desk
        self._lines: framing.LineDecoder | None = framing.LineDecoder(desk.message_bytes)
        self._frames = framing.FrameDecoder(MAX_WIRE)
        self._inbox: Deque[tuple[int, Peer, bytes | None]] = deque()
        self._out: Deque[memoryview | bytes] = deque()
        self._unsent = 0
        self._promised: set[Pending] = set()
        self._eof = False    # the peer sends nothing more; it may still want its replies
        self._peers: dict[bytes, Peer] = {}
        self.topics: tuple[str, ...] = ()
        self._missed: dict[str, None] = {}  # topics of which this peer was too slow for something
        self.shell: Shell | None = None     # it is one of ours
        self._role = ""
        self._watch = desk.reactor.watch(sock.fileno(), READ, self._ready)

    # ------------------------------------------------------------ in

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self.send_now()
        if mask & READ:
            try:
                data = self._sock.recv(PIECE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            try:
                self._take(data)
            except framing.FramingError:  # a stream that makes no sense any more
                self.close()
                return
            if self._watch.active:
                self._eof = not data
                self.work()

    def _take(self, data: bytes) -> None:
        """Cut messages from what arrived."""
        if self._lines is not None:
            if data == framing.KEEPER and not self._inbox:
                self._become_channel()
                return
            if data.startswith(framing.PREFACE) and not self._inbox:
                self._lines, data = None, data[len(framing.PREFACE):]
            else:
                self._inbox.extend((0, self._peer(b""), line) for line in self._lines.feed(data))
                return
        for tag, head, body in self._frames.feed(data):
            if tag == 0:
                self._greeted(header(Hello, head))
            else:
                self._inbox.append((tag, self._peer(head), body))

    def _greeted(self, hello: Hello) -> None:
        self._role = hello.role
        self.shell = self._desk.hello(hello, self._caller)
        self._peers.clear()

    def _become_channel(self) -> None:
        """Hand the socket to the service: a keeper is at the other end."""
        self._desk.reactor.unwatch(self._watch)
        self._desk.gone(self)
        self._desk.keeper_came(self._sock, self._caller)

    def work(self) -> None:
        """Handle what waits, a bounded number at once; the rest has its turn in the next turn."""
        for _ in range(PER_TURN):
            if not self.waiting:
                break
            tag, peer, body = self._inbox.popleft()
            reply = self._desk.handle(body, peer)
            if isinstance(reply, bytes):
                self._answer(tag, reply)
            else:
                self._await(tag, reply)
        self._desk.dirty(self)

    @property
    def waiting(self) -> bool:
        """Whether requests wait that could be handled now."""
        return bool(self._inbox) and self._unsent <= UNSENT_MOST and len(self._promised) < PROMISED_MOST

    def _answer(self, tag: int, reply: bytes) -> None:
        self._send(reply + b"\n" if self._lines is not None else framing.frame(tag, b"", reply))

    def _await(self, tag: int, promise: Pending) -> None:
        """Send a reply when it is made."""
        def made(reply: bytes) -> None:
            self._promised.discard(promise)
            self._answer(tag, reply)
            self._desk.dirty(self)
        promise.then = made
        self._promised.add(promise)

    def _peer(self, head: bytes) -> Peer:
        """Return who asks: whom a shell of ours names beside the message, else who connected."""
        peer = self._peers.get(head)
        if peer is None:
            asker = header(Asker, head) if head else Asker()
            may_listen = self._lines is not None or self._role == "monitor"
            peer = Peer((self.shell and asker.name) or self._caller.name, self if may_listen else None)
            if len(head) <= HEAD_BYTES:
                if len(self._peers) >= PEERS_MOST:
                    self._peers.clear()
                self._peers[head] = peer
        return peer

    # ------------------------------------------------------------ out

    @property
    def room(self) -> bool:
        """Whether output may be pushed: it takes a part of the backlog only, and leaves the rest to events."""
        return self._unsent <= self._desk.backlog_bytes // 4

    def push(self, topic: str, body: bytes, hint: bool = True) -> None:
        """Queue one event, or drop it when too much waits already: hints sooner than what is stored."""
        if self._unsent > self._desk.backlog_bytes // (2 if hint else 1):
            self._desk.dropped()
            if len(self._missed) < MISSED_MOST:
                self._missed[topic] = None
            return
        self._send(body + b"\n" if self._lines is not None else framing.frame(0, topic.encode(), body))
        self._desk.dirty(self)

    def _send(self, data: bytes) -> None:
        self._out.append(data)
        self._unsent += len(data)

    def send_now(self) -> None:
        """Send what waits, as far as the peer takes it."""
        try:
            while self._out:
                piece = self._out[0] if len(self._out) == 1 else self._joined()
                sent = self._sock.send(piece)
                self._unsent -= sent
                if sent < len(piece):
                    self._out[0] = memoryview(piece)[sent:]
                    break
                self._out.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._eof and not self._out and (self._hung_up() if self._promised else not self._inbox):
            self.close()
            return
        if self._missed and self.room:
            missed, self._missed = list(self._missed), {}
            self._desk.caught_up(self, missed)
        reading = READ if not self._eof and self._unsent <= UNSENT_MOST and len(self._inbox) < PER_TURN else 0
        self._desk.reactor.change(self._watch, reading | (WRITE if self._out else 0))

    def _joined(self) -> memoryview | bytes:
        """Put small pieces together: one system call for many replies or events."""
        pieces, size = [self._out.popleft()], 0
        size = len(pieces[0])
        while self._out and size + len(self._out[0]) <= PIECE:
            size += len(self._out[0])
            pieces.append(self._out.popleft())
        joined = b"".join(pieces) if len(pieces) > 1 else pieces[0]
        self._out.appendleft(joined)
        return joined

    def _hung_up(self) -> bool:
        """Whether the peer has gone, and not only said that it sends nothing more (poll(2))."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the connection; what was asked is done, whoever is told, and what is being looked up is dropped."""
        for promise in self._promised:
            promise.drop()
        self._promised.clear()
        if self._watch.active:
            self._desk.reactor.unwatch(self._watch)
            self._sock.close()
            self._out.clear()
            self._inbox.clear()
            self._desk.gone(self)

