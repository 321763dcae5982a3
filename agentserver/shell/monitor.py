"""The monitor thread: what the core tells of its agents, published.

Owns:    the XPUB socket and a connection of its own to the core.
Runs in: a thread of its own, beside the request loop.
Unaware: of what an event means; topics are prefixes of bytes. It decides nothing and stores nothing.

Only what somebody subscribed to is asked of the core, so that nobody listening costs nothing. A
subscription comes from outside and is not trusted: its length and number are bounded here, and so is how much is heard
before something is published again; what libzmq itself keeps is bounded by cutting off who sends most (crowd.py).
"""
from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import Any, Callable, Dict, Optional, Set

import zmq

from ..core.framelink import FrameStream
from ..errors import LinkError, StartError
from ..wire import encode, new_id
from .connections import INFINITE, Connections
from .crowd import JOIN_BYTES, MOST_BYTES, MOST_UNHEARD, NODE_BYTES, Crowd
from .cutting import Cutter
from .endpoints import connection_of, xpub_socket
from .listening import Bound, bind, put_back
from .zap import Zap

MAX_TOPIC = 64             # bytes; no topic of ours is longer
MOST_TOPICS = 10_000       # beyond it the core is asked for everything, and libzmq does the choosing
HEARD_AT_ONCE = 1000       # messages of subscribers, before what there is to publish has its turn
_PEER = encode({"kind": "zmq", "name": "subscribers"})
_AGAIN_MS = 50             # between two tries to reach a core; 500 when it has been away for long
_EAGER_SECS = 5.0
_CONFIRM_SECS = 5.0        # after this an unanswered subscription is sent again


class Topics:
    """What subscribers want, as text and within bounds; pure."""

    def __init__(self, most: int = MOST_TOPICS) -> None:
        self._most = most
        self._wanted: Set[str] = set()
        self._joined: Set[str] = set()
        self.changed = False

    def hear(self, message: bytes) -> int:
        """Take one message of the XPUB socket: 1 or 0, and a prefix; others are ignored. Return how many bytes of
        prefix nobody had subscribed to before."""
        joins = message[:1] == b"\1"
        if message[:1] not in (b"\0", b"\1"):
            return 0
        topic = message[1:MAX_TOPIC + 2].decode("latin-1")
        if len(topic) > MAX_TOPIC or not (topic.isascii() and topic.isprintable()):
            return len(message) - 1 if joins else 0  # no topic of ours is like that: such a prefix matches nothing
        new = topic not in self._wanted
        if joins:
            self._wanted.add(topic)
            self._joined.add(topic)
            self.changed = True
            return len(topic) if new else 0
        self._wanted.discard(topic)
        self._joined.discard(topic)
        self.changed = self.changed or not new
        return 0

    def request(self) -> bytes:
        """Return the subscription as it has to be now, with what was joined since the last call, each to be answered
        with where it stands."""
        joined = sorted(self._joined)[:self._most]
        self._joined.difference_update(joined)
        self.changed = bool(self._joined)
        return encode({"type": "subscribe_request", "request_id": new_id(), "announce": joined,
                       "topics": [""] if len(self._wanted) > self._most else sorted(self._wanted)})


