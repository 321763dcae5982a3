"""The connections of one listening socket: which there are, what they have sent, and which of them cost too much.

Owns:    the table of a socket's connections, its monitor (libzmq's word for who tells of them), and two bounds: on what
         connections have sent of messages that are not whole, and on the process's memory while they do.
Runs in: `hear` in any thread; everything else in the thread that owns the listening socket.
Unaware: of what is sent. Descriptors are bounded for all sockets together in descriptors.py.

A message that is not whole is in libzmq's memory, and nothing tells of it: its parts may have no end, and an empty one
takes 32 times as much there as on the wire. But the kernel counts what each connection has sent (tcp(7), TCP_INFO), and
we count what came whole. The difference is judged while anything arrives, ten times a second; an idle server is not
woken.
"""
from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import zmq

from ..wire import MAX_WIRE
from .cutting import Cutter, number

INFINITE = float("inf")
LOOK_SECS = 0.1                            # between two looks at what arrives
UNWHOLE_MOST = MAX_WIRE + 1024 * 1024      # bytes of one connection's message that is not whole; beyond, it is cut off
ALL_UNWHOLE_MOST = 128 * 1024 * 1024       # the same for all connections of a socket; the largest is cut off
GROWTH_MOST = 64 * 1024 * 1024             # of the process beyond what is accounted for, while such messages are there
GUEST_GROWTH_MOST = 512 * 1024 * 1024      # the same in a program of somebody's, which may grow for its own reasons
_SUSPICIOUS = 4 * 1024                     # bytes; less is not looked at: handshakes, heartbeats
_FORGIVEN = 100                            # bytes a second: a client may send heartbeats for as long as it likes
_DEAREST = 32                              # bytes of memory that a byte on the wire can take
_AT_ONCE = 256                             # events of the kernel
_EVENT = struct.Struct("=HI")              # of libzmq: number and value, which is the descriptor
_RECEIVED = struct.Struct("=128xQ")        # tcpi_bytes_received in struct tcp_info (linux/tcp.h)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Connection:
    """One connection. `whole`: bytes of messages that came whole; `heard`: when the last one did, 0.0: none yet;
    `unwhole`: bytes that came beside, when they were last looked at."""

    __slots__ = ("client", "fd", "heard", "identity", "number", "serial", "since", "unwhole", "whole")

    def __init__(self, fd: int, serial: int) -> None:
        self.fd, self.number, self.serial = fd, number(fd), serial
        self.since, self.heard, self.whole, self.unwhole = time.monotonic(), 0.0, 0, 0
        self.identity: bytes | None = None
        self.client: Any = None     # what the owner of the socket keeps for it


