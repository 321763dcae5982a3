"""Which directory may hold what a server keeps, and making it.

Owns:    the rules: ours alone, and either new, empty or a state directory already.
Runs in: whoever is to serve, before anything else is written there; `doctor`.
Unaware: of what is kept there. A directory that exists is used as it is or refused: its mode is its owner's business,
         and what a server writes into it is private by itself.
"""
from __future__ import annotations

import os
import stat

from ..errors import StartError

AGENTS = "agents"
#: one of these makes a directory a state directory
_OURS = ("keeper.lock", "core.lock", "shell.lock", "core.sock", "registry.db")
#: what may lie in one that was never served: the first things we make, and what the root of a file system has
_NOTHING = frozenset((AGENTS, "keeper.log", "lost+found"))
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def prepare(path: str) -> None:
    """Make the state directory, or see that it can be used; raise `StartError` with a sentence."""
    try:
        make(path)
        reason = unfit(path)
    except OSError as e:
        reason = f"cannot be used: {e.strerror}"
    if reason:
        raise StartError(f"the state directory {path} {reason}; name another with --state-dir")


def make(path: str) -> None:
    """Make a directory for us alone, whatever the umask; leave one that is there as it is."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    os.chmod(path, 0o700)


def unfit(path: str) -> str:
    """Return why a directory that exists is not to be used, "" where it may be."""
    facts = os.stat(path)
    if not stat.S_ISDIR(facts.st_mode):
        return "is not a directory"
    if facts.st_uid != os.geteuid():
        return f"belongs to another user (uid {facts.st_uid}), who could replace what is in it"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return "cannot be written"
    if not _known(path):
        return (f"holds files that are not a server's; a directory inside it would do, such as "
                f"{os.path.join(path, 'agentserver')}")
    if facts.st_mode & _OTHERS_WRITE:
        return (f"can be written by others (mode {stat.S_IMODE(facts.st_mode):04o}), who could replace what is in it: "
                f"chmod go-w it, or use a directory inside it, such as {os.path.join(path, 'agentserver')}")
    return ""


def _known(path: str) -> bool:
    """Whether a directory is empty or a state directory already."""
    found = set(os.listdir(path))
    return not found - _NOTHING or any(os.path.lexists(os.path.join(path, name)) for name in _OURS)
