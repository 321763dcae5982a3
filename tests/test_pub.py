"""What the monitor publishes, as a subscriber of any language sees it: plain ZeroMQ SUB, two frames.

Owns:    topics, frames and fields of log_stream, status_update and server_update.
Runs in: the test process.
Unaware: of our client library.
"""
from __future__ import annotations

import json
import time
from typing import Callable, Iterator

import pytest
import zmq
from support import DEADLINE_SECS, Server, wait_until
from wire import LineWire, data_of
from zmtp import RawSubscriber


class Subscriber:
    """One SUB socket."""

    def __init__(self, endpoint: str, *topics: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.linger, self.socket.rcvtimeo = 0, 30_000
        self.socket.connect(endpoint)
        for topic in topics:
            self.socket.subscribe(topic.encode())

    def next(self, fits: Callable[[dict], bool] = lambda _: True) -> dict:  # type: ignore[type-arg]
        """Return the next message that fits, with its topic checked against what it says."""
        until = time.monotonic() + DEADLINE_SECS
        while True:
            assert time.monotonic() < until, "nothing that fits was published"
            frames = self.socket.recv_multipart()
            assert len(frames) == 2, frames
            topic, message = frames[0].decode(), json.loads(frames[1])
            assert message.get("topic", topic) == topic and message["type"] in ("log_stream", "status_update",
                                                                                "server_update")
            message["topic"] = topic
            if fits(message):
                return message

    def close(self) -> None:
        """Close socket and context."""
        self.socket.close()
        self.context.term()


@pytest.fixture
def subscribe(shared: Server) -> Iterator[Callable[..., Subscriber]]:
    """Make subscribers to the shared server."""
    made: list[Subscriber] = []

    def new(*topics: str) -> Subscriber:
        made.append(Subscriber(shared.pub_endpoint, *topics))
        return made[-1]
    yield new
    for each in made:
        each.close()


def test_a_new_subscription_is_answered_with_the_offset(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    sleeper = unix.spawn("sleeper", "hello")
    unix.until_output(sleeper, b"hello\n")
    for _ in range(2):
        event = subscribe(f"{sleeper}.stdout").next()
        assert event["type"] == "log_stream" and event["agent_id"] == sleeper and event["stream_type"] == "stdout"
        assert (event["offset"], event["next_offset"], event["eof"]) == (12, 12, False) and not event["data"]


def test_a_new_subscription_to_the_server_is_answered_with_the_latest_sequence(
        start_server: Callable[..., Server]) -> None:
    """Long before the next heartbeat."""
    server = start_server("--status-update-interval-secs", "600")
    with LineWire(server.socket_path) as wire:
        for _ in range(2):
            wire.ended(wire.spawn("exit_with", 0, ready=False))
            sub = Subscriber(server.pub_endpoint, "server")
            try:
                told = sub.next()
            finally:
                sub.close()
            assert told["type"] == "server_update" and told["state"] == "up"
            assert told["sequence"] == wire.ok("events_request", since=2 ** 62)["next"]
            assert told["update_type"] == "heartbeat", "it is not stored"


def test_heartbeats_say_where_the_streams_stand(start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "0.1")
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper", "hello")
        wire.until_output(sleeper, b"hello\n")
        sub = Subscriber(server.pub_endpoint, f"status.{sleeper}")
        try:
            beat = sub.next(lambda e: e["update_type"] == "heartbeat")
            newest = wire.ok("events_request", agent_id=sleeper)["events"][-1]["sequence"]
            assert beat["data"] == {"output": wire.info(sleeper)["output"], "last_event": newest}
        finally:
            sub.close()


def test_output_is_published_with_offsets(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    told = unix.spawn("print_when")
    sub = subscribe(f"{told}.stdout", f"{told}.stderr")
    assert {sub.next()["topic"], sub.next()["topic"]} == {f"{told}.stdout", f"{told}.stderr"}
    unix.control(told, "write_stdin", data="out grüße\n")
    event = sub.next()
    assert event["topic"] == f"{told}.stdout" and data_of(event) == "grüße\n".encode()
    assert (event["offset"], event["next_offset"]) == (6, 14) and event["timestamp"].endswith("Z")
    assert isinstance(event["sequence"], int)
    unix.control(told, "write_stdin", data=list(b"err \xff\n"))
    unix.control(told, "write_stdin", data="exit 0\n")
    events = []
    while sum(e["eof"] for e in events) < 2:
        events.append(sub.next())
    assert {e["topic"] for e in events if e["eof"]} == {f"{told}.stdout", f"{told}.stderr"}
    ends = {e["topic"]: e["next_offset"] for e in events}
    info = unix.info(told)["output"]
    assert ends == {f"{told}.{stream}": info[stream]["end_offset"] for stream in ("stdout", "stderr")}


def test_status_is_published(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    sub = subscribe("status.")

    def works() -> bool:
        unix.ended(unix.spawn("exit_with", 0, ready=False))
        return bool(sub.socket.poll(100))
    wait_until(works, what="the subscription to arrive")
    ref = unix.spawn("exit_with", 5)
    event = sub.next(lambda e: e["agent_id"] == ref and e["status"] == "failed")
    assert event["topic"] == f"status.{ref}" and event["type"] == "status_update" and event["message"]
    assert event["update_type"] in ("status_changed", "error", "completed", "terminated", "output_available",
                                    "heartbeat")
    assert event["timestamp"].endswith("Z") and "5" in json.dumps(event["data"]) + event["message"]
    stored = unix.ok("events_request", agent_id=ref)["events"]
    assert event["sequence"] in [e["sequence"] for e in stored]


def test_only_what_is_subscribed_arrives(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    one, two = unix.spawn("print_when"), unix.spawn("print_when")
    sub = subscribe(f"{one}.stdout")
    sub.next()
    unix.control(two, "write_stdin", data="out not this\n")
    unix.until_output(two, b"not this\n")
    unix.control(one, "write_stdin", data="err nor this\nout but this\n")
    assert data_of(sub.next()) == b"but this\n"


def test_the_server_tells_of_itself(start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "0.2")
    sub = Subscriber(server.pub_endpoint, "server")
    try:
        event = sub.next()
        assert event["type"] == "server_update" and event["state"] == "up" and event["active_agents"] == 0
        assert event["server_id"] == server.metadata["server_id"] and isinstance(event["sequence"], int)
        assert [e["update_type"] for e in server.ask({"type": "events_request"})["events"]] == ["status_changed"]
        server.ask({"type": "shutdown_request"})
        assert sub.next(lambda e: e["state"] in ("draining", "down"))
        assert server.process.wait(30) == 0
    finally:
        sub.close()


def test_a_subscriber_that_never_reads_costs_little(unix: LineWire, subscribe: Callable[..., Subscriber],
                                                    shared: Server) -> None:
    ref = unix.spawn("print_when")
    sub = subscribe(f"{ref}.stdout", "")
    sub.next(lambda e: e["topic"] == f"{ref}.stdout")
    burst = unix.spawn("burst", 30_000_000, 0, ready=False)
    unix.ended(burst)
    stats = unix.ok("stats_request")["stats"]
    assert stats["core"]["rss_bytes"] < 150 << 20 and stats["shell"]["rss_bytes"] < 250 << 20
    assert unix.ok("health_check_request")["healthy"]


def test_many_subscribers_come_and_go(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    told = unix.spawn("print_when")
    for n in range(10):
        sub = subscribe(f"{told}.stdout")
        sub.next()
        unix.control(told, "write_stdin", data=f"out round {n}\n")
        assert data_of(sub.next(lambda e: bool(e["data"]))) == b"round %d\n" % n
        if n % 2:
            sub.socket.unsubscribe(f"{told}.stdout".encode())


def test_every_join_that_names_something_is_answered(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    sleeper = unix.spawn("sleeper", "hello")
    unix.until_output(sleeper, b"hello\n")
    ended = unix.spawn("exit_with", 3)
    unix.ended(ended)
    for _ in range(2):
        sub = subscribe(f"{sleeper}.")
        assert {(e["topic"], e["offset"], e["eof"]) for e in (sub.next(), sub.next())} == {
            (f"{sleeper}.stdout", 12, False), (f"{sleeper}.stderr", 0, False)}
        for ref, status in ((sleeper, "running"), (ended, "failed")):
            told = subscribe(f"status.{ref}").next()
            assert told["update_type"] == "heartbeat" and told["status"] == status
            newest = unix.ok("events_request", agent_id=ref)["events"][-1]["sequence"]
            assert told["data"] == {"output": unix.info(ref)["output"], "last_event": newest}
            assert told["sequence"] == unix.ok("events_request", since=2 ** 62)["next"]
        assert subscribe("").next(lambda e: e["type"] == "server_update")["update_type"] == "heartbeat"
        at_end = subscribe(f"{ended}.stdout").next()
        assert (at_end["offset"], at_end["eof"]) == (6, True)


def test_an_ended_agent_beats_on_for_who_asked_for_it(start_server: Callable[..., Server]) -> None:
    """So that whoever lost the message of its end learns of it without asking."""
    server = start_server("--status-update-interval-secs", "0.1")
    with LineWire(server.socket_path) as wire:
        ended = wire.spawn("exit_with", 0)
        wire.ended(ended)
        other = wire.spawn("exit_with", 0)
        wire.ended(other)
        sub = Subscriber(server.pub_endpoint, f"status.{ended}")
        all_of_them = Subscriber(server.pub_endpoint, "status.")
        try:
            beats = [sub.next() for _ in range(3)]
            assert {(e["agent_id"], e["status"]) for e in beats} == {(ended, "completed")}
            assert beats[-1]["update_type"] == "heartbeat"
            assert beats[-1]["data"]["output"]["stdout"]["end_offset"] == 6
            assert all_of_them.next()["agent_id"] == ended, "the other one was not asked for by name"
        finally:
            sub.close()
            all_of_them.close()


def test_what_nobody_subscribed_to_is_not_produced(unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    def pushed() -> int:
        return int(unix.ok("stats_request")["stats"]["messages_pushed"])
    told = unix.spawn("print_when")
    listened = unix.spawn("print_when")
    sub = subscribe(f"{listened}.stdout")
    sub.next()
    before = pushed()
    unix.ended(unix.spawn("burst", 1_000_000, 1_000_000, ready=False))
    unix.control(told, "write_stdin", data="out nobody listens\n")
    unix.until_output(told, b"listens\n")
    unix.control(told, "pause")
    assert pushed() == before
    unix.control(listened, "write_stdin", data="out somebody does\n")
    assert data_of(sub.next()) == b"somebody does\n" and pushed() == before + 1
    sub.socket.unsubscribe(f"{listened}.stdout".encode())

    def is_over() -> bool:
        at, end = pushed(), unix.info(listened)["output"]["stdout"]["end_offset"]
        unix.control(listened, "write_stdin", data="out now nobody does\n")
        wait_until(lambda: unix.info(listened)["output"]["stdout"]["end_offset"] > end)
        return pushed() == at
    wait_until(is_over, what="the end of the subscription to arrive")


# ---------------------------------------------------------------- who does not read

def offsets(events: list[dict], start: int) -> bool:  # type: ignore[type-arg]
    """Tell whether pushed messages follow each other from `start` on without a gap."""
    for event in events:
        if event["offset"] != start:
            return False
        start = event["next_offset"]
    return True


def test_a_high_water_mark_of_one(start_server: Callable[..., Server]) -> None:
    """Nearly everything is dropped; what is there shows the gap, the next heartbeat shows the end."""
    server = start_server("--pub-hwm", "1", "--status-update-interval-secs", "0.2")
    with LineWire(server.socket_path) as wire:
        burst = wire.spawn("", ready=False, command=["/bin/sh", "-c", "read x; head -c 10000000 /dev/zero; sleep 1000"])
        sub = RawSubscriber(server.pub_endpoint, f"{burst}.stdout".encode(), f"status.{burst}".encode())
        try:
            sub.frame(), sub.frame()
            wire.control(burst, "write_stdin", data="go\n")
            wait_until(lambda: wire.info(burst)["output"]["stdout"]["end_offset"] == 10_000_000)
            end, seen = 0, 0
            while end < 10_000_000:
                sub.frame()
                event = json.loads(sub.frame())
                end = event["next_offset"] if event["type"] == "log_stream" else \
                    event["data"]["output"]["stdout"]["end_offset"]
                seen += event["type"] == "log_stream"
            assert seen < 10_000_000 // 32768, "some were dropped"
            chunk = wire.read(burst, offset=9_999_990)
            assert chunk["bytes"] == 10
        finally:
            sub.close()


def test_a_lost_tail_shows_when_the_stream_is_quiet(start_server: Callable[..., Server]) -> None:
    """Not only at the next heartbeat, which is an hour away."""
    server = start_server("--pub-hwm", "1", "--status-update-interval-secs", "3600")
    with LineWire(server.socket_path) as wire:
        for ends in ("", "; sleep 1000") * 3:
            burst = wire.spawn("", ready=False, command=["/bin/sh", "-c", f"read x; head -c 3000000 /dev/zero{ends}"])
            sub = RawSubscriber(server.pub_endpoint, f"{burst}.stdout".encode())
            try:
                sub.frame(), sub.frame()
                wire.control(burst, "write_stdin", data="go\n")
                event = {"next_offset": 0, "eof": False}
                while (event["next_offset"], event["eof"]) != (3_000_000, not ends):
                    sub.frame()
                    event = json.loads(sub.frame())
            finally:
                sub.close()


def test_a_slow_subscriber_slows_nobody(shared: Server, unix: LineWire, subscribe: Callable[..., Subscriber]) -> None:
    told = unix.spawn("", command=["/bin/sh", "-c", "echo ready; read x; seq 1 300000; sleep 1000"])
    topic = f"{told}.stdout"
    asleep = RawSubscriber(shared.pub_endpoint, topic.encode())
    try:
        asleep.frame()
        sub = subscribe()
        sub.socket.rcvhwm = 100_000
        sub.socket.subscribe(topic.encode())
        sub.next()
        unix.control(told, "write_stdin", data="go\n")
        events = [sub.next()]
        whole = 6 + sum(len(f"{n}\n") for n in range(1, 300_001))
        while events[-1]["next_offset"] < whole:
            events.append(sub.next())
        assert offsets(events, 6), "who reads misses nothing"
        assert max(len(data_of(event)) for event in events) <= 32 * 1024
    finally:
        asleep.close()


def test_dead_subscribers_cost_a_bounded_amount(start_server: Callable[..., Server]) -> None:
    """Each joins when the one before is full, so that no two hold the same messages."""
    server = start_server("--pub-hwm", "20")
    asleep = []
    with LineWire(server.socket_path) as wire:
        before = wire.ok("stats_request")["stats"]["shell"]["rss_bytes"]
        try:
            for _ in range(20):
                burst = wire.spawn("", ready=False, command=["/bin/sh", "-c", "read x; head -c 5000000 /dev/zero"])
                for _ in range(3):
                    asleep.append(RawSubscriber(server.pub_endpoint, burst.encode()))
                    asleep[-1].frame()
                wire.control(burst, "write_stdin", data="go\n")
                wire.ended(burst)
            stats = wire.ok("stats_request")["stats"]
            # 20 groups of subscribers, 20 messages each, of 32 KiB of zeros that are six times as long in JSON
            assert stats["shell"]["rss_bytes"] - before < 20 * 20 * 6 * 32768 + (30 << 20)
            assert stats["core"]["rss_bytes"] < 100 << 20
        finally:
            for each in asleep:
                each.close()
