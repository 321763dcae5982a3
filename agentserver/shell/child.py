"""The shell as a process of the keeper: the same front, ended by the keeper's word.

Owns:    the channel to the keeper.
Runs in: the `_shell` process, main thread.
Unaware: of why it was started, or started again.
"""
from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Callable, Optional, Sequence

from ..core.channel import Channel, Json, whole
from ..core.lock import await_free, held, restore
from ..core.privacy import open_descriptors, shield
from ..core.quota import give_back
from ..errors import AgentServerError
from .descriptors import raise_limit
from .listening import hand_on, left_behind
from .server import Front

_ORPHAN_SECS = 5.0     # without a keeper and without a core for so long, there is nothing left to serve
_REBIND_SECS = 3.0     # for the address of a shell that has just died
_LEAVES_SECS = _ORPHAN_SECS + 2.0  # for a shell whose keeper and core have just died


class Kept:
    """The owner of a loop whose keeper decides: ends on its word, or when keeper and core are both gone."""

    closing = False    # the keeper asks the core to end, not we
    followed = False   # the keeper starts another shell when we leave

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._never, self._kept = socket.socketpair()  # what to watch when there is no keeper any more
        self._stopped = False
        self._orphan = False
        self.wake_fd = channel.fileno()
        self.tidy: Callable[[], None] = lambda: None  # looked at now and then

    def woken(self) -> None:
        """Hear the keeper."""
        self.hear(self._channel.receive())

    def hear(self, words: Sequence[Optional[Json]]) -> None:
        """Note what the keeper said; `None` says that it is gone."""
        for word in words:
            if word is None:
                self._orphan = True
                signal.signal(signal.SIGTERM, lambda *_: self._leave())  # a new keeper starts a shell of its own
                self.wake_fd = self._never.fileno()
            elif "ping" in word:
                self.tidy()
                self._channel.send({"pong": word["ping"], "open": open_descriptors()})
            else:
                self._stopped = self._stopped or bool(word.get("stop"))
                self.followed = bool(word.get("again", self.followed))

    def _leave(self) -> None:
        self._stopped = self.followed = True
        self._kept.send(b"x")  # wakes the loop

    def close(self) -> None:
        """Let go of what was watched."""
        self._never.close()
        self._kept.close()

    def over(self, absent: bool, gone_secs: float) -> bool:
        """Whether the keeper said stop, or nobody is left."""
        return self._stopped or (self._orphan and gone_secs > _ORPHAN_SECS)


def main(sock: socket.socket) -> int:
    """Serve for the keeper at the other end of `sock`; return the exit code."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    shield()
    raise_limit()
    give_back()
    sys.setswitchinterval(0.001)  # a request must not wait 5 ms for the monitor thread
    channel = Channel(sock)
    owner = Kept(channel)
    try:
        hello = channel.next()
        hello["fds"] = whole(hello.get("fds", []))
        owner.hear(channel.pending())
        _serve(channel, owner, hello)
    except (AgentServerError, EOFError) as e:
        sys.stderr.write(f"{e}\n")
        return channel.fail(str(e))
    finally:
        owner.close()
        channel.close()
    return 0


def _keep(fd: int, lock: str) -> None:
    """Hold our lock anew if its file was removed, so that the core still knows us by it."""
    try:
        restore(fd, lock)
    except (AgentServerError, OSError):  # the directory has gone, or another shell has come
        pass


def _tidy(fd: int, lock: str, front: Front, tell: Callable[[], None]) -> None:
    _keep(fd, lock)
    if front.put_back():
        tell()


def _tell(channel: Channel, front: Front, hello: Json) -> None:
    """Tell the keeper where we listen, and give it copies to hold for the next shell."""
    (endpoint, pub_endpoint), (files, fds) = front.endpoints, hand_on(front.bound)
    fds = fds if hello.get("holds_listeners") else []  # an older keeper would keep them open for nobody
    channel.send({"ready": {"endpoint": endpoint, "pub_endpoint": pub_endpoint, "files": files, "answers": True}}, fds)


def _serve(channel: Channel, owner: Kept, hello: Json) -> None:
    from ..config import ServerConfig
    config = ServerConfig.from_json(hello["config"])
    again = "endpoint" in hello
    lock = os.path.join(config.state_dir, "shell.lock")
    await_free(lock, _REBIND_SECS if again else _LEAVES_SECS)
    with held(lock) as fd:
        owner.tidy = lambda: _keep(fd, lock)
        front = Front(config, config.state_dir, hello.get("keeper_pid", 0))
        try:
            front.open(
                hello.get("endpoint") or config.endpoint,
                hello["pub_endpoint"] if again and "pub_endpoint" in hello else config.pub_endpoint,
                _REBIND_SECS if again else 0.0, left_behind(hello))
            loop = front.loop(owner)
            if loop.meet():
                owner.tidy = lambda: _tidy(fd, lock, front, lambda: _tell(channel, front, hello))
                _tell(channel, front, hello)
                loop.run()
        finally:
            front.close(owner.followed)
