"""From a request to its reply: decode, dispatch, do once, encode.

Owns:    the door. `handle` always answers and never raises, whatever it is given.
Runs in: the core's thread; nothing here waits.
Unaware: of sockets and framing; `peer` says who asks and, on local links, whom to push events to.

A request that does something is done once: its reply is remembered with a digest of its content,
under its `request_id`, in the same transaction as the deed. Refusals that changed nothing are not.
"""
from __future__ import annotations

import hashlib
import traceback
from types import GeneratorType
from typing import Any, Callable, Generator, NamedTuple, Union

from .. import messages as m
from ..errors import AgentServerError, RequestError
from ..wire import MAX_INT, MAX_VALUES, Json, canonical, decode, encode, encode_text, glimpse, read, too_many
from . import lifecycle
from .batch import Batch, Work
from .commands import EFFECTS, Commands, Encoded
from .facts import Facts
from .feed import Subscriber
from .patience import Patience
from .pending import Deed, Pending
from .queries import Queries
from .registry import Ask
from .run import STREAMS
from .scheduler import Pace
from .supervisor import Supervisor

HEAD_BYTES = 1024  # of a reply, beside its list
LARGE_BYTES = 64 * 1024  # a longer message is parsed, checked and done in three steps
EVENTS_AT_ONCE = 200     # read from the registry in one step
QUERY = "query_output"  # the one command whose reply comes later


class Peer(NamedTuple):
    """Who asks. `subscriber` is set on links that can be sent events; `turn` is whose turns the work takes."""

    name: str
    subscriber: Subscriber | None = None
    turn: str = ""


class Done(NamedTuple):
    """A reply that is encoded already, whether anything was done that must not be done again, and the agent as long as
    which that is remembered."""

    reply: bytes
    changed: bool = False
    agent_id: str | None = None


#: makes a reply, or a promise of one; each step yields whether the rest may be left undone when nobody waits for it
Steps = Generator[bool, None, Union[bytes, Pending]]
#: the same for what a handler returns
Result = Union[Json, Done]
Making = Generator[bool, None, Result]


class _Doing:
    """A request with an effect while it is at work in steps, and those who asked the same meanwhile."""

    __slots__ = ("digest", "message", "others")

    def __init__(self, message: Json, digest: bytes) -> None:
        self.message, self.digest = message, digest
        self.others: list[Pending] = []


