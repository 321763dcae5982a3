"""The monitor thread: what the core tells of its agents, published.

Owns:    the XPUB socket and a connection of its own to the core.
Runs in: a thread of its own, beside the REP loop.
Unaware: of what an event means; topics are prefixes of bytes. It decides nothing and stores nothing.

Only what somebody subscribed to is asked of the core, so that nobody listening costs nothing. A
subscription comes from outside and is not trusted: its length and number are bounded.
"""
from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import Any, Dict, List, Optional, Set

import zmq

from ..core.link import FrameStream
from ..errors import LinkError, StartError
from ..wire import encode, new_id
from .endpoints import MAX_TOPIC, Bound, bind, is_answered, xpub_socket

MOST_TOPICS = 10_000       # beyond it the core is asked for everything, and libzmq does the choosing
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
        self._beyond = False
        self.changed = False

    def hear(self, message: bytes) -> None:
        """Take one message of the XPUB socket: 1 or 0, and a prefix. Others are ignored."""
        if not 1 <= len(message) <= MAX_TOPIC + 1 or message[0] > 1 or not message.isascii():
            return  # no topic of ours is so long or not ASCII: such a prefix matches nothing
        topic = message[1:].decode("ascii")
        if message[0] == 1:
            self._join(topic)
        elif topic in self._wanted:
            self._wanted.discard(topic)
            self.changed = True

    def _join(self, topic: str) -> None:
        if topic not in self._wanted:
            if len(self._wanted) >= self._most:
                self.changed = self.changed or not self._beyond
                self._beyond = True
                return
            self._wanted.add(topic)
            self.changed = True
        if is_answered(topic):
            self._joined.add(topic)
            self.changed = True

    def request(self) -> bytes:
        """Return the subscription as it has to be now, with what was joined since the last call."""
        topics = [""] if self._beyond else sorted(self._wanted)
        message = {"type": "subscribe_request", "request_id": new_id(), "topics": topics,
                   "announce": sorted(self._joined)}
        self._joined.clear()
        self.changed = False
        self._beyond = self._beyond and bool(self._wanted)
        return encode(message)


class Monitor:
    """Publish until `stop`."""

    def __init__(self, context: zmq.Context[Any], core: str, pub_endpoint: str, patience_secs: float = 0.0) -> None:
        self._context = context
        self._core = core
        self._pub_endpoint = pub_endpoint
        self._patience_secs = patience_secs
        self._wake, self._waker = socket.socketpair()
        self._thread: Optional[threading.Thread] = None
        self._opened = threading.Event()
        self._bound: Optional[Bound] = None
        self._error: Optional[StartError] = None

    def start(self, endpoint: str) -> str:
        """Bind and begin, in a thread of its own; return the real publishing address or raise `StartError`."""
        self._thread = threading.Thread(target=self._main, args=(endpoint,), name="monitor", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._bound is None:
            raise self._error or StartError(f"cannot publish at {self._pub_endpoint}")
        return self._bound.endpoint

    def stop(self) -> None:
        """End the thread; returns when its sockets are closed."""
        self._waker.close()
        if self._thread is not None:
            self._thread.join()
        self._wake.close()

    def _main(self, endpoint: str) -> None:
        xpub = xpub_socket(self._context)
        try:
            try:
                self._bound = bind(xpub, self._pub_endpoint, self._patience_secs)
            except StartError as e:
                self._error = e
                return
            finally:
                self._opened.set()
            _Publisher(xpub, FrameStream(self._core, {
                "role": "monitor", "pid": os.getpid(), "endpoint": endpoint, "pub_endpoint": self._bound.endpoint,
            }), self._wake.fileno()).run()
        finally:
            xpub.close()
            if self._bound is not None:
                self._bound.release()


class _Publisher:
    """The loop of the monitor thread."""

    def __init__(self, xpub: zmq.Socket[Any], stream: FrameStream, wake_fd: int) -> None:
        self._xpub = xpub
        self._xpub_fd = int(xpub.getsockopt(zmq.FD))
        self._stream = stream
        self._wake_fd = wake_fd
        self._topics = Topics()
        self._tag = 0              # of the latest subscription
        self._unconfirmed = 0.0    # since when it waits for its reply; 0: it does not
        self._lost_at = time.monotonic()

    def run(self) -> None:
        """Publish until the wake descriptor becomes readable."""
        try:
            while True:
                self._hear_subscribers()
                self._keep_connected()
                ready = self._sleep()
                if self._wake_fd in ready:
                    return
                if self._stream.fd in ready:
                    self._forward()
        finally:
            self._stream.close()

    def _hear_subscribers(self) -> None:
        """Read until nothing is left: only then does the socket's descriptor tell of the next message."""
        while True:
            try:
                frames: List[bytes] = self._xpub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 1:
                self._topics.hear(frames[0])

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

    def _sleep(self) -> Dict[int, int]:
        waiter = select.poll()
        waiter.register(self._wake_fd, select.POLLIN)
        waiter.register(self._xpub_fd, select.POLLIN)
        if self._stream.fd >= 0:
            self._lost_at = 0.0
            waiter.register(self._stream.fd, select.POLLIN if self._stream.idle else select.POLLIN | select.POLLOUT)
            patience = int(_CONFIRM_SECS * 1000) if self._unconfirmed else None
        else:
            self._lost_at = self._lost_at or time.monotonic()
            patience = _AGAIN_MS if time.monotonic() - self._lost_at < _EAGER_SECS else 10 * _AGAIN_MS
        return dict(waiter.poll(patience))

    def _forward(self) -> None:
        try:
            for tag, topic, body in self._stream.take():
                if tag == 0:
                    self._xpub.send_multipart((topic, body), zmq.NOBLOCK)
                elif tag == self._tag:
                    self._unconfirmed = 0.0
        except LinkError:
            pass  # the core died or is being replaced; _keep_connected asks the next one
        except zmq.Again:
            pass  # XPUB drops for a subscriber that is full; it never makes us wait
