"""Text for people: columns, ages, sizes, colour.

Owns:    how things look. It is pure but for asking whether stdout is a terminal.
Runs in: the process of a person or script.
Unaware: of servers and agents. With --json nothing of this is used.
"""
from __future__ import annotations

import os
import sys
from typing import Iterable, Sequence

from .streams import StreamError

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36"}
_OF_STATUS = {"idle": "dim", "initializing": "cyan", "running": "green", "thinking": "cyan", "paused": "yellow",
              "completed": "dim", "failed": "red", "terminated": "magenta"}


def clean(text: str) -> str:
    """Return text that stays on its line and cannot drive a terminal: what is not printable is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(char: str) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or char.encode("unicode_escape").decode("ascii")


def coloured() -> bool:
    """Whether stdout wants colour: a terminal that can, and nobody set NO_COLOR (no-color.org)."""
    return bool(is_terminal(1) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def is_terminal(fd: int) -> bool:
    """Whether a person sits at the descriptor."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def paint(text: str, style: str) -> str:
    """Return text in a style if stdout is to be coloured."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if style in STYLES and coloured() else text


def status_style(status: str) -> str:
    """Return the style of a status word, perhaps followed by details."""
    return _OF_STATUS.get(status.split(" ")[0], "")


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 7ms, 0.3s, 12s, 2m05s, 3h07m, 4d02h."""
    if seconds < 0:
        seconds = 0.0
    if 0 < seconds < 9.95 and isinstance(seconds, float):
        return f"{seconds:.1f}s" if seconds >= 0.0995 else f"{seconds * 1000:.0f}ms"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def since(stamp: str | None, now: float) -> str:
    """Return how long ago an RFC 3339 time was, or "-" where there is none."""
    if not stamp:
        return "-"
    from ..errors import RequestError
    from ..wire import from_rfc3339
    try:
        return duration(now - from_rfc3339(stamp))
    except RequestError:
        return clean(stamp)


def size(count: float) -> str:
    """Return a number of bytes as people read it: 17 B, 1.2 KiB, 64 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1023.95:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def width(text: str) -> int:
    """Return how many columns a terminal needs for the text."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """Return the text, shortened with an ellipsis to fit into so many columns."""
    if width(text) <= columns:
        return text
    text = text[:max(columns - 1, 0)]  # a character has a column or more, but for combining ones, which may go
    while text and width(text) > columns - 1:
        text = text[:-1]
    return text + "…"


def terminal_columns() -> int:
    """Return the columns of the terminal on stdout; 0 if it is none, and nothing needs to be cut."""
    try:
        return os.get_terminal_size(1).columns if is_terminal(1) else 0
    except OSError:
        return 80


def table(head: Sequence[str], rows: Iterable[Sequence[str]], styled: int = -1, columns: int = 0) -> list[str]:
    """Return aligned lines. The last column is cut to the terminal; column `styled` is coloured as a status."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(head, *cells)]
    lines = [paint(_line(head, widths), "bold")]
    room = columns - sum(widths[:-1]) - 2 * (len(head) - 1)
    for row in cells:
        if columns:
            row[-1] = cut(row[-1], max(room, 8))
        lines.append(_line(row, widths, styled))
    return lines


def _line(row: Sequence[str], widths: Sequence[int], styled: int = -1) -> str:
    padded = [cell + " " * (room - width(cell)) for cell, room in zip(row, widths)]
    padded[-1] = row[-1]
    if styled >= 0:
        padded[styled] = paint(padded[styled], status_style(row[styled]))
    return "  ".join(padded).rstrip()


def pairs(items: Iterable[tuple[str, str]]) -> list[str]:
    """Return `name  value` lines with the values aligned."""
    shown = [(name, clean(value)) for name, value in items]
    room = max((len(name) for name, _ in shown), default=0)
    return [f"{paint(name.ljust(room), 'bold')}  {value}".rstrip() for name, value in shown]


def short_ids(ids: Sequence[str], least: int = 8) -> dict[str, str]:
    """Return each id cut to the shortest prefix, of at least 8 characters, that tells all of them apart."""
    length = least
    while len({i[:length] for i in ids}) < len(set(ids)):
        length += 1
    return {i: i[:length] for i in ids}


def plural(count: int, noun: str) -> str:
    """Return `1 agent`, `2 agents`, `1 process`, `2 processes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def say(*lines: str) -> None:
    """Print lines on stdout."""
    if lines and sys.stdout is not None:
        try:
            sys.stdout.write("\n".join(lines) + "\n")
        except BrokenPipeError:
            raise
        except OSError as e:
            raise StreamError(1, e) from None
