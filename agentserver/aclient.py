"""AsyncAgentClient: the twin of AgentClient for asyncio, method by method.

Owns:    the awaiting driver of conversations, and how many requests are under way at once.
Runs in: a client, in the thread of its event loop; any number of coroutines may use one AsyncAgentClient.
Unaware: of what is said (calls.py, follow.py) and of sockets (the links have them).
"""
from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from typing import Any, AsyncIterator, Awaitable, Deque, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union

from . import follow as following
from . import lines
from .address import default_address, route_of, with_pyzmq, zmq_endpoint
from .calls import Calls, Json, Ref, Refs
from .client import Output
from .core.alink import AsyncLineLink, AsyncLink, within
from .errors import RequestError, RequestTimeout
from .follow import Since
from .lines import LONGEST_LINE
from .results import AgentInfo, BatchOutcome, Chunk, EventsPage, ExitRecord, FoundLines, Health, LastLines, ServerStats
from .talk import Ask, HangUp, Hear, Item, Listen, Over, Pause, Step, Talk, resume

T = TypeVar("T")

AT_ONCE = 16   # requests of one client that are under way; the others wait for their turn


def open_async_link(address: str) -> AsyncLink:
    """Return the link for an address; nothing is connected yet. Raise `LinkError` for what is not an address."""
    route = route_of(address)
    if route is not None:
        return AsyncLineLink(route)
    link: AsyncLink = with_pyzmq(".shell.alink", address).AsyncZmqLink(zmq_endpoint(address))
    return link


