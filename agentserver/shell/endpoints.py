"""Addresses, socket options and the shape of what the shell itself puts on the wire.

Owns:    options of all socket types, and at which address somebody is there.
Runs in: the thread that owns the socket.
Unaware: of agents and of the core.
"""
from __future__ import annotations

import errno
import re
import socket
import threading
import time
from typing import Any, Dict, List

import zmq

from .. import endpoint as places
from ..core.link import NotThere, dial
from ..errors import AgentServerError, LinkError
from ..messages import REQUESTS
from ..wire import MAX_WIRE, decode, encode

QUEUED_EVENTS = 1000       # for a subscriber at its own end; beyond it messages are dropped, which followers notice
QUEUED_REPLIES = 32        # for a client, in libzmq; more are kept by us, where they are counted in bytes (owed.py)
QUEUED_REQUESTS = 16       # of a client, in libzmq; more wait with it
_A_DAY_MS = 86_400_000
_QUEUED = 100              # at a client's end, each way
_SUBSCRIPTION_BYTES = 1024  # at most; who sends a longer one is cut off by libzmq
_LONGEST_SECS = 3600.0     # for a connection; no kernel tries as long
_UNREAD_MS = 60_000        # a subscriber of any kind that takes nothing for so long is let go of
_HANDSHAKE_MS = 5_000      # a peer that has not finished its handshake after so long is cut off by libzmq
_ZAP_DOMAIN = b"agentserver"
_READ_BYTES = 64 * 1024    # of a message that is refused here
_BEGIN_BYTES = 512
_PAIR = rb'\s*"(type|request_id)"\s*:\s*"([A-Za-z0-9_.:-]{1,128})"\s*'
_BEGIN = re.compile(rb"\s*\{" + _PAIR + b"," + _PAIR + b"[,}]")
Json = Dict[str, Any]


# ---------------------------------------------------------------- sockets

def _socket(context: zmq.Context[Any], kind: int, queued: int, largest: int) -> zmq.Socket[Any]:
    sock: zmq.Socket[Any] = context.socket(kind)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, queued)
    sock.setsockopt(zmq.RCVHWM, queued)
    sock.setsockopt(zmq.MAXMSGSIZE, largest)
    return sock


def _listening_socket(context: zmq.Context[Any], kind: int, queued: int, largest: int) -> zmq.Socket[Any]:
    """Return a socket that may listen: only for peers of ZMTP 3, each of whom libzmq asks about (zap.py)."""
    sock = _socket(context, kind, queued, largest)
    sock.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
    if zmq.zmq_version_info() >= (4, 3):  # before, a domain alone made libzmq ask
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    return sock


def router_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return the server's request socket; libzmq cuts off a peer that sends a frame of more than `MAX_WIRE`. It tells
    of a reply that cannot be sent."""
    sock = _listening_socket(context, zmq.ROUTER, QUEUED_REPLIES, MAX_WIRE)
    sock.setsockopt(zmq.RCVHWM, QUEUED_REQUESTS)
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return sock


def xpub_socket(context: zmq.Context[Any], queued: int) -> zmq.Socket[Any]:
    """Return the server's publishing socket, which keeps at most `queued` messages for each subscriber and drops
    what is more. It tells every join, so that each can be answered."""
    sock = _listening_socket(context, zmq.XPUB, queued, _SUBSCRIPTION_BYTES)
    sock.setsockopt(zmq.RCVHWM, 1)  # or libzmq takes subscriptions as long as they come, and lets us do nothing else
    sock.setsockopt(zmq.XPUB_VERBOSE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _UNREAD_MS // 1000)
    sock.setsockopt(zmq.TCP_MAXRT, _UNREAD_MS)
    return sock


def req_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return a client's request socket, in which a late reply cannot be taken for the next one."""
    sock = _socket(context, zmq.REQ, _QUEUED, MAX_WIRE)
    sock.setsockopt(zmq.REQ_RELAXED, 1)
    sock.setsockopt(zmq.REQ_CORRELATE, 1)
    return sock


def dealer_socket(context: zmq.Context[Any]) -> zmq.Socket[Any]:
    """Return the request socket of a client that asks for several things at once."""
    return _socket(context, zmq.DEALER, _QUEUED, MAX_WIRE)


def sub_socket(context: zmq.Context[Any], queued: int = QUEUED_EVENTS) -> zmq.Socket[Any]:
    """Return a client's listening socket, for one connection: when that is lost, it is to be replaced.

    libzmq (4.3.5 and before) aborts the process when a connection is made anew below a queue that was full: its
    issue 3937. So it may not do that by itself, and must not use heartbeats of its own, which cut such a connection. It
    waits for a day instead: told not to at all (-1), libzmq drops what was received and is not read yet, and aborts (an
    assertion in fq.cpp) where that is the second frame of a message.
    Subscriptions beyond its SNDHWM would be dropped in silence, so it has none: they are as many as we make.
    """
    sock = _socket(context, zmq.SUB, queued, MAX_WIRE)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RECONNECT_IVL, _A_DAY_MS)
    return sock


