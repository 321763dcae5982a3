"""How an attempt begins: what is to be run, the files that it finds, its pipes, its process.

Owns:    the order of things at a start: a death of ours at any moment leaves neither a ghost nor a double.
Runs in: the core's thread.
Unaware: of policy: whether an agent may start, and what becomes of it, is the supervisor's business.

First the witness, then the registry, then the keeper, then the process: so whatever a core that died has begun is found
by the next one (takeover.py).
"""
from __future__ import annotations

import time
from typing import Callable, Mapping

from ..config import ServerConfig
from ..errors import RequestError
from ..messages import AgentConfig
from . import backends, process, tree
from .agent import Agent
from .files import make_directory, new_file
from .inherited import Inherited
from .registry import Ask, Registry
from .takeover import Keeper
from .witness import Witness


class Starting:
    """See the module. `environ` is the server's own environment, `inherited` what all agents get beside it."""

    def __init__(self, config: ServerConfig, registry: Registry, environ: Mapping[str, str], inherited: Inherited,
                 witness: Witness, keeper: Keeper, directory: Callable[[str], str],
                 clock: Callable[[], float]) -> None:
        self._registry, self._witness, self._keeper = registry, witness, keeper
        self._environ = backends.base_environment(environ, config.pass_environment)  # walking it for each spawn is dear
        self._passed, self._backends = config.pass_environment, backends.all_backends(config.backends)
        self._inherited, self._directory, self._clock = inherited, directory, clock

    def plan(self, config: AgentConfig) -> backends.Launch:
        """Return what is to be run for a request, or refuse what cannot be."""
        return backends.plan(config, self._backends, self._environ, self._passed)

    def environment_names(self, config: AgentConfig) -> list[str]:
        """Return the names, never the values, of what an agent finds in its environment."""
        launch = self.plan(config)
        return sorted({*launch.environment, *launch.files, tree.MARK})

    def check_disk(self, agent: Agent) -> None:
        """Refuse what could not be written down, before anything of it is done."""
        self._expect(agent)
        if not self._registry.commit():
            raise self._registry.refusal()

    def _expect(self, agent: Agent) -> None:
        trouble = self._witness.expect(agent.id)
        if trouble:
            raise RequestError(f"the server cannot write down what it starts ({trouble}); make room on its disk",
                               "unavailable")

    def start(self, agent: Agent, launch: backends.Launch, ask: Ask) -> dict[str, int]:
        """Start the process of an agent and return our ends of its pipes, or of its terminal."""
        self._expect(agent)  # first: an agent that is on disk is the one that has not begun
        if not self._registry.begin(ask, agent.id):  # then known: our death leaves no ghost, no double
            raise self._registry.refusal()
        directory = self._directory(agent.id)
        _write_files(directory, launch.files)
        environment = {**launch.environment_in(directory), tree.MARK: agent.id}
        ends = process.ends(agent.stdin, agent.pty)
        self._keeper.hold(agent.id, ends.ours)  # before the fork: now our death costs nothing
        try:
            pid = process.spawn(launch.argv, environment, agent.cwd, ends, self._inherited._replace(tag=agent.tag),
                                self._witness.action)
        except BaseException:
            ends.close()
            self._keeper.release(agent.id, [])
            raise
        self._began(agent, pid)
        return ends.ours

    def _began(self, agent: Agent, pid: int) -> None:
        tree.unshield(pid)
        seen = tree.look(pid)
        agent.pid, agent.start, agent.adopted = pid, seen.start if seen else None, False
        self._keeper.hold_pid(agent.id, pid, agent.start)
        agent.started_at, agent.began = time.time(), self._clock()
        agent.ending, agent.signalled, agent.stdin_closing = None, {}, False


def _make(directory: str, needed: bool) -> None:
    try:
        make_directory(directory)
    except OSError:  # a full disk keeps no agent from running
        if needed:
            raise


def _write_files(directory: str, files: Mapping[str, str]) -> None:
    """Make the directory of an agent, by which a core that has lost the registry knows it as ours (unlisted.py), and
    write what the agent is to find in files, for its user's eyes only."""
    try:
        _make(directory, needed=bool(files))
        for name, text in files.items():
            with open(new_file(directory, name), "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
    except OSError as e:
        raise RequestError(f"the files that the agent is to find cannot be written: {e.strerror}",
                           "spawn_failed") from None
