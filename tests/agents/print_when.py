"""Print what it is told, when it is told: each line of stdin is `out TEXT`, `err TEXT` or `exit CODE`."""
import os
import sys

os.write(1, b"ready\n")
for line in iter(sys.stdin.readline, ""):
    word, _, rest = line.rstrip("\n").partition(" ")
    if word == "exit":
        os._exit(int(rest))
    os.write(2 if word == "err" else 1, rest.encode() + b"\n")
