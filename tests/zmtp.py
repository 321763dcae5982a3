"""A subscriber without libzmq: the bytes of ZMTP 3.0 on a plain TCP socket (rfc.zeromq.org/spec/23).

Owns:    `RawSubscriber`, which reads only when it is told to, and sends whatever it is told to.
Runs in: the test process.
Unaware: of what is published.
"""
from __future__ import annotations

import socket

from support import DEADLINE_SECS

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)


def command(name: bytes, body: bytes) -> bytes:
    """Return a command frame."""
    whole = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(whole)]) + whole


def message(body: bytes, more: bool = False) -> bytes:
    """Return a message of one frame, or a frame of one that goes on."""
    if len(body) < 256:
        return bytes([more, len(body)]) + body
    return bytes([2 | more]) + len(body).to_bytes(8, "big") + body


def ready(kind: bytes) -> bytes:
    """Return how a socket of this kind says that it is one."""
    return command(b"READY", b"\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind)


READY = ready(b"SUB")


class RawSubscriber:
    """Connects, shakes hands, subscribes, and then does nothing by itself. It can also be of another `kind`."""

    def __init__(self, endpoint: str, *topics: bytes, room: int = 4096, kind: bytes = b"SUB") -> None:
        scheme, _, address = endpoint.partition("://")
        host, _, port = address.rpartition(":")
        self.socket = socket.socket(socket.AF_UNIX if scheme == "ipc" else socket.AF_INET)
        self.socket.settimeout(DEADLINE_SECS)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.socket.connect(address if scheme == "ipc" else (host, int(port)))
        self.socket.sendall(GREETING)
        self._exactly(len(GREETING))
        self.socket.sendall(ready(kind))
        _flags, size = self._exactly(2)
        assert self._exactly(size).startswith(b"\x05READY")
        for topic in topics:
            self.socket.sendall(message(b"\1" + topic))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, "the publisher closed the connection"
            data += piece
        return data

    def frame(self) -> bytes:
        """Return the next frame that was published; topic and body are two."""
        flags = self._exactly(1)[0]
        size = int.from_bytes(self._exactly(8 if flags & 2 else 1), "big")
        return self._exactly(size)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
