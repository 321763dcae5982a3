"""Print `ready`, say something on stderr, and exit.

    exit_with.py CODE [TEXT…]
"""
import os
import sys

os.write(1, b"ready\n")
if sys.argv[2:]:
    os.write(2, " ".join(sys.argv[2:]).encode() + b"\n")
os._exit(int(sys.argv[1]))
