"""Agents that no core comes back to end: the keeper ends and names them, so that a server that has ended has ended.

Owns:    who they are, and the last two rungs of the stop ladder for all of them at once.
Runs in: a keeper that was told to end, when its last core could not begin: an unreadable registry, a full disk, broken
         code.
Unaware: of records. The next core finds in the registry that they ran, and records them as lost.

An agent's process is known by its mark or its tag (tree.py): every child of the keeper that has one, for a dead core's
children came to it; and, wherever it is by now, what has the mark of an agent of which descriptors are held. Everything
that descends from those is ended with them.
"""
from __future__ import annotations

import os
import time
from signal import SIGCONT, SIGKILL, SIGTERM
from typing import Callable, Collection

from . import tree
from .tree import Proc

LOOK_SECS = 0.1   # between two looks at who is left
KILL_SECS = 5.0   # for SIGKILL to do its work, before what is left is only named


def end(agents: Collection[str], grace_secs: float, pause: Callable[[float], bool], say: Callable[[str], None]) -> bool:
    """End what is left of `agents` and of whatever else came back to us; return whether all of it has gone. `pause`
    waits, reaps, and returns true when the grace is to be cut short."""
    said: set[tuple[int, int]] = set()
    rung, until = SIGTERM, time.monotonic() + grace_secs
    signalled: set[tuple[int, int, int]] = set()
    while left := _left(agents):
        for proc in left:
            if (proc.pid, proc.start) not in said:
                said.add((proc.pid, proc.start))
                say(f"no core came back to end {_named(proc)}; the keeper ends it")
            if rung == SIGKILL or (proc.pid, proc.start, rung) not in signalled:
                signalled.add((proc.pid, proc.start, rung))
                _send(proc, rung)
        hurry = pause(LOOK_SECS)
        if rung == SIGTERM and (hurry or time.monotonic() >= until):
            rung, until = SIGKILL, time.monotonic() + KILL_SECS
        elif rung == SIGKILL and time.monotonic() >= until:
            break
    for proc in left:
        say(f"{_named(proc)} could not be ended")
    return not left


def _send(proc: Proc, rung: int) -> None:
    tree.send(proc, rung)
    if rung == SIGTERM:
        tree.send(proc, SIGCONT)  # a stopped process acts on SIGTERM only when it goes on (signal(7))


def _left(agents: Collection[str]) -> list[Proc]:
    """Return what lives, parents first."""
    table = tree.scan((os.getpid(),))
    roots: list[Proc | int] = [proc for proc in table.values() if proc.lives and _is_agents(proc, agents)]
    return [proc for proc in tree.below(tree.children_of(table), roots) if proc.lives]


def _is_agents(proc: Proc, agents: Collection[str]) -> bool:
    mark = tree.mark_of(proc.pid)
    return mark in agents or (proc.parent == os.getpid() and (mark != "" or tree.tag_of(proc.pid) > 0))


def _named(proc: Proc) -> str:
    mark = tree.mark_of(proc.pid)
    return f"process {proc.pid} ({tree.command_of(proc.pid) or 'unnamed'})" + (f" of agent {mark}" if mark else "")
