"""What the paths mean that stand in variables, files and flags: `~`, where we are, the state directory.

Owns:    the one way in which server, clients and tools read such a path, so that all of them mean the same place.
Runs in: any process; it asks the system where we are and who has which home.
Unaware: of what lies there.
"""
from __future__ import annotations

import os
from typing import Mapping

from .errors import ConfigError


def expanded(path: str) -> str:
    """Return a path with a `~` or `~USER` at its beginning replaced by that home directory."""
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        whose = path.split("/")[0]
        raise ConfigError(f"{path}: the home directory {whose} is not known; write the whole path, or ./{path} where "
                          "a file has this name")
    return found


def working_directory() -> str:
    """Return where we are; raise `ConfigError` where that directory was deleted, or cannot be read."""
    try:
        return os.getcwd()
    except OSError as e:
        raise ConfigError(f"the working directory cannot be used ({e.strerror}); it may have been deleted: cd to "
                          "another") from None


def default_state_dir(environ: Mapping[str, str]) -> str:
    """Return where state lives when nobody says (XDG Base Directory: a relative XDG_STATE_HOME is ignored)."""
    base = environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME") or os.path.expanduser("~")
        if not os.path.isabs(home):
            raise ConfigError("there is no home directory to keep state in; name a directory with --state-dir")
        base = os.path.join(home, ".local", "state")
    return os.path.join(base, "agentserver")


def state_dir(environ: Mapping[str, str], given: str = "") -> str:
    """Return the state directory that is meant: what was given, else AGENTSERVER_STATE_DIR, else the usual one."""
    return expanded(given or environ.get("AGENTSERVER_STATE_DIR") or default_state_dir(environ))
