"""Write a known amount and exit in the same breath, without closing anything.

    burst.py STDOUT_BYTES STDERR_BYTES

After `ready\\n` byte i of a stream is i % 251.
"""
import os
import sys

amounts = {1: int(sys.argv[1]), 2: int(sys.argv[2])}
os.write(1, b"ready\n")
pattern = bytes(range(251)) * 261
for fd, amount in amounts.items():
    left = amount
    while left:
        start = (amount - left) % 251
        left -= os.write(fd, pattern[start:start + min(left, 65000)])
os._exit(0)
