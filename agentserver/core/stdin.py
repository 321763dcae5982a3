"""What goes to an agent's stdin: accepted once, durable, written once.

Owns:    the pipe's write end, or a descriptor of the terminal, and the file in which what was accepted waits for the
         agent to read.
Runs in: the core's thread; nothing here blocks, and no agent can make it.
Unaware: of requests. `Desk` says when what is in the file is also in the registry.

    write  append to the file, let the end go into the registry with the request id (one transaction)
    pump   after the commit, sendfile(2) from the file to the pipe, at the file's own position

The position belongs to the open file description, and the keeper holds a copy of that. The kernel
moves bytes and position together, so a new core that finds the position finds how much was written,
whatever killed the one before: nothing is written twice, nothing is left out. (Writing first and
recording then, or the other way round, is wrong whenever death comes in between.)

A page that was sent is shared with the pipe, so a file is never overwritten or cut short: when it
has grown and everything is written, the next write begins a new one.

A terminal has no end that could be closed: there its end-of-file character is written like everything
else, and more can follow.
"""
from __future__ import annotations

import errno
import fcntl
import os
import select
import sys
import termios
from typing import Callable, Protocol

from ..errors import RequestError
from . import terminal
from .agent import Agent
from .files import make_directory, new_file, remove
from .index import quietly
from .reactor import WRITE, Reactor, Watch

PIECE = 256 * 1024
F_GETPIPE_SZ, PIPE_BYTES = 1032, 64 * 1024  # fcntl has the first from Python 3.10 on
TERMINAL_BYTES = 4096   # about what a terminal takes before anybody reads (N_TTY_BUF_SIZE); it does not tell
#: sendfile does not work with this descriptor, and never will
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
ROTATE_BYTES = 4 * 1024 * 1024  # of a file that was written out, before the next write begins a new one


class Desk(Protocol):
    """What stdin needs from around it."""

    reactor: Reactor
    stdin_limit: int

    def save(self, agent: Agent) -> None:
        """Put the agent's record on disk with this turn."""

    def after_commit(self, call: Callable[[], None]) -> None:
        """Call back when this turn is on disk and the keeper has what it was given."""

    def directory(self, agent_id: str) -> str:
        """Return where the files of an agent are."""

    def hold(self, agent_id: str, name: str, fd: int) -> None:
        """Give the keeper a copy of a descriptor."""

    def release(self, agent_id: str, names: list[str]) -> None:
        """The keeper need not hold these any longer."""

    def stdin_ended(self, agent_id: str, why: str) -> None:
        """Stdin was closed, by us or by the agent."""


