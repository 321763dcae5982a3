"""Write numbered lines of all lengths to the terminal, in raw mode, as fast as it takes them, until SIGTERM.

    flood.py SUM_FILE

Every seventh line goes out on descriptor 2, which is the same terminal. SUM_FILE gets `<bytes> <sha256>` of all of it.
"""
import hashlib
import os
import signal
import sys
import termios
import tty

going = True


def stop(*_):
    global going
    going = False


signal.signal(signal.SIGTERM, stop)
tty.setraw(0, termios.TCSANOW)
digest, total, number = hashlib.sha256(), 0, 0
while going or total < 100_000:
    line = b"%d " % number + b"x" * (number * 37 % 5000) + b"\n"
    fd = 2 if number % 7 == 0 else 1
    while line:
        done = os.write(fd, line)
        digest.update(line[:done])
        total, line = total + done, line[done:]
    number += 1
with open(sys.argv[1] + ".part", "w") as f:
    f.write(f"{total} {digest.hexdigest()}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