class Connections:
    """See the module."""

    def __init__(self, context: zmq.Context[Any], sock: zmq.Socket[Any], cutter: Cutter, alone: bool) -> None:
        """Before the socket listens, so that no connection is missed. `alone`: this process does nothing else."""
        self._sock, self._cutter = sock, cutter
        self._growth_most = GROWTH_MOST if alone else GUEST_GROWTH_MOST
        address = f"inproc://connections-{id(self):x}"
        sock.monitor(address, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._monitor: zmq.Socket[Any] = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # or libzmq would wait for us, and everybody for it
        self._monitor.connect(address)
        self.monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._lock = threading.Lock()
        self._table: dict[int, Connection] = {}
        self._serial = 0
        self._traffic = select.epoll() if hasattr(select, "epoll") else None
        self._active: set[int] = set()
        self._suspects: set[Connection] = set()
        self.look_at = INFINITE     # when `measure` is due (monotonic); infinite while nothing has arrived
        self._statm = _statm()
        self._calm = self._resident()

    def close(self) -> None:
        """In the thread of the socket, before that is closed."""
        self._sock.disable_monitor()
        with self._lock:
            self._monitor.close()
        if self._traffic is not None:
            self._traffic.close()
        if self._statm >= 0:
            os.close(self._statm)

    # ------------------------------------------------------------ who is there

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._table.values()))

    def hear(self) -> None:
        """Take in what libzmq told of connections that came and went."""
        with self._lock:
            while not self._monitor.closed:
                try:
                    event, fd = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
                except zmq.Again:
                    return
                if event == zmq.EVENT_ACCEPTED:
                    self._opened(fd)
                elif event == zmq.EVENT_DISCONNECTED:
                    self._table.pop(fd, None)

    def _opened(self, fd: int) -> Connection:
        self._serial += 1
        connection = self._table[fd] = Connection(fd, self._serial)
        if self._traffic is not None and fd >= 0:
            try:
                self._traffic.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
            except OSError:
                pass  # it has gone already, and its end is told next
        return connection

    def sent(self, fd: int, identity: bytes, size: int, now: float) -> Connection:
        """Return the connection that a whole message came over, and count that."""
        connection = self._table.get(fd)
        if connection is None or connection.identity != identity or size > _SUSPICIOUS:
            connection = self._known(fd, identity)
        connection.heard, connection.whole = now, connection.whole + size
        return connection

    def _known(self, fd: int, identity: bytes) -> Connection:
        """The number of a descriptor is used again: hear first whose it is now. What comes over a connection comes
        after what libzmq told of its beginning."""
        self.hear()
        connection = self._table.get(fd)
        if connection is None or connection.identity not in (None, identity):  # -1: libzmq does not tell
            connection = self._opened(fd)
        connection.identity = identity
        return connection

    def cut(self, connection: Connection) -> None:
        """Cut a connection off; libzmq tells when it has gone."""
        self._cutter.cut(connection.fd, connection.number)

    # ------------------------------------------------------------ what arrives

    @property
    def traffic_fd(self) -> int:
        """Readable when something has arrived since the last look; -1 where the system cannot tell."""
        return self._traffic.fileno() if self._traffic is not None else -1

    def arrived(self) -> None:
        """Note what has; it is looked at soon, once for all that comes until then."""
        assert self._traffic is not None
        self._active.update(fd for fd, _events in self._traffic.poll(0, _AT_ONCE))
        self.look_at = min(self.look_at, time.monotonic() + LOOK_SECS)

    def measure(self) -> list[tuple[Connection, int]]:
        """Return, of each connection over which something arrived, how many bytes libzmq has taken from it. Receive
        what is whole, and only then `judge` the rest."""
        self.look_at = INFINITE
        fds, self._active = self._active, set()
        self.hear()
        taken = []
        for fd in fds:
            connection = self._table.get(fd)
            if connection is not None:
                self._watch_again(fd)
                taken.append((connection, _taken(connection)))
        return taken

    def _watch_again(self, fd: int) -> None:
        assert self._traffic is not None
        try:
            self._traffic.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
        except OSError:
            pass  # it has gone

    def judge(self, taken: list[tuple[Connection, int]], accounted: int = 0) -> None:
        """Cut off who keeps too much that is not whole. Only right after the socket had nothing more to receive.
        `accounted`: bytes of memory that are known to be taken by something else."""
        for connection, bytes_ in taken:
            connection.unwhole = bytes_ - connection.whole
            if connection.unwhole > _SUSPICIOUS:
                self._suspects.add(connection)
        self._suspects = {connection for connection in self._suspects if connection.unwhole > _SUSPICIOUS
                          and self._table.get(connection.fd) is connection}
        resident = self._resident()
        if self._suspects:
            self._cut_some(resident - self._calm - accounted)
        else:
            self._calm = max(resident - accounted, 0)

    def _cut_some(self, grown: int) -> None:
        """`grown`: by how many bytes the process did, while there are suspects. A part of a message that is one frame
        takes what it takes on the wire; what goes beyond twice that is memory for parts without end."""
        now = time.monotonic()
        total = sum(connection.unwhole for connection in self._suspects)
        strange = grown - 2 * total > self._growth_most
        for connection in sorted(self._suspects, key=lambda connection: -connection.unwhole):
            size = connection.unwhole
            if size - _FORGIVEN * (now - connection.since) > UNWHOLE_MOST or total > ALL_UNWHOLE_MOST \
                    or (strange and total * _DEAREST > self._growth_most):
                self.cut(connection)
                total -= size

    def unfinished(self, within: float) -> bool:
        """Whether something is arriving just now: over a connection that began or sent a message within so many
        seconds, there is more in the kernel."""
        now = time.monotonic()
        return any(_unread(connection.fd) for connection in self
                   if now - max(connection.heard, connection.since) < within)

    def cork(self, connection: Connection) -> None:
        """Let what is sent over a connection leave together with its end (tcp(7), TCP_CORK): a client that has its last
        reply shall know at once that it has to ask elsewhere. Held back for 200 ms at most."""
        if hasattr(socket, "TCP_CORK"):
            with suppress(OSError), _lent(connection) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)

    def _resident(self) -> int:
        return int(os.pread(self._statm, 100, 0).split()[1]) * _PAGE if self._statm >= 0 else 0


def _statm() -> int:
    """Return a descriptor that tells how much memory the process has (proc(5)), -1 where there is none."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _taken(connection: Connection) -> int:
    """Return how many bytes libzmq has taken from a connection; 0 where the kernel does not tell, as for `ipc://`."""
    try:
        with _lent(connection) as sock:
            if sock.family == socket.AF_UNIX:
                return 0
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size)
            received: int = _RECEIVED.unpack(info)[0]
            left = received - _unread(connection.fd)  # in this order: what comes meanwhile makes it less, not more
            return left if number(connection.fd) == connection.number else 0
    except (OSError, struct.error):  # it has gone, or an older kernel
        return 0


@contextmanager
def _lent(connection: Connection) -> Iterator[socket.socket]:
    """Give libzmq's socket of a connection for a moment; `OSError` when it has gone."""
    sock = socket.socket(fileno=connection.fd)
    try:
        yield sock
    finally:
        sock.detach()


def _unread(fd: int) -> int:
    """Return how many bytes the kernel holds that libzmq has not taken yet."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError:
        return 0
