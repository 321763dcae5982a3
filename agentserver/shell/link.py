"""The ZeroMQ end for clients.

Owns:    one REQ socket for requests and one SUB socket for events, made when first needed.
Runs in: a client, in the thread that uses it; imported only for `tcp://` and `ipc://` addresses.
Unaware: of what a message means, and of whether asking again is safe.
"""
from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, Optional, Sequence

import zmq

from ..errors import LinkError, RequestTimeout
from .endpoints import QUEUED_EVENTS, connected, probe, req_socket, sub_socket

Json = Dict[str, Any]
_LONGEST_SECS = 2e6      # libzmq counts milliseconds in 32 bits; who waits longer asks again


class ZmqLink:
    """A way to a server over ZeroMQ, with the interface of `core.link.Link`."""

    attempt_secs = 0.3       # a request that a dying shell took is gone, and nobody tells us; doubled each time
    queued_events = QUEUED_EVENTS  # that may wait to be taken by `next_event`; what comes beyond them is lost

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[Any] = zmq.Context.instance()
        self._pid = os.getpid()
        self._req: Optional[zmq.Socket[Any]] = None
        self._req_secs = -1.0
        self._ear: Optional[_Ear] = None

    def request(self, raw: bytes, timeout: float) -> bytes:
        """Send one message and return its reply. After any failure the next call uses a fresh socket."""
        req = self._req if self._pid == os.getpid() else self._forked()
        if req is None:
            began = time.monotonic()
            req = self._connect(timeout)
            timeout = max(timeout - (time.monotonic() - began), 0.001)
        if timeout != self._req_secs:
            self._req_secs = timeout
            millis = max(int(min(timeout, _LONGEST_SECS) * 1000), 1)
            req.setsockopt(zmq.RCVTIMEO, millis)
            req.setsockopt(zmq.SNDTIMEO, millis)
        try:
            req.send(raw)
            return req.recv()
        except zmq.Again:
            self._drop_req()
            raise RequestTimeout(f"{self._endpoint} did not answer within {timeout:g} s") from None
        except zmq.ZMQError as e:
            self._drop_req()
            raise LinkError(f"the link to {self._endpoint} broke: {e.strerror}") from None
        except BaseException:  # Ctrl-C: the reply still comes, and must not meet the next request
            self._drop_req()
            raise

    def _forked(self) -> Optional[zmq.Socket[Any]]:
        """Leave what belongs to the parent of a fork(2): libzmq's threads are not here."""
        self._pid, self._context = os.getpid(), zmq.Context.instance()
        self._req = self._ear = None
        return None

    def _connect(self, timeout: float) -> zmq.Socket[Any]:
        where = probe(self._endpoint, timeout)
        self._req, self._req_secs = connected(req_socket(self._context), where), -1.0
        return self._req

    def subscribe(self, topics: Sequence[str], since: Optional[int] = None, timeout: float = 10.0,
                  endpoint: str = "") -> Json:
        """Listen to these topic prefixes. Nothing confirms it: what is published meanwhile may be missed."""
        self._deafen()
        self._ear = _Ear(listening(self._context, endpoint, topics, self.queued_events))
        return {}

    def next_event(self, timeout: Optional[float]) -> Optional[Json]:
        """Return the next event, or `None` after `timeout` seconds; `LinkError` when the connection was lost."""
        if self._ear is None:
            raise LinkError("nothing is subscribed on this link; call subscribe first")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            frames = self._ear.take()
            if frames is None:
                if self._ear.cut():
                    self._deafen()
                    raise LinkError(f"the link to what {self._endpoint} publishes broke")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._ear.wait(left)
                continue
            event = event_in(frames)
            if event is not None:
                return event

    @property
    def event_fd(self) -> int:
        """The descriptor of the SUB socket. It is edge-triggered: see `Link.event_fd`."""
        return self._ear.fd if self._ear else -1

    def listener(self) -> ZmqLink:
        """Return another link to the same server; the caller closes it."""
        return ZmqLink(self._endpoint)

    def _drop_req(self) -> None:
        if self._req is not None:
            self._req.close()
            self._req = None

    def _deafen(self) -> None:
        if self._ear is not None:
            self._ear.close()
            self._ear = None

    def close(self) -> None:
        """Close all sockets; what was not sent is dropped."""
        self._drop_req()
        self._deafen()


class _Ear:
    """A SUB socket, and the one that tells when its connection was lost: libzmq would reconnect in silence."""

    def __init__(self, sub: zmq.Socket[Any]) -> None:
        self._sub = sub
        self._monitor = monitor_of(sub)
        self.fd = int(sub.getsockopt(zmq.FD))

    def take(self) -> Optional[Sequence[bytes]]:
        """Return a message that is there."""
        try:
            frames: Sequence[bytes] = self._sub.recv_multipart(zmq.NOBLOCK)
            return frames
        except zmq.Again:
            return None

    def cut(self) -> bool:
        """Whether the connection was lost; ask when all that came before has been taken."""
        return bool(self._monitor.poll(0))

    def wait(self, secs: Optional[float]) -> None:
        """Wait for either."""
        millis = -1 if secs is None else int(min(secs, _LONGEST_SECS) * 1000) + 1
        zmq.zmq_poll([(self._sub, zmq.POLLIN), (self._monitor, zmq.POLLIN)], millis)

    def close(self) -> None:
        """Close both."""
        self._sub.disable_monitor()
        self._monitor.close(0)
        self._sub.close()


# ---------------------------------------------------------------- what the asynchronous twin does too (alink.py)

def listening(context: zmq.Context[Any], endpoint: str, topics: Sequence[str], queued: int) -> zmq.Socket[Any]:
    """Return a SUB socket that listens to these topics at a publisher's endpoint."""
    if not endpoint:
        raise LinkError("this server publishes nothing (its pub_endpoint is none); "
                        "start it with --pub-endpoint, or read instead of listening")
    sub = sub_socket(context, queued)
    for topic in topics:
        sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
    monitor_of(sub)  # before it connects, so that it cannot miss that nobody is there
    return connected(sub, endpoint)


def monitor_of(sub: zmq.Socket[Any]) -> zmq.Socket[Any]:
    """Return the socket that gets a message when the other's connection was lost, or could not be made."""
    monitor: zmq.Socket[Any] = sub.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
    return monitor


def event_in(frames: Sequence[bytes]) -> Optional[Json]:
    """Return what a publisher sent, or `None` if it is none of ours."""
    try:
        value = json.loads(frames[1]) if len(frames) == 2 else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
