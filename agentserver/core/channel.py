"""The line between the keeper and a process it started.

Owns:    JSON objects, one a line, with descriptors beside them (SCM_RIGHTS, unix(7)), over a socket pair
         that the child finds as its descriptor 0.
Runs in: keeper, core and shell.
Unaware: of what is said. Both ends are ours, so a line that is no JSON is a bug and may raise.

Sending never waits: what a stopped or dead receiver does not take is queued, with copies of its
descriptors, until `flush`. Receiving never waits either, but in `next`. So two ends that both have more to say than the
socket holds cannot wait for each other. (`socket.send_fds` and `recv_fds` ignore their flags and are not used.)
Descriptors that are in the socket outlive their sender.

A receiver that has no room for descriptors (EMFILE) loses them: recvmsg(2) sets MSG_CTRUNC. Then those of that line are
`LOST`, all that follow are what they should be.
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
from typing import Any, Deque, Dict, Iterator, List, Sequence, Tuple

Json = Dict[str, Any]
_Message = Tuple[bytes, List[int]]  # what is left of a line, and copies of the descriptors that go with its first byte

LAST_SECS = 5.0  # for the other end to take the last words
LOST = -1        # stands for a descriptor that was sent and for which the receiver had no room
_FDS_MOST = 253  # in one message: SCM_MAX_FD of the kernel
_PIECE = 64 * 1024  # bytes that are received at once
_ROOM = socket.CMSG_SPACE(_FDS_MOST * array("i").itemsize)
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Channel:
    """One end. `receive` returns what is there; `None` in it says that the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self._fds: Deque[int] = deque()  # received, and not yet claimed by a whole line; after what was cut off, LOST
        self._queue: Deque[_Message | Iterator[_Message]] = deque()

    def fileno(self) -> int:
        """For a selector."""
        return self._sock.fileno()

    # ------------------------------------------------------------ sending

    def send(self, word: Json, fds: Sequence[int] = ()) -> None:
        """Say something, with copies of `fds`; never waits."""
        data = _line(word, fds)
        done = 0 if self._queue else self._try(data, fds)
        if done < len(data):
            self._queue.append((data[done:], [] if done else [os.dup(fd) for fd in fds]))
            self.flush()

    def send_each(self, words: Iterator[tuple[Json, Sequence[int]]]) -> None:
        """Say one thing after another, each made when there is room for it: so thousands of descriptors are not copied
        into the queue."""
        self._queue.append((_line(word, fds), [os.dup(fd) for fd in fds]) for word, fds in words)
        self.flush()

    @property
    def quiet(self) -> bool:
        """Whether nothing is half sent or half received."""
        return not (self._queue or self._buffer or self._fds)

    def flush(self) -> None:
        """Send what waits, as far as it goes."""
        while self._queue:
            waiting = self._queue[0]
            if not isinstance(waiting, tuple):
                made = next(waiting, None)
                if made is None:
                    self._queue.popleft()
                else:
                    self._queue.appendleft(made)
                continue
            data, fds = waiting
            done = self._try(data, fds)
            if not done:
                return
            for fd in fds:
                os.close(fd)
            if done < len(data):
                self._queue[0] = (data[done:], [])
            else:
                self._queue.popleft()

    def _try(self, data: bytes, fds: Sequence[int]) -> int:
        """Return how many bytes the socket took, 0 if none now. Descriptors travel with the first of them."""
        try:
            return self._sock.sendmsg([data], rights(fds), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as e:
            if e.errno == errno.ETOOMANYREFS:  # of all our user's descriptors too many are under way (unix(7))
                return 0
            return len(data)  # nobody is there; `receive` tells

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

    @property
    def hung_up(self) -> bool:
        """Whether the other end is gone; something of it may be left to be received."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))

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
        """Receive one piece; return False if there is nothing more to come."""
        try:
            data, told, marks, _address = self._sock.recvmsg(_PIECE, _ROOM, flags | _CLOEXEC)
        except BlockingIOError:
            raise
        except OSError:
            return False
        for fd in _received(told):
            os.set_inheritable(fd, False)
            self._fds.append(fd)
        if marks & socket.MSG_CTRUNC:
            self._fds.append(LOST)
        self._buffer += data
        return bool(data)

    def _word(self, line: bytes) -> Json:
        word = dict(json.loads(line))
        if "fds" in word:
            word["fds"] = [*self._claimed(word["fds"])]
        return word

    def _claimed(self, count: int) -> Iterator[int]:
        """Yield the descriptors of one line; what is `LOST` ends those that arrived of it."""
        lost = False
        for _ in range(count):
            fd = LOST if lost or not self._fds else self._fds.popleft()
            lost = fd == LOST
            yield fd

    def close(self) -> None:
        """Hang up."""
        for waiting in self._queue:
            for fd in waiting[1] if isinstance(waiting, tuple) else ():
                os.close(fd)
        self._queue.clear()
        for fd in self._fds:  # of a line that the other end did not finish
            if fd != LOST:
                os.close(fd)
        self._fds.clear()
        self._sock.close()


def readable(fds: Sequence[int], secs: float) -> list[int]:
    """Wait for at most so many seconds; return those of some descriptors, of any number, from which can be read.
    (select(2) knows none above 1023, and a keeper may hold thousands of others.)"""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _events in poll.poll(max(0.0, secs) * 1000)]


def whole(fds: list[int]) -> list[int]:
    """Return the descriptors of a word if all have come, else none: those that have are closed."""
    if LOST not in fds:
        return fds
    for fd in fds:
        if fd != LOST:
            os.close(fd)
    return []


def _line(word: Json, fds: Sequence[int]) -> bytes:
    if len(fds) > _FDS_MOST:
        raise ValueError(f"{len(fds)} descriptors do not go into one message; {_FDS_MOST} do")
    return json.dumps({**word, "fds": len(fds)} if fds else word).encode() + b"\n"


def _received(told: Sequence[tuple[int, int, bytes]]) -> Iterator[int]:
    """Yield the descriptors of what recvmsg(2) gave beside the data."""
    for level, kind, data in told:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array("i")
            fds.frombytes(data[:len(data) // fds.itemsize * fds.itemsize])
            yield from fds


def rights(fds: Sequence[int]) -> list[tuple[int, int, array[int]]]:
    """Return what `sendmsg` needs to pass descriptors on; socket.send_fds would ignore the flag not to wait."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
