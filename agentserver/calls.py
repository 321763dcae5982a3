"""What can be asked of a server: one conversation for each request, with its retries and the type of its result.

Owns:    the request ids, asking again until a deadline, failed replies as errors, results as typed objects.
Runs in: a client; it waits for nothing itself (talk.py).
Unaware: of links, sockets and event loops, and of how output and events are followed (follow.py).

Every request carries a `request_id`, and the same id on every try, so that asking again never does a thing twice.
"""
from __future__ import annotations

import json
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol, Sequence, TypeVar, Union

from .core.link import NotThere
from .errors import LinkError, RequestError, RequestTimeout
from .messages import AgentConfig
from .results import AgentInfo, BatchOutcome, Chunk, EventsPage, FoundLines, Health, LastLines, ServerStats
from .talk import Ask, HangUp, Pause, Talk, until
from .wire import encode, new_id, to_wire, wire_text

Json = Dict[str, Any]
T = TypeVar("T")

_FIRST_PATIENCE = 1.0      # seconds for a server that never answered: it may just be starting a part again
_KNOWN_PATIENCE = 10.0     # for one that did
_LONGEST_ATTEMPT = 8.0
_SEARCH_ATTEMPT = 3.0      # a search in output may take a while, and asked again too soon it would be done twice
_SEARCHES = ("output_query_request", "query_output")
_CONFIG_FIELDS = frozenset(AgentConfig.__dataclass_fields__)


class Identified(Protocol):
    """A handle, or what is known of an agent: it has its id."""

    @property
    def id(self) -> str:
        """The agent's id."""


Ref = Union[str, Identified]
Refs = Union[Ref, Sequence[Ref]]


def _id_of(ref: Ref) -> str:
    return str(getattr(ref, "id", ref))


