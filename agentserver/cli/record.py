"""`record`: what an agent wrote, with the times, as a recording.

Owns:    fetching output, its times and the sizes of a terminal, and bringing all of it into one order.
Runs in: the main thread of a command.
Unaware: of what a recording looks like (recording.py).

It is made from what is stored, so it can be made long after the agent has ended. With --follow the follower only
tells when there is more; what is written then is what is stored, with its true times.
"""
from __future__ import annotations

import heapq
import os
import shlex
from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Tuple

from ..errors import RequestError
from ..paths import expanded
from ..results import AgentInfo
from ..wire import Json, from_rfc3339
from . import connect, exits, out, pieces
from .recording import ASCIICAST, OURS, Cast, Lines, Recording

if TYPE_CHECKING:
    from ..client import Agent

CHUNK = 256 * 1024
_DEFAULT_SIZE = {"rows": 24, "cols": 80}
_TERM = "xterm-256color"     # of an agent on a terminal that was given no other
STREAMS = ("stdout", "stderr")
#: when something happened, and what writes it down
_News = Tuple[str, Callable[[Recording, str], List[str]]]


def record(given: Namespace) -> int:
    """Write down what an agent wrote; with --follow until it has ended."""
    with connect.patient(given) as client:
        agent = client.agent(given.agents[0])
        inspected = agent.inspect()
        info, spec = AgentInfo.of(inspected["agent_info"]), inspected.get("spec") or {}
        started = _started(info, inspected.get("attempts") or [])
        terminal = info.stdin == "pty"
        recording: Recording = Cast(started) if terminal else Lines(started)
        with _target(given.output, 0 if given.follow else CHUNK) as write:
            write(recording.header(_cast_facts(info, spec, started) if terminal else _line_facts(info, started)))
            for at, tell in _all(agent, terminal, given):
                write(tell(recording, at))
            write([*recording.rest(*STREAMS), *_end(recording, agent.info())])
    return exits.OK


@contextmanager
def _target(path: str | None, held: int) -> Iterator[Callable[[List[str]], None]]:
    """Yield what writes lines to a file or to stdout, of which it holds back no more than `held` bytes."""
    fd = 1 if path in (None, "-") else _open(str(path))
    waiting = bytearray()

    def flush() -> None:
        data = bytes(waiting)
        waiting.clear()
        if fd == 1:
            return out.write(1, data)
        try:
            out.put(fd, data)
        except OSError as e:
            raise RequestError(f"{path} cannot be written: {e.strerror}", "internal") from None

    def write(lines: List[str]) -> None:
        waiting.extend("".join(line + "\n" for line in lines).encode("ascii"))
        if len(waiting) > held:
            flush()
    try:
        yield write
    finally:
        try:
            flush()
        finally:
            if fd != 1:
                os.close(fd)


def _open(path: str) -> int:
    try:
        return os.open(expanded(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise RequestError(f"{path} cannot be written: {e.strerror}") from None


def _end(recording: Recording, info: AgentInfo) -> List[str]:
    return recording.ended(info.exit.at, info.exit.raw) if info.finished and info.exit else []


# ---------------------------------------------------------------- what a recording begins with

def _started(info: AgentInfo, attempts: List[Json]) -> str:
    """Return when the first attempt began: from then on seconds are counted."""
    stamps = [str(attempt.get("started_at")) for attempt in attempts if attempt.get("started_at")]
    return min([*stamps, *([info.started_at] if info.started_at else [])], default=info.created_at)


def _cast_facts(info: AgentInfo, spec: Mapping[str, Any], started: str) -> Json:
    size = spec.get("pty") or _DEFAULT_SIZE
    facts: Json = {"version": ASCIICAST, "width": size["cols"], "height": size["rows"],
                   "timestamp": int(from_rfc3339(started)), "command": shlex.join(info.command)}
    if info.name:
        facts["title"] = info.name
    if "TERM" not in (spec.get("environment") or {}):
        facts["env"] = {"TERM": _TERM}
    return facts


def _line_facts(info: AgentInfo, started: str) -> Json:
    return {OURS: 1, "started_at": started, "agent_id": info.id, "name": info.name, "command": info.command}


# ---------------------------------------------------------------- what happened, in order

def _all(agent: Agent, terminal: bool, given: Namespace) -> Iterator[_News]:
    stored = _Stored(agent, terminal)
    yield from stored.more()
    if given.follow:
        for _id, stream, what in agent.client.follow(agent.id, since=stored.reached, timeout=connect.left(given)):
            if what.next_offset > stored.reached[stream]:
                yield from stored.more()
        agent.client.wait(agent.id, timeout=connect.left(given))
        yield from stored.more()


class _Stored:
    """What is stored of an agent, and how far it was read."""

    def __init__(self, agent: Agent, terminal: bool) -> None:
        self._agent, self._terminal = agent, terminal
        self._sequence = 0
        self.reached: Dict[str, int] = dict.fromkeys(STREAMS, 0)

    def more(self) -> Iterator[_News]:
        """Yield what has come since the last time, of both streams and of the terminal, by time."""
        ends = self._agent.info().output
        sources = [list(self._resizes())] if self._terminal else []
        streams = [self._stream(name, ends[name].end_offset) for name in self.reached if name in ends]
        yield from heapq.merge(*sources, *streams, key=lambda news: news[0])

    def _stream(self, name: str, end: int) -> Iterator[_News]:
        while self.reached[name] < end:
            at = self.reached[name]
            chunk = self._agent.read(name, offset=at, max_bytes=min(end - at, CHUNK), times=True)
            if not chunk.next_offset > at:
                return
            self.reached[name] = chunk.next_offset
            cut = list(pieces.of_chunk(self._agent.id, name, chunk))
            if chunk.dropped:
                yield cut[0].time if cut else "", _gap(name, chunk.dropped)
            for piece in cut:
                yield piece.time, _output(name, piece.data)

    def _resizes(self) -> Iterator[_News]:
        more = True
        while more:
            page = self._agent.client.events(self._sequence, agent=self._agent.id)
            self._sequence, more = page.next, page.more
            for event in page.events:
                size = (event.get("data") or {}).get("pty")
                if size:
                    yield str(event["timestamp"]), _resized(int(size["rows"]), int(size["cols"]))


def _output(stream: str, data: bytes) -> Callable[[Recording, str], List[str]]:
    return lambda recording, at: recording.output(at, stream, data)


def _gap(stream: str, size: int) -> Callable[[Recording, str], List[str]]:
    return lambda recording, at: recording.gap(at, stream, size)


def _resized(rows: int, cols: int) -> Callable[[Recording, str], List[str]]:
    return lambda recording, at: recording.resized(at, rows, cols)


COMMANDS: dict[str, Callable[[Namespace], int]] = {"record": record}
