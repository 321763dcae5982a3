"""What a core before us left of each agent, and what the keeper is to hold for the next one.

Owns:    what the keeper handed over, and finding for each agent what of it is there: descriptors, a
         process, an end that was seen. And, for the next time, telling the keeper what to hold.
Runs in: the core's thread; the finding at its start only.
Unaware: of what is then done with an agent (adoption.py).

What cannot be known is not guessed: a process is an agent's by pid and start time, or by the mark in
its environment together with being a session's leader, never by its pid alone.
"""
from __future__ import annotations

import os
import time
from typing import Mapping, NamedTuple

from . import terminal, tree
from .agent import Agent
from .channel import Channel
from .lifecycle import INITIALIZING
from .process import Ended

NAMES = ("stdin", "stdout", "stderr", *terminal.HELD)


class End(NamedTuple):
    """An end that somebody saw: when the process had been started (ticks since boot; 0: not told), whether it led a
    session, and how it ended."""

    start: int
    leader: bool
    ended: Ended


class Inheritance(NamedTuple):
    """What a new core is handed: descriptors by agent and name, and ends by pid."""

    fds: dict[str, dict[str, int]]
    ends: dict[int, End]


class Found(NamedTuple):
    """What is there of an agent. `pid` 0: never started; -1: it has ended, unseen. `ends` are ours of its pipes, or of
    its terminal, by name. `seen`: it runs; else its end is known or will be told."""

    pid: int
    start: int | None
    ends: dict[str, int]
    stdin_file: int
    ended: Ended | None
    seen: bool


class Keeper:
    """The keeper as the core talks to it. When it dies, `channel` goes on taking words that nobody hears, until a
    new keeper brings another."""

    def __init__(self, channel: Channel, pid: int) -> None:
        self.channel, self.pid = channel, pid

    def hold(self, agent_id: str, fds: Mapping[str, int]) -> None:
        """Give the keeper copies of an agent's descriptors (-1: none)."""
        there = {name: fd for name, fd in fds.items() if fd >= 0}
        self.channel.send({"hold": agent_id, "names": list(there)}, list(there.values()))

    @property
    def has_everything(self) -> bool:
        """Whether what we gave is out of our hands: what is in the socket outlives us."""
        return not self.channel.unsent

    def release(self, agent_id: str, names: list[str]) -> None:
        """Let the keeper close its copies; all of them without names."""
        self.channel.send({"release": agent_id, "names": names})

    def known(self, pid: int) -> None:
        """An end that the keeper told of is on disk."""
        self.channel.send({"known": pid})


def inherit(channel: Channel) -> Inheritance:
    """Wait for everything that a core before us has left; the keeper says `go` at its end."""
    left = Inheritance({}, {})
    while "go" not in (word := channel.next()):
        if "held" in word:
            left.fds[word["held"]] = dict(zip(word["names"], word.get("fds", ())))
        elif "ended" in word:
            pid, start, leader, *rest = word["ended"]
            left.ends[pid] = End(start, leader, Ended(*rest))
    return left


class TakeOver:
    """One start: what was left, claimed agent by agent. `expected` is the agent whose child had not begun."""

    def __init__(self, left: Inheritance, boot: str, expected: str) -> None:
        self._left, self._boot, self._expected = left, boot, expected
        self._marked: dict[str, list[tree.Proc]] | None = None

    def claim(self, agent: Agent) -> Found | None:
        """Return what there is of an agent to go on with, or None."""
        held = self._left.fds.pop(agent.id, None)
        if held is None and agent.pid is None and agent.status == INITIALIZING and not self.survivors(agent):
            held = {}  # the core before us died before it had made anything of it
        if held is None or agent.boot != self._boot:
            return None
        file = held.pop(f"stdin.{agent.stdin_file}", -1)
        for name in set(held) - set(NAMES):
            os.close(held.pop(name))  # of a file that the registry never heard of, or that is written out
        pid, start = agent.pid, agent.start
        if pid is None:
            if self._expected == agent.id:
                for fd in (*held.values(), file):
                    if fd >= 0:
                        os.close(fd)
                return Found(0, None, {}, -1, None, False)
            leader = self._leader(agent)
            if leader is None:
                return Found(-1, None, held, file, None, False)
            pid, start = leader
        told = self._left.ends.get(pid)
        if told is not None and told.start in (start, 0):
            del self._left.ends[pid]
            return Found(pid, start, held, file, told.ended, False)
        proc = tree.look(pid)
        return Found(pid, start, held, file, None, proc is not None and proc.start == start)

    def _leader(self, agent: Agent) -> tuple[int, int] | None:
        """Find the leader of an agent that was being started: its pid was not on disk yet. It runs with the agent's
        mark; or it has ended, as the only session's leader that did and was started after the agent was asked for."""
        for proc in self.survivors(agent):
            if proc.session == proc.pid:
                return proc.pid, proc.start
        since = tree.ticks_now() - (time.time() - agent.created_at + 1.0) * tree.TICKS
        ended = [(pid, end.start) for pid, end in self._left.ends.items() if end.leader and end.start >= since]
        return ended[0] if len(ended) == 1 else None

    def survivors(self, agent: Agent) -> list[tree.Proc]:
        """Return what runs with an agent's mark or identity, whoever is its parent now."""
        if self._marked is None:
            self._marked = tree.marked()
        left = {proc.pid: proc for proc in self._marked.get(agent.id, [])}
        leader = tree.look(agent.pid) if agent.pid and agent.boot == self._boot else None
        if leader is not None and leader.start == agent.start and leader.state != "Z":
            left[leader.pid] = leader
        return list(left.values())

    def unclaimed(self) -> list[str]:
        """Return whom the keeper held something for that no agent claimed; our copies are closed."""
        for held in self._left.fds.values():
            for fd in held.values():
                os.close(fd)
        return list(self._left.fds)

