"""Write a mixture on both streams until stdin ends, and leave in FILE.stdout and FILE.stderr what was written.

    mixed.py FILE

Text in several scripts that is cut anywhere, also within characters; NULs, quotes and every byte value; single bytes,
and now and then more than a pipe holds.
"""
import os
import random
import select
import sys

TEXT = 'grüße, "日本語" \\ 🎉 \t€ \x00\x1b[1m\r\n'.encode()
SIZES = (1, 2, 3, 10, 200, 3000, 300_000)
dice = random.Random(4)
files = {fd: open(f"{sys.argv[1]}.{name}", "wb") for fd, name in ((1, "stdout"), (2, "stderr"))}
left = {1: b"", 2: b""}
while not select.select([0], [], [], 0.001)[0]:
    fd = dice.choice((1, 1, 2))
    while len(left[fd]) < SIZES[-1]:
        left[fd] += TEXT * 1000 + bytes(range(256)) * dice.choice((0, 1, 50))
    size = dice.choices(SIZES, (6, 6, 6, 20, 40, 21, 1))[0]
    piece, left[fd] = left[fd][:size], left[fd][size:]
    files[fd].write(piece)
    while piece:
        piece = piece[os.write(fd, piece):]
for file in files.values():
    file.close()
