"""What clients had sent when a core yields to its successor is answered, also to those who do not ask again.

Owns:    raw clients on the core's socket, which take a connection that ends for the end of it, through reloads.
Runs in: the test process, in threads; the server is real.
Unaware: of agents and of the shell (test_reload.py).
"""
from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest
from support import DEADLINE_SECS, Server, short_dir, wait_until
from test_reload import Interrupted
from test_survival import by_request, by_signal
from wire import LineWire, alive, new_id

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere what is not read yet is lost")
CLIENTS, RELOADS = 24, 5


class RawClient(threading.Thread):
    """Asks again and again. A connection that cannot be made, or does not take a request, is no harm: it knows that
    nobody has it. A request that was taken and is not answered is `lost`."""

    def __init__(self, server: Server, number: int, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._server, self._number, self._over = server, number, over
        self.answered, self.refused, self.lost = 0, 0, []  # type: int, int, list[str]

    def run(self) -> None:
        while not self._over.is_set():
            try:
                with self._server.connect() as link:
                    self._talk(link)
            except OSError:
                self.refused += 1

    def _talk(self, link: socket.socket) -> None:
        replies = link.makefile("rb")
        while not self._over.is_set():
            messages = [self._message() for _ in range(1 + self._number % 3)]  # some send several at once
            link.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
            for message in messages:
                try:
                    line = replies.readline()
                except OSError as e:
                    line = str(e).encode()
                if not line.endswith(b"\n"):
                    self.lost.append(f"{message['type']} after {self.answered}: {line!r}")
                    return
                assert json.loads(line)["success"], line
                self.answered += 1

    def _message(self) -> dict[str, Any]:
        if self._number % 8 == 0:
            return {"type": "spawn_request", "request_id": new_id(), "config": {"command": ["true"]}}
        return {"type": ("health_check_request", "stats_request")[self._number % 2], "request_id": new_id()}


def generation(server: Server) -> int:
    """Return how often the server was reloaded, 0 while nobody tells."""
    try:
        return int(server.ask({"type": "health_check_request"})["metadata"]["generation"])
    except (OSError, ValueError):
        return 0


def test_no_request_is_lost_through_five_reloads(server: Server) -> None:
    over = threading.Event()
    clients = [RawClient(server, number, over) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        for count in range(RELOADS):
            wait_until(lambda: all(client.answered for client in clients), what="all to be at work")
            before = [client.answered for client in clients]
            now = generation(server) or wait_until(lambda: generation(server))
            by_signal(server) if count % 2 else wait_until(lambda: asked_for(server))
            wait_until(lambda: generation(server) > now, what="the next core")
            wait_until(lambda: all(client.answered > b for client, b in zip(clients, before)), what="all to go on")
    finally:
        over.set()
        for client in clients:
            client.join(DEADLINE_SECS)
    assert [client.lost for client in clients if client.lost] == []
    assert not any(client.is_alive() for client in clients)


def asked_for(server: Server) -> bool:
    """Ask for a reload; return whether that was taken."""
    try:
        by_request(server)
    except (OSError, ValueError):
        return False
    return True


def test_what_is_being_made_is_waited_for(server: Server, tmp_path: Path) -> None:
    """The reply to a search comes from a process of its own, after the core has been told to yield."""
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("lines", 20_000, 0, tmp_path / "sums", ready=False)
        wire.ended(agent)
    with server.connect() as link:
        query = {"type": "output_query_request", "request_id": "query", "agent_id": agent, "stream": "stdout",
                 "filter": "[0-9]+$", "limit": 1}
        link.sendall(b'{"type":"reload_request","request_id":"reload"}\n' + json.dumps(query).encode() + b"\n")
        with link.makefile("rb") as replies:
            got = [json.loads(replies.readline()) for _ in range(2)]
            assert {reply["request_id"] for reply in got} == {"query", "reload"} and all(r["success"] for r in got)
            assert replies.readline() == b""


def test_who_reads_no_replies_keeps_neither_the_successor_nor_others_waiting(server: Server) -> None:
    core = server.pids()["core"]
    with server.connect() as link:
        ask = json.dumps({"type": "health_check_request", "request_id": "x"}).encode() + b"\n"
        link.sendall(ask * 3000)  # more replies than its socket takes
        now = generation(server)
        by_signal(server)
        for _ in range(50):
            assert generation(server), "others are served meanwhile"
        wait_until(lambda: generation(server) > now and not alive(core), what="the next core")


def test_a_successor_that_dies_while_replies_are_waited_for_changes_nothing(
        start_server: Callable[..., Server], run_dir: Path) -> None:
    """The core has begun to yield, and does not go on with that for nobody: who is connected stays so."""
    interrupted = Interrupted(start_server, short_dir(run_dir))
    server = interrupted.server
    with LineWire(server.socket_path) as other, server.connect() as link:
        ask = json.dumps({"type": "health_check_request", "request_id": "x"}).encode() + b"\n"
        link.sendall(ask * 3000)  # more replies than its socket takes
        os.kill(interrupted.reload("left = inherit(keeper.channel)\n        while"), signal.SIGKILL)

        def health() -> dict[str, Any]:
            return dict(other.ok("health_check_request"))
        failed = wait_until(lambda: health()["metadata"]["reload_failed"] and health())
        wait_until(lambda: health()["uptime_secs"] > failed["uptime_secs"] + 3, what="the time for the replies to pass")
        assert health()["metadata"]["core_pid"] == str(interrupted.core)
