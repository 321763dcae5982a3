"""Agents that run and that the registry does not know, because it was damaged or deleted: they get a record again.

Owns:    finding them at a core's start, and making their records from what the kernel, the keeper and the disk tell.
Runs in: the core's thread, at its start only.
Unaware: of what is then done with them (adoption.py): they are taken over like all others.

An id is one of ours if the keeper holds something for it, if its directory is here, or if its record is here and
cannot be read. A mark alone is not enough: another server of this machine may have set it.
"""
from __future__ import annotations

import os
import time
from typing import Any, Callable, Mapping

from .. import messages as m
from ..config import ServerConfig
from ..wire import Json, is_id, read
from . import lifecycle, terminal, tree
from .agent import Agent, new_record
from .output import OutputLog
from .registry import Registry
from .takeover import TakeOver

WHY = "its record was lost; what is known of it comes from its process and its files"
COMMAND_BYTES = 64 * 1024  # of a command line that is entered into a record


class Unlisted:
    """See the module. `finish` tells how the backend of a configuration asks its agent to end."""

    def __init__(self, config: ServerConfig, registry: Registry, boot: str, directory: Callable[[str], str],
                 output: Callable[[str], OutputLog], finish: Callable[[m.AgentConfig], str],
                 clock: Callable[[], float]) -> None:
        self._config, self._registry, self._boot, self._directory = config, registry, boot, directory
        self._output, self._finish, self._clock = output, finish, clock

    def find(self, taken: TakeOver, known: Mapping[str, Agent], unreadable: Mapping[str, object]) -> list[Agent]:
        """Return agents for all that runs, or that the keeper holds something of, and that is not `known`. What is held
        of one that has neither a process nor a directory is not an agent's."""
        marked = {agent_id for agent_id in taken.marked if agent_id in unreadable or self._is_here(agent_id)}
        held = {agent_id for agent_id in taken.held if agent_id in taken.marked or self._is_here(agent_id)}
        return [self._agent(agent_id, taken) for agent_id in sorted((marked | held) - set(known))
                if agent_id and "/" not in agent_id]

    def _is_here(self, agent_id: str) -> bool:
        return is_id(agent_id) and os.path.isdir(self._directory(agent_id))

    def _agent(self, agent_id: str, taken: TakeOver) -> Agent:
        held = taken.held.get(agent_id, {})
        leader = _leader(agent_id, held, taken)
        asked = self._asked(agent_id)
        record = new_record(
            name="", model_backend="", task="", command=["?"], cwd=self._config.agent_dir, labels={}, metadata={},
            stdin="pty" if "pty" in held else "pipe" if "stdin" in held else "null", pty=_size(held),
            grace_secs=self._config.grace_secs, runtime_secs=self._config.runtime_secs, created_at=time.time(),
            boot=self._boot, status=lifecycle.INITIALIZING, attempt=self._attempt(agent_id), **_stdin(held))
        if asked is not None:
            record.update(self._from_asked(asked))
        record["metadata"] = {"record_lost": WHY}
        if leader is not None:
            record.update(self._from_process(leader))
        return Agent(agent_id, self._output(agent_id), record)

    def _asked(self, agent_id: str) -> m.AgentConfig | None:
        """Return what the agent was spawned with, where that can still be read."""
        try:
            return read(m.AgentConfig, self._registry.spec(agent_id), "config")
        except Exception:
            return None

    def _attempt(self, agent_id: str) -> int:
        ended = [record.get("attempt") for record in self._registry.attempts(agent_id)]
        return 1 + max((number for number in ended if isinstance(number, int)), default=0)

    def _from_asked(self, asked: m.AgentConfig) -> Json:
        known: Json = {"name": asked.name, "model_backend": asked.model_backend, "task": asked.task,
                       "labels": dict(asked.labels)}
        if asked.command:
            known["command"] = list(asked.command)
        if asked.grace_secs is not None:
            known["grace_secs"] = asked.grace_secs
        if asked.limits is not None and asked.limits.runtime_secs:
            known["runtime_secs"] = asked.limits.runtime_secs
        try:
            known["finish"] = self._finish(asked)
        except Exception:  # a backend that is not configured any more
            pass
        return known

    def _from_process(self, leader: tree.Proc) -> Json:
        """Return what the kernel tells of an agent's leader."""
        age = max(0.0, tree.ticks_now() - leader.start) / tree.TICKS
        began = time.time() - age
        stopped = leader.state in "Tt"
        known: Json = {"pid": leader.pid, "start": leader.start, "created_at": began, "started_at": began,
                       "began": self._clock() - age, "tag": tree.tag_of(leader.pid),
                       "status": lifecycle.PAUSED if stopped else lifecycle.RUNNING}
        if stopped:
            known.update(paused_at=time.time(), pause_mode="forced")
        argv = tree.arguments_of(leader.pid, COMMAND_BYTES)
        if argv:
            known["command"] = argv
        try:
            known["cwd"] = os.fsencode(os.readlink(f"/proc/{leader.pid}/cwd")).decode("utf-8", "replace")
        except OSError:
            pass
        return known


def _leader(agent_id: str, held: Mapping[str, int], taken: TakeOver) -> tree.Proc | None:
    """Return the leader that runs: it bears the agent's mark, or it holds the other end of a pipe of the agent."""
    leaders = [proc for proc in taken.marked.get(agent_id, ()) if proc.session == proc.pid]
    if leaders:
        return min(leaders, key=lambda proc: proc.start)
    ends = {tree.identity(os.fstat(fd)) for name, fd in held.items() if name in ("stdin", "stdout", "stderr")}
    if ends:
        for proc in tree.scan((os.getpid(), taken.keeper_pid)).values():
            if proc.session == proc.pid and proc.lives and not ends.isdisjoint(tree.held_by(proc.pid)):
                return proc
    return None


def _stdin(held: Mapping[str, int]) -> dict[str, Any]:
    """Return what the record says of the file in which input waits: all of it was accepted, as far as we know."""
    numbers = [int(name[6:]) for name in held if name.startswith("stdin.") and name[6:].isdigit()]
    if not numbers:
        return {}
    return {"stdin_file": max(numbers), "stdin_end": os.fstat(held[f"stdin.{max(numbers)}"]).st_size}


def _size(held: Mapping[str, int]) -> dict[str, int] | None:
    return terminal.size_of(held["pty"]) if "pty" in held else None
