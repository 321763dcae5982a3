"""What one agent wrote: every byte of both streams, by absolute offset, bounded on disk.

Owns:    the files `stdout.*` and `stderr.*` (segments named by their first offset) of one agent's directory,
         their descriptors, and what is kept of them. When it was written is in index.py.
Runs in: the core's loop; nothing here waits for the agent, only for the local disk.
Unaware: of processes, text, lines, agents and who reads.

A segment is a plain file, so `tail` and `grep` read it. An offset is never used twice; a byte that
could not be recorded (disk full) still takes its offset, and reading steps over such a gap. An empty
segment marks where the next byte goes then, so that its offset outlives us too.
"""
from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import termios
import time
from typing import Any, Callable, Mapping, NamedTuple

from .files import NotAFile, is_other, make_directory, open_file, read_file, remove, rename
from .index import LEAST_SEGMENT, OPEN, SEGMENT_BYTES, STDERR, STDOUT, TIME, Index, quietly
from .segments import DISK, FILE_GONE, Segments, numbered_files

CHUNK = 128 * 1024
LEAST_CAP = 8 * LEAST_SEGMENT       # a smaller cap counts as this one
RETRY_SECS = 1.0                    # between attempts to record again on a disk that failed
SAME_TIME_SECS = 0.001              # chunks of one stream within it share an index record
SPARE_SEGMENTS = 256                # how many more files a stream may have than full ones would need

_splice: Any = getattr(os, "splice", None)  # Linux, Python >= 3.10
_NONBLOCK = int(getattr(os, "SPLICE_F_NONBLOCK", 0))
#: splice does not work between these two files, and never will
_NO_SPLICE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

class OutputRead(NamedTuple):
    """Bytes of a stream; `dropped` of them, before `offset`, were asked for and are not kept."""

    data: bytes
    offset: int
    next_offset: int
    first_offset: int
    dropped: int


