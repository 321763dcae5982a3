"""Following output and events, and waiting for ends: pushed messages are hints, the truth is read.

Owns:    which byte and which event comes next, per stream; when to look without having been told.
Runs in: a client, in the caller's thread; generators hold a listening link of their own until closed.
Unaware: of the kind of link: lost hints, slow joins and a restarted server all look like "read again".
"""
from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from .core.link import Link
from .errors import AgentServerError, LinkError, RequestTimeout
from .messages import MAX_READ
from .results import AgentInfo, Chunk
from .wire import MAX_INT

if TYPE_CHECKING:
    from .client import Agent, AgentClient

Json = Dict[str, Any]
Output = Tuple[str, str, Chunk]

_FIRST_LOOK = 0.05     # a subscription that nobody confirms may take effect late: look again soon, then less often
_BLIND_SECS = 0.5      # how often to look when nothing is pushed at all (publishing off, server away)
_GONE_SECS = 1.0       # how long a server that told of an end and cannot be reached is tried before that is believed
_ENDS_KEPT = 1000
_STORED = frozenset(("status_changed", "error", "completed", "terminated"))


class Hints:
    """Events of some topics. Never fails: where they may be missing, `next` returns `None` early and `doubt` is set."""

    def __init__(self, client: AgentClient, topics: Sequence[str], deadline: float) -> None:
        self._client = client
        self._topics = list(topics)
        self._deadline = deadline
        self._link: Link = client.open_link()
        self._listening = False
        #: the newest event when listening began, where the server says so
        self.sequence: Optional[int] = None
        self._look_after = _FIRST_LOOK
        self._look_at = 0.0
        self.doubt = True      # the truth has to be read before hints can be trusted
        self._listen()

    def _listen(self) -> None:
        try:
            reply = self._link.subscribe(self._topics)
            self.sequence = reply.get("sequence")
            self._listening = True
            self._look_after = self._link.recheck_secs if reply else _FIRST_LOOK
        except AgentServerError:
            self._listening = False

    def looked(self) -> None:
        """Note that the truth was read: until told otherwise, hints are trusted for a while."""
        self.doubt = False
        after = self._look_after if self._listening else _BLIND_SECS
        self._look_after = min(self._look_after * 3, self._link.recheck_secs)
        self._look_at = time.monotonic() + after

    def look_soon(self) -> None:
        """Look again in a moment, then less often: a server drops hints for whom they come too fast."""
        self._look_after = _FIRST_LOOK
        self._look_at = min(self._look_at, time.monotonic() + _FIRST_LOOK)

    def next(self) -> Optional[Json]:
        """Return the next event; `None` when it is time to look. Raise `RequestTimeout` at the caller's deadline."""
        now = time.monotonic()
        if now >= self._deadline:
            raise RequestTimeout("it was not over within the time given")
        left = min(self._look_at, self._deadline) - now
        if self._listening:
            try:
                event = self._link.next_event(max(left, 0.0))
            except AgentServerError:
                self._listening = False
                self.doubt = True
                return None
            self.doubt = event is None
            if event:
                _note_end(self._client.ends, event)
            return event
        time.sleep(max(left, 0.0))
        self._listen()
        self.doubt = True
        return None

    def drain(self) -> None:
        """Hear what has come already: an end that was told with the last output."""
        self._look_at, self._deadline = 0.0, float("inf")
        while self._listening and self.next():
            pass

    def close(self) -> None:
        """Stop listening."""
        self._link.close()


def _note_end(ends: Dict[str, AgentInfo], event: Json) -> None:
    """Keep what was told of an agent's end, until it is told that the agent was started again."""
    agent_id, data = event.get("agent_id"), event.get("data")
    if event.get("type") != "status_update" or not agent_id:
        return
    ends.pop(agent_id, None)
    info = AgentInfo.of({"id": agent_id, "status": event.get("status"), "finished_at": event.get("timestamp"),
                         "exit": data.get("exit") if isinstance(data, dict) else None})
    if info.finished and info.exit:
        ends[agent_id] = info
        if len(ends) > _ENDS_KEPT:
            del ends[next(iter(ends))]


