"""`logs --grep`: the lines in which a pattern matches, found by the server.

Owns:    asking for all of them, a bounded number at once.
Runs in: the main thread of a command.
Unaware: of how they are found.
"""
from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Iterator

from ..errors import RequestError
from . import out, pieces
from .exits import FAILED, OK, UsageError

if TYPE_CHECKING:
    from ..client import Agent
    from ..results import AgentInfo

PAGE = 10_000  # lines; each page is a search of its own


def check(given: Namespace) -> None:
    """Refuse what does not go together with --grep."""
    if given.follow or given.timestamps or given.since is not None:
        raise UsageError("`agentserver logs --grep` searches all that is kept: --follow, --timestamps and --since do "
                         "not go together with it")


def grep(given: Namespace, agents: list[tuple[Agent, AgentInfo]]) -> int:
    """Print the matching lines of each agent; return the exit code: 1 when there is none, as of grep(1)."""
    names = {info.id: info.name for _agent, info in agents}
    prefixes = pieces.prefixes(names) if len(agents) > 1 else {}
    code = FAILED
    for agent, _info in agents:
        for line in _last(agent, given) if given.lines is not None else _every(agent, given):
            code = OK
            if given.json:
                out.document({"type": "line", "agent_id": agent.id, "text": line})
            else:
                out.write(1, f"{prefixes.get(agent.id, '')}{line}\n".encode("utf-8", "replace"))
    return code


def _last(agent: Agent, given: Namespace) -> list[str]:
    return agent.query(given.grep, stream=given.stream, limit=given.lines, tail=True).lines


def _every(agent: Agent, given: Namespace) -> Iterator[str]:
    offset, limit = 0, PAGE
    while True:
        try:
            found = agent.query(given.grep, stream=given.stream, offset=offset, limit=limit)
        except RequestError as e:
            if e.code != "message_too_large" or limit == 1:
                raise
            limit = max(limit // 8, 1)
            continue
        yield from found.lines
        offset += len(found.lines)
        if not found.has_more or not found.lines:
            return
