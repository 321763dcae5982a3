"""A shell whose keeper died: ended, once another keeper has come.

Owns:    nothing; it signals the process that the kernel named when the shell connected, while it is still that one.
Runs in: the core.
Unaware: of what a shell does. There is nothing to lose in one, so that one that hangs, or is stopped, is killed.

The keeper that came starts a shell of its own, which needs the addresses of the one before it.
"""
from __future__ import annotations

import signal
from typing import Callable

from .facts import Facts
from .reactor import Reactor

LEAVE_SECS = 2.0  # to give the replies that are due


def end_orphaned(facts: Facts, reactor: Reactor, has_keeper: Callable[[], bool], number: int = signal.SIGTERM) -> None:
    """End a shell that another keeper has started than the one there is now, if there is one."""
    shell = facts.orphaned_shell()
    if shell is not None and has_keeper():
        shell.signal(number)
        if number != signal.SIGKILL:
            reactor.after(LEAVE_SECS, lambda: end_orphaned(facts, reactor, has_keeper, signal.SIGKILL))
