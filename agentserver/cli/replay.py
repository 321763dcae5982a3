"""`replay`: a recording shown again, at its own pace or faster.

Owns:    the pace, and what a person may do meanwhile: Ctrl-C ends it, the space bar holds it.
Runs in: the main thread of a command; no server is needed.
Unaware: of how recordings are made, and of what a line of one looks like (recording.py).

On a terminal, what a terminal's program wrote is made harmless first (it asks nothing, rings nothing), keys are not
shown, and at the end everything it has switched on is switched off.
"""
from __future__ import annotations

import os
import signal
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from typing import IO, Callable, Iterator, Optional, Protocol

from ..errors import RequestError
from . import exits, out, show, streams
from .escapes import CANCEL, Modes, Quiet
from .recording import LONGEST_LINE, Event, Player, events
from .terminal import ENDING, Terminal

CTRL_C, SPACE = b"\x03", b" "


class Screen(Protocol):
    """Where a recording is shown."""

    def wait(self, until: float) -> float:
        """Wait until a monotonic time; return for how long it was held meanwhile."""

    def show(self, event: Event) -> None:
        """Show what was written."""


def replay(given: Namespace) -> int:
    """Show a recording; Ctrl-C ends it as it ends any program."""
    with _source(given.file) as source:
        player = Player(given.file, source.readline(LONGEST_LINE))
        idle = given.max_idle if given.max_idle is not None else player.max_idle
        on_terminal = player.cast and show.is_terminal(1)
        if on_terminal:
            _compare(player)
        with _on_terminal() if on_terminal else nullcontext(_Plain()) as screen:
            _play(events(player, _lines(source, given.file)), screen, given.speed, idle)
    return exits.OK


@contextmanager
def _source(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        streams.need(0)
    try:
        source = open(0, "rb", closefd=False) if path == "-" else open(path, "rb")
    except OSError as e:
        raise RequestError(f"{path} cannot be read: {e.strerror}") from None
    with source:
        yield source


def _lines(source: IO[bytes], path: str) -> Iterator[bytes]:
    while True:
        line = source.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise RequestError(f"{path}: a line of more than {LONGEST_LINE} bytes is none of a recording")
        yield line


def _compare(player: Player) -> None:
    """Say that it will look wrong on a terminal that is smaller."""
    try:
        here = os.get_terminal_size(1)
    except OSError:
        return
    rows, cols = player.size or (0, 0)
    if (0 < here.lines < rows) or (0 < here.columns < cols):
        exits.note(f"recorded on a terminal of {rows} rows and {cols} columns, which is more than the {here.lines} and "
                   f"{here.columns} of this one")


def _play(shown: Iterator[Event], screen: Screen, speed: float, idle: Optional[float]) -> None:
    """Show events when their time has come; time that was lost is not made up for by haste."""
    at, before = time.monotonic(), 0.0
    for event in shown:
        pause = max(event.secs - before, 0.0)
        before = max(event.secs, before)
        at += min(pause, pause if idle is None else idle) / speed
        at += screen.wait(at)
        screen.show(event)


# ---------------------------------------------------------------- where it is shown

class _Plain:
    """Files, pipes, and terminals on which bytes are shown as `logs` shows them."""

    def wait(self, until: float) -> float:
        """Wait."""
        left = until - time.monotonic()
        if left > 0:
            time.sleep(left)
        return 0.0

    def show(self, event: Event) -> None:
        """Write each stream to its own descriptor."""
        out.write(out.DESCRIPTORS[event.stream], event.data)


class _Shown:
    """A terminal that shows what another terminal showed."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._quiet = Quiet()
        self.modes = Modes()
        self._drawn = True   # what was shown is there, unless the terminal was another's meanwhile

    def wait(self, until: float) -> float:
        """Wait, unless the space bar holds it until it is pressed again."""
        held = 0.0
        while (left := until + held - time.monotonic()) > 0:
            if self._space(left):
                since = time.monotonic()
                while not self._space(None):
                    pass
                held += time.monotonic() - since
        return held

    def _space(self, timeout: Optional[float]) -> bool:
        """Wait for keys or a signal; return whether the space bar was pressed."""
        typed, signals = self._terminal.wait(self._terminal.raw, timeout)
        keys = self._terminal.keys(1024) if typed else b""
        if keys is None or CTRL_C in keys:
            raise exits.Signalled(signal.SIGINT)
        for number in signals:
            if number in ENDING:
                raise exits.Signalled(number)
        if signal.SIGTSTP in signals:
            out.write(1, CANCEL + self.modes.undo())
            self._terminal.suspend()
            self._drawn = False
        if signal.SIGCONT in signals:
            self._terminal.take()
            if not self._drawn:
                out.write(1, b"\x1b[2J" + self.modes.redo())
            self._drawn = True
        return SPACE in keys

    def show(self, event: Event) -> None:
        """Show what was written, without what would act on this terminal."""
        self.modes.feed(event.data)
        out.write(1, self._quiet.feed(event.data))


@contextmanager
def _on_terminal() -> Iterator[Screen]:
    with Terminal(raw=show.is_terminal(0), signals=True) as terminal:
        screen = _Shown(terminal)
        try:
            yield screen
        finally:
            out.write(1, CANCEL + screen.modes.undo())


COMMANDS: dict[str, Callable[[Namespace], int]] = {"replay": replay}
