"""Addresses, socket options and the shape of what the shell itself puts on the wire.

Owns:    binding with clear errors, the file of an `ipc://` socket, options of all four socket types.
Runs in: the thread that owns the socket.
Unaware: of agents, of the core, and of which endpoints are allowed (config decides that).
"""
from __future__ import annotations

import errno
import os
import socket
import stat
import time
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import zmq

from ..core.link import NotThere, dial
from ..errors import AgentServerError, LinkError, StartError
from ..messages import REQUESTS
from ..wire import MAX_WIRE, decode, encode

QUEUED_EVENTS = 1000       # for a subscriber at its own end; beyond it messages are dropped, which followers notice
_QUEUED_REPLIES = 100      # per peer; a REQ peer has one outstanding
_SUBSCRIPTION_BYTES = 1024  # at most; who sends a longer one is cut off by libzmq
_UNREAD_MS = 60_000        # a subscriber of any kind that takes nothing for so long is let go of


# ---------------------------------------------------------------- sockets

def _socket(context: zmq.Context[Any], kind: int, queued: int, largest: int) -> zmq.Socket[Any]:
    sock: zmq.Socket[Any] = context.socket(kind)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, queued)
    sock.setsockopt(zmq.RCVHWM, queued)
    sock.setsockopt(zmq.MAXMSGSIZE, largest)
    return sock


def rep_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return the server's request socket; libzmq cuts off a peer that sends more than `MAX_WIRE`."""
    return _socket(context, zmq.REP, _QUEUED_REPLIES, MAX_WIRE)


def xpub_socket(context: zmq.Context[Any], queued: int) -> zmq.Socket[Any]:
    """Return the server's publishing socket, which keeps at most `queued` messages for each subscriber and drops
    what is more. It tells every join, so that each can be answered."""
    sock = _socket(context, zmq.XPUB, queued, _SUBSCRIPTION_BYTES)
    sock.setsockopt(zmq.RCVHWM, 1)  # or libzmq takes subscriptions as long as they come, and lets us do nothing else
    sock.setsockopt(zmq.XPUB_VERBOSE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _UNREAD_MS // 1000)
    sock.setsockopt(zmq.TCP_MAXRT, _UNREAD_MS)
    return sock


def req_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return a client's request socket, in which a late reply cannot be taken for the next one."""
    sock = _socket(context, zmq.REQ, _QUEUED_REPLIES, MAX_WIRE)
    sock.setsockopt(zmq.REQ_RELAXED, 1)
    sock.setsockopt(zmq.REQ_CORRELATE, 1)
    return sock


def dealer_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return the request socket of a client that asks for several things at once."""
    return _socket(context, zmq.DEALER, _QUEUED_REPLIES, MAX_WIRE)


def sub_socket(context: zmq.Context[Any], queued: int = QUEUED_EVENTS) -> zmq.Socket[Any]:
    """Return a client's listening socket, for one connection: when that is lost, it is to be replaced.

    libzmq (4.3.5 and before) aborts the process when a connection is made anew below a queue that was full: its
    issue 3937. So it may not do that by itself, and must not use heartbeats of its own, which cut such a connection.
    Subscriptions beyond its SNDHWM would be dropped in silence, so it has none: they are as many as we make.
    """
    sock = _socket(context, zmq.SUB, queued, MAX_WIRE)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RECONNECT_IVL, -1)
    return sock


def connection_of(frame: zmq.Frame) -> int:
    """Return the descriptor of the connection that a message came over, -1 where libzmq does not tell."""
    try:
        return int(frame.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError):
        return -1


# ---------------------------------------------------------------- binding

@dataclass(frozen=True)
class Bound:
    """A bound address; `release` removes the file of an `ipc://` socket if it is still ours."""

    endpoint: str
    path: str = ""
    identity: Tuple[int, int] = (0, 0)

    def release(self) -> None:
        """Call after the socket was closed."""
        try:
            if self.path and _identity(self.path) == self.identity:
                os.unlink(self.path)
        except OSError:
            pass


def bind(sock: zmq.Socket[Any], endpoint: str, patience_secs: float = 0.0) -> Bound:
    """Bind and return the real address (port 0 becomes a port); raise `StartError` with a clear sentence.

    `patience_secs`: how long to try again while the address is in use, for a successor of a process that just died.
    """
    deadline = time.monotonic() + patience_secs
    while True:
        try:
            return _bind_ipc(sock, endpoint) if _is_file(endpoint) else _bind_tcp(sock, endpoint)
        except (OSError, zmq.ZMQError) as e:
            if e.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise StartError(_why(endpoint, e)) from None
        time.sleep(0.05)


def _is_file(endpoint: str) -> bool:
    return endpoint.startswith("ipc://") and endpoint[6:7] not in ("@", "*", "")


def _bind_tcp(sock: zmq.Socket[Any], endpoint: str) -> Bound:
    if "[" in endpoint:  # else the real endpoint would be told as an IPv6 one that maps IPv4
        sock.setsockopt(zmq.IPV6, 1)
    # bind(2) wants an address, not a name
    sock.bind(endpoint.replace("tcp://localhost:", "tcp://127.0.0.1:", 1))
    real = sock.getsockopt(zmq.LAST_ENDPOINT)
    return Bound(real.decode().rstrip("\0") if isinstance(real, bytes) else endpoint)


def _bind_ipc(sock: zmq.Socket[Any], endpoint: str) -> Bound:
    """Make the listening socket ourselves: libzmq would delete whatever lies at the path, also a live server's."""
    path = os.path.abspath(endpoint[6:])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # Linux gives the file this mode from its first moment
        begin = _free_name(path)
        _listen(listener, begin)
        os.rename(begin, path)
        listener.setblocking(False)
        bound = Bound("ipc://" + path, path, _identity(path))
        sock.setsockopt(zmq.USE_FD, listener.fileno())
        sock.bind(bound.endpoint)
        listener.detach()     # libzmq closes it from now on
        return bound
    finally:
        listener.close()


def _free_name(path: str) -> str:
    """Return `path`; where a dead socket lies there, a name beside it, to be put in its place when it listens: so that
    there is one at any moment, for whoever looks."""
    if not _is_stale(path):
        return path
    if _is_stale(path + "~"):
        os.unlink(path + "~")
    return path + "~"


def _listen(listener: socket.socket, path: str) -> None:
    try:
        listener.bind(path)
    except OSError as e:
        raise OSError(e.errno or errno.ENAMETOOLONG, e.strerror or str(e)) from None
    os.chmod(path, 0o600)
    listener.listen(128)


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


def _identity(path: str) -> Tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


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
    errno.EPROTONOSUPPORT: "that is not a supported kind of address; use tcp://127.0.0.1:PORT or ipc:///path/to/socket",
}


