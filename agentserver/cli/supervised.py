"""What `doctor` finds of the service manager under which the server runs, or would run.

Owns:    the checks of readiness, watchdog, descriptor store and KillMode, as far as one can see them from within.
Runs in: the main thread of a command. A running server is looked at through its keeper's environment in /proc.
Unaware: of what is said to the manager (core/notify.py).
"""
from __future__ import annotations

import os
import re
from typing import Mapping

from .doctor import GOOD, LACKING, UNKNOWN, Finding

FDS_STORED = 4  # of one agent: stdin, stdout, stderr, and the file of what waits for its stdin


def checks(keeper: int, max_agents: int) -> list[Finding]:
    """Return what is to be said of the manager of `keeper`, or of our own where no server runs (0)."""
    environ = environment_of(keeper) if keeper else dict(os.environ)
    if environ is None:
        return [Finding("service manager", UNKNOWN, f"the environment of process {keeper} cannot be read",
                        "what a manager gives the server is not known",
                        "run doctor as root: a server shows its environment to nobody else")]
    who = "the server" if keeper else "this command"
    if not environ.get("NOTIFY_SOCKET"):
        return [Finding("service manager", LACKING, f"{who} was not started by one (NOTIFY_SOCKET is not set)",
                        "when keeper and core die at once, what agents write then is lost, and they are ended at the "
                        "next start; nobody starts the server again", "run it as a service: docs/systemd.md")]
    unit = unit_of(keeper or os.getpid())
    found = f"{who} runs under one{' as ' + unit if unit else ''}, {_watchdog(environ)}"
    return [Finding("service manager", GOOD, found),
            store(environ, max_agents, unit), kill_mode(unit)]


def _watchdog(environ: Mapping[str, str]) -> str:
    usec = environ.get("WATCHDOG_USEC", "")
    good = re.fullmatch("[0-9]{1,18}", usec)
    return f"with a watchdog of {int(usec) / 1e6:g} s" if good else "without a watchdog (WatchdogSec=)"


def store(environ: Mapping[str, str], max_agents: int, unit: str) -> Finding:
    """Check that the manager keeps as many descriptors as agents may have (systemd >= 254 tells)."""
    needed, size = max_agents * FDS_STORED, environ.get("FDSTORE", "")
    mend = f"set FileDescriptorStoreMax={max(needed, 1024)} in the unit"
    if not re.fullmatch("[0-9]{1,18}", size):
        return Finding("descriptor store", UNKNOWN, "its size is not told (systemd before 254, or there is none)",
                       "with FileDescriptorStoreMax=0, which is the default, no output outlives the death of all our "
                       "processes at once", f"see systemctl show -p FileDescriptorStoreMax {unit or 'UNIT'}; {mend}")
    if int(size) < needed:
        return Finding("descriptor store", LACKING, f"{size} descriptors, and {max_agents} agents may have {needed}",
                       "what some agents write is lost when all our processes die at once", mend)
    return Finding("descriptor store", GOOD, f"{size} descriptors, {needed} needed for {max_agents} agents")


def kill_mode(unit: str) -> Finding:
    """Nothing in a process tells it the KillMode of its unit; say how to look, and what it has to be."""
    return Finding("KillMode", UNKNOWN, "cannot be seen from within",
                   "with another than KillMode=process, the manager kills every agent when the server ends or crashes",
                   f"see systemctl show -p KillMode {unit or 'UNIT'}; it has to be process")


def environment_of(pid: int) -> dict[str, str] | None:
    """Return the environment that a process was started with, None where that cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", encoding="utf-8", errors="surrogateescape") as file:
            pairs = [item.partition("=") for item in file.read().split("\0")]
    except OSError:
        return None
    return {name: value for name, _, value in pairs}


def unit_of(pid: int) -> str:
    """Return the systemd unit that a process belongs to, as its control group tells; "" if it does not."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            parts = file.read().replace("\n", "/").split("/")
    except OSError:
        return ""
    return next((part for part in reversed(parts) if part.endswith(".service")), "")
