"""Put the terminal into raw mode, print `ready`, read up to the byte 4, print length and SHA-256 of what came before.

    raw.py [wait]

With `wait` nothing is read until SIGUSR1 comes.
"""
import hashlib
import os
import signal
import sys
import termios
import tty

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
tty.setraw(0, termios.TCSANOW)
os.write(1, b"ready\n")
if sys.argv[1:] == ["wait"]:
    signal.sigwait({signal.SIGUSR1})
total, digest = 0, hashlib.sha256()
while True:
    data, end, _ = os.read(0, 65536).partition(b"\4")
    total += len(data)
    digest.update(data)
    if end:
        break
os.write(1, f"{total} {digest.hexdigest()}\n".encode())
