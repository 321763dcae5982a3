"""Output on its way to a person: pieces with a time, put into order, cut into lines, written.

Owns:    the order of several streams by time, the cutting into lines, the three ways to write them.
Runs in: the main thread of a command.
Unaware: of how pieces are fetched.
"""
from __future__ import annotations

import heapq
from itertools import repeat
from typing import Callable, Iterable, Iterator, NamedTuple

from ..results import Chunk, OutputDropped
from . import exits, out, show

LONGEST_LINE = 64 * 1024  # of a longer one the parts are shown as lines: nothing is held back without a bound
_PALETTE = ("cyan", "yellow", "green", "magenta")


class Piece(NamedTuple):
    """Some bytes of one stream; `time` is RFC 3339, or empty where it is not known."""

    agent_id: str
    stream: str
    time: str
    offset: int
    data: bytes


def of_chunk(agent_id: str, stream: str, chunk: Chunk) -> Iterator[Piece]:
    """Cut what was read where its times change."""
    at = chunk.offset
    for time, end in chunk.times:
        end = min(end, chunk.next_offset)
        if end > at:
            yield Piece(agent_id, stream, time, at, chunk.data[at - chunk.offset:end - chunk.offset])
            at = end
    if at < chunk.next_offset:
        time = str(chunk.raw.get("timestamp") or (chunk.times[-1][0] if chunk.times else ""))
        yield Piece(agent_id, stream, time, at, chunk.data[at - chunk.offset:])


def followed(agent_id: str, stream: str, what: Chunk | OutputDropped) -> Iterator[Piece]:
    """Cut what a follower got; that bytes are missing is said on stderr."""
    tell_gap(agent_id, stream, what)
    if isinstance(what, Chunk):
        yield from of_chunk(agent_id, stream, what)


def tell_gap(agent_id: str, stream: str, chunk: Chunk | OutputDropped) -> None:
    """Say on stderr that bytes, before a chunk or in its place, are no longer kept."""
    if chunk.dropped:
        exits.note(f"{show.size(chunk.dropped)} of {stream} of {agent_id[:8]} are missing here: "
                   + _WHY_GONE.get(chunk.dropped_reason, "they were dropped for the agent's cap, or not recorded"))


_WHY_GONE = {"output_cap": "the oldest output goes when an agent's cap is reached",
             "disk": "the server's disk did not take them, it was full or failed",
             "file_gone": "the file that they were in is gone, or is not a file any more"}


def in_order(streams: Iterable[Iterable[Piece]]) -> Iterator[Piece]:
    """Merge streams by time; all times are UTC texts of one length, so that they sort."""
    return heapq.merge(*streams, key=lambda piece: piece.time)


class _Begun(NamedTuple):
    """A line whose end has not come."""

    first: Piece
    parts: list[bytes]

    def whole(self) -> Piece:
        return self.first._replace(data=b"".join(self.parts))


class Cutter:
    """Cut the pieces of any number of streams into lines; a line has the time of its first byte.

    A line is handed out in parts when it reaches `LONGEST_LINE` bytes.
    """

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str], _Begun] = {}

    def feed(self, piece: Piece) -> Iterator[Piece]:
        """Yield the lines that `piece` completes, with their newline."""
        key, at = (piece.agent_id, piece.stream), piece.offset
        for part in _parts(piece.data):
            begun = self._begun.setdefault(key, _Begun(piece._replace(offset=at), []))
            begun.parts.append(part)
            at += len(part)
            if part.endswith(b"\n") or at - begun.first.offset >= LONGEST_LINE:
                yield self._begun.pop(key).whole()

    def rest(self) -> list[Piece]:
        """Return the unfinished lines."""
        rest = [begun.whole() for begun in self._begun.values()]
        self._begun.clear()
        return rest


def _parts(data: bytes) -> list[bytes]:
    """Cut after each newline, and only there: bytes.splitlines cuts at carriage returns too."""
    parts = [part + b"\n" for part in data.split(b"\n")]
    parts[-1] = parts[-1][:-1]
    return parts if parts[-1] else parts[:-1]


def line_ends(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield for each line the name of its stream, in the order in which lines end; at the end those of unfinished
    ones."""
    begun: dict[str, bool] = {}
    for piece in pieces:
        yield from repeat(piece.stream, piece.data.count(b"\n"))
        begun[piece.stream] = not piece.data.endswith(b"\n")
    yield from (stream for stream, unfinished in begun.items() if unfinished)


def lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the lines of streams, at the end the unfinished ones."""
    cutter = Cutter()
    for piece in pieces:
        yield from cutter.feed(piece)
    yield from cutter.rest()


# ---------------------------------------------------------------- writing: (pieces) -> None

def write_raw(pieces: Iterable[Piece]) -> None:
    """Write bytes as they are, each stream to its own descriptor."""
    for piece in pieces:
        out.write(out.DESCRIPTORS[piece.stream], piece.data)


def write_json(pieces: Iterable[Piece]) -> None:
    """Write each piece as one JSON object on a line."""
    for piece in pieces:
        out.document(out.chunk(piece.agent_id, piece.stream, piece.offset, piece.data, piece.time))


def line_writer(prefixes: dict[str, str], times: bool) -> Callable[[Iterable[Piece]], None]:
    """Return what writes line by line, with the agent's prefix and perhaps the time before each."""
    def write(pieces: Iterable[Piece]) -> None:
        for line in lines(pieces):
            head = prefixes.get(line.agent_id, "") + (f"{line.time} " if times else "")
            ending = b"" if line.data.endswith(b"\n") else b"\n"
            out.write(out.DESCRIPTORS[line.stream], head.encode("utf-8", "replace") + line.data + ending)
    return write


def prefixes(names: dict[str, str]) -> dict[str, str]:
    """Return `name|` for each agent id, of one width; an agent without a name, or with another's, shows its id."""
    short = show.short_ids(list(names))
    taken = list(names.values())
    shown = {i: show.clean(name) if name and taken.count(name) == 1 else f"{show.clean(name)} {short[i]}".strip()
             for i, name in names.items()}
    room = max(map(show.width, shown.values()), default=0)
    return {i: show.paint(name + "|", _PALETTE[n % len(_PALETTE)]) + " " * (room - show.width(name) + 1)
            for n, (i, name) in enumerate(shown.items())}
