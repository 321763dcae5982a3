"""A process that becomes its own newer version: execve(2) keeps the pid, the children and the descriptors.

Owns:    telling whether our code on disk has changed, and carrying a state over an exec.
Runs in: the keeper, the one process that has to stay the parent of what it adopted.
Unaware: of what the state means.
"""
from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from typing import Iterable, NoReturn

from .channel import Json


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
