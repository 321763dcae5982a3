"""Trees that are to stand still: SIGSTOP to all of it, step by step, until all of it is seen to.

Owns:    the order in which a tree is stopped, and the replies that wait until it is.
Runs in: the core's thread, as a task of the scheduler for all trees together; nothing waits.
Unaware: of requests, and of why a tree is stopped or when it goes on.

At a terminal each is stopped only when its parent is seen to stand still: a shell that sees its job stop takes the
terminal from it when it goes on. A process may fork while it is being stopped, so all are looked for again at the end.
"""
from __future__ import annotations

from signal import SIGSTOP
from typing import Callable, Generator

from . import lifecycle, tree
from .agent import Agent
from .family import Family
from .pending import Pending
from .reactor import Reactor
from .rounds import each
from .scheduler import Scheduler, Task
from .tree import Proc

STEP_SECS = 0.001   # between two looks at a tree, or four times what a look costs, if that is longer
PARENTS_SECS = 0.1  # at most, for parents at a terminal to stand still before their children are stopped
MOST_SECS = 0.2     # then the reply goes out: what still moves cannot be stopped now (vfork(2), a dead disk)
REMEMBERED_MOST = 1000  # processes of a tree that stood still before
STILL = "TtZX"      # states in /proc/PID/stat of what stands still or is dead


class _Tree:
    """One tree, as it was seen last."""

    __slots__ = ("agent", "due", "known", "since")

    def __init__(self, agent: Agent, since: float) -> None:
        self.agent, self.since, self.due = agent, since, since
        self.known: list[Proc] = []


class Standstill:
    """See the module. `save(agent)` puts on disk who of a tree was stopped by us after all."""

    def __init__(self, reactor: Reactor, scheduler: Scheduler, family: Family,
                 save: Callable[[Agent], None]) -> None:
        self._reactor, self._scheduler, self._family, self._save = reactor, scheduler, family, save
        self._task: Task | None = None
        self._began = 0.0  # when the steps at work began
        self._trees: dict[str, _Tree] = {}  # those that may still move, by agent
        self._begun: set[str] = set()       # for the request that is being handled
        self._held: list[tuple[set[str], Pending, bytes]] = []

    def before(self, agent: Agent) -> dict[str, int]:
        """Return who of a tree stands still already, pid and start: a shell's stopped jobs."""
        still = [proc for proc in _now(self._family.whole(agent)) if proc.state == "T" and proc.pid != agent.pid]
        return {str(proc.pid): proc.start for proc in still[:REMEMBERED_MOST]}

    def begin(self, agent: Agent) -> None:
        """Stop a tree, for the request that is being handled."""
        self._begun.add(agent.id)
        self.stop(agent)

    def stop(self, agent: Agent) -> None:
        """Stop what moves of a tree, also where a core before us could not stop it to the end."""
        if not self._family.sees:
            self._family.signal(agent, SIGSTOP)
            return
        self._trees[agent.id] = moving = _Tree(agent, self._reactor.clock())
        self._step(moving)
        self._work()

    def take(self) -> set[str]:
        """Return whose trees were stopped since this was asked last: a request that is handled in steps keeps them
        from one to the next, so that no other request is held for them."""
        begun, self._begun = self._begun, set()
        return begun

    def give_back(self, begun: set[str]) -> None:
        """Take back what `take` returned, for the end of the request."""
        self._begun |= begun

    def hold(self, reply: bytes) -> bytes | Pending:
        """Return the reply to the request that was handled, or a promise of it while what it stops still moves."""
        if not self._begun:
            return reply
        begun, self._begun = self._begun & self._trees.keys(), set()
        if not begun:
            return reply
        promise = Pending(lambda: None)
        self._held.append((begun, promise, reply))
        return promise

    # ------------------------------------------------------------ steps

    def _work(self) -> None:
        """Look after all trees that may still move."""
        if self._trees and (self._task is None or self._task.done):
            self._task = self._scheduler.add("", self._steps())

    def _steps(self) -> Generator[None, None, None]:
        now = self._began = self._reactor.clock()
        due = [self._trees[agent_id].agent for agent_id in list(self._trees) if self._trees[agent_id].due <= now]
        yield from each(due, self._look_after, self._reactor, "the pause of an agent")
        if self._trees:
            self._reactor.at(min(moving.due for moving in self._trees.values()), self._work)

    def _look_after(self, agent: Agent) -> None:
        moving = self._trees.get(agent.id)
        self._family.recent(self._began)
        if moving is not None:  # else it went on meanwhile
            self._step(moving)

    def _step(self, moving: _Tree) -> None:
        agent, now = moving.agent, self._reactor.clock()
        if not _to_stand_still(agent) or self._stands_still(moving, now - moving.since):
            del self._trees[agent.id]
            self._release(agent.id)
            return
        later = self._reactor.clock()
        moving.due = later + max(STEP_SECS, 4 * (later - now))

    def _stands_still(self, moving: _Tree, secs: float) -> bool:
        """Stop who can be stopped now; return whether there is nobody, or no time, left."""
        agent = moving.agent
        left = _moving(moving.known)
        if not left:
            moving.known = self._family.whole(agent)
            left = _moving(moving.known)
        above = {proc.pid for proc in left} if agent.stdin == "pty" and secs < PARENTS_SECS else set()
        for proc in left:
            if proc.parent not in above and tree.send(proc, SIGSTOP) == tree.SENT:
                self._is_ours(agent, proc)
        return not left or secs >= MOST_SECS

    def _is_ours(self, agent: Agent, proc: Proc) -> None:
        """Whoever was let go on by others just before, and was stopped by us now, goes on with the others."""
        if str(proc.pid) in agent.still:
            del agent.still[str(proc.pid)]
            self._save(agent)

    def _release(self, agent_id: str) -> None:
        """Let the replies go that waited for this tree last."""
        for waiting, _promise, _reply in self._held:
            waiting.discard(agent_id)
        ready = [held for held in self._held if not held[0]]
        self._held = [held for held in self._held if held[0]]
        for _waiting, promise, reply in ready:
            promise.complete(reply)


def _now(procs: list[Proc]) -> list[Proc]:
    """Return them as they are at this moment: a look at all of /proc may be older than what was done in this turn."""
    return [now for proc in procs if (now := tree.look(proc.pid)) is not None and now.start == proc.start]


def _moving(procs: list[Proc]) -> list[Proc]:
    return [proc for proc in _now(procs) if proc.state not in STILL]


def _to_stand_still(agent: Agent) -> bool:
    """Whether nothing has happened to an agent that lets it go on."""
    return (agent.status == lifecycle.PAUSED and agent.ending is None
            and agent.run is not None and agent.run.ended is None)
