"""`attach`: my terminal becomes the agent's; `run -t` starts its agent and comes here.

Owns:    when there can be an attachment, and what is said after each way out of it.
Runs in: the main thread of a command.
Unaware: of what happens in between (session.py).
"""
from __future__ import annotations

import os
import shlex
import signal
from argparse import Namespace
from typing import TYPE_CHECKING, Callable

from ..errors import LinkError, RequestError
from . import connect, exits, run, show, spawn
from .detach import read_keys
from .exits import OK, UsageError
from .session import Left, Session
from .terminal import Terminal

if TYPE_CHECKING:
    from ..client import AgentClient
    from ..results import AgentInfo

DETACH_KEYS = "ctrl-p,ctrl-q"
CTRL_C = b"\x03"


def attach(given: Namespace) -> int:
    """Show an agent's terminal on mine until it ends or I leave."""
    keys = _detach_keys(given)
    _check_here(given, given.read_only)
    client = connect.patient(given)
    info = client.agent(given.agents[0]).info()
    _check(info)
    return _stay(client, given, info, CTRL_C if given.read_only else keys, given.read_only)


def run_attached(given: Namespace) -> int:
    """Spawn an agent on a terminal of its own, and show that on mine."""
    keys = _detach_keys(given)
    _check_here(given, False)
    client = connect.patient(given)
    return _stay(client, given, spawn.start(client, given).info(), keys, False, fresh=True)


def _detach_keys(given: Namespace) -> bytes:
    text = given.detach_keys or os.environ.get("AGENTSERVER_DETACH_KEYS") or DETACH_KEYS
    try:
        return read_keys(text)
    except ValueError as e:
        raise UsageError(f"--detach-keys (or AGENTSERVER_DETACH_KEYS): {e}") from None


def _check_here(given: Namespace, read_only: bool) -> None:
    """Refuse what makes no sense on a terminal, or without one."""
    starts = given.subcommand == "run"
    me = "`agentserver run -t`" if starts else "`agentserver attach`"
    if given.json:
        raise UsageError(f"{me} shows a terminal, and there is no --json of that; `agentserver logs --json` has what "
                         "an agent wrote")
    if not (read_only or show.is_terminal(0)):
        raise UsageError(f"{me} needs a terminal, and stdin is none; "
                         + ("leave -t out, or add --detach" if starts else
                            "use --read-only to watch, or `agentserver send` to type"))
    if starts and not show.is_terminal(1):
        raise UsageError(f"{me} needs a terminal, and stdout is none; leave -t out, or add --detach")


def _check(info: AgentInfo) -> None:
    """Refuse an agent that has no terminal, or has it no more."""
    short = info.id[:8]
    if info.stdin != "pty":
        write = f", and `agentserver send {short} TEXT` writes to it" if info.stdin == "pipe" else ""
        raise RequestError(f"agent {connect.label(info)} does not run on a terminal (its stdin is {info.stdin}); "
                           f"`agentserver logs -f {short}` shows its output{write}", "invalid_state")
    if info.finished:
        raise RequestError(f"agent {connect.label(info)} has ended ({info.status}); `agentserver logs {short}` shows "
                           f"what it wrote, and `agentserver why {short}` how it ended", "invalid_state")


def _stay(client: AgentClient, given: Namespace, info: AgentInfo, keys: bytes, read_only: bool,
          fresh: bool = False) -> int:
    """Be attached, and return the exit code. Everything is connected before the terminal is taken, because to connect
    may be to ask for a password."""
    limit = connect.deadline(given)
    typing = None if read_only else connect.patient(given)
    if typing is not None:
        typing.resolve(info.id)
    with Terminal(raw=show.is_terminal(0)) as terminal:
        left = Session(terminal, info, client, typing, keys, fresh).run(limit)
    return _tell(left, given, info)


def _tell(left: Left, given: Namespace, info: AgentInfo) -> int:
    """Say on the restored terminal how it ended, where that needs a word."""
    if left.ended is not None:
        if left.ended.exit and (left.ended.exit.reason, left.ended.exit.signal) == ("signaled", "SIGINT"):
            raise exits.Signalled(signal.SIGINT)  # Ctrl-C on its terminal, which is mine
        run.tell_end(left.ended)
        return left.ended.exit.returncode if left.ended.exit else exits.FAILED
    again = f"agentserver attach {info.id[:8]}" + (f" --server {shlex.quote(given.server)}" if given.server else "")
    if isinstance(left.error, LinkError):
        reason = str(left.error).split("; ")[0]  # what to do is another thing here
        raise LinkError(f"the server went away: {reason}; when it is back: {again}", left.error.code)
    if left.error is not None:
        raise left.error
    exits.note(f"detached from {connect.label(info)}; to attach again: {again}")
    if left.signal:
        raise exits.Signalled(left.signal)
    return OK


COMMANDS: dict[str, Callable[[Namespace], int]] = {"attach": attach}
