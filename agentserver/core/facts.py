"""What a health check tells of the server as a whole.

Owns:    who and where the parts of the server are, and since when it runs.
Runs in: the core's thread.
Unaware: of agents and of who asks.
"""
from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from ..config import ServerConfig
from ..wire import Json, encode
from . import tree
from .peers import Hello, Shell

STOPS_TOLD = 3  # looks, with ASK_SECS of the keeper between them


class Facts:
    """`started` is what the keeper told its core: config, started_at, generation; `keeper_pid` is who it is now."""

    def __init__(self, config: ServerConfig, started: Json, keeper_pid: int) -> None:
        self._config = config
        self.started_at = float(started["started_at"])
        self._keeper_pid, self.generation = keeper_pid, int(started["generation"])
        self._shell: Shell | None = None
        #: where the last shell listened, also when there is none now
        self.listened: Json = {}
        self._json = b""
        self._reload_failed = ""
        self._parts: Json = dict(started.get("parts", {}))
        self._stops, self._stopped = 0, ""  # how often a look has found the program stopped that is our shell
        self._open: Json = {}
        self._since = tree.ticks_now() - max(0.0, time.time() - self.started_at) * tree.TICKS

    def remember_start(self, before: str, boot: str) -> str:
        """Take in what a core before us has remembered of the server's start, and return what the next one needs: the
        clock may have been set since."""
        start = f"{boot} {self.started_at!r} "
        with suppress(ValueError):
            found = float(before[len(start):] if before.startswith(start) else "")
            self._since = found if 0.0 <= found <= tree.ticks_now() else self._since
        return f"{start}{self._since!r}"

    def set_parts(self, told: Json) -> None:
        """Note what the keeper tells of the server's parts: which one stands still, which one it had to kill."""
        self._parts = told
        self._json = b""

    def set_open(self, told: Json | None) -> None:
        """Note how many descriptors keeper and shell have open, if that was told: only root may count those of others
        (privacy.py)."""
        self._open = told if told is not None else self._open

    def set_reload_failed(self, why: str) -> None:
        """Note why the last reload failed, "" if it did not."""
        self._reload_failed = why
        self._json = b""

    def set_shell(self, shell: Shell | None) -> None:
        """Note which shell there is, and where it listens."""
        self._shell = shell
        if shell is not None:
            self.listened = {"endpoint": shell.hello.endpoint, "pub_endpoint": shell.hello.pub_endpoint}
        self._json = b""

    def look_at_shell(self) -> str | None:
        """Look whether a shell that is part of somebody's own program runs: no keeper asks it. Return what there is to
        say when that has changed: a sentence, or "" if it runs again; None if it has not."""
        shell = self._shell
        why = tree.hindered(shell.pid) if shell is not None and not shell.hello.keeper_pid else ""
        self._stops = self._stops + 1 if why and shell is not None else 0
        told = "" if shell is None or self._stops < STOPS_TOLD else (
            f"the program that serves the network (process {shell.pid}) {why}")
        if told == self._stopped:
            return None
        self._stopped = told
        self._json = b""
        return told

    def set_keeper(self, pid: int) -> None:
        """Note that another keeper has come."""
        self._keeper_pid = pid
        self._json = b""

    def orphaned_shell(self) -> Shell | None:
        """Return a shell that another keeper has started than the one there is now, if there is one."""
        theirs = self._shell.hello.keeper_pid if self._shell is not None else 0
        return self._shell if theirs and theirs != self._keeper_pid else None

    def _shell_pid(self) -> int:
        return self._shell.pid if self._shell is not None else 0

    def parts(self) -> set[int]:
        """Return the processes that are the server's own."""
        return {os.getpid(), self._keeper_pid, self._shell_pid()}

    def uptime(self) -> float:
        """Return the seconds since the server was started, across deaths of its parts, whatever the clock is set to."""
        return (tree.ticks_now() - self._since) / tree.TICKS

    def metadata(self) -> dict[str, str]:
        """Return the metadata of a health check; all text, as the protocol says."""
        from .. import __version__
        config, said = self._config, self._shell.hello if self._shell is not None else Hello()
        return {"server_id": config.server_id, "endpoint": said.endpoint, "pub_endpoint": said.pub_endpoint,
                "max_agents": str(config.max_agents), "version": __version__, "hostname": socket.gethostname(),
                "pid": str(self._keeper_pid),
                "shell_pid": str(self._shell_pid() or ""), "core_pid": str(os.getpid()),
                "generation": str(self.generation), "reload_failed": self._reload_failed,
                "stands_still": self._stopped or str(self._parts.get("stands_still", "")),
                "last_killed": str(self._parts.get("last_killed", "")),
                "state_dir": config.state_dir,
                "status_update_interval_secs": f"{config.status_update_interval_secs:g}"}

    def metadata_json(self) -> bytes:
        """Return the metadata as JSON, from memory while nothing has changed."""
        if not self._json:
            self._json = encode(dict(self.metadata()))
        return self._json

    def usage(self) -> Json:
        """Return what our processes use."""
        shell = self._shell_pid()
        return {"core": tree.usage(os.getpid()), "keeper": self._usage_of(self._keeper_pid, "keeper"),
                "shell": self._usage_of(shell, "shell") if shell else {}}

    def _usage_of(self, pid: int, part: str) -> Json:
        used = tree.usage(pid)
        return {**used, "fds": used["fds"] or self._open.get(part, 0)} if used else used
