"""Going on with the agents that a core before us left: adopt, start after all, or record as lost.

Owns:    what becomes of each agent of the registry at a core's start, and watching over leaders of which
         nobody of ours is the parent any more.
Runs in: the core's thread.
Unaware: of how it is found out what is left of an agent (takeover.py).

First start, a crash of the core and its upgrade are this one path.
"""
from __future__ import annotations

import os
import time
import traceback
from typing import Callable

from ..errors import RequestError
from . import lifecycle, pidfd, process, tree
from .agent import Agent, new_record
from .ending import LEFT_ALONE, UNKILLABLE, exit_record
from .family import Family
from .losses import untold
from .reactor import READ, Reactor
from .registry import Registry, Row
from .run import Run
from .supervisor import SERVER, Supervisor
from .takeover import Found, Inheritance, Keeper, TakeOver
from .unlisted import Unlisted
from .witness import Witness

STRANGER_TRIES = 50
SIGN_AGENTS = 100  # that are taken over, from one sign of life to the next
UNSEEN_SECS = 5.0  # for the keeper to tell how a process ended that was gone when a new core came
AGAIN_SECS = 0.5   # between two tries to begin what was asked for, while the registry cannot be written
HANDED_SECS = 0.02  # between two looks at whether a dead process's children have been handed over
LOOK_SECS = 1.0    # between two looks at a leader where the system has no pidfd
UNKNOWN = process.Ended(None, None, None, None)


