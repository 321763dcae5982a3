"""The shell as a process of the keeper: the same front, ended by the keeper's word.

Owns:    the channel to the keeper.
Runs in: the `_shell` process, main thread.
Unaware: of why it was started, or started again.
"""
from __future__ import annotations

import json
import signal
import socket
import sys
from typing import Any, Dict, List

from ..core.framing import LineDecoder
from ..errors import AgentServerError, LinkError
from ..wire import MAX_WIRE, encode
from .server import Front, ShellLock

Json = Dict[str, Any]

_ORPHAN_SECS = 5.0     # without a keeper and without a core for so long, there is nothing left to serve
_REBIND_SECS = 3.0     # for the address of a shell that has just died


class Channel:
    """The owner of a loop whose keeper decides: ends on its word, or when keeper and core are both gone."""

    closing = False    # the keeper asks the core to end, not we

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = LineDecoder(MAX_WIRE)
        self._never, self._kept = socket.socketpair()  # what to watch when there is no keeper any more
        self._stopped = False
        self._orphan = False
        self.wake_fd = sock.fileno()
        sock.setblocking(True)

    def hello(self) -> Json:
        """Return the keeper's first line; raise `LinkError` if there is none."""
        lines: List[Json] = []
        while not lines and not self._orphan:
            lines = self._read()
        if not lines:
            raise LinkError("the keeper went away before it said anything")
        self._sock.setblocking(False)
        self._hear(lines[1:])
        return lines[0]

    def _read(self) -> List[Json]:
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._orphan = True
            self.wake_fd = self._never.fileno()
        return [json.loads(line) for line in self._decoder.feed(data) if line]

    def _hear(self, lines: List[Json]) -> None:
        self._stopped = self._stopped or any(line.get("stop") for line in lines)

    def tell(self, message: Json) -> None:
        """Say something to the keeper, if there still is one."""
        try:
            self._sock.sendall(encode(message) + b"\n")
        except OSError:
            pass

    def woken(self) -> None:
        """Hear the keeper."""
        self._hear(self._read())

    def close(self) -> None:
        """Hang up."""
        for sock in (self._sock, self._never, self._kept):
            sock.close()

    def over(self, absent: bool, gone_secs: float) -> bool:
        """Whether the keeper said stop, or nobody is left."""
        return self._stopped or (self._orphan and gone_secs > _ORPHAN_SECS)


def main(sock: socket.socket) -> int:
    """Serve for the keeper at the other end of `sock`; return the exit code."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    sys.setswitchinterval(0.001)  # a request must not wait 5 ms for the monitor thread
    channel = Channel(sock)
    try:
        _serve(channel, channel.hello())
    except AgentServerError as e:
        channel.tell({"failed": str(e)})
        sys.stderr.write(f"{e}\n")
        return 1
    finally:
        channel.close()
    return 0


def _serve(channel: Channel, hello: Json) -> None:
    from ..config import ServerConfig
    config = ServerConfig.from_json(hello["config"])
    again = "endpoint" in hello
    with ShellLock(config.state_dir):
        front = Front(config, config.state_dir)
        try:
            endpoint, pub_endpoint = front.open(
                hello.get("endpoint") or config.endpoint,
                hello["pub_endpoint"] if again and "pub_endpoint" in hello else config.pub_endpoint,
                _REBIND_SECS if again else 0.0)
            loop = front.loop(channel)
            if loop.meet():
                channel.tell({"ready": {"endpoint": endpoint, "pub_endpoint": pub_endpoint}})
                loop.run()
        finally:
            front.close()
