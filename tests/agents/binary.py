"""Write bytes that are no UTF-8 on both streams: every byte value, split sequences, NULs; then exit.

    binary.py TIMES
"""
import os
import sys

times = int(sys.argv[1])
os.write(1, b"ready\n")
for _ in range(times):
    os.write(1, bytes(range(256)) + b"\xff\xfe\xe2\x82")
    os.write(2, bytes(range(255, -1, -1)) + b"\xc3")
