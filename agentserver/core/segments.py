"""Where the bytes of one stream lie: closed segments, then the last one, and the offsets between them.

Owns:    the arithmetic of one stream's segments, and finding their files in a directory again.
Runs in: the core's loop, and in processes that only read.
Unaware: of what is written when, of the index, and of the other stream.
"""
from __future__ import annotations

import os
from typing import Iterator

from .files import listed
from .index import quietly

MAX_OFFSET = 2 ** 63 - 1
#: why bytes are gone: the oldest go for the cap; the disk did not take them; something else has the name of their file;
#: nobody knows, as the core that knew has died
OUTPUT_CAP, DISK, FILE_GONE, UNKNOWN = "output_cap", "disk", "file_gone", "unknown"


class Segments:
    """What is kept of one stream: closed segments, then the last one, which is open while it is written."""

    __slots__ = ("name", "column", "splice", "fd", "closed", "start", "size", "first", "end", "kept", "capped",
                 "unknown")

    def __init__(self, name: str, column: int, splice: bool) -> None:
        self.name = name
        self.column = column        # in an index record
        self.splice = splice        # whether bytes can come by it, as far as is known
        self.fd = -1
        self.closed: list[tuple[int, int]] = []     # (start, size), in order, none empty
        self.start = self.size = 0                  # of the last segment
        self.first = self.end = 0                   # offsets
        self.kept = 0                               # bytes in all segments
        self.capped = 0                             # offset before which bytes went for the cap
        self.unknown = 0                            # before which nobody knows why bytes are gone: those of a dead core

    @property
    def gap(self) -> bool:
        """Whether bytes were lost after the last segment."""
        return self.start + self.size != self.end

    def grow(self, count: int) -> None:
        self.size += count
        self.end += count
        self.kept += count

    def lose(self, count: int) -> None:
        self.end += count
        if not self.kept:
            self.first = self.end

    def resize(self, size: int) -> None:
        self.kept += size - self.size
        self.size = size
        self.end = max(self.end, self.start + size)
        self._find_first()

    def begin(self) -> None:
        if self.size:
            self.closed.append((self.start, self.size))
        self.start, self.size = self.end, 0
        self._find_first()

    def drop_oldest(self) -> int:
        start, size = self.closed.pop(0)
        self.kept -= size
        self.capped = start + size
        self._find_first()
        return start

    def recover(self, segments: list[tuple[int, int]]) -> None:
        """Take over (start, size) pairs; where two overlap, the later one has the bytes."""
        for (start, size), (following, _) in zip(segments, segments[1:]):
            if size:
                self.closed.append((start, min(size, following - start)))
        if segments:
            self.start, self.size = segments[-1]
            self.end = self.start + self.size
        self.kept = self.size + sum(size for _, size in self.closed)
        self._find_first()
        self.unknown = self.first

    def gone(self, offset: int) -> tuple[str, int]:
        """Return why the byte at an offset before the first kept one is gone, and up to where that holds."""
        for reason, end in ((OUTPUT_CAP, self.capped), (UNKNOWN, self.unknown)):
            if offset < end:
                return reason, min(end, self.first)
        return DISK, self.first

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            quietly(os.close, fd)

    def next_kept(self, offset: int) -> int:
        """Return the first kept offset that is not below `offset`, or the end."""
        for start, _size in self.segments_from(offset):
            return max(start, offset)
        return self.end

    def segments_from(self, offset: int) -> Iterator[tuple[int, int]]:
        """Yield (start, size) of every segment with bytes at or after `offset`."""
        for start, size in self.closed:
            if start + size > offset:
                yield start, size
        if self.size and self.start + self.size > offset:
            yield self.start, self.size

    def _find_first(self) -> None:
        if self.closed:
            self.first = self.closed[0][0]
        else:
            self.first = self.start if self.size else self.end


def numbered_files(directory: str) -> Iterator[tuple[str, int, os.stat_result]]:
    """Yield (name, number, status) of all that is called like a file of ours, whatever it is."""
    for called, status in listed(directory):
        name, _, digits = called.partition(".")
        if len(digits) == 20 and digits.isascii() and digits.isdigit() and int(digits) <= MAX_OFFSET:
            yield name, int(digits), status