def connection_of(frame: zmq.Frame) -> int:
    """Return the descriptor of the connection that a message came over, -1 where libzmq does not tell."""
    try:
        return int(frame.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError):
        return -1


# ---------------------------------------------------------------- clients: is anybody there?

def probe(endpoint: str, timeout: float) -> str:
    """Return the numeric address at which somebody accepts a connection; raise `LinkError` where nobody does.

    A ZeroMQ socket alone would wait in silence, and it tries only the first of a name's addresses.
    """
    try:
        if endpoint.startswith("ipc://"):
            dial(endpoint[6:]).close()
            return endpoint
        return _answering(places.tcp(endpoint[6:]), time.monotonic() + min(max(timeout, 0.01), _LONGEST_SECS))
    except socket.gaierror as e:
        raise NotThere(f"the host of {endpoint} is not known ({e.strerror})") from None
    except ValueError as e:
        raise NotThere(f"{endpoint} is not an address: {e}") from None
    except NotThere as e:
        raise NotThere(str(e).replace(endpoint[6:], endpoint, 1)) from None
    except LinkError as e:
        raise LinkError(str(e).replace(endpoint[6:], endpoint, 1)) from None
    except OSError as e:
        raise LinkError(f"no server answers at {endpoint} ({e.strerror or e}); "
                        "start one with: agentserver serve") from None


def _answering(place: places.Tcp, deadline: float) -> str:
    """Return the first of a host's addresses that accepts a connection; raise the last error."""
    failed: OSError = socket.gaierror(socket.EAI_NONAME, "it has no address")
    for family, kind, protocol, _name, address in _looked_up(place, deadline):
        try:
            with socket.socket(family, kind, protocol) as caller:
                caller.settimeout(max(deadline - time.monotonic(), 0.01))
                caller.connect(address)
        except OSError as e:
            failed = e
            continue
        scope = f"%{address[3]}" if len(address) > 3 and address[3] else ""
        return str(places.Tcp(address[0].partition("%")[0] + scope, place.port))
    raise failed


def _looked_up(place: places.Tcp, deadline: float) -> List[Any]:
    """Return what getaddrinfo(3) knows of a host. It has no deadline of its own, so it is left behind at ours."""
    found: List[Any] = []

    def look(flags: int) -> None:
        try:
            found.append(socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=flags))
        except (OSError, UnicodeError) as e:
            found.append(e)
    look(socket.AI_NUMERICHOST)
    if not isinstance(found[-1], list):
        found.clear()
        asker = threading.Thread(target=look, args=(0,), name="getaddrinfo", daemon=True)
        asker.start()
        asker.join(max(deadline - time.monotonic(), 0.01))
    if not found:
        raise TimeoutError(errno.ETIMEDOUT, "its name was not looked up in time")
    if isinstance(found[-1], UnicodeError):
        raise ValueError(f"{place.host!r} is no name of a host")
    if isinstance(found[-1], OSError):
        raise found[-1]
    addresses: List[Any] = found[-1]
    return addresses


def connected(sock: zmq.Socket[Any], endpoint: str) -> zmq.Socket[Any]:
    """Connect a client's socket and return it, or close it and say why not."""
    try:
        reach(sock, endpoint)
        sock.connect(endpoint)
    except zmq.ZMQError as e:
        sock.close()
        raise LinkError(f"cannot connect to {endpoint}: {e.strerror}") from None
    return sock


def reach(sock: zmq.Socket[Any], endpoint: str) -> None:
    """Let a socket use IPv6 where its endpoint does: libzmq's sockets are for IPv4 only, unless they are told."""
    if endpoint.startswith("tcp://["):
        sock.setsockopt(zmq.IPV6, 1)


# ---------------------------------------------------------------- replies

def failed_reply(raw: bytes, code: str, sentence: str, **more: Any) -> bytes:
    """Return the refusal of a message that did not reach the core, of the message's own type where it has one. A large
    message is not read for that: it would take longer than to do what it asks for."""
    kind, request_id = "error_response", None
    try:
        message = decode(raw) if len(raw) <= _READ_BYTES else _begin_of(raw)
        given = message.get("request_id")
        request_id = given if isinstance(given, str) and 1 <= len(given) <= 128 else None
        asked = REQUESTS.get(message.get("type"))  # type: ignore[arg-type]
        kind = asked.reply if asked else kind
    except (AgentServerError, TypeError):  # TypeError: a type that is a list cannot be looked up
        pass
    return encode({"type": kind, "request_id": request_id, "success": False, "error": sentence, "error_code": code,
                   **more})


def _begin_of(raw: bytes) -> Json:
    """Return `type` and `request_id` if the message begins with them, in either order, as our clients' do."""
    found = _BEGIN.match(raw[:_BEGIN_BYTES])
    pairs = found.groups() if found else ()
    return {name.decode(): value.decode() for name, value in zip(pairs[::2], pairs[1::2])}
