"""The server's counters, in a file that outlives any of our processes.

Owns:    `counters.bin`: one 64-bit number per name, mapped into memory.
Runs in: the core. An increment is a store into the page cache, so a SIGKILL loses nothing.
Unaware: of what is counted and why.
"""
from __future__ import annotations

import mmap
import os
import struct

NAMES = ("requests", "spawn_requests", "successful_spawns", "failed_spawns", "control_commands",
         "list_requests", "health_checks", "errors", "bytes_captured", "messages_pushed", "messages_dropped")
_HEAD = 8  # the start time of the server that these numbers belong to
_NUMBER = struct.Struct("<q")
_STAMP = struct.Struct("<d")


class Counters:
    """`add` and `get` by name; all are zero again when the server itself (not a part of it) starts anew."""

    def __init__(self, path: str, started_at: float) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = _HEAD + _NUMBER.size * len(NAMES)
        try:
            have = os.fstat(fd).st_size  # less in a file of a version that counted less
            if have < size:  # written, not truncated: a hole is a SIGBUS on a full disk
                os.pwrite(fd, bytes(size - have), have)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._at = {name: _HEAD + i * _NUMBER.size for i, name in enumerate(NAMES)}
        if self._map[:_HEAD] != _STAMP.pack(started_at):
            self._map[:] = _STAMP.pack(started_at) + bytes(size - _HEAD)

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more."""
        at = self._at[name]
        _NUMBER.pack_into(self._map, at, _NUMBER.unpack_from(self._map, at)[0] + amount)

    def get(self, name: str) -> int:
        """Return one counter."""
        return int(_NUMBER.unpack_from(self._map, self._at[name])[0])

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
