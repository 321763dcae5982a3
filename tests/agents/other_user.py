"""Become another user, as sudo and su do, or let only a child become one.

    other_user.py leader|child

Prints `ready`, then the pid of the process that is another user's; it ignores SIGTERM. With `child` the leader waits,
and ends with code 0 by SIGTERM.
"""
import os
import signal
import sys

read_end, write_end = os.pipe()
if sys.argv[1] == "child" and os.fork():
    pid = os.read(read_end, 32)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    os.write(1, b"ready\n" + pid + b"\n")
    while True:
        signal.pause()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.setgid(12345)
os.setuid(12345)
if sys.argv[1] == "leader":
    os.write(1, b"ready\n%d\n" % os.getpid())
os.write(write_end, b"%d" % os.getpid())
while True:
    signal.pause()
