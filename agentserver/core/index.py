"""When an agent's output was written: a record per chunk, in numbered files.

Owns:    the files `index.*` of one agent's directory.
Runs in: the core's loop.
Unaware: of what was written (output.py). It never fails; at worst it knows less.

A record says: at this time the streams ended here and there. Each one can be read alone, so a
damaged, short or missing index costs exact times and nothing else.
"""
from __future__ import annotations

import os
import struct
from typing import Callable, Iterator

from .files import is_other, open_file, read_file, remove, size_of

SEGMENT_BYTES = 4 * 1024 * 1024
LEAST_SEGMENT = 4096
OPEN = os.O_RDWR | os.O_CREAT   # never O_APPEND: splice refuses it

_RECORD = struct.Struct("<QQQ")     # microseconds since the epoch, end of stdout, end of stderr
TIME, STDOUT, STDERR = range(3)     # its columns
_NO_RECORD = (0, 0, 0)


class Index:
    """When the output was written: records in numbered files. It never fails; at worst it knows less."""

    __slots__ = ("_directory", "_limit", "_fd", "_numbers", "_size", "total")

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._limit = LEAST_SEGMENT // 4    # bytes in one file
        self._fd = -1
        self._numbers: list[int] = [0]      # of the files, in order; the last one is written
        self._size = 0                      # bytes in the last file, whole records only
        self.total = 0                      # bytes in all files

    def recover(self, files: list[tuple[int, int]], limit: int) -> None:
        self._limit = min(limit, SEGMENT_BYTES // 16)
        if files:
            self._numbers = [number for number, _ in files]
            self._size = files[-1][1] // _RECORD.size * _RECORD.size
            self.total = sum(size for _, size in files[:-1]) + self._size

    def add(self, at: float, stdout_end: int, stderr_end: int) -> None:
        """Write one record, over a partial one if there is any."""
        try:
            if self._fd < 0 or self._size + _RECORD.size > self._limit:
                self._open()
            record = _RECORD.pack(max(0, round(at * 1e6)), stdout_end, stderr_end)
            if os.pwrite(self._fd, record, self._size) == len(record):
                self._size += len(record)
                self.total += len(record)
        except OSError:
            self.close()

    def _open(self) -> None:
        self.close()
        if self._size + _RECORD.size > self._limit or is_other(self._directory, _name(self._numbers[-1])):
            self._numbers.append(self._numbers[-1] + 1)
            self._size = 0
        self._fd = open_file(self._directory, _name(self._numbers[-1]), OPEN)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            quietly(os.close, fd)

    def shrink(self, most: int) -> None:
        """Drop the oldest files until at most `most` bytes are left: times are worth less than output."""
        while self.total > most and len(self._numbers) > 1:
            self._drop_oldest()

    def forget(self, stdout_first: int, stderr_first: int) -> None:
        """Drop the files that speak only of bytes before these offsets."""
        while len(self._numbers) > 1:
            _at, stdout_end, stderr_end = self._last(self._numbers[0])
            if stdout_end > stdout_first or stderr_end > stderr_first:
                return
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        name = _name(self._numbers.pop(0))
        try:
            self.total -= size_of(self._directory, name)
            remove(self._directory, name)
        except OSError:
            pass
        if len(self._numbers) == 1:
            self.total = self._size     # whatever strangers did to the files, the sum is right again

    def records(self, column: int, least: int) -> Iterator[tuple[int, int, int]]:
        """Yield the records from the first one on whose `column` is at least `least`."""
        place, position, data = self._find(column, least)
        while True:
            yield from _RECORD.iter_unpack(data[position * _RECORD.size:])
            place += 1
            if place >= len(self._numbers):
                return
            position, data = 0, self._load(self._numbers[place])

    def last_before(self, column: int, limit: int) -> tuple[int, int, int]:
        """Return the last record whose `column` is below `limit`, or zeros."""
        place, position, data = self._find(column, limit)
        if position:
            return _record(data, position - 1)
        return self._last(self._numbers[place - 1]) if place else _NO_RECORD

    def latest(self) -> float:
        """Return the time of the last record, 0 if there is none."""
        return self._last(self._numbers[-1])[TIME] / 1e6

    def _find(self, column: int, least: int) -> tuple[int, int, bytes]:
        """Return file, position and the file's records of the first record with `column` >= `least`."""
        low, high = 0, len(self._numbers) - 1
        while low < high:
            middle = (low + high) // 2
            if self._last(self._numbers[middle])[column] >= least:
                high = middle
            else:
                low = middle + 1
        data = self._load(self._numbers[low])
        first, last = 0, len(data) // _RECORD.size
        while first < last:
            middle = (first + last) // 2
            if _record(data, middle)[column] >= least:
                last = middle
            else:
                first = middle + 1
        return low, first, data

    def _load(self, number: int) -> bytes:
        """Return the whole records of one file."""
        most = self._size if number == self._numbers[-1] else SEGMENT_BYTES
        try:
            data = read_file(self._directory, _name(number), 0, most) if most else b""
        except OSError:
            return b""
        return data[:len(data) // _RECORD.size * _RECORD.size]

    def _last(self, number: int) -> tuple[int, int, int]:
        name = _name(number)
        try:
            size = self._size if number == self._numbers[-1] else size_of(self._directory, name)
            at = (size // _RECORD.size - 1) * _RECORD.size
            return _record(read_file(self._directory, name, at, _RECORD.size), 0) if at >= 0 else _NO_RECORD
        except (OSError, struct.error):
            return _NO_RECORD


def _name(number: int) -> str:
    return f"index.{number:020d}"


def _record(data: bytes, position: int) -> tuple[int, int, int]:
    return _RECORD.unpack_from(data, position * _RECORD.size)


def quietly(call: Callable[..., object], *args: object) -> None:
    """Do what cannot be mended when it fails."""
    try:
        call(*args)
    except OSError:
        pass
