"""Print what it is told, when it is told: each line of stdin is `out TEXT`, `err TEXT` or `exit CODE`; in bytes."""
import os
import sys

os.write(1, b"ready\n")
for line in iter(sys.stdin.buffer.readline, b""):
    word, _, rest = line.rstrip(b"\n").partition(b" ")
    if word == b"exit":
        os._exit(int(rest))
    os.write(2 if word == b"err" else 1, rest + b"\n")
