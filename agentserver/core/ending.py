"""How an agent ends: the stop ladder, the exit, what is left of its tree, the exit record.

Owns:    the rungs (own way to finish, SIGTERM, SIGKILL) and the order of things at an exit.
Runs in: the core's thread; each rung is started here and finished by a deadline or a SIGCHLD.
Unaware: of requests and of what happens to an agent after its end.

At an exit: reap the leader, take over what the pipes hold, find who is left of the tree, name and
kill them, and only when they are gone record the end. So "ended" means that nothing of it runs.
"""
from __future__ import annotations

import time
from signal import SIGCONT, SIGINT, SIGKILL, SIGTERM
from typing import Callable, Iterable

from ..wire import Json, rfc3339
from . import lifecycle, process, tree
from .agent import Agent
from .family import Family
from .process import Ended
from .reactor import Reactor
from .run import Cause, Run
from .tree import Proc

AGAIN_SECS = 1.0  # SIGKILL is repeated at this pace while something of a tree is left (D state, fork races)
LEAKED_MOST = 1000  # of a tree that are named in an exit record
LEFTOVER_SECS = 5.0  # the end is recorded after this time though something unkillable is left


class Ending:
    """See the module. `ended(agent, given, record)` gets the input for the table and the exit record."""

    def __init__(self, reactor: Reactor, family: Family, drain_secs: float, finish_secs: float,
                 ended: Callable[[Agent, str, Json], None], say: Callable[[str], None]) -> None:
        self._reactor, self._family, self._ended, self._say = reactor, family, ended, say
        self._drain_secs, self._finish_secs = drain_secs, finish_secs
        self._parting: dict[str, Agent] = {}  # leader gone, others of the tree not yet

    # ------------------------------------------------------------ the ladder

    def begin(self, agent: Agent, cause: Cause, grace_secs: float) -> None:
        """Start the ladder. The first cause stays the cause; a later, shorter grace still counts."""
        run = agent.run
        assert run is not None
        first, run.cause = run.cause is None, run.cause or cause
        if first and agent.finish == "close_stdin" and run.stdin_open:
            run.close_stdin()
        elif first and agent.finish == "sigint":
            self._family.signal(agent, SIGINT)
        else:
            self._terminate(agent, grace_secs)
            return
        if agent.status == lifecycle.PAUSED:
            self._family.signal(agent, SIGCONT)
        self._next(agent, self._finish_secs, lambda: self._terminate(agent, grace_secs))

    def _next(self, agent: Agent, secs: float, rung: Callable[[], None]) -> None:
        run = agent.run
        assert run is not None
        if run.ladder is not None:
            run.ladder.cancel()
        run.ladder = self._reactor.after(secs, rung)

    def _terminate(self, agent: Agent, grace_secs: float) -> None:
        self._family.signal(agent, SIGTERM)
        self._family.signal(agent, SIGCONT)  # a stopped process acts on SIGTERM only when it goes on (signal(7))
        run, now = agent.run, self._reactor.clock()
        assert run is not None
        run.kill_at = min(run.kill_at, now + grace_secs)  # a later stop cannot put the SIGKILL off
        self._next(agent, run.kill_at - now, lambda: self.kill(agent, None))

    def kill(self, agent: Agent, cause: Cause | None) -> None:
        """SIGKILL the whole tree, and again while something of it is left."""
        run = agent.run
        if run is None or run.ended is not None:
            return
        run.cause = run.cause or cause
        self.name(agent)
        self._family.signal(agent, SIGKILL)
        self._next(agent, AGAIN_SECS, lambda: self.kill(agent, None))

    def name(self, agent: Agent) -> None:
        """Note who is alive beside the leader, while there is still a command line to read."""
        run = agent.run
        assert run is not None
        _note(run, self._family.members([agent])[agent.id])

    # ------------------------------------------------------------ the exit

    def reap(self) -> None:
        """Collect every child that ended: leaders, and orphans that came back to us."""
        gone = []
        family = self._family
        for pid in process.ended(family.leaders):
            agent = family.reaped(pid)
            if agent is None:
                process.reap(pid)
                continue
            if not family.sees:  # the group's number is ours only until its leader is reaped
                process.send_group(pid, SIGKILL)
            assert agent.run is not None
            agent.run.ended = process.reap(pid)
            gone.append(agent)
        if gone or self._parting:
            family.stale()
        for agent in gone:
            self._part(agent)
        for agent in list(self._parting.values()):
            self._clear(agent)

    def _part(self, agent: Agent) -> None:
        """The leader is gone; what it wrote is taken over, what it left is looked for."""
        run = agent.run
        assert run is not None
        for timer in (run.ladder, run.limit):
            if timer is not None:
                timer.cancel()
        run.drain()
        self._parting[agent.id] = agent
        run.ladder = self._reactor.after(LEFTOVER_SECS, lambda: self._give_up(agent))

    def _clear(self, agent: Agent) -> None:
        """Kill what is left of a tree; record the end when nothing is."""
        run = agent.run
        assert run is not None
        left = []
        if self._family.orphans():
            left = self._family.members([agent])[agent.id] + self._family.strays(agent)
        if not left:
            self._finish(agent)
            return
        _note(run, left)
        for proc in left:
            tree.send(proc, SIGKILL)
        if run.limit is not None:
            run.limit.cancel()
        run.limit = self._reactor.after(AGAIN_SECS / 10, self.reap)  # for those that are not our children yet

    def _give_up(self, agent: Agent) -> None:
        self._say(f"{agent.label()} has ended, but of its tree something cannot be killed; going on without")
        self._finish(agent)

    def _finish(self, agent: Agent) -> None:
        run = self._parting.pop(agent.id).run
        assert run is not None
        self._family.remove(agent)
        if run.drain():
            self.close(agent)
        else:  # someone else holds the pipe: read on for a moment, then let go
            run.ladder = self._reactor.after(self._drain_secs, lambda: self.close(agent))
        self._ended(agent, *verdict(run, self._reactor.clock()))

    def close(self, agent: Agent) -> None:
        """Let go of the pipes of an attempt that has ended."""
        if agent.run is not None:
            agent.run.close()
            agent.run = None


