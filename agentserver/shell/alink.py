"""The ZeroMQ end for asynchronous clients: what link.py does, on zmq.asyncio.

Owns:    one DEALER socket for requests, and for who listens one SUB socket, made when first needed.
Runs in: a client, in the thread of its event loop; imported only for `tcp://` and `ipc://` addresses.
Unaware: of what a message means, and of whether asking again is safe.

A request travels in an envelope with a number of ours, which REP gives back with the reply. So many may be asked for
at once, and a reply that nobody waits for any more is dropped: a cancelled await leaves nothing in doubt. After silence
the socket itself is in doubt: the next request gets a new one, and the old one is closed when nobody waits on it.
"""
from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, TypeVar

import zmq
import zmq.asyncio

from ..core.alink import within
from ..errors import LinkError, RequestTimeout
from .endpoints import connected, dealer_socket, probe
from .link import ZmqLink, event_in, listening, monitor_of

Json = Dict[str, Any]
T = TypeVar("T")


class AsyncZmqLink:
    """A way to a server over ZeroMQ, with the interface of `core.alink.AsyncLink`."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self.attempt_secs = ZmqLink.attempt_secs
        self._dealer: Optional[_Dealer] = None
        self._reaching: Optional[asyncio.Future[str]] = None
        self._ear: Optional[_Ear] = None

    def listener(self) -> AsyncZmqLink:
        """Return another link to the same server; the caller closes it."""
        return AsyncZmqLink(self._endpoint)

    # ------------------------------------------------------------ requests

    async def request(self, raw: bytes, request_id: str, timeout: float) -> bytes:
        """Send one message and return its reply. After a failure the next call uses a fresh socket."""
        until = time.monotonic() + timeout
        dealer = self._dealer or await self._connected(timeout)
        try:
            return await dealer.ask(raw, max(until - time.monotonic(), 0.001))
        except (LinkError, RequestTimeout):
            if self._dealer is dealer:
                self._dealer = None
            dealer.retire()
            raise

    async def _connected(self, timeout: float) -> _Dealer:
        """Connect, one for all who ask meanwhile; who may wait less than the first of them leaves sooner."""
        reaching = self._reaching = self._reaching or _in_thread(probe, self._endpoint, timeout)
        await asyncio.wait({reaching}, timeout=timeout)  # it goes on where who asks is cancelled
        if not reaching.done():
            raise RequestTimeout(f"{self._endpoint} did not answer within {timeout:g} s")
        if self._reaching is reaching:
            self._reaching = None
        where = reaching.result()
        if self._dealer is None:
            self._dealer = _Dealer(self._endpoint, where)
        return self._dealer

    # ------------------------------------------------------------ events

    async def subscribe(self, topics: Sequence[str], endpoint: str = "", timeout: float = 10.0) -> Json:
        """Listen to these topic prefixes. Nothing confirms it: what is published meanwhile may be missed."""
        self._deafen()
        self._ear = _Ear(listening(zmq.asyncio.Context.instance(), endpoint, topics, ZmqLink.queued_events))
        return {}

    async def next_event(self, timeout: float) -> Optional[Json]:
        """Return the next event, or `None` after `timeout` seconds; `LinkError` when the connection was lost."""
        if self._ear is None:
            raise LinkError("nothing is subscribed on this link; call subscribe first")
        until = time.monotonic() + timeout
        while True:
            frames = await self._ear.take(max(until - time.monotonic(), 0.0))
            if frames is None:
                if self._ear.cut():
                    self._deafen()
                    raise LinkError(f"the link to what {self._endpoint} publishes broke")
                return None
            event = event_in(frames)
            if event is not None:
                return event

    # ------------------------------------------------------------ the end

    def _deafen(self) -> None:
        if self._ear is not None:
            self._ear.close()
            self._ear = None

    def close(self) -> None:
        """Close all sockets; what was not sent is dropped."""
        dealer, self._dealer = self._dealer, None
        if dealer is not None:
            dealer.close()
        self._deafen()

    async def gone(self) -> None:
        """Return at once: closing takes no time."""


def _in_thread(function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Call what would block, such as looking up a host, in a thread of its own. A loop that ends meanwhile does not
    wait for it, as it would for the threads of an executor."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: Optional[Exception]) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def call() -> None:
        result, failed = None, None
        try:
            result = function(*args)
        except Exception as e:
            failed = e
        try:
            loop.call_soon_threadsafe(settle, result, failed)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be that nobody asks for it
    threading.Thread(target=call, name="probe", daemon=True).start()
    return future


def _next(sock: zmq.Socket[Any]) -> asyncio.Future[List[bytes]]:
    """Return the future of a socket's next message. To the type checker it is a blocking socket."""
    message: Any = sock.recv_multipart()
    future: asyncio.Future[List[bytes]] = message
    return future


class _Dealer:
    """A socket for requests, and who waits for which reply."""

    def __init__(self, endpoint: str, where: str) -> None:
        """`where` is the numeric address of `endpoint`."""
        self._endpoint = endpoint
        self._sock = connected(dealer_socket(zmq.asyncio.Context.instance()), where)
        self._waiting: Dict[bytes, asyncio.Future[bytes]] = {}
        self._count = 0
        self._retired = False
        self._receive()

    def _receive(self) -> None:
        _next(self._sock).add_done_callback(self._received)

    def _received(self, future: asyncio.Future[List[bytes]]) -> None:
        if future.cancelled() or self._sock.closed:
            return
        error = future.exception()
        if error is not None:
            self._fail(str(error))
            return
        number, *_empty, reply = future.result()
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)
        self._receive()

    async def ask(self, raw: bytes, timeout: float) -> bytes:
        """Return the reply to a message."""
        self._count += 1
        number = self._count.to_bytes(8, "big")
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send([number, b"", raw])
            return await within(timeout, future, RequestTimeout,
                                f"{self._endpoint} did not answer within {timeout:g} s")
        finally:
            del self._waiting[number]
            self._close_if_done()

    def _send(self, frames: List[bytes]) -> None:
        sent: Any = self._sock.send_multipart(frames, zmq.NOBLOCK)
        if sent.done() and sent.exception() is not None:
            raise LinkError(f"the link to {self._endpoint} takes no more: {sent.exception()}")

    def retire(self) -> None:
        """Close it as soon as nobody waits on it."""
        self._retired = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self._waiting:
            self._sock.close()

    def _fail(self, why: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkError(f"the link to {self._endpoint} broke: {why}"))

    def close(self) -> None:
        """Close it now."""
        self._fail("it was closed")
        self._sock.close()


class _Ear:
    """A SUB socket, and the one that tells when its connection was lost: libzmq would reconnect in silence."""

    def __init__(self, sub: zmq.Socket[Any]) -> None:
        self._sub, self._monitor = sub, monitor_of(sub)
        self._next, self._cut = _next(sub), _next(self._monitor)

    async def take(self, secs: float) -> Optional[List[bytes]]:
        """Return the next message, or `None` after so long, or when the connection was lost. May be cancelled."""
        if not self._next.done():
            await asyncio.wait((self._next, self._cut), timeout=secs, return_when=asyncio.FIRST_COMPLETED)
        if not self._next.done():
            return None
        frames = self._next.result()
        self._next = _next(self._sub)
        return frames

    def cut(self) -> bool:
        """Whether the connection was lost; ask when all that came before has been taken."""
        return self._cut.done()

    def close(self) -> None:
        """Close both."""
        self._next.cancel()
        self._cut.cancel()
        self._sub.disable_monitor()
        self._monitor.close(0)
        self._sub.close()
