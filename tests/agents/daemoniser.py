"""Leave a daemon behind: double fork, setsid, own directory, closed stdio, SIGTERM ignored.

    daemoniser.py wait|exit keep|clear

Prints `ready`, then the daemon's pid. `clear` gives the daemon an empty environment, by exec.
"""
import os
import signal
import sys

after, environment = sys.argv[1:3]
read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    code = "import os, signal\nos.write(%d, str(os.getpid()).encode())\nos.close(%d)\nwhile True: signal.pause()"
    os.set_inheritable(write_end, True)
    os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", code % (write_end, write_end)],
              {} if environment == "clear" else dict(os.environ))
os.waitpid(child, 0)
os.close(write_end)
os.write(1, b"ready\n" + os.read(read_end, 32) + b"\n")
while after == "wait":
    signal.pause()
