"""Following output and events, and waiting for ends: what is told is a hint, the truth is read.

Owns:    which byte and which event comes next, per stream.
Runs in: a client; it waits for nothing itself (talk.py).
Unaware: of how hints come, and when to look without one (hints.py).
"""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, TypeVar, Union

from .calls import Calls, Json
from .errors import LinkError, RequestError, RequestTimeout
from .hints import SERVER, Hints
from .results import AgentInfo, Chunk, EventsDropped, OutputDropped
from .talk import Item, Talk, until
from .wire import MAX_INT, rfc3339

if TYPE_CHECKING:
    from datetime import datetime

Since = Union[None, str, "datetime", Mapping[Any, int]]
T = TypeVar("T")
STREAMS = ("stdout", "stderr")

_GONE_SECS = 1.0       # how long a server that told of an end and cannot be reached is tried before that is believed
_READ_BYTES = 1024 * 1024  # at once, by one who is behind: more would only keep the server's loop busy for longer
_AT_ONCE = 100         # hints that are heard between two reads by one who is behind
_LOOK_SECS = 1.0       # for a look at what is there already, however short a time was given for the waiting
_STORED = frozenset(("status_changed", "error", "completed", "terminated"))


def _finished(status: Any) -> bool:
    return AgentInfo(status=str(status)).finished


class _Truth:
    """What an agent is: asked for; but where the server told of its end and has gone since, that is believed."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._gone = False

    def status(self, agent_id: str) -> Talk[str]:
        """Return an agent's status."""
        if agent_id in self._calls.ends:
            return (yield from self.info(agent_id)).status
        return (yield from self._calls.status(agent_id))

    def info(self, agent_id: str) -> Talk[AgentInfo]:
        """Return an agent as the server lists it, or the little that was told."""
        told = self._calls.ends.get(agent_id)
        if told is None:
            return (yield from self._calls.info(agent_id))
        if not self._gone:
            try:
                return (yield from self._calls.info(agent_id, patience=_GONE_SECS))
            except (LinkError, RequestTimeout):
                self._gone = True
        return told


def _deadline(calls: Calls, timeout: Optional[float]) -> float:
    return float("inf") if timeout is None else calls.clock() + timeout


def _bounded(calls: Calls, talk: Talk[T], deadline: float, late: Callable[[], str]) -> Talk[T]:
    """Return a conversation that waits for nobody beyond its deadline, but has the time to look once."""
    return until(talk, max(deadline, calls.clock() + _LOOK_SECS), calls.clock, late)


# ---------------------------------------------------------------- waiting

def wait(calls: Calls, refs: Any, any_: bool, status: Optional[str], timeout: Optional[float]) -> Talk[List[AgentInfo]]:
    """See `AgentClient.wait`."""
    deadline = _deadline(calls, timeout)
    pending: Dict[str, None] = {}

    def late() -> str:
        return _still(calls, list(pending), status, timeout)
    return _bounded(calls, _wait(calls, refs, any_, status, deadline, pending, late), deadline, late)


def _wait(calls: Calls, refs: Any, any_: bool, status: Optional[str], deadline: float, pending: Dict[str, None],
          late: Callable[[], str]) -> Talk[List[AgentInfo]]:
    """Wait; who is still waited for is in `pending`."""
    ids = yield from calls.resolve_all(refs)
    pending.update(dict.fromkeys(ids))
    everyone = len(pending)
    truth, hints = _Truth(calls), Hints(calls, [f"status.{id_}" for id_ in pending], pending, deadline)
    try:
        while pending and not (any_ and len(pending) < everyone):
            event = yield from hints.next()
            reached = {str(event.get("agent_id"))} if event and _reached(event.get("status"), status) else set()
            for agent_id in hints.due():
                if _reached((yield from truth.status(agent_id)), status):
                    reached.add(agent_id)
                hints.looked(agent_id)
            for agent_id in reached & pending.keys():
                del pending[agent_id]
                hints.forget(agent_id)
    except RequestTimeout as e:
        raise RequestTimeout(late() if calls.clock() >= deadline else str(e)) from None
    found = []
    for agent_id in ids:
        if agent_id not in pending:
            found.append((yield from truth.info(agent_id)))
    return found


def _reached(now: Any, wanted: Optional[str]) -> bool:
    return now == wanted or _finished(now)


def _still(calls: Calls, pending: Sequence[str], status: Optional[str], timeout: Optional[float]) -> str:
    if not pending:
        return f"{calls.address} did not answer within {timeout or 0:g} s"
    more = f" and {len(pending) - 1} more" if len(pending) > 1 else ""
    return f"after {timeout or 0:g} s agent {pending[0]}{more} " + (
        f"had neither become {status} nor ended" if status else "had not ended")


# ---------------------------------------------------------------- output

