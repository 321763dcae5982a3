"""Watching a process that is nobody's child of ours, and learning how it ended.

Owns:    pidfds, and the question PIDFD_GET_INFO (linux/pidfd.h, Linux >= 6.15 for exit codes).
Runs in: the core's thread.
Unaware: of agents.

This is for the double fault: a keeper died, and then a core. What that core had started has init for
a parent, which reaps it and tells us nothing; a pidfd still says when, and newer kernels say how.
"""
from __future__ import annotations

import fcntl
import os
import struct

from .process import Ended

_INFO = struct.Struct("=QQIIIIIIIIIIIi")  # mask, cgroup, pid, tgid, ppid, eight ids, exit code
_EXIT = 1 << 3                            # PIDFD_INFO_EXIT
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)


def open_pidfd(pid: int) -> int:
    """Return a descriptor that becomes readable when the process ends, or -1 where that is not known."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def how_it_ended(pidfd: int) -> Ended | None:
    """Return how a process ended; None while its parent has not reaped it, or where the kernel does not tell."""
    info = bytearray(_INFO.pack(_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return None
    mask, *_rest, status = _INFO.unpack(info)
    if not mask & _EXIT:
        return None
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return Ended(code, os.WTERMSIG(status) if os.WIFSIGNALED(status) else None, None, None)


def tells_exit_codes() -> bool:
    """Return whether this kernel answers PIDFD_GET_INFO with exit codes."""
    pid = os.posix_spawn("/bin/true", ["true"], {}) if os.path.exists("/bin/true") else 0
    if not pid:
        return False
    pidfd = open_pidfd(pid)
    os.waitpid(pid, 0)
    told = pidfd >= 0 and how_it_ended(pidfd) is not None
    if pidfd >= 0:
        os.close(pidfd)
    return told
