"""Which processes belong to which agent.

Owns:    the leaders by pid, and what was learnt of descendants that lost their parent.
Runs in: the core's thread.
Unaware: of policy: it tells who is who, and signals whom it is told to.

A descendant whose parent died becomes our child (see tree.py). Whose it was is told by the mark in
its environment, else by its session, by the tag in its limits (inherited.py), by a pipe or the terminal
of the agent that it holds, or by an earlier sight of it. One that has cleared and changed all of this and
was never seen belongs to nobody until every agent that could have started it has ended; the last of those
takes it along.
"""
from __future__ import annotations

import os
from signal import SIGCONT, SIGHUP, SIGTERM
from typing import Callable, Iterable, Mapping

from . import process, tree
from .agent import Agent
from .process import Ended
from .takeover import Keeper
from .tree import Proc

NEVER = float("inf")  # no look at all processes is recent enough


class Family:
    """See the module. `leaders` are pids that were started and not yet reaped, with their agent."""

    def __init__(self, subreaper: bool, keeper: Keeper, parts: Callable[[], set[int]],
                 clock: Callable[[], float]) -> None:
        self.leaders: dict[int, Agent] = {}
        #: children that are no agent's but work for us, and whom to tell how they ended
        self.helpers: dict[int, Callable[[Ended], None]] = {}
        self._sessions: dict[int, Agent] = {}  # the leaders, and those reaped whose tree is not gone yet
        self._known: set[str] = set()          # ids of all these
        self._tags: dict[int, str] = {}        # their ids by the tag of their descendants
        self._given_up: set[tuple[int, int]] = set()  # who outlived its agent, as it could not be ended: pid and start
        self.sees = bool(tree.look(os.getpid()))  # is there a /proc?
        self._subreaper, self._keeper, self._parts = subreaper, keeper, parts
        self._fosters: set[int] = set()  # who became the parent of a leader: init, where a keeper died
        self._adopted: set[str] = set()  # ids of agents whose orphans go to the keeper
        self._owners: dict[tuple[int, int], str] = {}
        self._table: dict[int, Proc] = {}
        self._by_parent: dict[int, list[Proc]] = {}
        self._placed: dict[str, list[Proc]] | None = None  # orphans by agent, "": nobody's; of this table
        self._clock, self._looked_at, self._since = clock, 0.0, NEVER
        self._any_orphans: bool | None = None              # as far as it is known in this turn

    # ------------------------------------------------------------ coming and going

    def add(self, agent: Agent) -> None:
        """An agent was started: its pid leads a session."""
        assert agent.pid is not None
        self.leaders[agent.pid] = self._sessions[agent.pid] = agent
        self._known.add(agent.id)
        if agent.tag:
            self._tags[agent.tag] = agent.id
        if agent.adopted:
            self._adopted.add(agent.id)

    def reaped(self, pid: int) -> Agent | None:
        """A child was reaped; return whose leader it was."""
        return self.leaders.pop(pid, None)

    def helped(self, pid: int) -> Callable[[Ended], None]:
        """A child was reaped that was no leader; return whom to tell how it ended: nobody, if it was an orphan."""
        return self.helpers.pop(pid, lambda ended: None)

    def remove(self, agent: Agent) -> None:
        """Nothing of an agent is left."""
        assert agent.pid is not None
        self._sessions.pop(agent.pid, None)
        self._known.discard(agent.id)
        self._tags.pop(agent.tag, None)
        self._adopted.discard(agent.id)

    def give_up(self, procs: Iterable[Proc]) -> None:
        """These cannot be ended: no other agent is to answer for them."""
        self._given_up.update((proc.pid, proc.start) for proc in procs)

    def foster(self, pid: int) -> None:
        """A process that is not the server's became the parent of a leader, and will be that of its orphans."""
        self._fosters.add(pid)

    def _reapers(self) -> tuple[set[int], set[int]]:
        """Return to whom descendants come that lost their parent. First those all of whose children are ours: us, and
        for what a core before us started the keeper. Then those who have strangers among their children: init, be it
        the keeper itself in a container, or who else took a leader in."""
        ours, others = {os.getpid()}, set() if self._subreaper else {1}
        if self._adopted:
            (others if self._keeper.pid <= 1 else ours).add(self._keeper.pid)
            others |= self._fosters
        return ours, others - {0}

    # ------------------------------------------------------------ looking

    def stale(self) -> None:
        """Look again when next asked; called at the end of each turn."""
        self._since = NEVER
        self._any_orphans = None

    def recent(self, since: float) -> None:
        """A look at all processes that is not older than this is good enough, until the end of the turn: work that is
        done in steps needs one look, and not one in each turn."""
        self._since = min(self._since, since)

    def _look(self) -> None:
        self._looked_at = self._clock()
        self._since = min(self._since, self._looked_at)
        self._table = tree.scan(self.leaders)
        self._by_parent, self._placed = tree.children_of(self._table), None
        seen = {(proc.pid, proc.start) for proc in self._table.values()}
        self._owners = {key: owner for key, owner in self._owners.items() if key in seen}
        self._given_up &= seen

    def members(self, agents: Iterable[Agent]) -> dict[str, list[Proc]]:
        """Return the living descendants of each agent, without its leader, parents first; one scan a turn."""
        orphans = self._orphans_by_agent()
        found = {}
        for agent in agents:
            roots: list[Proc | int] = list(orphans.get(agent.id, ()))
            if agent.pid in self.leaders:
                roots.append(agent.pid)
            found[agent.id] = [p for p in tree.below(self._by_parent, roots, self.leaders.__contains__)
                               if p.lives]
            for proc in found[agent.id]:
                self._owners[proc.pid, proc.start] = agent.id
        return found

    def _orphans_by_agent(self) -> dict[str, list[Proc]]:
        """Return whose each orphan is, found out once for each look at all processes."""
        if self._looked_at < self._since:
            self._look()
        if self._placed is None:
            self._placed = {}
            for proc in self._orphans():
                self._placed.setdefault(self._owner(proc), []).append(proc)
        return self._placed

    def _orphans(self) -> list[Proc]:
        """Return who came back, and of the children of others only those that something tells to be an agent's."""
        parts = self._parts() | self.helpers.keys()
        ours, others = self._reapers()
        by_parent = self._by_parent
        found = [p for parent in ours for p in by_parent.get(parent, ()) if p.pid not in parts and not self._is_part(p)]
        return found + [p for parent in others - ours for p in by_parent.get(parent, ())
                        if p.pid not in parts and p.pid not in self.leaders and self._owner(p)]

    def _is_part(self, proc: Proc) -> bool:
        """Whether a child of the keeper is a part of the server that nobody told us of: the core that is to follow us,
        the one that was before us, a shell that is starting. One that an agent has started carries its mark."""
        return (proc.parent == self._keeper.pid and proc.pid not in self.leaders
                and tree.is_part(proc.pid, self._keeper.pid) and tree.mark_of(proc.pid) not in self._known)

    def _owner(self, proc: Proc) -> str:
        """Return whose an orphan is, or "" when nothing tells."""
        key = (proc.pid, proc.start)
        owner = self._owners.get(key, "")
        if owner not in self._known:
            owner = tree.mark_of(proc.pid)
        if owner not in self._known and proc.session in self._sessions:
            owner = self._sessions[proc.session].id
        if owner not in self._known and self._tags:
            owner = self._tags.get(tree.tag_of(proc.pid), "")
        if owner not in self._known:
            owner = self._by_what_it_holds(tree.held_by(proc.pid))
        if owner not in self._known:
            return ""
        self._owners[key] = owner
        return owner

    def _by_what_it_holds(self, held: set[tuple[int, int]]) -> str:
        """Return whose pipes or terminal somebody holds."""
        for agent in self._sessions.values() if held else ():
            if agent.run is not None and not held.isdisjoint(agent.run.shared):
                return agent.id
        return ""

    def orphans(self) -> bool:
        """Whether we have a child that is nobody's leader. Without one an exit has left nothing behind: the kernel
        hands a dying process's children over before it sends SIGCHLD. This spares most exits a scan."""
        if self._adopted or not self._subreaper:
            return True
        if self._any_orphans is None:
            pids = tree.own_children()
            self._any_orphans = pids is None or not self.leaders.keys() | self.helpers.keys() >= set(pids)
        return self._any_orphans

    def strays(self, ended: Agent) -> list[Proc]:
        """Return orphans that nothing places, and that no living agent could have started: `ended` has to answer."""
        unplaced = [proc for proc in self._orphans_by_agent().get("", ())
                    if proc.lives and (proc.pid, proc.start) not in self._given_up and proc.start >= (ended.start or 0)]
        oldest = min((a.start or 0 for a in self.leaders.values()), default=None) if unplaced else None
        return [proc for proc in unplaced if oldest is None or proc.start < oldest]

    def come(self) -> list[Proc]:
        """Return the orphans that have come to us by this moment, as the kernel lists our children. What forks and dies
        again and again is gone before a look at all processes is through."""
        pids = set(tree.own_children() or ())
        if self._adopted and self._keeper.pid > 1:
            pids.update(tree.children_listed(f"{self._keeper.pid}/task/{self._keeper.pid}") or ())
        pids -= self.leaders.keys() | self.helpers.keys() | self._parts()
        found = [proc for pid in pids if (proc := tree.look(pid)) is not None and proc.lives]
        return [proc for proc in found if (proc.pid, proc.start) not in self._given_up and not self._is_part(proc)]

    def owner(self, proc: Proc) -> str:
        """Return whose an orphan is, or "" when nothing tells."""
        return self._owner(proc)

    def everyone(self) -> list[Proc]:
        """Return all living processes that descend from us, whosesoever they are."""
        self._look()
        roots: list[Proc | int] = [*self._orphans(), *self.leaders]
        return [proc for proc in tree.below(self._by_parent, roots) if proc.lives]

    # ------------------------------------------------------------ signalling

    def whole(self, agent: Agent) -> list[Proc]:
        """Return the leader, while it lives, and all that descends from it, parents first."""
        leader = tree.look(agent.pid) if agent.pid in self.leaders and agent.pid is not None else None
        here = [leader] if leader is not None and agent.start in (leader.start, None) else []
        return here + self.members([agent])[agent.id]

    def may_signal(self, agent: Agent) -> bool:
        """Whether the leader is one that we may signal: it is not if it became another user (kill(2): EPERM)."""
        return agent.pid not in self.leaders or self._signal_leader(agent, 0)

    def signal(self, agent: Agent, number: int, most: int | None = None) -> list[int]:
        """Signal the leader and all that descends from it, or `most` of that, parents first unless they are to go on.
        Return the pids of those that we may not signal."""
        if number == SIGCONT:
            return self.go_on(agent, {})
        if agent.pid not in self.leaders:
            return []
        denied = [] if self._signal_leader(agent, number) else [agent.pid]
        return denied + tree.send_all(self.members([agent])[agent.id][:most], number)

    def go_on(self, agent: Agent, but: Mapping[str, int]) -> list[int]:
        """SIGCONT to all `but` some, by pid and start; return as `signal`. Children first: a shell that went on before
        its job would see it stopped, and take the terminal from it."""
        if agent.pid not in self.leaders:
            return []
        denied = tree.send_all((proc for proc in reversed(self.members([agent])[agent.id])
                        if but.get(str(proc.pid)) != proc.start), SIGCONT)
        return denied if self._signal_leader(agent, SIGCONT) else [agent.pid, *denied]

    def _signal_leader(self, agent: Agent, number: int) -> bool:
        """Return whether we may."""
        assert agent.pid is not None
        if not self.sees:
            process.send_group(agent.pid, number)
        if not agent.adopted:  # not reaped yet, so that it is there
            return process.send(agent.pid, number)
        leader = tree.look(agent.pid)  # reaped by the keeper at any moment, so that only its identity is sure
        ours = leader is not None and leader.start == agent.start
        return leader is None or not ours or tree.send(leader, number) != tree.NOT_PERMITTED

    def hang_up(self, agent: Agent) -> None:
        """SIGHUP, as from a terminal that is gone, to those of a tree that ignore SIGTERM: shells at a terminal do."""
        tree.send_all((proc for proc in self.whole(agent) if tree.ignores(proc.pid, SIGTERM)), SIGHUP)
