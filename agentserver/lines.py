"""Lines: an agent's output as a person reads it.

Owns:    where a line ends, and how much of one is held while its end has not come.
Runs in: a client; it is pure, but for the conversation that it has its pieces from (follow.py).
Unaware: of how output is fetched. Lines are a view of bytes: what is not UTF-8 is replaced here, and only here.
"""
from __future__ import annotations

from typing import Any, Iterator

from .calls import Calls
from .follow import follow, present
from .results import OutputDropped
from .talk import Item, Talk, through

LONGEST_LINE = 16 * 1024 * 1024   # bytes of a line that are held, where nobody says otherwise
_CHARACTER = 4                    # bytes of one, at most


def lines(calls: Calls, agent_id: str, stream: str, follow_: bool, max_line: int) -> Talk[None]:
    """See `Agent.lines`."""
    cutter = Cutter(max_line)
    if follow_:
        yield from through(follow(calls, agent_id, (stream,), None, {}, None), cutter.cut)
    else:
        yield from through(present(calls, agent_id, stream), cutter.cut)
    for line in cutter.rest():
        yield Item(line)


class Cutter:
    """Cuts lines from pieces of output. A gap ends a line: what comes after it belongs to another one."""

    def __init__(self, longest: int) -> None:
        if longest < _CHARACTER:
            raise ValueError(f"max_line is {longest}; it has to be {_CHARACTER} or more bytes, for a character to fit")
        self._longest = longest
        self._begun = bytearray()  # a line whose end has not come

    def cut(self, item: Any) -> Iterator[str]:
        """Yield the lines that a piece completes, and the parts of one that is too long to be held."""
        if isinstance(item[2], OutputDropped):
            yield from self.rest()
        *whole, last = item[2].data.split(b"\n")
        for line in whole:
            yield from self._add(line)
            yield self._take()
        yield from self._add(last)

    def _add(self, data: bytes) -> Iterator[str]:
        self._begun += data
        at = 0
        while len(self._begun) - at > self._longest:
            end = _between_characters(self._begun, at + self._longest)
            yield self._begun[at:end].decode("utf-8", "replace")
            at = end
        del self._begun[:at]

    def _take(self) -> str:
        line = self._begun.decode("utf-8", "replace")
        self._begun.clear()
        return line

    def rest(self) -> Iterator[str]:
        """Yield the unfinished last line, if any."""
        if self._begun:
            yield self._take()


def _between_characters(data: bytearray, at: int) -> int:
    """Return the last place up to `at` where no character is cut in two; `at` itself, if this is no text."""
    return next((at - back for back in range(_CHARACTER) if data[at - back] & 0xC0 != 0x80), at)
