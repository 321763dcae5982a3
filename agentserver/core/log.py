"""Our own log: one line at a time, on the process's stderr, bounded on disk.

Owns:    the format of a log line and the rotation of `<name>.log` to `<name>.log.1`.
Runs in: keeper, core and shell, each with a file of its own.
Unaware: of what is logged. Never given environment values, stdin or output of agents.
"""
from __future__ import annotations

import os
import sys
import time


class Log:
    """Write lines to a file that also catches our stderr; at `limit` bytes it is moved aside once."""

    def __init__(self, path: str | None, limit: int) -> None:
        self._path = path
        self._limit = limit

    def __call__(self, sentence: str) -> None:
        """Write one line. A log that cannot be written is not a reason to stop."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self._rotate()
            os.write(2, f"{stamp} {' '.join(sentence.split())}\n".encode("utf-8", "backslashreplace"))
        except OSError:
            pass

    def _rotate(self) -> None:
        if self._path is None or os.fstat(2).st_size < self._limit:
            return
        os.replace(self._path, self._path + ".1")
        redirect(self._path)


def redirect(path: str) -> None:
    """Send stdout and stderr of this process to the end of `path` (mode 0600)."""
    sys.stdout.flush()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
