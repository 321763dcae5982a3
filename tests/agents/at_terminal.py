"""Tell, as lines of JSON, which terminal this runs on, and then what comes: what was read, sizes, SIGINT, ends of file.

    at_terminal.py [ENDS [EOF_CHAR]]

Ends at the ENDS-th end of file (the first). EOF_CHAR, a number, becomes the terminal's end-of-file character.
"""
import fcntl
import json
import os
import signal
import struct
import sys
import termios

ends = int(sys.argv[1]) if len(sys.argv) > 1 else 1


def say(**facts):
    os.write(1, json.dumps(facts).encode() + b"\n")


def size():
    return list(struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))[:2])


def char(place):
    return termios.tcgetattr(0)[6][place].decode("latin-1")


signal.signal(signal.SIGWINCH, lambda *_: say(size=size()))
signal.signal(signal.SIGINT, lambda *_: say(signal="SIGINT"))
mode = termios.tcgetattr(0)
if len(sys.argv) > 2:
    mode[6][termios.VEOF] = bytes([int(sys.argv[2])])
    termios.tcsetattr(0, termios.TCSANOW, mode)
with open("/dev/tty", "rb", buffering=0) as controlling:
    foreground = os.tcgetpgrp(controlling.fileno())
say(ready=True, tty=os.ttyname(0), same=[os.fstat(fd).st_rdev == os.fstat(0).st_rdev for fd in (1, 2)],
    fds=sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1], size=size(), term=os.environ.get("TERM"),
    session=os.getsid(0) == os.getpid(), foreground=foreground == os.getpid(), eof=char(termios.VEOF),
    utf8=bool(mode[0] & 0x4000), icrnl=bool(mode[0] & termios.ICRNL), echo=bool(mode[3] & termios.ECHO),
    canonical=bool(mode[3] & termios.ICANON), signals=bool(mode[3] & termios.ISIG))
seen = 0
while seen < ends:
    data = os.read(0, 65536)
    seen += not data
    say(**{"read": data.decode("latin-1")} if data else {"eof": seen})
