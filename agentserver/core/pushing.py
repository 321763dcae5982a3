"""Output on its way to who listens: pushed from the files, as fast as it is taken.

Owns:    for each stream that somebody listens to, the offset up to which it was pushed.
Runs in: the core's thread, at the end of each turn, for a bounded time.
Unaware: of pipes and processes; it is told that a stream has grown or ended.

Nothing waits in memory: what was not pushed yet is in the file. So an agent is recorded at its own
speed, whoever listens, and a listener that is slower for a while is behind, not cut off. Only one
that is slower than another listener of the same stream loses something, or one that falls so far
behind that the oldest output is dropped. Both show in the offsets; and after so many messages that
some may have been dropped further on, the last offset is told once more when the stream is quiet.
"""
from __future__ import annotations

import time
from typing import Callable

from .feed import Feed
from .output import OutputLog, OutputRead
from .reactor import Reactor

PUSH_BYTES = 32 * 1024  # of a stream in one message: `pub_hwm` of them are what a listener that sleeps can cost
SLICE_SECS = 0.0005     # of a turn
QUIET_SECS = 0.2        # after the last of many messages


class _Stream:
    """Where the pushing of one stream stands."""

    __slots__ = ("agent_id", "count", "name", "over", "output", "shown")

    def __init__(self, agent_id: str, name: str, output: OutputLog, shown: int) -> None:
        self.agent_id, self.name, self.output, self.shown = agent_id, name, output, shown
        self.over = False   # its end is to be told
        self.count = 0      # of messages since it was quiet

    @property
    def end(self) -> int:
        return self.output.span(self.name)[1]


class Pushing:
    """See the module. `few` messages are never dropped further on."""

    def __init__(self, feed: Feed, reactor: Reactor, few: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._feed, self._reactor, self._few, self._clock = feed, reactor, few, clock
        self._streams: dict[str, _Stream] = {}
        self._due: dict[str, None] = {}  # topics with something to push, in the order of their turns

    # ------------------------------------------------------------ what happened

    def grown(self, agent_id: str, name: str, output: OutputLog, count: int) -> None:
        """The last `count` bytes of a stream are new."""
        if self._feed.anyone:
            self._listened(agent_id, name, output, count)

    def ended(self, agent_id: str, name: str, output: OutputLog) -> None:
        """Nothing more follows in a stream, for now: its agent may be started again."""
        stream = self._listened(agent_id, name, output, 0)
        if stream is not None:
            stream.over = True

    def _listened(self, agent_id: str, name: str, output: OutputLog, count: int) -> _Stream | None:
        """Return the stream, due to be pushed, if anybody listens to it."""
        topic = f"{agent_id}.{name}"
        if not self._feed.wanted(topic):
            self._forget(topic)
            return None
        stream = self._streams.get(topic)
        if stream is None:
            stream = self._streams[topic] = _Stream(agent_id, name, output, output.span(name)[1] - count)
        stream.over = False
        self._due[topic] = None
        return stream

    def _forget(self, topic: str) -> None:
        self._streams.pop(topic, None)
        self._due.pop(topic, None)

    def shown(self, agent_id: str, name: str, output: OutputLog) -> int:
        """Return the offset of the next byte of a stream that will be pushed."""
        stream = self._streams.get(f"{agent_id}.{name}")
        return output.span(name)[1] if stream is None else stream.shown

    def tidy(self) -> None:
        """Forget the streams that nobody listens to any more."""
        for topic in [topic for topic in self._streams if not self._feed.wanted(topic)]:
            self._forget(topic)

    # ------------------------------------------------------------ pushing

    @property
    def ready(self) -> bool:
        """Whether something is due that somebody would take now."""
        return any(self._taken(topic) for topic in self._due)

    def _taken(self, topic: str) -> bool:
        return any(listener.room for listener in self._feed.wanted(topic))

    def flush(self) -> None:
        """Push what is due, a piece of each stream in turn, for at most a slice."""
        if not self._due:
            return
        until = self._clock() + SLICE_SECS
        full = 0  # streams in a row that nobody would take now
        while full < len(self._due):
            topic = next(iter(self._due))
            del self._due[topic]
            if not self._feed.wanted(topic):
                self._forget(topic)
            elif not self._taken(topic):
                self._due[topic] = None
                full += 1
            else:
                full = 0
                if self._push(self._streams[topic], topic):
                    self._due[topic] = None  # behind the others
                if self._clock() >= until:
                    return

    def _push(self, stream: _Stream, topic: str) -> bool:
        """Push one piece; return whether there is more."""
        before, end = stream.shown, stream.end
        got = _read(stream, end)
        last = stream.over and got.next_offset >= end
        data = got.data if last else got.data[:whole_characters(got.data)]
        stream.shown = got.offset + len(data)
        if last or stream.shown > before:  # also without data: bytes that could not be recorded
            self._feed.output(stream.agent_id, stream.name, data, got.offset, last)
            stream.count += 1
        if got.next_offset < end:
            return True
        if stream.count > self._few:
            self._mark_later(topic, stream)
        elif last:
            self._forget(topic)
        return False

    def _mark_later(self, topic: str, stream: _Stream) -> None:
        stream.count = 0
        at = (stream.shown, stream.over)

        def mark() -> None:
            """Say again where the stream stands, if nothing else has said more."""
            if self._streams.get(topic) is stream and (stream.shown, stream.over) == at:
                self._feed.output(stream.agent_id, stream.name, b"", *at)
                if stream.over:
                    self._forget(topic)
        self._reactor.after(QUIET_SECS, mark)


def _read(stream: _Stream, end: int) -> OutputRead:
    """Read the next piece; nothing if it cannot be read for now, since this is but a hint."""
    try:
        return stream.output.read(stream.name, stream.shown, min(end - stream.shown, PUSH_BYTES))
    except OSError:
        return OutputRead(b"", end, end, stream.shown, 0)


def whole_characters(data: bytes) -> int:
    """Return how many bytes of `data` do not end within a UTF-8 character (RFC 3629); all if none would be left."""
    for back in range(1, min(3, len(data) - 1) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needs = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if needs > back else len(data)
    return len(data)
