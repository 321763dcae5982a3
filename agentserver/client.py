"""AgentClient: one API over any link.

Owns:    the blocking driver of conversations; the methods are one line each over `calls` and `follow`.
Runs in: a client. Use one AgentClient per thread; links and ZeroMQ sockets belong to the thread that made them.
Unaware: of what is said (calls.py, follow.py) and of sockets (the links have them). Its twin is `aclient`.
"""
from __future__ import annotations

import os
import time
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar, Union

from . import follow as following
from . import lines
from .address import default_address, route_of, with_pyzmq, zmq_endpoint
from .calls import Calls, Json, Ref, Refs
from .core.link import LineLink, Link
from .errors import RequestError
from .follow import Since
from .lines import LONGEST_LINE
from .results import (
    AgentInfo,
    BatchOutcome,
    Chunk,
    EventsPage,
    ExitRecord,
    FoundLines,
    Health,
    LastLines,
    OutputDropped,
    ServerStats,
)
from .talk import Ask, HangUp, Hear, Item, Listen, Over, Pause, Step, Talk, resume

T = TypeVar("T")
Output = Tuple[str, str, Union[Chunk, OutputDropped]]


def open_link(address: str) -> Link:
    """Return the link for an address; nothing is connected yet. Raise `LinkError` for what is not an address."""
    route = route_of(address)
    if route is not None:
        return LineLink.over(route)
    link: Link = with_pyzmq(".shell.link", address).ZmqLink(zmq_endpoint(address))
    return link


