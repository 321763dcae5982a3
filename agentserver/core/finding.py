"""A core that has lost its keeper: is one there, and what does it say to the next?

Owns:    the call to it, and what is said when it does not answer.
Runs in: a keeper, before it serves.
Unaware: of what comes of it.

A core that is just beginning, or ending, is called again for some seconds. One that stands still cannot be replaced:
nobody but itself holds what its agents need. So it is named, and left alone. A signal that ends `serve` ends this, too.
"""
from __future__ import annotations

import os
import signal
import socket
import time

from ..errors import LinkError, StartError
from . import tree
from .channel import Channel, Json, readable
from .framing import KEEPER
from .link import dial
from .lock import held_by_another
from .peers import caller

ADOPT_SECS = 10.0          # for a core that is just beginning, or ending, to answer a keeper that found it
AGAIN_SECS = 0.1           # between two calls
ENDS = (signal.SIGTERM, signal.SIGINT)


class Found:
    """A core that answers: the channel to it, the first word, and the words that came together with it."""

    def __init__(self, channel: Channel, words: list[Json | None]) -> None:
        self.channel, self.words = channel, words[1:]
        first = words[0]
        if first is None:
            raise EOFError
        self.word = first


def find(state_dir: str, wake: socket.socket) -> Found | None:
    """Return the core that serves `state_dir`, None if there is none. Raise `StartError` if it does not answer, or if
    `wake` tells that this process is to end."""
    until, pid = time.monotonic() + ADOPT_SECS, 0
    path = os.path.join(state_dir, "core.sock")
    while held_by_another(os.path.join(state_dir, "core.lock")):
        try:
            sock = dial(path)
            pid = caller(sock).pid
            return _call(sock, wake, until, state_dir)
        except TimeoutError:
            break
        except (LinkError, OSError, EOFError):  # it is just beginning, or ending
            if time.monotonic() >= until:
                break
            _await([], wake, time.monotonic() + AGAIN_SECS, state_dir)
    else:
        return None
    raise StartError(_no_answer(state_dir, pid))


def _call(sock: socket.socket, wake: socket.socket, until: float, state_dir: str) -> Found:
    """Say that a keeper is here, and wait for the answer; raise `TimeoutError` if none comes, `EOFError` if the other
    end goes away."""
    channel = Channel(sock)
    try:
        sock.sendall(KEEPER)
        words: list[Json | None] = []
        while not words:
            if not _await([channel.fileno()], wake, until, state_dir):
                raise TimeoutError
            words = channel.receive()
        return Found(channel, words)
    except BaseException:
        channel.close()
        raise


def _await(fds: list[int], wake: socket.socket, until: float, state_dir: str) -> bool:
    """Wait until one of `fds` is readable; return False when the time is over."""
    while True:
        ready = readable([wake.fileno(), *fds], until - time.monotonic())
        if wake.fileno() in ready and not set(ENDS).isdisjoint(wake.recv(4096)):
            raise StartError(f"ended by a signal; the server in {state_dir} goes on without a keeper")
        if wake.fileno() not in ready:
            return bool(ready)


def _no_answer(state_dir: str, pid: int) -> str:
    who = f"a core (process {pid})" if pid else "a core"
    what = f"{state_dir} is held by {who} that does not answer; "
    why = tree.hindered(pid) if pid else ""
    return what + (f"it {why}: let it go on (kill -CONT {pid}), or kill it, and its agents are lost" if why
                   else "see core.log there")