class _Stream:
    """Where we are in one stream of one agent."""

    def __init__(self, agent_id: str, name: str, offset: int) -> None:
        self.agent_id, self.name = agent_id, name
        self.expected = offset
        self.gap = False       # the last hint told of bytes after ours
        self.done = False
        self.stuck = False     # nothing has come between the last two heartbeats
        self._at_beat = -1     # where we were at the last one
        self._told_end = 0     # where the stream ended then
        self._asked_end = 0    # what of that was asked for in vain: half a character is not told before its other half

    def lacks(self, span: Json) -> bool:
        """Return whether a heartbeat tells of bytes that have not come; they may be on their way."""
        self.stuck, self._at_beat = self._at_beat == self.expected, self.expected
        self._told_end = int(span.get("end_offset") or 0)
        return self._told_end > max(self.expected, self._asked_end)

    def take(self, event: Json) -> Talk[bool]:
        """Hand on what of a pushed chunk is new and next; return whether it came out of turn."""
        begin, end = int(event["offset"]), int(event["next_offset"])
        self.gap = begin > self.expected
        if self.gap or end < self.expected:
            return bool(event.get("data"))
        self.done = bool(event.get("eof"))
        if end > self.expected:
            chunk = Chunk.of(event)
            if begin < self.expected:
                chunk = replace(chunk, data=chunk.data[self.expected - begin:], offset=self.expected)
            self.expected = end
            yield self._item(chunk)
        return False

    def read(self, calls: Calls, most: int = _READ_BYTES) -> Talk[bool]:
        """Hand on the next chunk by asking; return whether there may be more."""
        asked = self.expected
        chunk = yield from calls.read(self.agent_id, self.name, asked, most)
        self.done = chunk.eof
        if chunk.dropped:
            yield self._item(OutputDropped(self.agent_id, self.name, asked, chunk.offset, chunk.dropped_reason))
        if chunk.data:
            yield self._item(replace(chunk, dropped=0))
        if chunk.data or chunk.dropped:
            self.expected = chunk.next_offset
        else:
            self._asked_end = self._told_end
        return bool(chunk.data) and not chunk.eof

    def _item(self, what: Union[Chunk, OutputDropped]) -> Item:
        return Item((self.agent_id, self.name, what))


def follow(calls: Calls, refs: Any, names: Sequence[str], since: Since, offsets: Mapping[Any, int],
           timeout: Optional[float]) -> Talk[None]:
    """See `AgentClient.follow`."""
    deadline = _deadline(calls, timeout)
    return _bounded(calls, _follow(calls, refs, names, since, offsets, deadline), deadline,
                    lambda: "it was not over within the time given")


def _follow(calls: Calls, refs: Any, names: Sequence[str], since: Since, offsets: Mapping[Any, int],
            deadline: float) -> Talk[None]:
    names, told = _named(names), _told(since, offsets)
    ids = list(dict.fromkeys((yield from calls.resolve_all(refs))))
    output = _Output()
    for agent_id in ids:
        for name in names:
            begin = yield from _begin(calls, agent_id, name, since, told)
            output.streams[f"{agent_id}.{name}"] = _Stream(agent_id, name, begin)
    hints = Hints(calls, [*output.streams, *(f"status.{id_}" for id_ in ids)], ids, deadline)
    while output.streams:
        yield from _hear(hints, output)
        for agent_id in hints.due():
            output.look(agent_id)
            hints.looked(agent_id)
        yield from output.read(calls)
    while (yield from hints.heard()):
        pass


