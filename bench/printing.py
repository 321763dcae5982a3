"""The programs that agents run in the benchmarks: each waits for the end of its stdin, and then prints.

Owns:    what is printed, and what has to arrive of it.
Runs in: a process of its own, agent or child of a raw limit; the functions here only say how it is started.
Unaware: of who listens.
"""
from __future__ import annotations

import sys
from typing import List

READY = b"ready\n"  # what they say first if they are to; so a listener knows that it listens

_CLOCK = """import os, sys, time
lines, pause, word = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
os.write(1, word.encode())
os.read(0, 1)
for _ in range(lines):
    os.write(1, b"%d\\n" % time.monotonic_ns())
    time.sleep(pause)
"""
_TORRENT = """import hashlib, json, os, sys, time
rate, size, word = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
block = b"".join(b"%08d the quick brown fox jumps over the lazy dog 0123456789\\n" % n for n in range(1100))[:65536]
os.write(1, word)
os.read(0, 1)
began, done = time.monotonic(), 0
while done < size:
    done += os.write(1, block[done % 65536:][:size - done])
    ahead = done / rate - (time.monotonic() - began) if rate else 0
    if ahead > 0.002:
        time.sleep(ahead)
secs = time.monotonic() - began
sha = hashlib.sha256(word)
for at in range(0, size, 65536):
    sha.update(block[:size - at])
os.write(2, json.dumps({"secs": secs, "sha256": sha.hexdigest()}).encode())
"""
_COUNTER = """import os, sys, time
lines, pause = int(sys.argv[1]), float(sys.argv[2])
os.write(1, b"ready\\n")
os.read(0, 1)
for n in range(lines):
    os.write(1, b"%099d\\n" % n)
    time.sleep(pause)
"""


def _python(program: str, *arguments: object) -> List[str]:
    return [sys.executable, "-S", "-E", "-c", program, *map(str, arguments)]


def clock(lines: int, pause: float, word: bytes = b"") -> List[str]:
    """Print the time (CLOCK_MONOTONIC, ns), line by line, with a pause in seconds after each."""
    return _python(_CLOCK, lines, pause, word.decode())


def torrent(rate: float, size: int, word: bytes = b"") -> List[str]:
    """Print `size` bytes, at `rate` a second or (0) as fast as they are taken; on stderr how long it took and the
    SHA-256 of all, `word` included."""
    return _python(_TORRENT, rate, size, word.decode())


def counter(lines: int, pause: float) -> List[str]:
    """Print numbered lines of 100 bytes, with a pause in seconds after each."""
    return _python(_COUNTER, lines, pause)


def counted(lines: int) -> bytes:
    """Return all that `counter` prints."""
    return READY + b"".join(b"%099d\n" % n for n in range(lines))
