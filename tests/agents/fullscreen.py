"""A full-screen program: shows its size, what was typed and how often it drew, and switches on all that there is.

    fullscreen.py LOG

What is read goes to LOG, byte for byte. `q` takes everything back and ends with 0, `x` ends with 9 and takes nothing
back, `d` asks the terminal what it is, `w` writes 300 KB of small changes.
"""
import os
import shutil
import signal
import sys
import tty

ON = ("\x1b[?1049h\x1b[?1000h\x1b[?1006h\x1b[?1004h\x1b[?2004h\x1b[?1h\x1b=\x1b[>1u\x1b[>4;2m\x1b[?25l\x1b[2 q"
      "\x1b[3;8r\x1b]11;#102030\x07")
OFF = ("\x1b]111\x07\x1b[r\x1b[ q\x1b[?25h\x1b[>4m\x1b[<u\x1b>\x1b[?1l"
       "\x1b[?2004l\x1b[?1004l\x1b[?1006l\x1b[?1000l\x1b[?1049l")
typed, drawn = "", 0


def say(text):
    data = text.encode()
    while data:
        data = data[os.write(1, data):]


def draw(*_):
    global drawn
    drawn += 1
    cols, rows = shutil.get_terminal_size()
    say(f"\x1b[r\x1b[H\x1b[2J\x1b[1;1Hsize {rows}x{cols}\x1b[2;1Hkeys {typed}")
    say(f"\x1b[{rows};1H\x1b[7mlast line\x1b[m\x1b[5;5H")


os.environ.pop("LINES", None)
os.environ.pop("COLUMNS", None)
tty.setraw(0)
log = open(sys.argv[1], "ab", buffering=0)
say(ON)
draw()
signal.signal(signal.SIGWINCH, draw)
while True:
    data = os.read(0, 4096)
    log.write(data)
    typed += data.decode("latin-1").replace("\x1b", "^").replace("\r", "")
    if b"q" in data:
        say(OFF)
        break
    if b"x" in data:
        sys.exit(9)
    if b"d" in data:
        say("\x1b[c\x1b[6n\x1b]10;?\x07")
    if b"w" in data:
        for number in range(15000):
            say(f"\x1b[6;6Hchange {number:6d}")
    say(f"\x1b[2;1Hkeys {typed}")
