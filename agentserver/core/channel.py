"""The line between the keeper and a process it started.

Owns:    JSON objects, one a line, with descriptors beside them (SCM_RIGHTS, unix(7)), over a socket pair
         that the child finds as its descriptor 0.
Runs in: keeper, core and shell.
Unaware: of what is said. Both ends are ours, so a line that is no JSON is a bug and may raise.

Sending never waits: what a stopped or dead receiver does not take is queued, with copies of its
descriptors, until `flush`. Descriptors that are in the socket outlive their sender.
"""
from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
from array import array
from collections import deque
from typing import Any, Deque, Dict, Sequence

Json = Dict[str, Any]

LAST_SECS = 5.0  # for the other end to take the last words
_FDS_MOST = 16  # in one message; SCM_MAX_FD is 253
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Channel:
    """One end. `receive` returns what is there; `None` in it says that the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._fds: Deque[int] = deque()  # received, and not yet claimed by a whole line
        self._queue: Deque[tuple[bytes, list[int]]] = deque()

    def fileno(self) -> int:
        """For a selector."""
        return self._sock.fileno()

    # ------------------------------------------------------------ sending

    def send(self, word: Json, fds: Sequence[int] = ()) -> None:
        """Say something, with copies of `fds`; never waits."""
        data = json.dumps({**word, "fds": len(fds)} if fds else word).encode() + b"\n"
        self._queue.append((data, [os.dup(fd) for fd in fds]))
        self.flush()

    @property
    def quiet(self) -> bool:
        """Whether nothing is half sent or half received."""
        return not (self._queue or self._buffer or self._fds)

    def flush(self) -> None:
        """Send what waits, as far as it goes. Descriptors travel with the first byte of their line."""
        while self._queue:
            data, fds = self._queue[0]
            try:
                sent = self._sock.sendmsg([data], rights(fds), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno == errno.ETOOMANYREFS:  # of all our user's descriptors too many are under way (unix(7))
                    return
                sent = len(data)  # nobody is there; `receive` tells
            for fd in fds:
                os.close(fd)
            if sent < len(data):
                self._queue[0] = (data[sent:], [])
            else:
                self._queue.popleft()

    @property
    def unsent(self) -> bool:
        """Whether `flush` has to be called when the descriptor is writable."""
        return bool(self._queue)

    def _deliver(self, secs: float | None) -> bool:
        """Send what waits once there is room, or after so many seconds; return whether there is something to read."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | select.POLLOUT)
        told = dict(poll.poll(None if secs is None else secs * 1000))
        self.flush()
        return bool(told.get(self.fileno(), 0) & ~select.POLLOUT)

    def last(self, word: Json) -> None:
        """Say a last thing, and wait for all to be on its way: what is queued here dies with us."""
        self.send(word)
        until = time.monotonic() + LAST_SECS
        while self._queue and time.monotonic() < until:
            self._deliver(LAST_SECS / 100)

    def fail(self, sentence: str) -> int:
        """Say why this process gives up; return its exit code."""
        self.last({"failed": sentence})
        return 1

    def finish(self, word: Json) -> None:
        """Say a last thing and hang up."""
        self.send(word)
        self.close()

    # ------------------------------------------------------------ receiving

    def next(self) -> Json:
        """Wait for the next word; raise `EOFError` if there is none. Only for the beginning of a process."""
        while b"\n" not in self._buffer:
            if self._queue and not self._deliver(None):
                continue
            if not self._read(0):
                raise EOFError("the other end of the channel is gone")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return self._word(line)

    def pending(self) -> list[Json]:
        """Return what came together with the last `next`; `fileno` does not tell of it."""
        *lines, self._buffer = self._buffer.split(b"\n")
        return [self._word(line) for line in lines]

    def receive(self) -> list[Json | None]:
        """Return what has arrived; call it when `fileno` is readable."""
        try:
            over = not self._read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        words: list[Json | None] = list(self.pending())
        return [*words, None] if over else words

    def _read(self, flags: int) -> bool:
        try:
            data, fds, _flags, _address = socket.recv_fds(self._sock, 65536, _FDS_MOST, flags | _CLOEXEC)
        except BlockingIOError:
            raise
        except OSError:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        self._fds.extend(fds)
        self._buffer += data
        return bool(data)

    def _word(self, line: bytes) -> Json:
        word = dict(json.loads(line))
        if "fds" in word:
            word["fds"] = [self._fds.popleft() for _ in range(word["fds"])]
        return word

    def close(self) -> None:
        """Hang up."""
        for _data, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        self._sock.close()


def rights(fds: Sequence[int]) -> list[tuple[int, int, array[int]]]:
    """Return what `sendmsg` needs to pass descriptors on; socket.send_fds would ignore the flag not to wait."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
