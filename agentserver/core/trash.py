"""Directories of agents that are forgotten: out of the way at once, deleted little by little.

Owns:    `trash/`: what waits to be deleted, also that of a core that died before it had come to the end of it.
Runs in: the core's thread; deleting is a task of the scheduler.
Unaware: of agents.

An agent may have made a million files in its directory, or a thousand levels of directories, or links to other places.
So nothing is deleted at once, no link is followed, and a directory inside is moved up beside the one that it was in, so
that depth costs nothing.
"""
from __future__ import annotations

import os
from collections import deque
from typing import Callable, Deque, Generator

from .files import make_private
from .scheduler import Pace, Scheduler, Task


class Trash:
    """See the module. `path` is where it is; its parent is there."""

    def __init__(self, path: str, scheduler: Scheduler, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self._path, self._scheduler, self._clock, self._say = path, scheduler, clock, say
        self._waiting: Deque[str] = deque()
        self._task: Task | None = None
        self._prefix, self._count = os.urandom(8).hex(), 0  # names that no core before us has given

    def finish(self) -> None:
        """Go on with what a core before us has left."""
        try:
            for name in os.listdir(self._path):
                self._expect(f"{self._path}/{name}")
        except OSError:
            pass

    def throw(self, directory: str) -> None:
        """Take a directory, or whatever has its name, out of the way, and delete it some time."""
        try:
            self._expect(self._moved(directory))
        except FileNotFoundError:
            pass
        except OSError as e:
            self._say(f"{directory} cannot be removed: {e.strerror}; remove it yourself")

    def _moved(self, path: str) -> str:
        """Give something a name of its own in the trash; return that."""
        self._count += 1
        place = f"{self._path}/{self._prefix}-{self._count}"
        try:
            os.rename(path, place)
        except FileNotFoundError:
            if not os.path.lexists(path):
                raise
            make_private(self._path)
            os.rename(path, place)
        return place

    def _expect(self, path: str) -> None:
        self._waiting.append(path)
        if self._task is None or self._task.done:
            self._task = self._scheduler.add("", self._steps())

    def _steps(self) -> Generator[None, None, None]:
        pace = Pace(self._clock)
        while self._waiting:
            path = self._waiting.popleft()
            try:
                yield from self._delete(path, pace)
            except FileNotFoundError:
                pass
            except OSError as e:
                self._say(f"{path} cannot be deleted: {e.strerror}; it is tried again when the core starts anew")
            if pace.over():
                yield
                pace.begin()

    def _delete(self, path: str, pace: Pace) -> Generator[None, None, None]:
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
            return
        os.chmod(path, 0o700)
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)  # rename(2) refuses to move a directory that we may not write to
                    self._waiting.append(self._moved(entry.path))
                else:
                    os.unlink(entry.path)
                if pace.over():
                    yield
                    pace.begin()
        os.rmdir(path)
