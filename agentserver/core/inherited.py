"""What an agent inherits from the core: set in the core around the start of each agent, and put back after it.

Owns:    the one place where the core changes limits and umask of its own for a moment: the soft RLIMIT_NOFILE and
         RLIMIT_CORE and the umask, which agents get as the server was given them, and the soft RLIMIT_RTTIME, by
         which an agent's descendants are known.
Runs in: the core's thread; a child that posix_spawn(3) makes meanwhile inherits all of it (getrlimit(2), umask(2)).
Unaware: of agents and processes.

A daemon that clears its environment, starts a session of its own and closes all its descriptors keeps its limits. So
each agent gets a soft RLIMIT_RTTIME of its own, its tag, and whatever descends from it shows that number in
/proc/PID/limits. It counts processor time that a process with a real-time policy uses without a single blocking system
call; the least tag is eleven days of that, so that the limit itself never matters.
"""
from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from typing import Any, Iterator, NamedTuple

LEAST_TAG = 10 ** 12   # microseconds
TAGS = 2 ** 52         # how many there are: two that are drawn at random are never the same
_LINE = b"Max realtime timeout"  # in /proc/PID/limits
_RTTIME: int | None = getattr(resource, "RLIMIT_RTTIME", None)


class Inherited(NamedTuple):
    """A soft limit of descriptors, a umask, and a tag; a tag of 0 is none. `core_bytes`: how large a core file may be,
    which the server's own processes have none of; None: as it is."""

    nofile: int
    umask: int
    tag: int = 0
    core_bytes: int | None = None


def new_tag() -> int:
    """Return a number for an agent that no other agent of this machine has, 0 where agents cannot be tagged."""
    return LEAST_TAG + int.from_bytes(os.urandom(8), "big") % TAGS if tags_work() else 0


def tags_work() -> bool:
    """Return whether the soft RLIMIT_RTTIME can be any tag: the system has it, and the hard limit is not lower."""
    if _RTTIME is None:  # not Linux
        return False
    hard = resource.getrlimit(_RTTIME)[1]
    return hard == resource.RLIM_INFINITY or hard >= LEAST_TAG + TAGS


@contextmanager
def around_start(inherited: Inherited) -> Iterator[None]:
    """Have all this while a child is started."""
    changed: list[tuple[int, tuple[Any, Any]]] = []
    umask = os.umask(inherited.umask)
    try:
        _set(resource.RLIMIT_NOFILE, inherited.nofile, changed)
        if inherited.core_bytes is not None:
            _set(resource.RLIMIT_CORE, inherited.core_bytes, changed)
        if inherited.tag and _RTTIME is not None:
            _set(_RTTIME, inherited.tag, changed)
        yield
    finally:
        for limit, before in reversed(changed):
            resource.setrlimit(limit, before)
        os.umask(umask)


def _set(limit: int, soft: int, changed: list[tuple[int, tuple[Any, Any]]]) -> None:
    before = resource.getrlimit(limit)
    if before[0] != soft:
        resource.setrlimit(limit, (soft, before[1]))
        changed.append((limit, before))


def tag_in(shown: bytes) -> int:
    """Return the tag in the text of /proc/PID/limits, 0 if there is none."""
    words = shown.partition(_LINE)[2].split(None, 1)
    if not words or not words[0].isdigit():
        return 0
    found = int(words[0])
    return found if found >= LEAST_TAG else 0
