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
from contextlib import suppress
from typing import Mapping, NamedTuple

from ..errors import StartError
from . import process, terminal, tree
from .agent import Agent
from .channel import LOST, Channel, Json
from .lifecycle import INITIALIZING
from .pidfd import open_pidfd
from .process import Ended
from .witness import Witness

NAMES = ("stdin", "stdout", "stderr", *terminal.HELD)
BEGIN_SECS = 1.0  # at most, between the fork of a child and its first deed


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

    def close(self) -> None:
        """Nobody takes it."""
        for held in self.fds.values():
            for fd in held.values():
                os.close(fd)

    def note(self, word: Json) -> None:
        """Take one end as the keeper tells it."""
        pid, start, leader, *_rest = word["ended"]
        self.ends[pid] = End(start, leader, told_end(word))


def told_end(word: Json) -> Ended:
    """Return how a process ended, as the keeper tells it."""
    code, number, cpu_secs, max_rss_bytes = word["ended"][3:7]
    return Ended(code, number, cpu_secs, max_rss_bytes, word.get("with_core", False))


class Found(NamedTuple):
    """What is there of an agent. `pid` 0: never started; -1: it has ended, unseen. `ends` are ours of its pipes, or of
    its terminal, by name. `seen`: it runs; else its end is known or will be told. `pidfd`: the keeper held one, as the
    leader's parent was a core whose own parent had died."""

    pid: int
    start: int | None
    ends: dict[str, int]
    stdin_file: int
    ended: Ended | None
    seen: bool
    pidfd: int = -1


class Keeper:
    """The keeper as the core talks to it. When it dies, `channel` goes on taking words that nobody hears, until a
    new keeper brings another."""

    def __init__(self, channel: Channel, pid: int) -> None:
        self.channel, self.pid = channel, pid
        self.words: list[Json] = []  # said while we waited in `reap`, and not heard by the service yet

    def reap(self) -> list[Json]:
        """Let the keeper collect whoever has ended by now; return what it says of them. Only for a core's start."""
        self.channel.send({"reap": True})
        with suppress(EOFError):  # it is gone; whoever listens to the channel hears that as well
            while "reaped" not in (word := self.channel.next()):
                self.words.append(word)
        return self.words

    def busy(self) -> None:
        """Give a sign of life, while we do not serve yet: the keeper would take us for one that hangs."""
        self.channel.send({"busy": True})

    def hold(self, agent_id: str, fds: Mapping[str, int]) -> None:
        """Give the keeper copies of an agent's descriptors (-1: none)."""
        there = {name: fd for name, fd in fds.items() if fd >= 0}
        self.channel.send({"hold": agent_id, "names": list(there)}, list(there.values()))

    def hold_pid(self, agent_id: str, pid: int, start: int | None) -> None:
        """Give a keeper that is not our parent what tells how a leader ended: if we died, it would be init's child."""
        if os.getppid() == self.pid:
            return
        fd = open_pidfd(pid)
        seen = tree.look(pid)
        if fd >= 0:
            if seen is not None and seen.start == start:
                self.hold(agent_id, {"pid": fd})
            os.close(fd)

    def succeeded(self) -> bool:
        """Say that we have let go, and wait to hear whether a successor serves. The ends that the keeper told of before
        it heard that are not lost on whoever goes on: it tells of them again."""
        self.channel.send({"yielded": True})
        while "leave" not in (word := self.channel.next()):
            if "resume" in word:
                return False
        return True

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
    """Wait for everything that a core before us has left; the keeper says `go` at its end. Raise `StartError` if there
    is no room for it: the keeper still holds everything, for a core that comes later."""
    left = Inheritance({}, {})
    while "go" not in (word := channel.next()):
        if "held" in word:
            left.fds[word["held"]] = dict(zip(word["names"], word.get("fds", ())))
            if LOST in word.get("fds", ()):
                raise StartError("there is no room for the descriptors of the agents: this process may have "
                                 f"{process.descriptor_limit()} open; raise the limit (ulimit -Hn, or fs.file-max)")
        elif "ended" in word:
            left.note(word)
    return left