class Control:
    """See the module. `stats` returns the counters and what our processes use."""

    def __init__(self, supervisor: Supervisor, queries: Queries, facts: Facts, stats: Callable[[], Json],
                 on_shutdown: Callable[[m.ShutdownRequest, Ask], None], on_reload: Callable[[], None],
                 patience: Patience, limit: int, say: Callable[[str], None]) -> None:
        self._supervisor, self._queries, self._facts, self._stats = supervisor, queries, facts, stats
        self._on_shutdown, self._on_reload, self._limit, self._say = on_shutdown, on_reload, limit, say
        self._registry, self._feed, self._count = supervisor.registry, supervisor.feed, supervisor.counters.add
        self._commands = Commands(supervisor, facts)
        self._patience = patience
        self._clock = supervisor.reactor.clock
        self._doing: dict[str, _Doing] = {}  # by request id
        self._handlers: dict[str, Callable[[Any, Ask, Peer], Result | Making]] = {
            "health_check_request": self._health, "stats_request": self._statistics,
            "spawn_request": self._spawn, "list_agents_request": self._list,
            "control_command": self._command, "custom_action_request": self._custom_action,
            "batch_control_command": self._batch, "events_request": self._events,
            "subscribe_request": self._subscribe, "shutdown_request": self._shutdown,
            "reload_request": self._reload}

    # ------------------------------------------------------------ the door

    def handle(self, raw: bytes | None, peer: Peer, again: Json | None = None) -> Steps:
        """Make the reply to one message, or a promise of it, in steps; `None` stands for a message that was too long to
        be kept. `again`: it was read before, and had to wait."""
        reply_type, request_id, obj, size = "error_response", None, again, 0
        try:
            if again is None:
                self._count("requests")
            obj, refusal = self._opened(raw) if again is None else (again, None)
            size, raw = len(raw or b""), None
            cls = m.REQUESTS.get(obj["type"]) if isinstance(obj.get("type"), str) else None
            if cls is not None:
                reply_type = cls.reply
            request_id = _readable_id(obj)
            if refusal is not None:
                raise refusal
            if cls is None:
                raise _unknown_type(obj)
            if request_id is None:
                m.read_request_id(obj)
            if size > LARGE_BYTES:
                yield False
            request = read(cls, obj)
            if size > LARGE_BYTES:
                yield False
            reply = yield from self._answer(request, obj, peer)
            if isinstance(reply, Pending):
                return reply
        except AgentServerError as e:
            promise = self._later(e, obj, request_id, peer, size)
            if promise is not None:
                return promise
            reply = _failure(reply_type, request_id, str(e), e.code)
        except OSError as e:  # of the output files: out of descriptors, a disk that cannot be read
            reply = _failure(reply_type, request_id, f"the server's disk or descriptors failed: {e.strerror}",
                             "unavailable")
        except Exception:
            self._say("a request failed inside: " + traceback.format_exc())
            reply = _failure(reply_type, request_id, "something failed inside the server; its core.log says what",
                             "internal")
        reply = self._checked(reply, reply_type, request_id, obj)
        self._tell_others(request_id, obj, reply)
        return self._supervisor.standstill.hold(reply)

    def _opened(self, raw: bytes | None) -> tuple[Json, RequestError | None]:
        """Return a message; or of one that has too many values only what it is, and why it is refused."""
        if raw is None:
            raise RequestError(f"the message has more than {self._limit} bytes; send less at once", "message_too_large")
        if len(raw) > self._limit or not too_many(raw):
            return decode(raw, self._limit), None
        return {name: glimpse(raw, name) for name in ("type", "request_id")}, RequestError(
            f"the message has more than {MAX_VALUES} values (items of lists and members of objects); send less at "
            "once, and bytes as text or base64")

    def _later(self, e: AgentServerError, obj: Json | None, request_id: str | None, peer: Peer,
               size: int) -> Pending | None:
        """Promise the reply to a request that was refused, with nothing done, for a lock that may go in a moment."""
        doing = self._doing.get(request_id or "")
        if e.code != "unavailable" or obj is None or doing is None or doing.message is not obj or doing.others:
            return None
        promise = self._patience.wait(lambda: self.handle(None, peer, obj), size)
        if promise is not None:
            del self._doing[request_id or ""]
        return promise

    def _tell_others(self, request_id: str | None, obj: Json | None, reply: bytes) -> None:
        """Give the reply to those, too, who asked the same while it was being made."""
        doing = self._doing.get(request_id or "")
        if doing is not None and doing.message is obj:
            del self._doing[request_id or ""]
            for promise in doing.others:
                promise.complete(reply)

    def _checked(self, reply: bytes, reply_type: str, request_id: str | None, obj: Json | None) -> bytes:
        """Return a reply that can be sent, and count it if it is a failed one."""
        if len(reply) > self._limit:
            short = _failure(reply_type, request_id, f"the reply would have {len(reply)} bytes and at most "
                             f"{self._limit} are allowed; ask for less at once", "message_too_large")
            reply = Deed(short) if isinstance(reply, Deed) else short
        if b'"success":false' in reply[:1024]:
            self._failed(obj)
        return reply

    def _failed(self, obj: Json | None) -> None:
        self._count("errors")
        if obj is not None and obj.get("type") == "spawn_request":
            self._count("failed_spawns")

    def _answer(self, request: Any, obj: Json, peer: Peer) -> Steps:
        """Do what is asked, or say what is asked for."""
        if _has_effect(request):
            ask = Ask(peer.name, obj["request_id"], hashlib.sha256(canonical(obj)).digest())
            return (yield from self._once(request, obj, ask, peer))
        if _asks_for_lines(request):
            return self._query(request, obj["request_id"], peer.turn)
        ask = Ask(peer.name, obj["request_id"])
        result = self._handlers[request.type](request, ask, peer)
        if type(result) is GeneratorType:
            result = yield from result
        return self._encoded(request, ask, result)

    def _once(self, request: Any, obj: Json, ask: Ask, peer: Peer) -> Steps:
        """Do what is asked, or repeat the reply if it was done."""
        doing = self._doing.get(ask.request_id)
        if doing is not None:
            return self._join(doing, ask)
        before = self._registry.recall(ask.request_id)
        if before is not None:
            _same(before.digest, ask)
            if before.reply is not None:
                return before.reply if before.durable else Deed(before.reply)
            ask = ask._replace(begun=before.begun)
        self._registry.check_room()
        self._doing[ask.request_id] = _Doing(obj, ask.digest)
        try:
            result = self._handlers[request.type](request, ask, peer)
            if type(result) is GeneratorType:
                result = yield from result
            reply = self._encoded(request, ask, result)
        except Exception:
            self._registry.settle(ask.request_id)
            raise
        if isinstance(result, Done) and not result.changed:
            self._registry.settle(ask.request_id)
            return reply
        self._registry.remember(ask, reply, result.agent_id if isinstance(result, Done) else None)
        return Deed(reply)

    @staticmethod
    def _join(doing: _Doing, ask: Ask) -> Pending:
        """Promise the reply to a request that is at work already, asked by somebody whose connection broke."""
        _same(doing.digest, ask)
        promise = Pending(lambda: None)
        doing.others.append(promise)
        return promise

    @staticmethod
    def _encoded(request: Any, ask: Ask, result: Any) -> bytes:
        if isinstance(result, Done):
            return result.reply
        return encode({"type": request.reply, "request_id": ask.request_id, "success": True, **result})

    # ------------------------------------------------------------ one request each

    def _health(self, request: m.HealthCheckRequest, ask: Ask, peer: Peer) -> Done:
        """Answer the request that is asked most from pieces that hardly change."""
        self._count("health_checks")
        supervisor = self._supervisor
        return Done(
            b'{"type":"health_check_response","request_id":%s,"success":true,"healthy":%s,"protocol_version":"%s",'
            b'"uptime_secs":%.6f,"active_agents":%d,"metadata":%s}' % (
                encode_text(ask.request_id).encode("ascii"), b"true" if supervisor.state == "up" else b"false",
                m.PROTOCOL_VERSION.encode("ascii"), self._facts.uptime(), supervisor.active,
                self._facts.metadata_json()))

    def _statistics(self, request: m.StatsRequest, ask: Ask, peer: Peer) -> Json:
        return {"stats": self._stats()}

    def _spawn(self, request: m.SpawnRequest, ask: Ask, peer: Peer) -> Done:
        self._count("spawn_requests")
        begun = [self._supervisor.agents[agent_id] for agent_id in ask.begun if agent_id in self._supervisor.agents]
        agent = begun[0] if begun else self._supervisor.spawn(request.config, request.metadata, ask)
        self._count("successful_spawns")
        head = {"type": request.reply, "request_id": ask.request_id, "success": True,
                "server_id": self._supervisor.config.server_id}
        return Done(b'%s,"agent_info":%s}' % (encode(head)[:-1], agent.info_json().encode("ascii")), True, agent.id)

    def _list(self, request: m.ListAgentsRequest, ask: Ask, peer: Peer) -> Making:
        self._count("list_requests")
        wanted = request.filter_status
        every = request.all or wanted in lifecycle.TERMINAL
        labels, known = request.labels.items(), self._supervisor.agents
        end = MAX_INT if request.limit is None else request.offset + request.limit
        listed, total, room, pace = [], 0, self._limit - HEAD_BYTES, Pace(self._clock)
        for agent in list(known.values()):
            if pace.over():
                yield True
                pace.begin()
            if (agent.id in known and (every or not agent.terminal) and (wanted is None or agent.status == wanted)
                    and (not labels or labels <= agent.labels.items())):
                if request.offset <= total < end:
                    listed.append(agent.info_json())
                    room -= len(listed[-1]) + 1
                    if room < 0:
                        raise RequestError(f"the list would have more than {self._limit} bytes; ask for less at "
                                           "once, by limit and offset", "message_too_large")
                total += 1
        head = {"type": request.reply, "request_id": ask.request_id, "success": True, "total": total}
        return Done(_with_list(head, "agents", listed))

    def _command(self, request: m.ControlCommand, ask: Ask, peer: Peer) -> Result:
        self._count("control_commands")
        agent = self._supervisor.find(request.agent_id)
        data = self._commands.run(agent, request.command_type, request.payload, ask)
        if isinstance(data, Encoded):
            head = {"type": request.reply, "request_id": ask.request_id, "success": True, "agent_id": agent.id,
                    "status": agent.status}
            return Done(b"".join([encode(head)[:-1], b',"data":', *data.json, b"}"]))
        return {"agent_id": agent.id, "status": agent.status, "data": data}

    def _custom_action(self, request: m.CustomActionRequest, ask: Ask, peer: Peer) -> Json:
        self._count("control_commands")
        agent = self._supervisor.find(request.agent_id)
        data = self._commands.act(agent, request.action, request.params)
        return {"agent_id": agent.id, "status": agent.status, "data": data}

    def _batch(self, request: m.BatchControlCommand, ask: Ask, peer: Peer) -> Making:
        self._count("control_commands")
        if (request.agent_ids is None) == (request.labels is None):
            raise RequestError("give either agent_ids or labels")
        checked = self._commands.check(request.command_type, request.payload)
        if request.command_type == QUERY:
            raise RequestError(f"{QUERY} is answered for one agent at a time; send a control_command for each")
        supervisor = self._supervisor
        work = Work(request.command_type, checked, ask, request.fail_fast, self._limit - HEAD_BYTES)
        batch = Batch(work, supervisor.find, self._commands, self._registry, supervisor.standstill,
                      supervisor.reactor.mistake)
        pace = Pace(self._clock)
        yield from batch.steps(request.agent_ids, lambda: self._labelled(request, pace), pace)
        results, failed = batch.results, batch.failed
        head = {"type": request.reply, "request_id": ask.request_id, "success": not failed,
                "successful": len(results) - len(failed), "failed": len(failed)}
        if failed:
            head.update(error=f"{len(failed)} of {len(results)} failed; see results", error_code=failed[0])
        return Done(_with_list(head, "results", results), changed=len(failed) < len(results))

    def _labelled(self, request: m.BatchControlCommand, pace: Pace) -> Generator[bool, None, list[str]]:
        """Return the agents that labels choose, of those that the command can be meant for."""
        labels, ended = (request.labels or {}).items(), request.command_type == "remove"
        known, found = self._supervisor.agents, []
        for agent in list(known.values()):
            if labels <= agent.labels.items() and agent.terminal == ended and agent.id in known:
                found.append(agent.id)
            if pace.over():
                yield False
                pace.begin()
        return found

    def _query(self, request: Any, request_id: str, by: str) -> Pending:
        """Have the output of an agent searched by a process of its own; its answer becomes the reply."""
        agent = self._supervisor.find(request.agent_id)
        head: Json = {"type": request.reply, "request_id": request_id, "success": True}
        search = isinstance(request, m.OutputQueryRequest)
        if search:
            streams, what = _searched(request)
        else:
            self._count("control_commands")
            streams, what = _shown(self._commands.check(request.command_type, request.payload))

        def answered(result: bytes | RequestError) -> None:
            if agent.id not in self._supervisor.agents:
                result = RequestError(f"{agent.label()} was removed meanwhile", "agent_not_found")
            if isinstance(result, RequestError):
                reply = _failure(request.reply, request_id, str(result), result.code)
            elif search:
                reply = b"%s,%s" % (encode(head)[:-1], result[1:])
            else:
                head.update(agent_id=agent.id, status=agent.status)
                reply = b'%s,"data":%s}' % (encode(head)[:-1], result)
            pending.complete(self._checked(reply, request.reply, request_id, None))
        pending = Pending(self._queries.ask(agent.output, streams, what, by, answered))
        return pending

    def _events(self, request: m.EventsRequest, ask: Ask, peer: Peer) -> Making:
        agent_id = self._agent_of_events(request.agent_id)
        found: list[str] = []
        room, more = self._limit - HEAD_BYTES, False
        page = self._registry.events(request.since, EVENTS_AT_ONCE, agent_id)
        while page and not more:
            for text in page:
                room -= len(text) + 1
                if len(found) == request.limit or (room < 0 and found):  # one at least: whoever asks must come on
                    more = True
                    break
                found.append(text)
            yield True
            page = self._registry.events(_sequence(page[-1]), EVENTS_AT_ONCE, agent_id)
        last = _sequence(found[-1]) if found else min(request.since, self._registry.sequence)
        head = {"type": request.reply, "request_id": ask.request_id, "success": True, "next": last,
                "first_kept": self._registry.first_kept, "more": more}
        reply = _with_list(head, "events", found)
        return Done(Deed(reply) if last > self._registry.sequence else reply)

    def _agent_of_events(self, ref: str | None) -> str | None:
        """Return the agent whose events are asked for; its id does when it is forgotten itself."""
        try:
            return ref and self._supervisor.find(ref).id
        except RequestError:
            if ref is None or not ref.isascii() or not self._registry.has_events_of(ref):
                raise
            return ref

    def _subscribe(self, request: m.SubscribeRequest, ask: Ask, peer: Peer) -> Making:
        if peer.subscriber is None:
            raise RequestError("subscribe_request is for the Unix socket; over ZeroMQ subscribe to the topic on the "
                               "publishing endpoint that health_check_request tells")
        before, pace = frozenset(peer.subscriber.topics), Pace(self._clock)
        if request.since is None:
            self._feed.subscribe(peer.subscriber, request.topics)
        elif (yield from self._feed.replay(peer.subscriber, request.topics, request.since, pace)):
            before = frozenset()  # it may have missed something of them, too
        new = [topic for topic in request.topics if topic not in before]
        yield from self.announce(list(dict.fromkeys([*new, *request.announce])), peer.subscriber)
        return {"topics": list(peer.subscriber.topics), "sequence": self._registry.sequence}

    def announce(self, topics: list[str], subscriber: Subscriber) -> Generator[bool, None, None]:
        """Tell a subscriber where topics stand, in steps."""
        pace = Pace(self._clock)
        for topic in topics:
            self._commands.announce(topic, subscriber)
            if pace.over():
                yield True
                pace.begin()

    def _shutdown(self, request: m.ShutdownRequest, ask: Ask, peer: Peer) -> Json:
        self._on_shutdown(request, ask)
        return {"mode": request.mode, "active_agents": self._supervisor.active, "state": self._supervisor.state}

    def _reload(self, request: m.ReloadRequest, ask: Ask, peer: Peer) -> Json:
        self._on_reload()
        return {"generation": self._facts.generation}


