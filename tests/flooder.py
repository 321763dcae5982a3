"""Subscribers that never stop talking, as a process of its own: `flooder.py ENDPOINT COUNT`.

Owns:    raw connections over which it sends joins, leaves and noise as fast as they are taken; one that is cut off
         is made anew. Says `sent` when all of them are at it.
Runs in: a process that a test starts and kills.
Unaware: of what happens to it.
"""
from __future__ import annotations

import select
import socket
import sys

from zmtp import RawSubscriber, message

#: what one connection says, over and over
TALK = [message(b"\1x") + message(b"\0x"), message(b"\0nothing"), message(b"\2noise")]


def connect(endpoint: str) -> socket.socket:
    """Return a connection that has shaken hands."""
    made = RawSubscriber(endpoint).socket
    made.setblocking(False)
    return made


def main(endpoint: str, count: str) -> None:
    """See the module."""
    talk = [unit * (32768 // len(unit)) for unit in TALK]
    left = {connect(endpoint): talk[n % len(talk)] for n in range(int(count))}
    texts = {sock: text for sock, text in left.items()}
    print("sent", flush=True)
    while True:
        for sock in select.select([], list(left), [])[1]:
            try:
                left[sock] = left[sock][sock.send(left[sock]):] or texts[sock]
            except BlockingIOError:
                continue
            except OSError:  # cut off
                sock.close()
                del left[sock]
                again = connect(endpoint)
                texts[again] = left[again] = texts.pop(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
