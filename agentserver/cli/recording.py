"""Recordings: what an agent wrote, with the times, as lines of a file.

Owns:    the two forms, as they are written and as they are read (docs/recording.md describes them).
Runs in: any thread; it is pure: lines in, lines out.
Unaware: of agents, files and terminals.

A terminal's is asciicast version 2, which other programs play, too. A pipe's is of our own: both streams, and every
byte. Both are a line with facts, then a line for each event: [seconds, kind, data].
"""
from __future__ import annotations

import json
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from ..errors import RequestError
from ..wire import Json, encode_text, from_rfc3339, wire_bytes, wire_text

OURS = "agentserver_recording"
ASCIICAST = 2
LONGEST_LINE = 16 * 1024 * 1024


class Event(NamedTuple):
    """What a player has to do with: bytes of a stream (`stdout` or `stderr`), so long after the beginning."""

    secs: float
    stream: str
    data: bytes


# ---------------------------------------------------------------- writing

class Recording:
    """The lines of a recording, in the order in which things happened; each method returns none or some of them."""

    def __init__(self, started_at: str) -> None:
        self._start = from_rfc3339(started_at)
        self._last = 0.0
        self._halves: Dict[str, bytes] = {}   # of a character whose end has not come, by stream

    def header(self, facts: Json) -> List[str]:
        """Begin."""
        return [encode_text(facts)]

    def output(self, at: str, stream: str, data: bytes) -> List[str]:
        """Some bytes were written. A character is kept whole, and has the time of its end."""
        secs = self._secs(at)
        data = self._halves.pop(stream, b"") + data
        end = whole(data)
        if end < len(data):
            self._halves[stream] = data[end:]
        return self._output(secs, stream, data[:end]) if end else []

    def gap(self, at: str, stream: str, size: int) -> List[str]:
        """Some bytes are missing."""
        return [*self.rest(stream), self._line(self._secs(at), *self._gap(stream, size))]

    def resized(self, at: str, rows: int, cols: int) -> List[str]:
        """The terminal has another size."""
        return []

    def ended(self, at: str, record: Json) -> List[str]:
        """The agent has ended, and this is its exit record."""
        return []

    def rest(self, *streams: str) -> List[str]:
        """No more comes of the characters that were begun."""
        halves = [(stream, self._halves.pop(stream, b"")) for stream in streams]
        return [line for stream, half in halves if half for line in self._output(self._last, stream, half)]

    def _secs(self, at: str) -> float:
        """Return a time as seconds since the start; clocks may be set back, recordings never go back."""
        if at:
            self._last = max(self._last, round(from_rfc3339(at) - self._start, 6))
        return self._last

    def _line(self, *event: Any) -> str:
        return encode_text(list(event))

    def _output(self, secs: float, stream: str, data: bytes) -> List[str]:
        raise NotImplementedError

    def _gap(self, stream: str, size: int) -> Tuple[str, Any]:
        raise NotImplementedError


class Cast(Recording):
    """Asciicast version 2. What is no UTF-8 is replaced, because it knows only text."""

    def _output(self, secs: float, stream: str, data: bytes) -> List[str]:
        return [self._line(secs, "o", data.decode("utf-8", "replace"))]

    def _gap(self, stream: str, size: int) -> Tuple[str, Any]:
        return "m", f"{size} bytes are missing here"

    def resized(self, at: str, rows: int, cols: int) -> List[str]:
        """The terminal has another size."""
        return [self._line(self._secs(at), "r", f"{cols}x{rows}")]


class Lines(Recording):
    """Our own form: every byte of both streams, gaps, and the end."""

    def _output(self, secs: float, stream: str, data: bytes) -> List[str]:
        text, encoding = wire_text(data)
        return [self._line(secs, stream, text) if encoding == "utf-8" else self._line(secs, stream, text, encoding)]

    def _gap(self, stream: str, size: int) -> Tuple[str, Any]:
        return "gap", {"stream": stream, "bytes": size}

    def ended(self, at: str, record: Json) -> List[str]:
        """The agent has ended, and this is its exit record."""
        return [self._line(self._secs(at), "exit", record)]


def whole(data: bytes) -> int:
    """Return how many bytes there are without the character that is begun at the end, if one is (RFC 3629)."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 2 if 0xC2 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 4 if 0xF0 <= byte < 0xF5 else 1
            return len(data) - back if needed > back else len(data)
    return len(data)


# ---------------------------------------------------------------- reading

class Player:
    """A recording as it is read, line by line; wrong lines raise `RequestError` with the place."""

    def __init__(self, name: str, first: bytes) -> None:
        self._name, self._number = name, 0
        header = self._parsed(first)
        self.cast = isinstance(header, dict) and header.get("version") == ASCIICAST
        if not (self.cast or isinstance(header, dict) and header.get(OURS) == 1):
            raise self._wrong(f"this is not a recording of agentserver or an asciicast of version {ASCIICAST}")
        self.size = _size(header) if self.cast else None
        #: the longest pause that whoever made it wants to be shown
        self.max_idle = _number(header.get("idle_time_limit"))

    def event(self, line: bytes) -> Optional[Event]:
        """Return what there is to show; `None` for what a player need not know."""
        value = self._parsed(line)
        if not (isinstance(value, list) and len(value) >= 3 and isinstance(value[1], str)):
            raise self._wrong("an event is a list [seconds, kind, data]")
        secs, kind, data = _number(value[0]), value[1], value[2]
        stream = {"o": "stdout"}.get(kind) if self.cast else kind if kind in ("stdout", "stderr") else None
        if secs is None:
            raise self._wrong("an event begins with the seconds since the start")
        if stream is None:
            return None
        try:
            return Event(secs, stream, wire_bytes(data, value[3] if value[3:] and not self.cast else "utf-8"))
        except (ValueError, AttributeError, TypeError):
            raise self._wrong(f"its data is not the text that {kind!r} needs") from None

    def _parsed(self, line: bytes) -> Any:
        self._number += 1
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise self._wrong("this is not JSON") from None

    def _wrong(self, what: str) -> RequestError:
        return RequestError(f"{self._name}, line {self._number}: {what}")


def _number(value: Any) -> Optional[float]:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12
    return float(value) if good else None


def _size(header: Json) -> Optional[Tuple[int, int]]:
    """Return rows and columns."""
    rows, cols = header.get("height"), header.get("width")
    return (rows, cols) if isinstance(rows, int) and isinstance(cols, int) else None


def events(player: Player, lines: Iterator[bytes]) -> Iterator[Event]:
    """Yield what there is to show."""
    for line in lines:
        event = player.event(line) if line.strip() else None
        if event is not None:
            yield event
