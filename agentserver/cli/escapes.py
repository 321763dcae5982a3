"""Escape sequences in the output of a terminal program: what they leave switched on, which of them ask for something.

Owns:    `Modes`, which knows a terminal's state and takes it back; `quiet`, which keeps old output from acting again.
Runs in: any thread; it is pure.
Unaware: of terminals, and of what is on the screen.

The names are those of "XTerm Control Sequences" (ctlseqs), of ECMA-48, and of the kitty keyboard protocol.
"""
from __future__ import annotations

import re
from typing import Dict, List, Match

#: modes of a terminal that is left alone: `?` for the private ones of DEC and xterm. 2 locks the keyboard, 12 keeps the
#: terminal from showing what is typed, 20 has Return send two characters. Others are nobody's business of ours: what
#: they were before is not known (1007, 1034 …), or they last only for a moment
OFF = tuple(map(str.encode, ("2", "4", "20", "?1", "?3", "?5", "?6", "?9", "?12", "?45", "?66", "?69", "?1000",
                             "?1001", "?1002", "?1003", "?1004", "?1005", "?1006", "?1015", "?1016", "?2004", "?2026",
                             "?2027", "?2031", "?2048")))
ON = (b"12", b"?7", b"?25")
ALTERNATE = (b"?47", b"?1047", b"?1049")
_KNOWN = frozenset((*OFF, *ON, *ALTERNATE))
_OF_XTERM = frozenset((*ALTERNATE, *OFF[OFF.index(b"?1000"):]))
_HOMING = (b"?6", b"?69", b"?3")  # these move the cursor

#: what changes a state: shifts, modes, keypad, resets, scrolling region, keyboard protocols, cursor shape, links,
#: colours, progress
_STATE = re.compile(
    rb"(?P<shift>[\x0e\x0f])|\x1b(?:\[(?P<modes>\??[0-9;]+)(?P<set>[hl])|(?P<escape>[=>c])|\[(?P<soft>!)p"
    rb"|\[(?P<region>[0-9;]*)r|\[(?P<kitty>[<>=])(?P<flags>[0-9;]*)u|\[>4(?P<keys>;[0-9]+)?(?P<final>[mn])"
    rb"|\[(?P<shape>[0-9]*) q|\((?P<charset>[0-9A-Z<=>])|\](?P<colour>1[0-9]|4|8|9);(?P<value>[^\x07\x1b]*))")
#: ends a sequence or a string that was cut off; to tmux CAN is a part of some strings
CANCEL = b"\x18\x1b\\"
_LONGEST_START = 64     # bytes of a sequence whose end has not come, that are kept for later
_MOST_PUSHED = 99       # on the stack of the kitty keyboard protocol; terminals have fewer

#: where a sequence is taken back
_BACK = {"keypad": b"\x1b>", "shape": b"\x1b[0 q", "keys": b"\x1b[>4m", "charset": b"\x1b(B", "link": b"\x1b]8;;\x1b\\",
         "shift": b"\x0f",
         "progress": b"\x1b]9;4;0\x1b\\", "colour 4": b"\x1b]104\x1b\\",
         **{f"colour {n}": b"\x1b]1%d\x1b\\" % n for n in range(10, 20)}}