class AgentClient:
    """A client of one server; a context manager. Not to be shared between threads: make one for each.

    `address`     `tcp://…`, `ipc://…` (need pyzmq), `ssh://[USER@]HOST[:PORT][/STATE_DIR]` or `unix:PATH`;
                  `None`: AGENTSERVER_SERVER, else the local state directory's core socket if it exists, else
                  tcp://127.0.0.1:5555
    `timeout`     seconds for one request, with all its tries
    `deadline`    a time of `time.monotonic()` at which every call of this client is over: it raises `RequestTimeout`
                  then, whatever it waits for
    `retry_secs`  how long a server that cannot be reached is tried again; `None`: 10 for one that was reached
                  before, 1 for others, 0 where there is not even a socket
    """

    def __init__(self, address: Optional[str] = None, *, timeout: float = 30.0, retry_secs: Optional[float] = None,
                 deadline: Optional[float] = None) -> None:
        self.address = address or default_address(os.environ)
        self._link = open_link(self.address)
        self._turn: List[None] = [None]   # taken by whoever does a step; taking from a list is atomic
        self._calls = Calls(self.address, timeout, retry_secs, self._link.attempt_secs, deadline)

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all connections; a later request opens them again."""
        self._link.close()

    @property
    def timeout(self) -> float:
        """Seconds for one request, with all its tries."""
        return self._calls.timeout

    @timeout.setter
    def timeout(self, secs: float) -> None:
        self._calls.timeout = secs

    def open_link(self) -> Link:
        """Return a second link to the same server, for who wants to listen in this thread; the caller closes it."""
        return self._link.listener()

    # ------------------------------------------------------------ conversations

    def _run(self, talk: Talk[T]) -> T:
        """Have a conversation and return what it returns."""
        talk = self._calls.bounded(talk)
        with _Driver(self) as driver:
            step = resume(talk)
            while not isinstance(step, Over):
                step = driver.go_on(talk, step)
            end: T = step.value
            return end

    def _iterate(self, talk: Talk[None]) -> Iterator[Any]:
        """Have a conversation and yield its items."""
        talk = self._calls.bounded(talk)
        with _Driver(self) as driver:
            try:
                step = resume(talk)
                while not isinstance(step, Over):
                    if isinstance(step, Item):
                        yield step.value
                        step = resume(talk)
                    else:
                        step = driver.go_on(talk, step)
            finally:
                talk.close()

    # ------------------------------------------------------------ the server

    def request(self, message: Json, timeout: Optional[float] = None) -> Json:
        """Send a message and return its successful reply; adds a `request_id` when there is none.

        Raises `RequestError` (the server refused; `.code`, `.reply`), `LinkError` (not reachable),
        `RequestTimeout` (no answer in `timeout` seconds).
        """
        return self._run(self._calls.request(message, timeout))

    def health(self) -> Health:
        """Return whether the server is well, and where it listens."""
        return self._run(self._calls.health())

    def stats(self) -> ServerStats:
        """Return the server's counters."""
        return self._run(self._calls.stats())

    def shutdown(self, *, drain: bool = False, grace_secs: Optional[float] = None) -> Json:
        """End the server: its agents are stopped, or with `drain` awaited. Returns when it has begun."""
        return self._run(self._calls.shutdown(drain, grace_secs))

    def reload(self) -> Json:
        """Let a new core take over from the one that runs; agents do not notice. Returns when that has begun.

        It is over when `health().metadata["generation"]` has grown, or when `reload_failed` there says why not.
        """
        return self._run(self._calls.reload())

    # ------------------------------------------------------------ agents

    def spawn(self, command: Optional[Sequence[str]] = None, *, metadata: Optional[Json] = None,
              timeout_secs: Optional[float] = None, request_id: Optional[str] = None, **config: Any) -> Agent:
        """Start an agent: `command` (argv, no shell), or `model_backend` and `task`; any AgentConfig field by name."""
        return Agent(self, self._run(self._calls.spawn(command, metadata, timeout_secs, request_id, config)))

    def list(self, status: Optional[str] = None, *, all: bool = False, labels: Optional[Mapping[str, str]] = None,
             limit: Optional[int] = None, offset: int = 0) -> List[AgentInfo]:
        """Return agents, oldest first: the live ones; with `all` or a terminal `status` finished ones too."""
        return self._run(self._calls.list(status, all, labels, limit, offset))

    def agent(self, ref: str) -> Agent:
        """Return the handle of an agent by id, name or prefix; raise `RequestError` when there is not exactly one."""
        return Agent(self, self.resolve(ref))

    def resolve(self, ref: str) -> str:
        """Return the id that is meant by an id, a name or a prefix."""
        return self._run(self._calls.resolve(ref))

    def command(self, ref: str, command: str, **payload: Any) -> Json:
        """Give one agent a command and return the whole reply: agent_id, status, data."""
        return self._run(self._calls.command(ref, command, payload))

    def control(self, ref: str, command: str, **payload: Any) -> Json:
        """Give one agent a command and return the reply's `data`."""
        return self._run(self._calls.control(ref, command, payload))

    def custom_action(self, ref: str, action: str, params: Any = None) -> Json:
        """Ask an agent for one of its backend's own actions and return the reply's `data`."""
        return self._run(self._calls.custom_action(ref, action, params))

    def query(self, ref: str, pattern: Optional[str] = None, *, stream: str = "both", limit: int = 1000,
              offset: int = 0, tail: bool = False) -> FoundLines:
        """Return the lines of an agent's output in which a regular expression (syntax of `re`) matches, searched for by
        the server; with `tail` the last ones, and then `offset` counts from the end."""
        return self._run(self._calls.query(ref, pattern, stream, limit, offset, tail))

    def batch(self, command: str, agents: Optional[Sequence[Ref]] = None, *, labels: Optional[Mapping[str, str]] = None,
              fail_fast: bool = False, **payload: Any) -> BatchOutcome:
        """Give many agents a command. Does not raise for those that refuse: look at the outcome."""
        return self._run(self._calls.batch(command, agents, labels, fail_fast, payload))

    # ------------------------------------------------------------ what happened, what is written

    def events(self, since: int = 0, *, limit: int = 1000, agent: Optional[str] = None) -> EventsPage:
        """Return stored events after sequence `since`, optionally of one agent."""
        return self._run(self._calls.events(since, limit, agent))

    def follow_events(self, since: Optional[int] = None, agent: Optional[str] = None) -> Iterator[Json]:
        """Yield stored events after `since` (`None`: from now on) as they happen, in order, each once, for ever.

        Where events are no longer kept, one `EventsDropped` stands in their place.
        """
        return self._iterate(following.follow_events(self._calls, since, agent))

    def wait(self, refs: Refs, *, any: bool = False, status: Optional[str] = None,
             timeout: Optional[float] = None) -> List[AgentInfo]:
        """Wait until all agents (or one, with `any`) have ended, or are in `status`; return those, in the order given.

        An agent that ended can no longer reach another status and is returned too: look at its `status`.
        Raises `RequestTimeout` after `timeout` seconds.
        """
        return self._run(following.wait(self._calls, refs, any, status, timeout))

    def follow(self, refs: Refs, *, streams: Sequence[str] = following.STREAMS, since: Since = None,
               offsets: Optional[Mapping[Any, int]] = None, timeout: Optional[float] = None) -> Iterator[Output]:
        """Yield (agent id, stream, chunk) until the agents have ended and all is read.

        Per stream every byte comes exactly once and in order. Where bytes are no longer kept, one `OutputDropped`
        stands in their place. `since` says where to begin: a time (RFC 3339 text, or a `datetime`), or a mapping from
        a stream's name or an (agent id, stream) pair to an offset, as `offsets` is; where nothing is said, at 0.
        Raises `RequestTimeout` when it is not over after `timeout` seconds.
        """
        return self._iterate(following.follow(self._calls, refs, streams, since, offsets or {}, timeout))