class Calls:
    """The conversations of one client, and what it knows of its server.

    `attempt_secs` is the link's: after so long without a reply a request is better sent again.
    """

    def __init__(self, address: str, timeout: float, retry_secs: Optional[float], attempt_secs: float,
                 deadline: Optional[float] = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.address, self.timeout, self.retry_secs, self.clock = address, timeout, retry_secs, clock
        self.deadline = float("inf") if deadline is None else deadline
        self._attempt_secs = attempt_secs
        self._met = False
        #: ends that were pushed to this client, by agent: to be believed where the server has gone since (follow.py)
        self.ends: Dict[str, AgentInfo] = {}

    def bounded(self, talk: Talk[T]) -> Talk[T]:
        """Return a conversation that is over at this client's deadline."""
        if self.deadline == float("inf"):
            return talk
        return until(talk, self.deadline, self.clock,
                     lambda: f"the time given was over before {self.address} had answered")

    # ------------------------------------------------------------ one request

    def request(self, message: Json, timeout: Optional[float] = None, patience: Optional[float] = None) -> Talk[Json]:
        """See `AgentClient.request`. `patience` seconds, if given, are how long an absent server is tried again."""
        request_id = message.get("request_id")
        if not request_id:
            request_id = new_id()
            message = dict(message, request_id=request_id)
        search = message.get("type") in _SEARCHES or message.get("command_type") in _SEARCHES
        raw = yield from self._ask(encode(message), str(request_id), self.timeout if timeout is None else timeout,
                                   patience, _SEARCH_ATTEMPT if search else 0.0)
        try:
            reply = json.loads(raw)
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or reply.get("request_id") not in (None, request_id):
            yield HangUp()
            raise LinkError(f"{self.address} sent something else than the reply; is it an agentserver?")
        if reply.get("success", True) is False:
            raise RequestError(str(reply.get("error") or "the request failed"),
                               str(reply.get("error_code") or "internal"), reply)
        return reply

    def _ask(self, raw: bytes, request_id: str, timeout: float, patience: Optional[float],
             least_attempt: float) -> Talk[bytes]:
        """Ask until there is an answer; the same bytes each time."""
        started = self.clock()
        lost_at: Optional[float] = None
        there = False  # somebody was, in vain
        attempt, left = max(self._attempt_secs, least_attempt), timeout
        while left > 0:
            try:
                reply: bytes = yield Ask(raw, request_id, min(left, attempt), left)
                self._met = True
                return reply
            except RequestTimeout:
                lost_at, there = None, True
                attempt = min(attempt * 2, max(attempt, _LONGEST_ATTEMPT))
            except LinkError as e:
                lost_at = lost_at or self.clock()
                absent, there = self.clock() - lost_at, there or not isinstance(e, NotThere)
                if absent >= min(self._patience(there) if patience is None else patience, left):
                    raise
                yield Pause(0.02 if absent < 0.5 else 0.2)
            left = started + timeout - self.clock()
        raise RequestTimeout(f"{self.address} did not answer within {timeout:g} s; asking again with the same "
                             "request_id is safe")

    def _patience(self, there: bool) -> float:
        if self.retry_secs is not None:
            return self.retry_secs
        if self._met:
            return _KNOWN_PATIENCE
        return _FIRST_PATIENCE if there else 0.0

    # ------------------------------------------------------------ the server

    def health(self, timeout: Optional[float] = None, patience: Optional[float] = None) -> Talk[Health]:
        """See `AgentClient.health`."""
        return Health.of((yield from self.request({"type": "health_check_request"}, timeout, patience)))

    def stats(self) -> Talk[ServerStats]:
        """See `AgentClient.stats`."""
        return ServerStats.of((yield from self.request({"type": "stats_request"})).get("stats"))

    def shutdown(self, drain: bool, grace_secs: Optional[float]) -> Talk[Json]:
        """See `AgentClient.shutdown`."""
        message: Json = {"type": "shutdown_request", "mode": "drain" if drain else "graceful"}
        if grace_secs is not None:
            message["grace_secs"] = grace_secs
        reply = yield from self.request(message)
        self._met = False  # it is not coming back
        return reply

    def reload(self) -> Talk[Json]:
        """See `AgentClient.reload`."""
        return (yield from self.request({"type": "reload_request"}))

    # ------------------------------------------------------------ agents

    def spawn(self, command: Optional[Sequence[str]], metadata: Optional[Json], timeout_secs: Optional[float],
              request_id: Optional[str], config: Json) -> Talk[str]:
        """See `AgentClient.spawn`; returns the agent's id."""
        unknown = sorted(set(config) - _CONFIG_FIELDS)
        if unknown:
            raise TypeError(f"an agent has no setting {', '.join(unknown)}; "
                            f"there are: {', '.join(sorted(_CONFIG_FIELDS))}")
        if command is not None:
            config["command"] = [command] if isinstance(command, str) else list(command)
        message: Json = {"type": "spawn_request", "config": {
            name: to_wire(value) if hasattr(type(value), "__dataclass_fields__") else value
            for name, value in config.items() if value is not None}}
        message.update({name: value for name, value in (
            ("metadata", metadata), ("timeout_secs", timeout_secs), ("request_id", request_id)) if value is not None})
        reply = yield from self.request(message, max(self.timeout, (timeout_secs or 0.0) + 5.0))
        return str(reply["agent_info"]["id"])

    def list(self, status: Optional[str], all: bool, labels: Optional[Mapping[str, str]], limit: Optional[int],
             offset: int) -> Talk[List[AgentInfo]]:
        """See `AgentClient.list`."""
        message: Json = {"type": "list_agents_request", "all": all, "filter_status": status,
                         "labels": dict(labels) if labels else None}
        return [AgentInfo.of(item) for item in (yield from self._listed(message, offset, limit))]

    def _listed(self, message: Json, offset: int, limit: Optional[int]) -> Talk[List[Json]]:
        """Ask for a part of the list; for a half at a time where the reply would be too long."""
        try:
            found: List[Json] = (yield from self.request({
                **message, "offset": offset, "limit": limit})).get("agents", [])
            return found
        except RequestError as e:
            if e.code != "message_too_large" or limit == 1:
                raise
        if limit is None:
            first = yield from self.request({**message, "offset": offset, "limit": 1})
            limit = int(first["total"]) - offset
        half = max(limit // 2, 1)
        found = yield from self._listed(message, offset, half)
        return found + (yield from self._listed(message, offset + half, max(limit - half, 1)))

    def resolve(self, ref: str) -> Talk[str]:
        """See `AgentClient.resolve`."""
        return str((yield from self.command(ref, "get_status", {}))["agent_id"])

    def resolve_all(self, refs: Any) -> Talk[List[str]]:
        """Return the ids that are meant by one or several ids, names, prefixes or handles."""
        ids: List[str] = []
        for ref in [refs] if isinstance(refs, str) or hasattr(refs, "id") else list(refs):
            known = not isinstance(ref, str) or ref in self.ends
            ids.append(_id_of(ref) if known else (yield from self.resolve(str(ref))))
        return ids

    def command(self, ref: str, command: str, payload: Json, patience: Optional[float] = None) -> Talk[Json]:
        """See `AgentClient.command`."""
        return (yield from self.request({
            "type": "control_command", "agent_id": ref, "command_type": command,
            "payload": {name: value for name, value in payload.items() if value is not None}}, patience=patience))

    def control(self, ref: str, command: str, payload: Optional[Json] = None,
                patience: Optional[float] = None) -> Talk[Json]:
        """See `AgentClient.control`."""
        return (yield from self.command(ref, command, payload or {}, patience)).get("data") or {}

    def custom_action(self, ref: str, action: str, params: Any) -> Talk[Json]:
        """See `AgentClient.custom_action`."""
        message: Json = {"type": "custom_action_request", "agent_id": ref, "action": action}
        if params is not None:
            message["params"] = params
        return (yield from self.request(message)).get("data") or {}

    def query(self, ref: str, pattern: Optional[str], stream: str, limit: int, offset: int,
              tail: bool) -> Talk[FoundLines]:
        """See `AgentClient.query`."""
        return FoundLines.of((yield from self.request({
            "type": "output_query_request", "agent_id": ref, "stream": stream, "filter": pattern, "limit": limit,
            "offset": offset, "tail": tail})))

    def tail(self, agent_id: str, lines: int) -> Talk[LastLines]:
        """See `Agent.tail`."""
        return LastLines.of((yield from self.control(agent_id, "query_output", {"max_lines": lines})))

    def batch(self, command: str, agents: Optional[Sequence[Ref]], labels: Optional[Mapping[str, str]],
              fail_fast: bool, payload: Json) -> Talk[BatchOutcome]:
        """See `AgentClient.batch`."""
        message: Json = {"type": "batch_control_command", "command_type": command, "fail_fast": fail_fast,
                         "payload": {name: value for name, value in payload.items() if value is not None}}
        if agents is not None:
            message["agent_ids"] = [agents] if isinstance(agents, str) else [_id_of(agent) for agent in agents]
        if labels is not None:
            message["labels"] = dict(labels)
        try:
            return BatchOutcome.of((yield from self.request(message)))
        except RequestError as e:
            if e.reply is None or not isinstance(e.reply.get("results"), list):
                raise
            return BatchOutcome.of(e.reply)

    def events(self, since: int, limit: int, agent: Optional[str]) -> Talk[EventsPage]:
        """See `AgentClient.events`."""
        message: Json = {"type": "events_request", "since": since, "limit": limit}
        if agent is not None:
            message["agent_id"] = agent
        reply = yield from self.request(message)
        return EventsPage(reply.get("events") or [], int(reply.get("next") or since),
                          int(reply.get("first_kept") or 0), bool(reply.get("more")))

    # ------------------------------------------------------------ one agent

    def status(self, agent_id: str) -> Talk[str]:
        """See `Agent.status`."""
        return str((yield from self.command(agent_id, "get_status", {}))["status"])

    def info(self, agent_id: str, patience: Optional[float] = None) -> Talk[AgentInfo]:
        """See `Agent.info`."""
        record = yield from self.control(agent_id, "inspect", patience=patience)
        return AgentInfo.of(record.get("agent_info") or record)

    def write(self, agent_id: str, data: Union[str, bytes], eof: bool) -> Talk[int]:
        """See `Agent.write`."""
        text, encoding = wire_text(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        reply = yield from self.control(agent_id, "write_stdin",
                                        {"data": text, "encoding": encoding, "eof": eof or None})
        return int(reply.get("bytes_written") or 0)

    def read(self, agent_id: str, stream: str, offset: Optional[int], max_bytes: int, times: bool = False,
             since: Optional[str] = None) -> Talk[Chunk]:
        """See `Agent.read`; `since` is a time, in place of an offset."""
        return Chunk.of((yield from self.control(agent_id, f"read_{stream}", {
            "offset": offset, "since": since, "max_bytes": max_bytes, "times": times or None})))
