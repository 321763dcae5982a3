"""Output that is gone, told as events: the oldest dropped for the cap, or bytes that the disk did not take.

Owns:    which losses were told (kept in the agent's record, so that a new core tells what a dead one could not),
         and the pause between two such events of one agent, so that a flood does not flush the history.
Runs in: the core's thread.
Unaware: of why output is dropped (output.py) and of who listens (feed.py).
"""
from __future__ import annotations

from typing import Callable, NamedTuple

from .agent import Agent
from .feed import Feed
from .reactor import Reactor, Timer
from .run import STREAMS
from .segments import DISK, OUTPUT_CAP, UNKNOWN

LEAST_SECS = 1.0   # between two events of one agent
_WHY = {OUTPUT_CAP: "were dropped: the oldest output goes when output_cap_bytes are full",
        UNKNOWN: "are gone: dropped for output_cap_bytes, or not recorded by a full disk; the core that knew has died"}
MOST_SECS = 60.0   # the same while an agent goes on losing output: each pause is twice as long as the one before


class Loss(NamedTuple):
    """Bytes that can no longer be read, or never could."""

    stream: str
    start: int
    stop: int
    oldest: bool    # they lie before all that is kept; else between kept ones, or at the end
    reason: str     # see segments.py


class Losses:
    """See the module. `save` puts an agent's record on disk; `say` writes a log; while `waiting()` tells that the
    registry cannot be written, nothing is told: it is not forgotten."""

    def __init__(self, reactor: Reactor, feed: Feed, save: Callable[[Agent], None], waiting: Callable[[], bool],
                 say: Callable[[str], None]) -> None:
        self._reactor, self._feed, self._save, self._waiting, self._say = reactor, feed, save, waiting, say
        self._pauses: dict[str, Timer] = {}  # of the agents of which something was told lately

    def look(self, agent: Agent) -> None:
        """Tell what an agent has lost since somebody looked; a little later if it was told of just before."""
        if agent.id not in self._pauses:
            self._tell(agent, LEAST_SECS)

    def forget(self, agent: Agent) -> None:
        """The agent is to be forgotten."""
        timer = self._pauses.pop(agent.id, None)
        if timer is not None:
            timer.cancel()

    def _tell(self, agent: Agent, pause: float) -> None:
        """Tell one loss, and look again after a pause; with nothing to tell, the next one is told at once."""
        self._pauses.pop(agent.id, None)
        loss = next(iter(untold(agent)), None)
        if loss is None:
            return
        if not self._waiting():
            self._event(agent, loss)
        longer = min(2 * pause, MOST_SECS)
        self._pauses[agent.id] = self._reactor.after(pause, lambda: self._tell(agent, longer))

    def _event(self, agent: Agent, loss: Loss) -> None:
        kind, why = ("status_changed", _WHY[loss.reason]) if loss.reason in _WHY else (
            "error", f"could not be recorded: {agent.output.trouble or 'the disk was full, or failed'}")
        message = f"{loss.stop - loss.start} bytes of {loss.stream} from offset {loss.start} on {why}"
        if kind == "error":
            self._say(f"{agent.label()}: {message}")
        front, gap = agent.told.get(loss.stream, (0, 0))
        agent.capped = agent.output.capped
        agent.told = {**agent.told, loss.stream: [loss.stop, gap] if loss.oldest else [front, loss.stop]}
        self._save(agent)
        self._feed.agent_event(agent.id, kind, agent.status, message, {"output_dropped": {
            "stream": loss.stream, "from_offset": loss.start, "to_offset": loss.stop,
            "reason": loss.reason}})


def untold(agent: Agent) -> list[Loss]:
    """Return what is gone of an agent's output and was not told; what could not be recorded first."""
    found = []
    for stream in STREAMS:
        front, gap = agent.told.get(stream, (0, 0))
        first, _end = agent.output.span(stream)
        found += [Loss(stream, start, stop, False, DISK) for start, stop in agent.output.gaps(stream, gap)]
        if first > front:
            reason, stop = agent.output.gone(stream, front)
            found.append(Loss(stream, front, stop, True, reason))
    return sorted(found, key=lambda loss: loss.oldest)
