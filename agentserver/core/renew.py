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
from typing import Callable, Iterable, NoReturn, Sequence

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
    """A process that loads the code which is on disk now, and ends. `found` is that code's stamp."""

    def __init__(self, found: tuple[int, ...]) -> None:
        self.found = found
        self.pid = process.start([*process.program(), "_check"], {})
        self.until = time.monotonic() + TRIAL_SECS
        self.code: int | None = None


class Renewal:
    """Whether we are to become our newer version, and can. A keeper that could not load its new code would be a dead
    one, so a process of its own tries that first; its end is heard like all others, and nobody waits for it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._stamp = say, stamp(process.home())
        self._wanted = False
        self._trial: Trial | None = None

    def restore(self, found: Sequence[int] | None) -> None:
        """Note which code we became: what changed since then may not be what was imported."""
        self._stamp = tuple(found) if found is not None else self._stamp

    def ask(self) -> None:
        """Look whether our code has changed."""
        self._wanted = True

    def step(self) -> tuple[int, ...] | None:
        """Do what is to be done now; return the stamp of what we are to become, when it was seen to load."""
        trial = self._trial
        if not self._wanted or (trial is not None and trial.code is None):
            return None
        found, self._trial = stamp(process.home()), None
        if trial is not None and trial.found == found:
            self._wanted = False
            if trial.code == 0:
                return found
            self.stay("it cannot be loaded")
        elif found != self._stamp:
            self._trial = Trial(found)
        else:
            self._wanted = False
        return None

    def stay(self, why: str) -> None:
        """Say that we do not become it."""
        self._wanted = False
        self._say(f"the keeper's own code has changed, and it stays what it was until the next reload: {why}")

    @property
    def due(self) -> list[float]:
        """When `end_late` has to be called."""
        return [self._trial.until] if self._trial is not None and self._trial.code is None else []

    def end_late(self, now: float) -> None:
        """Kill the process that tries our new code, if it has not ended by its time."""
        trial = self._trial
        if trial is not None and trial.code is None and now >= trial.until:
            trial.until = time.monotonic() + TRIAL_SECS
            process.send(trial.pid, signal.SIGKILL)

    def ended(self, pid: int, how: process.Ended) -> bool:
        """A process has ended; return whether it was the one that tried."""
        if self._trial is None or pid != self._trial.pid:
            return False
        self._trial.code = how.code if how.code is not None else -1
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