class AsyncAgentClient:
    """A client of one server for asyncio; an asynchronous context manager. Its parameters are those of `AgentClient`.

    Its methods are too, to be awaited; those that yield are asynchronous iterators. It belongs to one event loop, in
    which any number of coroutines may use it at once. Any await may be cancelled.
    """

    def __init__(self, address: Optional[str] = None, *, timeout: float = 30.0, retry_secs: Optional[float] = None,
                 deadline: Optional[float] = None) -> None:
        self.address = address or default_address(os.environ)
        self._link = open_async_link(self.address)
        self._calls = Calls(self.address, timeout, retry_secs, self._link.attempt_secs, deadline)
        self._turns = _Turns(AT_ONCE)
        self._loop: Optional[asyncio.AbstractEventLoop] = None

    async def __aenter__(self) -> AsyncAgentClient:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of all connections; a later request opens them again."""
        self._at_home()
        self._link.close()
        await self._link.gone()

    @property
    def timeout(self) -> float:
        """Seconds for one request, with all its tries."""
        return self._calls.timeout

    @timeout.setter
    def timeout(self, secs: float) -> None:
        self._calls.timeout = secs

    def open_link(self) -> AsyncLink:
        """Return a second link to the same server, for who wants to listen; the caller closes it."""
        return self._link.listener()

    # ------------------------------------------------------------ conversations

    def _at_home(self) -> None:
        """See that this is the event loop that the client belongs to; after the end of one it may have another."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None:
            if not self._loop.is_closed():
                raise RequestError("this AsyncAgentClient belongs to another event loop; make one for each loop")
            self._link, self._turns = open_async_link(self.address), _Turns(AT_ONCE)
        self._loop = loop

    async def _run(self, talk: Talk[T]) -> T:
        """Have a conversation and return what it returns."""
        self._at_home()
        talk = self._calls.bounded(talk)
        driver = _Driver(self)
        try:
            step = resume(talk)
            while not isinstance(step, Over):
                step = resume(talk, *await driver.attempt(step))
            end: T = step.value
            return end
        finally:
            talk.close()
            driver.close()

    async def _iterate(self, talk: Talk[None]) -> AsyncIterator[Any]:
        """Have a conversation and yield its items."""
        self._at_home()
        talk = self._calls.bounded(talk)
        driver = _Driver(self)
        try:
            step = resume(talk)
            while not isinstance(step, Over):
                if isinstance(step, Item):
                    yield step.value
                    step = resume(talk)
                else:
                    step = resume(talk, *await driver.attempt(step))
        finally:
            talk.close()
            driver.close()

    # ------------------------------------------------------------ the server

    async def request(self, message: Json, timeout: Optional[float] = None) -> Json:
        """Send a message and return its successful reply; adds a `request_id` when there is none.

        Raises `RequestError` (the server refused; `.code`, `.reply`), `LinkError` (not reachable),
        `RequestTimeout` (no answer in `timeout` seconds).
        """
        return await self._run(self._calls.request(message, timeout))

    async def health(self) -> Health:
        """Return whether the server is well, and where it listens."""
        return await self._run(self._calls.health())

    async def stats(self) -> ServerStats:
        """Return the server's counters."""
        return await self._run(self._calls.stats())

    async def shutdown(self, *, drain: bool = False, grace_secs: Optional[float] = None) -> Json:
        """End the server: its agents are stopped, or with `drain` awaited. Returns when it has begun."""
        return await self._run(self._calls.shutdown(drain, grace_secs))

    async def reload(self) -> Json:
        """Let a new core take over from the one that runs; see `AgentClient.reload`."""
        return await self._run(self._calls.reload())

    # ------------------------------------------------------------ agents

    async def spawn(self, command: Optional[Sequence[str]] = None, *, metadata: Optional[Json] = None,
                    timeout_secs: Optional[float] = None, request_id: Optional[str] = None,
                    **config: Any) -> AsyncAgent:
        """Start an agent: `command` (argv, no shell), or `model_backend` and `task`; any AgentConfig field by name."""
        return AsyncAgent(self, await self._run(
            self._calls.spawn(command, metadata, timeout_secs, request_id, config)))

    async def list(self, status: Optional[str] = None, *, all: bool = False,
                   labels: Optional[Mapping[str, str]] = None, limit: Optional[int] = None,
                   offset: int = 0) -> List[AgentInfo]:
        """Return agents, oldest first: the live ones; with `all` or a terminal `status` finished ones too."""
        return await self._run(self._calls.list(status, all, labels, limit, offset))

    async def agent(self, ref: str) -> AsyncAgent:
        """Return the handle of an agent by id, name or prefix; raise `RequestError` when there is not exactly one."""
        return AsyncAgent(self, await self.resolve(ref))

    async def resolve(self, ref: str) -> str:
        """Return the id that is meant by an id, a name or a prefix."""
        return await self._run(self._calls.resolve(ref))

    async def command(self, ref: str, command: str, **payload: Any) -> Json:
        """Give one agent a command and return the whole reply: agent_id, status, data."""
        return await self._run(self._calls.command(ref, command, payload))

    async def control(self, ref: str, command: str, **payload: Any) -> Json:
        """Give one agent a command and return the reply's `data`."""
        return await self._run(self._calls.control(ref, command, payload))

    async def custom_action(self, ref: str, action: str, params: Any = None) -> Json:
        """Ask an agent for one of its backend's own actions and return the reply's `data`."""
        return await self._run(self._calls.custom_action(ref, action, params))

    async def query(self, ref: str, pattern: Optional[str] = None, *, stream: str = "both", limit: int = 1000,
                    offset: int = 0, tail: bool = False) -> FoundLines:
        """Return the lines of an agent's output in which a regular expression (syntax of `re`) matches, searched for by
        the server; with `tail` the last ones, and then `offset` counts from the end."""
        return await self._run(self._calls.query(ref, pattern, stream, limit, offset, tail))

    async def batch(self, command: str, agents: Optional[Sequence[Ref]] = None, *,
                    labels: Optional[Mapping[str, str]] = None, fail_fast: bool = False,
                    **payload: Any) -> BatchOutcome:
        """Give many agents a command. Does not raise for those that refuse: look at the outcome."""
        return await self._run(self._calls.batch(command, agents, labels, fail_fast, payload))

    # ------------------------------------------------------------ what happened, what is written

    async def events(self, since: int = 0, *, limit: int = 1000, agent: Optional[str] = None) -> EventsPage:
        """Return stored events after sequence `since`, optionally of one agent."""
        return await self._run(self._calls.events(since, limit, agent))

    def follow_events(self, since: Optional[int] = None, agent: Optional[str] = None) -> AsyncIterator[Json]:
        """Yield stored events as they happen, in order, each once; see `AgentClient.follow_events`."""
        return self._iterate(following.follow_events(self._calls, since, agent))

    async def wait(self, refs: Refs, *, any: bool = False, status: Optional[str] = None,
                   timeout: Optional[float] = None) -> List[AgentInfo]:
        """Wait until all agents (or one, with `any`) have ended, or are in `status`; see `AgentClient.wait`."""
        return await self._run(following.wait(self._calls, refs, any, status, timeout))

    def follow(self, refs: Refs, *, streams: Sequence[str] = following.STREAMS, since: Since = None,
               offsets: Optional[Mapping[Any, int]] = None, timeout: Optional[float] = None) -> AsyncIterator[Output]:
        """Yield (agent id, stream, chunk) until the agents have ended and all is read; see `AgentClient.follow`."""
        return self._iterate(following.follow(self._calls, refs, streams, since, offsets or {}, timeout))


