"""One deed for many agents, in steps: what fails for one of them costs no other.

Owns:    the loop over agents that everything uses which concerns many: ends, stops, heartbeats, retention.
Runs in: the core's thread, as a task of the scheduler.
Unaware: of what the deed is.
"""
from __future__ import annotations

from typing import Callable, Generator, Iterable

from .agent import Agent
from .reactor import Reactor
from .scheduler import Pace


def each(agents: Iterable[Agent], deed: Callable[[Agent], object], reactor: Reactor,
         what: str) -> Generator[None, None, None]:
    """Yield between two steps, each of many agents or of one. `agents` may be an iterator that gives who came since."""
    pace = Pace(reactor.clock)
    for agent in agents:
        reactor.guard(what, deed, agent)
        if pace.over():
            yield
            pace.begin()