class _Truth:
    """What an agent is: asked for; but where the server told of its end and has gone since, that is believed."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client
        self._second = client.second(_GONE_SECS)
        self._gone = False

    def status(self, agent_id: str) -> str:
        """Return an agent's status."""
        if agent_id in self._client.ends:
            return self.info(agent_id).status
        return str(self._client.command(agent_id, "get_status")["status"])

    def info(self, agent_id: str) -> AgentInfo:
        """Return an agent as the server lists it, or the little that was told."""
        told = self._client.ends.get(agent_id)
        if told is None:
            return self._client.agent(agent_id).info()
        if not self._gone:
            try:
                return self._second.agent(agent_id).info()
            except (LinkError, RequestTimeout):
                self._gone = True
        return told

    def close(self) -> None:
        """Let go of the connection."""
        self._second.close()


def _deadline(timeout: Optional[float]) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _resolve(client: AgentClient, refs: Any) -> List[str]:
    names = [refs] if isinstance(refs, str) or hasattr(refs, "id") else list(refs)
    texts = [str(getattr(name, "id", name)) for name in names]
    return [text if text in client.ends else client.resolve(text) for text in texts]


# ---------------------------------------------------------------- waiting

def wait(client: AgentClient, refs: Any, any_: bool, status: Optional[str],
         timeout: Optional[float]) -> List[AgentInfo]:
    """See `AgentClient.wait`."""
    ids = _resolve(client, refs)
    deadline = _deadline(timeout)
    pending = list(dict.fromkeys(ids))
    truth = _Truth(client)
    hints = Hints(client, [f"status.{id_}" for id_ in pending], deadline)
    try:
        while True:
            if hints.doubt:
                pending = [id_ for id_ in pending if not _reached(truth.status(id_), status)]
                hints.looked()
            if not pending or (any_ and len(pending) < len(set(ids))):
                return [truth.info(id_) for id_ in ids if id_ not in pending]
            event = hints.next()
            if event and event.get("agent_id") in pending and _reached(event.get("status"), status):
                pending.remove(event["agent_id"])
    except RequestTimeout as e:
        raise RequestTimeout(_still(pending, status, timeout) if time.monotonic() >= deadline else str(e)) from None
    finally:
        hints.close()
        truth.close()


def _reached(now: Any, wanted: Optional[str]) -> bool:
    return now == wanted or AgentInfo(status=str(now)).finished


def _still(pending: Sequence[str], status: Optional[str], timeout: Optional[float]) -> str:
    more = f" and {len(pending) - 1} more" if len(pending) > 1 else ""
    return f"after {timeout or 0:g} s agent {pending[0]}{more} " + (
        f"had neither become {status} nor ended" if status else "had not ended")


# ---------------------------------------------------------------- output

class _Stream:
    """Where we are in one stream of one agent."""

    def __init__(self, agent_id: str, name: str, offset: int) -> None:
        self.agent_id = agent_id
        self.name = name
        self.expected = offset
        self.behind = True     # there may be more than was pushed: read
        self.done = False

    def pushed(self, event: Json) -> Optional[Chunk]:
        """Return what of a pushed chunk is new and next; note a gap."""
        chunk = Chunk.of(event)
        if chunk.offset > self.expected:
            self.behind = True
            return None
        if chunk.next_offset < self.expected:
            return None
        self.done = chunk.eof
        fresh = replace(chunk, data=chunk.data[self.expected - chunk.offset:], offset=self.expected)
        self.expected = chunk.next_offset
        return fresh if fresh.data else None

    def read(self, client: AgentClient, most: int = MAX_READ) -> Optional[Chunk]:
        """Return the next chunk by asking, `None` when there is nothing new now."""
        chunk = Chunk.of(client.control(self.agent_id, f"read_{self.name}", offset=self.expected, max_bytes=most))
        self.done = chunk.eof
        self.behind = bool(chunk.data)
        if not chunk.data and not chunk.dropped:
            return None
        self.expected = chunk.next_offset
        return chunk


