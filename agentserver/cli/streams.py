"""Descriptors 0, 1 and 2: there from the first moment to the last, and what it means when one of them does not work.

Owns:    which of them the caller had closed, the sentence when one cannot be read or written, and leaving them quietly.
Runs in: the process of a person or script.
Unaware: of what is read and written.
"""
from __future__ import annotations

import errno
import os
import sys

_NAMES = ("stdin", "stdout", "stderr")

#: those that were closed when we were started
closed: set[int] = set()


class StreamError(OSError):
    """One of the three cannot be read or written, and that is not the end of a pipe."""

    def __init__(self, fd: int, error: OSError) -> None:
        done, self.code = ("written", "output") if fd else ("read", "input")
        why = "it is closed" if fd in closed else error.strerror or str(error)
        super().__init__(f"{_NAMES[fd]} cannot be {done}: {why}")
        self.fd = fd


def prepare() -> None:
    """Fill descriptors 0 to 2 where the caller closed them, and let any text be printed.

    Else a socket of ours would become descriptor 1, and an agent's output would be written into it. What is put in the
    place of stdin and stdout fails as a closed one does, when it is used; without a stderr nothing is told.
    """
    for fd, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free descriptor, which is this one
            os.set_inheritable(fd, True)
            closed.add(fd)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def need(fd: int) -> None:
    """Raise `StreamError` if the caller had closed this descriptor."""
    if fd in closed:
        raise StreamError(fd, OSError(errno.EBADF, os.strerror(errno.EBADF)))


def read(most: int) -> bytes:
    """Return some of stdin, b"" at its end."""
    try:
        return os.read(0, most)
    except BlockingIOError:
        raise
    except OSError as e:
        raise StreamError(0, e) from None


def flush() -> None:
    """Write what is buffered now, where a closed pipe or a full disk can still be told."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            raise StreamError(1, e) from None


def forget(fd: int) -> None:
    """Keep the interpreter from writing to a descriptor that does not work, and complaining about it, when it ends."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, fd)
        os.close(null)
    except OSError:
        pass
