"""Listening sockets: made here, used by libzmq, and handed on to the shell that follows.

Owns:    binding with clear errors, the file of an `ipc://` socket, and what the next shell needs to go on with both.
Runs in: the thread that owns the ZeroMQ socket.
Unaware: of which endpoints are allowed (config decides that), and of who keeps a socket in between (the keeper).

Who connects while no shell is there waits in the socket's queue, and is served by the next one: between two shells an
address is neither closed nor free for others.
"""
from __future__ import annotations

import errno
import os
import socket
import stat
import time
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional, Tuple

import zmq

from ..endpoint import port_number
from ..errors import StartError
from .endpoints import reach

_QUEUED = 1024  # connections that are not accepted yet, as while the next shell starts
PUT_BACK_MOST = 100  # times that the file of one socket is put back: each costs a descriptor


@dataclass(frozen=True)
class Bound:
    """A bound address; `release` removes the file of an `ipc://` socket if it is still ours."""

    endpoint: str
    fd: int                              # listens; libzmq closes it with the socket
    identity: Tuple[int, ...] = ()       # of the file: device and inode
    put_back: int = 0                    # how often its file was put back

    def release(self) -> None:
        """Call after the socket was closed."""
        try:
            if self.identity and _identity(self.endpoint) == self.identity:
                os.unlink(self.endpoint[6:])
        except OSError:
            pass


def bind(sock: zmq.Socket[Any], endpoint: str, patience_secs: float = 0.0, left: Optional[Bound] = None) -> Bound:
    """Bind and return the real address (port 0 becomes a port); raise `StartError` with a clear sentence.

    `patience_secs`: how long to try again while the address is in use, for a successor of a process that just died.
    `left`: what that process listened on. It is used, or closed where nobody can find it any more.
    """
    if left is not None and left.identity and _identity(left.endpoint) != left.identity:
        os.close(left.fd)
        left = None
    deadline = time.monotonic() + patience_secs
    while True:
        try:
            return _use(sock, left) if left is not None else _bind(sock, endpoint)
        except (OSError, zmq.ZMQError) as e:
            if e.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise StartError(_why(endpoint, e)) from None
        time.sleep(0.05)


def _bind(sock: zmq.Socket[Any], endpoint: str) -> Bound:
    """Make the listening socket ourselves, to have what is handed on; and because libzmq would delete whatever lies at
    the path of an `ipc://` one, also a live server's."""
    listener = _listen_ipc(endpoint) if endpoint.startswith("ipc://") else _listen_tcp(endpoint)
    try:
        listener.setblocking(False)
        if listener.family == socket.AF_UNIX:
            endpoint = "ipc://" + os.path.abspath(endpoint[6:])
            bound = Bound(endpoint, listener.fileno(), _identity(endpoint))
        else:
            host, port = listener.getsockname()[:2]
            bound = Bound(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}", listener.fileno())
        _use(sock, bound)
        listener.detach()     # libzmq closes it from now on
        return bound
    finally:
        listener.close()


def _use(sock: zmq.Socket[Any], bound: Bound) -> Bound:
    reach(sock, bound.endpoint)
    sock.setsockopt(zmq.USE_FD, bound.fd)
    sock.bind(bound.endpoint)
    return bound


def put_back(sock: zmq.Socket[Any], bound: Bound) -> Bound:
    """Listen anew if the file of an `ipc://` socket was removed, or another put in its place; return what is bound now.
    The listener without a file stays: libzmq would end with it who came by it."""
    if not bound.identity or _identity(bound.endpoint) == bound.identity or bound.put_back >= PUT_BACK_MOST:
        return bound
    try:
        return replace(_bind(sock, bound.endpoint), put_back=bound.put_back + 1)
    except (OSError, zmq.ZMQError):  # the directory has gone, or something else is there: tried again later
        return bound


# ---------------------------------------------------------------- handing on

def hand_on(all_bound: List[Bound]) -> Tuple[List[List[int]], List[int]]:
    """Return the identities of some bound addresses, and the descriptors to be given with them."""
    return [list(bound.identity) for bound in all_bound], [bound.fd for bound in all_bound]


def left_behind(hello: Mapping[str, Any]) -> List[Optional[Bound]]:
    """Return what the shell before us listened on for requests and for subscribers, as far as it is there."""
    given = list(zip(hello.get("files", ()), hello.get("fds", ())))
    bound = [Bound(hello[name], fd, tuple(identity))
             for name, (identity, fd) in zip(("endpoint", "pub_endpoint"), given)]
    return [*bound, None, None][:2]


# ---------------------------------------------------------------- tcp

def _listen_tcp(endpoint: str) -> socket.socket:
    scheme, _, address = endpoint.partition("://")
    host, colon, port = address.rpartition(":")
    if scheme != "tcp" or not colon or port_number(port) < 0:
        raise OSError(errno.EINVAL, "not an address")
    listener = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as libzmq does: connections may linger
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(_QUEUED)
    except BaseException:
        listener.close()
        raise
    return listener


# ---------------------------------------------------------------- ipc

def _listen_ipc(endpoint: str) -> socket.socket:
    path = os.path.abspath(endpoint[6:])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # Linux gives the file this mode from its first moment
        begin = _free_name(path)
        try:
            listener.bind(begin)
        except OSError as e:
            raise OSError(e.errno or errno.ENAMETOOLONG, e.strerror or str(e)) from None
        os.chmod(begin, 0o600)
        listener.listen(_QUEUED)
        os.rename(begin, path)
    except BaseException:
        listener.close()
        raise
    return listener


def _free_name(path: str) -> str:
    """Return `path`; where a dead socket lies there, a name beside it, to be put in its place when it listens: so that
    there is one at any moment, for whoever looks."""
    if not _is_stale(path):
        return path
    if _is_stale(path + "~"):
        os.unlink(path + "~")
    return path + "~"


def _is_stale(path: str) -> bool:
    """Whether a socket file is there that nobody listens on; raise `OSError` for anything but a socket."""
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.setblocking(False)
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "exists and is not a socket")
        caller.connect(path)
    except ConnectionRefusedError:
        return True
    except (FileNotFoundError, BlockingIOError, PermissionError):
        pass  # free, or somebody is there: bind(2) tells
    finally:
        caller.close()
    return False


def _identity(endpoint: str) -> Tuple[int, ...]:
    """Return which file lies at the path of an `ipc://` address; `()` where none does."""
    try:
        found = os.lstat(endpoint[6:])
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino


# ---------------------------------------------------------------- why not

_REASONS: Dict[Optional[int], str] = {
    errno.EADDRINUSE: "another program already listens there; stop it, or choose another address "
                      "(port 0 takes a free one)",
    errno.EACCES: "you have no permission to listen there; choose a port above 1023 or a directory of your own",
    errno.EADDRNOTAVAIL: "this machine has no such address; use tcp://127.0.0.1:PORT",
    errno.ENODEV: "this machine has no such address; use tcp://127.0.0.1:PORT",
    errno.ENOENT: "the directory of the socket does not exist; create it first",
    errno.ENOTDIR: "the directory of the socket is not a directory; choose another path",
    errno.EEXIST: "a file that is not a socket is in the way; remove it or choose another path",
    errno.ENAMETOOLONG: "the path of a socket may have about 100 bytes; choose a shorter one",
    errno.EINVAL: "that is not an address; use tcp://127.0.0.1:PORT or ipc:///path/to/socket",
}


def _why(endpoint: str, error: OSError | zmq.ZMQError) -> str:
    reason = _REASONS.get(error.errno) or error.strerror or str(error)
    return f"cannot listen on {endpoint}: {reason}"
