"""What only root may see of our processes: their memory, in /proc, by ptrace(2), or in a core dump.

Owns:    the flag PR_SET_DUMPABLE and the soft RLIMIT_CORE of keeper, core and shell.
Runs in: each of them, at its beginning, before it holds anything of anybody's.
Unaware: of what they do, and of agents: execve(2) makes a program dumpable again, and its limit of core files is the
         one that the server was given (inherited.py).

To its own user a process that is not dumpable shows neither its environment, nor its memory, nor its descriptors in
/proc (prctl(2)); its state, command line and times it does. So each of ours tells how many descriptors it has open.
"""
from __future__ import annotations

import os
import resource

_DUMPABLE = 4  # PR_SET_DUMPABLE, linux/prctl.h


def shield() -> int:
    """Let this process leave no core dump, and show its memory to nobody but root; return its soft RLIMIT_CORE from
    before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        import ctypes
        ctypes.CDLL(None, use_errno=True).prctl(_DUMPABLE, 0, 0, 0, 0)
    except (OSError, AttributeError):  # not Linux
        pass
    return soft


def open_descriptors() -> int:
    """Return how many descriptors this process has open, for those who may not count them; 0 where it cannot itself.
    Since Linux 6.2 stat(2) tells; a keeper has thousands, and would list them again and again."""
    try:
        told = os.stat("/proc/self/fd").st_size
        return told or len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    except OSError:
        return 0