class Modes:
    """The state that the output so far has put a terminal into, as far as it has to be taken back."""

    def __init__(self) -> None:
        self._start = b""                     # of a sequence whose end has not come
        self._reset()

    def _reset(self) -> None:
        self._modes: Dict[bytes, bool] = {}
        self._others: Dict[str, bytes] = {}   # what is not as usual: the sequence that made it so
        self._pushed: List[List[bytes]] = [[], []]  # kitty keyboard flags of the main and the alternate screen

    def _soft_reset(self) -> None:
        """DECSTR: the modes of DEC's terminals, not the ones that xterm added."""
        self._modes = {mode: on for mode, on in self._modes.items() if mode in _OF_XTERM}
        for name in ("keypad", "region", "charset"):
            self._others.pop(name, None)

    @property
    def alternate(self) -> bool:
        """Whether the alternate screen is shown."""
        return any(self._modes.get(mode) for mode in ALTERNATE)

    def feed(self, data: bytes) -> None:
        """Note what this output changes."""
        data = self._start + data
        for match in _STATE.finditer(data):
            self._note(match)
        begun = data.rfind(b"\x1b", -_LONGEST_START)
        unfinished = begun >= 0 and not _SEQUENCE.match(data, begun)
        self._start = data[begun:] if unfinished else b""

    def _note(self, match: Match[bytes]) -> None:
        kind = str(match.lastgroup)
        if kind == "set":
            self._note_modes(match["modes"], match["set"] == b"h")
        elif kind == "escape" and match["escape"] == b"c":
            self._reset()
        elif kind == "escape":
            self._keep("keypad", match, match["escape"] == b"=")
        elif kind == "soft":
            self._soft_reset()
        elif kind in ("kitty", "flags"):
            self._note_kitty(match["kitty"], match["flags"])
        elif kind == "final":
            self._keep("keys", match, match["final"] == b"m" and match["keys"] not in (None, b";0"))
        elif kind == "region":
            self._keep(kind, match, bool(match["region"].strip(b";")))
        elif kind == "shape":
            self._keep(kind, match, match["shape"] not in (b"", b"0"))
        elif kind == "shift":  # SO and SI: to the other character set, and back
            self._keep(kind, match, match["shift"] == b"\x0e")
        elif kind == "charset":
            self._keep(kind, match, match["charset"] != b"B")
        elif kind == "value":
            self._note_colour(match)

    def _note_modes(self, numbers: bytes, on: bool) -> None:
        private = b"?" if numbers.startswith(b"?") else b""
        for number in numbers.lstrip(b"?").split(b";"):
            mode = private + number
            if mode in ALTERNATE:
                self._modes = {name: value for name, value in self._modes.items() if name not in ALTERNATE}
            if mode in _KNOWN:
                self._modes[mode] = on

    def _note_kitty(self, action: bytes, flags: bytes) -> None:
        pushed = self._pushed[self.alternate]
        if action == b">":
            pushed.append(flags)
            del pushed[:-_MOST_PUSHED]
        elif action == b"<":
            count = int(flags[:4].split(b";")[0] or 1)
            del pushed[max(0, len(pushed) - count):]
        elif pushed:
            pushed[-1] = flags.split(b";")[0]
        else:  # set without having pushed: on what was there before
            self._others["kitty"] = b"\x1b[=" + flags + b"u"

    def _note_colour(self, match: Match[bytes]) -> None:
        code, value = match["colour"].decode(), match["value"]
        if code == "8":  # OSC 8 ; parameters ; address: without an address it ends
            self._keep("link", match, not value.endswith(b";"))
            return
        if code == "9":
            if value.startswith(b"4;"):
                self._keep("progress", match, not value.startswith(b"4;0"))
        elif not value.endswith(b"?"):
            self._others[f"colour {code}"] = match[0] + b"\x1b\\"

    def _keep(self, name: str, match: Match[bytes], kept: bool) -> None:
        self._others.pop(name, None)
        if kept:
            self._others[name] = match[0] + (b"\x1b\\" if name in ("progress", "link") else b"")

    # ------------------------------------------------------------ as sequences

    def redo(self) -> bytes:
        """Return what puts a fresh terminal into this state; the cursor goes home."""
        alternate = [mode for mode in ALTERNATE if self._modes.get(mode)]
        main, other = (b"".join(b"\x1b[>%su" % flags for flags in stack) for stack in self._pushed)
        out = [main, *(_mode(mode, True) for mode in alternate), other if alternate else b"", *self._others.values()]
        out += [_mode(mode, on) for mode, on in self._modes.items() if mode not in ALTERNATE and on != (mode in ON)]
        return b"".join(out) + b"\x1b[H"

    def undo(self) -> bytes:
        """Return what takes this state back and leaves the cursor where it is, on the main screen."""
        changed = [mode for mode, on in self._modes.items() if mode not in ALTERNATE and on != (mode in ON)]
        homing = [_mode(mode, False) for mode in changed if mode in _HOMING]
        if "region" in self._others:
            homing.append(b"\x1b[r")
        out = [b"\x1b7", *homing, b"\x1b8"] if homing else []
        out += [_mode(mode, mode in ON) for mode in changed if mode not in _HOMING]
        out += [_BACK[name] for name in self._others if name in _BACK]
        out.append(_popped(self._pushed[1]))
        out += [_mode(mode, False) for mode in ALTERNATE if self._modes.get(mode)]
        out.append(_popped(self._pushed[0]))
        out.append(b"\x1b[=0u" if "kitty" in self._others else b"")
        return b"".join(out) + b"\x1b[m\x1b[?25h"


