"""One process per job and state directory: a flock that lasts as long as its holder.

Owns:    `keeper.lock`, `core.lock`, `shell.lock`. Not a pid file: the kernel lets go when the holder dies.
Runs in: keeper, core and shell. The descriptor is close-on-exec, so that no child inherits the lock.
Unaware: of who holds what for which purpose.
"""
from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager, suppress
from typing import Iterator

from ..errors import StartError

_AGAIN_SECS = 0.02


@contextmanager
def held(path: str) -> Iterator[int]:
    """Hold the lock for a while, and yield its descriptor; raise `StartError` if another process has it."""
    fd = lock(path)
    try:
        yield fd
    finally:
        os.close(fd)


def lock(path: str) -> int:
    """Take the lock and return its descriptor; raise `StartError` if another process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(f"the state directory {os.path.dirname(os.path.abspath(path))} is already served "
                         f"({os.path.basename(path)} is held); stop that server, or name another directory with "
                         "--state-dir") from None
    return fd


def restore(fd: int, path: str) -> None:
    """If somebody has removed the file of a lock that we hold, make and hold it anew, by the same descriptor: another
    process could take a lock of that name otherwise. Raise `StartError` if one has."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return
    new = lock(path)
    os.dup2(new, fd, inheritable=False)
    os.close(new)


def held_by_another(path: str) -> bool:
    """Return whether some process holds the lock."""
    try:
        os.close(lock(path))
    except StartError:
        return True
    return False


def is_held(path: str) -> bool:
    """Return whether some process holds the lock, and do not make the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def await_free(path: str, secs: float) -> None:
    """Wait until nobody holds the lock, for at most `secs`: flock(2) with a deadline does not exist, so it is tried."""
    until = time.monotonic() + secs
    while os.path.exists(path) and held_by_another(path) and time.monotonic() < until:
        time.sleep(_AGAIN_SECS)
