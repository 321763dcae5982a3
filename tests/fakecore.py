"""A core that is not one: listens on a Unix socket, speaks both framings and answers as a test wants.

Owns:    `FakeCore` (the socket, one thread per connection) and what it heard.
Runs in: threads of the test process.
Unaware: of agents and of what a message means; the test's `handler` decides.
"""
from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any, Callable, Dict, List, Optional

from agentserver.core.framing import DEFERRED, PREFACE, FrameDecoder, LineDecoder, frame
from agentserver.wire import MAX_WIRE

Json = Dict[str, Any]
#: gets the message and its connection; returns the reply, or None for none
Handler = Callable[[bytes, "Connection"], Optional[bytes]]


def echo(raw: bytes, connection: "Connection") -> Optional[bytes]:
    """Answer any JSON object with its type and id, and anything else with a failure."""
    try:
        message = json.loads(raw)
        return json.dumps({"type": "echo", "request_id": message.get("request_id"), "success": True,
                           "was": message}).encode()
    except ValueError:
        return json.dumps({"type": "error_response", "request_id": None, "success": False,
                           "error": "not JSON", "error_code": "bad_request", "bytes": len(raw)}).encode()


class Connection:
    """One caller. `hello` is what a shell said of itself, `tag` that of the request being handled."""

    def __init__(self, core: FakeCore, sock: socket.socket) -> None:
        self.core, self.sock = core, sock
        self.hello: Json = {}
        self.header: Json = {}   # of the request being handled
        self.tag = 0
        self.framed = False
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Answer until the caller or the core is gone."""
        lines, frames = LineDecoder(MAX_WIRE), FrameDecoder(MAX_WIRE)
        try:
            while True:
                data = self.sock.recv(65536)
                if not data:
                    return
                if data.startswith(PREFACE):
                    self.framed, data = True, data[len(PREFACE):]
                if self.framed:
                    for tag, header, body in frames.feed(data):
                        self._framed(tag, header, body)
                else:
                    for line in lines.feed(data):
                        self._handle(line or b"")
        except OSError:
            pass
        finally:
            self.sock.close()

    def _framed(self, tag: int, header: bytes, body: bytes) -> None:
        if tag == 0:
            self.hello = json.loads(header)
            self.core.hellos.append(self.hello)
        else:
            self.tag, self.header = tag, json.loads(header)
            self._handle(body)

    def _handle(self, raw: bytes) -> None:
        self.core.heard.append(raw)
        reply = self.core.handler(raw, self)
        if reply is not None:
            self.reply(reply)

    def reply(self, raw: bytes, tag: Optional[int] = None) -> None:
        """Send a reply, to the request being handled unless told otherwise."""
        self._send(frame(self.tag if tag is None else tag, b"", raw) if self.framed else raw + b"\n")

    def defer(self) -> None:
        """Say that the reply to the request being handled comes later."""
        self._send(frame(self.tag, DEFERRED, b""))

    def push(self, message: Json) -> None:
        """Send an event."""
        body = json.dumps(message).encode()
        self._send(frame(0, message["topic"].encode(), body) if self.framed else body + b"\n")

    def _send(self, data: bytes) -> None:
        with self._sending:
            self.sock.sendall(data)

    def cut(self) -> None:
        """Break the connection."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class FakeCore:
    """Listens from birth to `close`; `heard` are all messages, `hellos` those of shells."""

    def __init__(self, path: str, handler: Handler = echo) -> None:
        self.path, self.handler = path, handler
        self.heard: List[bytes] = []
        self.hellos: List[Json] = []
        self.connections: List[Connection] = []
        self._threads: List[threading.Thread] = []
        if os.path.exists(path):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(16)
        self._start(self._accept)

    def __enter__(self) -> FakeCore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            connection = Connection(self, sock)
            self.connections.append(connection)
            self._start(connection.serve)

    def messages(self) -> List[Json]:
        """Return what was heard, as JSON."""
        return [json.loads(raw) for raw in list(self.heard)]

    def cut(self) -> None:
        """Break all connections."""
        for connection in list(self.connections):
            connection.cut()

    def close(self, crash: bool = False) -> None:
        """Stop listening and break all connections; a crash leaves the socket's file."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        if not crash and os.path.exists(self.path):
            os.unlink(self.path)
        self.cut()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10)
