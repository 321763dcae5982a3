"""The way to the server, and from words to agents.

Owns:    how a command gets its client, how long it waits, and which agents it means.
Runs in: any thread of a command; each client belongs to the thread that made it.
Unaware: of links; the client chooses one from the address.
"""
from __future__ import annotations

import time
from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterator

from ..errors import RequestTimeout
from ..results import AgentInfo
from . import show
from .exits import UsageError

if TYPE_CHECKING:
    from ..client import AgentClient

ANSWER_SECS = 30.0
PAGE = 500
LOOK_SECS = 1.0
GRACE_SECS = 1.0
#: commands that wait for something else than a server
_NO_OTHER_END = ("replay", "send")


def connect(given: Namespace, answer_secs: float | None = None) -> AgentClient:
    """Return a client for the server that was named; `answer_secs` overrides how long one answer may take."""
    from ..client import AgentClient
    limit = ANSWER_SECS if given.timeout is None else max(given.timeout, 0.001)
    return AgentClient(given.server, timeout=answer_secs or limit, deadline=deadline(given))


def patient(given: Namespace) -> AgentClient:
    """Return a client for a command that waits or follows, and gives one answer no longer for a longer --timeout."""
    return connect(given, ANSWER_SECS)


def again(client: AgentClient, given: Namespace, **how: float) -> AgentClient:
    """Return another client to the same server, for another thread or with another patience."""
    from ..client import AgentClient
    return AgentClient(client.address, deadline=deadline(given), **{"timeout": ANSWER_SECS, **how})


def is_local(client: AgentClient) -> bool:
    """Whether the server runs on this machine for certain, so that paths mean the same there."""
    return client.address.startswith("unix:")


def deadline(given: Namespace) -> float | None:
    """Return the monotonic time at which --timeout is over: one for all that a command does. However short it is, there
    is the time to look once."""
    return None if given.timeout is None else float(given.begun + max(given.timeout, LOOK_SECS))


def left(given: Namespace) -> float | None:
    """Return how many seconds of --timeout are left, a little at least; `None` without one."""
    return None if given.timeout is None else max(round(given.begun + given.timeout - time.monotonic(), 2), 0.01)


class _Over(BaseException):
    """--timeout is over. Not an Exception: nothing on the way may take it for a trouble of its own."""


@contextmanager
def bounded(given: Namespace) -> Iterator[None]:
    """End a command when --timeout is over, wherever it waits: for a server, a person, a pipe that nobody reads.

    What waits for a server only ends by itself, with a better sentence; this is a little later then. An attachment has
    a clock of its own, because it has a terminal to give back. In the main thread only.
    """
    if given.subcommand == "attach" or getattr(given, "terminal", False):
        yield
        return
    import signal

    fired = []

    def over(*_: Any) -> None:
        fired.append(True)
        raise _Over
    before = signal.signal(signal.SIGALRM, over)
    grace = 0.0 if given.subcommand in _NO_OTHER_END else GRACE_SECS
    signal.setitimer(signal.ITIMER_REAL, max(given.timeout, 0.001) + grace)
    try:
        yield
    except BaseException:  # what it interrupted may have made another error of it, as an import does
        if not fired:
            raise
        raise RequestTimeout(f"`agentserver {given.subcommand}` was given {given.timeout:g} s; "
                             "they are over") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def chosen(client: AgentClient, given: Namespace, statuses: frozenset[str]) -> list[AgentInfo] | None:
    """Return the agents that --label or --all selects, or None where agents were named instead."""
    ways = bool(given.agents) + bool(given.label) + bool(given.every)
    if ways != 1:
        raise UsageError(f"`agentserver {given.subcommand}`: name agents, or select them with --label or with --all"
                         + ("; only one of the three" if ways else ""))
    if given.agents:
        return None
    return [info for info in listed(client, all=True, labels=dict(given.label)) if info.status in statuses]


def listed(client: AgentClient, status: str | None = None, all: bool = False,
           labels: dict[str, str] | None = None) -> list[AgentInfo]:
    """Return agents, oldest first, asked for page by page: one reply has a bound."""
    found: dict[str, AgentInfo] = {}
    offset = 0
    while True:
        page = client.list(status, all=all, labels=labels or None, limit=PAGE, offset=offset)
        found.update((info.id, info) for info in page)
        offset += len(page)
        if len(page) < PAGE:
            return list(found.values())


def label(info: AgentInfo) -> str:
    """Return what a person calls an agent: the start of its id and its name."""
    return f"{info.id[:8]} {show.clean(info.name)}".rstrip()


@contextmanager
def progress(what: str) -> Iterator[dict[str, Any]]:
    """Show on a terminal's stderr, after a second, what is being waited for and how long; erase it at the end.

    The dictionary's "what" may be changed meanwhile.
    """
    shared: dict[str, Any] = {"what": what}
    if not show.is_terminal(2):
        yield shared
        return
    import threading
    over = threading.Event()
    shower = threading.Thread(target=_tick, args=(shared, over), name="progress", daemon=True)
    shower.start()
    try:
        yield shared
    finally:
        over.set()
        shower.join()


def _tick(shared: dict[str, Any], over: Any) -> None:
    from .out import write
    began = time.monotonic()
    shown = False
    try:
        while not over.wait(1.0):
            line = f"{show.clean(shared['what'])}, {show.duration(int(time.monotonic() - began))}"
            write(2, f"\r\033[K{show.cut(line, max(show.terminal_columns(), 40) - 1)}".encode("utf-8", "replace"))
            shown = True
        if shown:
            write(2, b"\r\033[K")
    except OSError:
        pass
