"""An agent whose every byte can be accounted for.

    agents.py KEY CODE LINES PACE MODE TREE TRUTH

Owns:    the form of the numbered, checksummed lines, and what such an agent does.
Runs in: an agent, as a script; the accounting imports the form of the lines.
Unaware: of agentserver.

Writes LINES lines on each of stdout (`O`) and stderr (`E`), one pair each PACE seconds, echoes each line of
its stdin (`I`), says `Z` on both, and exits with CODE, or by signal -CODE. MODE `reader` goes on until its
stdin has ended too, `free` does not care. TREE is a sum: 1 a child, 2 one in a session of its own, 4 a daemon;
all of them ignore SIGTERM. On a terminal, where both streams are one, it first sets raw mode, and its input
ends with the byte 4. In TRUTH it keeps, by mmap, how many bytes each write(2) has taken: what a SIGKILL
leaves there is what was written. The file's number tells how many processes were ever started for this KEY.
"""
from __future__ import annotations

import itertools
import mmap
import os
import select
import signal
import struct
import sys
import termios
import tty
import zlib
from typing import List, Optional

TRUTH = struct.Struct("<QQQ")  # bytes taken on stdout, on stderr, and what the one write under way has
LONG_EACH = 97                 # so many lines apart comes one that is longer than a pipe's page, or than a pipe
END = b"\4"                    # of what is typed at a terminal
LIFE_SECS = 1200               # nobody lives longer, whatever happens to the server


def seal(body: str) -> bytes:
    """Return a line with its checksum."""
    data = body.encode()
    return b"%s %08x\n" % (data, zlib.crc32(data))


def unseal(line: bytes) -> Optional[List[str]]:
    """Return the words of a line without its end, or None if it is not what was written."""
    body, _, check = line.rpartition(b" ")
    if len(check) != 8 or b"%08x" % zlib.crc32(body) != check:
        return None
    return body.decode().split(" ")


def numbered(stream: str, key: str, n: int) -> bytes:
    """Return line `n` of a stream; its length depends on all three."""
    dice = zlib.crc32(f"{stream} {key} {n}".encode())
    length = 30_000 + dice % 60_000 if n % LONG_EACH == LONG_EACH - 1 else dice % 160
    return seal(f"{stream} {key} {n} " + "%08x" % dice * (length // 8))


class Worker:
    """See the module."""

    def __init__(self, argv: List[str]) -> None:
        self.key, code, lines, pace, self.mode, tree, truth = argv
        self.code, self.lines, self.pace = int(code), int(lines), float(pace)
        self.taken = [0, 0]
        self.truth = self._truth(truth)
        self.unread = b""
        self.input_open = True
        self.terminal = os.isatty(0)
        if self.terminal:
            tty.setraw(0, termios.TCSANOW)
        self._tree(int(tree))

    def _truth(self, directory: str) -> mmap.mmap:
        for number in itertools.count():
            try:
                fd = os.open(os.path.join(directory, f"{self.key}.{number}"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                continue
            os.ftruncate(fd, TRUTH.size)
            return mmap.mmap(fd, TRUTH.size)
        raise AssertionError

    def write(self, fd: int, data: bytes) -> None:
        """Write all of it, and note what the pipe has taken."""
        while data:
            TRUTH.pack_into(self.truth, 0, *self.taken, len(data))
            count = os.write(fd, data)
            self.taken[fd - 1] += count
            TRUTH.pack_into(self.truth, 0, *self.taken, 0)
            data = data[count:]

    def _tree(self, kinds: int) -> None:
        pids = [self._descend(kind) for kind in (1, 2, 4) if kinds & kind]
        self.write(1, seal(f"T {self.key} " + ",".join(map(str, pids))))

    def _descend(self, kind: int) -> int:
        tell, told = os.pipe()
        child = os.fork()
        if child:
            os.close(told)
            if kind == 4:
                os.waitpid(child, 0)
            pid = int(os.read(tell, 20))
            os.close(tell)
            return pid
        if kind > 1:
            os.setsid()
        if kind == 4:
            if os.fork():
                os._exit(0)
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(LIFE_SECS)
        os.write(told, b"%d" % os.getpid())
        os.close(told)
        os.close(tell)
        while True:
            signal.pause()

    def listen(self, secs: float) -> None:
        """Echo what comes on stdin within `secs`."""
        readable, _, _ = select.select([0] if self.input_open else [], [], [], secs)
        if not readable:
            return
        data = os.read(0, 65536)
        self.input_open = bool(data)
        if self.terminal and END in data:
            data, self.input_open = data[:data.index(END)], False
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self.write(1, seal("I " + line.decode()))

    def run(self) -> None:
        """Live."""
        signal.alarm(LIFE_SECS)
        for n in range(self.lines):
            self.write(1, numbered("O", self.key, n))
            self.write(2, numbered("E", self.key, n))
            self.listen(self.pace)
        while self.mode == "reader" and self.input_open:
            self.listen(LIFE_SECS)
        for fd in (1, 2):
            self.write(fd, seal(f"Z {self.key} {self.lines}"))
        if self.code < 0:
            signal.signal(-self.code, signal.SIG_DFL) if self.code != -signal.SIGKILL else None
            os.kill(os.getpid(), -self.code)
            signal.pause()
        os._exit(self.code)


if __name__ == "__main__":
    Worker(sys.argv[1:]).run()
