"""What to write on a terminal so that it shows an agent's screen: the last of its output, made harmless.

Owns:    how far back to go, and from where on output needs nothing that came before it.
Runs in: the thread of `attach` that writes the screen; it asks the server for the output.
Unaware: of terminals and keys. What sequences mean is in escapes.py.
"""
from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, Optional, Tuple

from . import show
from .escapes import CANCEL, Modes, quiet

if TYPE_CHECKING:
    from ..client import Agent

MOST = 256 * 1024       # bytes of old output that are looked at
HEAD = 64 * 1024        # of the beginning, where programs set what they need for long
FLOOD = 1024 * 1024     # bytes that came at once, of which nobody could read the first

_HOME = rb"\x1b\[1?(?:;1?)?[Hf]"
_BETWEEN = rb"(?:\x1b\[(?:[0-9;]*m|3J))*"
#: after these the screen is empty and the cursor is at home; and the switches between the two screens
_FRESH = re.compile(rb"(?P<clear>\x1bc|" + _HOME + _BETWEEN + rb"\x1b\[[02]?J|\x1b\[2J" + _BETWEEN + _HOME + rb")"
                    rb"|\x1b\[\?(?:1049|1047|47)(?P<switch>[hl])")
_ADDRESSED = re.compile(rb"\x1b\[[0-9;]*[Hfd]")  # the cursor was sent to a place


class Picture(NamedTuple):
    """An agent's screen: what to write, the state after it, up to where in the output it is, and whether a program
    had better draw it again."""

    data: bytes
    modes: Modes
    offset: int
    doubtful: bool


def picture(agent: Agent, first: int, end: int) -> Picture:
    """Return the screen of an agent, of whose output the bytes from `first` to `end` are kept."""
    begin = max(first, end - MOST)
    modes = Modes()
    if first == 0 < begin:
        modes.feed(agent.read("stdout", 0, min(begin, HEAD)).data)
    data, cut = _read(agent, begin, end)
    drawn, exact = draw(data, modes, begin > 0 or cut)
    return Picture(drawn, modes, max(begin, end), modes.alternate or not exact)


def _read(agent: Agent, begin: int, end: int) -> Tuple[bytes, bool]:
    """Return the bytes from `begin` to `end`, and whether some of them are missing; then only those after the gap."""
    data, missing = b"", False
    while begin < end:
        chunk = agent.read("stdout", begin, end - begin)
        if chunk.next_offset <= begin:
            break
        missing = missing or chunk.dropped > 0
        data, begin = chunk.data if chunk.dropped else data + chunk.data, chunk.next_offset
    return data, missing


def draw(data: bytes, modes: Modes, cut: bool) -> Tuple[bytes, bool]:
    """Return what shows on an empty screen the one after `data`, and whether that is certain; bring `modes` up to date.

    `cut` says that there was more before it.
    """
    start, found = _start(data, modes.alternate)
    if start is None:
        start = _boundary(data) if cut else 0
    modes.feed(data[:start])
    out = modes.redo() + quiet(data[start:])
    modes.feed(data[start:])
    return out, not cut or found or not (modes.alternate or _ADDRESSED.search(data, start))


def _start(data: bytes, alternate: bool) -> Tuple[Optional[int], bool]:
    """Return from where on `data` needs nothing before it to show the main screen (or the alternate one, if it is shown
    throughout), and whether there is such a place for the screen that is shown at the end."""
    main: Optional[int] = None
    other: Optional[int] = None
    switched = False
    for match in _FRESH.finditer(data):
        if match["switch"]:
            if not switched and match["switch"] == b"l":
                main, other = match.end(), None  # what came before was the alternate screen, known or not
            switched, alternate = True, match["switch"] == b"h"
            other = match.start() if alternate else None
        elif alternate:
            other = match.start()
        else:
            main = match.start()
    if alternate:
        return (main if switched else other), other is not None
    return main, main is not None


def _boundary(data: bytes) -> int:
    """Return where the first whole line of a cut beginning starts; the first sequence, where there are no lines."""
    line = data.find(b"\n", 0, HEAD) + 1
    return line or max(data.find(b"\x1b"), 0)


def flood(data: bytes, modes: Modes, dropped: int = 0) -> bytes:
    """Return what shows the screen after more output than anybody could read, without the first of it.

    `dropped` bytes before it are missing already.
    """
    back, skipped = modes.undo(), max(0, len(data) - MOST)
    skipped += _boundary(data[skipped:])
    modes.feed(data[:skipped])
    note = b"" if modes.alternate else f"[{show.size(dropped + skipped)} are not shown]\r\n".encode()
    return CANCEL + back + b"\x1b[H\x1b[2J" + draw(note + data[skipped:], modes, False)[0]