class OutputLog:
    """The output of one agent, in `directory`, at most `cap_bytes` on disk with its index.

    Past the cap the oldest segment of the stream that has more goes first, so that a flood on
    stdout does not cost the few lines on stderr. Nothing is created before the first output.
    """

    __slots__ = ("_directory", "_cap", "_segment_bytes", "_now", "_out", "_err", "_index",
                 "_writing", "_since", "_at", "_retry_at", "losses", "trouble")

    def __init__(self, directory: str, cap_bytes: int, *, now: Callable[[], float] = time.time,
                 segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._cap = max(cap_bytes, LEAST_CAP)
        # an eighth: then index (a quarter) and both open segments always leave closed ones to drop
        self._segment_bytes = max(LEAST_SEGMENT, min(segment_bytes, self._cap // 8))
        self._now = now
        self._out = Segments("stdout", STDOUT, _splice is not None)
        self._err = Segments("stderr", STDERR, _splice is not None)
        self._index = Index(directory)
        self._writing: Segments | None = None        # the stream of the chunks that share a time
        self._since = 0.0                           # when the first of them was written
        self._at = 0.0                              # when the last output was written
        self._retry_at = 0.0
        #: how often bytes went or could not be recorded, since we were made
        self.losses = 0
        #: the sentence of the last failure to record, None once recording has worked again for a while
        self.trouble: str | None = None
        self._recover()

    # ------------------------------------------------------------ writing

    def capture(self, stream: str, fd: int) -> int:
        """Move one chunk from a nonblocking pipe into the log; return its size, 0 at the end of the stream.

        `BlockingIOError` means that the pipe is empty. Trouble with the disk is never raised: what
        cannot be recorded is read and counted, so that the agent does not wait for it.
        """
        s = self._stream(stream)
        if s.splice and (s.fd >= 0 and s.size < self._segment_bytes or _holds_bytes(fd) and self._ready(s)):
            try:
                count: int = _splice(fd, s.fd, min(CHUNK, self._segment_bytes - s.size), None, s.size, _NONBLOCK)
            except BlockingIOError:
                raise
            except OSError as e:    # the pipe still has its bytes; reading and writing will show who is to blame
                s.splice = e.errno not in _NO_SPLICE
            else:
                if count:
                    self._count(s, count)
                return count
        data = _read_chunk(fd)
        if data:
            self._record(s, data)
        return len(data)

    def append(self, stream: str, data: bytes) -> None:
        """Record bytes that were read elsewhere. Trouble with the disk is not raised."""
        self._record(self._stream(stream), data)

    def close(self) -> None:
        """Give back the descriptors; reading goes on working, and writing opens them again."""
        if self._writing is not None:
            self._stamp()
            self._writing = None
            self._trim()
        self._retry_at = 0.0
        for s in (self._out, self._err):
            s.close()
            s.splice = _splice is not None
        self._index.close()

    def _record(self, s: Segments, data: bytes) -> None:
        rest = memoryview(data)
        while len(rest):
            if not self._ready(s):
                break
            try:
                count = os.pwrite(s.fd, rest[:self._segment_bytes - s.size], s.size)
                if count <= 0:
                    raise OSError(errno.EIO, "nothing was written")
            except OSError as e:
                self._fail(s, e)
                break
            self._count(s, count)
            rest = rest[count:]
        if len(rest):
            s.lose(len(rest))
            self._mark(s)
            self.losses += 1

    def _count(self, s: Segments, count: int) -> None:
        """Account for `count` bytes that are in the open segment now."""
        at = self._now()
        if s is not self._writing or not 0 <= at - self._since < SAME_TIME_SECS:
            self._stamp()
            self._writing = s
            self._since = at
        self._at = at
        s.grow(count)
        if self._out.kept + self._err.kept + self._index.total > self._cap:
            self._trim()
        if self.trouble is not None and at >= self._retry_at + RETRY_SECS:
            self.trouble = None
            self._retry_at = 0.0

    def _stamp(self) -> None:
        """Write down when the output up to now came. Lost on SIGKILL, it is the segment's mtime instead."""
        if self._out.end or self._err.end:
            self._index.add(self._at, self._out.end, self._err.end)
            self._index.shrink(self._cap // 4)

    def _fail(self, s: Segments, e: OSError) -> None:
        s.close()
        if not isinstance(e, NotAFile) or e.errno == errno.ENOTDIR:  # else the next file has another name
            self._retry_at = self._now() + RETRY_SECS
        self.trouble = (f"output cannot be recorded in {self._directory}: {e.strerror or e}; the agent goes on and "
                        "what it writes meanwhile is lost; make the directory writable again, with space in it")

    # ------------------------------------------------------------ segments

    def _stream(self, name: str) -> Segments:
        if name == "stdout":
            return self._out
        if name == "stderr":
            return self._err
        raise ValueError(f"the streams are stdout and stderr, not {name!r}")

    @staticmethod
    def _name(s: Segments, start: int) -> str:
        return f"{s.name}.{start:020d}"

    def _ready(self, s: Segments) -> bool:
        """Make sure that `s` has an open segment with room; tell whether it has."""
        if s.fd >= 0 and s.size < self._segment_bytes:
            return True
        if 0 < self._retry_at - self._now() <= RETRY_SECS:
            return False
        try:
            self._open(s)
        except OSError as e:
            self._fail(s, e)
            return False
        return True

    def _open(self, s: Segments) -> None:
        s.close()
        if s.size >= self._segment_bytes or s.gap:
            self._begin(s)
        s.fd = self._create(self._name(s, s.start))
        size = os.fstat(s.fd).st_size
        if size != s.size:      # cut or extended by a stranger: go on behind both
            s.resize(size)
            if s.size >= self._segment_bytes or s.gap:
                self._open(s)

    def _mark(self, s: Segments) -> None:
        """Leave an empty segment at the end of a stream whose last bytes were lost. A new name, or moving one, is
        possible on nearly every full disk, which the registry is not."""
        s.close()
        self._begin(s)
        try:
            os.close(self._create(self._name(s, s.start)))
        except OSError:         # then the end is known as long as we live
            pass

    def _create(self, name: str) -> int:
        try:
            return open_file(self._directory, name, OPEN)
        except FileNotFoundError:
            make_directory(self._directory)
            return open_file(self._directory, name, OPEN)

    def _begin(self, s: Segments) -> None:
        """Leave the last segment behind; the next one starts at the end offset."""
        mark = self._name(s, s.start)
        if not s.size and not is_other(self._directory, mark):
            # an empty one only marked the end: move the mark, which needs no space
            quietly(rename, self._directory, mark, self._name(s, s.end))
        s.begin()
        if len(s.closed) > SPARE_SEGMENTS + self._cap // self._segment_bytes:
            self._drop_oldest(s)

    def _trim(self) -> None:
        while self.disk_bytes() > self._cap:
            less, more = sorted((self._out, self._err), key=lambda s: s.kept)
            s = more if more.closed else less
            if not s.closed:
                return
            self._drop_oldest(s)
        self._index.forget(self._out.first, self._err.first)

    def _drop_oldest(self, s: Segments) -> None:
        quietly(remove, self._directory, self._name(s, s.drop_oldest()))
        self.losses += 1

    def _recover(self) -> None:
        """Find out from the directory what is there."""
        found: dict[str, list[tuple[int, int]]] = {"stdout": [], "stderr": [], "index": []}
        for name, number, status in numbered_files(self._directory):
            if name in found:
                if not stat.S_ISREG(status.st_mode):  # its place is known, and what was in it is gone
                    if name != "index":
                        found[name].append((number, 0))
                    continue
                found[name].append((number, status.st_size))
                if name != "index":
                    self._at = max(self._at, status.st_mtime)
        self._out.recover(sorted(found["stdout"]))
        self._err.recover(sorted(found["stderr"]))
        self._index.recover(sorted(found["index"]), self._segment_bytes // 4)

    # ------------------------------------------------------------ reading

    @property
    def directory(self) -> str:
        """Where the files are."""
        return self._directory

    def span(self, stream: str) -> tuple[int, int]:
        """Return the first kept offset and the end offset."""
        s = self._stream(stream)
        return s.first, s.end

    def gaps(self, stream: str, after: int) -> list[tuple[int, int]]:
        """Return (first, end) of the bytes at or after `after` that are missing between kept ones or at the end."""
        s = self._stream(stream)
        found, at = [], max(after, s.first)
        for start, size in s.segments_from(at):
            if start > at:
                found.append((at, start))
            at = start + size
        return found + [(at, s.end)] if at < s.end else found

    def disk_bytes(self) -> int:
        """Return the bytes in all files, the index included."""
        return self._out.kept + self._err.kept + self._index.total

    def read(self, stream: str, offset: int, max_bytes: int) -> OutputRead:
        """Return at most `max_bytes` from `offset` on, or from the next kept byte after it.

        The bytes are contiguous: a read ends at a gap, and the next one steps over it. `OSError` if
        what is there cannot be read for now (no descriptor left, say).
        """
        s = self._stream(stream)
        asked = max(0, min(offset, s.end))
        if max_bytes > 0:
            begin, data = self._gather(s, asked, max_bytes)
        else:
            begin, data = s.next_kept(asked), b""
        return OutputRead(data, begin, begin + len(data), s.first, begin - asked)

    def why_dropped(self, stream: str, read: OutputRead) -> str:
        """Return why bytes that were asked for are gone, the last of them where there is more than one cause."""
        s, asked = self._stream(stream), read.offset - read.dropped
        if read.offset <= s.first:
            return s.gone(read.offset - 1)[0]
        if any(start < read.offset <= start + size for start, size in s.segments_from(asked)):
            return FILE_GONE  # listed, and cannot be read
        return DISK

    def _gather(self, s: Segments, at: int, most: int) -> tuple[int, bytes]:
        """Return the offset of the first byte that can be read at or after `at`, and the bytes from there."""
        begin = s.end
        pieces: list[bytes] = []
        for start, size in s.segments_from(at):
            if pieces and start > at:
                break               # a gap
            at = max(at, start)
            wanted = min(most, start + size - at)
            piece = self._piece(s, start, at - start, wanted)
            if not (piece or pieces):
                continue            # gone: step over it
            begin = begin if pieces else at
            pieces.append(piece)
            at += len(piece)
            most -= len(piece)
            if len(piece) < wanted or not most:
                break
        return begin, pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, s: Segments, start: int, position: int, count: int) -> bytes:
        """Return bytes of one segment, none if the file is gone or its sectors are."""
        try:
            if s.fd >= 0 and start == s.start:
                return os.pread(s.fd, count, position)
            return read_file(self._directory, self._name(s, start), position, count)
        except OSError as e:
            if isinstance(e, NotAFile) or e.errno in (errno.ENOENT, errno.EIO):
                return b""
            raise

    def times(self, stream: str, start: int, stop: int) -> list[tuple[float, int]]:
        """Return (unix time, end offset) pairs that cover the bytes from `start` to `stop`, in order.

        Chunks within a millisecond share a pair. A byte whose own record is lost has the time of the
        next one that is known.
        """
        s = self._stream(stream)
        at, stop = max(start, s.first), min(stop, s.end)
        found: list[tuple[float, int]] = []
        for record in self._index.records(s.column, at + 1) if at < stop else ():
            end = min(record[s.column], stop)
            if end > at:
                found.append((record[TIME] / 1e6, end))
                at = end
            if at >= stop:
                break
        if at < stop:
            found.append((max(self._at, self._index.latest()), stop))  # a file's own time is some milliseconds behind
        return found

    def offset_at(self, stream: str, when: float) -> int:
        """Return the first offset that was written at or after `when` (unix time); the end if there is none."""
        s = self._stream(stream)
        if round(self._at * 1e6) < round(when * 1e6):
            return s.end
        before = self._index.last_before(TIME, round(when * 1e6))
        return max(s.first, min(before[s.column], s.end))

    def gone(self, stream: str, offset: int) -> tuple[str, int]:
        """Return why the byte at an offset before the first kept one is gone, and up to where that holds."""
        return self._stream(stream).gone(offset)

    @property
    def capped(self) -> dict[str, int]:
        """The offset of each stream before which bytes went for the cap."""
        return {s.name: s.capped for s in (self._out, self._err) if s.capped}

    def recall(self, capped: Mapping[str, int]) -> None:
        """Take over what a core before us knew of that."""
        for s in (self._out, self._err):
            s.capped = max(s.capped, capped.get(s.name, 0))


def _holds_bytes(fd: int) -> bool:
    """Tell whether a pipe has bytes to read now, so that no file is made for a stream that just ends."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"), sys.byteorder) > 0
    except OSError:
        return False


def _read_chunk(fd: int) -> bytes:
    try:
        return os.read(fd, CHUNK)
    except OSError as e:
        if e.errno == errno.EIO:    # how Linux says that nobody holds the other end of a pseudo-terminal
            return b""
        raise
