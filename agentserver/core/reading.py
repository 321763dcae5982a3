"""A piece of an agent's output, as a reply tells it: JSON that is as long as the reply has room for.

Owns:    the form of what `read_stdout` and `read_stderr` give back, and how much of the output fits.
Runs in: the core's thread.
Unaware: of agents, and of where a reader that names no offset goes on.
"""
from __future__ import annotations

from binascii import b2a_base64
from typing import NamedTuple

from ..wire import Json, encode, json_data, rfc3339
from .output import OutputLog
from .pushing import whole_characters

PIECE = 256 * 1024   # bytes of text that are encoded at once
TIMES_MOST = 4096    # pairs in one reply; beyond it neighbours share a time
TIME_BYTES = 54      # of one pair as JSON, at most


class Read(NamedTuple):
    """What is told: an object as JSON, in pieces, and the offset after it."""

    json: list[bytes]
    next_offset: int


def told(output: OutputLog, stream: str, offset: int, most: int, over: bool, times: bool, room: int) -> Read:
    """Return at most `most` bytes of a stream from `offset` on, with their times if these are asked for, as JSON of at
    most `room` bytes. `over`: nothing more can come."""
    got = output.read(stream, offset, most)
    data, end = got.data, output.span(stream)[1]
    if not (over and got.next_offset == end):
        data = data[:whole_characters(data)]
    pairs = min(TIMES_MOST, room // 4 // TIME_BYTES) if times else 0
    text, encoding, count = _fitting(data, room - pairs * TIME_BYTES - 512)
    last = got.offset + count
    rest: Json = {"encoding": encoding, "bytes": count, "offset": got.offset, "next_offset": last,
                  "first_offset": got.first_offset, "dropped": got.dropped, "eof": over and last >= end}
    if got.dropped:
        rest["dropped_reason"] = output.why_dropped(stream, got)
    if not count:
        rest["message"] = "the stream has ended" if rest["eof"] else "nothing new"
    if times:
        rest["times"] = _times(output.times(stream, got.offset, last), pairs)
    return Read([b'{"data":', *(text if count else [b"null"]), b",", encode(rest)[1:]], last)


def _times(found: list[tuple[float, int]], most: int) -> list[list[object]]:
    """Return so many of the pairs: the last of each step, which says when all before it was there."""
    step = 1 + len(found) // most
    return [[rfc3339(at), stop] for at, stop in found[::-1][::step][::-1]]


def _fitting(data: bytes, room: int) -> tuple[list[bytes], str, int]:
    """Return as much of some bytes as has room, as the pieces of a JSON text; its encoding, and how many bytes."""
    pieces, count, left = [b'"'], 0, room - 2
    while count < len(data) and left > 0:
        piece = data[count:count + PIECE]
        if len(piece) == PIECE:
            piece = piece[:whole_characters(piece)]
        text, encoding = json_data(piece)
        if encoding != "utf-8":
            return _base64(data, room)
        text = text[1:-1]
        if len(text) > left:
            text, piece = _cut(piece, left)
            left = 0
        left -= len(text)
        count += len(piece)
        pieces.append(text)
    pieces.append(b'"')
    return pieces, "utf-8", count


def _base64(data: bytes, room: int) -> tuple[list[bytes], str, int]:
    count = min(len(data), room // 4 * 3 - 3)
    return [b'"', b2a_base64(data[:count], newline=False), b'"'], "base64", count


def _cut(piece: bytes, room: int) -> tuple[bytes, bytes]:
    """Return what fits of the last piece: each byte becomes six at most, as a control character does."""
    piece = piece[:room // 6]
    piece = piece[:whole_characters(piece)]
    return json_data(piece)[0][1:-1], piece
