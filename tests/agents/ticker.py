"""Print a numbered line every so often, on stdout and on stderr in turn, until a file appears (or for ever).

    ticker.py SECONDS [UNTIL_FILE]
"""
import os
import sys
import time

interval = float(sys.argv[1])
until = sys.argv[2] if sys.argv[2:] else ""
os.write(1, b"ready\n")
number = 0
while not (until and os.path.exists(until)):
    os.write(1 + number % 2, b"tick %d\n" % number)
    number += 1
    time.sleep(interval)
