"""AgentClient: one API over any link.

Owns:    asking again until a deadline, turning failed replies into errors and results into typed objects.
Runs in: a client. Use one AgentClient per thread; links and ZeroMQ sockets belong to the thread that made them.
Unaware: of sockets (the links have them) and of how output and events are followed (`follow`).

Every request carries a `request_id`, and the same id on every try, so that asking again never does a thing twice.
"""
from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .core.link import LineLink, Link, NotThere, socket_path
from .errors import LinkError, RequestError, RequestTimeout
from .messages import AgentConfig
from .results import AgentInfo, BatchOutcome, Chunk, ExitRecord, Health, ServerStats
from .wire import encode, new_id, to_wire, wire_text

Json = Dict[str, Any]
Refs = Union[str, Sequence[str]]

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
_FIRST_PATIENCE = 1.0      # seconds for a server that was never reached: it may just be starting a part again
_KNOWN_PATIENCE = 10.0     # for one that was
_LONGEST_ATTEMPT = 8.0
_CONFIG_FIELDS = frozenset(AgentConfig.__dataclass_fields__)


class EventsPage(NamedTuple):
    """Stored events in order; ask on with `since=next` while there is `more`. Older than `first_kept` are gone."""

    events: List[Json]
    next: int
    first_kept: int
    more: bool


# ---------------------------------------------------------------- addresses

def default_address(environ: Mapping[str, str]) -> str:
    """Return where to look when nobody said: AGENTSERVER_SERVER, the local core, the default port."""
    if environ.get("AGENTSERVER_SERVER"):
        return environ["AGENTSERVER_SERVER"]
    from .config import default_state_dir
    path = socket_path(environ.get("AGENTSERVER_STATE_DIR") or default_state_dir(environ))
    return f"unix:{path}" if os.path.exists(path) else DEFAULT_ENDPOINT


def open_link(address: str) -> Link:
    """Return the link for an address; nothing is connected yet. Raise `LinkError` for what is not an address."""
    if address.startswith("unix:") and len(address) > 5:
        path = os.path.expanduser(address[5:])
        return LineLink(socket_path(path) if os.path.isdir(path) else path)
    if address.startswith(("tcp://", "ipc://")):
        try:
            from .shell.link import ZmqLink
        except ImportError:
            raise LinkError(f"{address} needs pyzmq, which is not installed: pip install pyzmq, "
                            "or use the local socket (unix:STATE_DIR)") from None
        return ZmqLink(address)
    if address.startswith("ssh://"):
        from .core.ssh import SshRoute
        return LineLink.over(SshRoute(address))
    raise LinkError(f"{address!r} is not an address; use tcp://HOST:PORT, ipc:///PATH, ssh://HOST, or unix:/PATH "
                    "of a state directory or its core.sock")


# ---------------------------------------------------------------- the client

