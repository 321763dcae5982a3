"""A client's way to a core by lines, for asyncio: the routes and the lines of core.link, awaited.

Owns:    one connection, who waits for which reply on it, and when reading pauses for who listens too slowly.
Runs in: a client, in the thread of its event loop.
Unaware: of what a message means, and of whether asking again is safe.

Replies are matched by `request_id`, so that many may be asked for at once, and one that nobody waits for any
more (who asked was cancelled) is simply dropped: no await that is cancelled leaves anything in doubt.
"""
from __future__ import annotations

import asyncio
import time
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple, Type, TypeVar
from weakref import WeakSet

from ..errors import AgentServerError, LinkError, RequestError, RequestTimeout
from .audience import Audience, Listener, answered, parsed
from .link import Incoming, Route

Json = Dict[str, Any]
T = TypeVar("T")

_PAUSE_BYTES = 1024 * 1024   # of events that were not looked at: then the core is left to drop some


class AsyncLink(Protocol):
    """What an asynchronous client needs of a way to a server; compare `core.link.Link`."""

    attempt_secs: float

    async def request(self, raw: bytes, request_id: str, timeout: float) -> bytes:
        """Return the reply; raise `RequestTimeout`, or `LinkError` when the server is not reached."""

    async def subscribe(self, topics: Sequence[str], endpoint: str = "", timeout: float = 10.0) -> Json:
        """Listen to these topic prefixes, which are told at `endpoint`; return what confirms it, if anything does."""

    async def next_event(self, timeout: float) -> Optional[Json]:
        """Return the next event or `None` after `timeout` seconds; `LinkError` if cut off."""

    def listener(self) -> AsyncLink:
        """Return another link to the same server, for who wants to listen."""

    def close(self) -> None:
        """Let go of what nobody else uses; `gone` waits until that has happened."""

    async def gone(self) -> None:
        """Return when what was closed is closed."""


async def within(secs: float, future: asyncio.Future[T], late: Type[AgentServerError], sentence: str) -> T:
    """Await what somebody else completes; after `secs` raise `late` instead."""
    timer = asyncio.get_running_loop().call_later(secs, _expire, future, late, sentence)
    try:
        return await future
    finally:
        timer.cancel()


def _expire(future: asyncio.Future[Any], late: Type[AgentServerError], sentence: str) -> None:
    if not future.done():
        future.set_exception(late(sentence))


# ---------------------------------------------------------------- one connection

class _Connection(asyncio.Protocol):
    """See the module. `parted` is called once, when it is closed and why is known."""

    def __init__(self, route: Route, parted: Callable[[], None]) -> None:
        self._route, self._parted = route, parted
        self._loop = asyncio.get_running_loop()
        self._incoming = Incoming(route.preamble)
        self._transport: Optional[asyncio.Transport] = None
        self._asked: List[Tuple[str, asyncio.Future[bytes]]] = []
        self._ears: List[asyncio.Future[None]] = []
        self._closing = self._parting = self._paused = False
        self.audience = Audience()
        #: why it can no longer be used
        self.error: Optional[LinkError] = None

    async def open(self) -> None:
        """Dial, or raise `LinkError`; then, and when this is cancelled, `give_up` is due."""
        sock = self._route.dial()
        sock.setblocking(False)
        try:
            await self._loop.create_unix_connection(lambda: self, sock=sock)
        except BaseException:
            sock.close()
            raise

    # ------------------------------------------------------------ asking and listening

    async def ask(self, raw: bytes, request_id: str, timeout: float) -> bytes:
        """Return the line that answers a line."""
        if self.error is not None:
            raise self.error
        entry = (request_id, self._loop.create_future())
        self._asked.append(entry)
        if self._transport is not None:  # else it broke, and in a moment it is known why
            self._transport.write(self.audience.fewer() + raw + b"\n")
        try:
            return await within(timeout, entry[1], RequestTimeout,
                                f"{self._route.name} did not answer within {timeout:g} s")
        finally:
            self._asked.remove(entry)

    async def anything(self, secs: float) -> None:
        """Wait until something was told, or it broke, or for so long."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        ear = self._loop.create_future()
        self._ears.append(ear)
        timer = self._loop.call_later(secs, _finish, ear)
        try:
            await ear
        finally:
            timer.cancel()
            if ear in self._ears:
                self._ears.remove(ear)

    def _wake(self) -> None:
        ears, self._ears = self._ears, []
        for ear in ears:
            _finish(ear)

    # ------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        for line in self._incoming.feed(data):
            if line is None:
                self.close(LinkError(f"{self._route.name} sent a line that is too long"))
                return
            reply = self.audience.sort(line)
            if reply is not None:
                self._answer(reply)
        self._wake()
        if not self._route.shared and self.audience.unheard > _PAUSE_BYTES and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _answer(self, reply: bytes) -> None:
        """Hand over a reply. One to no id at all answers what could not be read: the oldest request, then."""
        request_id = answered(reply)[1]
        for asked, future in self._asked:
            if request_id in (None, asked) and not future.done():
                future.set_result(reply)
                return

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """See asyncio."""
        self._transport = None
        self._part(getattr(exc, "strerror", None) or str(exc or "it closed the connection"))

    def _part(self, why: str) -> None:
        """Have the route tell why it ended, once. To find that out of an ssh may take a moment, in which the loop must
        not wait, and nothing may be dialled."""
        if self._parting:
            return
        self._parting = True
        if not self._route.shared:
            self._gone(self._last_words(why, self._closing))
        else:
            self._loop.run_in_executor(None, self._last_words, why, self._closing).add_done_callback(
                lambda done: self._gone(None if done.cancelled() else done.result()))

    def _last_words(self, why: str, wanted: bool) -> Optional[LinkError]:
        if not wanted:
            return self._route.broke(why, self._incoming.heard)
        self._route.hang_up(self._incoming.heard)
        return None

    def _gone(self, error: Optional[LinkError]) -> None:
        self._fail(error)
        self._parted()

    def _fail(self, error: Optional[LinkError]) -> None:
        self.error = self.error or error or LinkError(f"the link to {self._route.name} was closed")
        for _asked, future in self._asked:
            if not future.done():
                future.set_exception(self.error)
        self._wake()

    def close(self, error: Optional[LinkError] = None) -> None:
        """Hang up."""
        self._closing = True
        self._fail(error)
        if self._transport is not None:
            self._transport.abort()

    def give_up(self) -> None:
        """Let go of what could not be opened."""
        self.close()
        self._part("")


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Trunk:
    """The connection of one or several links, made when it is needed, and not before the last one is gone."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.users: WeakSet[AsyncLineLink] = WeakSet()   # one that was forgotten uses nothing
        self._connection: Optional[_Connection] = None
        self._turn: Optional[asyncio.Lock] = None
        self._parting: Optional[asyncio.Future[None]] = None

    async def connected(self) -> _Connection:
        """Return the connection, a new one if need be; raise `LinkError`."""
        connection = self._connection
        if connection is not None and connection.error is None:
            return connection
        self._turn = self._turn or asyncio.Lock()
        async with self._turn:
            await self.gone()
            if self._connection is None:
                self._connection = await self._dialled()
            return self._connection

    async def _dialled(self) -> _Connection:
        self._parting = asyncio.get_running_loop().create_future()
        connection = _Connection(self.route, self._parted)
        try:
            await connection.open()
        except BaseException:
            self._connection = connection  # until its end is dealt with
            connection.give_up()
            raise
        return connection

    def _parted(self) -> None:
        self._connection = None
        if self._parting is not None:
            _finish(self._parting)

    async def gone(self) -> None:
        """Return when a connection that was closed, or broke, has been dealt with."""
        connection, parting = self._connection, self._parting
        if connection is not None and connection.error is not None and parting is not None:
            await asyncio.shield(parting)

    def drop(self) -> None:
        """Close the connection; who listens has to subscribe again."""
        if self._connection is not None:
            self._connection.close()


