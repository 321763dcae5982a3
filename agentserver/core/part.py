"""Core or shell, as the keeper sees them: one process of our own program.

Owns:    how a part is started, whether it lives, and when it may be started again.
Runs in: the keeper.
Unaware: of what the parts do and of each other.
"""
from __future__ import annotations

import os
import socket
import time

from ..config import ServerConfig
from . import process
from .channel import Channel, Json, whole

BACKOFF_SECS = (0.05, 5.0)   # first and longest pause before a part that does not come up is started again
LEAST_LIFE_SECS = 0.1        # a part that got ready and lived so long is started again at once


class Part:
    """Core or shell: how it is started, whether it lives, when it may be started again."""

    def __init__(self, name: str, config: ServerConfig) -> None:
        self.name, self._config = name, config
        self.pid = 0
        self.channel: Channel | None = None
        self.ready: Json = {}
        self.endpoints: Json = {}  # where it listens, for the next one too: it may die before it is ready
        self.listeners: list[int] = []  # copies of what it listens on: who comes before the next one is there waits
        self.open_descriptors = 0  # as it says itself
        self.failed = ""        # the sentence with which it gave up
        self.done = False       # it said that it is through
        self.yielded = False    # it waits for its successor to serve, or to fail
        self.leaving = False    # it was told to, and another comes in its place
        self.asks_ends = False  # it waits to be told of all ends up to now
        self.ours = True        # our child; else adopted, and only its channel tells of its end
        self.asked = 0          # the number of the question that it has not answered yet, 0: none; see pulse.py
        self.silent = 0.0       # for how many seconds of our own running time it has said nothing, though it was to
        self.still = ""         # what was said of that
        self.killed = ""        # why we had to kill it
        self.began = 0.0        # monotonic
        self.again_at = 0.0     # when to start it (again)
        self._pause = 0.0

    def start(self, word: Json) -> None:
        """Start the process and tell it `word`."""
        self.began = time.monotonic()
        ours, theirs = socket.socketpair()
        log = os.open(os.path.join(self._config.state_dir, self.name + ".log"),
                      os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self.pid = process.start([*process.program(), "_" + self.name], {0: theirs.fileno(), 1: log, 2: log})
        finally:
            theirs.close()
            os.close(log)
        self.channel, self.ready, self.failed, self.ours = Channel(ours), {}, "", True
        self.done = self.yielded = self.leaving = self.asks_ends = False
        self.asked, self.silent, self.still, self.killed = 0, 0.0, "", ""
        self.channel.send(word, self.listeners)

    def adopt(self, channel: Channel, word: Json) -> None:
        """Take over a core whose keeper died: `word` is the first that it says to us over `channel`."""
        self.channel, self.pid, self.ours, self.began = channel, int(word["ready"]["pid"]), False, time.monotonic()
        self.hear(word)

    def dead(self) -> None:
        """It has ended: note when it may be started again."""
        now = time.monotonic()
        first, most = BACKOFF_SECS
        crashed_at_once = not self.ready or now - self.began < LEAST_LIFE_SECS
        self._pause = min(max(first, self._pause * 2), most) if crashed_at_once else 0.0
        if self.failed:  # it may be older than us and not know what it was given, and so find its address taken
            self._listens(self.endpoints, [])
        self.pid, self.again_at = 0, now + self._pause
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def hear(self, word: Json) -> None:
        """Note what it said of itself."""
        self.silent = 0.0
        self.open_descriptors = int(word.get("open", self.open_descriptors))
        self.asked = 0 if word.get("pong") == self.asked else self.asked
        self.ready = word.get("ready", self.ready)
        if "endpoint" in word.get("ready", ()):
            self._listens(self.ready, whole(word.get("fds", [])))
        self.failed = word.get("failed", self.failed)
        self.done = word.get("done", self.done)
        self.asks_ends = word.get("reap", self.asks_ends)

    @property
    def answers(self) -> bool:
        """Whether it serves, and has said that it answers to `ping`."""
        return bool(self.pid and self.ready.get("answers") and not self.yielded and not self.leaving)

    @property
    def starts(self) -> bool:
        """Whether it was started, and does not serve yet."""
        return bool(self.pid and not self.ready)

    @property
    def leaves(self) -> bool:
        """Whether it was told to leave, as another comes in its place, and has not gone yet."""
        return bool(self.pid and self.leaving)

    def leave(self) -> None:
        """Note that it was told to, just now."""
        self.leaving, self.silent = True, 0.0

    def _listens(self, where: Json, fds: list[int]) -> None:
        for fd in self.listeners:
            os.close(fd)
        self.endpoints, self.listeners = where, fds

    def state(self) -> Json:
        """Return what a newer version of us needs to go on with it."""
        return {"pid": self.pid, "channel": self.channel.fileno() if self.channel is not None else -1,
                "ready": self.ready, "endpoints": self.endpoints, "listeners": self.listeners, "ours": self.ours}

    @property
    def descriptors(self) -> list[int]:
        """What a newer version of us needs besides."""
        return [*self.listeners, *([self.channel.fileno()] if self.channel is not None else [])]

    def restore(self, state: Json) -> None:
        """Go on with a process that an older version of us has started."""
        self.pid, self.ready, self.ours, self.began = state["pid"], state["ready"], state["ours"], time.monotonic()
        self.endpoints, self.listeners = state["endpoints"], state.get("listeners", [])
        if state["channel"] >= 0:
            self.channel = Channel(socket.socket(fileno=state["channel"]))
        for fd in self.descriptors:
            os.set_inheritable(fd, False)

    def stop(self, again: bool = False) -> None:
        """Ask it to leave; `again`: another comes in its place."""
        if again:
            self.leave()
        else:
            self.leaving = False
            self._listens({}, [])
        if self.channel is not None:
            self.channel.send({"stop": True, "again": again})
