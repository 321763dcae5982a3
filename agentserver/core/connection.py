"""One connection to the core's socket: bytes in, replies and events out.

Owns:    its socket, its framing, an inbox for each peer behind it, and what waits to be sent.
Runs in: the core's thread; nothing here blocks.
Unaware: of what requests mean; they go through `Desk.handle`.

A peer that does not read its replies is not read from any more; one that does not read its events
loses some (they are hints), and is told where as soon as it reads again. So no peer can make us hold
more than a bounded amount for it (`kept`), and quota.py bounds all together.
"""
from __future__ import annotations

import select
import socket
import sys
from collections import deque
from contextlib import suppress
from typing import Deque, Protocol

from ..wire import MAX_WIRE
from . import framing
from .control import Peer, Steps
from .inbox import Inbox
from .peers import Asker, Caller, Hello, Shell, header
from .pending import Deed
from .reactor import READ, WRITE, Reactor
from .scheduler import Scheduler

PIECE = 128 * 1024            # bytes read at once
CUT = 256                     # bytes that are cut into lines at once, where there may be more than can wait
WAITING_MOST = 64             # requests of a local client that wait before we stop reading; a shell bounds its own
WAITING_BYTES = 1024 * 1024   # the same: beyond one request, however large
SHELL_BYTES = 64 * 1024 * 1024  # of requests that wait on the connection of a shell
PEERS_MOST = 1000             # peers behind one connection that are remembered while they ask nothing
UNSENT_MOST = 16 * 1024 * 1024  # bytes of replies that may wait before we stop reading
MISSED_MOST = 10_000          # topics of which it is remembered that something was dropped
TOPIC_BYTES = 100             # that a topic costs beside its characters


class Desk(Protocol):
    """What a connection needs from the service."""

    reactor: Reactor
    scheduler: Scheduler
    backlog_bytes: int
    message_bytes: int

    def handle(self, raw: bytes | None, peer: Peer) -> Steps:
        """Make the reply to one message, or a promise of it, in steps."""

    def hello(self, hello: Hello, caller: Caller) -> Shell | None:
        """A peer says that it is a shell; return it if it is."""

    def keeper_came(self, sock: socket.socket, caller: Caller) -> None:
        """A peer says that it is a new keeper, and gives this socket up for its channel."""

    def dirty(self, connection: Connection) -> None:
        """This connection has something to send at the end of the turn."""

    def dropped(self) -> None:
        """One event was not pushed."""

    def caught_up(self, connection: Connection, missed: list[str]) -> None:
        """The peer reads again; of these topics something was dropped."""

    def gone(self, connection: Connection) -> None:
        """This connection is closed."""


