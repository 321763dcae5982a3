"""The ZeroMQ end for clients.

Owns:    one REQ socket for requests and one SUB socket for events, made when first needed.
Runs in: a client, in the thread that uses it; imported only for `tcp://` and `ipc://` addresses.
Unaware: of what a message means, and of whether asking again is safe.
"""
from __future__ import annotations

import json
import time
from typing import Any, Dict, Optional, Sequence, Set

import zmq

from ..errors import LinkError, RequestTimeout
from ..wire import encode, new_id
from .endpoints import QUEUED_EVENTS, probe, req_socket, sub_socket

Json = Dict[str, Any]


class ZmqLink:
    """A way to a server over ZeroMQ, with the interface of `core.link.Link`."""

    attempt_secs = 0.3       # a request that a dying shell took is gone, and nobody tells us; doubled each time
    recheck_secs = 3.0       # published messages may be lost in silence
    queued_events = QUEUED_EVENTS  # that may wait to be taken by `next_event`; what comes beyond them is lost

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[Any] = zmq.Context.instance()
        self._req: Optional[zmq.Socket[Any]] = None
        self._req_secs = -1.0
        self._sub: Optional[zmq.Socket[Any]] = None
        self._topics: Set[str] = set()

    def request(self, raw: bytes, timeout: float) -> bytes:
        """Send one message and return its reply. After any failure the next call uses a fresh socket."""
        req = self._req
        if req is None:
            req = self._connect(timeout)
        if timeout != self._req_secs:
            self._req_secs = timeout
            millis = max(int(timeout * 1000), 1)
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

    def _connect(self, timeout: float) -> zmq.Socket[Any]:
        probe(self._endpoint, timeout)
        req = req_socket(self._context)
        try:
            req.connect(self._endpoint)
        except zmq.ZMQError as e:
            req.close()
            raise LinkError(f"cannot connect to {self._endpoint}: {e.strerror}") from None
        self._req, self._req_secs = req, -1.0
        return req

    def subscribe(self, topics: Sequence[str], since: Optional[int] = None, timeout: float = 10.0) -> Json:
        """Listen to these topic prefixes. Nothing confirms it: what is published meanwhile may be missed."""
        if self._sub is None:
            self._sub = self._listen(timeout)
        wanted = set(topics)
        for topic in wanted - self._topics:
            self._sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
        for topic in self._topics - wanted:
            self._sub.setsockopt(zmq.UNSUBSCRIBE, topic.encode())
        self._topics = wanted
        return {}

    def _listen(self, timeout: float) -> zmq.Socket[Any]:
        endpoint = self._pub_endpoint(timeout)
        if not endpoint:
            raise LinkError("this server publishes nothing (its pub_endpoint is none); "
                            "start it with --pub-endpoint, or read instead of listening")
        sub = sub_socket(self._context, self.queued_events)
        try:
            sub.connect(endpoint)
        except zmq.ZMQError as e:
            sub.close()
            raise LinkError(f"cannot listen at {endpoint}: {e.strerror}") from None
        self._topics = set()
        return sub

    def _pub_endpoint(self, timeout: float) -> str:
        raw = encode({"type": "health_check_request", "request_id": new_id()})
        try:
            reply = json.loads(self.request(raw, timeout))
            return str(reply["metadata"].get("pub_endpoint") or "")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise LinkError(f"{self._endpoint} did not say where it publishes; is it an agentserver?") from None

    def next_event(self, timeout: Optional[float]) -> Optional[Json]:
        """Return the next event, or `None` after `timeout` seconds; libzmq reconnects by itself."""
        if self._sub is None:
            raise LinkError("nothing is subscribed on this link; call subscribe first")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                frames = self._sub.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._sub.poll(None if left is None else int(left * 1000) + 1)
                continue
            event = _event(frames)
            if event is not None:
                return event

    @property
    def event_fd(self) -> int:
        """The descriptor of the SUB socket. It is edge-triggered: see `Link.event_fd`."""
        return int(self._sub.getsockopt(zmq.FD)) if self._sub is not None else -1

    def listener(self) -> ZmqLink:
        """Return another link to the same server; the caller closes it."""
        return ZmqLink(self._endpoint)

    def _drop_req(self) -> None:
        if self._req is not None:
            self._req.close()
            self._req = None

    def close(self) -> None:
        """Close both sockets; what was not sent is dropped."""
        self._drop_req()
        if self._sub is not None:
            self._sub.close()
            self._sub = None


def _event(frames: Sequence[bytes]) -> Optional[Json]:
    """Return what a publisher sent, or `None` if it is none of ours."""
    try:
        value = json.loads(frames[1]) if len(frames) == 2 else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
