"""What the command line shows, without a server: columns, sentences, lines, and how bytes get through.

Owns:    the checks of show, reasons, agents, pieces, tail and stdin in cli/.
Runs in: the test process.
Unaware: of servers and of how a command line is read (test_cli_units.py).
"""
from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest

from agentserver import errors
from agentserver.cli import agents, connect, options, pieces, server, show, stdin, tail
from agentserver.cli.pieces import Piece
from agentserver.cli.reasons import sentences
from agentserver.results import AgentInfo, Chunk, StreamRange

NOW = 1_795_000_000.0
STAMP = "2026-11-18T11:06:30.000000Z"   # some time before NOW


# ---------------------------------------------------------------- formatting

@pytest.mark.parametrize("secs, shown", [
    (-5, "0s"), (0, "0s"), (0.0996, "0.1s"), (0.041, "41ms"), (3, "3s"), (0.34, "0.3s"),
    (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"),
    (125, "2m05s"), (3599.6, "1h00m"), (3 * 3600 + 7 * 60, "3h07m"), (86400 * 4 + 7200, "4d02h")])
def test_durations_are_shown_in_two_units(secs: float, shown: str) -> None:
    assert show.duration(secs) == shown


@pytest.mark.parametrize("count, shown", [
    (0, "0 B"), (17, "17 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (500 * 1024, "500 KiB"),
    (64 * 1024 ** 2, "64.0 MiB"), (1024 ** 5, "1024.0 TiB")])
def test_sizes(count: int, shown: str) -> None:
    assert show.size(count) == shown


def test_text_cannot_drive_the_terminal_or_leave_its_line() -> None:
    assert show.clean("a\nb\t\x1b[31m\u202e\x00é") == "a\\nb\\t\\x1b[31m\\u202e\\x00é"
    assert show.clean("\ud800") == "\\ud800"


def test_columns_are_aligned_also_with_wide_characters() -> None:
    lines = show.table(("A", "B"), [("x", "1"), ("日本", "2"), ("long", "3")])
    assert lines == ["A     B", "x     1", "日本  2", "long  3"]


def test_the_last_column_is_cut_to_the_terminal() -> None:
    assert show.table(("A", "B"), [("x", "y" * 50)], columns=20)[1] == "x  " + "y" * 16 + "…"
    assert show.table(("A", "B"), [("x", "y" * 50)])[1] == "x  " + "y" * 50


def test_short_ids_stay_distinct() -> None:
    assert show.short_ids(["12345678aa", "12345679bb"]) == {"12345678aa": "12345678", "12345679bb": "12345679"}
    assert show.short_ids(["12345678aa", "12345678bb"])["12345678bb"] == "12345678b"
    assert show.short_ids([]) == {}


def test_colour_needs_a_terminal_and_no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "is_terminal", lambda fd: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert show.paint("x", "red") == "\033[31mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert show.paint("x", "red") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert show.paint("x", "red") == "x"
    monkeypatch.setattr(show, "is_terminal", lambda fd: False)
    monkeypatch.setenv("TERM", "xterm")
    assert show.paint("x", "red") == "x"


def agent_info(**fields: Any) -> AgentInfo:
    """Return an agent as a server would list it."""
    return AgentInfo.of({"id": "3f2a1b2c-0000-4000-8000-000000000000", "status": "running", "want": "up", "pid": 4711,
                         "created_at": STAMP, "started_at": STAMP, "command": ["sleep", "a b"], "stdin": "pipe",
                         "output": {"stdout": {"first_offset": 0, "end_offset": 2048},
                                    "stderr": {"first_offset": 0, "end_offset": 0}}, **fields})


def ended(status: str = "failed", **record: Any) -> AgentInfo:
    """Return an agent that has ended with this exit record."""
    return agent_info(status=status, want="down", pid=None, exit={"at": STAMP, "duration": 3.2, **record})


def test_ps_shows_agents_and_how_they_ended() -> None:
    infos = [agent_info(name="one"), ended(code=3, reason="exited"),
             ended("terminated", signal="SIGKILL", reason="kill")]
    lines = agents.lines(infos, NOW, 0)
    assert lines[0].split() == list(agents.HEAD)
    assert lines[1].startswith("3f2a1b2c  one   running") and lines[1].endswith("sleep 'a b'")
    assert agents.status(ended("completed", code=0, reason="exited")) == "completed"
    assert "failed (exit 3)" in lines[2] and "terminated (kill, SIGKILL)" in lines[3]


def test_ps_shows_what_is_being_ended() -> None:
    assert agents.status(agent_info(want="down")) == "running (ending)"


def test_an_event_is_a_line() -> None:
    line = server.event_line({"sequence": 7, "timestamp": STAMP, "agent_id": "3f2a1b2c-0", "status": "running",
                              "message": "started\nas 1"})
    assert line == "     7  2026-11-18 11:06:30  3f2a1b2c  running       started\\nas 1"


# ---------------------------------------------------------------- why

REASONS: "dict[str, tuple[dict[str, Any], str]]" = {
    "success": (dict(code=0, reason="exited"), "It ended by itself with exit code 0, which means success."),
    "failure": (dict(code=3, reason="exited"), "It ended by itself with exit code 3, which means failure."),
    "shell": (dict(code=127, reason="exited"), "Shells use 127 for a command that was not found."),
    "shell signal": (dict(code=143, reason="exited"), "Shells use 143 for a command that signal 15 ended."),
    "strange signal": (dict(signal="SIGSEGV", reason="signaled"),
                       "SIGSEGV ended it, and this server did not send that"),
    "client signal": (dict(signal="SIGUSR1", reason="signaled", by="unix client"),
                      "A client (unix client) sent it SIGUSR1, and it ended by that."),
    "stop": (dict(signal="SIGTERM", reason="stop", by="tcp client"),
             "A client (tcp client) stopped it; SIGTERM ended it."),
    "stop, clean": (dict(code=0, reason="stop", by="tcp client"), "stopped it; it then ended with exit code 0."),
    "stop, deaf": (dict(signal="SIGKILL", reason="stop", by="tcp client"),
                   "A client (tcp client) stopped it, and SIGKILL ended it: it was still there when its grace was "
                   "over, or when somebody killed it before that."),
    "kill": (dict(signal="SIGKILL", reason="kill", by=None), "Somebody killed it; SIGKILL ended it."),
    "limit": (dict(signal="SIGTERM", reason="limit:runtime_secs", by="server"), "It reached its limit runtime_secs"),
    "shutdown": (dict(signal="SIGTERM", reason="shutdown", by="server"),
                 "The server was shut down and ended its agents"),
    "not started": (dict(reason="not_started"), "It could not be started again"),
    "lost": (dict(reason="lost", by="server"), "The server lost it"),
    "of the future": (dict(reason="gone fishing"), "It ended for the reason 'gone fishing'; its exit code is unknown."),
}


@pytest.mark.parametrize("case", REASONS)
def test_every_reason_has_its_sentence(case: str) -> None:
    record, expected = REASONS[case]
    told = sentences(ended(**record), NOW)
    assert expected in told[0]
    assert all(sentence.endswith((".", "Z.")) for sentence in told)


def test_the_sentences_name_duration_use_and_the_leaked() -> None:
    told = " ".join(sentences(ended(code=0, reason="exited", rusage={"cpu_secs": 1.5, "max_rss_bytes": 3 * 1024 ** 2},
                                    leaked=[{"pid": 7, "command": "sleep 99"}, {"pid": 8, "command": "x"}]), NOW))
    assert "It ran for 3.2s and ended" in told
    assert "It used 1.5s of processor time and at most 3.0 MiB of memory." in told
    assert "2 processes that it had started were still alive then and were ended too: 7 sleep 99; 8 x." in told
    one = " ".join(sentences(ended(code=0, reason="exited", leaked=[{"pid": 7, "command": "sleep 99"}]), NOW))
    assert "1 process that it had started was still alive then and was ended too: 7 sleep 99." in one


@pytest.mark.parametrize("status, expected", [
    ("idle", "It waits"), ("initializing", "It is being started"), ("running", "It has been running for"),
    ("thinking", "is thinking"), ("paused", "It is paused"), ("failed", "is not recorded")])
def test_every_status_has_its_sentence(status: str, expected: str) -> None:
    told = sentences(agent_info(status=status, paused_at=STAMP), NOW)
    assert expected in told[0]


def test_what_is_wanted_is_told() -> None:
    assert "It has been asked to end and has not ended yet." in sentences(agent_info(want="down"), NOW)
    assert "It has written 2.0 KiB to stdout." in sentences(agent_info(), NOW)


# ---------------------------------------------------------------- pieces and lines

def piece(data: bytes, offset: int = 0, time_: str = "1", agent: str = "a", stream: str = "stdout") -> Piece:
    return Piece(agent, stream, time_, offset, data)


def test_a_chunk_is_cut_where_its_times_change() -> None:
    chunk = Chunk(data=b"abcdef", offset=10, next_offset=16, times=[("t1", 12), ("t2", 20)])
    assert [(p.time, p.offset, p.data) for p in pieces.of_chunk("a", "stdout", chunk)] == [
        ("t1", 10, b"ab"), ("t2", 12, b"cdef")]
    late = Chunk(data=b"abc", offset=0, next_offset=3, times=[("t1", 1)])
    assert [(p.time, p.data) for p in pieces.of_chunk("a", "stdout", late)] == [("t1", b"a"), ("t1", b"bc")]
    pushed = Chunk(raw={"timestamp": "t9"}, data=b"abc", offset=5, next_offset=8)
    assert list(pieces.of_chunk("a", "stdout", pushed)) == [Piece("a", "stdout", "t9", 5, b"abc")]
    assert list(pieces.of_chunk("a", "stdout", Chunk(eof=True, offset=5, next_offset=5))) == []


def test_streams_are_merged_by_time() -> None:
    first = [piece(b"1", time_="1"), piece(b"4", time_="4")]
    second = [piece(b"2", time_="2", stream="stderr"), piece(b"3", time_="3", stream="stderr")]
    assert b"".join(p.data for p in pieces.in_order([first, second])) == b"1234"


def test_lines_are_cut_per_stream_and_keep_the_time_of_their_first_byte() -> None:
    given = [piece(b"on", 0, "1"), piece(b"x\n", 0, "2", agent="b"), piece(b"e\r\ntwo\nthr", 2, "3"),
             piece(b"ee", 12, "4")]
    assert [(p.agent_id, p.time, p.offset, p.data) for p in pieces.lines(given)] == [
        ("b", "2", 0, b"x\n"), ("a", "1", 0, b"one\r\n"), ("a", "3", 5, b"two\n"), ("a", "3", 9, b"three")]


def test_a_line_without_end_is_not_held_back_for_ever() -> None:
    parts = [piece(b"x" * 1000, 1000 * n) for n in range(200)]
    found = list(pieces.lines(parts))
    assert len(found) == 4 and b"".join(p.data for p in found) == b"x" * 200_000
    assert list(pieces.line_ends(parts)) == ["stdout"], "but it is one line"


def test_line_ends_are_told_in_the_order_of_lines() -> None:
    dice = random.Random(7)
    for _ in range(50):
        given = [piece(bytes(dice.choice(b"ab\n") for _ in range(dice.randrange(1, 6))),
                       stream=dice.choice(["stdout", "stderr"])) for _ in range(dice.randrange(8))]
        ends = list(pieces.line_ends(given))
        whole = [line.stream for line in pieces.lines(given) if line.data.endswith(b"\n")]
        assert ends[:len(whole)] == whole
        assert sorted(ends) == sorted(line.stream for line in pieces.lines(given))


def test_cutting_loses_nothing() -> None:
    data = os.urandom(5000).replace(b"\x01", b"\n").replace(b"\x02", b"\r\n")
    for step in (1, 7, 100, 5000):
        given = [piece(data[at:at + step], at) for at in range(0, len(data), step)]
        found = list(pieces.lines(given))
        assert b"".join(p.data for p in found) == data
        assert [p.offset for p in found] == [sum(len(q.data) for q in found[:n]) for n in range(len(found))]


def test_prefixes_are_aligned_and_distinct() -> None:
    names = {"11111111x": "a", "22222222x": "long", "33333333x": "", "44444444x": "b", "55555555x": "b"}
    assert pieces.prefixes(names) == {
        "11111111x": "a|          ", "22222222x": "long|       ", "33333333x": "33333333|   ",
        "44444444x": "b 44444444| ", "55555555x": "b 55555555| "}


# ---------------------------------------------------------------- the last lines

class FakeAgent:
    """A stream of which the beginning may be gone; reads may give less than was asked for."""

    id = "a"

    def __init__(self, data: bytes, first: int = 0, most: int = 1 << 30) -> None:
        self.data, self.first, self.most = data, first, most

    def read(self, stream: str, offset: int, max_bytes: int, times: bool = False) -> Chunk:
        start = max(offset, self.first)
        data = self.data[start:start + min(max_bytes, self.most)]
        return Chunk(data=data, offset=start, next_offset=start + len(data), dropped=max(start - offset, 0))

    def span(self) -> StreamRange:
        return StreamRange(first_offset=self.first, end_offset=len(self.data))


@pytest.mark.parametrize("data", [
    b"", b"\n", b"a", b"a\n", b"a\nb", b"\n\n\n", b"one\ntwo\nthree\n", b"one\ntwo\nthree", b"x" * 300,
    b"x" * 300 + b"\n" + b"y" * 200, b"".join(b"%d\n" % n for n in range(500))])
@pytest.mark.parametrize("most", [3, 1 << 30])
def test_the_last_lines_begin_where_they_begin(data: bytes, most: int) -> None:
    lines = data.split(b"\n")
    lines = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    for wanted in (0, 1, 2, 3, 7, 1000):
        for step in (1, 5, 64, 4096):
            agent = FakeAgent(data, 0, most)
            at = tail.start_of_last(agent, "stdout", agent.span(), wanted, step)  # type: ignore[arg-type]
            assert data[at:] == b"".join(lines[-wanted:] if wanted else []), (wanted, step)


def test_the_last_lines_of_what_is_kept() -> None:
    agent = FakeAgent(b"gone\nhalf of a line\nlast\n", first=8)
    assert tail.start_of_last(agent, "stdout", agent.span(), 10) == 8  # type: ignore[arg-type]
    stale = StreamRange(first_offset=0, end_offset=25)  # the beginning went after we were told
    assert tail.start_of_last(agent, "stdout", stale, 10, step=4) >= 8  # type: ignore[arg-type]
    assert tail.last_lines(agent, "stdout", agent.span(), 1) == ["last"]  # type: ignore[arg-type]


# ---------------------------------------------------------------- stdin

class FakeStdin:
    """An agent whose buffer of `room` bytes is read, all of it, after every `slow` refusals."""

    def __init__(self, room: int, slow: int = 3) -> None:
        self.room, self.slow, self.refused = room, slow, 0
        self.got, self.buffered = b"", 0

    def write(self, data: bytes) -> int:
        if self.buffered + len(data) > self.room:
            self.refused += 1
            if self.refused % self.slow == 0:
                self.buffered = 0
            raise errors.RequestError("full", "stdin_full")
        self.got += data
        self.buffered += len(data)
        return len(data)


@pytest.mark.parametrize("room", [1, 100, 4096, 1 << 20])
def test_all_of_stdin_gets_through_any_buffer(room: int) -> None:
    data = os.urandom(300 if room == 1 else 300_000)
    agent = FakeStdin(room)
    assert stdin.pour(agent, data, lambda secs: False) == len(data)  # type: ignore[arg-type]
    assert agent.got == data


def test_what_has_no_end_is_ended_by_its_timeout() -> None:
    given = options.parse(["--timeout", "0.01", "events", "-f"])
    with pytest.raises(errors.RequestTimeout, match="`agentserver events` was given 0.01 s"), connect.bounded(given):
        while True:
            try:
                signal.pause()
            except Exception:  # as a loop would that takes every error for a trouble of its link
                continue


def test_giving_up_tells_how_much_was_taken() -> None:
    agent = FakeStdin(100, slow=10 ** 9)
    assert stdin.pour(agent, b"x" * 1000, lambda secs: agent.refused > 20) == len(agent.got) <= 100  # type: ignore[arg-type]
