"""The helper's side of a query, in this process: lines, filters and windows against a reference that is plainly right.

Owns:    random output in random pieces, with caps and gaps; the reference; patterns and the words they need.
Runs in: the test process; nothing is started.
Unaware: of processes, timers that end one, and requests (test_queries.py).
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from agentserver.core import output, query
from agentserver.core.literals import literals
from agentserver.core.output import OutputLog
from agentserver.errors import RequestError

SEED = 20261124
MOST = 10 * 1024 * 1024
FILTERS = [None, None, "a", "ab", "é", "(?i)B", "(?i)aB|É", "a|é", "^b", "b$", r"^$", r"\r",
           r"a+\s?b", "b.*a", r"\bab\b", "[^a]b", "(a|b)é", "(?:ab)+",
           "(?i:a)b", "(?!a)b", "�", ".", "zz", "a{2}", r"(?x) a b", "aa|(b)|é"]


class Line(NamedTuple):
    """A line as it has to come: the sorting key of its first byte, the stream's place, its text."""

    time: int
    side: int
    text: str


class Agent:
    """Output written in pieces at known times, and what is known of it without reading it back."""

    def __init__(self, directory: Path, rng: random.Random, cap: int = 64 * 1024 * 1024) -> None:
        self.directory, self._rng = str(directory), rng
        self._clock = time.time() - 10_000.0
        self.log = OutputLog(self.directory, cap, now=lambda: self._clock, segment_bytes=4096)
        #: by stream, for each byte ever written: the byte and the number of its piece
        self.written: dict[str, list[tuple[int, int]]] = {"stdout": [], "stderr": []}
        self._pieces = 0

    def write(self, stream: str, data: bytes) -> None:
        """Write a piece, at a time of its own."""
        self._clock += 0.0015
        self._pieces += 1
        self.log.append(stream, data)
        self.written[stream] += [(byte, self._pieces) for byte in data]

    def write_some(self, pieces: int, longest: int, alphabet: list[bytes]) -> None:
        """Write random pieces to random streams."""
        for _ in range(pieces):
            data = b"".join(self._rng.choices(alphabet, k=self._rng.randrange(1, longest)))
            self.write(self._rng.choice(["stdout", "stdout", "stderr"]), data)

    def lines(self, stream: str, lost: tuple[int, int] = (0, 0)) -> list[Line]:
        """Return the lines of what is kept of a stream, byte by byte; the bytes of `lost` are gone."""
        first, end = self.log.span(stream)
        kept = [b for at, b in enumerate(self.written[stream]) if first <= at < end and not lost[0] <= at < lost[1]]
        found, begun, data = [], 0, b""
        for byte, piece in kept:
            begun, data = begun or piece, data + bytes([byte])
            if data.endswith(b"\n"):
                text = data[:-2] if data.endswith(b"\r\n") else data[:-1]
                found.append(Line(begun, stream == "stderr", text.decode("utf-8", "replace")))
                begun, data = 0, b""
        return found + [Line(begun, stream == "stderr", data.decode("utf-8", "replace"))] * bool(data)


def reference(lines: list[Line], pattern: str | None, limit: int, offset: int, tail: bool) -> dict[str, Any]:
    """Return what the protocol says of these lines."""
    texts = [line.text for line in sorted(lines, key=lambda line: line[:2])
             if pattern is None or re.search(pattern, line.text)]
    total = len(texts)
    window = texts[max(total - offset - limit, 0):max(total - offset, 0)] if tail else texts[offset:offset + limit]
    return {"lines": window, "total_lines": total, "has_more": offset + len(window) < total}


def ask(log: OutputLog, stream: str, **what: Any) -> dict[str, Any]:
    """Ask as the core does, and return what the helper's answer says."""
    names = ["stdout", "stderr"] if stream == "both" else [stream]
    question = {"directory": log.directory, "streams": names,
                "most": MOST, "pattern_secs": 100.0, "life_secs": 100.0, "kind": "find", "filter": None, "limit": 1000,
                "offset": 0, "tail": False, **what}
    raw = query.answer(json.loads(json.dumps(question)))
    said: dict[str, Any] = json.loads(raw[1:])
    if raw[:1] == query.REFUSED:
        raise RequestError(said["error"], said["error_code"])
    return said


