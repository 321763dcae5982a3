"""Who listens on one connection, and to what: events are told from replies, and handed to whom they concern.

Owns:    the listeners of a connection, the topics that all of them together need, what each has not looked at yet.
Runs in: a client, in the thread that owns the connection; sans-IO (lines in, events and replies out).
Unaware: of sockets, and of what an event means.

A connection has one list of topics, so who listens beside others asks for theirs, too. Who does not look at
what was told loses it when it becomes too much, and learns that; events are hints, so that is no harm.
"""
from __future__ import annotations

import json
import re
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Sequence, Set, Tuple

from ..wire import encode, new_id

Json = Dict[str, Any]

HEARD_BYTES = 8 * 1024 * 1024   # of events that one listener has not looked at

#: how our core begins every reply, and no event; other lines are parsed to be told apart
_REPLY = re.compile(rb'\{"type":"\w+","request_id":("(?:[^"\\]|\\.)*"|null)[,}]')


def answered(line: bytes) -> Tuple[bool, Optional[str]]:
    """Return whether a line is a reply, and to which `request_id`."""
    head = _REPLY.match(line, 0, 1024)
    if head:
        return True, json.loads(head.group(1))
    value = parsed(line)
    return "topic" not in value, value.get("request_id")


def parsed(line: bytes) -> Json:
    """Return a line as an object, an empty one where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


class Listener:
    """One who listens: its topics (prefixes), and what it was told and has not looked at."""

    __slots__ = ("_heard", "_newest", "missed", "since", "topics", "unheard")

    def __init__(self, topics: Sequence[str], since: Optional[int]) -> None:
        self.topics = tuple(topics)
        self.since = since
        self.missed = False    # it was told more than is kept for it, and has lost that
        self._heard: Deque[Tuple[Json, int]] = deque()   # with the length of each
        self.unheard = 0       # bytes that it has not looked at
        self._newest = since or 0

    def hear(self, event: Json, size: int) -> None:
        """Keep an event that concerns it. Older ones than it knows were repeated for somebody else."""
        if self.missed or not str(event["topic"]).startswith(self.topics):
            return
        if event.get("type") != "log_stream":
            sequence = int(event.get("sequence") or self._newest)
            if sequence < self._newest:
                return
            self._newest = sequence
        self.unheard += size
        self._heard.append((event, size))
        if self.unheard > HEARD_BYTES:
            self._heard.clear()
            self.missed = True

    def next(self) -> Optional[Json]:
        """Return the next event that waits."""
        if not self._heard:
            return None
        event, size = self._heard.popleft()
        self.unheard -= size
        return event


class Audience:
    """All who listen on one connection."""

    def __init__(self) -> None:
        self._listeners: List[Listener] = []
        self._left = False          # somebody has left: fewer topics would do
        self._ours: Set[str] = set()  # requests of our own, whose replies are for nobody

    @property
    def quiet(self) -> bool:
        """Whether only replies can come."""
        return not (self._listeners or self._left or self._ours)

    def join(self, listener: Listener) -> bytes:
        """Add a listener and return the request for it; what others hear already is announced to it, too."""
        others = self._topics()
        self._listeners.append(listener)
        self._left = False
        message: Json = {"type": "subscribe_request", "request_id": new_id(), "topics": self._topics()}
        announce = [topic for topic in listener.topics if topic in others]
        if announce:
            message["announce"] = announce
        if listener.since is not None:
            message["since"] = listener.since
        return encode(message)

    def leave(self, listener: Listener) -> None:
        """Forget a listener."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._left = True

    def fewer(self) -> bytes:
        """Return what is to be sent ahead of the next request, because somebody has left; mostly nothing."""
        if not self._left:
            return b""
        self._left = False
        message = {"type": "subscribe_request", "request_id": new_id(), "topics": self._topics()}
        self._ours.add(str(message["request_id"]))
        return encode(message) + b"\n"

    @property
    def unheard(self) -> int:
        """How many bytes of events the slowest listener has not looked at."""
        return max((listener.unheard for listener in self._listeners), default=0)

    def _topics(self) -> List[str]:
        return list(dict.fromkeys(topic for listener in self._listeners for topic in listener.topics))

    def sort(self, line: bytes) -> Optional[bytes]:
        """Return a line that is a reply to a request of somebody's; take in an event, and return `None`."""
        if self.quiet or (not self._ours and _REPLY.match(line, 0, 1024)):
            return line
        value = parsed(line)
        if "topic" in value:
            for listener in self._listeners:
                listener.hear(value, len(line))
            return None
        if value.get("request_id") in self._ours:
            self._ours.discard(value["request_id"])
            return None
        return line
