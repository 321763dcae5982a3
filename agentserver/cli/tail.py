"""Where the last lines of a stream begin.

Owns:    the search backwards through what is kept of a stream.
Runs in: the main thread of a command.
Unaware: of how lines are shown. An unfinished last line counts as a line.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from ..messages import MAX_READ

if TYPE_CHECKING:
    from ..client import Agent
    from ..results import StreamRange

STEP = 64 * 1024


def start_of_last(agent: Agent, stream: str, span: StreamRange, lines: int, step: int = STEP) -> int:
    """Return the offset at which the last `lines` lines of a stream begin, as far back as they are kept."""
    upper, needed = span.end_offset, lines
    while needed and upper > span.first_offset:
        data, lower = read_between(agent, stream, max(span.first_offset, upper - step), upper)
        if not data:
            break
        if upper == span.end_offset and data.endswith(b"\n"):
            needed += 1  # the newline of the last line begins no further one
        found = data.count(b"\n")
        if found >= needed:
            return lower + _after_newline(data, found - needed + 1)
        needed -= found
        upper, step = lower, min(step * 2, MAX_READ)
    return upper


def _after_newline(data: bytes, number: int) -> int:
    """Return the position after the `number`-th newline, counted from 1."""
    at = -1
    for _ in range(number):
        at = data.index(b"\n", at + 1)
    return at + 1


def read_between(agent: Agent, stream: str, lower: int, upper: int) -> tuple[bytes, int]:
    """Return the bytes from `lower` to `upper`, and where they really begin: the oldest may be gone meanwhile."""
    pieces: list[bytes] = []
    begin = at = lower
    while at < upper:
        chunk = agent.read(stream, offset=at, max_bytes=min(upper - at, MAX_READ))
        if not chunk.data:
            break
        if chunk.offset > at:
            pieces, begin = [], chunk.offset
        pieces.append(chunk.data)
        at = chunk.next_offset
    return b"".join(pieces)[:max(upper - begin, 0)], begin


def last_lines(agent: Agent, stream: str, span: StreamRange, lines: int) -> list[str]:
    """Return the last lines of a stream as text."""
    start = start_of_last(agent, stream, span, lines)
    # of lines without end only the last part: this is for people
    data, _ = read_between(agent, stream, max(start, span.end_offset - STEP), span.end_offset)
    text = data.decode("utf-8", "replace")
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")[-lines:]] if text else []
