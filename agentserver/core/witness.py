"""Did the child begin? What a new core cannot see when the one before it died in the middle of a spawn.

Owns:    `spawning`: the id of the agent that is being started, until its child has begun.
Runs in: the core's thread, and in the child between fork and exec, as a file action of posix_spawn.
Unaware: of what follows from it (takeover.py).

The core starts one agent at a time. It writes the id, then forks; the first thing that the child does
is to open the file with O_TRUNC. So whoever finds the id in it knows that no child has ever begun,
and whoever finds it empty that one has, though it may have ended long ago and its pid be unknown.
"""
from __future__ import annotations

import os
from typing import Any

from .lastwords import put_back


class Witness:
    """See the module."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        #: whose child had not begun when the core before us died, "" if it had
        self.before = os.pread(self._fd, 64, 0).decode("ascii", "replace")
        #: when the last child began, since the epoch: it changed the file then
        self.began = os.fstat(self._fd).st_mtime
        #: for posix_spawn, before the action that gives the child its real descriptor 0
        self.action: tuple[Any, ...] = (os.POSIX_SPAWN_OPEN, 0, path, os.O_WRONLY | os.O_TRUNC, 0o600)

    def expect(self, agent_id: str) -> str:
        """Note whose child is about to be forked; return why that cannot be done, "" if it was."""
        try:
            os.pwrite(self._fd, agent_id.encode("ascii"), 0)
        except OSError as e:
            return e.strerror or str(e)
        return ""

    def restore(self) -> None:
        """Make the file anew if somebody has removed it: without it no child could begin."""
        put_back(self._fd, self._path, os.O_RDWR)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)
