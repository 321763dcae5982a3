"""Who is at the other end of a connection to the core's socket: what the kernel says, and what a header may add.

Owns:    reading a peer's credentials and its headers, and telling a shell of ours from everybody else.
Runs in: the core's thread.
Unaware: of what a connection is used for.

Any process of our user can connect, an agent too, and say anything. So nothing that a header names is ever signalled,
and what a shell says of itself and of its clients counts only from the process that holds `shell.lock`. So it is with
a keeper and `keeper.lock`.
"""
from __future__ import annotations

import json
import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import NamedTuple, Type, TypeVar

from ..errors import RequestError
from ..wire import boolean, mapping, read, text, whole, wire
from . import process, tree
from .framing import FramingError

T = TypeVar("T")
CORE_LOCK, SHELL_LOCK, KEEPER_LOCK = "core.lock", "shell.lock", "keeper.lock"  # in the core's working directory
_LOOKS = 3            # at /proc/locks, which may skip a line while others come and go
_MAC_PEER = (0, 2)    # SOL_LOCAL, LOCAL_PEERPID (sys/un.h of macOS)


class Caller(NamedTuple):
    """Who connected, as the kernel says (SO_PEERCRED, unix(7)); pid 0 where it does not."""

    uid: int
    pid: int

    @property
    def name(self) -> str:
        """What records call it."""
        return f"local uid {self.uid} pid {self.pid}" if self.pid else "local"


def caller(sock: socket.socket) -> Caller:
    """Return who connected. Where the system does not tell, the mode of the socket's file has kept others out."""
    if hasattr(socket, "SO_PEERCRED"):
        pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return Caller(uid, pid)
    return Caller(os.getuid(), sock.getsockopt(*_MAC_PEER) if sys.platform == "darwin" else 0)


# ---------------------------------------------------------------- headers

@dataclass(frozen=True)
class Hello:
    """What a shell says of itself. Its pid is for the kernel to say."""

    role: str = wire(text(16), "")
    keeper_pid: int = wire(whole(), 0)  # 0: a program of somebody's own, which no keeper started
    endpoint: str = wire(text(4096), "")
    pub_endpoint: str = wire(text(4096), "")
    pipelined: bool = wire(boolean, False)  # it has many requests under way, of many clients


@dataclass(frozen=True)
class Asker:
    """Whom a shell names beside a request."""

    name: str = wire(text(256), "")
    connection: str = wire(text(256), "")  # which of several of that name: their requests take turns


def header(cls: Type[T], data: bytes) -> T:
    """Return the header of a frame; raise `FramingError` if it is no object, or a field of it has the wrong type."""
    try:
        return read(cls, mapping(json.loads(data), "it"))
    except (ValueError, RecursionError, RequestError) as e:
        raise FramingError(f"the header of a frame is wrong: {e}") from None


# ---------------------------------------------------------------- shell and keeper

class Shell(NamedTuple):
    """A shell of this server: what it said, and which process it is."""

    hello: Hello
    pid: int
    start: int | None  # ticks since boot; None where there is no /proc

    def signal(self, number: int) -> None:
        """Signal it, while it is the process that it was."""
        if self.start is not None:
            tree.send(tree.Proc(self.pid, 0, 0, self.start, ""), number)
        elif self.pid:
            process.send(self.pid, number)


def shell(hello: Hello, peer: Caller) -> Shell | None:
    """Return the shell that this peer is, or `None` where it is not one. Where the kernel does not tell who holds a
    lock, it is believed."""
    if _holds(peer.pid, SHELL_LOCK) is False:
        return None
    proc = tree.look(peer.pid) if peer.pid else None
    return Shell(hello, peer.pid, proc.start if proc is not None else None)


def is_keeper(peer: Caller) -> bool:
    """Whether this peer is a keeper; as for a shell."""
    return _holds(peer.pid, KEEPER_LOCK) is not False


def is_ours(peer: Caller) -> bool:
    """Whether this peer is a part of the server, as far as the kernel tells."""
    return any(_holds(peer.pid, path) for path in (SHELL_LOCK, KEEPER_LOCK))


def _holds(pid: int, path: str) -> bool | None:
    """Return whether a process holds a lock; `None` where the kernel does not tell."""
    for _ in range(_LOOKS):
        try:
            locks = _flocks()
        except (OSError, ValueError, IndexError):
            return None
        # /proc/locks may number a file system otherwise than stat(2); the line of our own lock tells its number. Where
        # there is no such line, files are numbered otherwise as well
        ours = _inode(CORE_LOCK)
        disks = {disk for holder, disk, inode in locks if holder == os.getpid() and ours in (inode, 0)}
        if not disks:
            return None
        if any((pid, disk, _inode(path)) in locks for disk in disks):
            return True
    return False


def _inode(path: str) -> int:
    """Return the number of a file, 0 if there is none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _flocks() -> set[tuple[int, str, int]]:
    """Return all exclusive flock(2) locks as pid, number of the file system, number of the file (proc(5))."""
    found = set()
    with open("/proc/locks", encoding="ascii") as file:
        for line in file:
            words = line.split()
            if words[1] == "FLOCK" and words[3] == "WRITE":  # one that waits has "->" in front
                disk, inode = words[5].rsplit(":", 1)
                found.add((int(words[4]), disk, int(inode)))
    return found
