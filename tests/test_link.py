"""The links to a core: lines for clients, frames for the shell, and what happens when the core is away.

Owns:    the tests of agentserver/core/link.py.
Runs in: the test process, against a core that is a thread.
Unaware: of real cores, agents and ZeroMQ.
"""
from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import pytest
from fakecore import Connection, FakeCore, echo
from support import wait_until

from agentserver.core import audience
from agentserver.core.framelink import FrameLink
from agentserver.core.link import LineLink, LocalRoute, NotThere, dial, socket_path
from agentserver.errors import LinkError, RequestError, RequestTimeout
from agentserver.wire import encode


@pytest.fixture
def path(state_dir: Path) -> str:
    return socket_path(str(state_dir))


@pytest.fixture
def link(path: str) -> Iterator[LineLink]:
    link = LineLink(path)
    yield link
    link.close()


@pytest.fixture
def wake() -> Iterator[Tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def frames(path: str) -> Iterator[FrameLink]:
    link = FrameLink(path, {"role": "requests", "endpoint": "tcp://127.0.0.1:1"})
    yield link
    link.close()


def soon(secs: float = 10.0) -> float:
    return time.monotonic() + secs


# ---------------------------------------------------------------- dialling

def test_a_socket_with_a_long_path_is_reached(state_dir: Path) -> None:
    deep = state_dir / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    here = os.getcwd()
    os.chdir(deep)
    try:
        core = FakeCore("core.sock")
    finally:
        os.chdir(here)
    core.path = socket_path(str(deep))
    with core:
        link = LineLink(core.path)
        assert json.loads(link.request(b"{}", 5))["success"]
        link.close()


def test_no_socket_and_a_dead_socket_are_told_apart(path: str) -> None:
    with pytest.raises(NotThere, match="agentserver serve"):
        dial(path)
    FakeCore(path).close(crash=True)
    with pytest.raises(LinkError) as caught:
        dial(path)
    assert not isinstance(caught.value, NotThere)


# ---------------------------------------------------------------- lines

def test_requests_share_a_connection_and_a_new_core_is_found(path: str, link: LineLink) -> None:
    with FakeCore(path) as core:
        for _ in range(3):
            assert json.loads(link.request(b'{"request_id": "a"}', 5))["request_id"] == "a"
        assert len(core.connections) == 1
    with FakeCore(path):
        with pytest.raises(LinkError):
            link.request(b"{}", 5)
        assert json.loads(link.request(b"{}", 5))["success"]


def test_a_late_reply_does_not_meet_the_next_request(path: str, link: LineLink) -> None:
    late: List[Connection] = []

    def slow(raw: bytes, connection: Connection) -> Optional[bytes]:
        if b"slow" in raw:
            late.append(connection)
            return None
        return echo(raw, connection)

    with FakeCore(path, slow):
        with pytest.raises(RequestTimeout):
            link.request(b'{"request_id": "slow"}', 0.05)
        wait_until(lambda: late, what="the first to be heard")
        try:
            late[0].reply(b'{"request_id": "slow"}')
        except OSError:
            pass
        assert json.loads(link.request(b'{"request_id": "b"}', 5))["request_id"] == "b"


def test_large_messages_pass_both_ways(path: str, link: LineLink) -> None:
    with FakeCore(path):
        raw = encode({"request_id": "a", "text": "x" * 8_000_000})
        assert json.loads(link.request(raw, 20))["was"] == json.loads(raw)


def test_a_message_with_line_breaks_is_refused(link: LineLink) -> None:
    with pytest.raises(RequestError, match="one line"):
        link.request(b"{}\n{}", 5)


def pushing(raw: bytes, connection: Connection) -> Optional[bytes]:
    """Push an event before and after the reply to a subscription."""
    message = json.loads(raw)
    connection.push({"topic": "status.a", "n": 1})
    if message.get("topics") == ["refuse"]:
        return json.dumps({"request_id": message["request_id"], "success": False, "error": "no such thing",
                           "error_code": "bad_request"}).encode()
    connection.reply(json.dumps({"request_id": message["request_id"], "success": True, "sequence": 7}).encode())
    connection.push({"topic": "status.a", "n": 2})
    return None


def test_events_come_in_order_also_those_before_the_reply(path: str, link: LineLink) -> None:
    with FakeCore(path, pushing):
        assert link.subscribe(["status."])["sequence"] == 7
        assert [link.next_event(5), link.next_event(5)] == [{"topic": "status.a", "n": n} for n in (1, 2)]
        assert link.next_event(0) is None and link.next_event(0.02) is None


def test_the_event_descriptor_tells_of_events_and_of_the_end(path: str, link: LineLink) -> None:
    with pytest.raises(LinkError, match="subscribe first"):
        link.next_event(0)
    core = FakeCore(path, lambda raw, _: json.dumps(
        {"request_id": json.loads(raw)["request_id"], "success": True}).encode())
    with core:
        link.subscribe(["server"], since=3)
        assert core.messages()[0]["since"] == 3
        assert link.next_event(0) is None and link.event_fd >= 0
        core.connections[0].push({"topic": "server"})
        assert select.select([link.event_fd], [], [], 10)[0]
        assert link.next_event(0) == {"topic": "server"}
    with pytest.raises(LinkError):
        link.next_event(10)
    assert link.event_fd == -1


def test_a_refused_subscription_is_an_error(path: str, link: LineLink) -> None:
    with FakeCore(path, pushing), pytest.raises(RequestError, match="no such thing"):
        link.subscribe(["refuse"])


# ---------------------------------------------------------------- one connection for all who listen

class Shared(LocalRoute):
    """A local socket, as if a connection to it were dear."""

    shared = True


@pytest.fixture
def asker(path: str) -> Iterator[LineLink]:
    link = LineLink.over(Shared(path))
    yield link
    link.close()


def telling(raw: bytes, connection: Connection) -> Optional[bytes]:
    """Confirm a subscription; before the reply to anything else, tell what it carries in `tell`."""
    message = json.loads(raw)
    for event in message.get("tell", ()):
        connection.push(event)
    return encode({"request_id": message["request_id"], "success": True, "sequence": 7})


def test_who_listens_shares_the_connection_where_it_is_dear(path: str, link: LineLink, asker: LineLink) -> None:
    for first in (link, asker):
        with FakeCore(path, telling) as core:
            second = first.listener()
            second.subscribe(["status."])
            first.request(b'{"request_id": "a"}', 5)
            assert len(core.connections) == (1 if first is asker else 2)
            second.close()
            first.request(b'{"request_id": "b"}', 5)
            assert len(core.connections) == (1 if first is asker else 2), "the other one still uses it"
            first.close()
            wait_until(lambda core=core: all(connection.sock.fileno() < 0 for connection in core.connections))


def test_each_hears_what_it_asked_for_whoever_reads(path: str, asker: LineLink) -> None:
    with FakeCore(path, telling) as core:
        one, two = asker.listener(), asker.listener()
        one.subscribe(["status.", "a.stdout"])
        two.subscribe(["a.", "server"], since=5)
        message = core.messages()[-1]
        assert message["topics"] == ["status.", "a.stdout", "a.", "server"] and message["since"] == 5
        assert "announce" not in message
        told = [{"topic": topic, "n": n} for n, topic in enumerate(("status.a", "a.stdout", "server", "b.stdout"))]
        asker.request(encode({"request_id": "a", "tell": told}), 5)
        assert [one.next_event(0), one.next_event(0), one.next_event(0)] == [told[0], told[1], None]
        core.connections[0].push(told[2])
        core.connections[0].push(told[0])
        assert one.next_event(5) == told[0]
        assert [two.next_event(0) for _ in range(3)] == [told[1], told[2], told[2]]
        assert two.next_event(0) is None and one.event_fd == two.event_fd >= 0


def test_who_joins_later_is_told_where_the_others_are(path: str, asker: LineLink) -> None:
    with FakeCore(path, telling) as core:
        one, two = asker.listener(), asker.listener()
        one.subscribe(["a.stdout"])
        two.subscribe(["a.stdout", "a.stderr"])
        assert core.messages()[-1]["announce"] == ["a.stdout"]


def test_who_has_left_is_told_nothing_more(path: str, asker: LineLink) -> None:
    with FakeCore(path, telling) as core:
        one, two = asker.listener(), asker.listener()
        one.subscribe(["a."])
        two.subscribe(["b."])
        one.close()
        asker.request(encode({"request_id": "a", "tell": [{"topic": "a.x"}, {"topic": "b.x"}]}), 5)
        assert [message.get("topics") for message in core.messages()] == [["a."], ["a.", "b."], ["b."], None]
        assert two.next_event(0) == {"topic": "b.x"} and two.next_event(0) is None
        two.close()
        assert json.loads(asker.request(b'{"request_id": "b"}', 5))["request_id"] == "b"
        assert core.messages()[-2]["topics"] == []


def test_what_is_repeated_for_one_is_not_repeated_for_others(path: str, asker: LineLink) -> None:
    with FakeCore(path, telling) as core:
        one, two = asker.listener(), asker.listener()
        one.subscribe(["status."])
        events = [{"type": "status_update", "topic": "status.a", "sequence": n} for n in range(1, 5)]
        for event in events:
            core.connections[0].push(event)
        assert [one.next_event(5) for _ in range(4)] == events
        two.subscribe(["status."], since=0)
        for event in events[:3]:
            core.connections[0].push(event)
        core.connections[0].push({**events[3], "update_type": "heartbeat"})
        assert [two.next_event(5) for _ in range(4)][:3] == events[:3]
        assert one.next_event(0) == {**events[3], "update_type": "heartbeat"} and one.next_event(0) is None


def test_who_does_not_listen_loses_what_is_too_much_and_is_told(
        path: str, asker: LineLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "HEARD_BYTES", 10_000)
    with FakeCore(path, telling):
        one, two = asker.listener(), asker.listener()
        one.subscribe(["a."])
        two.subscribe(["b."])
        asker.request(encode({"request_id": "a", "tell": [{"topic": "a.x", "data": "x" * 1000}] * 20}), 5)
        with pytest.raises(LinkError, match="subscribe again"):
            one.next_event(0)
        assert two.next_event(0) is None
        one.subscribe(["a."])
        asker.request(encode({"request_id": "b", "tell": [{"topic": "a.x"}]}), 5)
        assert one.next_event(0) == {"topic": "a.x"}


def test_a_broken_connection_is_told_to_each(path: str, asker: LineLink) -> None:
    with FakeCore(path, telling) as core:
        one, two = asker.listener(), asker.listener()
        one.subscribe(["a."])
        two.subscribe(["b."])
        asker.request(encode({"request_id": "a", "tell": [{"topic": "a.x"}]}), 5)
        core.cut()
        with pytest.raises(LinkError):
            two.next_event(5)
        assert one.next_event(5) == {"topic": "a.x"}, "what was told is not lost"
        with pytest.raises(LinkError, match="broke"):
            one.next_event(5)
        assert one.event_fd == two.event_fd == -1
        one.subscribe(["a."])
        asker.request(encode({"request_id": "b", "tell": [{"topic": "a.y"}, {"topic": "b.y"}]}), 5)
        assert one.next_event(0) == {"topic": "a.y"} and len(core.connections) == 2


def test_a_refusal_leaves_the_others_as_they_were(path: str, asker: LineLink) -> None:
    def strict(raw: bytes, connection: Connection) -> Optional[bytes]:
        if "bad" in json.loads(raw).get("topics", ()):
            return encode({"request_id": json.loads(raw)["request_id"], "success": False, "error": "no such thing"})
        return telling(raw, connection)

    with FakeCore(path, strict) as core:
        one, two = asker.listener(), asker.listener()
        one.subscribe(["a."])
        with pytest.raises(RequestError, match="no such thing"):
            two.subscribe(["bad"])
        core.connections[0].push({"topic": "a.x"})
        assert one.next_event(5) == {"topic": "a.x"} and len(core.connections) == 1


# ---------------------------------------------------------------- frames

def answers(link: FrameLink, count: int) -> Dict[int, bytes]:
    """Return the next replies by tag."""
    found: Dict[int, bytes] = {}
    wait_until(lambda: (link.flush(), found.update({tag: body for tag, _header, body in link.take()}),
                        len(found) == count)[-1])
    return found


def test_a_frame_link_says_hello_first_and_passes_bytes_untouched(path: str, frames: FrameLink) -> None:
    with FakeCore(path) as core:
        frames.connect()
        for raw in (b'{"a": 1}', b"", b"\xff\n\0", b"y" * 9_000_000):
            tag = frames.ask(b'{"kind":"zmq"}', raw)
            assert answers(frames, 1) == {tag: echo(raw, core.connections[0])}
            frames.forget(tag)
        assert core.heard == [b'{"a": 1}', b"", b"\xff\n\0", b"y" * 9_000_000]
        assert [hello["role"] for hello in core.hellos] == ["requests"]


def test_many_are_under_way_and_answered_in_any_order(path: str, frames: FrameLink) -> None:
    asked: List[int] = []

    def handler(raw: bytes, connection: Connection) -> Optional[bytes]:
        asked.append(connection.tag)
        if len(asked) == 50:
            for tag in reversed(asked):
                connection.reply(b"%d" % tag, tag)
        return None

    with FakeCore(path, handler):
        frames.connect()
        tags = [frames.ask(b"{}", b"x") for _ in range(50)]
        assert answers(frames, 50) == {tag: b"%d" % tag for tag in tags}


def test_what_is_not_answered_is_asked_again_of_the_next_core_and_nothing_else(path: str, frames: FrameLink) -> None:
    with FakeCore(path, lambda raw, _: raw if raw == b"first" else None) as core:
        frames.connect()
        first, second, third = (frames.ask(b"{}", raw) for raw in (b"first", b"second", b"third"))
        assert answers(frames, 1) == {first: b"first"}
        frames.forget(first)
        wait_until(lambda: core.heard == [b"first", b"second", b"third"])
    with pytest.raises(LinkError):
        wait_until(lambda: frames.take())
    assert frames.fd < 0
    fourth = frames.ask(b"{}", b"fourth")
    with FakeCore(path, lambda raw, _: raw) as core:
        frames.connect()
        assert answers(frames, 3) == {second: b"second", third: b"third", fourth: b"fourth"}
        assert core.heard == [b"second", b"third", b"fourth"]


def test_a_post_is_answered_and_asked_only_once(path: str, frames: FrameLink) -> None:
    with FakeCore(path, lambda raw, _: raw) as core:
        frames.connect()
        frames.post(b"{}", b"post")
        assert list(answers(frames, 1).values()) == [b"post"]
        frames.close()
        frames.connect()
        wait_until(lambda: len(core.hellos) == 2)
        assert core.heard == [b"post"]


def test_no_descriptor_left_is_the_links_own_error(
        path: str, frames: FrameLink, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(socket, "socket", none_left)
    with pytest.raises(LinkError, match="Too many open files"):
        frames.connect()
    monkeypatch.undo()