class Agent:
    """A handle: a client and the id of an agent. It knows nothing by itself; everything is asked."""

    def __init__(self, client: AgentClient, id: str) -> None:
        self.client = client
        self.id = id

    def __repr__(self) -> str:
        return f"Agent({self.id!r} at {self.client.address})"

    def _do(self, command: str, **payload: Any) -> Json:
        return self.client.control(self.id, command, **payload)

    def inspect(self) -> Json:
        """Return the whole record."""
        return self._do("inspect")

    def info(self) -> AgentInfo:
        """Return the agent as the server lists it."""
        return self.client._run(self.client._calls.info(self.id))

    @property
    def status(self) -> str:
        """The status now: asks the server."""
        return self.client._run(self.client._calls.status(self.id))

    def write(self, data: Union[str, bytes], *, eof: bool = False) -> int:
        """Write to stdin, all or nothing, with `eof` as if `close_stdin` followed; return the number of bytes."""
        return self.client._run(self.client._calls.write(self.id, data, eof))

    def close_stdin(self) -> None:
        """Close stdin once everything written has been passed on; a terminal gets its end-of-file character instead."""
        self._do("close_stdin")

    def resize(self, rows: int, cols: int) -> Json:
        """Give its terminal another size; the program is told by SIGWINCH."""
        return self._do("resize", rows=rows, cols=cols)

    def read(self, stream: str = "stdout", offset: Optional[int] = None, max_bytes: int = 65536,
             times: bool = False) -> Chunk:
        """Return bytes from `offset` on; without one, from where the last such read ended, by anyone."""
        return self.client._run(self.client._calls.read(self.id, stream, offset, max_bytes, times))

    def query(self, pattern: Optional[str] = None, **how: Any) -> FoundLines:
        """Return the lines of output in which a pattern matches; see `AgentClient.query`."""
        return self.client.query(self.id, pattern, **how)

    def tail(self, lines: int = 100) -> LastLines:
        """Return the last lines of both streams, as text."""
        return self.client._run(self.client._calls.tail(self.id, lines))

    def lines(self, stream: str = "stdout", *, follow: bool = True, max_line: int = LONGEST_LINE) -> Iterator[str]:
        """Yield the lines of a stream without their end: until the agent ends, or without `follow` until now.

        One of more than `max_line` bytes (16 MiB) comes in pieces of at most so many: no more of it is held.
        """
        return self.client._iterate(lines.lines(self.client._calls, self.id, stream, follow, max_line))

    def wait(self, timeout: Optional[float] = None) -> ExitRecord:
        """Wait for the end and return how it was; raise `RequestTimeout`."""
        return self.client.wait(self.id, timeout=timeout)[0].exit or ExitRecord()

    def pause(self, force: bool = False) -> Json:
        """Stop the clock for the whole tree."""
        return self._do("pause", force=force or None)

    def resume(self) -> Json:
        """Go on after a pause."""
        return self._do("resume")

    def stop(self, grace_secs: Optional[float] = None) -> Json:
        """End it by the ladder; returns at once."""
        return self._do("stop", grace_secs=grace_secs)

    def kill(self) -> Json:
        """End it and its tree with SIGKILL; returns at once."""
        return self._do("kill")

    def signal(self, sig: Union[str, int]) -> Json:
        """Send a signal by name or number."""
        return self._do("signal", signal=sig)

    def restart(self) -> Json:
        """Start it again: same id, next attempt."""
        return self._do("restart")

    def remove(self) -> Json:
        """Forget a finished agent and its output."""
        return self._do("remove")


class _Driver:
    """Does the steps of one conversation by calling a link; listens on one of its own, while it lasts."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self._ear: Optional[Link] = None

    def __enter__(self) -> _Driver:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._ear is not None:
            self._ear.close()

    def go_on(self, talk: Talk[Any], step: Step) -> Union[Step, Over]:
        """Do a step, and go on with what came of it; refuse to where another thread is just doing one."""
        turn = self._client._turn
        try:
            turn.pop()
        except IndexError:
            raise RequestError("this AgentClient is being used by another thread, or by what a signal has interrupted; "
                               "make one for each thread") from None
        try:
            answer = self._do(step)
        except Exception as e:
            error: Optional[Exception] = e
        else:
            error = None
        finally:
            turn.append(None)
        return resume(talk, answer) if error is None else resume(talk, error=error)

    def _do(self, step: Step) -> Any:
        if isinstance(step, Ask):
            return self._client._link.request(step.raw, step.timeout)
        if isinstance(step, Hear) and self._ear is not None:
            return self._ear.next_event(step.timeout)
        if isinstance(step, Listen):
            if self._ear is not None:
                self._ear.close()
            self._ear = self._client.open_link()
            return self._ear.subscribe(step.topics, endpoint=step.endpoint, timeout=step.timeout)
        if isinstance(step, Pause):
            return time.sleep(step.secs)
        if isinstance(step, HangUp):
            return self._client._link.close()
        raise TypeError(f"this client cannot do the step {type(step).__name__}")
