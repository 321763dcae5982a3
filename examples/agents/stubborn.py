"""An agent as one does not wish for: it ignores SIGTERM, and so does the daemon that it leaves behind.

    python stubborn.py

The daemon is forked twice, in a session of its own, and holds no pipe: no group signal reaches it, and
its parent is gone. Neither ends by itself; both have to be killed.
"""
from __future__ import annotations

import os
import signal
import sys


def leave_a_daemon() -> None:
    """Fork twice and become something else; an ignored signal stays ignored across exec."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), "--daemon"])
        os._exit(0)
    os.wait()


def main() -> int:
    """Refuse to leave."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--daemon" not in sys.argv:
        leave_a_daemon()
        print("a daemon is loose, and SIGTERM does not impress me", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    raise SystemExit(main())
