"""Bytes and JSON for stdout and stderr.

Owns:    the unbuffered writing to descriptors 1 and 2, and the shape of --json lines.
Runs in: the main thread of a command.
Unaware: of where the bytes come from.
"""
from __future__ import annotations

import os
from typing import Any

from ..wire import encode_text, wire_text
from .streams import StreamError

#: which descriptor shows which stream of an agent
DESCRIPTORS = {"stdout": 1, "stderr": 2}


def put(fd: int, data: bytes) -> None:
    """Write all of the bytes at once, also to a descriptor that somebody has made non-blocking."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left):]
        except BlockingIOError:
            from select import select
            select([], [fd], [])


def write(fd: int, data: bytes) -> None:
    """Write all of the bytes to descriptor 1 or 2; raise `BrokenPipeError`, or `StreamError` with a sentence."""
    try:
        put(fd, data)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise StreamError(fd, e) from None


def document(value: Any) -> None:
    """Write a JSON value as one line on stdout."""
    write(1, encode_text(value).encode("ascii") + b"\n")


def chunk(agent_id: str, stream: str, offset: int, data: bytes, time: str | None = None) -> dict[str, Any]:
    """Return some output of an agent as a JSON object: text if it is valid UTF-8, else base64."""
    text, encoding = wire_text(data)
    shown: dict[str, Any] = {"type": "output", "agent_id": agent_id, "stream": stream, "data": text,
                             "encoding": encoding, "offset": offset, "next_offset": offset + len(data)}
    if time:
        shown["time"] = time
    return shown
