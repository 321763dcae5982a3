"""What local clients may cost the core: memory, and the time of others. No crowd of them may cost more.

Owns:    crowds that never finish a request, never read a reply, or ask for a great deal at once.
Runs in: the test process; the server is real, with a quota that a test can fill.
Unaware: of ZeroMQ, whose peers the shell bounds.
"""
from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Callable, Iterator

import pytest
from support import Server, agent
from test_mistakes import Flawed, flawed
from wire import LineWire, new_id

from agentserver.core.framing import PREFACE
from agentserver.core.quota import Quota

__all__ = ["flawed"]
MIB = 1024 * 1024
SMALL = 32 * MIB   # the quota here
CROWD = 40
SLACK = 4 * SMALL   # what malloc keeps of what was freed; without a quota all of these tests need several times as much


@pytest.fixture
def small(flawed: Flawed) -> Server:
    """A server with a small quota."""
    return flawed("core/quota.py", "256 * 1024 * 1024", str(SMALL))


def resident(server: Server) -> int:
    """Return what the core has in memory."""
    return int(server.ask({"type": "stats_request"})["stats"]["core"]["rss_bytes"])


@contextlib.contextmanager
def crowd(server: Server) -> Iterator[list[socket.socket]]:
    """Many connections, whose sockets take what fits and then wait for a moment only."""
    with contextlib.ExitStack() as all_of_them:
        links = [all_of_them.enter_context(server.connect()) for _ in range(CROWD)]
        for link in links:
            link.settimeout(0.2)
        yield links


def test_who_has_the_most_has_to_go() -> None:
    quota: Quota[str] = Quota(100)
    quota.note("a", 60)
    quota.note("b", 40)
    assert quota.greediest is None
    quota.note("b", 41)
    assert quota.greediest == "a"
    quota.note("a", 10)
    assert quota.greediest is None
    quota.note("b", 91)
    assert quota.greediest == "b"
    quota.forget("b")
    quota.forget("nobody")
    assert quota.greediest is None


@pytest.mark.parametrize("begin", [b'{"', PREFACE + struct.pack("!IIQ", 0, 10 * MIB, 1)], ids=["line", "frame"])
def test_requests_that_are_never_whole(small: Server, begin: bytes) -> None:
    before, core = resident(small), small.pids()["core"]
    with LineWire(small.socket_path) as honest, crowd(small) as links:
        for link in links:
            with contextlib.suppress(OSError):
                link.sendall(begin + b"x" * (9 * MIB))
            assert honest.ok("health_check_request")["healthy"]
        assert resident(small) < before + SLACK
    assert small.pids()["core"] == core and "the one with the most is cut off" in small.logs()


def test_replies_that_are_never_read(small: Server) -> None:
    with LineWire(small.socket_path) as honest:
        started = honest.spawn("zeros", 4 * MIB, ready=False)
        honest.ended(started)
        before = resident(small)
        ask = {"type": "control_command", "agent_id": started, "command_type": "read_stdout",
               "payload": {"offset": 0, "max_bytes": 2 * MIB}}
        with crowd(small) as links:
            for link in links:
                with contextlib.suppress(OSError):
                    link.sendall(b"".join(json.dumps({**ask, "request_id": new_id()}).encode() + b"\n"
                                          for _ in range(10)))
                assert honest.ok("health_check_request")["healthy"]
            assert resident(small) < before + SLACK
        assert len(honest.control(started, "read_stdout", offset=0)["data"]) > 0


def test_who_has_read_everything_keeps_nothing(small: Server) -> None:
    """However large the replies were that many clients have read, and that went out piece by piece."""
    with LineWire(small.socket_path) as honest, contextlib.ExitStack() as readers:
        started = honest.spawn("zeros", 4 * MIB, ready=False)
        honest.ended(started)
        links = [readers.enter_context(LineWire(small.socket_path)) for _ in range(2 * SMALL // (4 * MIB))]
        for link in links:
            assert link.control(started, "read_stdout", offset=0, max_bytes=4 * MIB)["next_offset"] > 0
        for link in links:
            assert link.ok("health_check_request")["healthy"]


def test_topics_count_as_well(small: Server) -> None:
    topics = ["x" * 500 + f"{number:010}" for number in range(10_000)]
    with LineWire(small.socket_path) as honest, contextlib.ExitStack() as listeners:
        before = resident(small)
        for _ in range(CROWD):
            listener = listeners.enter_context(LineWire(small.socket_path))
            with contextlib.suppress(AssertionError, OSError):
                listener.ok("subscribe_request", topics=topics)
            assert honest.ok("health_check_request")["healthy"]
        assert resident(small) < before + SLACK


def test_many_requests_in_one_write_take_turns_with_others(shared: Server) -> None:
    """Each is answered, and another client does not wait for all of them."""
    count = 30_000
    with LineWire(shared.socket_path) as honest, shared.connect() as link, link.makefile("rb") as replies:
        asked = honest.ok("stats_request")["stats"]["requests"]
        sender = threading.Thread(target=link.sendall, args=(b"\n" * count,))
        sender.start()
        assert json.loads(replies.readline())["error_code"] == "bad_request"
        for _ in range(20):
            assert honest.ok("health_check_request")["healthy"]
        handled = honest.ok("stats_request")["stats"]["requests"] - asked
        assert handled < count / 2, f"{handled} of {count} came before 20 requests of somebody else"
        for _ in range(count - 1):
            assert replies.readline().endswith(b"}\n")
        sender.join()


def test_an_honest_client_may_ask_for_much_at_once(shared: Server, small_requests: Callable[[], list[bytes]]) -> None:
    messages = small_requests()
    with LineWire(shared.socket_path) as wire:
        wire.send(b"\n".join(messages))
        got = {json.loads(wire.receive())["request_id"] for _ in messages}
        assert got == {json.loads(message)["request_id"] for message in messages}


@pytest.fixture
def small_requests() -> Callable[[], list[bytes]]:
    """Return five hundred health checks, and a spawn that is refused among them."""
    refused = {"type": "spawn_request", "request_id": "refused", "config": {"command": agent("none"), "cwd": "/no"}}
    return lambda: [json.dumps({"type": "health_check_request", "request_id": str(number)}).encode()
                    for number in range(500)] + [json.dumps(refused).encode()]
