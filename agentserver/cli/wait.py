"""`wait`: block until agents end, and exit as they did.

Owns:    when the waiting is over, and the exit code of many.
Runs in: the main thread of a command.
Unaware: of how an end is heard of (follow.py).
"""
from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Callable

from ..errors import RequestError
from . import agents, connect, exits, out, show

if TYPE_CHECKING:
    from ..client import AgentClient
    from ..results import AgentInfo


def wait(given: Namespace) -> int:
    """Wait for agents to end (or to have a status), print how each did, and return the exit code."""
    with connect.patient(given) as client:
        refs = list(dict.fromkeys(given.agents))
        what = f"to be {given.status}" if given.status else "to end"
        one = "the first of " if given.any and len(refs) > 1 else ""
        with connect.progress(f"waiting for {one}{show.plural(len(refs), 'agent')} {what}"):
            infos = ended(client, refs, given)
        for info in infos:
            _check(client, info, given.status)
    if given.json:
        out.document([info.raw for info in infos])
    else:
        show.say(*(f"{connect.label(info)}: {agents.status(info)}" for info in infos))
    return exits.OK if given.status else code_of(infos)


def ended(client: AgentClient, refs: list[str], given: Namespace) -> list[AgentInfo]:
    """Wait; again for an agent that was restarted before it could be looked at."""
    while True:
        infos = client.wait(refs, any=given.any, status=given.status, timeout=connect.left(given))
        if given.status or (any if given.any else all)(info.finished for info in infos):
            return infos


def _check(client: AgentClient, info: AgentInfo, status: str | None) -> None:
    """Raise if an agent ended without ever having had the status that was waited for."""
    if status and info.finished and info.status != status and not _had(client, info.id, status):
        raise RequestError(f"agent {connect.label(info)} is {agents.status(info)} and was never {status}",
                           "invalid_state")


def _had(client: AgentClient, agent_id: str, status: str) -> bool:
    since = 0
    while True:
        page = client.events(since, agent=agent_id)
        if any(event.get("status") == status for event in page.events):
            return True
        if not page.more:
            return False
        since = page.next


def code_of(infos: list[AgentInfo]) -> int:
    """Return the first exit code that is not 0. An agent that has not ended has none."""
    codes = [info.exit.returncode if info.exit else exits.FAILED for info in infos if info.finished]
    return next((code for code in codes if code), exits.OK)


COMMANDS: dict[str, Callable[[Namespace], int]] = {"wait": wait}
