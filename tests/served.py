"""An AgentServer that serves in a thread of the test, with a core that is none behind it.

Owns:    `Served`, and how such a core answers where the shell cares.
Runs in: the test process.
Unaware: of real cores and agents.
"""
from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from fakecore import Connection, FakeCore, Handler
from support import wait_until

zmq = pytest.importorskip("zmq")

from agentserver import AgentServer, ServerConfig  # noqa: E402
from agentserver.core.link import socket_path  # noqa: E402
from agentserver.wire import encode  # noqa: E402

ANY_PORT = "tcp://127.0.0.1:0"


def answer(raw: bytes, connection: Connection) -> Optional[bytes]:
    """Answer as a core would, where the shell cares."""
    try:
        message = json.loads(raw)
    except ValueError:
        return b'{"type": "error_response", "success": false, "bytes": %d}' % len(raw)
    reply: Dict[str, Any] = {"type": "reply", "request_id": message.get("request_id"), "success": True}
    if message.get("type") == "stats_request":
        reply["stats"] = {"requests": 5}
    if message.get("type") == "health_check_request":
        reply.update(active_agents=3, uptime_secs=1.5)
    return encode(reply)


class Served:
    """An AgentServer in a thread, its fake core, and a client's sockets."""

    def __init__(self, state_dir: Path, handler: Handler = answer, **settings: Any) -> None:
        settings = {"endpoint": ANY_PORT, "pub_endpoint": ANY_PORT, **settings}
        self.path = socket_path(str(state_dir))
        self.core = FakeCore(self.path, handler)
        self.server = AgentServer(ServerConfig(state_dir=str(state_dir), **settings))
        self.errors: List[BaseException] = []
        self.thread = threading.Thread(target=self._start, daemon=True)
        self.context = zmq.Context()
        self.thread.start()
        wait_until(lambda: self.server.is_running() or not self.thread.is_alive())

    def _start(self) -> None:
        try:
            self.server.start()
        except BaseException as e:
            self.errors.append(e)

    def socket(self, kind: int, endpoint: str) -> Any:
        sock = self.context.socket(kind)
        sock.linger = 0
        sock.rcvtimeo = 20_000
        sock.connect(endpoint)
        return sock

    def ask(self, *frames: bytes) -> Dict[str, Any]:
        with self.socket(zmq.REQ, self.server.endpoint) as sock:
            sock.send_multipart(frames)
            reply: Dict[str, Any] = json.loads(sock.recv())
            return reply

    def restart_core(self) -> None:
        self.core.close(crash=True)
        self.core = FakeCore(self.path, answer)

    def close(self) -> None:
        self.server.stop()
        self.core.close()
        self.thread.join(20)
        self.context.destroy(linger=0)
        assert not self.thread.is_alive()
