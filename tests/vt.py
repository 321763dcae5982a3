"""A terminal for tests: what a person would see of the bytes that a program writes.

Owns:    enough of a VT220 and xterm for a shell, vim, less and htop; and the modes that are on.
Runs in: the test process; it is pure.
Unaware: of where the bytes come from.
"""
from __future__ import annotations

import re
from typing import Callable

_SEQUENCE = re.compile(
    r"\x1b\[(?P<prefix>[<-?]?)(?P<params>[0-9;:]*)(?P<between>[ -/]*)(?P<final>[@-~])"
    r"|\x1b\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)|\x1b[P_^X][^\x1b]*\x1b\\"
    r"|\x1b(?P<short>[ -/]*[0-OQ-WYZ`-~\\])|(?P<control>[\x00-\x1a\x1c-\x1f\x7f])|(?P<text>[^\x00-\x1f\x7f]+)")


class Vt:
    """`lines()` is what is seen; `asked` what the program asked the terminal, which a real one would answer."""

    def __init__(self, rows: int = 24, cols: int = 80) -> None:
        self.rows, self.cols = rows, cols
        self.modes: set[str] = set()     # that are on, of those that begin as off; and "25 off" for a hidden cursor
        self.asked: list[str] = []
        self.bells = 0
        self._rest, self._undecoded = "", b""
        self._reset()

    def _reset(self) -> None:
        self.modes.clear()
        self._grids = {False: self._blank(), True: self._blank()}
        self.alternate = False
        self.row = self.col = 0
        self._saved = {False: (0, 0), True: (0, 0)}
        self._region = (0, self.rows - 1)
        self._wrap = False

    def _blank(self) -> list[list[str]]:
        return [[" "] * self.cols for _ in range(self.rows)]

    @property
    def _grid(self) -> list[list[str]]:
        return self._grids[self.alternate]

    def lines(self) -> list[str]:
        """Return the screen, without blanks at the ends."""
        return ["".join(line).rstrip() for line in self._grid]

    def text(self) -> str:
        """Return the screen as one text."""
        return "\n".join(self.lines()).rstrip("\n")

    def resize(self, rows: int, cols: int) -> None:
        """Change the size; what does not fit is lost."""
        for grid in self._grids.values():
            grid[:] = [(line + [" "] * cols)[:cols] for line in grid[max(0, self.row - rows + 1):]][:rows]
            grid.extend([" "] * cols for _ in range(rows - len(grid)))
        self.row, self.col = min(self.row, rows - 1), min(self.col, cols - 1)
        self.rows, self.cols, self._region = rows, cols, (0, rows - 1)

    def feed(self, data: bytes) -> None:
        """Take what a program wrote."""
        data = self._undecoded + data
        try:
            text, self._undecoded = data.decode(), b""
        except UnicodeDecodeError as e:
            cut = e.start if e.reason == "unexpected end of data" else len(data)
            text, self._undecoded = data[:cut].decode("utf-8", "replace"), data[cut:]
        self._take(self._rest + text)

    def _take(self, text: str) -> None:
        at = 0
        while at < len(text):
            match = _SEQUENCE.match(text, at)
            if not match:
                break
            at = match.end()
            if match["text"]:
                for char in match["text"]:
                    self._put(char)
            elif match["control"]:
                self._control(match["control"])
            elif match["final"]:
                self._csi(match)
            elif match["short"]:
                self._short(match["short"])
            elif match["osc"] and "?" in match["osc"]:
                self.asked.append(match[0])
        self._rest = text[at:]
        assert len(self._rest) < 100_000, f"a sequence that does not end: {self._rest[:40]!r}"

    # ------------------------------------------------------------ characters

    def _put(self, char: str) -> None:
        if self._wrap:
            self._wrap = False
            self.col = 0
            self._down()
        if "4" in self.modes:
            self._grid[self.row].insert(self.col, " ")
            self._grid[self.row].pop()
        self._grid[self.row][self.col] = char
        if self.col == self.cols - 1:
            self._wrap = "7 off" not in self.modes
        else:
            self.col += 1

    def _control(self, char: str) -> None:
        if char in "\n\v\f":
            self._down()
        elif char == "\r":
            self.col = 0
        elif char == "\b":
            self.col = max(0, self.col - 1)
        elif char == "\t":
            self.col = min(self.cols - 1, self.col // 8 * 8 + 8)
        elif char == "\a":
            self.bells += 1
        elif char == "\x05":
            self.asked.append(char)
        self._wrap = self._wrap and char not in "\r\b\n\t"

    def _down(self) -> None:
        if self.row == self._region[1]:
            self._scroll(self._region[0], 1)
        else:
            self.row = min(self.rows - 1, self.row + 1)

    def _up(self) -> None:
        if self.row == self._region[0]:
            self._scroll(self._region[0], -1)
        else:
            self.row = max(0, self.row - 1)

    def _scroll(self, top: int, count: int) -> None:
        """Move the lines from `top` to the end of the region up, or down for a negative count."""
        bottom = self._region[1]
        for _ in range(min(abs(count), self.rows)):
            self._grid.pop(top if count > 0 else bottom)
            self._grid.insert(bottom if count > 0 else top, [" "] * self.cols)

    # ------------------------------------------------------------ sequences

    def _short(self, short: str) -> None:
        if short == "c":
            self._reset()
        elif short == "7":
            self._saved[self.alternate] = (self.row, self.col)
        elif short == "8":
            self.row, self.col = self._saved[self.alternate]
        elif short == "M":
            self._up()
        elif short == "D":
            self._down()
        elif short == "E":
            self.col = 0
            self._down()
        elif short in "=>":
            (self.modes.add if short == "=" else self.modes.discard)("keypad")
        elif short == "Z":
            self.asked.append("\x1bZ")

    def _csi(self, match: re.Match[str]) -> None:
        prefix, final, between = match["prefix"], match["final"], match["between"]
        numbers = [int(n.split(":")[0] or 0) for n in match["params"].split(";")]
        if final in "hl" and prefix in ("", "?") and not between:
            for number in numbers:
                self._mode(prefix, number, final == "h")
        elif final == "u" and prefix in "<>=" and prefix:
            self._kitty(prefix, numbers[0])
        elif final == "m" and prefix == ">" and numbers[0] == 4:
            (self.modes.add if len(numbers) > 1 and numbers[1] else self.modes.discard)("other keys")
        elif final == "q" and between == " ":
            (self.modes.add if numbers[0] else self.modes.discard)("shape")
        elif (final in "cn" and prefix != ">") or (prefix, between, final) in (
                (">", "", "c"), (">", "", "q"), ("?", "", "u"), ("?", "$", "p"), ("", "", "t")):
            self.asked.append(match[0])
        elif not prefix and not between:
            self._wrap = False
            mover = self._MOVERS.get(final)
            if mover:
                mover(self, numbers[0], numbers)
            self.row, self.col = min(max(self.row, 0), self.rows - 1), min(max(self.col, 0), self.cols - 1)

    def _mode(self, prefix: str, number: int, on: bool) -> None:
        if prefix and number in (47, 1047, 1049):
            if on != self.alternate:
                self._switch(on, number == 1049)
        elif prefix and number in (7, 25):
            (self.modes.discard if on else self.modes.add)(f"{number} off")
        elif not prefix and number == 12:
            (self.modes.discard if on else self.modes.add)("12 off")
        else:
            (self.modes.add if on else self.modes.discard)(f"{prefix}{number}")

    def _switch(self, alternate: bool, saving: bool) -> None:
        if alternate and saving:
            self._saved[False] = (self.row, self.col)
        self.alternate = alternate
        if alternate:
            self._grids[True] = self._blank()
        elif saving:
            self.row, self.col = self._saved[False]

    def _kitty(self, prefix: str, number: int) -> None:
        name = f"kitty {self.alternate}"
        depth = max((int(mode[len(name):]) for mode in self.modes if mode.startswith(name)), default=0)
        self.modes.discard(f"{name}{depth}")
        depth += 1 if prefix == ">" else -(number or 1) if prefix == "<" else 0
        if depth > 0:
            self.modes.add(f"{name}{depth}")

    def _erase(self, row: int, begin: int, end: int) -> None:
        self._grid[row][begin:end] = [" "] * (min(end, self.cols) - begin)

    def _erase_display(self, which: int) -> None:
        rows = {0: range(self.row + 1, self.rows), 1: range(self.row), 2: range(self.rows)}.get(which, range(0))
        for row in rows:
            self._erase(row, 0, self.cols)
        if which in (0, 1):
            self._erase_line(which)

    def _erase_line(self, which: int) -> None:
        begin, end = {0: (self.col, self.cols), 1: (0, self.col + 1)}.get(which, (0, self.cols))
        self._erase(self.row, begin, end)

    def _go(self, row: int, col: int) -> None:
        self.row, self.col = row, col

    def _set_region(self, numbers: list[int]) -> None:
        bottom = numbers[1] if len(numbers) > 1 and numbers[1] else self.rows
        self._region = (max(numbers[0], 1) - 1, min(bottom, self.rows) - 1)
        self._go(0, 0)

    def _insert(self, count: int) -> None:
        line = self._grid[self.row]
        line[self.col:] = ([" "] * count + line[self.col:])[:self.cols - self.col]

    def _delete(self, count: int) -> None:
        line = self._grid[self.row]
        line[self.col:] = (line[self.col + count:] + [" "] * count)[:self.cols - self.col]

    _MOVERS: dict[str, Callable[["Vt", int, list[int]], None]] = {
        "A": lambda t, n, _: t._go(t.row - (n or 1), t.col), "B": lambda t, n, _: t._go(t.row + (n or 1), t.col),
        "e": lambda t, n, _: t._go(t.row + (n or 1), t.col), "C": lambda t, n, _: t._go(t.row, t.col + (n or 1)),
        "D": lambda t, n, _: t._go(t.row, t.col - (n or 1)), "E": lambda t, n, _: t._go(t.row + (n or 1), 0),
        "F": lambda t, n, _: t._go(t.row - (n or 1), 0), "G": lambda t, n, _: t._go(t.row, (n or 1) - 1),
        "d": lambda t, n, _: t._go((n or 1) - 1, t.col),
        "H": lambda t, n, ns: t._go((n or 1) - 1, ((ns[1] if len(ns) > 1 else 1) or 1) - 1),
        "f": lambda t, n, ns: t._go((n or 1) - 1, ((ns[1] if len(ns) > 1 else 1) or 1) - 1),
        "J": lambda t, n, _: t._erase_display(n), "K": lambda t, n, _: t._erase_line(n),
        "L": lambda t, n, _: t._scroll(t.row, -(n or 1)), "M": lambda t, n, _: t._scroll(t.row, n or 1),
        "S": lambda t, n, _: t._scroll(t._region[0], n or 1), "T": lambda t, n, _: t._scroll(t._region[0], -(n or 1)),
        "P": lambda t, n, _: t._delete(n or 1), "@": lambda t, n, _: t._insert(n or 1),
        "X": lambda t, n, _: t._erase(t.row, t.col, t.col + (n or 1)), "r": lambda t, _, ns: t._set_region(ns),
        "b": lambda t, n, _: [t._put(t._grid[t.row][t.col - 1]) for _ in range(n or 1)] and None,
    }
