"""Exit and leave a descendant that holds stdout and stderr open, in a session of its own.

    holder.py CODE plain|daemon

`daemon` double-forks and ignores SIGTERM. The descendant's pid is the second line.
"""
import os
import signal
import sys

code, kind = int(sys.argv[1]), sys.argv[2]
read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    if kind == "daemon":
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(write_end, str(os.getpid()).encode())
    while True:
        signal.pause()
if kind == "daemon":
    os.waitpid(child, 0)
os.write(1, b"ready\n" + os.read(read_end, 32) + b"\n")
os.write(1, b"last words\n")
os._exit(code)