@pytest.fixture(autouse=True)
def no_alarm() -> Any:
    """Whatever a test does to the timer of this process, it does not outlive the test."""
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


ALPHABETS = [
    [b"a", b"b", b"ab", b"\n", b"\r\n", b"\r", "é".encode(), b"A", b"B", b" "],
    [b"a", b"\xc3", b"\xa9", b"\xff", b"\n", "é".encode(), b"\x00", "\u2028".encode(), b"\x85", b"\x0b"],
    [b"\n", b"\n", b"a"], [b"a", b"aa"], [b"ab\n", b"error: x\n", b"b\r\n"]]


def check(agent: Agent, rng: random.Random, lost: tuple[int, int] = (0, 0), asked: int = 12) -> None:
    """Ask random questions and compare."""
    for _ in range(asked):
        stream = rng.choice(["stdout", "stderr", "both", "both"])
        names = ("stdout", "stderr") if stream == "both" else (stream,)
        lines = [line for name in names for line in agent.lines(name, lost if name == "stdout" else (0, 0))]
        what: dict[str, Any] = {"limit": rng.choice([0, 1, 2, 7, 1000]), "tail": rng.random() < 0.5,
                                "offset": rng.choice([0, 0, 0, 1, 5, 50, 10 ** 6])}
        pattern = rng.choice(FILTERS)
        expected = reference(lines, pattern, **what)
        assert ask(agent.log, stream, filter=pattern, **what) == expected, (stream, pattern, what)


@pytest.mark.parametrize("piece", [1, 3, 16, 1024 * 1024])
def test_random_output_as_the_reference_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(query, "PIECE", piece)
    rng = random.Random(SEED + piece)
    for number in range(25):
        agent = Agent(tmp_path / str(number), rng)
        agent.write_some(rng.randrange(0, 25), rng.randrange(2, 20), rng.choice(ALPHABETS))
        if rng.random() < 0.5:
            agent.log.close()  # else the times of the last piece are not in the index
        check(agent, rng)


def test_beyond_the_cap_the_first_line_is_what_is_left_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "PIECE", 5000)
    rng = random.Random(SEED)
    agent = Agent(tmp_path, rng, cap=32 * 1024)
    agent.write_some(200, 900, [b"a", b"b", b"ab\n", "é\n".encode()])
    assert agent.log.span("stdout")[0] > 0
    check(agent, rng, asked=40)


def test_a_gap_in_the_middle_is_stepped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "PIECE", 3000)
    rng = random.Random(SEED)
    agent = Agent(tmp_path, rng)
    agent.write_some(60, 900, [b"a", b"b", b"ab\n", b"b\r\n"])
    segments = sorted(int(path.name.partition(".")[2]) for path in tmp_path.glob("stdout.*"))
    assert len(segments) > 4
    (tmp_path / f"stdout.{segments[2]:020d}").unlink()
    check(agent, rng, lost=(segments[2], segments[3]), asked=60)


def test_segments_that_go_while_they_are_listed_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(tmp_path, random.Random(SEED))
    for number in range(1000):
        agent.write("stdout", b"line %04d\n" % number)
    reading = OutputLog(str(tmp_path), 0)  # what follows it does not hear of
    segments = sorted(tmp_path.glob("stdout.*"))
    segments[0].unlink()
    stream = query.Stream(reading, "stdout", reading.span("stdout"))
    got = [line for block in stream.blocks(False) for line in block.text().splitlines()]
    assert got[-1] == "line 0999" and got[1:] == [f"line {n:04d}" for n in range(1001 - len(got), 1000)]
    real, gone = os.scandir, sorted(tmp_path.glob("stdout.*"))[0]

    def vanishing(directory: str) -> Any:
        with real(directory) as entries:
            listed = list(entries)
        gone.unlink()
        return contextlib.nullcontext(listed)
    monkeypatch.setattr(os, "scandir", vanishing)
    assert OutputLog(str(tmp_path), 0).span("stdout")[1] == 10_000


