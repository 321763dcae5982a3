"""The raw limits of telling somebody what a process prints: a pipe, a PUB socket, a SUB socket.

Owns:    the bases of following. Each is a loop in a process of its own (`python publishing.py relay …`), and the
         function here that listens to it.
Runs in: the benchmark process, and the loops' own.
Unaware: of agentserver.
"""
from __future__ import annotations

import json
import os
import selectors
import sys
import time
from typing import Callable, Dict, List, Sequence

from bare import CHUNK, Served, discard, popen, scratch
from printing import clock


def _xpub(nodrop: bool = False) -> "zmq.Socket[bytes]":  # noqa: F821
    """Return a socket that publishes; say where, and wait for the first subscriber with `recv`."""
    import zmq
    socket = zmq.Context.instance().socket(zmq.XPUB)
    socket.setsockopt(zmq.XPUB_NODROP, nodrop)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    return socket


def _sub(endpoint: str) -> "zmq.Socket[bytes]":  # noqa: F821
    import zmq
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, 60_000)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    return socket


# ---------------------------------------------------------------- how soon

def relay(lines: str, pause: str, others: str, other_pause: str) -> None:
    """Read one child's lines and publish each. What others print meanwhile is read too, and goes nowhere."""
    socket = _xpub()
    socket.recv()
    children = [popen(clock(1_000_000, float(other_pause))) for _ in range(int(others))]
    children.append(popen(clock(int(lines), float(pause))))
    with selectors.DefaultSelector() as selector:
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.close()
            child.stdin = None
            selector.register(child.stdout, selectors.EVENT_READ)
        last = children[-1].stdout
        while selector.get_map() and last in selector.get_map():
            for key, _mask in selector.select():
                data = os.read(key.fd, CHUNK)
                if not data:
                    selector.unregister(key.fd)
                elif key.fileobj is last:
                    socket.send_multipart([b"topic", data])
    discard(children)
    sys.stdin.read()


def ages(endpoint: str, count: int) -> List[float]:
    """Return how many seconds old the lines of a `relay` were when they were heard."""
    socket, found = _sub(endpoint), []
    while len(found) < count:
        data = socket.recv_multipart()[1]
        heard = time.monotonic_ns()
        found += [(heard - int(line)) / 1e9 for line in data.split()]
    socket.close()
    return found


# ---------------------------------------------------------------- how much

def pour(command: str) -> None:
    """Publish all that a child prints, to a subscriber that takes all."""
    socket = _xpub(nodrop=True)
    socket.recv()
    child = popen(json.loads(command))
    assert child.stdin is not None and child.stdout is not None
    child.stdin.close()
    child.stdin = None
    while data := os.read(child.stdout.fileno(), CHUNK):
        socket.send_multipart([b"topic", data])
    child.communicate()
    sys.stdin.read()


def poured(command: Sequence[str], size: int) -> float:
    """Return the bytes a second that come out of a `pour`."""
    with Served("publishing", "pour", json.dumps(list(command))) as endpoint:
        socket = _sub(endpoint)
        taken = len(socket.recv_multipart()[1])
        began = time.monotonic()
        while taken < size:
            taken += len(socket.recv_multipart()[1])
        secs = time.monotonic() - began
        socket.close()
    return taken / secs


# ---------------------------------------------------------------- how many

def shout(count: str, subscribers: str) -> None:
    """Publish so many messages of the size that a line makes, to subscribers that all take all."""
    socket = _xpub(nodrop=True)
    for _ in range(int(subscribers)):
        socket.recv()
    for _ in range(int(count)):
        socket.send_multipart([b"topic", json.dumps({"data": "x" * 100, "more": "y" * 250}).encode()])
    sys.stdin.read()


def shouted(count: int, subscribers: int) -> float:
    """Return how many messages a second reach subscribers in this process, which parse them."""
    with Served("publishing", "shout", str(count), str(subscribers)) as endpoint:
        sockets = [_sub(endpoint) for _ in range(subscribers)]
        sockets[0].poll(60_000)
        began = time.monotonic()
        for _ in range(count):
            for socket in sockets:
                json.loads(socket.recv_multipart()[1])
        secs = time.monotonic() - began
        for socket in sockets:
            socket.close()
    return count * subscribers / secs


# ---------------------------------------------------------------- what has been

def replayed(count: int) -> float:
    """Return the seconds to take so many events from sqlite as JSON, put them into one message and parse it."""
    import sqlite3
    event = json.dumps({"type": "status_update", "topic": "status.12345678-1234-4234-8234-123456789abc",
                        "agent_id": "12345678-1234-4234-8234-123456789abc", "update_type": "status_changed",
                        "status": "paused", "message": "paused: the whole tree got SIGSTOP", "data": {},
                        "timestamp": "2026-01-31T12:00:00.123456Z", "sequence": 12345})
    with scratch() as directory:
        db = sqlite3.connect(directory / "events.db")
        db.execute("CREATE TABLE events (sequence INTEGER PRIMARY KEY, message TEXT)")
        db.executemany("INSERT INTO events VALUES (?, ?)", ((n, event) for n in range(count)))
        db.commit()
        began = time.monotonic()
        rows = db.execute("SELECT message FROM events ORDER BY sequence").fetchall()
        json.loads("[" + ",".join(row[0] for row in rows) + "]")
        secs = time.monotonic() - began
        db.close()
    return secs


LOOPS: Dict[str, Callable[..., None]] = {"relay": relay, "pour": pour, "shout": shout}

if __name__ == "__main__":
    LOOPS[sys.argv[1]](*sys.argv[2:])
