"""What can be asked of one agent: each command, its payload, its data.

Owns:    the table of commands, and the form of what they give back.
Runs in: the core's thread.
Unaware: of requests, replies and request ids; the same command runs alone and in a batch.
"""
from __future__ import annotations

import base64
from typing import Any, Callable, NamedTuple

from .. import messages as m
from ..errors import RequestError
from ..wire import Json, from_rfc3339, read
from . import process, tree
from .agent import Agent
from .facts import Facts
from .feed import Subscriber
from .reading import told
from .registry import Ask
from .run import STREAMS
from .supervisor import Supervisor

#: commands that do something, and are therefore done once per request id
EFFECTS = frozenset(("pause", "resume", "stop", "kill", "restart", "write_stdin", "close_stdin", "signal", "resize",
                     "remove"))


REPLY_BYTES = 4096  # of a reply, beside the data of its command


class Encoded(NamedTuple):
    """What a command gives back, as JSON already, in pieces: there can be much of it, and each copy is dear."""

    json: list[bytes]


class Commands:
    """See the module."""

    def __init__(self, supervisor: Supervisor, facts: Facts) -> None:
        self._supervisor, self._facts = supervisor, facts
        self._table: dict[str, Callable[[Agent, Any, Ask], Json | Encoded]] = {
            "pause": self._pause, "resume": self._resume, "stop": self._stop, "kill": self._kill,
            "restart": self._restart, "get_status": self._get_status, "inspect": self._inspect,
            "write_stdin": self._write_stdin, "close_stdin": self._close_stdin,
            "read_stdout": lambda agent, payload, ask: self._read(agent, payload, "stdout"),
            "read_stderr": lambda agent, payload, ask: self._read(agent, payload, "stderr"),
            "signal": self._signal, "resize": self._resize,
            "custom_action": lambda agent, payload, ask: self.act(agent, payload.action, payload.params),
            "stream_logs": self._stream_logs, "remove": self._remove}

    def check(self, command: str, payload: Json) -> Any:
        """Return the payload as its dataclass, or refuse an unknown command or a wrong payload."""
        cls = m.COMMANDS.get(command)
        if cls is None:
            raise RequestError(f"there is no command {command[:64]!r}; there are " + ", ".join(m.COMMANDS),
                               "unknown_command")
        return read(cls, payload, "payload")

    def now(self) -> float:
        """Return the time, for `recent`."""
        return self._supervisor.reactor.clock()

    def recent(self, since: float) -> None:
        """What was seen of all processes since then is good enough for the command that follows."""
        self._supervisor.family.recent(since)

    def run(self, agent: Agent, command: str, payload: Json, ask: Ask) -> Json | Encoded:
        """Run one command on one agent and return its data."""
        return self.do(agent, command, self.check(command, payload), ask)

    def do(self, agent: Agent, command: str, checked: Any, ask: Ask) -> Json | Encoded:
        """Run one command whose payload was checked."""
        return self._table[command](agent, checked, ask)

    # ------------------------------------------------------------ control

    def _pause(self, agent: Agent, payload: m.PausePayload, ask: Ask) -> Json:
        if agent.id not in ask.begun:
            self._supervisor.pause(agent, ask)
        return {"paused": True, "mode": "forced"}

    def _resume(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        self._supervisor.resume(agent)
        return {"resumed": True}

    def _stop(self, agent: Agent, payload: m.StopPayload, ask: Ask) -> Json:
        if agent.id not in ask.begun:
            self._supervisor.stop(agent, ask, payload.grace_secs)
        return {"stopping": True, **_denied(agent)}

    def _kill(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        if agent.id not in ask.begun:
            self._supervisor.kill(agent, ask)
        return {"killing": True, **_denied(agent)}

    def _restart(self, agent: Agent, payload: m.StopPayload, ask: Ask) -> Json:
        if agent.id not in ask.begun:
            return {"attempt": self._supervisor.restart(agent, ask, payload.grace_secs)}
        return {"attempt": agent.attempt + (agent.want == "restart")}

    def _signal(self, agent: Agent, payload: m.SignalPayload, ask: Ask) -> Json:
        number = process.signal_number(payload.signal)
        if agent.id in ask.begun:
            raise RequestError("the server's core died while it sent the signal, and whether it was sent is not known; "
                               "if it has to be sent, ask with a new request_id", "unavailable")
        self._supervisor.signal(agent, number, ask)
        return {"signal_sent": process.signal_name(number), **_denied(agent)}

    def _resize(self, agent: Agent, payload: m.TerminalSize, ask: Ask) -> Json:
        self._supervisor.resize(agent, payload.rows, payload.cols)
        return {"rows": payload.rows, "cols": payload.cols}

    def _remove(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        self._supervisor.remove(agent)
        return {"removed": True}

    # ------------------------------------------------------------ seeing

    def _get_status(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        return {"status": agent.status}

    def _inspect(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        spec = self._supervisor.registry.spec(agent.id)
        spec["environment"] = {name: "(hidden)" for name in spec.get("environment") or {}}
        members = self._supervisor.family.members([agent])[agent.id] if agent.alive else []
        return {"agent_info": agent.info(), "spec": spec,
                "attempts": self._supervisor.registry.attempts(agent.id),
                "tree": [_process(proc.pid) for proc in members],
                "resources": tree.usage(agent.pid) if agent.pid else {},
                "disk_bytes": agent.output.disk_bytes()}

    def _stream_logs(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        endpoint = self._facts.metadata()["pub_endpoint"]
        return {"pub_endpoint": endpoint, "topic": f"{agent.id}.", "enabled": bool(endpoint), "offsets": {
            stream: self._standing(agent, stream) for stream in STREAMS}}

    def act(self, agent: Agent, action: str, params: Any) -> Json:
        """Run a custom action."""
        if action == "ping":
            return {"pong": True}
        if action == "echo":
            return {"echo": params}
        if action == "get_env":
            spec = read(m.AgentConfig, self._supervisor.registry.spec(agent.id), "config")
            return {"names": self._supervisor.starting.environment_names(spec)}
        raise RequestError(f"there is no action {action!r}; there are ping, echo, get_env", "unknown_command")

    # ------------------------------------------------------------ streams

    def _write_stdin(self, agent: Agent, payload: m.WriteStdinPayload, ask: Ask) -> Json:
        data = _stdin_bytes(payload)
        run = agent.run if agent.alive else None
        if agent.stdin == "null":
            raise RequestError(f"{agent.label()} was spawned with stdin=null; spawn it with stdin=pipe to write to it",
                               "stdin_closed")
        if run is None:
            raise RequestError(f"{agent.label()} is {agent.status}; nothing can be written to it", "stdin_closed")
        self._supervisor.check_memory()
        buffered = run.stdin.write(data, payload.eof)
        return {"bytes_written": len(data), "buffered": buffered}

    def _close_stdin(self, agent: Agent, payload: m.NoPayload, ask: Ask) -> Json:
        if agent.run is None or not agent.alive or agent.stdin == "null":
            raise RequestError(f"{agent.label()} has no open stdin", "stdin_closed")
        agent.run.stdin.close()
        return {"closed": True}

    def _read(self, agent: Agent, payload: m.ReadPayload, stream: str) -> Encoded:
        offset = payload.offset
        if payload.since is not None:
            offset = agent.output.offset_at(stream, from_rfc3339(payload.since, "since"))
        over = agent.run is None or not agent.run.is_open(stream)
        read = told(agent.output, stream, agent.cursors.get(stream, 0) if offset is None else offset, payload.max_bytes,
                    over, payload.times, self._supervisor.config.message_bytes - REPLY_BYTES)
        if offset is None:
            agent.cursors[stream] = read.next_offset
        return Encoded(read.json)

    def _standing(self, agent: Agent, stream: str) -> int:
        return self._supervisor.pushing.shown(agent.id, stream, agent.output)

    def announce(self, topic: str, subscriber: Subscriber) -> None:
        """Tell a subscriber where a topic stands: a stream or both of an agent, its status, or all events. So it
        knows what to read first, and what it has lost."""
        if topic in ("", "server"):
            return self._supervisor.greet(subscriber)
        first, _, second = topic.partition(".")
        agent = self._supervisor.agents.get(second if first == "status" else first)
        if agent is not None and first == "status":
            self._supervisor.beat(agent, subscriber)
        elif agent is not None:
            for stream in STREAMS:
                if second in ("", stream):
                    self._announce_stream(agent, stream, subscriber)

    def _announce_stream(self, agent: Agent, stream: str, subscriber: Subscriber) -> None:
        at = self._standing(agent, stream)
        over = at == agent.output.span(stream)[1] and (agent.run is None or not agent.run.is_open(stream))
        self._supervisor.feed.output(agent.id, stream, b"", at, over, only=subscriber)


def _denied(agent: Agent) -> Json:
    """Return what is told beside the data of a signal of which not all of a tree could have it."""
    return {"not_permitted": [one["pid"] for one in agent.not_permitted]} if agent.not_permitted else {}


def _process(pid: int) -> Json:
    proc = tree.look(pid)
    return {"pid": pid, "ppid": proc.parent if proc else None, "state": proc.state if proc else None,
            "command": tree.command_of(pid)}


def _stdin_bytes(payload: m.WriteStdinPayload) -> bytes:
    if isinstance(payload.data, bytes):
        return payload.data
    if payload.encoding == "base64":
        try:
            return base64.b64decode(payload.data, validate=True)
        except ValueError as e:
            raise RequestError(f"payload.data is not base64: {e}") from None
    try:
        return str(payload.data).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise RequestError("payload.data contains a lone surrogate, which is no text that can be written; "
                           "send it as base64") from None
