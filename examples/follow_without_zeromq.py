"""Follow an agent with Python's standard library alone, over the core's Unix socket: the same rules on another link.

    python examples/follow_without_zeromq.py STATE_DIRECTORY/core.sock AGENT DIRECTORY

The rules, and what comes into DIRECTORY, are those of follow_without_library.py. Here are only the lines on the socket:
one connection for requests, a second one for hints. Where one breaks, a core has died or is being replaced.
"""
from __future__ import annotations

import json
import socket
import sys
from typing import List

from follow_without_library import ANSWER_SECS, SILENCE_SECS, Link, follow


class Lines:
    """A connection: one JSON object a line, both ways; what carries a `topic` is a hint."""

    def __init__(self, path: str, secs: float) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.file = self.socket.makefile("rb")
        self.socket.settimeout(secs)
        self.socket.connect(path)

    def send(self, raw: bytes) -> None:
        self.socket.sendall(raw + b"\n")

    def line(self) -> bytes:
        return self.file.readline()  # empty when the other side has closed, and that is no JSON

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class LineLink(Link):
    """The same link with other pipes."""

    def __init__(self, path: str) -> None:
        self.address = path

    def attempt(self, raw: bytes) -> bytes:
        self.req = self.req or Lines(self.address, ANSWER_SECS)
        self.req.send(raw)
        return bytes(self.req.line())

    def listen(self, topics: List[str]) -> None:
        self.sub = Lines(self.address, SILENCE_SECS)
        self.sub.send(json.dumps({"type": "subscribe_request", "request_id": "1", "topics": topics}).encode())

    def hear(self) -> bytes:
        return bytes(self.sub.line())


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: follow_without_zeromq.py STATE_DIRECTORY/core.sock AGENT DIRECTORY")
    try:
        follow(LineLink(sys.argv[1]), *sys.argv[2:4])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
