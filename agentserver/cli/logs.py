"""`logs`: what agents wrote, in order, from any point, live if wanted.

Owns:    where each stream begins, and the passage from what is kept to what is coming.
Runs in: the main thread of a command.
Unaware: of how output is pushed and gaps are filled (follow.py), and of how it is written (pieces.py).
"""
from __future__ import annotations

from argparse import Namespace
from collections import deque
from typing import TYPE_CHECKING, Callable, Dict, Iterator, Tuple

from . import connect, grep, pieces
from .pieces import Piece

if TYPE_CHECKING:
    from ..client import Agent, AgentClient
    from ..results import AgentInfo

CHUNK = 256 * 1024
#: (agent id, stream) -> the offset up to which it was shown
Offsets = Dict[Tuple[str, str], int]
#: stream -> from where to where it is to be shown
Ranges = Dict[str, Tuple[int, int]]


def logs(given: Namespace) -> int:
    """Print the output of agents; with --follow until they have ended, with --grep only matching lines."""
    if given.grep is not None:
        grep.check(given)
    streams = ("stdout", "stderr") if given.stream == "both" else (given.stream,)
    with connect.patient(given) as client:
        agents = list({agent.id: agent for agent in map(client.agent, given.agents)}.values())
        infos = [agent.info() for agent in agents]
        if given.grep is not None:
            return grep.grep(given, list(zip(agents, infos)))
        write = _writer(given, infos)
        write(_all(client, given, list(zip(agents, infos)), streams))
    return 0


def _writer(given: Namespace, infos: list[AgentInfo]) -> Callable[[Iterator[Piece]], None]:
    if given.json:
        return pieces.write_json
    if len(infos) == 1 and not given.timestamps:
        return pieces.write_raw
    names = {info.id: info.name for info in infos}
    return pieces.line_writer(pieces.prefixes(names) if len(infos) > 1 else {}, given.timestamps)


def _all(client: AgentClient, given: Namespace, agents: list[tuple[Agent, AgentInfo]],
         streams: tuple[str, ...]) -> Iterator[Piece]:
    reached: Offsets = {}
    yield from pieces.in_order([_kept(agent, info, given, streams, reached) for agent, info in agents])
    if given.follow:
        yield from _coming(client, [agent.id for agent, _ in agents], streams, reached, connect.left(given))


# ---------------------------------------------------------------- what is kept

def _kept(agent: Agent, info: AgentInfo, given: Namespace, streams: tuple[str, ...],
          reached: Offsets) -> Iterator[Piece]:
    """Yield one agent's output so far, both streams in the order they were written."""
    ranges = {stream: _range(agent, info, stream, given) for stream in streams}
    for stream, (begin, end) in ranges.items():
        reached[agent.id, stream] = max(begin, end)
    if given.lines is None:
        return _between(agent, ranges)
    return pieces.lines(_between(agent, _last(agent, info, ranges, given.lines)))


def _between(agent: Agent, ranges: Ranges) -> Iterator[Piece]:
    return pieces.in_order(_stream(agent, stream, begin, end) for stream, (begin, end) in ranges.items())


def _last(agent: Agent, info: AgentInfo, ranges: Ranges, lines: int) -> Ranges:
    """Narrow the ranges to the last lines of all streams together. They are counted first and read again then: lines
    may be long, and are not held."""
    wanted = dict.fromkeys(ranges, lines)
    if sum(begin < end for begin, end in ranges.values()) > 1:
        ranges = _from_last(agent, info, ranges, wanted)
        ends = deque(pieces.line_ends(_between(agent, ranges)), maxlen=lines)
        wanted = {stream: ends.count(stream) for stream in ranges}
    return _from_last(agent, info, ranges, wanted)


def _from_last(agent: Agent, info: AgentInfo, ranges: Ranges, wanted: dict[str, int]) -> Ranges:
    from .tail import start_of_last
    return {stream: (max(begin, start_of_last(agent, stream, info.output[stream], wanted[stream])), end)
            if begin < end else (begin, end) for stream, (begin, end) in ranges.items()}


def _range(agent: Agent, info: AgentInfo, stream: str, given: Namespace) -> tuple[int, int]:
    """Return from where to where a stream is to be shown."""
    span = info.output.get(stream)
    if span is None:
        return 0, 0
    begin = span.first_offset
    if given.since is not None:
        data = agent.client.control(agent.id, f"read_{stream}", since=given.since, max_bytes=1)
        begin = int(data.get("offset") or 0)
    return begin, span.end_offset


def _stream(agent: Agent, stream: str, begin: int, end: int) -> Iterator[Piece]:
    at = begin
    while at < end:
        chunk = agent.read(stream, offset=at, max_bytes=min(end - at, CHUNK), times=True)
        pieces.tell_gap(agent.id, stream, chunk)
        if not chunk.data:
            return
        yield from pieces.of_chunk(agent.id, stream, chunk)
        at = chunk.next_offset


# ---------------------------------------------------------------- what is coming

def _coming(client: AgentClient, ids: list[str], streams: tuple[str, ...], reached: Offsets,
            left: float | None) -> Iterator[Piece]:
    for agent_id, stream, what in client.follow(ids, streams=streams, since=reached, timeout=left):
        yield from pieces.followed(agent_id, stream, what)


COMMANDS: dict[str, Callable[[Namespace], int]] = {"logs": logs}