class Adoption:
    """See the module."""

    def __init__(self, supervisor: Supervisor, registry: Registry, reactor: Reactor, family: Family,
                 keeper: Keeper, say: Callable[[str], None]) -> None:
        self._supervisor, self._registry, self._reactor = supervisor, registry, reactor
        self._family, self._keeper, self._say = family, keeper, say
        self._unlisted = Unlisted(supervisor.config, registry, supervisor.boot, supervisor.directory, supervisor.output,
                                  lambda asked: supervisor.starting.plan(asked).finish, reactor.clock)
        self._unreadable: dict[str, tuple[Row, str]] = {}

    # ------------------------------------------------------------ at the start

    def load(self, left: Inheritance, witness: Witness) -> None:
        """Take over what the registry knows and the keeper held."""
        supervisor = self._supervisor
        supervisor.enter(self._known())
        taken = TakeOver(left, supervisor.boot, witness, self._keeper)
        self._list(taken)
        live = [agent for agent in supervisor.agents.values() if not agent.terminal]
        live.sort(key=lambda agent: agent.pid is None)  # whose pid is known takes its end first
        for number, agent in enumerate(live):
            if number % SIGN_AGENTS == 0:
                self._keeper.busy()
            try:
                self._take_over(agent, taken)
            except Exception:  # one that cannot be gone on with must not keep the others from it
                self._say(f"{agent.label()} cannot be gone on with: {traceback.format_exc()}")
                self._lost(agent, taken.remains(agent))
        for agent_id in taken.unclaimed():
            self._keeper.release(agent_id, [])
        supervisor.retain()
        for agent_id in supervisor.agents:
            supervisor.output_lost(agent_id)  # what the core before us could not tell any more

    def _known(self) -> list[Agent]:
        """Return the agents of the registry; what cannot be one is put aside."""
        known = []
        for row in self._registry.agents():
            try:
                if row.record is None:
                    raise ValueError(row.why)
                agent = Agent(row.id, self._supervisor.output(row.id), {**new_record(), **row.record})
                agent.check()
                untold(agent)
            except Exception as e:
                self._unreadable[row.id] = row, str(e) or repr(e)
            else:
                known.append(agent)
        return known

    def _list(self, taken: TakeOver) -> None:
        """Enter agents that run and have no record that can be read, and put unreadable records aside."""
        supervisor = self._supervisor
        found = self._unlisted.find(taken, supervisor.agents, self._unreadable)
        listed = {agent.id for agent in found}
        for agent_id, (row, why) in self._unreadable.items():
            self._registry.quarantine(row, why, forget=agent_id not in listed)
        self._unreadable.clear()
        for agent in found:
            supervisor.admit(agent)
            if agent.pid is None:
                self._supervisor.started(agent)
                run = supervisor.run(agent, taken.rest(agent.id), -1)
                run.drain()
                run.close()
                self._lost(agent, taken.remains(agent), "its record was lost, and nothing of it can be gone on with")
            else:
                self._supervisor.found(agent)

    def _take_over(self, agent: Agent, taken: TakeOver) -> None:
        """Go on with an agent where a core before us had to stop; what cannot be gone on with is ended and recorded."""
        found = taken.claim(agent)
        if found is None:
            self._lost(agent, taken.remains(agent))
        elif found.pid == 0:  # asked for and durable, but never started
            self._begin_again(agent)
        elif found.pid < 0:  # it began and ended, and which of the ends was its own nobody can tell
            self._supervisor.started(agent)
            self._take_output(agent, found)
            self._lost(agent, [])
        else:
            self._go_on(agent, found)
            if found.pidfd >= 0:
                self._watch_pidfd(agent, found.pidfd)
                self._foster(taken.survivors(agent))
            else:
                self._watch_stranger(agent)

    def _go_on(self, agent: Agent, found: Found) -> None:
        fresh = agent.status == lifecycle.INITIALIZING
        agent.pid, agent.start, agent.adopted = found.pid, found.start, True
        agent.started_at = agent.started_at or time.time()
        agent.began = agent.began or self._since(found.start)
        self._supervisor.attend(agent, found.ends, found.stdin_file)
        if fresh:
            self._supervisor.started(agent)
        ending = self._supervisor.ending
        if agent.ending is not None and "rung" in agent.ending:
            ending.go_on(agent)
        if agent.status == lifecycle.PAUSED:  # its tree may have been stopped in part only
            self._reactor.after(0, lambda: self._supervisor.standstill.stop(agent))
        ended = found.ended
        if ended is not None:
            self._reactor.after(0, lambda: ending.departed(found.pid, 0, ended))
        elif not found.seen and found.pidfd < 0:
            self._reactor.after(UNSEEN_SECS, lambda: self._never_seen(agent))

    def _since(self, start: int | None) -> float:
        """Return when a process was started, by our clock, where the core that started it could not write that down."""
        age = max(0.0, tree.ticks_now() - start) / tree.TICKS if start else 0.0
        return self._reactor.clock() - age

    def _take_output(self, agent: Agent, found: Found) -> None:
        """Record what waits in pipes or terminal, of an agent of which nothing else is left."""
        run = self._supervisor.run(agent, found.ends, found.stdin_file)
        run.drain()
        run.close()

    def _begin_again(self, agent: Agent) -> None:
        if not self._registry.commit():  # a full disk: nobody was told that it would run, so that it can wait
            self._reactor.after(AGAIN_SECS, lambda: self._begin_again(agent))
            return
        try:
            self._supervisor.start_again(agent, SERVER)
        except RequestError:  # why is in its record
            pass

    def _never_seen(self, agent: Agent) -> None:
        """Its process was gone before we came, and nobody tells how it ended: say so, rather than guess."""
        if not self._family.sees and process.leads_session(agent.pid or 0):  # the keeper tells when it ends
            return
        if agent.run is not None and agent.run.ended is None and agent.pid is not None and tree.look(agent.pid) is None:
            self._family.reaped(agent.pid)
            self._family.remove(agent)
            self._supervisor.ending.close(agent)
            self._lost(agent, tree.marked().get(agent.id, []) + tree.tagged().get(agent.tag, []))

    def _lost(self, agent: Agent, left: list[tree.Proc],
              why: str = "the server died together with what it held of the agent") -> None:
        """End what is left of an agent that nothing was held of, and record it. Its output so far is kept."""
        kill = self._supervisor.config.orphans == "kill"
        named = {proc.pid: {"pid": proc.pid, "command": tree.command_of(proc.pid)} for proc in left}
        living = {proc.pid for proc in (tree.end(left) if kill else tree.living(left))}
        reason = UNKILLABLE if kill else LEFT_ALONE
        leaked = [named[pid] for pid in named if pid not in living and pid != agent.pid]
        survivors = [{**named[pid], "why": reason} for pid in named if pid in living]
        agent.want = "down"
        duration = max(0.0, self._reactor.clock() - agent.began if agent.boot == self._supervisor.boot and agent.began
                       else time.time() - (agent.started_at or agent.created_at))
        self._supervisor.on_end(agent, lifecycle.LOST,
                                exit_record("lost", "server", duration, None, leaked, survivors),
                                f"{why}; what was left of it was "
                                + ("ended" if kill and not living else "left alone" if not kill else
                                   "to be ended, and could not be"))

    # ------------------------------------------------------------ leaders that are nobody's child of ours

    def keeper_lost(self) -> None:
        """The keeper has died: of what it had adopted, init is the parent now, or will be in a moment. What the keeper
        knew and did not tell nobody knows any more."""
        for agent in self._supervisor.live:
            run, pid = agent.run, agent.pid
            if agent.adopted and run is not None and run.ended is None and run.pidfd is None and pid is not None:
                fd, proc = pidfd.open_pidfd(pid), tree.look(pid)
                there = proc is not None and proc.start == agent.start
                if fd >= 0 and there:
                    self._watch_pidfd(agent, fd)
                elif fd >= 0:
                    os.close(fd)
                if fd < 0 or not there:
                    self._look_again(agent, run)
                self._foster_after(agent, self._keeper.pid)

    def _foster_after(self, agent: Agent, dead: int) -> None:
        """Note who took in a leader, or else what it left, once its dead parent has handed them over."""
        proc = tree.look(agent.pid or 0)
        left = [proc] if proc is not None and proc.start == agent.start else tree.marked().get(agent.id, [])
        if any(proc.parent == dead for proc in left):
            self._reactor.after(HANDED_SECS, lambda: self._foster_after(agent, dead))
        else:
            self._foster(left)

    def _watch_stranger(self, agent: Agent) -> None:
        """Watch a leader by pidfd when neither we nor the keeper are its parent, so that nobody tells us of its end."""
        run, proc = agent.run, tree.look(agent.pid or 0)
        if run is None or run.pidfd is not None or run.ended is not None or agent.pid is None:
            return
        if proc is None or proc.start != agent.start or proc.parent in (self._keeper.pid, os.getpid()):
            return
        self._family.foster(proc.parent)
        fd = pidfd.open_pidfd(agent.pid)
        if fd >= 0:
            self._watch_pidfd(agent, fd)
        else:
            self._look_again(agent, run)

    def _watch_pidfd(self, agent: Agent, fd: int) -> None:
        run = agent.run
        assert run is not None
        run.pidfd = self._reactor.watch(fd, READ, lambda _mask: self._stranger_ended(agent, run, fd, 0))

    def _foster(self, left: list[tree.Proc]) -> None:
        """Note who took in what is left of an agent, be its leader alive or not."""
        pids = {proc.pid for proc in left}
        for proc in left:
            if proc.parent not in pids:
                self._family.foster(proc.parent)

    def _look_again(self, agent: Agent, run: Run) -> None:
        """Without a pidfd (before Linux 5.3, Python 3.9) only looking tells, and nothing tells how it ended."""
        if agent.run is not run or run.ended is not None or agent.pid is None:
            return
        proc = tree.look(agent.pid)
        if proc is None or proc.start != agent.start or not proc.lives:
            self._supervisor.ending.departed(agent.pid, agent.start or 0, UNKNOWN)
        else:
            self._reactor.after(LOOK_SECS, lambda: self._look_again(agent, run))

    def _stranger_ended(self, agent: Agent, run: Run, fd: int, tries: int) -> None:
        """It has ended; how, the kernel tells once its parent has reaped it, if it tells at all."""
        if run.pidfd is None or agent.run is not run or agent.pid is None:
            return
        self._reactor.change(run.pidfd, 0)
        ended = pidfd.how_it_ended(fd) if tries else None  # the keeper, if it is the parent now, tells more in a moment
        if ended is None and tries < STRANGER_TRIES:
            self._reactor.after(UNSEEN_SECS / STRANGER_TRIES,
                                lambda: self._stranger_ended(agent, run, fd, tries + 1))
            return
        self._supervisor.ending.departed(agent.pid, agent.start or 0, ended or UNKNOWN)
