"""The wire vocabulary: what may be asked, with which fields, and what comes back.

Owns:    protocol constants, strict JSON, one frozen dataclass per request and payload (server reads
         them, client writes them) and per result (client reads them).
Runs in: any thread; it is pure.
Unaware: of links, agents and what a request does. Defaults that depend on settings stay `None`.

Reading is strict where a caller could be hurt (types, bounds, NUL bytes) and lenient where the
protocol wants to grow: unknown fields are ignored, absent and `null` are the same.
"""
from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple, Type, TypeVar

from .errors import RequestError

PROTOCOL_VERSION = "1.0.0"
MAX_MESSAGE = 10 * 1024 * 1024   # bytes, both ways; above it: message_too_large
MAX_WIRE = 11 * 1024 * 1024      # bytes; above it a connection is cut
MAX_DEPTH = 64
MAX_READ = 4 * 1024 * 1024       # bytes of output in one reply
DEFAULT_READ = 64 * 1024
MAX_INT = 2 ** 63 - 1            # counts and offsets live in 64-bit columns

Check = Callable[[Any, str], Any]
Json = Dict[str, Any]
T = TypeVar("T")


# ---------------------------------------------------------------- strict JSON

def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:32]} is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > 20:  # int() of a long text is quadratic before Python 3.11
        raise ValueError(f"the integer {text[:20]}… is too large")
    return int(text)


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_canonical = json.JSONEncoder(separators=(",", ":"), allow_nan=False, sort_keys=True).encode


def encode(message: Json) -> bytes:
    """Return a message as compact ASCII JSON; lone surrogates travel as escapes and come back as they were."""
    return _encode(message).encode("ascii")


def encode_text(value: Any) -> str:
    """Return any JSON value as compact ASCII JSON text, for columns and for fragments of replies."""
    return _encode(value)