class AgentClient:
    """A client of one server; a context manager. Not to be shared between threads: make one for each.

    `address`     `tcp://…`, `ipc://…` (need pyzmq), `ssh://[USER@]HOST[:PORT][/STATE_DIR]` or `unix:PATH`;
                  `None`: AGENTSERVER_SERVER, else the local state directory's core socket if it exists, else
                  tcp://127.0.0.1:5555
    `timeout`     seconds for one request, with all its tries
    `retry_secs`  how long a server that cannot be reached is tried again; `None`: 10 for one that was reached
                  before, 1 for others, 0 where there is not even a socket
    """

    def __init__(self, address: Optional[str] = None, *, timeout: float = 30.0,
                 retry_secs: Optional[float] = None) -> None:
        self.address = address or default_address(os.environ)
        self.timeout = timeout
        self._retry_secs = retry_secs
        self._met = False
        self._link = open_link(self.address)
        #: ends that were pushed to this client, by agent: to be believed where the server has gone since (`follow`)
        self.ends: Dict[str, AgentInfo] = {}

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all connections; a later request opens them again."""
        self._link.close()

    def open_link(self) -> Link:
        """Return a second link to the same server, for who wants to listen in this thread; the caller closes it."""
        return self._link.listener()

    def second(self, retry_secs: float) -> AgentClient:
        """Return another client of the same server, with another patience, for this thread; the caller closes it."""
        other = AgentClient(self.address, timeout=self.timeout, retry_secs=retry_secs)
        other._link = self.open_link()
        return other

    # ------------------------------------------------------------ one request

    def request(self, message: Json, timeout: Optional[float] = None) -> Json:
        """Send a message and return its successful reply; adds a `request_id` when there is none.

        Raises `RequestError` (the server refused; `.code`, `.reply`), `LinkError` (not reachable),
        `RequestTimeout` (no answer in `timeout` seconds).
        """
        if not message.get("request_id"):
            message = dict(message, request_id=new_id())
        raw = self._ask(encode(message), self.timeout if timeout is None else timeout)
        try:
            reply = json.loads(raw)
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or reply.get("request_id") not in (None, message["request_id"]):
            self._link.close()
            raise LinkError(f"{self.address} sent something else than the reply; is it an agentserver?")
        if reply.get("success", True) is False:
            raise RequestError(str(reply.get("error") or "the request failed"),
                               str(reply.get("error_code") or "internal"), reply)
        return reply

    def _ask(self, raw: bytes, timeout: float) -> bytes:
        """Ask until there is an answer; the same bytes each time."""
        started = time.monotonic()
        lost_at: Optional[float] = None
        attempt, left = self._link.attempt_secs, timeout
        while left > 0:
            try:
                reply = self._link.request(raw, min(left, attempt))
                self._met = True
                return reply
            except RequestTimeout:
                lost_at = None
                attempt = min(attempt * 2, max(attempt, _LONGEST_ATTEMPT))
            except LinkError as e:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at >= min(self._patience(e), left):
                    raise
                time.sleep(0.02 if time.monotonic() - lost_at < 0.5 else 0.2)
            left = started + timeout - time.monotonic()
        raise RequestTimeout(f"{self.address} did not answer within {timeout:g} s; asking again with the same "
                             "request_id is safe")

    def _patience(self, error: LinkError) -> float:
        if self._retry_secs is not None:
            return self._retry_secs
        if self._met:
            return _KNOWN_PATIENCE
        return 0.0 if isinstance(error, NotThere) else _FIRST_PATIENCE

    # ------------------------------------------------------------ the server

    def health(self) -> Health:
        """Return whether the server is well, and where it listens."""
        return Health.of(self.request({"type": "health_check_request"}))

    def stats(self) -> ServerStats:
        """Return the server's counters."""
        return ServerStats.of(self.request({"type": "stats_request"}).get("stats"))

    def shutdown(self, *, drain: bool = False, grace_secs: Optional[float] = None) -> Json:
        """End the server: its agents are stopped, or with `drain` awaited. Returns when it has begun."""
        message: Json = {"type": "shutdown_request", "mode": "drain" if drain else "graceful"}
        if grace_secs is not None:
            message["grace_secs"] = grace_secs
        reply = self.request(message)
        self._met = False  # it is not coming back
        return reply

    def reload(self) -> Json:
        """Let a new core take over from the one that runs; agents do not notice. Returns when that has begun.

        It is over when `health().metadata["generation"]` has grown, or when `reload_failed` there says why not.
        """
        return self.request({"type": "reload_request"})

    # ------------------------------------------------------------ agents

    def spawn(self, command: Optional[Sequence[str]] = None, *, metadata: Optional[Json] = None,
              timeout_secs: Optional[float] = None, request_id: Optional[str] = None, **config: Any) -> Agent:
        """Start an agent: `command` (argv, no shell), or `model_backend` and `task`; any AgentConfig field by name."""
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
        reply = self.request(message, max(self.timeout, (timeout_secs or 0.0) + 5.0))
        return Agent(self, str(reply["agent_info"]["id"]))

    def list(self, status: Optional[str] = None, *, all: bool = False, labels: Optional[Mapping[str, str]] = None,
             limit: Optional[int] = None, offset: int = 0) -> List[AgentInfo]:
        """Return agents, oldest first: the live ones; with `all` or a terminal `status` finished ones too."""
        message: Json = {"type": "list_agents_request", "all": all, "filter_status": status,
                         "labels": dict(labels) if labels else None}
        return [AgentInfo.of(item) for item in self._listed(message, offset, limit)]

    def _listed(self, message: Json, offset: int, limit: Optional[int]) -> List[Json]:
        """Ask for a part of the list; for a half at a time where the reply would be too long."""
        try:
            found: List[Json] = self.request({**message, "offset": offset, "limit": limit}).get("agents", [])
            return found
        except RequestError as e:
            if e.code != "message_too_large" or limit == 1:
                raise
        if limit is None:
            limit = int(self.request({**message, "offset": offset, "limit": 1})["total"]) - offset
        half = max(limit // 2, 1)
        return self._listed(message, offset, half) + self._listed(message, offset + half, max(limit - half, 1))

    def agent(self, ref: str) -> Agent:
        """Return the handle of an agent by id, name or prefix; raise `RequestError` when there is not exactly one."""
        return Agent(self, self.resolve(ref))

    def resolve(self, ref: str) -> str:
        """Return the id that is meant by an id, a name or a prefix."""
        return str(self.command(ref, "get_status")["agent_id"])

    def command(self, ref: str, command: str, **payload: Any) -> Json:
        """Give one agent a command and return the whole reply: agent_id, status, data."""
        return self.request({"type": "control_command", "agent_id": ref, "command_type": command,
                             "payload": {name: value for name, value in payload.items() if value is not None}})

    def control(self, ref: str, command: str, **payload: Any) -> Json:
        """Give one agent a command and return the reply's `data`."""
        return self.command(ref, command, **payload).get("data") or {}

    def custom_action(self, ref: str, action: str, params: Any = None) -> Json:
        """Ask an agent for one of its backend's own actions and return the reply's `data`."""
        message: Json = {"type": "custom_action_request", "agent_id": ref, "action": action}
        if params is not None:
            message["params"] = params
        return self.request(message).get("data") or {}

    def batch(self, command: str, agents: Optional[Sequence[str]] = None, *, labels: Optional[Mapping[str, str]] = None,
              fail_fast: bool = False, **payload: Any) -> BatchOutcome:
        """Give many agents a command. Does not raise for those that refuse: look at the outcome."""
        message: Json = {"type": "batch_control_command", "command_type": command, "fail_fast": fail_fast,
                         "payload": {name: value for name, value in payload.items() if value is not None}}
        if agents is not None:
            message["agent_ids"] = [agents] if isinstance(agents, str) else [str(agent) for agent in agents]
        if labels is not None:
            message["labels"] = dict(labels)
        try:
            return BatchOutcome.of(self.request(message))
        except RequestError as e:
            if e.reply is None or not isinstance(e.reply.get("results"), list):
                raise
            return BatchOutcome.of(e.reply)

    # ------------------------------------------------------------ what happened, what is written (see `follow`)

    def events(self, since: int = 0, *, limit: int = 1000, agent: Optional[str] = None) -> EventsPage:
        """Return stored events after sequence `since`, optionally of one agent."""
        message: Json = {"type": "events_request", "since": since, "limit": limit}
        if agent is not None:
            message["agent_id"] = agent
        reply = self.request(message)
        return EventsPage(reply.get("events") or [], int(reply.get("next") or since),
                          int(reply.get("first_kept") or 0), bool(reply.get("more")))

    def follow_events(self, since: Optional[int] = None, agent: Optional[str] = None) -> Iterator[Json]:
        """Yield stored events after `since` (`None`: from now on) as they happen, in order, each once, for ever."""
        from .follow import follow_events
        return follow_events(self, since, agent)

    def wait(self, refs: Refs, *, any: bool = False, status: Optional[str] = None,
             timeout: Optional[float] = None) -> List[AgentInfo]:
        """Wait until all agents (or one, with `any`) have ended, or are in `status`; return those, in the order given.

        An agent that ended can no longer reach another status and is returned too: look at its `status`.
        Raises `RequestTimeout` after `timeout` seconds.
        """
        from .follow import wait
        return wait(self, refs, any, status, timeout)

    def follow(self, refs: Refs, *, streams: Sequence[str] = ("stdout", "stderr"),
               offsets: Optional[Mapping[Any, int]] = None,
               timeout: Optional[float] = None) -> Iterator[Tuple[str, str, Chunk]]:
        """Yield (agent id, stream, chunk) until the agents have ended and all is read.

        Per stream every byte comes exactly once and in order, from `offsets` on: a mapping from a stream's name
        or an (agent id, stream) pair, 0 where it says nothing. `chunk.dropped` counts bytes that were asked for
        and are no longer kept. Raises `RequestTimeout` when it is not over after `timeout` seconds.
        """
        from .follow import follow
        return follow(self, refs, streams, offsets or {}, timeout)


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
        record = self.inspect()
        return AgentInfo.of(record.get("agent_info") or record)

    @property
    def status(self) -> str:
        """The status now: asks the server."""
        return str(self.client.command(self.id, "get_status")["status"])

    def write(self, data: Union[str, bytes], *, eof: bool = False) -> int:
        """Write to stdin, all or nothing, and close it after that with `eof`; return the number of bytes."""
        text, encoding = wire_text(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
        return int(self._do("write_stdin", data=text, encoding=encoding, eof=eof or None).get("bytes_written") or 0)

    def close_stdin(self) -> None:
        """Close stdin once everything written has been passed on."""
        self._do("close_stdin")

    def read(self, stream: str = "stdout", offset: Optional[int] = None, max_bytes: int = 65536,
             times: bool = False) -> Chunk:
        """Return bytes from `offset` on; without one, from where the last such read ended, by anyone."""
        return Chunk.of(self._do(f"read_{stream}", offset=offset, max_bytes=max_bytes, times=times or None))

    def lines(self, stream: str = "stdout", *, follow: bool = True) -> Iterator[str]:
        """Yield the lines of a stream without their end: until the agent ends, or without `follow` until now."""
        from .follow import lines
        return lines(self, stream, follow)

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