def test_what_is_written_meanwhile_is_not_part_of_it(tmp_path: Path) -> None:
    agent = Agent(tmp_path, random.Random(SEED))
    agent.write("stdout", b"one\ntwo")
    stream = query.kept(str(tmp_path), ["stdout"])["stdout"]
    agent.write("stdout", b" and more\nthree\n")
    assert [block.text() for block in stream.blocks(False)] == ["one\n", "two"] and stream.count() == 2


def test_the_index_is_read_after_the_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is not listed in one moment: what is written between is unknown to an index that was seen first."""
    agent, real = Agent(tmp_path, random.Random(SEED)), output.numbered_files
    agent.write("stdout", b"ready\n")
    agent.write("stderr", b"oh\n")

    def listed(directory: str) -> Iterator[Any]:
        yield from [entry for entry in real(directory) if entry[0] == "index"]
        for number in range(10):
            agent.write("stderr", b"%d\n" % (2 * number))
            agent.write("stdout", b"%d\n" % (2 * number + 1))
        yield from [entry for entry in real(directory) if entry[0] != "index"]
    monkeypatch.setattr(output, "numbered_files", listed)
    assert ask(agent.log, "both")["lines"] == ["ready", "oh", *map(str, range(20))]


def test_the_order_holds_for_what_is_not_in_the_index_yet(tmp_path: Path) -> None:
    """The time of a file is that of a clock that ticks slowly; it must not put the last piece before others."""
    now = time.time() + 5.0  # as if the file's time lagged by that
    log = OutputLog(str(tmp_path), 1 << 20, now=lambda: now)
    for number in range(10):
        now += 0.002
        log.append("stderr" if number % 2 else "stdout", b"%d\n" % number)
    assert ask(log, "both")["lines"] == list("0123456789")
    assert ask(log, "both", tail=True, limit=3)["lines"] == list("789")


def test_output_without_an_index_is_still_found(tmp_path: Path) -> None:
    agent = Agent(tmp_path, random.Random(SEED))
    for number in range(50):
        agent.write("stdout", b"out %d\n" % number)
        agent.write("stderr", b"err %d\n" % number)
    agent.log.close()
    for path in tmp_path.glob("index.*"):
        path.unlink()
    got = ask(agent.log, "both")["lines"]
    assert sorted(got) == sorted([f"{s} {n}" for s in ("out", "err") for n in range(50)])
    assert [line for line in got if line.startswith("out")] == [f"out {n}" for n in range(50)]


def test_no_output_at_all(tmp_path: Path) -> None:
    log = OutputLog(str(tmp_path / "nothing"), 1 << 20)
    for stream in ("stdout", "both"):
        for pattern in (None, "x"):
            nothing = {"lines": [], "total_lines": 0, "has_more": False}
            assert ask(log, stream, filter=pattern) == ask(log, stream, filter=pattern, tail=True) == nothing


def test_the_last_lines_of_each(tmp_path: Path) -> None:
    agent = Agent(tmp_path, random.Random(SEED))
    for number in range(20):
        agent.write("stdout", b"out %d\n" % number)
    agent.write("stderr", b"oh\nno")
    asked = {"kind": "last", "limit": 2, "tail": True}
    assert ask(agent.log, "both", **asked) == {
        "stdout": ["out 18", "out 19"], "stdout_lines": 20, "stderr": ["oh", "no"], "stderr_lines": 2}
    assert ask(agent.log, "stderr", **asked) == {
        "stdout": [], "stdout_lines": None, "stderr": ["oh", "no"], "stderr_lines": 2}


def test_what_does_not_fit_into_a_reply_is_refused_before_it_costs_memory(tmp_path: Path) -> None:
    agent = Agent(tmp_path, random.Random(SEED))
    agent.write("stdout", b"x" * 400 + b"\n" + b"\x01" * 400 + b"\n")
    for what in ({"most": 200}, {"most": 1000}):  # control characters grow in JSON
        with pytest.raises(RequestError, match="ask for fewer lines") as refused:
            ask(agent.log, "stdout", **what)
        assert refused.value.code == "message_too_large"
    assert ask(agent.log, "stdout", most=200, limit=0) == {"lines": [], "total_lines": 2, "has_more": True}


@pytest.mark.parametrize("pattern", [
    "(", "a{2,1}", "*", "[", "\\", "(?P<n>a)(?P<n>b)", "a{99999999999999}", "(?z)", "(?<=a+)b",
    "(" * 1500 + ")" * 1500, r"\1", "(?L)x"])
def test_what_is_no_pattern_is_a_sentence(tmp_path: Path, pattern: str) -> None:
    agent = Agent(tmp_path, random.Random(SEED))
    agent.write("stdout", b"x\n")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError):
        with pytest.raises(RequestError, match="^'.* is no") as refused:
            ask(agent.log, "stdout", filter=pattern)
        assert refused.value.code == "bad_request"
    else:  # a Python that can
        ask(agent.log, "stdout", filter=pattern)


def test_a_bad_pattern_is_shown_its_place(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a regular expression: .* at character 5"):
        ask(OutputLog(str(tmp_path), 0), "stdout", filter="abcde(")


# ---------------------------------------------------------------- words

@pytest.mark.parametrize("pattern, words, fold", [
    ("error", {"error"}, False), (r"\bfatal\b", {"fatal"}, False), ("error|warning", {"error", "warning"}, False),
    ("(?i)Panic", {"panic"}, True), ("(?i)error.*failed", {"failed"}, True), (r"code [1-9]\d*", {"code "}, False),
    ("a*", set(), False), ("[ab]c?", set(), False), ("(foo|ba?r)x", {"x"}, False), ("(?:abc){2,}", {"abc"}, False),
    ("(?:abc)?d", {"d"}, False), ("(?i)é", set(), True), ("(?i)stéph", {"st"}, True), ("x(?i:ABC)", {"abc"}, True),
    ("(?=ab)c", {"c"}, False), ("|".join("abcdefghi"), set(), False), ("", set(), False), (".", set(), False)])
def test_words_that_a_pattern_needs(pattern: str, words: set[str], fold: bool) -> None:
    """Should Python's parser change, this tells that searches have become slower; they would still be right."""
    found = literals(pattern)
    assert (set(found.words), found.fold) == (words, fold)
    assert found.exact == (pattern in ("error", "error|warning", "(?i)Panic"))


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """Return a valid pattern, mostly."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(["a", "b", "ab", "A", "é", "k", ".", "[ab]", "[^b]", r"\w", r"\b", "^", "$", "ſ", "K"])
    inner = [random_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return rng.choice(["".join(inner), "|".join(inner), f"({inner[0]})", f"(?:{inner[0]})+", f"(?:{inner[0]})?",
                       f"(?:{inner[0]}){{2,3}}", f"(?i:{inner[0]})", f"(?={inner[0]})", f"(?!{inner[0]})",
                       f"(?<!{inner[0]})", f"({inner[0]})\\1", f"(?:{inner[0]}|{''.join(inner)})"])


def test_no_match_lacks_its_words() -> None:
    rng = random.Random(SEED)
    held = 0
    for _ in range(4000):
        pattern = random_pattern(rng)
        if rng.random() < 0.3:
            pattern = "(?i)" + pattern
        try:
            search = re.compile(pattern).search
        except re.error:
            continue
        words, fold, exact = literals(pattern)
        held += bool(words)
        for _ in range(8):
            text = "".join(rng.choices("abAB kKéſK", k=rng.randrange(8)))
            there = any(word in (text.lower() if fold else text) for word in words)
            if words and (not fold or text.isascii()):
                assert there or not search(text), (pattern, text, words)
                assert not exact or bool(search(text)) == there, (pattern, text, words)
    assert held > 500
