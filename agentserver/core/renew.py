"""A process that becomes its own newer version: execve(2) keeps the pid, the children and the descriptors.

Owns:    telling whether our code on disk has changed and can be loaded, and carrying a state over an exec.
Runs in: the keeper, the one process that has to stay the parent of what it adopted.
Unaware: of what the state means.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import Iterable, NoReturn

from . import process
from .channel import Json

TRIAL_SECS = 30.0  # for new code to be loaded, before the one who tries it is killed


def stamp(path: str) -> tuple[int, ...]:
    """Return what changes when a package directory, or the single file that holds it, is replaced."""
    if os.path.isfile(path):
        return 1, os.stat(path).st_size, os.stat(path).st_mtime_ns
    facts = []
    for folder, _, names in os.walk(path):
        for name in names:
            if name.endswith(".py"):
                with suppress(OSError):  # it is just being replaced; or an editor's mark, which leads nowhere
                    facts.append(os.stat(os.path.join(folder, name)))
    return len(facts), sum(f.st_size for f in facts), max((f.st_mtime_ns for f in facts), default=0)


class Trial:
    """A process that loads the code which is on disk now, and ends. A keeper that could not load its new code would be
    a dead one; one that waited for the trial would hear nothing meanwhile, so its end is heard as all others are."""

    def __init__(self, found: tuple[int, ...]) -> None:
        self.found = found  # the stamp of what is tried
        self.pid = process.start([*process.program(), "_check"], {})
        self.until = time.monotonic() + TRIAL_SECS
        self.code: int | None = None

    def late(self, now: float) -> bool:
        """End it if it has taken too long; return whether that was so."""
        if self.code is not None or now < self.until:
            return False
        self.until = now + TRIAL_SECS
        process.send(self.pid, signal.SIGKILL)
        return True


def become(program: list[str], state: Json, fds: Iterable[int]) -> NoReturn:
    """Execute `program` in our place; it finds `state` by `restore`, and `fds` open under their numbers. Signals have
    to be blocked: until the new program has its handlers, one would end it."""
    with tempfile.TemporaryFile(dir=state["state_dir"]) as file:
        file.write(json.dumps(state).encode())
        file.flush()
        inherited = [file.fileno(), *fds]
        try:
            for fd in inherited:
                os.set_inheritable(fd, True)
            os.execv(program[0], [*program, str(file.fileno()), *sys.argv[1:]])
        finally:  # it could not be executed: we stay what we are
            for fd in inherited:
                os.set_inheritable(fd, False)


def restore(fd: int) -> Json:
    """Return the state that was carried over; its descriptors are close-on-exec again."""
    with open(fd, "rb") as file:
        file.seek(0)
        return dict(json.load(file))
