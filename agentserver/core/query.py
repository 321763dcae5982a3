"""A question about the output of one agent, answered by a process of its own, which a timer of its own ends.

Owns:    the lines of stored output, from either end; finding those that match; the bounds of this process.
Runs in: the `_query` process, a child of the core (queries.py) that answers one question and ends.
Unaware: of agents, requests and other questions.

A line is what stands between two newlines (\\n; a \\r just before it belongs to it), as text, with U+FFFD for what is
not UTF-8. The kept bytes of a stream are taken as one: what a gap or the cap has cost is simply not there. Output is
read piece by piece, so that memory does not grow with it, only with its longest line.

SIGALRM is left at its default action, so that no pattern can keep the timer from ending us, be the core dead or
stopped. While nothing is matched the timer only bounds our life.
"""
from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import select
import signal
import sys
import time
from bisect import bisect_right
from heapq import merge
from itertools import accumulate, chain, compress, islice, repeat
from operator import contains, itemgetter
from typing import Any, Iterable, Iterator, NamedTuple, Sequence

from ..errors import RequestError
from .output import OutputLog
from .process import confine

Json = dict[str, Any]

PIECE = 1024 * 1024  # bytes read at once
MEMORY_BYTES = 1024 * 1024 * 1024
LEAST_SECS = 1e-6    # to setitimer(2) 0 means never
#: what the answer begins with
FOUND, REFUSED = b"+", b"-"


class Timer:
    """The one timer. Entered while a pattern is at work, it runs on what is left of the pattern's time."""

    def __init__(self, pattern_secs: float, life_secs: float) -> None:
        self._left, self._until = pattern_secs, time.monotonic() + life_secs
        self._live()

    def _live(self) -> float:
        return signal.setitimer(signal.ITIMER_REAL, max(self._until - time.monotonic(), LEAST_SECS))[0]

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._left)

    def __exit__(self, *_exc: object) -> None:
        self._left = max(self._live(), LEAST_SECS)


# ---------------------------------------------------------------- the lines of a stream

class Block(NamedTuple):
    """Whole lines, of which the first begins at `offset`. Where a line spans a gap it is alone."""

    offset: int
    data: bytes

    def text(self) -> str:
        """Return the lines as text, each but an unfinished one with its newline."""
        text = self.data.decode("utf-8", "replace")
        return text.replace("\r\n", "\n") if b"\r" in self.data else text  # one byte is found much faster than two

    def starts(self) -> list[int]:
        """Return the offset of each line."""
        return list(accumulate((len(line) + 1 for line in self.data.split(b"\n")), initial=self.offset))