class Monitor:
    """Publish until `stop`."""

    def __init__(self, context: zmq.Context[Any], zap: Zap, cutter: Cutter, core: str, pub_endpoint: str, hwm: int,
                 patience_secs: float = 0.0, left: Optional[Bound] = None) -> None:
        self._context, self._zap, self._cutter, self._hwm = context, zap, cutter, hwm
        self._core = core
        self._pub_endpoint = pub_endpoint
        self._patience_secs, self._left = patience_secs, left
        self._wake, self._waker = socket.socketpair()
        self._thread: Optional[threading.Thread] = None
        self._opened = threading.Event()
        self._bound: Optional[Bound] = None
        self._error: Optional[StartError] = None

    def start(self, hello: Dict[str, Any]) -> Bound:
        """Bind and begin, in a thread of its own; return the real publishing address or raise `StartError`.
        `hello`: what the core is told of this shell."""
        self._thread = threading.Thread(target=self._main, args=(hello,), name="monitor", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._bound is None:
            raise self._error or StartError(f"cannot publish at {self._pub_endpoint}")
        return self._bound

    def stop(self, followed: bool) -> None:
        """End the thread; returns when its sockets are closed. `followed`: by another, who goes on with the address."""
        self._waker.close()
        if self._thread is not None:
            self._thread.join()
        self._wake.close()
        if self._bound is not None and not followed:
            self._bound.release()

    def put_back(self) -> Bound:
        """Have the thread look whether the file of its `ipc://` socket is still there; return what is bound so far."""
        assert self._bound is not None
        self._waker.send(b"x")
        return self._bound

    def _put_back(self, xpub: zmq.Socket[Any]) -> None:
        assert self._bound is not None
        self._bound = put_back(xpub, self._bound)

    def _main(self, hello: Dict[str, Any]) -> None:
        xpub = xpub_socket(self._context, self._hwm)
        connections = Connections(self._context, xpub, self._cutter, alone=bool(hello["keeper_pid"]))
        self._zap.watch(connections)
        try:
            try:
                self._bound = bind(xpub, self._pub_endpoint, self._patience_secs, self._left)
            except StartError as e:
                self._error = e
                return
            finally:
                self._opened.set()
            _Publisher(xpub, connections, self._cutter, FrameStream(self._core, {
                **hello, "role": "monitor", "pub_endpoint": self._bound.endpoint,
            }), self._wake.fileno(), lambda: self._put_back(xpub)).run()
        finally:
            self._zap.unwatch(connections)
            connections.close()
            xpub.close()


class _Publisher:
    """The loop of the monitor thread."""

    def __init__(self, xpub: zmq.Socket[Any], connections: Connections, cutter: Cutter, stream: FrameStream,
                 wake_fd: int, put_back: Callable[[], None]) -> None:
        """`wake_fd` ends it with its end of file; anything else calls `put_back`."""
        self._xpub, self._connections = xpub, connections
        self._xpub_fd = int(xpub.getsockopt(zmq.FD))
        self._stream = stream
        self._wake_fd, self._put_back = wake_fd, put_back
        self._topics, self._memory, self._talk = Topics(), Crowd(MOST_BYTES, cutter), Crowd(MOST_UNHEARD, cutter)
        self._tag = 0              # of the latest subscription
        self._unconfirmed = 0.0    # since when it waits for its reply; 0: it does not
        self._lost_at = time.monotonic()

    def run(self) -> None:
        """Publish until the wake descriptor ends."""
        try:
            while True:
                more = self._hear_subscribers()
                self._keep_connected()
                ready = self._sleep(more)
                if self._wake_fd in ready:
                    if not os.read(self._wake_fd, 64):
                        return
                    self._put_back()
                if self._stream.fd in ready:
                    self._forward()
                if self._connections.traffic_fd in ready:
                    self._connections.arrived()
                if self._connections.look_at <= time.monotonic():
                    self._look()
        finally:
            self._stream.close()

    def _look(self) -> None:
        """Judge what arrives and is not whole: right after all that is whole was heard, or what one turn hears."""
        taken = self._connections.measure()
        self._hear_subscribers()
        self._connections.judge(taken)

    def _hear_subscribers(self) -> bool:
        """Read what has come, up to a bound; return whether more is left. Only when nothing is does the socket's
        descriptor tell of the next message. Each frame stands for itself, as it does for libzmq."""
        now = time.monotonic()
        for _ in range(HEARD_AT_ONCE):
            try:
                frame: zmq.Frame = self._xpub.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._talk.forget()
                return False
            fd, new_bytes = connection_of(frame), self._topics.hear(frame.bytes)
            self._memory.spend(fd, JOIN_BYTES + NODE_BYTES * new_bytes)
            self._talk.spend(fd, 1)
            if fd >= 0:  # libzmq itself unsubscribes for one that has gone
                self._connections.sent(fd, b"", len(frame) + 2, now)
        return True

    def _keep_connected(self) -> None:
        try:
            if self._stream.fd < 0:
                self._stream.connect()
                self._unconfirmed = 0.0
                self._topics.changed = True   # a new core knows nothing
            if self._topics.changed and (not self._unconfirmed
                                         or time.monotonic() - self._unconfirmed > _CONFIRM_SECS):
                self._subscribe()
            self._stream.flush()
        except LinkError:
            pass  # tried again after the next sleep

    def _subscribe(self) -> None:
        """One subscription is under way at a time, so that a crowd of joins becomes a few messages."""
        from ..core.framing import frame
        self._tag += 1
        self._unconfirmed = time.monotonic()
        self._stream.send(frame(self._tag, _PEER, self._topics.request()))

    def _sleep(self, more: bool) -> Dict[int, int]:
        waiter = select.poll()
        waiter.register(self._wake_fd, select.POLLIN)
        waiter.register(self._xpub_fd, select.POLLIN)
        if self._connections.traffic_fd >= 0:
            waiter.register(self._connections.traffic_fd, select.POLLIN)
        if self._stream.fd >= 0:
            self._lost_at = 0.0
            waiter.register(self._stream.fd, select.POLLIN if self._stream.idle else select.POLLIN | select.POLLOUT)
            patience = int(_CONFIRM_SECS * 1000) if self._unconfirmed else None
        else:
            self._lost_at = self._lost_at or time.monotonic()
            patience = _AGAIN_MS if time.monotonic() - self._lost_at < _EAGER_SECS else 10 * _AGAIN_MS
        if self._connections.look_at < INFINITE:
            until_look = max(int((self._connections.look_at - time.monotonic()) * 1000) + 1, 0)
            patience = until_look if patience is None else min(patience, until_look)
        return dict(waiter.poll(0 if more else patience))

    def _forward(self) -> None:
        try:
            frames = self._stream.take()
        except LinkError:
            return  # the core died or is being replaced; _keep_connected asks the next one
        for tag, topic, body in frames:
            if tag == 0:
                self._xpub.send_multipart((topic, body))  # drops for a subscriber that is full; never waits
            elif tag == self._tag:
                self._unconfirmed = 0.0