def canonical(message: Json) -> bytes:
    """Return the form in which two requests are compared: sorted keys, without the request id."""
    return _canonical({k: v for k, v in message.items() if k != "request_id"}).encode("ascii")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def decode(raw: bytes, limit: int = MAX_MESSAGE) -> Json:
    """Return the JSON object in `raw`, or raise `RequestError` with a sentence that says what is wrong (RFC 8259)."""
    if len(raw) > limit:
        raise RequestError(f"the message has {len(raw)} bytes and at most {limit} are allowed; "
                           "send less at once", "message_too_large")
    try:
        text = raw.decode("utf-8").strip(" \t\r\n")
        if not text:
            raise RequestError("the message is empty; send one JSON object")
        value, end = _decoder.raw_decode(text)
    except UnicodeDecodeError as e:
        raise RequestError(f"the message is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}") from None
    except RecursionError:
        raise RequestError(f"the message is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as e:
        raise RequestError(f"the message is not valid JSON: {e}") from None
    if end != len(text):
        raise RequestError(f"the message is not one JSON object: something follows it at character {end}")
    if not isinstance(value, dict):
        raise RequestError("the message must be a JSON object")
    if text.count("{") + text.count("[") > MAX_DEPTH and _too_deep(value):
        raise RequestError(f"the message is nested deeper than {MAX_DEPTH} levels")
    return value


# ---------------------------------------------------------------- checks: (value, where) -> value, or RequestError

def _wrong(where: str, wanted: str, value: Any) -> RequestError:
    shown = _encode(value)
    return RequestError(f"{where} must be {wanted}, not {shown if len(shown) <= 60 else shown[:57] + '...'}")


def text(most: int = MAX_MESSAGE, least: int = 0) -> Check:
    """Text of `least` to `most` characters."""
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise _wrong(where, "text", value)
        if not least <= len(value) <= most:
            raise RequestError(f"{where} must have {least} to {most} characters and has {len(value)}")
        return value
    return check


def os_text(most: int = MAX_MESSAGE, least: int = 0) -> Check:
    """Text that can be handed to the operating system: no NUL, and encodable."""
    inner = text(most, least)

    def check(value: Any, where: str) -> str:
        checked: str = inner(value, where)
        if "\0" in checked:
            raise RequestError(f"{where} contains a NUL character, which no program can be given")
        try:
            checked.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise RequestError(f"{where} contains a lone surrogate, which no program can be given") from None
        return checked
    return check


def whole(least: int = 0, most: int = MAX_INT) -> Check:
    """A whole number within bounds."""
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(where, "a whole number", value)
        if not least <= value <= most:
            raise _wrong(where, f"from {least} to {most}", value)
        return value
    return check


def seconds(most: float = 10 * 365 * 86400.0, zero: bool = True) -> Check:
    """A duration in seconds."""
    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(where, "a number of seconds", value)
        if not 0 <= value <= most or not (zero or value):
            raise _wrong(where, f"{'at least' if zero else 'more than'} 0 and at most {most:g} seconds", value)
        return float(value)
    return check


def boolean(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def mapping(value: Any, where: str) -> Json:
    """Any JSON object."""
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    return value


def anything(value: Any, where: str) -> Any:
    """Any JSON value."""
    return value


def one_of(*words: str) -> Check:
    """One of a few words."""
    def check(value: Any, where: str) -> str:
        if value not in words:
            raise _wrong(where, "one of " + ", ".join(words), value)
        return str(value)
    return check


def list_of(inner: Check, least: int = 0) -> Check:
    """A list whose items all pass `inner`."""
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        if len(value) < least:
            raise RequestError(f"{where} must have at least {least} item{'s' if least > 1 else ''}")
        return [inner(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return check


def map_of(inner: Check) -> Check:
    """An object whose values all pass `inner`."""
    def check(value: Any, where: str) -> dict[str, Any]:
        return {key: inner(item, f"{where}.{key}") for key, item in mapping(value, where).items()}
    return check


def environment(value: Any, where: str) -> dict[str, str]:
    """Names and values for environ(7). The sentence of an error never shows a value."""
    for name, item in mapping(value, where).items():
        if not name or "=" in name:
            raise RequestError(f"{where} has the name {name!r}; a name is not empty and has no '='")
        os_text()(name, f"a name in {where}")
        if not isinstance(item, str):
            raise RequestError(f"{where}.{name} must be text")
        os_text()(item, f"{where}.{name}")
    return dict(value)


def stdin_data(value: Any, where: str) -> str | bytes:
    """Text, or bytes as an array of 0 to 255."""
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, list) and not any(isinstance(item, bool) for item in value):
            return bytes(value)
    except (TypeError, ValueError):
        pass
    raise RequestError(f"{where} must be text or an array of whole numbers from 0 to 255")


def signal_spec(value: Any, where: str) -> str | int:
    """A signal by name or number; whether this system knows it is decided where signals are sent."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return value
    raise _wrong(where, "the name or number of a signal", value)


def record(cls: Type[T]) -> Check:
    """An object that reads as `cls`."""
    def check(value: Any, where: str) -> T:
        return read(cls, mapping(value, where), where)
    return check


# ---------------------------------------------------------------- reading and writing dataclasses

def wire(check: Check, default: Any = MISSING, **kwargs: Any) -> Any:
    """Declare a field that travels: how it is checked, and what its absence means."""
    if default is MISSING and "default_factory" not in kwargs:
        return field(metadata={"check": check})
    if default is not MISSING:
        kwargs["default"] = default
    return field(metadata={"check": check}, **kwargs)


_plans: dict[type, tuple[tuple[str, Check, bool], ...]] = {}


def _plan(cls: type) -> tuple[tuple[str, Check, bool], ...]:
    plan = _plans.get(cls)
    if plan is None:
        plan = _plans[cls] = tuple(
            (f.name, f.metadata["check"], f.default is MISSING and f.default_factory is MISSING)
            for f in fields(cls) if "check" in f.metadata)
    return plan


def read(cls: Type[T], obj: Json, where: str = "") -> T:
    """Return `obj` as `cls`; raise `RequestError` naming the field that is wrong or missing."""
    values = {}
    for name, check, required in _plan(cls):
        value = obj.get(name)
        if value is not None:
            values[name] = check(value, f"{where}.{name}" if where else name)
        elif required:
            raise RequestError(f"{where + '.' if where else ''}{name} is missing")
    return cls(**values)


def to_wire(message: Any) -> Json:
    """Return a request or payload as JSON object; what is `None` is left out."""
    out: Json = {"type": message.type} if hasattr(message, "type") else {}
    for name, _check, _required in _plan(type(message)):
        value = getattr(message, name)
        if value is None:
            continue
        if isinstance(value, bytes):
            value = list(value)
        out[name] = to_wire(value) if hasattr(type(value), "__dataclass_fields__") else value
    return out


# ---------------------------------------------------------------- what an agent is made of

_name = text(256)
_labels = map_of(text(256))


@dataclass(frozen=True)
class Limits:
    """What ends an agent when it is reached (later: idle_secs, output_bytes, memory_bytes, …)."""

    runtime_secs: Optional[float] = wire(seconds(zero=False), None)


def _limits(value: Any, where: str) -> Limits:
    for name in ("idle_secs", "output_bytes", "memory_bytes", "open_files", "processes", "cpu_secs"):
        if mapping(value, where).get(name) is not None:
            raise RequestError(f"{where}.{name} is not enforced by this version, and a limit that is not "
                               "enforced is not accepted; leave it out")
    return read(Limits, value, where)


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
    pty: Any = wire(_later("pseudo-terminals"), None)
    restart: Any = wire(_later("restart policy", {}, {"policy": "never"}), None)
    limits: Optional[Limits] = wire(_limits, None)
    grace_secs: Optional[float] = wire(seconds(86400.0), None)
    queue: Any = wire(_later("queue", False), None)
    labels: Dict[str, str] = wire(_labels, default_factory=dict)


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
    config: AgentConfig = wire(record(AgentConfig))
    timeout_secs: Optional[float] = wire(seconds(86400.0, zero=False), None)
    metadata: Json = wire(mapping, default_factory=dict)


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
    agent_ids: Optional[List[str]] = wire(list_of(_agent_ref), None)
    labels: Optional[Dict[str, str]] = wire(_labels, None)
    payload: Json = wire(mapping, default_factory=dict)
    fail_fast: bool = wire(boolean, False)


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
    topics: List[str] = wire(list_of(text(512)))
    since: Optional[int] = wire(whole(), None)
    #: of `topics`, those to answer with their current offset though they are not new on this connection
    announce: List[str] = wire(list_of(text(512)), default_factory=list)


@dataclass(frozen=True)
class ShutdownRequest:
    type: ClassVar[str] = "shutdown_request"
    reply: ClassVar[str] = "shutdown_response"
    mode: str = wire(one_of("graceful", "drain"), "graceful")
    grace_secs: Optional[float] = wire(seconds(86400.0), None)


REQUESTS: Dict[str, Any] = {cls.type: cls for cls in (
    HealthCheckRequest, SpawnRequest, ListAgentsRequest, ControlCommand, CustomActionRequest,
    BatchControlCommand, StatsRequest, EventsRequest, SubscribeRequest, ShutdownRequest)}


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
class SignalPayload:
    signal: Any = wire(signal_spec)


@dataclass(frozen=True)
class ResizePayload:
    rows: int = wire(whole(1, 65535))
    cols: int = wire(whole(1, 65535))


@dataclass(frozen=True)
class CustomActionPayload:
    action: str = wire(text(64, 1))
    params: Any = wire(anything, None)


COMMANDS: Dict[str, Any] = {
    "pause": PausePayload, "resume": NoPayload, "stop": StopPayload, "kill": NoPayload,
    "restart": StopPayload, "get_status": NoPayload, "inspect": NoPayload,
    "write_stdin": WriteStdinPayload, "close_stdin": NoPayload,
    "read_stdout": ReadPayload, "read_stderr": ReadPayload, "signal": SignalPayload,
    "resize": ResizePayload, "custom_action": CustomActionPayload, "stream_logs": NoPayload,
    "remove": NoPayload,
}


# ---------------------------------------------------------------- results, as a client sees them

R = TypeVar("R", bound="Result")


@dataclass(frozen=True)
class Result:
    """Something that came back. `raw` is the whole object, also the fields that this version does not know."""

    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls: Type[R], obj: Json | None) -> R:
        """Read a reply leniently: unknown fields only stay in `raw`, absent ones get their default."""
        obj = obj or {}
        values: Json = {f.name: obj[f.name] for f in fields(cls) if f.name != "raw" and obj.get(f.name) is not None}
        return cls(raw=obj, **cls._convert(values))

    @classmethod
    def _convert(cls, values: Json) -> Json:
        return values


@dataclass(frozen=True)
class ExitRecord(Result):
    """How one attempt ended (the death certificate). `duration` in seconds; `at` is RFC 3339."""

    code: Optional[int] = None
    signal: Optional[str] = None
    reason: str = ""
    by: Optional[str] = None
    at: str = ""
    duration: float = 0.0
    rusage: Json = field(default_factory=dict)
    leaked: List[Json] = field(default_factory=list)

    @property
    def returncode(self) -> int:
        """The code as a shell reports it: the agent's own, or 128+N when signal N ended it; 1 if unknown."""
        if self.code is not None:
            return self.code
        number = self.raw.get("signal_number")
        return 128 + int(number) if number else 1


@dataclass(frozen=True)
class StreamRange(Result):
    """Which bytes of a stream are kept: absolute offsets, never reused."""

    first_offset: int = 0
    end_offset: int = 0


@dataclass(frozen=True)
class AgentInfo(Result):
    """One agent as the server lists it."""

    id: str = ""
    name: str = ""
    status: str = ""
    model_backend: str = ""
    started_at: Optional[str] = None
    task: str = ""
    paused_at: Optional[str] = None
    pause_mode: Optional[str] = None
    attach_info: Optional[Json] = None
    want: str = ""
    pid: Optional[int] = None
    attempt: int = 1
    created_at: str = ""
    finished_at: Optional[str] = None
    exit: Optional[ExitRecord] = None
    labels: Dict[str, str] = field(default_factory=dict)
    metadata: Json = field(default_factory=dict)
    command: List[str] = field(default_factory=list)
    cwd: str = ""
    stdin: str = ""
    activity: Optional[Json] = None
    output: Dict[str, StreamRange] = field(default_factory=dict)

    @classmethod
    def _convert(cls, values: Json) -> Json:
        if "exit" in values:
            values["exit"] = ExitRecord.of(values["exit"])
        if "output" in values:
            values["output"] = {stream: StreamRange.of(span) for stream, span in values["output"].items()}
        return values

    @property
    def finished(self) -> bool:
        """Whether the agent is in a terminal status."""
        return self.status in ("completed", "failed", "terminated")


@dataclass(frozen=True)
class Health(Result):
    """The server's answer to a health check."""

    healthy: bool = False
    protocol_version: str = ""
    uptime_secs: float = 0.0
    active_agents: int = 0
    metadata: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerStats(Result):
    """Counters since the server was started, across deaths of its parts."""

    started_at: str = ""
    uptime_secs: float = 0.0
    requests: int = 0
    spawn_requests: int = 0
    successful_spawns: int = 0
    failed_spawns: int = 0
    control_commands: int = 0
    list_requests: int = 0
    health_checks: int = 0
    errors: int = 0
    active_agents: int = 0
    agents_by_status: Dict[str, int] = field(default_factory=dict)
    bytes_captured: int = 0
    core: Json = field(default_factory=dict)
    shell: Json = field(default_factory=dict)
    keeper: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk(Result):
    """Bytes read from a stream. `dropped` bytes before `offset` were asked for and are no longer kept."""

    data: bytes = b""
    offset: int = 0
    next_offset: int = 0
    first_offset: int = 0
    dropped: int = 0
    eof: bool = False
    times: List[Tuple[str, int]] = field(default_factory=list)

    @classmethod
    def of(cls, obj: Json | None) -> "Chunk":
        """Read a reply or a `log_stream`; text and base64 both become bytes."""
        chunk = dict(obj or {})
        chunk["data"] = wire_bytes(chunk.get("data"), chunk.get("encoding"))
        values = {f.name: chunk[f.name] for f in fields(cls) if f.name != "raw" and chunk.get(f.name) is not None}
        return cls(raw=obj or {}, **values)


@dataclass(frozen=True)
class BatchOutcome(Result):
    """What a batch did, in the order of the agents; see `results` for each."""

    success: bool = False
    results: List[Json] = field(default_factory=list)
    successful: int = 0
    failed: int = 0


def wire_bytes(data: str | None, encoding: str | None) -> bytes:
    """Return the bytes that travelled as text or as base64."""
    if not data:
        return b""
    if encoding == "base64":
        import binascii
        return binascii.a2b_base64(data)
    return data.encode("utf-8", "surrogatepass")


def wire_text(data: bytes) -> tuple[str, str]:
    """Return bytes as (data, encoding): text if they are valid UTF-8, else base64."""
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        import binascii
        return binascii.b2a_base64(data, newline=False).decode("ascii"), "base64"



def new_id() -> str:
    """Return a random UUID as text (RFC 9562, version 4), without importing `uuid`."""
    import os
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text_ = raw.hex()
    return f"{text_[:8]}-{text_[8:12]}-{text_[12:16]}-{text_[16:20]}-{text_[20:]}"


def rfc3339(unix: float) -> str:
    """Return seconds since the epoch as RFC 3339 UTC text with microseconds."""
    import time
    micros = round(unix * 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micros // 1_000_000)) + f".{micros % 1_000_000:06d}Z"


def from_rfc3339(stamp: str, where: str = "time") -> float:
    """Return RFC 3339 text as seconds since the epoch, or raise `RequestError`."""
    from datetime import datetime, timezone
    try:
        moment = datetime.fromisoformat(stamp[:-1] + "+00:00" if stamp[-1:] in "Zz" else stamp)
    except ValueError:
        raise RequestError(f"{where} must be an RFC 3339 time such as 2026-01-31T12:00:00Z, "
                           f"not {stamp[:40]!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
