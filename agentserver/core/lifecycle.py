"""The life of one agent, as a table.

Owns:    the statuses, the inputs and the only function that moves between them.
Runs in: any thread; it is pure.
Unaware: of processes, clocks, sockets and policy. Whether to restart is not decided here.

A pair that is missing from the table *is* the error: nothing else forbids a transition.
"""
from __future__ import annotations

from typing import Final

IDLE: Final = "idle"                  # created, waiting for a slot
INITIALIZING: Final = "initializing"  # being started
RUNNING: Final = "running"
THINKING: Final = "thinking"          # running, and its backend says that it is reasoning
PAUSED: Final = "paused"
COMPLETED: Final = "completed"        # ended by itself with success
FAILED: Final = "failed"              # not started again, ended without success, or lost
TERMINATED: Final = "terminated"      # ended because a client, a limit or the server ended it

START: Final = "start"
STARTED: Final = "started"
NOT_STARTED: Final = "not_started"
THINK: Final = "think"
ACT: Final = "act"
PAUSE: Final = "pause"
RESUME: Final = "resume"
STOP: Final = "stop"
EXITED_OK: Final = "exited_ok"
EXITED_BAD: Final = "exited_bad"
ENDED_BY_US: Final = "ended_by_us"
LOST: Final = "lost"
RESTART: Final = "restart"

STATUSES: Final = (IDLE, INITIALIZING, RUNNING, THINKING, PAUSED, COMPLETED, FAILED, TERMINATED)
INPUTS: Final = (START, STARTED, NOT_STARTED, THINK, ACT, PAUSE, RESUME, STOP,
                 EXITED_OK, EXITED_BAD, ENDED_BY_US, LOST, RESTART)
TERMINAL: Final = frozenset((COMPLETED, FAILED, TERMINATED))
#: statuses in which a process of the agent exists
ALIVE: Final = frozenset((INITIALIZING, RUNNING, THINKING, PAUSED))

_ENDS = {EXITED_OK: COMPLETED, EXITED_BAD: FAILED, ENDED_BY_US: TERMINATED, LOST: FAILED}

TRANSITIONS: Final[dict[tuple[str, str], str]] = {
    (IDLE, START): INITIALIZING,
    (IDLE, STOP): TERMINATED,
    (INITIALIZING, STARTED): RUNNING,
    (INITIALIZING, NOT_STARTED): FAILED,
    (RUNNING, THINK): THINKING,
    (RUNNING, PAUSE): PAUSED,
    (THINKING, ACT): RUNNING,
    (THINKING, PAUSE): PAUSED,
    (PAUSED, RESUME): RUNNING,
    **{(status, end): after for status in sorted(ALIVE) for end, after in _ENDS.items()},
    **{(status, RESTART): INITIALIZING for status in sorted(TERMINAL)},
}


class InvalidTransition(Exception):
    """The input does not fit the status; nothing was changed."""


def step(status: str, given: str) -> str:
    """Return the status that follows `status` on `given`, or raise `InvalidTransition`."""
    try:
        return TRANSITIONS[status, given]
    except KeyError:
        raise InvalidTransition(f"{given} does not fit an agent that is {status}") from None
