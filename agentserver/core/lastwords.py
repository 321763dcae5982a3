"""How children ended, noted before they are reaped: a death of ours in between loses no exit code.

Owns:    `ends.jsonl`. A line that write(2) has taken survives a SIGKILL of ours.
Runs in: the core's thread.
Unaware: of agents. A child is told by its pid and start time.

A child that ended stays a zombie until it is reaped, so up to that moment the keeper would inherit
and report it. After it nobody could; so its end is written here first, and the file is emptied when
the registry has it (at the commit of the turn).
"""
from __future__ import annotations

import json
import os
from contextlib import suppress

from .process import Ended


class LastWords:
    """See the module; `before` is what the core that died has left: (pid) -> how it ended."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._written = False
        self.before: dict[int, Ended] = {}
        for line in os.pread(self._fd, 16 * 1024 * 1024, 0).splitlines():
            try:
                pid, code, number = json.loads(line)
                self.before[int(pid)] = Ended(code, number, None, None)
            except (ValueError, TypeError):  # half a line: that child was not reaped either
                continue

    def note(self, pid: int, code: int | None, number: int | None) -> None:
        """Write how a child ended that is about to be reaped."""
        try:
            os.write(self._fd, json.dumps([pid, code, number]).encode() + b"\n")
        except OSError:  # a full disk must not keep an end from being seen; only a death of ours now could lose it
            pass
        self._written = True

    def restore(self) -> None:
        """Make the file anew if somebody has removed it."""
        put_back(self._fd, self._path, os.O_RDWR | os.O_APPEND)

    def known(self) -> None:
        """Forget everything: it is in the registry."""
        if self._written or self.before:
            os.ftruncate(self._fd, 0)
            self._written, self.before = False, {}

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def put_back(fd: int, path: str, flags: int) -> None:
    """If the file of `fd` is not at `path` any more, make an empty one there, and let `fd` be its descriptor."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return
    new = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(new, fd, inheritable=False)
    os.close(new)