def _note(run: Run, procs: Iterable[Proc]) -> None:
    for proc in procs:
        if proc.pid not in run.leaked and len(run.leaked) < LEAKED_MOST:
            run.leaked[proc.pid] = tree.command_of(proc.pid)


def verdict(run: Run, clock: float) -> tuple[str, Json]:
    """Return what the end means for the lifecycle, and the exit record. The cause is who sent what, which we know."""
    ended = run.ended
    assert ended is not None
    number = ended.signal or (ended.code or 0) - 128  # 128+N: how a shell reports, and a program imitates, signal N
    given, reason, by = lifecycle.EXITED_BAD, "exited" if ended.signal is None else "signaled", None
    if run.cause is not None:
        given, (reason, by) = lifecycle.ENDED_BY_US, run.cause
    elif number in run.signalled:
        given, reason, by = lifecycle.ENDED_BY_US, "signaled", run.signalled[number]
    elif ended.code == 0:
        given = lifecycle.EXITED_OK
    return given, exit_record(reason, by, clock - run.started, ended,
                              [{"pid": pid, "command": command} for pid, command in run.leaked.items()])


def exit_record(reason: str, by: str | None, duration: float, ended: Ended | None, leaked: list[Json]) -> Json:
    """Return the exit record of the protocol; `ended` is None when nobody saw the end."""
    number = ended.signal if ended else None
    return {"code": ended.code if ended else None,
            "signal": process.signal_name(number) if number else None, "signal_number": number,
            "reason": reason, "by": by, "at": rfc3339(time.time()), "duration": round(duration, 6),
            "rusage": {"cpu_secs": round(ended.cpu_secs, 6), "max_rss_bytes": ended.max_rss_bytes} if ended else {},
            "leaked": leaked}
