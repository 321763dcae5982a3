"""Write numbered, checksummed lines, and leave the SHA-256 of everything written in a file.

    lines.py COUNT RATE SUM_FILE

COUNT lines (0: until SIGTERM) at RATE lines per second (0: as fast as the pipe takes them). Every tenth line goes to
stderr as well. SUM_FILE gets `<stdout bytes> <stdout sha256> <stderr bytes> <stderr sha256>`.
"""
import hashlib
import os
import signal
import sys
import time
import zlib

count, rate, sum_file = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
going = True


def stop(*_):
    global going
    going = False


signal.signal(signal.SIGTERM, stop)
written = {1: 0, 2: 0}
digests = {1: hashlib.sha256(), 2: hashlib.sha256()}


def write(fd, data):
    view = memoryview(data)
    while view:
        done = os.write(fd, view)
        digests[fd].update(view[:done])
        written[fd] += done
        view = view[done:]


write(1, b"ready\n")
number = 0
batch = 100 if not rate or rate > 1000 else 1
started = time.monotonic()
while going and (not count or number < count):
    out, err = [], []
    for _ in range(min(batch, count - number) if count else batch):
        line = b"%d %08x\n" % (number, zlib.crc32(b"%d" % number))
        out.append(line)
        if number % 10 == 0:
            err.append(line)
        number += 1
    write(1, b"".join(out))
    write(2, b"".join(err))
    if rate:
        ahead = number / rate - (time.monotonic() - started)
        if ahead > 0:
            time.sleep(ahead)
with open(sum_file + ".part", "w") as f:
    f.write(" ".join(f"{written[fd]} {digests[fd].hexdigest()}" for fd in (1, 2)))
os.rename(sum_file + ".part", sum_file)