def _named(names: Sequence[str]) -> Sequence[str]:
    """Return the names of streams; one alone may be given as it is. A wrong one would be followed for ever."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in STREAMS:
            raise RequestError(f"there is no stream {name!r}; there are {' and '.join(STREAMS)}")
    return names


def _told(since: Since, offsets: Mapping[Any, int]) -> Mapping[Any, int]:
    """Return the offsets that the caller gave, checked: what is ignored in silence begins elsewhere than was meant."""
    if not (since is None or isinstance(since, (str, Mapping)) or hasattr(since, "timestamp")):
        raise RequestError(f"since is {since!r}; give a time (RFC 3339 text, or a datetime), or an offset by stream, "
                           "as {'stdout': 0}")
    told = {**since, **offsets} if isinstance(since, Mapping) else offsets
    for key, offset in told.items():
        if (key[-1] if isinstance(key, tuple) and len(key) == 2 else key) not in STREAMS:
            raise RequestError(f"an offset is given for {key!r}; give the name of a stream, or "
                               "a pair of agent id and name")
        if not isinstance(offset, int) or offset < 0:
            raise RequestError(f"the offset for {key!r} is {offset!r}; give a whole number, 0 or more")
    return told


def _begin(calls: Calls, agent_id: str, name: str, since: Since, told: Mapping[Any, int]) -> Talk[int]:
    """Return the offset from which a stream is to be followed."""
    offset = told.get((agent_id, name), told.get(name))
    if offset is not None or since is None or isinstance(since, Mapping):
        return offset or 0
    time = since if isinstance(since, str) else rfc3339(since.timestamp())
    return (yield from calls.read(agent_id, name, None, 1, since=time)).offset


def _hear(hints: Hints, output: _Output) -> Talk[None]:
    """Wait for a hint and follow it; who is behind only takes what is there, and does not wait."""
    event = yield from hints.next(wait=not output.behind)
    for _ in range(_AT_ONCE):
        if event and (yield from output.take(event)):
            hints.look_soon(event["agent_id"])  # it came late, or some before did not come: nor may the last one
        if not (event and output.behind):
            return
        event = yield from hints.next(wait=False)


class _Output:
    """The streams of one follower that have not ended, and which of them are behind: more is there than was told."""

    def __init__(self) -> None:
        self.streams: Dict[str, _Stream] = {}
        self.behind: Dict[str, _Stream] = {}

    def look(self, agent_id: str) -> None:
        """Read an agent's streams, whatever was told."""
        for name in STREAMS:
            self._fall_behind(f"{agent_id}.{name}")

    def _fall_behind(self, topic: str) -> None:
        if topic in self.streams:
            self.behind[topic] = self.streams[topic]

    def take(self, event: Json) -> Talk[bool]:
        """Follow a hint; return whether it came out of turn."""
        if event.get("type") == "status_update":
            return self._compare(event)
        topic = str(event.get("topic"))
        stream = self.streams.get(topic)
        if stream is None:
            return False
        late = yield from stream.take(event)
        if stream.gap:
            self._fall_behind(topic)
        self._drop_if_done(topic)
        return late

    def _compare(self, event: Json) -> bool:
        """Take from an end that all streams have ended; from a heartbeat whether any is further than was pushed."""
        agent_id, spans = str(event.get("agent_id")), (event.get("data") or {}).get("output") or {}
        if _finished(event.get("status")):
            self.look(agent_id)
        late = False
        for name in STREAMS:
            stream = self.streams.get(f"{agent_id}.{name}")
            if stream is not None and stream.lacks(spans.get(name) or {}):
                late = True
                if stream.stuck:
                    self._fall_behind(f"{agent_id}.{name}")
        return late

    def read(self, calls: Calls) -> Talk[None]:
        """Read one piece of each stream that is behind."""
        for topic, stream in list(self.behind.items()):
            if not (yield from stream.read(calls)):
                del self.behind[topic]
            self._drop_if_done(topic)

    def _drop_if_done(self, topic: str) -> None:
        if self.streams[topic].done:
            self.behind.pop(topic, None)
            del self.streams[topic]


def present(calls: Calls, agent_id: str, name: str) -> Talk[None]:
    """Hand on what a stream holds now, as `follow` does."""
    stream = _Stream(agent_id, name, 0)
    while (yield from stream.read(calls)):
        pass


# ---------------------------------------------------------------- events

def follow_events(calls: Calls, since: Optional[int], agent: Optional[str]) -> Talk[None]:
    """See `AgentClient.follow_events`."""
    agent_id: str = (yield from calls.resolve(agent)) if agent else SERVER
    topics = [f"status.{agent_id}"] if agent_id else ["status.", "server"]
    hints = Hints(calls, topics, [agent_id], float("inf"))
    yield from hints.next()  # to know from when on
    last = since if since is not None else hints.sequence if hints.sequence is not None else (yield from _latest(calls))
    while True:
        if hints.due():
            last = yield from _stored(calls, last, agent_id)
            hints.looked(agent_id)
        hint = yield from hints.next()
        if hint and _latest_of(hint, agent_id) > last:
            if hint["sequence"] == last + 1 and _is_stored(hint):
                last += 1
                yield Item(hint)
            else:
                hints.look_now(agent_id)


def _stored(calls: Calls, since: int, agent_id: str) -> Talk[int]:
    """Hand on what is stored after `since`, page by page; return the last number."""
    while True:
        page = yield from calls.events(since, 1000, agent_id or None)
        if page.first_kept > since + 1:
            yield Item(EventsDropped(since + 1, page.first_kept - 1))
        for event in page.events:
            yield Item(event)
        since = max(page.next, page.first_kept - 1)
        if not (page.more and page.events):
            return since


def _latest_of(hint: Json, agent_id: str) -> int:
    """Return the number of the newest event that a hint tells of: of one agent's, or of all."""
    if not agent_id or _is_stored(hint):
        return int(hint.get("sequence") or 0)
    return int((hint.get("data") or {}).get("last_event") or 0)  # the sequence of a heartbeat is the server's


def _is_stored(hint: Json) -> bool:
    return hint.get("type") == "status_update" and hint.get("update_type") in _STORED


def _latest(calls: Calls) -> Talk[int]:
    """Return the sequence of the newest event, where no subscription told it."""
    last = (yield from calls.events(MAX_INT, 1, None)).next
    if last < MAX_INT:
        return last
    page = yield from calls.events(0, 10_000, None)
    while page.events:
        last = page.next
        page = yield from calls.events(last, 10_000, None)
    return page.next
