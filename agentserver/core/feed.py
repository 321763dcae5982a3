"""What is told to whoever listens: stored events, and hints that arrive fast.

Owns:    the subscribers, their topics, and what waits to be pushed at the end of this turn.
Runs in: the core's thread.
Unaware: of sockets (a subscriber is something with topics and `push`), and of why something happened.

A stored event has a number of the one sequence and is on disk before it is pushed. Output and
heartbeats are hints: a subscriber that cannot keep up loses them, sees the gap in the offsets or
the sequence, and reads the truth. What nobody subscribed to is not produced.
"""
from __future__ import annotations

import time
from typing import Callable, Generator, Iterable, NamedTuple, Protocol, Sequence

from ..wire import Json, decode, encode, encode_text, json_data, rfc3339
from .counters import Counters
from .registry import Registry
from .scheduler import Pace

REPLAY_MOST = 10_000  # events; who needs more pages through events_request
REPLAY_AT_ONCE = 200  # read from the registry in one step

Replaying = Generator[bool, None, bool]


class Subscriber(Protocol):
    """A connection that asked for topics (prefixes)."""

    topics: tuple[str, ...]

    @property
    def room(self) -> bool:
        """Whether it takes output now; what it does not take then is lost to it."""

    def push(self, topic: str, body: bytes, hint: bool = True) -> None:
        """Send one message, or drop it when too much waits already; hints sooner than stored events."""


class _Waiting(NamedTuple):
    topic: str
    body: bytes
    hint: bool


