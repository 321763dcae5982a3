"""What comes back, as a client sees it: typed, and lenient towards fields of a newer server.

Owns:    one frozen dataclass for each kind of result; `raw` keeps what this version does not know.
Runs in: any thread; it is pure. Only clients use it.
Unaware: of links and of how a result was asked for.
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Type, TypeVar

from .wire import Json, wire_bytes

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
    survivors: List[Json] = field(default_factory=list)

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
    pty: Optional[Dict[str, int]] = None
    activity: Optional[Json] = None
    output: Dict[str, StreamRange] = field(default_factory=dict)
    not_permitted: List[Json] = field(default_factory=list)

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
    messages_pushed: int = 0
    messages_dropped: int = 0
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
    dropped_reason: str = ""
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
class FoundLines(Result):
    """Lines of output that match. `total_lines` counts all that do, `has_more` says whether some are not in `lines`."""

    lines: List[str] = field(default_factory=list)
    total_lines: int = 0
    has_more: bool = False


@dataclass(frozen=True)
class LastLines(Result):
    """The last lines of each stream, and how many lines each has; None of a stream that was not asked for."""

    stdout: List[str] = field(default_factory=list)
    stderr: List[str] = field(default_factory=list)
    stdout_lines: Optional[int] = None
    stderr_lines: Optional[int] = None


@dataclass(frozen=True)
class BatchOutcome(Result):
    """What a batch did, in the order of the agents; see `results` for each."""

    success: bool = False
    results: List[Json] = field(default_factory=list)
    successful: int = 0
    failed: int = 0


@dataclass(frozen=True)
class OutputDropped:
    """Bytes of a stream that were asked for and are no longer kept; in a follower, one stands in their place.

    It can be treated as a `Chunk` without data that reaches from `from_offset` to `to_offset`.
    """

    agent_id: str
    stream: str
    from_offset: int
    to_offset: int
    reason: str = field(default="", compare=False)  # output_cap, disk, file_gone, unknown
    data = b""

    @property
    def offset(self) -> int:
        """Where the gap begins."""
        return self.from_offset

    @property
    def next_offset(self) -> int:
        """Where the stream goes on."""
        return self.to_offset

    @property
    def dropped(self) -> int:
        """How many bytes are gone."""
        return self.to_offset - self.from_offset

    @property
    def dropped_reason(self) -> str:
        """Why, as a chunk says it."""
        return self.reason


class EventsPage(NamedTuple):
    """Stored events in order; ask on with `since=next` while there is `more`. Older than `first_kept` are gone."""

    events: List[Json]
    next: int
    first_kept: int
    more: bool


class EventsDropped(Dict[str, Any]):
    """Events that were asked for and are no longer kept; in a follower, one stands in their place.

    It is an event of its own `type`, `events_dropped`, whose `sequence` is that of the last one that is gone.
    """

    def __init__(self, from_sequence: int, to_sequence: int) -> None:
        super().__init__(type="events_dropped", from_sequence=from_sequence, to_sequence=to_sequence,
                         sequence=to_sequence)

    @property
    def from_sequence(self) -> int:
        """The first one that is gone."""
        return int(self["from_sequence"])

    @property
    def to_sequence(self) -> int:
        """The last one that is gone."""
        return int(self["to_sequence"])