class Stream:
    """What is kept of one stream, of a span; what is written meanwhile is not part of it."""

    def __init__(self, log: OutputLog, name: str, span: tuple[int, int]) -> None:
        self._log, self._name, (self._first, self._end) = log, name, span

    def blocks(self, backwards: bool) -> Iterator[Block]:
        """Yield all lines, a bounded number at once if they are not long; backwards the last block comes first."""
        return self._backwards() if backwards else self._forwards()

    def count(self) -> int:
        """Return the number of lines."""
        newlines, last = 0, b"\n"
        for _at, data in self._pieces(self._first, self._end):
            newlines += data.count(b"\n")
            last = data[-1:]
        return newlines + (last != b"\n")

    def times(self, block: Block, numbers: Iterable[int]) -> Iterator[float]:
        """Yield the times at which these lines of a block were begun."""
        times = self._log.times(self._name, block.offset, block.offset + len(block.data))
        ends, starts = [end for _time, end in times], block.starts()
        for number in numbers:
            yield times[min(bisect_right(ends, starts[number]), len(ends) - 1)][0]

    def _pieces(self, at: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of what is there; a gap is stepped over."""
        while at < end:
            got = self._log.read(self._name, at, min(PIECE, end - at))
            data = got.data[:max(end - got.offset, 0)]
            if not data:
                return
            yield got.offset, data
            at = got.next_offset

    def _forwards(self) -> Iterator[Block]:
        held: list[bytes] = []  # of a line whose end has not come
        begun = self._first
        for at, data in self._pieces(self._first, self._end):
            cut = 0
            if held:
                cut = data.find(b"\n") + 1
                held.append(data[:cut] if cut else data)
                if not cut:
                    continue
                yield Block(begun, b"".join(held))
                held = []
            last = data.rfind(b"\n") + 1
            if last > cut:
                yield Block(at + cut, data[cut:last])
            if last < len(data):
                held, begun = [data[last:]], at + last
        if held:
            yield Block(begun, b"".join(held))

    def _backwards(self) -> Iterator[Block]:
        held: list[bytes] = []  # of a line whose beginning has not come, the last bytes first
        begun = self._end
        for at, data in self._pieces_backwards():
            last = data.rfind(b"\n") + 1
            if last < len(data):
                held.append(data[last:])
                begun = at + last
            if not last:
                continue
            if held:
                yield Block(begun, b"".join(reversed(held)))
            cut = data.find(b"\n") + 1
            if last > cut:
                yield Block(at + cut, data[cut:last])
            held, begun = [data[:cut]], at
        if held:
            yield Block(begun, b"".join(reversed(held)))

    def _pieces_backwards(self) -> Iterator[tuple[int, bytes]]:
        end = self._end
        while end > self._first:
            lower = max(self._first, end - PIECE)
            yield from reversed(list(self._pieces(lower, end)))
            end = lower


# ---------------------------------------------------------------- those that match

class Everything:
    """No filter: every line matches."""

    def matches(self, block: Block) -> tuple[list[str], Sequence[int]]:
        """Return the lines of a block, and which of them match."""
        lines = _lines(block.text())
        return lines, range(len(lines))


class Filter:
    """A regular expression; all that it does runs against the timer."""

    def __init__(self, pattern: str, timer: Timer) -> None:
        import warnings

        from .literals import literals
        self._timer = timer
        warnings.simplefilter("ignore")  # of patterns whose meaning may change
        with timer:
            try:
                self._search = re.compile(pattern).search
                self._words, self._fold, self._exact = literals(pattern)
            except re.error as e:
                where = "" if e.pos is None else f" at character {e.pos}"
                raise RequestError(f"{pattern[:60]!r} is not a regular expression: {e.msg}{where}") from None
            except (OverflowError, ValueError, RecursionError, MemoryError, RuntimeError) as e:
                raise RequestError(f"{pattern[:60]!r} is no regular expression that can be worked with: "
                                   f"{e or 'it takes too much memory'}") from None
        self._raw_words = [word.encode("utf-8") for word in self._words]

    def matches(self, block: Block) -> tuple[list[str], Sequence[int]]:
        """Return the lines of a block, and which of them match; no lines where none can."""
        if not self._possible(block.data):
            return [], ()
        text = block.text()
        lines = _lines(text)
        candidates = self._candidates(lines, text)
        if self._exact and not isinstance(candidates, range):
            return lines, candidates
        chosen = lines if len(candidates) == len(lines) else [lines[at] for at in candidates]
        with self._timer:
            try:
                return lines, list(compress(candidates, map(self._search, chosen)))
            except (MemoryError, RecursionError, RuntimeError):
                raise RequestError(f"the pattern needs more memory than the {MEMORY_BYTES // 2 ** 20} MiB that a "
                                   "search may have; narrow it") from None

    def _possible(self, data: bytes) -> bool:
        """Whether there can be a match at all, before anything dear is done."""
        if not self._words or self._fold and not data.isascii():
            return True
        folded = data.lower() if self._fold else data
        return any(word in folded for word in self._raw_words)

    def _candidates(self, lines: list[str], text: str) -> Sequence[int]:
        """Return which lines can match."""
        if not self._words or self._fold and not text.isascii():
            return range(len(lines))
        return _with_words(_lines(text.lower()) if self._fold else lines, self._words)


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _with_words(lines: list[str], words: Iterable[str]) -> list[int]:
    """Return which lines hold one of the words."""
    numbers = range(len(lines))
    found = [compress(numbers, map(contains, lines, repeat(word))) for word in words]
    return list(found[0]) if len(found) == 1 else sorted(set(chain.from_iterable(found)))


class Side:
    """The matching lines of one stream, in order or backwards, and how many there are."""

    def __init__(self, stream: Stream, sought: Everything | Filter, backwards: bool) -> None:
        self._stream, self._sought, self._backwards = stream, sought, backwards
        self._blocks, self._count = stream.blocks(backwards), 0

    def hits(self) -> Iterator[list[str]]:
        """Yield the matching lines of each block."""
        for _block, lines, numbers in self._matches():
            yield [lines[at] for at in numbers]

    def timed(self) -> Iterator[tuple[float, str]]:
        """Yield each matching line with its time."""
        for block, lines, numbers in self._matches():
            if numbers:
                yield from zip(self._stream.times(block, numbers), map(lines.__getitem__, numbers))

    def total(self) -> int:
        """Return the number of matching lines; afterwards there are no more hits."""
        if isinstance(self._sought, Everything):
            return self._stream.count()
        for _match in self._matches():
            pass
        return self._count

    def _matches(self) -> Iterator[tuple[Block, list[str], Sequence[int]]]:
        for block in self._blocks:
            lines, numbers = self._sought.matches(block)
            self._count += len(numbers)
            yield block, lines, numbers[::-1] if self._backwards else numbers


# ---------------------------------------------------------------- questions

def find(streams: Sequence[Stream], question: Json, timer: Timer) -> Json:
    """Return `lines`, `total_lines` and `has_more` of streams, merged by time."""
    tail, limit, offset = bool(question["tail"]), question["limit"], question["offset"]
    sought = Everything() if question["filter"] is None else Filter(question["filter"], timer)
    sides = [Side(stream, sought, tail) for stream in streams]
    lines: Iterator[str] = chain.from_iterable(sides[0].hits())
    if len(sides) > 1:  # of lines with the same time those of stdout come first, also where the order is turned
        both = merge(*(side.timed() for side in (sides[::-1] if tail else sides)), key=itemgetter(0), reverse=tail)
        lines = map(itemgetter(1), both)
    taken = _bounded(islice(lines, offset, min(offset + limit, sys.maxsize)), question["most"])
    total = max(sum(side.total() for side in sides), offset + len(taken) if taken else 0)  # some may be gone by now
    return {"lines": taken[::-1] if tail else taken, "total_lines": total, "has_more": offset + len(taken) < total}


def _bounded(lines: Iterable[str], most: int) -> list[str]:
    """Return the lines, or refuse what cannot fit into a reply, before it costs memory."""
    taken, size = [], 0
    for line in lines:
        size += len(line) + 3  # quotes and a comma
        if size > most:
            raise too_much(most)
        taken.append(line)
    return taken


def too_much(most: int) -> RequestError:
    """Return what is said to who asks for more than a reply can hold."""
    return RequestError(f"the lines asked for do not fit into a reply, which may have {most} bytes; ask for fewer "
                        "lines, or read long ones with read_stdout or read_stderr", "message_too_large")


def last(streams: dict[str, Stream], question: Json, timer: Timer) -> Json:
    """Return the last lines of each stream that was asked for, and how many lines it has."""
    answer: Json = {}
    for name in ("stdout", "stderr"):
        nothing: Json = {"lines": [], "total_lines": None}
        found = find([streams[name]], question, timer) if name in streams else nothing
        answer[name], answer[f"{name}_lines"] = found["lines"], found["total_lines"]
    return answer


def kept(directory: str, names: Iterable[str]) -> dict[str, Stream]:
    """Return what is kept now of an agent's streams. The index is looked up after the spans, so that it has the times
    of all that is in them, but for the piece that was written last."""
    spans, log = OutputLog(directory, 0), OutputLog(directory, 0)
    return {name: Stream(log, name, spans.span(name)) for name in names}


def answer(question: Json) -> bytes:
    """Return the answer as JSON after its sign."""
    timer = Timer(question["pattern_secs"], question["life_secs"])
    try:
        streams = kept(question["directory"], question["streams"])
        each = question["kind"] == "last"
        found = last(streams, question, timer) if each else find(list(streams.values()), question, timer)
        raw = _encoded(found)
        if len(raw) > question["most"]:
            raise too_much(question["most"])
        return FOUND + raw
    except RequestError as e:
        sentence, code = str(e), e.code
    except OSError as e:
        sentence, code = f"the output cannot be read: {e.strerror}", "unavailable"
    except MemoryError:
        sentence, code = (f"a search may have {MEMORY_BYTES // 2 ** 20} MiB of memory, and a line of this output is "
                          "too long for that; read it with read_stdout or read_stderr"), "bad_request"
    return REFUSED + _encoded({"error": sentence, "error_code": code})


def _encoded(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


# ---------------------------------------------------------------- the process

def _end_with_asker() -> None:
    """Let the kernel end us (SIGIO; fcntl(2), O_ASYNC) when the other end of our socket is closed: the core has died,
    or nobody wants the answer any more."""
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # closed before
        os._exit(1)


def _send(data: bytes) -> None:
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) & ~os.O_ASYNC)  # it would tell of room to write, too
    left = memoryview(data)
    while left:
        left = left[os.write(0, left):]


def _question() -> Json:
    raw = b""
    while not raw.endswith(b"\n"):
        data = os.read(0, 65536)
        if not data:
            os._exit(1)
        raw += data
    return dict(json.loads(raw))


def main() -> int:
    """Answer the question that comes on descriptor 0, a socket."""
    code = 1
    try:
        confine(MEMORY_BYTES)
        gc.disable()
        question = _question()
        _end_with_asker()
        _send(answer(question))
        code = 0
    except BrokenPipeError:
        pass
    os._exit(code)  # nothing is to be written or freed; a reader waits for our end
