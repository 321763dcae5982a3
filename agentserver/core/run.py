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

from . import tree
from .counters import Counters
from .feed import Feed
from .output import OutputLog, OutputRead
from .process import Ended
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
    feed: Feed
    counters: Counters

    def release(self, agent_id: str, names: list[str]) -> None:
        """The keeper need not hold these any longer."""

    def disk_trouble(self, agent_id: str, why: str) -> None:
        """Output could not be recorded."""


class Run:
    """See the module. `ends` are what `process.ends` made, or what a core before us has left of it."""

    __slots__ = ("_agent_id", "_desk", "_fds", "_shown", "_watches", "_wide",
                 "ended", "leaked", "ladder", "limit", "output", "pidfd", "shared", "stdin", "terminal", "trouble")

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
        self._shown = {name: output.span(name)[1] for name in STREAMS}
        self.ladder: Timer | None = None     # the next rung of the stop ladder
        self.limit: Timer | None = None      # when limits.runtime_secs is reached
        self.ended: Ended | None = None      # set when the leader was reaped
        self.leaked: dict[int, str] = {}     # pid -> command of what had to be killed
        self.pidfd: Watch | None = None      # where nobody of ours is the leader's parent
        self.trouble = ""
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
        if self.output.trouble and not self.trouble:
            self._desk.disk_trouble(self._agent_id, self.output.trouble)
        self.trouble = self.output.trouble or ""
        if self._desk.feed.wanted(f"{self._agent_id}.{name}"):
            self._publish(name, moved)
        return True

    def _widen(self, name: str) -> None:
        """Give a stream that filled its pipe a larger one (pipe(7)), so that the agent can write on while we record."""
        self._wide.add(name)
        try:
            fcntl.fcntl(self._fds[name], F_SETPIPE_SZ, WIDE_BYTES)
        except OSError:  # not Linux, or this user's pipes hold too much already
            pass

    def _publish(self, name: str, moved: int) -> None:
        """Tell subscribers what was captured, from what they were told last, whole characters where possible."""
        end = self.output.span(name)[1]
        start = self._shown[name]
        if not end - moved - 4 < start <= end:  # nobody listened for a while
            start = end - moved
        got = self._read(name, start, end)
        data = got.data[:whole_characters(got.data)]
        self._shown[name] = got.offset + len(data)
        if data:
            self._desk.feed.output(self._agent_id, name, data, got.offset, eof=False)

    def _read(self, name: str, start: int, end: int) -> OutputRead:
        """Read back what is to be published; nothing if it cannot be read for now, since this is but a hint."""
        try:
            return self.output.read(name, start, end - start)
        except OSError:
            return OutputRead(b"", end, end, start, 0)

    def _end_of(self, name: str) -> None:
        """The stream is over: tell what was held back, and that nothing follows."""
        self._desk.reactor.unwatch(self._watches.pop(name))
        fd = self._fds.pop(name)  # the keeper's copy of a read end can stay: it does not delay anybody's EOF
        if self.terminal is None:
            os.close(fd)
        else:
            self.stdin.abandon()
            self.terminal.close()
        end = self.output.span(name)[1]
        if self._desk.feed.wanted(f"{self._agent_id}.{name}"):
            start = self._shown[name] if end - 4 < self._shown[name] <= end else end
            data = self._read(name, start, end).data
            self._desk.feed.output(self._agent_id, name, data, end - len(data), eof=True)
        if not self._fds:
            self._desk.reactor.after(0, self.output.close)  # files can wait until the end has been told

    def shown(self, name: str) -> int:
        """Return the offset from which the next published bytes of a stream will be."""
        end = self.output.span(name)[1]
        return self._shown[name] if end - 4 < self._shown[name] <= end else end

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
        for timer in (self.ladder, self.limit):
            if timer is not None:
                timer.cancel()


def whole_characters(data: bytes) -> int:
    """Return how many bytes of `data` do not end within a UTF-8 character (RFC 3629); all if none would be left."""
    for back in range(1, min(3, len(data) - 1) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needs = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if needs > back else len(data)
    return len(data)
