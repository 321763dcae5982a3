"""Who may come in: libzmq asks before each handshake, and this answers (ZAP, rfc.zeromq.org/spec/27).

Owns:    the socket that libzmq asks, one for each context, and the answer. Everybody is accepted for now. It also hears
         which connections came and went, on the sockets that it is given to watch.
Runs in: a thread of its own: handshakes go on while the other threads are busy. It never waits for them.
Unaware: of requests, agents and the core.

That somebody answers is what matters. A socket for which libzmq has nobody to ask serves peers of ZMTP 1.0 and 2.0 too,
and ZMTP 1.0 begins without a greeting: the bytes of an HTTP POST, which any web page can make a browser send, are then
frames, and a body made for it ends in a request. Where libzmq has to ask, it serves ZMTP 3 only. A peer's `User-Id` is
what we answer, never what the peer says of itself.
"""
from __future__ import annotations

import select
import socket
import sys
import threading
from typing import Any, List, Optional

import zmq

from .connections import Connections
from .descriptors import Descriptors

_ADDRESS = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_ASKED_FRAMES = 8          # of a question at least, with those of the ROUTER and the empty one
_AGAIN_MS = 50             # after a failure of our own


class Zap:
    """Answer libzmq's questions about the sockets of one context, from before one of them listens until `close`."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._asked: zmq.Socket[Any] = context.socket(zmq.ROUTER)
        self._asked.setsockopt(zmq.LINGER, 0)
        self._asked.bind(_ADDRESS)
        self._asked_fd = int(self._asked.getsockopt(zmq.FD))
        self._watched: List[Connections] = []
        self._descriptors: Optional[Descriptors] = None
        self._wake, self._waker = socket.socketpair()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="zap", daemon=True)
        self._thread.start()

    def watch(self, connections: Connections) -> None:
        """Hear of these connections, too. From any thread, as everything here."""
        self._watched = [*self._watched, connections]
        self._waker.send(b"x")

    def unwatch(self, connections: Connections) -> None:
        """Do not any more; call before they are closed."""
        self._watched = [watched for watched in self._watched if watched is not connections]
        self._waker.send(b"x")

    def bound_connections(self) -> None:
        """From now on there may be as many as there are descriptors. Call when all that we need ourselves is open."""
        self._descriptors = Descriptors(self._watched)

    def close(self) -> None:
        """End the thread; returns when its socket is closed. Call after all that listen were closed."""
        self._closing = True
        self._waker.close()
        self._thread.join()
        self._wake.close()

    def _main(self) -> None:
        while not self._closing:
            try:
                self._serve()
            except Exception as e:  # what one peer brought about must not keep the others out
                sys.stderr.write(f"a handshake could not be answered: {type(e).__name__}: {e}\n")
                self._pause()
        self._asked.close()

    def _serve(self) -> None:
        """Work until there is something else to watch. libzmq's descriptors tell only of what comes after nothing was
        left, so all is taken each time."""
        watched = self._watched
        poll = select.poll()
        for fd in [self._wake.fileno(), self._asked_fd, *(connections.monitor_fd for connections in watched)]:
            poll.register(fd, select.POLLIN)
        while True:
            while self._answer():
                pass
            for connections in watched:
                connections.hear()
            if self._descriptors is not None:
                self._descriptors.make_room()
            if any(fd == self._wake.fileno() for fd, _events in poll.poll()):
                self._wake.recv(4096)
                return

    def _answer(self) -> bool:
        """Answer one question; return whether there was one."""
        try:
            frames: List[bytes] = self._asked.recv_multipart(zmq.NOBLOCK)
            reply = answer(frames)
            if reply is not None:
                self._asked.send_multipart(reply, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _pause(self) -> None:
        waiter = select.poll()
        waiter.register(self._wake, select.POLLIN)
        waiter.poll(_AGAIN_MS)


def answer(frames: List[bytes]) -> List[bytes] | None:
    """Return the reply to one question, which accepts whoever it is about; `None` where there is no question; pure."""
    if len(frames) < _ASKED_FRAMES or frames[1] or frames[2] != _VERSION:
        return None
    asker, request_id = frames[0], frames[3]
    return [asker, b"", _VERSION, request_id, b"200", b"OK", b"", b""]
