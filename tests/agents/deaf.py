"""Never read stdin until SIGUSR1 comes; then read all of it and print its length and SHA-256."""
import hashlib
import os
import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
os.write(1, b"ready\n")
signal.sigwait({signal.SIGUSR1})
total, digest = 0, hashlib.sha256()
while True:
    data = os.read(0, 65536)
    if not data:
        break
    total += len(data)
    digest.update(data)
os.write(1, f"{total} {digest.hexdigest()}\n".encode())