class AsyncAgent:
    """A handle: a client and the id of an agent. It knows nothing by itself; everything is asked."""

    def __init__(self, client: AsyncAgentClient, id: str) -> None:
        self.client = client
        self.id = id

    def __repr__(self) -> str:
        return f"AsyncAgent({self.id!r} at {self.client.address})"

    async def _do(self, command: str, **payload: Any) -> Json:
        return await self.client.control(self.id, command, **payload)

    async def inspect(self) -> Json:
        """Return the whole record."""
        return await self._do("inspect")

    async def info(self) -> AgentInfo:
        """Return the agent as the server lists it."""
        return await self.client._run(self.client._calls.info(self.id))

    @property
    def status(self) -> Awaitable[str]:
        """The status now, to be awaited: asks the server."""
        return self.client._run(self.client._calls.status(self.id))

    async def write(self, data: Union[str, bytes], *, eof: bool = False) -> int:
        """Write to stdin, all or nothing, with `eof` as if `close_stdin` followed; return the number of bytes."""
        return await self.client._run(self.client._calls.write(self.id, data, eof))

    async def close_stdin(self) -> None:
        """Close stdin once everything written has been passed on; a terminal gets its end-of-file character instead."""
        await self._do("close_stdin")

    async def resize(self, rows: int, cols: int) -> Json:
        """Give its terminal another size; the program is told by SIGWINCH."""
        return await self._do("resize", rows=rows, cols=cols)

    async def read(self, stream: str = "stdout", offset: Optional[int] = None, max_bytes: int = 65536,
                   times: bool = False) -> Chunk:
        """Return bytes from `offset` on; without one, from where the last such read ended, by anyone."""
        return await self.client._run(self.client._calls.read(self.id, stream, offset, max_bytes, times))

    async def query(self, pattern: Optional[str] = None, **how: Any) -> FoundLines:
        """Return the lines of output in which a pattern matches; see `AgentClient.query`."""
        return await self.client.query(self.id, pattern, **how)

    async def tail(self, lines: int = 100) -> LastLines:
        """Return the last lines of both streams, as text."""
        return await self.client._run(self.client._calls.tail(self.id, lines))

    def lines(self, stream: str = "stdout", *, follow: bool = True,
              max_line: int = LONGEST_LINE) -> AsyncIterator[str]:
        """Yield the lines of a stream, without their end; see `Agent.lines`."""
        return self.client._iterate(lines.lines(self.client._calls, self.id, stream, follow, max_line))

    async def wait(self, timeout: Optional[float] = None) -> ExitRecord:
        """Wait for the end and return how it was; raise `RequestTimeout`."""
        return (await self.client.wait(self.id, timeout=timeout))[0].exit or ExitRecord()

    async def pause(self, force: bool = False) -> Json:
        """Stop the clock for the whole tree."""
        return await self._do("pause", force=force or None)

    async def resume(self) -> Json:
        """Go on after a pause."""
        return await self._do("resume")

    async def stop(self, grace_secs: Optional[float] = None) -> Json:
        """End it by the ladder; returns at once."""
        return await self._do("stop", grace_secs=grace_secs)

    async def kill(self) -> Json:
        """End it and its tree with SIGKILL; returns at once."""
        return await self._do("kill")

    async def signal(self, sig: Union[str, int]) -> Json:
        """Send a signal by name or number."""
        return await self._do("signal", signal=sig)

    async def restart(self) -> Json:
        """Start it again: same id, next attempt."""
        return await self._do("restart")

    async def remove(self) -> Json:
        """Forget a finished agent and its output."""
        return await self._do("remove")


class _Driver:
    """Does the steps of one conversation by awaiting a link; listens on one of its own, while it lasts."""

    def __init__(self, client: AsyncAgentClient) -> None:
        self._client = client
        self._ear: Optional[AsyncLink] = None

    async def attempt(self, step: Step) -> Tuple[Any, Optional[Exception]]:
        """Do a step; return what came of it, or the error."""
        try:
            return await self._do(step), None
        except Exception as e:
            return None, e

    async def _do(self, step: Step) -> Any:
        if isinstance(step, Ask):
            return await self._ask(step)
        if isinstance(step, Hear) and self._ear is not None:
            await asyncio.sleep(0)  # who is told more than it can take must not keep the others from running
            return await self._ear.next_event(step.timeout)
        if isinstance(step, Listen):
            self.close()
            self._ear = self._client.open_link()
            return await self._ear.subscribe(step.topics, step.endpoint, step.timeout)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.secs)
        if isinstance(step, HangUp):
            return self._client._link.close()
        raise TypeError(f"this client cannot do the step {type(step).__name__}")

    async def _ask(self, step: Ask) -> bytes:
        turns, until = self._client._turns, time.monotonic() + step.left
        await turns.take(step.left)
        try:
            left = max(min(step.timeout, until - time.monotonic()), 0.001)
            return await self._client._link.request(step.raw, step.request_id, left)
        finally:
            turns.give()

    def close(self) -> None:
        """Stop listening."""
        if self._ear is not None:
            self._ear.close()
            self._ear = None


class _Turns:
    """So many at once; the others wait in line, each for as long as it may."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._line: Deque[asyncio.Future[None]] = deque()

    async def take(self, secs: float) -> None:
        """Wait for a turn; raise `RequestTimeout` if none comes."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await within(secs, turn, RequestTimeout, "too many requests were under way")
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give()  # it came at the same moment as the cancellation
            raise

    def give(self) -> None:
        """Let the next one have the turn."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
