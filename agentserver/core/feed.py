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
from typing import Callable, Iterable, Protocol

from ..wire import Json, encode, rfc3339, wire_text
from .registry import Registry

REPLAY_MOST = 10_000  # events; who needs more pages through events_request


class Subscriber(Protocol):
    """A connection that asked for topics (prefixes)."""

    topics: tuple[str, ...]

    def push(self, topic: bytes, body: bytes) -> None:
        """Send one event, or drop it when too much waits already."""


class Feed:
    """See the module."""

    def __init__(self, registry: Registry, now: Callable[[], float] = time.time) -> None:
        self._registry, self._now = registry, now
        self._subscribers: list[Subscriber] = []
        self._routes: dict[str, tuple[Subscriber, ...]] = {}
        self._waiting: list[tuple[str, bytes]] = []

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

    # ------------------------------------------------------------ what is told

    def agent_event(self, agent_id: str, update_type: str, status: str, message: str, data: Json | None = None) -> None:
        """Store and publish a change of one agent."""
        at = self._now()
        self._store(at, agent_id, f"status.{agent_id}", {
            "type": "status_update", "topic": f"status.{agent_id}", "agent_id": agent_id, "update_type": update_type,
            "status": status, "message": message, "data": data or {}, "timestamp": rfc3339(at)})

    def server_event(self, server_id: str, state: str, active: int) -> None:
        """Store and publish a change of the server's own state."""
        at = self._now()
        self._store(at, None, "server", self._server_update("status_changed", server_id, state, active, at))

    def _store(self, at: float, agent_id: str | None, topic: str, message: Json) -> None:
        text = self._registry.add_event(at, agent_id, message)
        if self.wanted(topic):
            self._waiting.append((topic, text.encode("ascii")))

    def heartbeat(self, agent_id: str, update_type: str, status: str, output: Json) -> None:
        """Hint that an agent is there (`heartbeat`) or has written something (`output_available`), and how far."""
        topic = f"status.{agent_id}"
        if self.wanted(topic):
            self._hint(topic, {
                "type": "status_update", "topic": topic, "agent_id": agent_id, "update_type": update_type,
                "status": status, "message": "", "data": {"output": output}, "timestamp": rfc3339(self._now()),
                "sequence": self._registry.sequence})

    def server_heartbeat(self, server_id: str, state: str, active: int, only: Subscriber | None = None) -> None:
        """Hint that the server is there; with `only`, tell one new subscriber which event is the latest."""
        if only is None and not self.wanted("server"):
            return
        message = self._server_update("heartbeat", server_id, state, active, self._now())
        message["sequence"] = self._registry.sequence
        if only is None:
            self._hint("server", message)
        else:
            only.push(b"server", encode(message))

    def _server_update(self, update_type: str, server_id: str, state: str, active: int, at: float) -> Json:
        return {"type": "server_update", "topic": "server", "update_type": update_type, "server_id": server_id,
                "state": state, "active_agents": active, "timestamp": rfc3339(at)}

    def _hint(self, topic: str, message: Json) -> None:
        self._waiting.append((topic, encode(message)))

    def output(self, agent_id: str, stream: str, data: bytes, offset: int, eof: bool,
               only: Subscriber | None = None) -> None:
        """Publish bytes of a stream; with `only`, tell one new subscriber where the stream stands."""
        topic = f"{agent_id}.{stream}"
        text, encoding = wire_text(data)
        body = encode({
            "type": "log_stream", "topic": topic, "agent_id": agent_id, "stream_type": stream, "data": text,
            "encoding": encoding, "timestamp": rfc3339(self._now()), "offset": offset,
            "next_offset": offset + len(data), "eof": eof, "sequence": self._registry.sequence})
        if only is not None:
            only.push(topic.encode(), body)
        else:
            self._waiting.append((topic, body))

    def replay(self, subscriber: Subscriber, since: int) -> None:
        """Send a subscriber the stored events of its topics after `since`, up to `REPLAY_MOST` of them."""
        for text in self._registry.events(since, REPLAY_MOST):
            topic = text.partition('"topic":"')[2].partition('"')[0]
            if topic.startswith(subscriber.topics):
                subscriber.push(topic.encode(), text.encode("ascii"))

    def flush(self) -> None:
        """Push what this turn produced; the service calls it after the commit."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for topic, body in waiting:
                for subscriber in self.wanted(topic):
                    subscriber.push(topic.encode(), body)


