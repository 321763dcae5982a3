"""What is known of one agent: the record that is stored, listed and given back.

Owns:    the fields of a record, their form on disk and on the wire, and moving its status by the table.
Runs in: the core's thread.
Unaware: of processes and policy. What exists only while a process does is a `Run` (run.py).
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..wire import Json, encode_text, rfc3339
from . import lifecycle
from .output import OutputLog

if TYPE_CHECKING:
    from .run import Run

_NONE, _NUMBER = type(None), (int, float)
_TIME = (*_NUMBER, _NONE)
#: fields of a record as they are stored, and of which types; anything else in a stored record is kept in `unknown`
STORED: dict[str, Any] = {
    "name": str, "model_backend": str, "task": str, "command": list, "cwd": str, "stdin": str, "pty": (dict, _NONE),
    "finish": str, "tag": int, "not_permitted": list,
    "grace_secs": _NUMBER, "runtime_secs": _TIME, "labels": dict, "metadata": dict, "status": str, "want": str,
    "attempt": int, "pid": (int, _NONE), "start": (int, _NONE), "boot": str, "created_at": _NUMBER,
    "started_at": _TIME, "finished_at": _TIME, "paused_at": _TIME, "pause_mode": (str, _NONE), "exit": (dict, _NONE),
    "still": dict, "began": _NUMBER, "ending": (dict, _NONE), "signalled": dict,
    "stdin_file": int, "stdin_end": int, "stdin_closing": bool, "told": dict, "capped": dict}
#: those of them that may be large and hardly ever change
FIXED = ("name", "model_backend", "task", "command", "cwd", "labels", "metadata")
_CHANGING = tuple(key for key in STORED if key not in FIXED)


class Agent:
    """One agent, from spawn until it is forgotten. Times are seconds since the epoch, None if they have not come."""

    __slots__ = ("_fixed", "_fixed_text", "_json", "_spans", "cursors", "id", "adopted", "output", "reported", "run",
                 "unknown", *STORED)

    name: str
    model_backend: str
    task: str
    command: list[str]
    cwd: str
    stdin: str
    pty: dict[str, int] | None  # rows and cols of its terminal, if it has one
    finish: str
    grace_secs: float
    runtime_secs: float
    labels: dict[str, str]
    metadata: Json
    status: str
    want: str            # up, down or restart
    attempt: int
    pid: int | None
    start: int | None    # with `boot` and `pid` the identity of the leader
    boot: str
    tag: int             # what its descendants are known by (inherited.py), 0 if by nothing
    created_at: float
    started_at: float | None
    finished_at: float | None
    paused_at: float | None
    pause_mode: str | None
    still: dict[str, int]     # who of its tree was stopped before it was paused, pid and start: see standstill.py
    not_permitted: list[Json]  # who of its tree the server tried to signal and may not: pid, command, signal
    exit: Json | None
    began: float              # monotonic seconds at which the attempt started; holds within one boot
    ending: Json | None       # why and how far the attempt is being ended: reason, by, rung, at (monotonic), grace_secs
    signalled: dict[str, str]  # signals that clients sent to the attempt, by number, and who did

    stdin_file: int           # see stdin.py
    stdin_end: int
    stdin_closing: bool
    told: dict[str, list[int]]  # see losses.py
    capped: dict[str, int]      # see segments.py
    _fixed: tuple[object, ...]

    def __init__(self, agent_id: str, output: OutputLog, record: Json) -> None:
        self.id, self.output = agent_id, output
        self.run: Run | None = None
        self.adopted = False               # its leader is the keeper's child, since a core of before has died
        self.cursors: dict[str, int] = {}  # for readers that name no offset
        self.reported = 0                  # bytes of output that a heartbeat has told of
        self.unknown = {key: value for key, value in record.items() if key not in STORED}
        self._json, self._spans = "", ((0, 0), (0, 0))
        self._fixed, self._fixed_text = (), ""
        for key in STORED:
            setattr(self, key, record[key])
        output.recall(self.capped)

    def texts(self) -> tuple[str, str]:
        """Return what is stored, as JSON in two objects: what hardly ever changes, with the fields that another version
        wrote (the same text while it has not), and what does."""
        fixed = tuple([getattr(self, key) for key in FIXED])
        if not self._fixed or any(new is not old for new, old in zip(fixed, self._fixed)):
            self._fixed, self._fixed_text = fixed, encode_text({**self.unknown, **dict(zip(FIXED, fixed))})
        return self._fixed_text, encode_text({key: getattr(self, key) for key in _CHANGING})

    @property
    def stage(self) -> tuple[object, ...]:
        """What says whether and where it runs."""
        return self.status, self.want, self.attempt, self.pid

    def check(self) -> None:
        """Raise `ValueError` for a record from the registry that cannot be what we wrote."""
        for key, types in STORED.items():
            if not isinstance(getattr(self, key), types):
                raise ValueError(f"its {key} is {getattr(self, key)!r:.60}")
        if self.status not in lifecycle.ALIVE | lifecycle.TERMINAL:
            raise ValueError(f"its status is {self.status!r:.60}")

    # ------------------------------------------------------------ status

    def step(self, given: str) -> str:
        """Move along the table; return the status before. Raises `lifecycle.InvalidTransition`."""
        before, self.status = self.status, lifecycle.step(self.status, given)
        self.changed()
        return before

    def forget_attempt(self) -> None:
        """Keep nothing of the attempt before, when another one is to begin. A core that dies before the new attempt's
        pid is on disk leaves this record to the next core."""
        self.started_at = self.pid = self.start = self.ending = self.exit = self.finished_at = None
        self.began, self.signalled, self.still, self.stdin_closing = 0.0, {}, {}, False
        self.not_permitted = []

    @property
    def alive(self) -> bool:
        """Whether a process of it exists."""
        return self.status in lifecycle.ALIVE

    @property
    def terminal(self) -> bool:
        """Whether it has ended, until it is restarted."""
        return self.status in lifecycle.TERMINAL

    def changed(self) -> None:
        """Forget the listed form, after any change of a field."""
        self._json = ""

    # ------------------------------------------------------------ on the wire

    def info(self) -> Json:
        """Return the agent as the protocol's AgentInfo."""
        return {
            "id": self.id, "name": self.name, "status": self.status, "model_backend": self.model_backend,
            "started_at": _stamp(self.started_at), "task": self.task, "paused_at": _stamp(self.paused_at),
            "pause_mode": self.pause_mode, "attach_info": self._attach_info(), "want": self.want, "pid": self.pid,
            "attempt": self.attempt, "created_at": _stamp(self.created_at), "finished_at": _stamp(self.finished_at),
            "exit": self.exit, "labels": self.labels, "metadata": self.metadata, "command": self.command,
            "cwd": self.cwd, "stdin": self.stdin, "pty": self.pty, "activity": None, "output": self.kept(),
            "not_permitted": self.not_permitted}

    def _attach_info(self) -> Json | None:
        """What a person can do to see its terminal, while there is one."""
        return {"command": f"agentserver attach {self.id}"} if self.stdin == "pty" and not self.terminal else None

    def info_json(self) -> str:
        """Return `info` as JSON text, from memory while nothing has changed: lists are asked for often."""
        spans = self._output_spans()
        if not self._json or self._spans != spans:
            self._json, self._spans = encode_text(self.info()), spans
        return self._json

    def kept(self) -> Json:
        """Return which bytes of its output are kept."""
        return {stream: {"first_offset": first, "end_offset": end}
                for stream, (first, end) in zip(("stdout", "stderr"), self._output_spans())}

    def _output_spans(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.output.span("stdout"), self.output.span("stderr")

    def label(self) -> str:
        """Return what a sentence calls it."""
        return f"agent {self.name!r} ({self.id[:8]})" if self.name else f"agent {self.id}"


def _stamp(unix: float | None) -> str | None:
    return None if unix is None else rfc3339(unix)


def new_record(**known: Any) -> Json:
    """Return the record of an agent that was just asked for."""
    record: Json = {key: None for key in STORED}
    record.update({"status": lifecycle.IDLE, "want": "up", "attempt": 1, "boot": "", "finish": "", "began": 0.0,
                   "tag": 0, "not_permitted": [], "still": {}, "signalled": {}, "stdin_file": 0, "stdin_end": 0,
                   "stdin_closing": False, "told": {}, "capped": {}, **known})
    return record