class Connection:
    """See the module. `topics` and `push` make it a `feed.Subscriber`."""

    __slots__ = ("_caller", "_cutting", "_deeds", "_desk", "_eof", "_frames", "_held", "_inboxes", "_lines", "_missed",
                 "_out", "_role", "_sock", "_stalled", "_topics", "_topics_kept", "_uncut", "_unsent", "_watch",
                 "known", "scheduler", "shell")

    def __init__(self, sock: socket.socket, caller: Caller, desk: Desk) -> None:
        self._sock, self._caller, self._desk, self.scheduler = sock, caller, desk, desk.scheduler
        self._lines: framing.LineDecoder | None = framing.LineDecoder(desk.message_bytes)
        self._frames = framing.FrameDecoder(MAX_WIRE)
        self._inboxes: dict[bytes, Inbox] = {}  # by the header that names a peer
        self._held = 0       # bytes of requests that wait or are at work
        self._cutting = False
        self._uncut = memoryview(b"")  # what was read and not yet cut into lines, as more of them wait already
        self._out: Deque[memoryview | bytes] = deque()
        self._deeds: list[memoryview | bytes] = []  # replies to what was done and is not on disk, as the disk refuses
        self._unsent = 0
        self._stalled = False  # a peer did not read its replies, so that requests wait
        self._eof = False    # the peer sends nothing more; it may still want its replies
        self._topics: tuple[str, ...] = ()
        self._topics_kept = 0
        self._missed: dict[str, None] = {}  # topics of which this peer was too slow for something
        self.shell: Shell | None = None     # it is one of ours
        self._role = ""
        self.known = False   # it has asked for something
        self._watch = desk.reactor.watch(sock.fileno(), READ, self._guarded)

    # ------------------------------------------------------------ in

    def _guarded(self, mask: int) -> None:
        """A mistake in what we do for one connection ends that one."""
        try:
            self._ready(mask)
        except Exception as e:
            self._desk.reactor.mistake("a connection", e)
            self.close()

    def _ready(self, mask: int) -> None:
        if mask & WRITE:  # at the end of the turn, like all that is sent, and what is kept for it is counted anew
            self._desk.dirty(self)
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
                self._desk.dirty(self)

    def _take(self, data: bytes) -> None:
        """Cut messages from what arrived."""
        if self._lines is not None:
            if data == framing.KEEPER and not self._inboxes:
                self._become_channel()
                return
            if data.startswith(framing.PREFACE) and not self._inboxes:
                self._lines, data = None, data[len(framing.PREFACE):]
            elif data.count(b"\n") <= WAITING_MOST:
                for line in self._lines.feed(data):
                    self._put(0, b"", line)
                return
            else:
                self._uncut = memoryview(data)
                self._cut_lines()
                return
        for tag, head, body in self._frames.feed(data):
            if tag == 0:
                self._greeted(header(Hello, head))
            else:
                self._put(tag, head, body)

    def _cut_lines(self) -> None:
        """Cut lines from what was read, so many bytes at once, until enough of them wait. A request that is done at
        once makes room for the next ones: they come behind it, in their order."""
        if self._cutting:
            return
        self._cutting = True
        try:
            while self._uncut and self._lines is not None and self._waiting < WAITING_MOST:
                data, self._uncut = bytes(self._uncut[:CUT]), self._uncut[CUT:]
                for line in self._lines.feed(data):
                    self._put(0, b"", line)
        finally:
            self._cutting = False

    @property
    def _waiting(self) -> int:
        """How many requests of a local client wait."""
        inbox = self._inboxes.get(b"")
        return len(inbox) if inbox is not None else 0

    def _greeted(self, hello: Hello) -> None:
        """A peer says what it is. One that has gone is none any more: a shell that left, for example, holds no lock."""
        self._role = hello.role
        self.shell = None if self._hung_up() else self._desk.hello(hello, self._caller)
        self._forget_idle()

    def finish(self) -> None:
        """Take no more requests. What the peer has sent is read to its end and answered, then the connection is closed;
        what it sends from now on fails (EPIPE), so that it knows."""
        if sys.platform.startswith("linux"):
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)
        else:  # elsewhere that drops what was not read yet
            self._guarded(READ)
            self._eof = True
        self._desk.dirty(self)

    @property
    def name(self) -> str:
        """What records call who connected."""
        return self._caller.name

    @property
    def quiet(self) -> bool:
        """Whether it could be cut off without harm: it waits for nothing, and is no part of the server."""
        return not (self.shell or self.topics or self.owes)

    @property
    def owes(self) -> bool:
        """Whether replies are being made, or are not read yet."""
        return bool(self._out or self._deeds or self._uncut) or not all(inbox.idle for inbox in self._inboxes.values())

    @property
    def kept(self) -> int:
        """About how many bytes it makes us keep."""
        unfinished = self._frames.unfinished if self._lines is None else self._lines.unfinished
        return (unfinished + len(self._uncut) + self._held + self._unsent + TOPIC_BYTES * len(self._missed)
                + self._topics_kept)

    @property
    def topics(self) -> tuple[str, ...]:
        """What it listens to (prefixes)."""
        return self._topics

    @topics.setter
    def topics(self, topics: tuple[str, ...]) -> None:
        topics = topics if self._watch.active else ()  # one that is closed listens to nothing
        self._topics, self._topics_kept = topics, sum(map(len, topics)) + TOPIC_BYTES * len(topics)

    def _become_channel(self) -> None:
        """Hand the socket to the service: a keeper is at the other end."""
        self._desk.reactor.unwatch(self._watch)
        self._desk.gone(self)
        self._desk.keeper_came(self._sock, self._caller)

    def _put(self, tag: int, head: bytes, raw: bytes | None) -> None:
        """Put a request into the inbox of the peer that a header names; all that a stranger sends is its own."""
        if not self._watch.active:  # the request before it ended the connection
            return
        if head and self.shell is None:
            header(Asker, head)
            head = b""
        inbox = self._inboxes.get(head)
        if inbox is None:
            if len(self._inboxes) >= PEERS_MOST:
                self._forget_idle()
            inbox = self._inboxes[head] = Inbox(self._peer(head), self)
        self._held += len(raw or b"")
        self.known = True
        inbox.put(tag, raw)

    def _peer(self, head: bytes) -> Peer:
        """Return who asks, and whose turns that takes: whom a shell of ours names beside the message, else who
        connected."""
        asker = header(Asker, head) if head else Asker()
        may_listen = self._lines is not None or self._role == "monitor"
        name = (self.shell and asker.name) or self.name
        return Peer(name, self if may_listen else None, f"{name} {asker.connection}" if self.shell else name)

    def _forget_idle(self) -> None:
        self._inboxes = {head: inbox for head, inbox in self._inboxes.items() if not inbox.idle}

    # ------------------------------------------------------------ at work (inbox.Host)

    @property
    def takes_replies(self) -> bool:
        """Whether the peer reads its replies."""
        if self._unsent > UNSENT_MOST:
            self._stalled = True
            return False
        return True

    @property
    def abandoned(self) -> bool:
        """Whether the peer has gone."""
        return not self._watch.active or (self._eof and self._hung_up())

    def asked(self, raw: bytes | None, peer: Peer) -> Steps:
        """Return the steps that make a reply."""
        return self._desk.handle(raw, peer)

    def answer(self, tag: int, reply: bytes) -> None:
        """Send a reply, at the end of the turn."""
        if self._watch.active:
            before, after = (b"", b"\n") if self._lines is not None else (framing.frame_head(tag, b"", len(reply)), b"")
            if isinstance(reply, Deed):
                self._send(Deed(before + reply + after))
            elif len(reply) <= PIECE:
                self._send(before + reply + after)
            else:  # each copy of what is large is dear
                for part in filter(None, (before, reply, after)):
                    self._send(part)
            self._desk.dirty(self)

    def later(self, tag: int) -> None:
        """Tell a shell at once that a reply comes later, so that it holds nobody else for it."""
        if self._watch.active and self.shell is not None and self.shell.hello.pipelined:
            self._send(framing.frame(tag, framing.DEFERRED, b""))
            self._desk.dirty(self)

    def mistake(self, error: Exception) -> None:
        """Log what was wrong with us; whoever asked is told that something was."""
        self._desk.reactor.mistake("a request", error)

    def handled(self, size: int) -> None:
        """One request, of so many bytes, is done; there may be room for others."""
        self._held -= size
        if self._watch.active:
            if self._uncut:
                self._cut_lines()
            self._desk.dirty(self)  # also without a reply: whoever has gone is closed, and others are read on

    # ------------------------------------------------------------ out

    @property
    def may_be_cut(self) -> bool:
        """Whether nobody else is served over this connection."""
        return self._lines is not None

    def withhold(self) -> bool:
        """What was done in this turn is not on disk: its replies have to wait for that, and no others. Return whether
        there are any."""
        self._deeds += [piece for piece in self._out if isinstance(piece, Deed)]
        self._out = deque(piece for piece in self._out if not isinstance(piece, Deed))
        return bool(self._deeds)

    def acknowledge(self) -> None:
        """What was done is on disk: let the replies go that waited for that."""
        self._out.extend(self._deeds)
        self._deeds.clear()

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
        try:
            self._send(body + b"\n" if self._lines is not None else framing.frame(0, topic.encode(), body))
        except MemoryError:
            self.close()
            return
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
        if self._eof and not self._out and not self._deeds and self._over():
            self.close()
            return
        if self._missed and self.room:
            missed, self._missed = list(self._missed), {}
            self._desk.caught_up(self, missed)
        if self._stalled and self._unsent <= UNSENT_MOST:
            self._stalled = False
            for inbox in list(self._inboxes.values()):
                inbox.go_on()
        self._desk.reactor.change(self._watch, (READ if self._reading else 0) | (WRITE if self._out else 0))

    @property
    def _reading(self) -> bool:
        """Whether more requests may come. Those of a shell may, while one of its peers has many: it bounds them."""
        if self._eof or self._uncut or self._unsent > UNSENT_MOST:
            return False
        if self.shell is not None:
            return self._held <= SHELL_BYTES
        return self._held <= WAITING_BYTES and self._waiting < WAITING_MOST

    def _over(self) -> bool:
        """Whether nobody is owed a reply by a connection whose peer sends nothing more, or nobody can get one."""
        if self._uncut or any(inbox.working for inbox in self._inboxes.values()):
            return False
        return all(inbox.idle for inbox in self._inboxes.values()) or self._hung_up()

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
        for inbox in self._inboxes.values():
            inbox.clear()
        if self._watch.active:
            self._desk.reactor.unwatch(self._watch)
            self._sock.close()
            self._out.clear()
            self._uncut = memoryview(b"")
            self._missed.clear()
            self._deeds.clear()
            for decoder in (self._lines, self._frames):
                if decoder is not None:
                    decoder.forget()
            self._desk.gone(self)
