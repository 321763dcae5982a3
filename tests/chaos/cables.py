"""The wires between clients and server, for the hand to cut.

Owns:    a relay from a TCP port to the shell and from a Unix socket to the core, in one thread.
Runs in: the chaos process.
Unaware: of what passes.
"""
from __future__ import annotations

import os
import random
import selectors
import socket
import threading
from typing import Any, Callable, Dict, List, Optional, Set

PIECE = 256 * 1024
BACKLOG = 4 * 1024 * 1024  # of bytes on their way in one direction, before no more are taken


class _End:
    """One end of a connection; what was read from its peer waits in `out`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock, self.out = sock, bytearray()
        self.peer: Optional[_End] = None


class Cables:
    """See the module. Connections are cut by `cut`, each with its bytes still on the way."""

    def __init__(self, directory: str, tcp: Callable[[], str], unix: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._tcp, self._unix = tcp, unix
        self._ends: Set[_End] = set()
        self._to_cut: List[float] = []
        self._over = False
        self._wake, wake = socket.socketpair()
        self._waker = wake
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        one = socket.create_server(("127.0.0.1", 0))
        two = socket.socket(socket.AF_UNIX)
        self.path = os.path.join(directory, "cable.sock")
        two.bind(self.path)
        two.listen(64)
        self._listeners: Dict[socket.socket, Callable[[], socket.socket]] = {one: self._to_shell, two: self._to_core}
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, listener)
        self.endpoint = "tcp://127.0.0.1:%d" % one.getsockname()[1]
        self.count = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self, share: float) -> None:
        """Cut about this share of the connections."""
        self._to_cut.append(share)
        self._waker.send(b"c")

    def close(self) -> None:
        """End the relay."""
        self._over = True
        self._waker.send(b"e")
        self._thread.join(10)
        for sock in (self._wake, self._waker, *self._listeners):
            sock.close()

    def _to_shell(self) -> socket.socket:
        host, _, port = self._tcp().rpartition("//")[2].rpartition(":")
        return socket.create_connection((host, int(port)), 2)

    def _to_core(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(2)
        try:
            sock.connect(self._unix)
        except OSError:
            sock.close()
            raise
        return sock

    def _run(self) -> None:
        dice = random.Random(1)
        while not self._over:
            for key, mask in self._selector.select(0.5):
                self._handle(key.data, mask)
            while self._to_cut:
                share = self._to_cut.pop()
                for end in [end for end in self._ends if dice.random() < share]:
                    self.count += end in self._ends
                    self._drop(end)
        for end in list(self._ends):
            self._drop(end)

    def _handle(self, what: Any, mask: int) -> None:
        if what is None:
            self._wake.recv(100)
        elif isinstance(what, socket.socket):
            self._accept(what)
        elif what in self._ends:
            try:
                self._move(what, mask)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(what)

    def _accept(self, listener: socket.socket) -> None:
        try:
            near = _End(listener.accept()[0])
        except OSError:
            return
        try:
            far = _End(self._listeners[listener]())
        except OSError:
            near.sock.close()
            return
        near.peer, far.peer = far, near
        for end in (near, far):
            self._ends.add(end)
            self._selector.register(end.sock, selectors.EVENT_READ, end)

    def _move(self, end: _End, mask: int) -> None:
        peer = end.peer
        assert peer is not None
        if mask & selectors.EVENT_WRITE and end.out:
            del end.out[:end.sock.send(end.out)]
        if mask & selectors.EVENT_READ:
            data = end.sock.recv(PIECE)
            if not data:
                raise ConnectionResetError
            peer.out += data
        for each in (end, peer):
            other = each.peer
            assert other is not None
            wanted = (selectors.EVENT_WRITE if each.out else 0) | (
                selectors.EVENT_READ if len(other.out) < BACKLOG else 0)
            self._selector.modify(each.sock, wanted or selectors.EVENT_READ, each)

    def _drop(self, end: _End) -> None:
        for each in (end, end.peer):
            if each is not None and each in self._ends:
                self._ends.discard(each)
                self._selector.unregister(each.sock)
                each.sock.close()
