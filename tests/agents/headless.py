"""End the main thread and let another one go on: the kernel shows such a process as a zombie, but it lives.

    headless.py leader|child|daemon [exit]

Prints `ready`, then the pid of the process without a main thread: its own, a child's, or that of one in a session of
its own whose parent has gone. With `exit` the leader ends then, else it waits.
"""
import ctypes
import os
import platform
import signal
import sys
import threading
import time

EXIT = 60 if platform.machine() == "x86_64" else 93  # exit(2) of one thread


def lose_the_head():
    """Leave only a second thread, which works for ever."""
    begun = threading.Event()

    def work():
        begun.set()
        while True:
            time.sleep(1000)

    threading.Thread(target=work, daemon=True).start()
    begun.wait()
    ctypes.CDLL(None).syscall(EXIT, 0)


def state(pid):
    """Return the letter that the kernel shows for a process."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


kind = sys.argv[1]
os.write(1, b"ready\n")
if kind == "leader":
    os.write(1, b"%d\n" % os.getpid())
    lose_the_head()
read_end, write_end = os.pipe()
if os.fork() == 0:
    if kind == "daemon":
        os.setsid()
        if os.fork():
            os._exit(0)
    os.write(write_end, b"%d" % os.getpid())
    lose_the_head()
pid = int(os.read(read_end, 32))
if kind == "daemon":
    os.wait()
while state(pid) != "Z":
    time.sleep(0.01)
os.write(1, b"%d\n" % pid)
while sys.argv[2:] != ["exit"]:
    signal.pause()