def _why(endpoint: str, error: OSError | zmq.ZMQError) -> str:
    reason = _REASONS.get(error.errno) or error.strerror or str(error)
    return f"cannot listen on {endpoint}: {reason}"


# ---------------------------------------------------------------- clients: is anybody there?

def probe(endpoint: str, timeout: float) -> None:
    """Raise `LinkError` unless somebody accepts a connection: a ZeroMQ socket alone would wait in silence."""
    try:
        if _is_file(endpoint):
            return dial(endpoint[6:]).close()
        if endpoint.startswith("tcp://"):
            host, _, port = endpoint[6:].rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), max(timeout, 0.01)).close()
    except socket.gaierror as e:
        raise NotThere(f"the host of {endpoint} is not known ({e.strerror})") from None
    except (ValueError, OverflowError):
        raise NotThere(f"{endpoint} is not an address; it looks like tcp://127.0.0.1:5555") from None
    except NotThere as e:
        raise NotThere(str(e).replace(endpoint[6:], endpoint, 1)) from None
    except LinkError as e:
        raise LinkError(str(e).replace(endpoint[6:], endpoint, 1)) from None
    except OSError as e:
        raise LinkError(f"no server answers at {endpoint} ({e.strerror or e}); "
                        "start one with: agentserver serve") from None


def connected(sock: zmq.Socket[Any], endpoint: str) -> zmq.Socket[Any]:
    """Connect a client's socket and return it, or close it and say why not."""
    try:
        sock.connect(endpoint)
    except zmq.ZMQError as e:
        sock.close()
        raise LinkError(f"cannot connect to {endpoint}: {e.strerror}") from None
    return sock


# ---------------------------------------------------------------- replies

def failed_reply(raw: bytes, code: str, sentence: str) -> bytes:
    """Return the refusal of a message that did not reach the core, of the message's own type where it has one."""
    kind, request_id = "error_response", None
    try:
        message = decode(raw)
        given = message.get("request_id")
        request_id = given if isinstance(given, str) and 1 <= len(given) <= 128 else None
        asked = REQUESTS.get(message.get("type"))  # type: ignore[arg-type]
        kind = asked.reply if asked else kind
    except (AgentServerError, TypeError):  # TypeError: a type that is a list cannot be looked up
        pass
    return encode({"type": kind, "request_id": request_id, "success": False, "error": sentence, "error_code": code})
