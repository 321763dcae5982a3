"""What `attach` is made of, without a server: detach keys, the state of a terminal, old output made harmless.

Owns:    the checks of detach, escapes, redraw and typist in cli/.
Runs in: the test process; vt.py stands for a terminal.
Unaware: of processes (test_attach.py).
"""
from __future__ import annotations

import time

import pytest
from support import wait_until
from vt import Vt

from agentserver import AgentClient
from agentserver.cli import redraw
from agentserver.cli.detach import Keys, read_keys
from agentserver.cli.escapes import Modes, Quiet, quiet
from agentserver.cli.typist import APART_SECS, Typist

# ---------------------------------------------------------------- keys and sizes on their way

def test_no_key_comes_in_the_moment_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs forget the key that they have just read when SIGWINCH comes; keys alone do not wait."""
    client, sent = AgentClient("unix:/nowhere"), []
    monkeypatch.setattr(client, "control", lambda *_, **__: sent.append(("size", time.monotonic())))
    monkeypatch.setattr(client, "_run", lambda _call: sent.append(("keys", time.monotonic())))
    typist = Typist(client, "agent", lambda: None)
    typist.start()
    for count, step in enumerate((lambda: typist.resize(24, 80), lambda: typist.type(b"q"), lambda: typist.type(b"q"),
                                  lambda: typist.resize(25, 80)), 1):
        step()
        wait_until(lambda: len(sent) == count, what="it to be sent")
    typist.finish(10)
    assert [kind for kind, _at in sent] == ["size", "keys", "keys", "size"]
    for (kind, at), (other, later) in zip(sent, sent[1:]):
        assert kind == other or later - at >= APART_SECS


# ---------------------------------------------------------------- the keys that detach

@pytest.mark.parametrize("text, keys", [
    ("ctrl-p,ctrl-q", b"\x10\x11"), ("^P,^q", b"\x10\x11"), ("C-a,d", b"\x01d"), ("ctrl-@", b"\0"), ("ctrl-]", b"\x1d"),
    ("~,.", b"~."), ("none", b"")])
def test_keys_are_read_as_people_write_them(text: str, keys: bytes) -> None:
    assert read_keys(text) == keys


@pytest.mark.parametrize("text", ["", "ctrl-", "ctrl-pp", "pq", "ctrl-1", "a,,b", "é", "\x10"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no key"):
        read_keys(text)


def typed(*pieces: bytes, keys: bytes = b"\x10\x11") -> tuple[bytes, bool]:
    """Return what is passed on, and whether that detached."""
    found = Keys(keys)
    return b"".join(map(found.feed, pieces)), found.pressed


@pytest.mark.parametrize("pieces, passed, detached", [
    ((b"ab",), b"ab", False),
    ((b"a\x10\x11b",), b"a", True),
    ((b"a\x10", b"\x11"), b"a", True),
    ((b"a\x10", b"b"), b"a\x10b", False),
    ((b"\x10",), b"", False),
    ((b"\x10\x10\x11",), b"\x10", True),
    ((b"\x10", b"\x10", b"\x10", b"x"), b"\x10\x10\x10x", False),
    ((b"\x11\x10",), b"\x11", False),
    ((b"\x1b[A\x10\x1b[A",), b"\x1b[A\x10\x1b[A", False),
    ((bytes(range(32)) * 2 + b"\xff\xc3",), bytes(range(16)), True)])
def test_keys_pass_but_for_the_ones_that_detach(pieces: tuple[bytes, ...], passed: bytes, detached: bool) -> None:
    assert typed(*pieces) == (passed, detached)


@pytest.mark.parametrize("pieces", [
    (b"\x1b[112;5u", b"\x1b[113;5u"), (b"\x1b[112;5u\x1b[113;5u",), (b"\x10\x1b[113;5u",),
    (b"\x1b[112;5:1u\x1b[112;5:3u\x1b[113;5:1u",),
    (b"\x1b[57442;5u\x1b[112;5u", b"\x1b[57442;5:3u\x1b[57442;5u", b"\x1b[113;5u"),
    (b"\x1b[112;133u\x1b[113;133u",), (b"\x1b[112:80;5u\x1b[113::113;5;17u",), (b"\x1b[27;5;112~\x1b[27;5;113~",)])
def test_keys_in_their_long_forms_detach(pieces: tuple[bytes, ...]) -> None:
    assert typed(*pieces)[1]


@pytest.mark.parametrize("pieces", [
    (b"\x1b[112;6u\x1b[113;5u",), (b"\x1b[112;5:3u\x1b[113;5:3u",), (b"\x1b[112u\x1b[113u",),
    (b"\x1b[112;5u\x1b[112;5:3u\x1b[114;5u",)])
def test_other_keys_in_long_forms_pass(pieces: tuple[bytes, ...]) -> None:
    assert typed(*pieces) == (b"".join(pieces), False)


def test_single_and_many_keys() -> None:
    assert typed(b"x\x1dy", keys=b"\x1d") == (b"x", True)
    assert typed(b"abcabd", keys=b"abd") == (b"abc", True)
    assert typed(b"\x10\x11", keys=b"") == (b"\x10\x11", False)


# ---------------------------------------------------------------- the state of a terminal

EVERYTHING = (b"\x1b[?1049h\x1b[?1000;1002;1006h\x1b[?1004h\x1b[?2004h\x1b[?1h\x1b=\x1b[>1u\x1b[>4;2m\x1b[?25l"
              b"\x1b[2 q\x1b[3;8r\x1b[?7l\x1b[4h\x1b(0\x1b[?2026h\x1b[2;20h\x1b[12l\x1b[?12;45;2027h"
              b"\x1b]8;id=1;http://box/a\x07")


def after(*pieces: bytes) -> Modes:
    modes = Modes()
    for piece in pieces:
        modes.feed(piece)
    return modes


def terminal(*pieces: bytes) -> Vt:
    vt = Vt()
    for piece in pieces:
        vt.feed(piece)
    return vt


def test_everything_is_undone_and_can_be_redone() -> None:
    modes = after(EVERYTHING)
    assert modes.alternate
    used = terminal(EVERYTHING)
    assert len(used.modes) > 10 and used.alternate
    again = terminal(modes.redo())
    assert again.modes == used.modes and again.alternate
    used.feed(modes.undo())
    assert not used.modes and not used.alternate and used._region == (0, 23)


def test_a_state_is_seen_however_the_bytes_are_cut() -> None:
    pieces = [EVERYTHING[n:n + 1] for n in range(len(EVERYTHING))]
    assert after(*pieces).redo() == after(EVERYTHING).redo()


@pytest.mark.parametrize("data", [
    b"\x1b[?1049h\x1b[?1049l", b"\x1b[?1000h\x1b[?1000l\x1b[?25l\x1b[?25h", b"\x1b=\x1b>", b"\x1b[>1u\x1b[<u",
    b"\x1b[2 q\x1b[ q",
    b"\x1b[>4;2m\x1b[>4m", b"\x1b[>4;1m\x1b[>4;0m", b"\x1b[1;5r\x1b[r", b"\x1b(0\x1b(B", EVERYTHING + b"\x1bc",
    b"\x1b]9;4;3\x07\x1b]9;4;0\x07", b"\x1b]8;;http://box\x1b\\x\x1b]8;;\x1b\\",
    b"\x1b]8;id=a;http://box\x07x\x1b]8;;\x07",
    b"\x1b[20h\x1b[20l", b"\x1b[12l\x1b[12h", b"\x1b[?12;45;2027h\x1b[?2027;12;45l", b"\x1b[2h\x1b[2l",
    b"\x1b[31m\x1b[2J text \x1b]0;title\x07", b"\x1b]10;?\x07", b"\x1b[?12345h",
    b"\x1b[?1007h"])
def test_nothing_is_undone_where_nothing_is_left(data: bytes) -> None:
    assert after(data).undo() == b"\x1b[m\x1b[?25h"


def test_a_soft_reset_leaves_what_xterm_added() -> None:
    modes = after(b"\x1b[?1h\x1b[?25l\x1b[1;5r\x1b=\x1b[?1000h\x1b[!p")
    assert b"1000l" in modes.undo() and b"\x1b>" not in modes.undo() and b"\x1b[r" not in modes.undo()


def test_the_cursor_stays_where_it_is() -> None:
    vt = terminal(b"\x1b[3;8r\x1b[?6h\x1b[5;7H")
    place = (vt.row, vt.col)
    vt.feed(after(b"\x1b[3;8r\x1b[?6h").undo())
    assert (vt.row, vt.col) == place


def test_colours_and_the_progress_of_a_tab_are_taken_back() -> None:
    back = after(b"\x1b]11;#102030\x07\x1b]4;1;red\x1b\\\x1b]9;4;3\x07").undo()
    assert b"\x1b]111\x1b\\" in back and b"\x1b]104\x1b\\" in back and b"\x1b]9;4;0\x1b\\" in back


def test_a_link_that_is_open_is_closed() -> None:
    """What a shell prints after it would be a part of it."""
    for pieces in ([b"\x1b]8;;http://box/" + b"long" * 100 + b"\x1b\\text"],
                   [b"\x1b]8;", b";http://box\x1b", b"\\text"]):
        assert b"\x1b]8;;\x1b\\" in after(*pieces).undo()
    assert b"]8;;\x1b" not in after(b"\x1b]8;;http://box\x1b\\x\x1b]", b"8;", b";", b"\x1b\\").undo()


def test_the_other_character_set_is_left() -> None:
    assert b"\x0f" in after(b"\x1b)0\x0elqqk").undo() and b"\x0f" not in after(b"\x0elqqk\x0f").undo()


def test_kitty_keys_of_each_screen_are_popped_on_it() -> None:
    back = after(b"\x1b[>1u\x1b[?1049h\x1b[>3u\x1b[>5u").undo()
    assert back.index(b"\x1b[<2u") < back.index(b"\x1b[?1049l") < back.index(b"\x1b[<1u")


def test_a_hostile_program_cannot_make_the_state_large() -> None:
    modes = Modes()
    for number in range(3000):
        modes.feed(b"\x1b[?%dh\x1b[>%du\x1b]%d;x\x07" % (number, number, number))
    modes.feed(b"\x1b]0;" + b"x" * 100_000)
    assert len(modes.redo()) < 3000


# ---------------------------------------------------------------- old output

@pytest.mark.parametrize("question", [
    b"\x1b[c", b"\x1b[0c", b"\x1b[>c", b"\x1b[>0c", b"\x1b[=c", b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n", b"\x1b[?996n",
    b"\x1b]10;?\x07",
    b"\x1b]11;?\x1b\\", b"\x1b]4;1;?\x07", b"\x1b[?2026$p", b"\x1b[4$p", b"\x1bP$qm\x1b\\", b"\x1b[>q", b"\x1b[>0q",
    b"\x1b[?u",
    b"\x1bP+q544e\x1b\\", b"\x1b[18t", b"\x1b[14t", b"\x1b[22;0;0t", b"\x05", b"\x1bZ", b"\x1b[?1;1;0S", b"\x1b[x",
    b"\x07",
    b"\x1b]52;c;aGVsbG8=\x07", b"\x1b]9;ready\x07", b"\x1b]777;notify;a;b\x07", b"\x1b[5i",
    b"\x1b_Gi=31,a=q;AAAA\x1b\\", b"\x1b[3J",
    b"\x1bPtmux;\x1b\x1b[?1016$p\x1b\\", b"\x1bPtmux;\x1b\x1bP+q4d73\x1b\x1b\\\x1b\x1b[?1016$p\x1b\x1b[c\x1b\\"])
def test_what_asks_or_acts_is_left_out(question: bytes) -> None:
    assert quiet(b"before" + question + b"after") == b"beforeafter"
    for cut in range(1, len(question)):
        pieces = Quiet()
        assert pieces.feed(b"before" + question[:cut]) + pieces.feed(question[cut:] + b"after") == b"beforeafter"


@pytest.mark.parametrize("harmless", [
    b"\x1b[31m", b"\x1b[4:3m", b"\x1b[2J\x1b[H", b"\x1b[10;20r", b"\x1b[3S", b"\x1b[?25l", b"\x1b[>1u", b"\x1b[<u",
    b"\x1b[>4;2m", b"\x1b[2 q",
    b"\x1b]0;title\x07", b"\x1b]8;;http://x?y\x1b\\link\x1b]8;;\x1b\\", b"\x1b(0qqq\x1b(B", b"\x1b7\x1b8", b"\x1bM",
    b"\x1b[5@", b"\x1b[!p", b"\x1bc",
    b"\x1bPq#0;2;0;0;0~~\x1b\\", "größe 日本".encode(), b"\xff\xfe", b"\x1b[u", b"\x1b[s", b"a\tb\r\n"])
def test_what_only_shows_is_kept(harmless: bytes) -> None:
    assert quiet(b"before" + harmless + b"after") == b"before" + harmless + b"after"
    pieces = Quiet()
    assert b"".join(pieces.feed(bytes([byte])) for byte in harmless + b"after") == harmless + b"after"


def test_what_goes_through_tmux_and_is_only_begun_can_still_be_ended() -> None:
    for begun in (b"\x1bPtmux;", b"\x1bPtmux;\x1b\x1b[?1016$p", b"\x1bPtmux;\x1b\x1b[?1016$p\x1b"):
        assert quiet(b"\x07" + begun) == begun


def drawn(data: bytes, cut: bool = False, modes: "Modes | None" = None) -> tuple[Vt, bytes, bool]:
    out, exact = redraw.draw(data, modes or Modes(), cut)
    return terminal(out), out, exact


SHELL = b"$ one\r\nfirst\r\n$ clear\r\n\x1b[H\x1b[2J\x1b[3J$ two\r\nsecond\r\n$ "
VIM = b"\x1b[?1049h\x1b[?1h\x1b=\x1b[1;24r\x1b[H\x1b[2Jfile text\x1b[24;1Hstatus"
UNVIM = b"\x1b[?1l\x1b>\x1b[?1049l"


def test_output_is_shown_from_where_the_screen_was_cleared() -> None:
    vt, out, exact = drawn(SHELL)
    assert vt.text() == "$ two\nsecond\n$ ".rstrip() and b"first" not in out and exact
    assert drawn(b"x\x1b[31m\x1bc" + b"after")[0].text() == "after"
    for clear in (b"\x1b[2J\x1b[3J\x1b[H", b"\x1b[H\x1b[J", b"\x1b[1;1H\x1b[0m\x1b[2J"):
        assert b"before" not in drawn(b"before" + clear + b"after")[1]
    assert b"before" in drawn(b"before\x1b[2Jafter")[1], "nobody knows where the cursor was"


def test_both_screens_are_shown() -> None:
    vt, _, exact = drawn(SHELL + VIM)
    assert vt.alternate and vt.text().startswith("file text") and exact and "keypad" in vt.modes
    vt.feed(UNVIM)
    assert vt.text() == "$ two\nsecond\n$", "what was on the main screen is there again"
    vt, _, exact = drawn(SHELL + VIM + UNVIM + b"more")
    assert not vt.alternate and vt.text() == "$ two\nsecond\n$ more" and exact and not vt.modes


def test_what_was_switched_on_before_the_beginning_is_on() -> None:
    vt, _, _ = drawn(b"\x1b[?2004h\x1b[?1000h" + SHELL)
    assert vt.modes == {"?2004", "?1000"}


def test_a_cut_beginning_starts_with_a_line_and_is_uncertain_where_cells_are_addressed() -> None:
    vt, _, exact = drawn(b"le of a line\r\n$ ls\r\nfile\r\n", cut=True)
    assert vt.text() == "$ ls\nfile" and exact
    assert not drawn(b"1m\x1b[5;5Hcell", cut=True)[2]
    assert drawn(b"1m\x1b[5;5Hcell", cut=True)[0].text().strip() == "cell"
    assert drawn(b"5;5Hcell" + SHELL, cut=True)[2]
    assert not drawn(b"x", cut=True, modes=after(b"\x1b[?1049h"))[2]


def test_a_beginning_that_was_on_the_alternate_screen_is_not_shown_on_the_main_one() -> None:
    for modes in (Modes(), after(VIM)):
        vt, _, _ = drawn(b"\x1b[7;7Hof vim" + UNVIM + b"$ ls\r\n", cut=True, modes=modes)
        assert vt.text() == "$ ls" and not vt.alternate


def test_utf8_is_not_cut() -> None:
    text = "é" * 50 + "\r\n" + "日本語\r\n"
    vt = drawn(text.encode()[1:], cut=True)[0]
    assert vt.text() == "日本語"


def test_a_flood_shows_its_end_and_says_what_is_missing() -> None:
    modes = Modes()
    data = b"".join(b"line %d\r\n" % n for n in range(200_000))
    shown = redraw.flood(data, modes)
    assert len(shown) < redraw.MOST + 1000 and b"MiB are not shown" in shown
    assert terminal(shown).text().endswith("line 199999")
    shown = redraw.flood(VIM + data, after(b"\x1b[?1000h"))
    vt = terminal(b"\x1b[?1000h", shown)
    assert vt.alternate and vt.modes >= {"?1000", "keypad", "?1"} and b"not shown" not in shown
    assert terminal(redraw.flood(b"ne\r\nfew", Modes(), 1020)).text() == "[1.0 KiB are not shown]\nfew"