class TakeOver:
    """One start: what was left, claimed agent by agent."""

    def __init__(self, left: Inheritance, boot: str, witness: Witness, keeper: Keeper) -> None:
        self._left, self._boot, self._witness, self._keeper = left, boot, witness, keeper
        self._marked: dict[str, list[tree.Proc]] | None = None
        self._tagged: dict[int, list[tree.Proc]] | None = None

    @property
    def marked(self) -> Mapping[str, list[tree.Proc]]:
        """All that runs with the mark of an agent, by its id; ours or another server's."""
        if self._marked is None:
            self._marked = tree.marked()
        return self._marked

    @property
    def held(self) -> Mapping[str, Mapping[str, int]]:
        """What the keeper held and no agent has claimed yet."""
        return self._left.fds

    @property
    def keeper_pid(self) -> int:
        """The process that held it."""
        return self._keeper.pid

    def rest(self, agent_id: str) -> dict[str, int]:
        """Return what was held of an agent of which nothing runs: its pipes or its terminal."""
        held = self._left.fds.pop(agent_id, {})
        for name in set(held) - set(NAMES):
            os.close(held.pop(name))
        return held

    def claim(self, agent: Agent) -> Found | None:
        """Return what there is of an agent to go on with, or None."""
        held = self._left.fds.pop(agent.id, None)
        if held is None and agent.pid is None and agent.status == INITIALIZING and not self.survivors(agent):
            held = {}  # the core before us died before it had made anything of it
        if held is None or agent.boot != self._boot:
            for fd in (held or {}).values():  # of another boot there is nothing but by a mistake of the store's
                os.close(fd)
            return None
        file, pidfd = held.pop(f"stdin.{agent.stdin_file}", -1), held.pop("pid", -1)
        for name in set(held) - set(NAMES):
            os.close(held.pop(name))  # of a file that the registry never heard of, or that is written out
        pid, start = agent.pid, agent.start
        if pid is None:
            if self._witness.before == agent.id:
                for fd in (*held.values(), file):
                    if fd >= 0:
                        os.close(fd)
                return Found(0, None, {}, -1, None, False)
            leader = self._leader(agent)
            if leader is None:
                if pidfd >= 0:
                    os.close(pidfd)
                return Found(-1, None, held, file, None, False)
            pid, start = leader
        told = self._left.ends.get(pid)
        if told is not None and told.start in (start, 0):
            del self._left.ends[pid]
            return Found(pid, start, held, file, told.ended, False, pidfd)
        proc = tree.look(pid)
        return Found(pid, start, held, file, None, proc is not None and proc.start == start, pidfd)

    def _leader(self, agent: Agent) -> tuple[int, int] | None:
        """Find the leader of an agent that was being started: its pid was not on disk yet. It runs with the agent's
        mark; or it has ended, as the session's leader that was started last before the witness saw it begin."""
        for proc in self.survivors(agent):
            if proc.session == proc.pid:
                return proc.pid, proc.start
        for word in self._keeper.reap():  # it may have ended just now
            if "ended" in word:
                self._left.note(word)
        began = tree.ticks_now() - (time.time() - self._witness.began) * tree.TICKS
        ended = sorted((end.start, pid) for pid, end in self._left.ends.items()
                       if end.leader and began - BEGIN_SECS * tree.TICKS <= end.start <= began + 1)
        if not ended or (len(ended) > 1 and ended[-2][0] == ended[-1][0]):
            return None
        return ended[-1][1], ended[-1][0]

    def survivors(self, agent: Agent) -> list[tree.Proc]:
        """Return what runs with an agent's mark or identity, whoever is its parent now."""
        left = {proc.pid: proc for proc in self.marked.get(agent.id, [])}
        leader = tree.look(agent.pid) if agent.pid and agent.boot == self._boot else None
        if leader is not None and leader.start == agent.start and leader.lives:
            if tree.mark_of(leader.pid) in ("", agent.id):  # else the record of another agent was damaged
                left[leader.pid] = leader
        return list(left.values())

    def remains(self, agent: Agent) -> list[tree.Proc]:
        """Return the survivors and what only its tag tells to be the agent's: daemons with a clean environment."""
        left = self.survivors(agent)
        if not agent.tag or agent.boot != self._boot:
            return left
        if self._tagged is None:
            self._tagged = tree.tagged()
        known = {proc.pid for proc in left}
        return left + [proc for proc in self._tagged.get(agent.tag, ()) if proc.pid not in known]

    def unclaimed(self) -> list[str]:
        """Return whom the keeper held something for that no agent claimed; our copies are closed."""
        self._left.close()
        return list(self._left.fds)

