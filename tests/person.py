"""A person at a terminal: the real command line on a pseudo-terminal, what is seen there, what is typed.

Owns:    `Person`.
Runs in: the test process; the command is a process in a session of its own, with that terminal.
Unaware: of agents; see vt.py for what is seen.
"""
from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import Any, Callable

from support import DEADLINE_SECS, MAIN, ROOT, wait_until
from vt import Vt

ANSWER = b"\x1b[?62;22c"  # of a terminal that is asked what it is


class Person:
    """Someone who has typed `agentserver ARGS` on a terminal; a context manager."""

    def __init__(self, environ: dict[str, str], *args: str, rows: int = 24, cols: int = 80,
                 program: tuple[str, ...] = (sys.executable, str(MAIN))) -> None:
        self.vt = Vt(rows, cols)
        self.raw = bytearray()
        self.answering = False
        self._answered = 0
        self.master, self.slave = os.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(  # a session leader without a terminal gets the first that it opens
            ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.slave), *program, *args],
            start_new_session=True, env={**environ, "TERM": "xterm-256color"}, cwd=str(ROOT))

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows: int, cols: int) -> None:
        """Drag the window."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        if (rows, cols) != (self.vt.rows, self.vt.cols):
            self.vt.resize(rows, cols)

    def type(self, keys: bytes | str) -> None:
        """Type, all at once."""
        data = keys.encode() if isinstance(keys, str) else keys
        while data:
            data = data[os.write(self.master, data):]

    def look(self, secs: float = 0.0) -> str:
        """Return what is seen, after what has been written so far."""
        while select.select([self.master], [], [], secs)[0]:
            data = os.read(self.master, 65536)
            self.raw += data
            self.vt.feed(data)
            if self.answering and self.vt.asked[self._answered:]:
                self._answered = len(self.vt.asked)
                self.type(ANSWER)
            secs = 0.0
        return self.vt.text()

    def said(self) -> str:
        """Return what is on the screen as one line: what was written may have been wrapped anywhere."""
        return "".join(self.vt.lines())

    def until(self, seen: str | Callable[[str], object], secs: float = DEADLINE_SECS) -> str:
        """Look until a text, or what a function is looking for, is seen; return all of it."""
        end = time.monotonic() + secs
        while True:
            text = self.look(0.05)
            if seen in text if isinstance(seen, str) else seen(text):
                return text
            assert time.monotonic() < end, (
                f"never saw {seen!r}; on the screen:\n{text}\n(raw: {bytes(self.raw[-600:])!r})")

    def end(self) -> int:
        """Return the exit code of the command; look meanwhile, or it might wait for us to."""
        wait_until(lambda: self.look() is not None and self.process.poll() is not None, what="the command to end")
        self.look()
        return int(self.process.returncode)

    def signal(self, number: signal.Signals) -> None:
        """Send the command a signal."""
        self.process.send_signal(number)

    @property
    def is_raw(self) -> bool:
        """Whether keys come as they are now."""
        return self.is_unseen and not termios.tcgetattr(self.slave)[3] & termios.ISIG

    @property
    def is_unseen(self) -> bool:
        """Whether keys come at once and are not shown; those of signals may go on to send them."""
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def assert_as_before(self) -> None:
        """The terminal is as it was: its modes, and what a program can switch on."""
        assert termios.tcgetattr(self.slave) == self.before
        assert not self.vt.modes and not self.vt.alternate, self.vt.modes