class Stdin:
    """The stdin of one attempt. `pipe` may also be a terminal's master; it becomes ours. `file` is the open file that a
    core before us has left, -1 if there is none.

    Durable in the agent's record: `stdin_file`, the number of the file; `stdin_end`, how much of it was
    accepted; `stdin_closing`, whether it is to be closed after that."""

    __slots__ = ("_agent", "_desk", "_file", "_pipe", "_pumping", "_watch")

    def __init__(self, agent: Agent, pipe: int, desk: Desk, file: int = -1) -> None:
        self._agent, self._pipe, self._desk, self._file = agent, pipe, desk, file
        self._watch: Watch | None = None
        self._pumping = False
        if file < 0:
            agent.stdin_end = 0
        if pipe >= 0 and (self._waiting or agent.stdin_closing):
            self._pump_later()

    @property
    def open(self) -> bool:
        """Whether it still takes data."""
        return self._pipe >= 0 and not self._agent.stdin_closing

    @property
    def _waiting(self) -> int:
        """How many accepted bytes the pipe has not taken yet."""
        return self._agent.stdin_end - os.lseek(self._file, 0, os.SEEK_CUR) if self._file >= 0 else 0

    def descriptors(self) -> dict[str, int]:
        """Return what a keeper has to hold for the next core."""
        pipe = {} if self._terminal else {"stdin": self._pipe}
        return {**pipe, f"stdin.{self._agent.stdin_file}": self._file}

    @property
    def _terminal(self) -> bool:
        return self._agent.stdin == "pty"

    def write(self, data: bytes, eof: bool = False) -> int:
        """Accept all of `data` or nothing, with `eof` also the end of it; return how much then waits because the pipe
        is full."""
        if eof and self.open and self._terminal:
            data += terminal.end_of_file(self._pipe, data or self._last_byte())
            eof = False
        waiting = self._accept(data)
        if eof:
            self.close()
        return waiting

    def _accept(self, data: bytes) -> int:
        if not self.open:
            raise RequestError("the agent's stdin is closed", "stdin_closed")
        if _reader_is_gone(self._pipe):
            self._over("the agent closed its stdin")
            raise RequestError("the agent has closed its stdin", "stdin_closed")
        waiting, limit = self._waiting, self._desk.stdin_limit
        if waiting + len(data) > limit:
            raise RequestError(
                f"{len(data)} bytes do not fit: {waiting} of {limit} wait for the agent to read them; "
                "send less at once, or again later", "stdin_full")
        if data:
            self._append(data, waiting)
            self._pump_later()
        return max(0, self._waiting - self._room())

    def _last_byte(self) -> bytes:
        """The last that was accepted, if anything was."""
        end = self._agent.stdin_end
        return os.pread(self._file, 1, end - 1) if self._file >= 0 and end else b""

    def _room(self) -> int:
        """How many bytes the pipe takes before the agent reads."""
        if self._terminal:
            return TERMINAL_BYTES if self._watch is None else 0
        try:
            holds = fcntl.fcntl(self._pipe, F_GETPIPE_SZ)
        except OSError:  # macOS
            holds = PIPE_BYTES
        full = bytearray(4)
        fcntl.ioctl(self._pipe, termios.FIONREAD, full)
        return max(0, holds - int.from_bytes(full, sys.byteorder))

    def _append(self, data: bytes, waiting: int) -> None:
        agent = self._agent
        try:
            if self._file < 0 or (not waiting and agent.stdin_end > ROTATE_BYTES):
                self._begin_file()
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], agent.stdin_end + done)
        except OSError as e:
            raise RequestError(f"what is to be written cannot be kept ({e.strerror}), and nothing was; try again later",
                               "unavailable") from None
        agent.stdin_end += len(data)
        self._desk.save(agent)

    def _begin_file(self) -> None:
        agent = self._agent
        directory = self._desk.directory(agent.id)
        make_directory(directory)
        file = new_file(directory, f"stdin.{agent.stdin_file + 1}")
        self._drop_file()
        self._file, agent.stdin_file, agent.stdin_end = file, agent.stdin_file + 1, 0
        self._desk.hold(agent.id, f"stdin.{agent.stdin_file}", file)

    def close(self) -> None:
        """Close after what waits has been written; a terminal gets its end-of-file character."""
        if not self.open:
            raise RequestError("the agent's stdin is closed already", "stdin_closed")
        if self._terminal:
            self.write(b"", eof=True)
            return
        self._agent.stdin_closing = True
        self._desk.save(self._agent)
        self._pump_later()

    # ------------------------------------------------------------ towards the agent

    def _pump_later(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._desk.after_commit(self._pump)

    def _pump(self, _mask: int = 0) -> None:
        """Move what waits, as far as the pipe takes it."""
        self._pumping = False
        if self._pipe < 0:
            return
        try:
            while self._waiting:
                _move(self._file, self._pipe, min(self._waiting, PIECE))
        except BlockingIOError:
            if self._watch is None:
                self._watch = self._desk.reactor.watch(self._pipe, WRITE, self._pump)
            return
        except OSError as e:
            gone = e.errno == errno.EPIPE
            self._over("the agent closed its stdin" if gone else f"stdin failed: {os.strerror(e.errno or 0)}")
            return
        self._desk.reactor.unwatch(self._watch)
        self._watch = None
        if self._agent.stdin_closing:
            self._over("stdin was closed")

    def _over(self, why: str) -> None:
        self._agent.stdin_closing = True
        self._desk.save(self._agent)
        self.abandon()
        self._desk.stdin_ended(self._agent.id, why)

    def abandon(self) -> None:
        """Let go of everything, written or not. EOF reaches the agent when the keeper has let go as well."""
        if self._pipe >= 0:
            self._desk.reactor.unwatch(self._watch)
            self._watch = None
            os.close(self._pipe)
            self._pipe = -1
            self._desk.release(self._agent.id, ["stdin"])
        self._drop_file()

    def let_go(self) -> None:
        """Close our descriptors and leave everything as it is; a successor has copies of them."""
        for fd in (self._pipe, self._file):
            if fd >= 0:
                os.close(fd)

    def _drop_file(self) -> None:
        if self._file >= 0:
            name = f"stdin.{self._agent.stdin_file}"
            os.close(self._file)
            self._file = -1
            self._desk.release(self._agent.id, [name])
            quietly(remove, self._desk.directory(self._agent.id), name)


def _move(file: int, pipe: int, most: int) -> None:
    """Write from a file what its position says, and move the position as far as the pipe took it."""
    try:
        os.sendfile(pipe, file, None, most)
    except OSError as e:
        if e.errno not in _NO_SENDFILE:
            raise
        at = os.lseek(file, 0, os.SEEK_CUR)  # from here to the end a death of ours would repeat what was written
        os.lseek(file, at + os.write(pipe, os.pread(file, most, at)), os.SEEK_SET)


def _reader_is_gone(pipe: int) -> bool:
    """Whether nobody has the other end of a pipe open (poll(2): POLLERR)."""
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))