# ---------------------------------------------------------------- the link

class AsyncLineLink:
    """A client's way to a core, by lines. Links that were made by `listener` may share one connection."""

    attempt_secs = float("inf")

    def __init__(self, route: Route, trunk: Optional[_Trunk] = None) -> None:
        self._trunk = trunk or _Trunk(route)
        self._listener: Optional[Listener] = None
        self._heard_on: Optional[_Connection] = None

    def listener(self) -> AsyncLineLink:
        """Return another link to the same server, which the caller closes."""
        route = self._trunk.route
        return AsyncLineLink(route, self._trunk if route.shared else None)

    async def request(self, raw: bytes, request_id: str, timeout: float) -> bytes:
        """Send one line and return the line that answers it. When the connection broke, the next call makes one."""
        if b"\n" in raw:
            raise RequestError("a message for a server on this link is one line; send it without line breaks")
        self._trunk.users.add(self)
        return await (await self._trunk.connected()).ask(raw, request_id, timeout)

    async def subscribe(self, topics: Sequence[str], endpoint: str = "", timeout: float = 10.0) -> Json:
        """Listen to these topic prefixes; return the `subscribe_response`."""
        self._leave()
        self._trunk.users.add(self)
        connection, listener = await self._trunk.connected(), Listener(topics, None)
        raw = connection.audience.join(listener)
        self._listener, self._heard_on = listener, connection
        try:
            reply = parsed(await connection.ask(raw, parsed(raw)["request_id"], timeout))
            if not reply.get("success"):
                raise RequestError(str(reply.get("error")), str(reply.get("error_code") or ""), reply)
        except BaseException:
            self._leave()
            raise
        return reply

    async def next_event(self, timeout: float) -> Optional[Json]:
        """Return the next event, `None` after `timeout` seconds; raise `LinkError` when the connection was lost."""
        listener, connection = self._listener, self._heard_on
        if listener is None or connection is None:
            raise LinkError("nothing is subscribed on this link; call subscribe first")
        deadline, waited = time.monotonic() + timeout, False
        while True:
            event = listener.next()
            if event is not None:
                return event
            if connection.error is not None or listener.missed:
                self._leave()
                raise connection.error or LinkError(f"{self._trunk.route.name} told more than was listened to")
            left = deadline - time.monotonic()
            if left <= 0 and waited:
                return None
            await connection.anything(max(left, 0.0))
            waited = True

    def _leave(self) -> None:
        if self._listener is not None and self._heard_on is not None:
            self._heard_on.audience.leave(self._listener)
        self._listener = self._heard_on = None

    def close(self) -> None:
        """Close the connection, unless others use it."""
        self._leave()
        self._trunk.users.discard(self)
        if not self._trunk.users:
            self._trunk.drop()

    async def gone(self) -> None:
        """Return when a connection that was closed is closed."""
        await self._trunk.gone()