# ---------------------------------------------------------------- pieces of replies

def _same(digest: bytes, ask: Ask) -> None:
    if digest != ask.digest:
        raise RequestError("this request_id was used for another request; give each request one of its own",
                           "request_id_conflict")


def _has_effect(request: Any) -> bool:
    if isinstance(request, (m.ControlCommand, m.BatchControlCommand)):
        return request.command_type in EFFECTS
    return isinstance(request, (m.SpawnRequest, m.ShutdownRequest, m.ReloadRequest))


def _asks_for_lines(request: Any) -> bool:
    """Whether a process of its own has to find the answer."""
    return isinstance(request, m.OutputQueryRequest) or (
        isinstance(request, m.ControlCommand) and request.command_type == QUERY)


def _searched(request: m.OutputQueryRequest) -> tuple[list[str], Json]:
    streams = list(STREAMS) if request.stream == "both" else [request.stream]
    return streams, {"kind": "find", "filter": request.filter or None, "limit": request.limit,
                     "offset": request.offset, "tail": request.tail}


def _shown(payload: m.QueryOutputPayload) -> tuple[list[str], Json]:
    streams = [name for name in STREAMS if getattr(payload, name)]
    if not streams:
        raise RequestError("payload.stdout and payload.stderr are both false; ask for one of them at least")
    return streams, {"kind": "last", "filter": None, "limit": payload.max_lines, "offset": 0, "tail": True}


def _readable_id(obj: Json) -> str | None:
    try:
        return m.read_request_id(obj)
    except RequestError:
        return None


def _unknown_type(obj: Json) -> RequestError:
    if obj.get("type") is None:
        return RequestError("type is missing; the protocol's request types are " + ", ".join(m.REQUESTS))
    return RequestError(f"there is no request type {str(obj['type'])[:64]!r}; there are " + ", ".join(m.REQUESTS),
                        "unknown_type")


def _failure(reply_type: str, request_id: str | None, error: str, code: str) -> bytes:
    return encode({"type": reply_type, "request_id": request_id, "success": False, "error": error,
                     "error_code": code})


def _with_list(head: Json, name: str, items: list[str]) -> bytes:
    """Return a reply with a list whose items are JSON text already."""
    return b'%s,"%s":[%s]}' % (encode(head)[:-1], name.encode("ascii"), ",".join(items).encode("ascii"))


def _sequence(event: str) -> int:
    return int(decode(event.encode())["sequence"])
