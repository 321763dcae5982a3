"""One attachment, as its main thread sees it: keys, signals, sizes, and news of the two threads beside it.

Owns:    the loop that waits for all of them at once, and when which size is sent.
Runs in: the main thread. One thread writes what the agent shows (screen.py), one sends what is typed (typist.py); each
         has a client of its own, so that nothing here ever waits for a server.
Unaware: of why somebody attaches, and of what is said afterwards.
"""
from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, List, NamedTuple, Optional, Tuple

from ..errors import RequestTimeout
from .detach import Keys
from .screen import Screen
from .terminal import ENDING, Size, Terminal
from .typist import Typist

if TYPE_CHECKING:
    from ..client import AgentClient
    from ..results import AgentInfo

PIECE = 64 * 1024
LAST_KEYS_SECS = 1.0     # for what was typed just before leaving
DRAG_SECS = 0.03         # between two sizes while a window is being dragged
NUDGE_SECS = 0.15        # for a program to notice one size before it gets another


class Left(NamedTuple):
    """How an attachment ended: the agent did, something failed, a signal came, or (none of them) a person left."""

    ended: Optional[AgentInfo] = None
    error: Optional[BaseException] = None
    signal: int = 0


class Session:
    """An attachment of `terminal`, until `run` returns. It goes on with both clients, and closes them in its threads.

    `typing` is the client for keys and sizes, `None` for who only watches. `fresh`: the agent was only just started.
    """

    def __init__(self, terminal: Terminal, info: AgentInfo, watching: AgentClient, typing: Optional[AgentClient],
                 detach: bytes, fresh: bool) -> None:
        self._terminal, self._info = terminal, info
        size = terminal.size()
        self._screen = Screen(watching, info, size[0] if size else None, fresh, terminal.wake)
        self._typist = Typist(typing, info.id, terminal.wake) if typing is not None else None
        self._keys = Keys(detach)
        self._adapted = False
        self._due: List[Tuple[float, Optional[Size]]] = []  # when to send which size; `None`: the one that it has then

    def run(self, limit: Optional[float]) -> Left:
        """Stay until the end of either; `limit` is a monotonic time."""
        left = None
        self._screen.start()
        if self._typist is not None:
            self._typist.start()
        try:
            while left is None:
                left = self._turn(limit)
            if self._typist is not None and left.ended is None and left.error is None:
                self._typist.finish(LAST_KEYS_SECS)
            return left
        finally:
            self._screen.close(away=left is None or not _by_itself(left))

    def _turn(self, limit: Optional[float]) -> Optional[Left]:
        """Wait for news of any kind, and deal with it; return how it ended, if it did."""
        wanted = self._terminal.raw and (self._typist is None or self._typist.room)
        typed, signals = self._terminal.wait(wanted, self._left(limit))
        return (self._on_signals(signals) or self._on_news() or (self._on_keys() if typed else None)
                or self._on_time(limit))

    def _left(self, limit: Optional[float]) -> Optional[float]:
        times = [due for due, _ in self._due] + ([] if limit is None else [limit])
        return max(0.0, min(times) - time.monotonic()) if times else None

    # ------------------------------------------------------------ what comes

    def _on_signals(self, numbers: bytes) -> Optional[Left]:
        ending = [number for number in numbers if number in ENDING]
        if ending:  # before a SIGCONT, which comes with it where a shell ends a job that was stopped
            return Left(signal=ending[0])
        for number in numbers:
            if number == signal.SIGWINCH and not self._due:
                self._due.append((time.monotonic() + DRAG_SECS, None))
            elif number == signal.SIGTSTP:
                self._screen.suspend()
                self._terminal.suspend()
            elif number == signal.SIGCONT:
                self._terminal.take()
                if self._screen.drawn:  # else it was stopped before, in the background
                    self._screen.resume()
                    self._nudge()
        return None

    def _on_news(self) -> Optional[Left]:
        error = self._screen.failed or (self._typist.failed if self._typist is not None else None)
        if self._screen.ended is not None or error is not None:
            return Left(self._screen.ended, error)
        if self._screen.drawn and not self._adapted:
            self._adapted = True
            self._adapt()
        return None

    def _on_keys(self) -> Optional[Left]:
        typed = self._terminal.keys(PIECE)
        if typed is None:
            return Left(signal=signal.SIGHUP)
        passed = self._keys.feed(typed)
        if passed and self._typist is not None:
            self._typist.type(passed)
        return Left() if self._keys.pressed else None

    def _on_time(self, limit: Optional[float]) -> Optional[Left]:
        now = time.monotonic()
        due = [size for at, size in self._due if at <= now]
        self._due = [(at, size) for at, size in self._due if at > now]
        if due:
            self._send(due[-1] or self._terminal.size())
        if limit is not None and now >= limit:
            return Left(error=RequestTimeout("the time given is over; detached, the agent goes on"))
        return None

    # ------------------------------------------------------------ sizes

    def _adapt(self) -> None:
        """Give the agent's terminal the size of mine; if it has that, have the program draw what may be wrong."""
        mine, its = self._terminal.size(), self._info.pty
        if mine is None:
            return
        if its is None or mine != (its["rows"], its["cols"]):
            self._send(mine)
        elif self._screen.doubtful:
            self._nudge()

    def _nudge(self) -> None:
        """Have a full-screen program draw everything: they do for a size that is another one."""
        mine = self._terminal.size()
        if mine is not None:
            self._send((mine[0] - 1 or 2, mine[1]))
            self._due.append((time.monotonic() + NUDGE_SECS, None))

    def _send(self, size: Optional[Size]) -> None:
        if size is not None and self._typist is not None:
            self._typist.resize(*size)


def _by_itself(left: Left) -> bool:
    """Whether the agent ended of its own accord, and so left its screen as it wants it."""
    return left.ended is not None and left.ended.exit is not None and left.ended.exit.reason == "exited"
