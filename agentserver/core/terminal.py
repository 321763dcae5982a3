"""A pseudo-terminal: what an agent with stdin=pty runs on, seen from our side (pty(7), ioctl_tty(2)).

Owns:    the master, the relay, and a copy of the slave for as long as the agent's leader lives.
Runs in: the core's thread; nothing here blocks.
Unaware: of agents, processes and offsets.

    agent --- slave | master --splice--> relay --splice--> segment
                           <--sendfile-- what waits for its stdin

splice(2) wants a pipe on one side, and a master is none: hence the relay, a pipe that the keeper holds
too. A SIGKILL of ours finds each byte in the terminal, in the relay or in the file, never in between.

The slave is kept open by us, because otherwise a read fails (EIO) whenever no process of the agent has
it open, although each of them can open /dev/tty again. So the output ends when the agent does.
"""
from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import termios
from typing import Any, Mapping

from .output import OutputLog

PULL_BYTES = 4096       # what one read of a terminal gives at most (N_TTY_BUF_SIZE)
PULLS_MOST = 16         # at once: as many pages as a pipe holds
HELD = ("pty", "relay.out", "relay.in")  # what a keeper holds of it, by name

_splice: Any = getattr(os, "splice", None)  # Linux, Python >= 3.10
_NONBLOCK = int(getattr(os, "SPLICE_F_NONBLOCK", 0))
_GET_PEER = 0x5441      # TIOCGPTPEER, Linux >= 4.13
_UTF8 = 0x4000          # IUTF8, on Linux and macOS alike; termios does not name it
_LINE_ENDS = [getattr(termios, name) for name in (
    "VEOF", "VEOL", "VEOL2", "VINTR", "VQUIT", "VSUSP", "VKILL") if hasattr(termios, name)]


def make(rows: int, cols: int) -> tuple[dict[str, int], int]:
    """Make a terminal of this size; return what of it is ours (see HELD), and the slave."""
    master, slave = os.openpty()
    ours = {"pty": master}
    try:
        os.set_blocking(master, False)
        resize(master, rows, cols)
        mode = termios.tcgetattr(slave)
        mode[0] |= _UTF8
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        if _splice is not None:
            ours["relay.out"], ours["relay.in"] = os.pipe()
            for name in ("relay.out", "relay.in"):
                os.set_blocking(ours[name], False)
    except OSError:
        for fd in (slave, *ours.values()):
            os.close(fd)
        raise
    return ours, slave


def resize(master: int, rows: int, cols: int) -> None:
    """Give the terminal a size; when it is another one, the kernel sends SIGWINCH to its foreground group."""
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def size_of(master: int) -> dict[str, int]:
    """Return the size of a terminal: rows and cols."""
    rows, cols, _, _ = struct.unpack("HHHH", fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)))
    return {"rows": rows or 24, "cols": cols or 80}


def end_of_file(master: int, before: bytes) -> bytes:
    """Return what a person would type, after `before`, to end the input: the character VEOF of termios(3). In a line
    that has begun the first one only hands that over as it is, so that there it takes two."""
    flags, _, _, local, _, _, chars = termios.tcgetattr(master)
    char = chars[termios.VEOF]
    if not isinstance(char, bytes) or char == b"\0":  # switched off
        char = b"\x04"
    ends = {b"", b"\n", char, *(chars[place] for place in _LINE_ENDS)}
    if flags & termios.ICRNL:
        ends.add(b"\r")
    begun = local & termios.ICANON and before[-1:] not in ends
    return char * 2 if begun else char


class Terminal:
    """Our side of a terminal whose descriptors were made by `make`, here or in a core before us."""

    __slots__ = ("_relay_in", "_relay_out", "master", "slave", "waiting")

    def __init__(self, ours: Mapping[str, int]) -> None:
        self.master = ours["pty"]
        self._relay_out, self._relay_in = ours.get("relay.out", -1), ours.get("relay.in", -1)
        self.slave = _open_slave(self.master)
        #: bytes in the relay
        self.waiting = _readable(self._relay_out)

    def descriptors(self) -> dict[str, int]:
        """Return what a keeper has to hold for the next core."""
        ours = zip(HELD, (self.master, self._relay_out, self._relay_in))
        return {name: fd for name, fd in ours if fd >= 0}

    def resize(self, rows: int, cols: int) -> bool:
        """See `resize`; return whether there still is a terminal."""
        if self.master >= 0:
            resize(self.master, rows, cols)
        return self.master >= 0

    def typing(self) -> int:
        """Return a descriptor of its own for what is typed, -1 if there is none to be had: a selector takes each
        number once, and we wait for both directions."""
        try:
            return os.dup(self.master)
        except OSError:
            return -1

    def capture(self, log: OutputLog) -> int:
        """Move what is on the screen now into the log; return how much, 0 at the end of everything. `BlockingIOError`
        when there is nothing."""
        if not self.waiting and self._splices:
            self.waiting = self._pull()
            if not self.waiting and self._splices:
                return 0
        if not self.waiting:
            return log.capture("stdout", self.master)
        moved = 0
        while self.waiting:  # to the last byte: nobody wakes us for what is in the relay
            try:
                count = log.capture("stdout", self._relay_out)
            except BlockingIOError:
                count = 0
            moved += count
            self.waiting = max(0, self.waiting - count) if count else 0
        return moved

    @property
    def _splices(self) -> bool:
        return _splice is not None and self._relay_in >= 0

    def _pull(self) -> int:
        """Move what the terminal holds into the empty relay; return how much, 0 at the end."""
        moved = 0
        for _ in range(PULLS_MOST):
            try:
                count = _splice(self.master, self._relay_in, PULL_BYTES, None, None, _NONBLOCK)
            except BlockingIOError:
                if not moved:
                    raise
                break
            except OSError as e:
                if e.errno != errno.EIO and not moved:  # that would say that nobody has the other side open
                    self._without_relay()
                break
            if not count:
                break
            moved += count
        return moved

    def _without_relay(self) -> None:
        """This kernel does not splice from a terminal (5.10 did not): read and write, from now on."""
        os.close(self._relay_in)
        self._relay_in = -1

    def leave(self) -> None:
        """The agent's leader has ended: from now on the end of the output is when nobody else has the terminal."""
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def close(self) -> None:
        """Let go of everything. When the keeper has too, whoever is still there gets SIGHUP."""
        self.leave()
        for fd in self.descriptors().values():
            os.close(fd)
        self.master = self._relay_out = self._relay_in = -1


def _open_slave(master: int) -> int:
    """Open the other side, without making it our own controlling terminal; -1 where that cannot be had."""
    try:
        return fcntl.ioctl(master, _GET_PEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1


def _readable(fd: int) -> int:
    """Return how many bytes a pipe holds."""
    if fd < 0:
        return 0
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)
