"""The terminal that we were started on: taken over while attached, given back as it was.

Owns:    its modes (termios(3)), its size, and the signals that concern it, which wake whoever waits.
Runs in: the main thread of a command; Python delivers signals nowhere else. `wake` may be called from any.
Unaware: of servers and agents, and of what is shown.
"""
from __future__ import annotations

import errno
import os
import select
import signal
import termios
from typing import Any, Dict, List, Optional, Tuple

Size = Tuple[int, int]

#: signals that end an attachment, and the three about the terminal; all of them are answered by who waits, not at once
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
ABOUT_IT = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
_NEWS = b"\0"       # what `wake` sends; no signal has this number
_NOTHING = b""
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


class Terminal:
    """Descriptor 0, if it is a terminal and is wanted, in raw mode; and the size of the one on descriptor 1.

    With `signals`, the keys that send signals, such as Ctrl-C and Ctrl-Z, go on to do that.

    A context manager: inside of it signals only wake `wait`, and at the end everything is as it was.
    """

    def __init__(self, raw: bool, signals: bool = False) -> None:
        self._keep = termios.ISIG if signals else 0
        #: whether there are keys: descriptor 0 is a terminal
        self.raw = raw
        self._before: Optional[List[Any]] = None
        self._handlers: Dict[int, Any] = {}
        self._wake_reader = self._wake_writer = -1

    def __enter__(self) -> Terminal:
        try:
            self._enter()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _enter(self) -> None:
        self._wake_reader, self._wake_writer = os.pipe()
        for fd in (self._wake_reader, self._wake_writer):
            os.set_blocking(fd, False)
        self._handlers = {number: signal.signal(number, _noted) for number in (*ENDING, *ABOUT_IT)}
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self.take()

    def __exit__(self, *_: Any) -> None:
        self.give_back()
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # both ends stay open: another thread may wake us now, and must not write into somebody else's file

    # ------------------------------------------------------------ modes

    def take(self) -> None:
        """Let every key come as it is, at once and unseen (raw mode of cfmakeraw(3)).

        In the background that stops us (SIGTTOU). Who continues us there has a reason, of which `wait` tells; in the
        foreground it is done after all.
        """
        while self.raw:
            now = termios.tcgetattr(0)
            try:
                termios.tcsetattr(0, termios.TCSANOW, _raw(now, self._keep))
            except termios.error as e:
                if e.args[0] != errno.EINTR:
                    raise
                if _in_background():
                    return
            else:
                self._before = self._before or now
                return

    def give_back(self) -> None:
        """Make the terminal what it was; forget what was typed or reported since, which was meant for the agent."""
        before, self._before = self._before, None
        if before is not None and not _in_background():
            try:
                termios.tcsetattr(0, termios.TCSANOW, before)
                termios.tcflush(0, termios.TCIFLUSH)
            except termios.error:
                pass  # it is gone

    def suspend(self) -> None:
        """Stop, as Ctrl-Z would have it, until somebody continues us."""
        self.give_back()
        os.kill(os.getpid(), signal.SIGSTOP)

    # ------------------------------------------------------------ news

    def size(self) -> Optional[Size]:
        """Return rows and columns; `None` if nobody sees what we show, or the terminal does not know."""
        try:
            found = os.get_terminal_size(1)
        except OSError:
            return None
        return (found.lines, found.columns) if found.lines and found.columns else None

    def wait(self, keys: bool, timeout: Optional[float]) -> Tuple[bool, bytes]:
        """Wait for keys (if wanted), signals, or `wake`; return whether there are keys, and the signals' numbers."""
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        if keys:
            poll.register(0, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if timeout is None else max(0, int(timeout * 1000) + 1))}
        return 0 in ready, self._signals() if self._wake_reader in ready else _NOTHING

    def _signals(self) -> bytes:
        try:
            return os.read(self._wake_reader, 4096)
        except BlockingIOError:
            return _NOTHING

    def keys(self, most: int) -> Optional[bytes]:
        """Return what was typed, b"" for nothing after all, `None` when the terminal is gone."""
        try:
            return os.read(0, most) or None
        except BlockingIOError:
            return _NOTHING
        except OSError:
            return None

    def wake(self) -> None:
        """Let `wait` return."""
        try:
            os.write(self._wake_writer, _NEWS)
        except BlockingIOError:
            pass  # it has enough to wake up for


def _noted(_number: int, _frame: Any) -> None:
    """A signal came. Its number is in the pipe of `set_wakeup_fd` already."""


def _in_background() -> bool:
    """Whether another job of the shell has the terminal now; to change its modes would stop us (SIGTTOU in tty(4))."""
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:
        return False


def _raw(mode: List[Any], keep: int) -> List[Any]:
    raw = [*mode[:_CC], list(mode[_CC])]
    raw[_IFLAG] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
                     | termios.IGNCR | termios.ICRNL | termios.IXON)
    raw[_OFLAG] &= ~termios.OPOST
    raw[_LFLAG] &= keep | ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    raw[_CFLAG] = raw[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[_CC][termios.VMIN], raw[_CC][termios.VTIME] = 1, 0
    return raw