def follow(client: AgentClient, refs: Any, names: Sequence[str], offsets: Mapping[Any, int],
           timeout: Optional[float]) -> Iterator[Output]:
    """See `AgentClient.follow`."""
    streams = {f"{id_}.{name}": _Stream(id_, name, int(offsets.get((id_, name), offsets.get(name, 0))))
               for id_ in _resolve(client, refs) for name in names}
    ends = [f"status.{id_}" for id_ in dict.fromkeys(stream.agent_id for stream in streams.values())]
    hints = Hints(client, [*streams, *ends], _deadline(timeout))
    try:
        while True:
            yield from _catch_up(client, streams, hints)
            if all(stream.done for stream in streams.values()):
                hints.drain()
                return
            event = hints.next()
            stream = streams.get(str(event.get("topic"))) if event else None
            if event and stream:
                chunk = None if stream.done else stream.pushed(event)
                if chunk:
                    yield stream.agent_id, stream.name, chunk
                elif event.get("data"):
                    hints.look_soon()  # it came late, or some before it did not come: nor may the last one
    finally:
        hints.close()


def _catch_up(client: AgentClient, streams: Dict[str, _Stream], hints: Hints) -> Iterator[Output]:
    """Read what is behind, a chunk of each in turn; all of them when hints may have been lost."""
    if hints.doubt:
        for stream in streams.values():
            stream.behind = not stream.done
        hints.looked()
    while True:
        behind = [stream for stream in streams.values() if stream.behind and not stream.done]
        if not behind:
            return
        for stream in behind:
            chunk = stream.read(client)
            if chunk:
                yield stream.agent_id, stream.name, chunk


def lines(agent: Agent, stream: str, follow_: bool) -> Iterator[str]:
    """See `Agent.lines`: lines are a view of bytes, so what is not UTF-8 is replaced here and only here."""
    rest = b""
    for data in (_followed if follow_ else _present)(agent, stream):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")


def _followed(agent: Agent, stream: str) -> Iterator[bytes]:
    for _id, _name, chunk in agent.client.follow(agent.id, streams=(stream,)):
        yield chunk.data


def _present(agent: Agent, stream: str) -> Iterator[bytes]:
    position = _Stream(agent.id, stream, 0)
    while not position.done:
        chunk = position.read(agent.client)
        if chunk is None:
            return
        yield chunk.data


# ---------------------------------------------------------------- events

def follow_events(client: AgentClient, since: Optional[int], agent: Optional[str]) -> Iterator[Json]:
    """See `AgentClient.follow_events`."""
    agent_id = client.resolve(agent) if agent else None
    hints = Hints(client, [f"status.{agent_id}"] if agent_id else ["status.", "server"], float("inf"))
    try:
        last = since if since is not None else hints.sequence if hints.sequence is not None else _latest(client)
        while True:
            if hints.doubt:
                hints.looked()
                for event in _stored(client, last, agent_id):
                    last = int(event["sequence"])
                    yield event
            hint = hints.next()
            if hint and _tells_more(hint, last, agent_id):
                if hint["sequence"] == last + 1 and _is_stored(hint):
                    last += 1
                    yield hint
                else:
                    hints.doubt = True
    finally:
        hints.close()


def _stored(client: AgentClient, since: int, agent_id: Optional[str]) -> Iterator[Json]:
    """Yield what is stored after `since`, page by page."""
    more = True
    while more:
        page = client.events(since, agent=agent_id)
        yield from page.events
        since, more = page.next, page.more and bool(page.events)


def _tells_more(hint: Json, last: int, agent_id: Optional[str]) -> bool:
    """Whether there are events after `last`. Of one agent's, only a stored one tells: the sequence is the server's."""
    return int(hint.get("sequence") or 0) > last and (agent_id is None or _is_stored(hint))


def _is_stored(hint: Json) -> bool:
    return hint.get("type") == "status_update" and hint.get("update_type") in _STORED


def _latest(client: AgentClient) -> int:
    """Return the sequence of the newest event, where no subscription told it."""
    last = client.events(MAX_INT, limit=1).next
    if last < MAX_INT:
        return last
    page = client.events(0, limit=10_000)
    while page.events:
        last = page.next
        page = client.events(last, limit=10_000)
    return page.next
