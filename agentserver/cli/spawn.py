"""`spawn`: from flags to an agent. `run` starts its agent here too.

Owns:    how flags become an AgentConfig.
Runs in: the main thread of a command.
Unaware: of what the server makes of it.
"""
from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Callable

from ..paths import expanded
from . import connect, out, show, values
from .exits import UsageError

if TYPE_CHECKING:
    from ..client import Agent, AgentClient

_SAME_NAME = ("name", "task", "context", "system_prompt", "model", "tool_level", "stdin", "pty", "grace_secs")


def spawn(given: Namespace) -> int:
    """Spawn an agent and print its id."""
    check(given)
    with connect.connect(given) as client:
        agent = start(client, given)
        if given.json:
            out.document(agent.info().raw)
        else:
            show.say(agent.id)
    return 0


def check(given: Namespace) -> None:
    """Refuse what is neither a command nor a backend, or both."""
    if bool(given.argv) == bool(given.backend):
        raise UsageError(f"`agentserver {given.subcommand}`: give either -- CMD, or --backend with --task"
                         + ("; not both" if given.argv else ""))
    if given.terminal and given.stdin not in (None, "pty"):
        raise UsageError(f"`agentserver {given.subcommand}`: -t gives the agent a terminal, and "
                         f"--stdin {given.stdin} none; leave one of them out")


def start(client: AgentClient, given: Namespace) -> Agent:
    """Ask for the agent that the flags describe."""
    return client.spawn(given.argv or None, metadata=given.metadata, **described(given, connect.is_local(client)))


def described(given: Namespace, local: bool) -> dict[str, Any]:
    """Return the fields of the AgentConfig besides `command`; what was not given is absent."""
    config = {name: getattr(given, name) for name in _SAME_NAME if getattr(given, name) is not None}
    if given.backend:
        config["model_backend"] = given.backend
    if given.terminal:
        config = {**_my_terminal(), **config}
    if given.env:
        config["environment"] = {**config.get("environment", {}), **dict(given.env)}
    if given.label:
        config["labels"] = dict(given.label)
    if given.runtime_secs is not None:
        config["limits"] = {"runtime_secs": given.runtime_secs}
    directory = _directory(given.cwd, local)
    if directory is not None:
        config["cwd"] = directory
    return config


def _my_terminal() -> dict[str, Any]:
    """Return what makes the agent's terminal like mine, if I have one."""
    try:
        mine = os.get_terminal_size(1)
    except OSError:
        return {"stdin": "pty"}
    kind = {name: os.environ[name] for name in ("TERM", "COLORTERM") if os.environ.get(name)}
    size = {"pty": {"rows": mine.lines, "cols": mine.columns}} if mine.lines and mine.columns else {}
    return {"stdin": "pty", "environment": kind, **size}


def _directory(given: str | None, local: bool) -> str | None:
    """Return where the agent is to run: a local server is told an absolute path, a remote one what was typed."""
    if not local:
        return given and values.as_utf8(given)
    try:
        return values.as_utf8(os.path.abspath(expanded(given or ".")))  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise UsageError("the current directory does not exist any more; name another with --cwd") from None


COMMANDS: dict[str, Callable[[Namespace], int]] = {"spawn": spawn}
