"""What a health check tells of the server as a whole.

Owns:    who and where the parts of the server are, and since when it runs.
Runs in: the core's thread.
Unaware: of agents and of who asks.
"""
from __future__ import annotations

import os
import socket
import time

from ..config import ServerConfig
from ..wire import Json, encode
from . import tree


class Facts:
    """`started` is what the keeper told its core: config, started_at, generation; `keeper_pid` is who it is now."""

    def __init__(self, config: ServerConfig, started: Json, keeper_pid: int) -> None:
        self._config = config
        self.started_at = float(started["started_at"])
        self._keeper_pid, self.generation = keeper_pid, int(started["generation"])
        self._shell: Json = {}
        #: where the last shell listened, also when there is none now
        self.listened: Json = {}
        self._json = b""
        self._reload_failed = ""

    def set_reload_failed(self, why: str) -> None:
        """Note why the last reload failed, "" if it did not."""
        self._reload_failed = why
        self._json = b""

    def set_shell(self, shell: Json) -> None:
        """Note where the shell listens; empty when there is none."""
        self._shell = shell
        self.listened = shell or self.listened
        self._json = b""

    def set_keeper(self, pid: int) -> None:
        """Note that another keeper has come."""
        self._keeper_pid = pid
        self._json = b""

    def orphaned_shell(self) -> int:
        """Return the pid of a shell that another keeper has started than the one there is now; 0 when there is none."""
        theirs = self._shell.get("keeper_pid", 0)  # 0: a program of somebody's own, which no keeper started
        return int(self._shell.get("pid") or 0) if theirs and theirs != self._keeper_pid else 0

    def shell(self) -> Json:
        """Return what the shell said of itself; empty when there is none."""
        return self._shell

    def parts(self) -> set[int]:
        """Return the processes that are the server's own."""
        return {os.getpid(), self._keeper_pid, int(self._shell.get("pid") or 0)}

    def uptime(self) -> float:
        """Return the seconds since the server was started, across deaths of its parts."""
        return max(0.0, time.time() - self.started_at)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of a health check; all text, as the protocol says."""
        from .. import __version__
        config = self._config
        return {"server_id": config.server_id, "endpoint": str(self._shell.get("endpoint", "")),
                "pub_endpoint": str(self._shell.get("pub_endpoint", "")), "max_agents": str(config.max_agents),
                "version": __version__, "hostname": socket.gethostname(), "pid": str(self._keeper_pid),
                "shell_pid": str(self._shell.get("pid", "")), "core_pid": str(os.getpid()),
                "generation": str(self.generation),
                "reload_failed": self._reload_failed, "state_dir": config.state_dir,
                "status_update_interval_secs": f"{config.status_update_interval_secs:g}"}

    def metadata_json(self) -> bytes:
        """Return the metadata as JSON, from memory while nothing has changed."""
        if not self._json:
            self._json = encode(dict(self.metadata()))
        return self._json

    def usage(self) -> Json:
        """Return what our processes use."""
        shell = self._shell.get("pid")
        return {"core": tree.usage(os.getpid()), "keeper": tree.usage(self._keeper_pid),
                "shell": tree.usage(int(shell)) if shell else {}}
