"""The line between the keeper and a process it started.

Owns:    JSON objects, one a line, over a socket pair that the child finds as its descriptor 0.
Runs in: keeper, core and shell.
Unaware: of what is said. Both ends are ours, so a line that is no JSON is a bug and may raise.
"""
from __future__ import annotations

import json
import socket
from typing import Any, Dict

Json = Dict[str, Any]


class Channel:
    """One end. `receive` yields what is there; `None` says that the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    def fileno(self) -> int:
        """For a selector."""
        return self._sock.fileno()

    def send(self, word: Json) -> bool:
        """Say something; return False if nobody is there."""
        try:
            self._sock.sendall(json.dumps(word).encode() + b"\n")
            return True
        except OSError:
            return False

    def first(self) -> Json:
        """Wait for the first word; raise `EOFError` if there is none."""
        while b"\n" not in self._buffer:
            data = self._sock.recv(65536)
            if not data:
                raise EOFError("the other end of the channel is gone")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return dict(json.loads(line))

    def pending(self) -> list[Json]:
        """Return what came together with the first word; `fileno` does not tell of it."""
        *lines, self._buffer = self._buffer.split(b"\n")
        return [dict(json.loads(line)) for line in lines]

    def receive(self) -> list[Json | None]:
        """Return what has arrived; call it when `fileno` is readable."""
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        words: list[Json | None] = [dict(json.loads(line)) for line in lines]
        return words if data else [*words, None]

    def fail(self, sentence: str) -> int:
        """Say why this process gives up; return its exit code."""
        self.send({"failed": sentence})
        return 1

    def finish(self, word: Json) -> None:
        """Say a last thing and hang up."""
        self.send(word)
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()