def _mode(mode: bytes, on: bool) -> bytes:
    return b"\x1b[" + mode + (b"h" if on else b"l")


def _popped(pushed: List[bytes]) -> bytes:
    return b"\x1b[<%du" % len(pushed) if pushed else b""


# ---------------------------------------------------------------- output that was shown before

#: one sequence, of any kind: what goes through tmux to its terminal, with every ESC in it doubled, perhaps without its
#: end; CSI; OSC; DCS, APC, PM and SOS strings; the short ones; and single characters that act
_SEQUENCE = re.compile(rb"\x1bPtmux;(?P<through>(?:[^\x1b]|\x1b[^\\])*)(?:\x1b\\|(?P<open>\x1b?\Z))"
                       rb"|\x1b\[(?P<prefix>[<-?]?)[0-?]*(?P<between>[ -/]*)(?P<final>[@-~])"
                       rb"|\x1b\](?P<osc>[^\x07\x18\x1a\x1b]*)(?:\x07|\x1b\\)"
                       rb"|\x1b(?P<string>[P_^X])(?P<text>[^\x18\x1a\x1b]*)(?:\x1b\\)"
                       rb"|\x1b(?P<short>[ -/]*[0-OQ-WYZ`-~\\])|(?P<single>[\x05\x07])")
#: CSI that ask, move windows or print: (prefix, between, final), "*" for anything
_ASKING = frozenset(((b"", b"", b"c"), (b">", b"", b"c"), (b"=", b"", b"c"), (b"", b"", b"n"), (b"?", b"", b"n"),
                     (b"", b"", b"t"), (b">", b"", b"t"), (b"", b"", b"x"), (b"", b"", b"i"), (b"?", b"", b"i"),
                     (b">", b"", b"q"), (b"?", b"", b"u"), (b"", b"$", b"p"), (b"?", b"$", b"p"), (b"?", b"", b"S"),
                     (b"", b"*", b"y"), (b"", b"$", b"w"), (b"", b"'", b"w"), (b"", b"'", b"z"), (b"", b"'", b"{"),
                     (b"", b"'", b"|"), (b"", b"&", b"u"), (b"?", b"", b"m"), (b"", b"#", b"y")))
#: OSC that only set something on the screen: titles, palette, directory, links, colours, marks of shells
_HARMLESS = re.compile(rb"(?:[0-2]|4|7|8|9;4|1[0-9]|104|11[0-9]|133)(?:;|$)")
_FORGET = b"\x1b[3J"  # of a terminal: all that scrolled away, ours too
_SIXEL = re.compile(rb"[0-9;]*q")


def quiet(data: bytes) -> bytes:
    """Return output without all that asks the terminal something, rings, notifies, copies, prints or moves windows.

    The answers of our terminal would be typed into a program that asked long ago.
    """
    return _SEQUENCE.sub(_kept, data)


def _kept(match: Match[bytes]) -> bytes:
    if match["through"] is not None:
        kept = match["open"] is not None  # of one that is only begun the terminal is told the rest later
    elif match["final"]:
        kept = (match["prefix"], match["between"], match["final"]) not in _ASKING and match[0] != _FORGET
    elif match["osc"] is not None:
        kept = bool(_HARMLESS.match(match["osc"])) and b"?" not in match["osc"].split(b";")
    elif match["string"]:
        kept = match["string"] == b"P" and bool(_SIXEL.match(match["text"]))
    else:
        kept = bool(match["short"]) and match["short"] != b"Z"
    return match[0] if kept else b""


#: one that is begun and not ended where the data ends
_OPEN = re.compile(rb"\x1b(?:Ptmux;(?:[^\x1b]|\x1b[^\\])*\x1b?|\[[0-?]*[ -/]*"
                   rb"|[\]P_^X][^\x07\x18\x1a\x1b]*\x1b?|[ -/]*)\Z")
_OPEN_MOST = 64 * 1024  # bytes of one that are held; what is longer is a picture, and no question


class Quiet:
    """`quiet` for output that comes in pieces: what a piece begins is looked at when the next one has ended it."""

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, data: bytes) -> bytes:
        """Return what is to be shown now."""
        data = self._begun + data
        begun = _OPEN.search(data, max(0, len(data) - _OPEN_MOST))
        end = begun.start() if begun else len(data)
        self._begun = data[end:]
        return quiet(data[:end])
