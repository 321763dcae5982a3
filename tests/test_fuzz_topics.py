"""Subscriptions that nobody means well: noise, floods and nonsense on the publishing port and in subscribe_request.

Owns:    a fixed, printed seed; what is sent as topics, as messages of a subscriber, and in place of ZMTP.
Runs in: the test process; the server is real, and one honest subscriber listens all the time.
Unaware: of requests (test_fuzz.py).

After each attack: the same processes, bounded memory, and the honest subscriber gets what is printed, byte for byte.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import zmq
from support import TESTS, Server, clean_environ, short_dir, wait_until
from test_faults import zmq_answers
from test_pub import Subscriber
from wire import LineWire, checked, data_of, new_id
from zmtp import GREETING, READY, RawSubscriber, command, message

SEED = int(os.environ.get("FUZZ_SEED", "20261124"))
PIECES = [b"", b"server", b"status.", b"status", b".stdout", b".stderr", b".", b"\0", b"\xff", b"\n", b"*", b"../"]


class Honest:
    """A server, an agent that prints what it is told to, and a subscriber that has to get it."""

    def __init__(self, server: Server) -> None:
        self.server, self.rng = server, random.Random(SEED)
        self.wire = LineWire(server.socket_path)
        self.agent = self.wire.spawn("print_when")
        self.before = server.pids()
        self.sub = Subscriber(server.pub_endpoint, f"{self.agent}.stdout")
        self.at = self.sub.next()["next_offset"]
        self.count = 0

    def still_served(self) -> None:
        """Fail unless all goes on as if nothing had happened."""
        self.count += 1
        self.wire.control(self.agent, "write_stdin", data=f"out line {self.count}\n")
        expected, got = b"line %d\n" % self.count, b""
        while got != expected:
            event = self.sub.next(lambda e: bool(e["data"]) or e["offset"] > self.at)
            assert event["offset"] == self.at, "a gap, for one who reads"
            self.at, got = event["next_offset"], got + data_of(event)
        assert self.server.pids() == self.before, "a part of the server died of it"
        assert "Traceback" not in self.server.logs()
        stats = self.wire.ok("stats_request")["stats"]
        assert stats["core"]["rss_bytes"] < 150 << 20 and stats["shell"]["rss_bytes"] < 300 << 20, stats

    def topic(self) -> bytes:
        """Return something like a topic."""
        rng = self.rng
        how = rng.randrange(4)
        if how == 0:
            return rng.getrandbits(8 * 24).to_bytes(24, "big")[:rng.randrange(24)]
        if how == 1:
            whole = f"{self.agent}.stdout".encode()
            return whole[:rng.randrange(len(whole))]
        if how == 2:
            return f"{new_id()}.std{rng.choice(['out', 'err', 'in'])}".encode()
        return b"".join(rng.choice([*PIECES, self.agent.encode()]) for _ in range(rng.randrange(4)))

    def close(self) -> None:
        """Close what was opened."""
        self.sub.close()
        self.wire.close()


@pytest.fixture
def honest(start_server: Callable[..., Server]) -> Iterator[Honest]:
    """See the class. Heartbeats are frequent, so that wild topics have something to match."""
    made = Honest(start_server("--status-update-interval-secs", "0.5"))
    print(f"seed {SEED}")
    yield made
    made.still_served()
    made.close()


@pytest.fixture
def xsub(honest: Honest) -> Iterator[Any]:
    """A socket that sends what it is told to as a subscription, or as anything else."""
    context = zmq.Context()
    made = context.socket(zmq.XSUB)
    made.linger, made.sndhwm, made.sndtimeo = 0, 0, 30_000
    made.connect(honest.server.pub_endpoint)
    yield made
    made.close()
    context.term()


def test_topics_of_every_kind(honest: Honest, xsub: Any) -> None:
    joined: list[bytes] = []
    for n in range(3000):
        how = honest.rng.random()
        if how < 0.6:
            joined.append(honest.topic())
            xsub.send(b"\1" + joined[-1])
        elif how < 0.9 and joined:
            xsub.send(b"\0" + joined.pop(honest.rng.randrange(len(joined))))
        else:
            xsub.send(b"\0" + honest.topic())  # never subscribed to
        if n % 500 == 0:
            honest.still_served()


def test_messages_that_are_no_subscriptions(honest: Honest, xsub: Any) -> None:
    for _ in range(300):
        xsub.send(honest.rng.choice([b"", b"\2", b"hello", b"\3" + honest.topic(), bytes(1000)]))
        xsub.send_multipart([b"\1" + honest.topic(), honest.topic(), b"\0server"])
    for size in (1000, 1022, 1023, 1024, 5000, 1 << 20):  # the larger ones cost the sender its connection
        raw = RawSubscriber(honest.server.pub_endpoint)
        try:
            raw.socket.sendall(message(b"\1" + b"x" * size) + message(b"\1" + bytes([size % 256]) * size))
        except OSError:
            pass
        raw.close()


@pytest.mark.parametrize("what", ["streams", "noise"])
def test_a_hundred_thousand_subscriptions(honest: Honest, what: str) -> None:
    """The greedy one is cut off, and tries again; the others do not notice."""
    greedy = subprocess.Popen([sys.executable, str(TESTS / "greedy.py"), honest.server.pub_endpoint, "100000", what,
                               str(SEED)], stdout=subprocess.PIPE, env=clean_environ(honest.server.state_dir))
    try:
        assert greedy.stdout is not None
        while not select.select([greedy.stdout], [], [], 0.2)[0]:
            honest.still_served()
        for _ in range(10):
            honest.still_served()
        late = Subscriber(honest.server.pub_endpoint, f"status.{honest.agent}")
        assert late.next()["agent_id"] == honest.agent, "who comes now is served as well"
        late.close()
    finally:
        greedy.kill()
        greedy.communicate()


def test_joining_and_leaving_as_fast_as_possible(honest: Honest, xsub: Any) -> None:
    topic = f"{honest.agent}.stdout".encode()
    for _ in range(5000):
        xsub.send(b"\1" + topic)
        xsub.send(b"\0" + topic)
    honest.still_served()


def test_a_crowd_that_never_stops_talking(honest: Honest) -> None:
    """More messages than can be heard come all the time; what is printed is published all the same."""
    def worked() -> float:
        return float(honest.wire.ok("stats_request")["stats"]["shell"]["cpu_secs"])
    flooder = subprocess.Popen([sys.executable, str(TESTS / "flooder.py"), honest.server.pub_endpoint, "150"],
                               stdout=subprocess.PIPE, env=clean_environ(honest.server.state_dir))
    try:
        assert flooder.stdout is not None and flooder.stdout.readline() == b"sent\n"
        enough = worked() + 4.0
        while worked() < enough:
            honest.still_served()
    finally:
        flooder.kill()
        flooder.communicate()


def test_noise_in_place_of_zmtp(honest: Honest) -> None:
    host, _, port = honest.server.pub_endpoint.partition("://")[2].rpartition(":")
    rng = honest.rng
    for n in range(200):
        noise = rng.getrandbits(8 * 200).to_bytes(200, "big")[:rng.randrange(1, 200)]
        with socket.create_connection((host, int(port)), 30) as peer:
            beginning = rng.choice([b"", b"GET / HTTP/1.1\r\n\r\n", GREETING[:rng.randrange(65)], GREETING,
                                    GREETING + READY, GREETING + command(b"READY", noise),
                                    GREETING + READY + command(b"PING", noise), GREETING + READY + command(b"", b"")])
            try:
                peer.sendall(beginning + noise)
            except OSError:
                pass  # it was cut off already
        if n % 50 == 0:
            honest.still_served()


def test_frames_that_promise_too_much(honest: Honest) -> None:
    """A size that is never sent costs nothing, a size over the limit the connection."""
    for size in (1 << 62, 1 << 40, 1 << 31, 2048, 1000):
        raw = RawSubscriber(honest.server.pub_endpoint, b"server")
        try:
            raw.socket.sendall(b"\2" + size.to_bytes(8, "big") + b"\1xyz")
            honest.still_served()
            raw.socket.sendall(message(b"\1status."))
        except OSError:
            pass
        finally:
            raw.close()


@pytest.mark.parametrize("kind", [b"SUB", b"DEALER"])
def test_a_message_that_never_ends(honest: Honest, kind: bytes) -> None:
    """libzmq keeps the frames of a message until the last one has come, however many: its sender is cut off."""
    server = honest.server
    raw = RawSubscriber(server.pub_endpoint if kind == b"SUB" else server.endpoint, kind=kind)
    with contextlib.closing(raw), contextlib.suppress(OSError):
        for _ in range(1000):
            raw.socket.sendall(message(bytes(1000), more=True) * 1000)
        raise AssertionError("a gigabyte of one message was taken")
    honest.still_served()
    assert zmq_answers(server.endpoint)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system bounds no memory of another process")
@pytest.mark.parametrize("kind", [b"SUB", b"DEALER"])
def test_a_message_that_never_ends_over_ipc(start_server: Callable[..., Server], run_dir: Path, kind: bytes) -> None:
    """The kernel does not count what comes over such a connection, whose other end is of our own user. So the process
    with the sockets has a bound of its own: its peer is rid of its connection, and everybody else goes on a moment
    later."""
    home = short_dir(run_dir)
    server = start_server("--shell-memory-bytes", str(128 << 20), endpoint=f"ipc://{home}/req",
                          pub_endpoint=f"ipc://{home}/pub")
    before = server.pids()
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("echo")
        raw = RawSubscriber(server.pub_endpoint if kind == b"SUB" else server.endpoint, kind=kind)
        with contextlib.closing(raw), contextlib.suppress(OSError):
            for _ in range(1000):
                raw.socket.sendall(message(bytes(1000), more=True) * 1000)
            raise AssertionError("a gigabyte of one message was taken")
        wait_until(lambda: zmq_answers(server.endpoint), what="the next shell to answer")
        after = server.pids()
        assert {name for name in after if after[name] != before[name]} == {"shell"}
        wire.control(agent, "write_stdin", data="x\n", eof=True)
        assert wire.output(agent) == b"ready\nx\n"
    assert "the shell ended by SIGABRT" in server.logs()


def test_half_open_subscribers(honest: Honest) -> None:
    """Two hundred that connect and say nothing, or nothing more."""
    host, _, port = honest.server.pub_endpoint.partition("://")[2].rpartition(":")
    peers = [socket.create_connection((host, int(port)), 30) for _ in range(200)]
    try:
        for peer in peers[::2]:
            peer.sendall(GREETING[:20])
        honest.still_served()
    finally:
        for peer in peers:
            peer.close()


def test_subscribe_requests_of_every_kind(honest: Honest) -> None:
    rng = honest.rng
    odd: list[object] = [None, True, 0, -1, 1.5, "", "status.", {}, [None], [[]], ["\0"], ["\ud800"], ["x" * 512],
                         ["x" * 513], ["status."] * 10_000, ["a"] * 10_001, [""], [new_id() + ".stdout"], 2 ** 63,
                         2 ** 70]
    with LineWire(honest.server.socket_path) as wire:
        for _ in range(500):
            fields = {name: rng.choice(odd) for name in ("topics", "since", "announce") if rng.random() < 0.7}
            raw = json.dumps({"type": "subscribe_request", "request_id": new_id(), **fields}).encode()
            reply = wire.raw(raw)
            assert reply["success"] or reply["error_code"] == "bad_request", (reply, fields)
            wire.events.clear()
        assert wire.ok("subscribe_request", topics=["server"] + [honest.topic().decode("latin-1") for _ in range(9000)],
                       announce=["server"] * 10_000)["topics"]
        wire.refused("bad_request", "subscribe_request", topics=[], announce=["server"] * 10_001)


def test_many_local_subscribers_that_do_not_read(honest: Honest) -> None:
    """Each wants everything that ever happened, and takes none of it."""
    peers = [LineWire(honest.server.socket_path) for _ in range(50)]
    try:
        for peer in peers:
            for _ in range(20):
                peer.send(json.dumps({"type": "subscribe_request", "request_id": new_id(), "topics": [""],
                                      "announce": [honest.agent] * 5000, "since": 0}).encode())
        honest.still_served()
        burst = honest.wire.spawn("burst", 30_000_000, 0, ready=False)
        honest.wire.ended(burst)
        honest.still_served()
    finally:
        for peer in peers:
            peer.close()
    with LineWire(honest.server.socket_path) as wire:
        checked(wire.ok("health_check_request"))


def test_subscribers_that_vanish(honest: Honest) -> None:
    """They leave in the middle of everything, without a word where the system lets them."""
    for n in range(100):
        raw = RawSubscriber(honest.server.pub_endpoint, b"", f"{honest.agent}.stdout".encode())
        if n % 2:
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST, not FIN
        raw.close()
    honest.still_served()
    shell = honest.before["shell"]
    wait_until(lambda: len(os.listdir(f"/proc/{shell}/fd")) < 60, what="their descriptors to be closed")
