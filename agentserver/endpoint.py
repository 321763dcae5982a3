"""What a ZeroMQ endpoint says: `tcp://HOST:PORT` or `ipc:///PATH`.

Owns:    cutting one into its parts, and the reason why something is none.
Runs in: any process; it is pure.
Unaware: of who listens or connects there, and of which hosts a server may listen on (config.py).
"""
from __future__ import annotations

import os
import re
from typing import NamedTuple, Tuple

MAX_PORT = 65535
MAX_IPC_PATH = 107         # bytes; sun_path of unix(7) less its final NUL


class Tcp(NamedTuple):
    """A host and a port; the host is a name or a numeric address, without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def split(address: str) -> Tuple[str, str]:
    """Return host, with its brackets, and port of what follows `tcp://`; the port is empty where there is none."""
    host, colon, port = address.rpartition(":")
    return (host, port) if colon else (address, "")


def port_number(text: str) -> int:
    """Return the number of a port, 0 to 65535; -1 for any other text, also with digits of another script."""
    number = int(text) if re.fullmatch(r"[0-9]{1,5}", text) else -1
    return number if number <= MAX_PORT else -1


def tcp(address: str) -> Tcp:
    """Return the place that can be connected to, from what follows `tcp://`; raise `ValueError` with the reason."""
    host, text = split(address)
    port = port_number(text)
    if port < 1:
        given = f"not {text[:20]!r}" if text else "and it has none"
        raise ValueError(f"it must end in :PORT, a number from 1 to {MAX_PORT}, {given}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or bare == "*":
        raise ValueError(f"it names no host; write one before :{port}, such as 127.0.0.1")
    if ":" in host and bare == host:
        raise ValueError(f"an IPv6 address stands in brackets, as in tcp://[::1]:{port}")
    if not re.fullmatch(r"[^\s\[\]/;@,]+", bare) or not bare.isprintable() or (bare != host and ":" not in bare):
        raise ValueError(f"{host[:80]!r} is no host")
    return Tcp(bare, port)


def ipc(path: str) -> str:
    """Return the path of a socket file, from what follows `ipc://`; raise `ValueError` with the reason."""
    if path in ("", "*") or path.startswith("@"):
        raise ValueError("it names no socket file; write ipc:///PATH")
    if "\0" in path:
        raise ValueError("its path contains a NUL character")
    size = len(os.fsencode(path))
    if size > MAX_IPC_PATH:
        raise ValueError(f"its path has {size} bytes, and a socket's may have at most {MAX_IPC_PATH}")
    return path