class Feed:
    """See the module. `server_id` and `generation` are what a `server_update` says of the server."""

    def __init__(self, registry: Registry, counters: Counters, server_id: str, generation: int,
                 now: Callable[[], float] = time.time) -> None:
        self._registry, self._counters, self._now = registry, counters, now
        self._server: Json = {"type": "server_update", "topic": "server", "server_id": server_id,
                              "generation": generation}
        self._subscribers: list[Subscriber] = []
        self._routes: dict[str, tuple[Subscriber, ...]] = {}
        self._waiting: list[_Waiting] = []

    # ------------------------------------------------------------ who listens

    def subscribe(self, subscriber: Subscriber, topics: Iterable[str]) -> None:
        """Replace the topics of a subscriber; none at all ends its subscription."""
        subscriber.topics = tuple(dict.fromkeys(topics))
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)
        if subscriber.topics:
            self._subscribers.append(subscriber)
        self._routes.clear()

    @property
    def anyone(self) -> bool:
        """Whether anybody listens to anything."""
        return bool(self._subscribers)

    @property
    def topics(self) -> set[str]:
        """What anybody asked for."""
        return {topic for subscriber in self._subscribers for topic in subscriber.topics}

    def wanted(self, topic: str) -> tuple[Subscriber, ...]:
        """Return who listens to a topic."""
        if not self._subscribers:
            return ()
        route = self._routes.get(topic)
        if route is None:
            if len(self._routes) > 100_000:
                self._routes.clear()
            route = self._routes[topic] = tuple(s for s in self._subscribers if topic.startswith(s.topics))
        return route

    # ------------------------------------------------------------ stored events

    def agent_event(self, agent_id: str, update_type: str, status: str, message: str, data: Json | None = None) -> None:
        """Store and publish a change of one agent."""
        self._store(agent_id, self._status_update(agent_id, update_type, status, message, data or {}))

    def server_event(self, state: str, active: int) -> None:
        """Store and publish a change of the server's own state."""
        self._store(None, self._server_update("status_changed", state, active))

    def _store(self, agent_id: str | None, message: Json) -> None:
        text = self._registry.add_event(self._now(), agent_id, message)
        if text and self.wanted(message["topic"]):
            self._waiting.append(_Waiting(message["topic"], text.encode("ascii"), hint=False))

    def replay(self, subscriber: Subscriber, topics: Sequence[str], since: int, pace: Pace) -> Replaying:
        """Send a subscriber the stored events of these topics after `since`, up to `REPLAY_MOST` of them, in steps, and
        then give it these topics. Return whether it had none meanwhile: events come in their order, so what happens
        between two steps is a part of this."""
        left, prefixes, alone = REPLAY_MOST, tuple(topics), False
        while left:
            page = self._registry.events(since, min(left, REPLAY_AT_ONCE))
            waited = False
            for text in page:
                if pace.over():
                    self.subscribe(subscriber, ())
                    yield True
                    pace.begin()
                    waited = alone = True
                topic = text.partition('"topic":"')[2].partition('"')[0]
                if topic.startswith(prefixes):
                    subscriber.push(topic, text.encode("ascii"), hint=False)
            left -= len(page)
            if len(page) < REPLAY_AT_ONCE and not waited:
                break
            since = int(decode(page[-1].encode())["sequence"]) if page else since
        self.subscribe(subscriber, topics)
        return alone

    # ------------------------------------------------------------ hints

    def heartbeat(self, agent_id: str, update_type: str, status: str, output: Json,
                  only: Subscriber | None = None) -> None:
        """Hint that an agent is known (`heartbeat`) or has written something (`output_available`), how far, and which
        of its events is the latest."""
        if only is not None or self.wanted(f"status.{agent_id}"):
            data = {"output": output, "last_event": self._registry.last_event_of(agent_id)}
            self._hint(self._status_update(agent_id, update_type, status, "", data), only)

    def server_heartbeat(self, state: str, active: int, only: Subscriber | None = None) -> None:
        """Hint that the server is there, and which event is the latest."""
        if only is not None or self.wanted("server"):
            self._hint(self._server_update("heartbeat", state, active), only)

    def _hint(self, message: Json, only: Subscriber | None) -> None:
        topic, body = message["topic"], encode({**message, "sequence": self._registry.sequence})
        if only is None:
            self._waiting.append(_Waiting(topic, body, hint=True))
        else:
            self._push(topic, body, True, (only,))

    def _status_update(self, agent_id: str, update_type: str, status: str, message: str, data: Json) -> Json:
        return {"type": "status_update", "topic": f"status.{agent_id}", "agent_id": agent_id,
                "update_type": update_type, "status": status, "message": message, "data": data,
                "timestamp": rfc3339(self._now())}

    def _server_update(self, update_type: str, state: str, active: int) -> Json:
        return {**self._server, "update_type": update_type, "state": state, "active_agents": active,
                "timestamp": rfc3339(self._now())}

    def output(self, agent_id: str, stream: str, data: bytes, offset: int, eof: bool,
               only: Subscriber | None = None) -> None:
        """Push bytes of a stream; with `only`, tell one subscriber where the stream stands."""
        topic = f"{agent_id}.{stream}"
        text, encoding = json_data(data)
        head = encode_text({
            "type": "log_stream", "topic": topic, "agent_id": agent_id, "stream_type": stream, "encoding": encoding,
            "timestamp": rfc3339(self._now()), "offset": offset, "next_offset": offset + len(data), "eof": eof,
            "sequence": self._registry.sequence})
        self._push(topic, b'%s,"data":%s}' % (head[:-1].encode("ascii"), text), True,
                   self.wanted(topic) if only is None else (only,))

    # ------------------------------------------------------------ pushing

    def flush(self, durable: bool) -> None:
        """Push what this turn produced; the service calls it after the commit. What is not on disk is not told."""
        waiting, self._waiting = self._waiting, []
        for topic, body, hint in waiting:
            if hint or durable:
                self._push(topic, body, hint, self.wanted(topic))

    def _push(self, topic: str, body: bytes, hint: bool, listeners: Iterable[Subscriber]) -> None:
        self._counters.add("messages_pushed")
        for subscriber in listeners:
            subscriber.push(topic, body, hint)
