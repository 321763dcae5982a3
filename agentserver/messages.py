"""The requests of the protocol: one frozen dataclass for each request and each command's payload.

Owns:    which messages there are, their fields, bounds and defaults. The server reads them, the client writes them.
Runs in: any thread; it is pure.
Unaware: of links, agents and what a request does. Defaults that depend on settings stay `None`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional

from .errors import RequestError
from .wire import (
    Check,
    Json,
    anything,
    boolean,
    encode_text,
    environment,
    is_id,
    list_of,
    map_of,
    mapping,
    one_of,
    os_text,
    read,
    record,
    seconds,
    signal_spec,
    stdin_data,
    text,
    whole,
    wire,
)

PROTOCOL_VERSION = "1.0.0"
MAX_READ = 4 * 1024 * 1024       # bytes of output in one reply
DEFAULT_READ = 64 * 1024
MAX_PATTERN = 4096               # characters of a regular expression
MAX_ITEMS = 10_000               # agents of one batch, topics of one subscription
MAX_ARGV = 10_000                # arguments of a command
MAX_VARIABLES = 10_000           # variables that a request sets
MAX_LABELS = 1_000               # of one agent, or to choose by
MAX_PATH = 64 * 1024             # characters of the variable PATH
MAX_PATH_DIRECTORIES = 1_000     # directories on it: each may have to be looked into
MAX_SPEC = 1024 * 1024           # bytes of command, texts, environment, labels and metadata together, as JSON


# ---------------------------------------------------------------- what an agent is made of

_name = text(256)
_labels = map_of(_name, MAX_LABELS, _name)


@dataclass(frozen=True)
class Limits:
    """What ends an agent when it is reached (later: idle_secs, output_bytes, memory_bytes, …)."""

    runtime_secs: Optional[float] = wire(seconds(zero=False), None)


@dataclass(frozen=True)
class TerminalSize:
    """The size of a terminal, in characters."""

    rows: int = wire(whole(1, 65535))
    cols: int = wire(whole(1, 65535))


def _later(what: str, *harmless: Any) -> Check:
    """Refuse a field whose capability is not built yet, rather than ignore what the caller relies on."""
    def check(value: Any, where: str) -> None:
        if value not in harmless:
            raise RequestError(f"{where}: this version has no {what}; leave it out")
    return check


@dataclass(frozen=True)
class AgentConfig:
    """What to run, and how. Environment values are secrets: `repr` does not show them."""

    name: str = wire(_name, "")
    model_backend: str = wire(text(128), "")
    command: Optional[List[str]] = wire(list_of(os_text(), least=1), None)
    task: str = wire(os_text(), "")
    context: str = wire(os_text(), "")
    system_prompt: str = wire(os_text(), "")
    model: str = wire(os_text(256), "")
    tool_level: str = wire(text(64), "")
    agents: Any = wire(anything, None)
    environment: Dict[str, str] = wire(environment, default_factory=dict, repr=False)
    cwd: Optional[str] = wire(os_text(4096, 1), None)
    stdin: Optional[str] = wire(one_of("null", "pipe", "pty"), None)
    pty: Optional[TerminalSize] = wire(record(TerminalSize), None)
    restart: Any = wire(_later("restart policy", {}, {"policy": "never"}), None)
    limits: Optional[Limits] = wire(record(Limits), None)
    grace_secs: Optional[float] = wire(seconds(86400.0), None)
    queue: Any = wire(_later("queue", False), None)
    labels: Dict[str, str] = wire(map_of(_name), default_factory=dict)


def _bound_size(config: AgentConfig, metadata: Json) -> None:
    """Refuse what would be much to start, to keep, and to give back again and again."""
    started = _bytes([*(config.command or ()), *config.environment, *config.environment.values()])
    kept = _bytes([config.task, config.context, config.system_prompt, *config.labels, *config.labels.values()])
    kept += sum(len(encode_text(value)) for value in (config.agents, metadata) if value)
    if started > MAX_SPEC:
        raise RequestError(f"the arguments and the environment have {started} bytes and may have at most {MAX_SPEC}; "
                           "hand large input over by stdin or a file", "spawn_failed")
    if started + kept > MAX_SPEC:
        raise RequestError(f"arguments, environment, task, context, system_prompt, agents, labels and metadata have "
                           f"{started + kept} bytes together and may have at most {MAX_SPEC}; give it less, and large "
                           "input by stdin or a file", "message_too_large")


def _bytes(texts: List[str]) -> int:
    return len("".join(texts).encode("utf-8", "surrogatepass"))


def _to_spawn(value: Any, where: str) -> AgentConfig:
    """The config of an agent that is to be made. Fields that are not known are ignored, as those of the message are.

    Its bounds are for new agents: one of a version without them can be started again all the same."""
    for name, what, most in (("command", "items", MAX_ARGV), ("environment", "variables", MAX_VARIABLES)):
        given = mapping(value, where).get(name)
        if isinstance(given, (list, dict)) and len(given) > most:
            raise RequestError(f"{where}.{name} has {len(given)} {what} and may have at most {most}; hand large input "
                               "over by stdin or a file")
    _labels(value.get("labels") or {}, f"{where}.labels")
    config = read(AgentConfig, value, where)
    if is_id(config.name):
        raise RequestError(f"{where}.name has the form of an agent's id and would be taken for one; choose another")
    path = config.environment.get("PATH", "")
    if len(path) > MAX_PATH or path.count(":") >= MAX_PATH_DIRECTORIES:
        raise RequestError(f"{where}.environment.PATH has {len(path)} characters and {path.count(':') + 1} "
                           f"directories, and may have at most {MAX_PATH} and {MAX_PATH_DIRECTORIES}")
    return config


# ---------------------------------------------------------------- requests

_request_id = text(128, 1)
_agent_ref = text(256, 1)


@dataclass(frozen=True)
class HealthCheckRequest:
    type: ClassVar[str] = "health_check_request"
    reply: ClassVar[str] = "health_check_response"


@dataclass(frozen=True)
class SpawnRequest:
    type: ClassVar[str] = "spawn_request"
    reply: ClassVar[str] = "spawn_response"
    config: AgentConfig = wire(_to_spawn)
    timeout_secs: Optional[float] = wire(seconds(86400.0, zero=False), None)
    metadata: Json = wire(mapping, default_factory=dict)

    def __post_init__(self) -> None:
        _bound_size(self.config, self.metadata)


@dataclass(frozen=True)
class ListAgentsRequest:
    type: ClassVar[str] = "list_agents_request"
    reply: ClassVar[str] = "list_agents_response"
    filter_status: Optional[str] = wire(one_of(
        "idle", "initializing", "running", "thinking", "paused", "completed", "failed", "terminated"), None)
    limit: Optional[int] = wire(whole(), None)
    offset: int = wire(whole(), 0)
    labels: Dict[str, str] = wire(_labels, default_factory=dict)
    all: bool = wire(boolean, False)


@dataclass(frozen=True)
class ControlCommand:
    type: ClassVar[str] = "control_command"
    reply: ClassVar[str] = "command_response"
    agent_id: str = wire(_agent_ref)
    command_type: str = wire(text(64))
    payload: Json = wire(mapping, default_factory=dict)


@dataclass(frozen=True)
class CustomActionRequest:
    type: ClassVar[str] = "custom_action_request"
    reply: ClassVar[str] = "command_response"
    agent_id: str = wire(_agent_ref)
    action: str = wire(text(64, 1))
    params: Any = wire(anything, None)
    timeout_secs: Optional[float] = wire(seconds(86400.0, zero=False), None)


@dataclass(frozen=True)
class BatchControlCommand:
    type: ClassVar[str] = "batch_control_command"
    reply: ClassVar[str] = "batch_control_response"
    command_type: str = wire(text(64))
    agent_ids: Optional[List[str]] = wire(list_of(_agent_ref, most=MAX_ITEMS), None)
    labels: Optional[Dict[str, str]] = wire(_labels, None)
    payload: Json = wire(mapping, default_factory=dict)
    fail_fast: bool = wire(boolean, False)


@dataclass(frozen=True)
class OutputQueryRequest:
    type: ClassVar[str] = "output_query_request"
    reply: ClassVar[str] = "output_query_response"
    agent_id: str = wire(_agent_ref)
    stream: str = wire(one_of("stdout", "stderr", "both"))
    filter: Optional[str] = wire(text(MAX_PATTERN), None)
    limit: int = wire(whole(), 1000)
    offset: int = wire(whole(), 0)
    tail: bool = wire(boolean, False)


@dataclass(frozen=True)
class StatsRequest:
    type: ClassVar[str] = "stats_request"
    reply: ClassVar[str] = "stats_response"


@dataclass(frozen=True)
class EventsRequest:
    type: ClassVar[str] = "events_request"
    reply: ClassVar[str] = "events_response"
    since: int = wire(whole(), 0)
    limit: int = wire(whole(1, 10_000), 1_000)
    agent_id: Optional[str] = wire(_agent_ref, None)


@dataclass(frozen=True)
class SubscribeRequest:
    type: ClassVar[str] = "subscribe_request"
    reply: ClassVar[str] = "subscribe_response"
    topics: List[str] = wire(list_of(text(512), most=MAX_ITEMS))
    since: Optional[int] = wire(whole(), None)
    #: of `topics`, those to answer with their current offset though they are not new on this connection
    announce: List[str] = wire(list_of(text(512), most=MAX_ITEMS), default_factory=list)


@dataclass(frozen=True)
class ShutdownRequest:
    type: ClassVar[str] = "shutdown_request"
    reply: ClassVar[str] = "shutdown_response"
    mode: str = wire(one_of("graceful", "drain"), "graceful")
    grace_secs: Optional[float] = wire(seconds(86400.0), None)


@dataclass(frozen=True)
class ReloadRequest:
    type: ClassVar[str] = "reload_request"
    reply: ClassVar[str] = "reload_response"


REQUESTS: Dict[str, Any] = {cls.type: cls for cls in (
    HealthCheckRequest, SpawnRequest, ListAgentsRequest, ControlCommand, CustomActionRequest,
    BatchControlCommand, OutputQueryRequest, StatsRequest, EventsRequest, SubscribeRequest, ShutdownRequest,
    ReloadRequest)}


def read_request_id(obj: Json) -> str:
    """Return the request id of a message, or raise `RequestError`."""
    if obj.get("request_id") is None:
        raise RequestError("request_id is missing; give each request one of its own (a UUID)")
    return str(_request_id(obj["request_id"], "request_id"))


# ---------------------------------------------------------------- payloads of control commands

@dataclass(frozen=True)
class NoPayload:
    """A command without arguments."""


@dataclass(frozen=True)
class PausePayload:
    force: bool = wire(boolean, False)


@dataclass(frozen=True)
class StopPayload:
    grace_secs: Optional[float] = wire(seconds(86400.0), None)


@dataclass(frozen=True)
class WriteStdinPayload:
    data: Any = wire(stdin_data, "")
    encoding: str = wire(one_of("utf-8", "base64"), "utf-8")
    eof: bool = wire(boolean, False)


@dataclass(frozen=True)
class ReadPayload:
    offset: Optional[int] = wire(whole(), None)
    max_bytes: int = wire(whole(1, MAX_READ), DEFAULT_READ)
    #: with the times at which these bytes were written, as [[time, end offset], …]
    times: bool = wire(boolean, False)
    #: instead of `offset`: from the first byte written at or after this time (RFC 3339)
    since: Optional[str] = wire(text(64, 1), None)


@dataclass(frozen=True)
class QueryOutputPayload:
    max_lines: int = wire(whole(), 100)
    stdout: bool = wire(boolean, True)
    stderr: bool = wire(boolean, True)


@dataclass(frozen=True)
class SignalPayload:
    signal: Any = wire(signal_spec)


@dataclass(frozen=True)
class CustomActionPayload:
    action: str = wire(text(64, 1))
    params: Any = wire(anything, None)


COMMANDS: Dict[str, Any] = {
    "pause": PausePayload, "resume": NoPayload, "stop": StopPayload, "kill": NoPayload,
    "restart": StopPayload, "get_status": NoPayload, "inspect": NoPayload,
    "write_stdin": WriteStdinPayload, "close_stdin": NoPayload,
    "read_stdout": ReadPayload, "read_stderr": ReadPayload, "signal": SignalPayload,
    "resize": TerminalSize, "custom_action": CustomActionPayload, "query_output": QueryOutputPayload,
    "stream_logs": NoPayload, "remove": NoPayload,
}
