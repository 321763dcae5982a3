"""`ps --watch`: the list again whenever something changes.

Owns:    when to ask and draw again, and the clearing of the screen.
Runs in: the main thread of a command, until Ctrl-C.
Unaware: of what a list looks like (agents.py).
"""
from __future__ import annotations

import signal
import time
from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterator

from ..wire import MAX_INT
from . import agents, connect, out, show
from .exits import OK, UsageError

if TYPE_CHECKING:
    from ..client import AgentClient

QUIET_SECS = 0.1  # between two lists, however much happens
_HOME_AND_CLEAR = b"\033[H\033[2J"  # not 3J: what scrolled away before is not ours


def watch(given: Namespace) -> int:
    """Show the list, and again after changes; with --json one list per line."""
    if not (given.json or show.is_terminal(1)):
        raise UsageError("`agentserver ps --watch` redraws a terminal, and stdout is none; use --json for a list per "
                         "line, or `agentserver events -f`")
    with connect.patient(given) as client, connect.patient(given) as listener:
        seen = _draw(client, given)
        with _again_on_signals(listener, given):
            for event in listener.follow_events(since=seen):
                if int(event.get("sequence") or 0) <= seen:
                    continue  # it was in the last list already
                time.sleep(QUIET_SECS)
                seen = _draw(client, given)
    return OK


@contextmanager
def _again_on_signals(client: AgentClient, given: Namespace) -> Iterator[None]:
    """Draw again when the terminal has another size, or was another job's meanwhile."""
    def draw(*_: Any) -> None:
        with connect.again(client, given) as another:  # in the middle of whatever the others are asked
            _draw(another, given)
    numbers = () if given.json else (signal.SIGWINCH, signal.SIGCONT)
    before = [(number, signal.signal(number, draw)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _draw(client: AgentClient, given: Namespace) -> int:
    """Print the list; return the number of the last event that it takes account of."""
    seen = last_sequence(client)
    infos = agents.found(client, given)
    if not given.json:
        out.write(1, _HOME_AND_CLEAR)
    agents.print_agents(infos, given.json)
    import sys
    sys.stdout.flush()
    return seen


def last_sequence(client: AgentClient) -> int:
    """Return the number of the newest event."""
    return client.events(since=MAX_INT, limit=1).next
