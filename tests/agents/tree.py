"""Grow a small tree of processes and print the pid of each, as JSON, once all are up.

    tree.py LEVELS WIDTH [ignore]

Every second level starts a session of its own, as today's agent CLIs do with their tools. With `ignore` all of them but
the leader ignore SIGTERM. Then all wait; a SIGTERM to the leader makes only the leader exit (with code 0).
"""
import json
import os
import signal
import sys

levels, width = int(sys.argv[1]), int(sys.argv[2])
ignore = sys.argv[3:] == ["ignore"]
read_end, write_end = os.pipe()


def grow(level):
    os.write(write_end, b"%d\n" % os.getpid())
    if level < levels:
        for _ in range(width):
            if os.fork() == 0:
                if level % 2:
                    os.setsid()
                if ignore:
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                grow(level + 1)
    while level:
        signal.pause()


signal.signal(signal.SIGTERM, signal.SIG_DFL)
grow(0)
wanted = sum(width ** level for level in range(levels + 1))
text = b""
while text.count(b"\n") < wanted:
    text += os.read(read_end, 4096)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
os.write(1, b"ready\n" + json.dumps([int(line) for line in text.split()]).encode() + b"\n")
while True:
    signal.pause()
