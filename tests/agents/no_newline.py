"""Write text that no newline ends, then wait for stdin to end (or exit at once with `exit`)."""
import os
import sys

os.write(1, b"ready\n")
os.write(1, b"no newline at the end")
if sys.argv[1:] != ["exit"]:
    while os.read(0, 4096):
        pass
