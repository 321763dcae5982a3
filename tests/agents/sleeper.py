"""Say `ready`, print the arguments if there are any, and wait for a signal."""
import os
import signal
import sys

os.write(1, b"ready\n")
if sys.argv[1:]:
    os.write(1, " ".join(sys.argv[1:]).encode() + b"\n")
while True:
    signal.pause()
