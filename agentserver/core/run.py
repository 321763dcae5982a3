"""One attempt of an agent while its process exists: its output, its timers, what is left to do when it ends.

Owns:    our ends of the output pipes, or of the terminal, which has one stream, stdout.
Runs in: the core's thread; nothing here blocks, and no agent can make it.
Unaware: of statuses and of who asked. It reports what happened through `Desk`.

Exit and end of output are two events: the exit comes from the kernel, the end of a stream from EOF,
which a descendant that holds the pipe may delay; after the exit it is waited for `drain_secs` at most.
"""
from __future__ import annotations

import fcntl
import os
from typing import Callable, Mapping, Protocol

from ..wire import Json
from . import tree
from .counters import Counters
from .output import OutputLog
from .process import Ended
from .pushing import Pushing
from .reactor import READ, Reactor, Timer, Watch
from .stdin import Stdin
from .terminal import Terminal

PIPE_BYTES, WIDE_BYTES = 64 * 1024, 256 * 1024  # what a pipe holds, and what one that was full is made to hold
F_SETPIPE_SZ = 1031  # fcntl has it from Python 3.10 on
STREAMS = ("stdout", "stderr")
DRAIN_CHUNKS = 64  # of 64 KiB: more than a pipe can hold (pipe(7): at most 1 MiB unless root raised it)


class Desk(Protocol):
    """What a run needs from around it."""

    reactor: Reactor
    pushing: Pushing
    counters: Counters

    def release(self, agent_id: str, names: list[str]) -> None:
        """The keeper need not hold these any longer."""

    def output_lost(self, agent_id: str) -> None:
        """Output was dropped for the cap, or could not be recorded."""


class Run:
    """See the module. `ends` are what `process.ends` made, or what a core before us has left of it."""

    __slots__ = ("_agent_id", "_desk", "_fds", "_losses", "_watches", "_wide",
                 "ended", "killer", "leaked", "ladder", "limit", "output", "pidfd", "shared", "stdin", "survivors",
                 "terminal")

    def __init__(self, agent_id: str, ends: Mapping[str, int], terminal: Terminal | None, output: OutputLog,
                 stdin: Stdin, desk: Desk) -> None:
        self._agent_id, self._desk, self.output, self.stdin = agent_id, desk, output, stdin
        self.terminal = terminal
        self._fds = {name: ends[name] for name in STREAMS if name in ends}
        shared = [ends[name] for name in ("stdin", *STREAMS) if name in ends]
        if terminal is not None:
            self._fds, shared = {"stdout": terminal.master}, [terminal.slave]
        #: what its processes hold and nobody else does
        self.shared = {tree.identity(os.fstat(fd)) for fd in shared if fd >= 0}
        self._wide: set[str] = set()         # streams whose pipe was made larger
        self._watches = {name: desk.reactor.watch(fd, READ, self._reader(name), bulk=True)
                         for name, fd in self._fds.items()}
        self._losses = output.losses         # that were seen
        self.ladder: Timer | None = None     # the next rung of the stop ladder
        self.limit: Timer | None = None      # when limits.runtime_secs is reached
        self.ended: Ended | None = None      # set when the leader was reaped
        self.killer: Timer | None = None     # the next of a large tree that are killed
        self.leaked: dict[int, str] = {}     # pid -> command of what had to be killed
        self.survivors: list[Json] = []      # what could not be, and why: see ending.py
        self.pidfd: Watch | None = None      # where nobody of ours is the leader's parent
        if terminal is not None and terminal.waiting:  # left in the relay, which wakes nobody
            self._capture("stdout")

    # ------------------------------------------------------------ output

    def _reader(self, name: str) -> Callable[[int], object]:
        return lambda _mask: self._capture(name)

    def _capture(self, name: str) -> bool:
        """Move one chunk from the pipe to the file; return whether there may be more."""
        try:
            moved = (self.output.capture(name, self._fds[name]) if self.terminal is None
                     else self.terminal.capture(self.output))
        except BlockingIOError:
            return False
        if moved == 0:
            self._end_of(name)
            return False
        if moved >= PIPE_BYTES and name not in self._wide and self.terminal is None:
            self._widen(name)
        self._desk.counters.add("bytes_captured", moved)
        self._desk.pushing.grown(self._agent_id, name, self.output, moved)
        if self.output.losses != self._losses:
            self._losses = self.output.losses
            self._desk.output_lost(self._agent_id)
        return True

    def _widen(self, name: str) -> None:
        """Give a stream that filled its pipe a larger one (pipe(7)), so that the agent can write on while we record."""
        self._wide.add(name)
        try:
            fcntl.fcntl(self._fds[name], F_SETPIPE_SZ, WIDE_BYTES)
        except OSError:  # not Linux, or this user's pipes hold too much already
            pass

    def _end_of(self, name: str) -> None:
        """The stream is over."""
        self._desk.reactor.unwatch(self._watches.pop(name))
        fd = self._fds.pop(name)  # the keeper's copy of a read end can stay: it does not delay anybody's EOF
        if self.terminal is None:
            os.close(fd)
        else:
            self.stdin.abandon()
            self.terminal.close()
        self._desk.pushing.ended(self._agent_id, name, self.output)
        if not self._fds:
            self._desk.reactor.after(0, self.output.close)  # files can wait until the end has been told

    def descriptors(self) -> dict[str, int]:
        """Return what a keeper has to hold for the next core."""
        output = self._fds if self.terminal is None else self.terminal.descriptors()
        return {**output, **self.stdin.descriptors()}

    def let_go(self) -> None:
        """Close our ends of everything, as they are; a successor has copies of them."""
        self.stdin.let_go()
        if self.terminal is not None:
            self.terminal.close()
        else:
            for fd in self._fds.values():
                os.close(fd)

    def is_open(self, name: str) -> bool:
        """Whether more output of this stream may come."""
        return name in self._fds

    def drain(self) -> bool:
        """Take over what the pipes hold, now that the leader has ended; return whether both streams have."""
        if self.terminal is not None:
            self.terminal.leave()
        for name in list(self._fds):
            for _ in range(DRAIN_CHUNKS):
                if not self._capture(name):
                    break
        return not self._fds

    def close(self) -> None:
        """Let go of every pipe and timer, whoever else still holds them."""
        for name in list(self._fds):
            self._end_of(name)
        self.stdin.abandon()
        if self.pidfd is not None and self.pidfd.active:
            self._desk.reactor.unwatch(self.pidfd)
            os.close(self.pidfd.fd)
        for timer in (self.ladder, self.limit, self.killer):
            if timer is not None:
                timer.cancel()
