"""The keys that detach: read from text, and found among what is typed.

Owns:    `read_keys` for `--detach-keys`, and `Keys`, which holds a beginning of them back until the next key.
Runs in: any thread; it is pure.
Unaware: of terminals and agents.

A program may have told the terminal to send Ctrl-P as `CSI 112;5u` (the kitty keyboard protocol) or as
`CSI 27;5;112~` (xterm's modifyOtherKeys). That is the same key, so both are known.
"""
from __future__ import annotations

import re
from typing import List, Sequence, Tuple

_CTRL = re.compile(r"(?:ctrl-|c-|\^)([a-z@\[\\\]^_])")
#: a key in one of the two long forms; alternate keys, the kind of event, and text may follow their numbers
_LONG = re.compile(rb"\x1b\[(?:(?P<key>\d+)(?::\d*)*(?:;(?P<held>\d+)(?::(?P<event>\d))?(?:;[\d:]*)?)?u"
                   rb"|27;(?P<mod>\d+);(?P<char>\d+)~)")
_LOCKS = 64 | 128                  # caps lock and num lock, of the kitty protocol
_CONTROL = 4
_RELEASED = b"3"
_MODIFIERS = range(57441, 57455)   # Shift and the like, as keys of their own
_NOTHING = -1                      # no key of ours: a release, or a modifier alone


def read_keys(text: str) -> bytes:
    """Return the keys that `ctrl-p,ctrl-q` names, as a plain terminal sends them; raise `ValueError`."""
    if text == "none":
        return b""
    return b"".join(_read_key(word) for word in text.split(","))


def _read_key(word: str) -> bytes:
    control = _CTRL.fullmatch(word.lower())
    if control:
        return bytes([ord(control[1].upper()) & 0x1F])
    if len(word) == 1 and word.isascii() and word.isprintable():
        return word.encode("ascii")
    raise ValueError(f"{word!r} is no key for detaching; write ctrl-X or a character, joined by commas, as in "
                     "ctrl-p,ctrl-q, or none")


class Keys:
    """What is typed, without the keys that detach."""

    def __init__(self, detach: bytes) -> None:
        self._detach = detach
        self._held: List[Tuple[bytes, int]] = []  # a beginning of them: how it came, and which key it is
        self.pressed = False                      # all of them

    def feed(self, data: bytes) -> bytes:
        """Return what of the keys is to be passed on now; after `pressed` nothing is."""
        if not self._detach or (not self._held and not self._possible(data)):
            return data
        out, at = b"", 0
        while at < len(data) and not self.pressed:
            raw, key = _next(data, at)
            at += len(raw)
            out += self._step(raw, key)
        return out

    def _possible(self, data: bytes) -> bool:
        """Whether the first of the keys may be in it; pasting a lot must not be slow."""
        return self._detach[0] in data or b"\x1b[" in data

    def _step(self, raw: bytes, key: int) -> bytes:
        self._held.append((raw, key))
        if key == _NOTHING and len(self._held) > 1:
            return b""
        out = b""
        while self._held and not self._begins():
            out += self._held.pop(0)[0]
        self.pressed = len(self._typed()) == len(self._detach)
        return out

    def _typed(self) -> Sequence[int]:
        return [key for _, key in self._held if key != _NOTHING]

    def _begins(self) -> bool:
        """Whether what is held is a beginning of the keys."""
        typed = self._typed()
        return self._held[0][1] != _NOTHING and list(self._detach[:len(typed)]) == typed


def _next(data: bytes, at: int) -> Tuple[bytes, int]:
    """Return the next key: its bytes, and what a plain terminal would have sent."""
    long = _LONG.match(data, at) if data[at] == 0x1B else None
    if not long:
        return data[at:at + 1], data[at]
    number, held = int(long["key"] or long["char"]), int(long["held"] or long["mod"] or 1) - 1 & ~_LOCKS
    if long["event"] == _RELEASED or number in _MODIFIERS:
        return long[0], _NOTHING
    if held == _CONTROL and 64 <= number < 128:
        return long[0], number & 0x1F
    return long[0], number if not held and number < 128 else 256 + number
