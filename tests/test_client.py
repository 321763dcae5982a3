"""The client library: addresses, asking again, typed results, and following without a gap or a repeat.

Owns:    the tests of agentserver/client.py, and of what it says: calls.py to lines.py.
Runs in: the test process, against a core that is a thread and can lie, stutter and die.
Unaware: of real agents; the contract suite has those.
"""
from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from driven import Driven
from fakecore import Connection, FakeCore
from support import MAIN, wait_until

from agentserver import AgentClient, EventsDropped, OutputDropped, aclient, address, client, follow, hints
from agentserver.core.link import LineLink, NotThere, socket_path
from agentserver.errors import LinkError, RequestError, RequestTimeout
from agentserver.wire import encode, wire_text

Json = Dict[str, Any]
ID = "12345678-1234-4234-8234-123456789abc"


class Story:
    """One agent as a core would tell of it: what it wrote, whether it ended, what happened."""

    def __init__(self) -> None:
        self.output = {"stdout": b"", "stderr": b""}
        self.first = 0               # bytes before are no longer kept
        self.half = 0                # bytes at the end that are no whole character
        self.first_kept = 1          # events before are no longer kept
        self.status = "running"
        self.beat_secs = 10.0        # how often it says that its heart beats
        self.events: List[Json] = []
        self.asked: List[Json] = []
        self.listeners: List[Connection] = []
        self.before_reply: Dict[str, Any] = {}   # command_type -> called once before it is answered

    def handle(self, raw: bytes, connection: Connection) -> Optional[bytes]:
        message = json.loads(raw)
        self.asked.append(message)
        fields = getattr(self, message["type"])(message, connection)
        return encode({"type": message["type"].replace("request", "response"), "request_id": message["request_id"],
                       "success": True, **fields})

    def subscribe_request(self, message: Json, connection: Connection) -> Json:
        self.listeners.append(connection)
        for topic in message["topics"]:  # a new subscription is told where its stream stands
            if topic.startswith(ID + "."):
                self.tell(len(self.output[topic[37:]]), len(self.output[topic[37:]]), topic[37:])
        return {"sequence": len(self.events)}

    def health_check_request(self, message: Json, connection: Connection) -> Json:
        return {"healthy": True, "metadata": {"status_update_interval_secs": str(self.beat_secs)}}

    def control_command(self, message: Json, connection: Connection) -> Json:
        command = message["command_type"]
        self.before_reply.pop(command, lambda: None)()
        if message["agent_id"] not in (ID, "worker"):
            return {"success": False, "error": "there is no such agent", "error_code": "agent_not_found"}
        data: Json = {}
        if command.startswith("read_"):
            data = self.read(command[5:], **message["payload"])
        elif command == "inspect":
            data = {"agent_info": {"id": ID, "name": "worker", "status": self.status, "exit": {"code": 3}}}
        return {"agent_id": ID, "status": self.status, "data": data}

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "terminated")

    def read(self, stream: str, offset: int = 0, max_bytes: int = 65536) -> Json:
        begin = max(offset, self.first)
        data = self.output[stream][begin:begin + max_bytes]
        text, encoding = wire_text(data)
        return {"data": text, "encoding": encoding, "bytes": len(data), "offset": begin,
                "next_offset": begin + len(data), "first_offset": self.first, "dropped": begin - offset,
                "eof": self.ended and begin + len(data) == len(self.output[stream])}

    def events_request(self, message: Json, connection: Connection) -> Json:
        found = [event for event in self.events if event["sequence"] > message["since"]
                 and event["sequence"] >= self.first_kept
                 and message.get("agent_id") in (None, event["agent_id"])]
        page = found[:min(message["limit"], 2)]
        return {"events": page, "next": page[-1]["sequence"] if page else min(message["since"], len(self.events)),
                "first_kept": self.first_kept, "more": len(found) > len(page)}

    # ------------------------------------------------------------ telling

    def push(self, message: Json) -> None:
        for listener in self.listeners:
            try:
                listener.push(message)
            except OSError:
                pass

    def write(self, data: bytes, stream: str = "stdout", push: bool = True) -> None:
        offset = len(self.output[stream])
        self.output[stream] += data
        if push:
            self.tell(offset, len(self.output[stream]), stream)

    def tell(self, begin: int, end: int, stream: str = "stdout") -> None:
        text, encoding = wire_text(self.output[stream][begin:end])
        self.push({"type": "log_stream", "topic": f"{ID}.{stream}", "agent_id": ID, "stream_type": stream, "data": text,
                   "encoding": encoding, "offset": begin, "next_offset": end, "sequence": len(self.events),
                   "eof": self.ended and end == len(self.output[stream])})

    def beat(self) -> None:
        self.push({"type": "status_update", "topic": f"status.{ID}", "agent_id": ID, "status": self.status,
                   "update_type": "heartbeat", "sequence": len(self.events),
                   "data": {"last_event": len(self.events), "output": {
                       stream: {"first_offset": self.first, "end_offset": len(data) + self.half}
                       for stream, data in self.output.items()}}})

    def happen(self, status: str, push: bool = True) -> None:
        self.status = status
        self.events.append({"type": "status_update", "topic": f"status.{ID}", "agent_id": ID, "status": status,
                            "update_type": "status_changed", "sequence": len(self.events) + 1,
                            "data": {"exit": {"code": 3, "reason": "exited"}} if self.ended else {}})
        if push:
            self.push(self.events[-1])

    def end(self, push: bool = True) -> None:
        self.status = "failed"
        for stream, data in self.output.items():
            if push:
                self.tell(len(data), len(data), stream)
        self.happen("failed", push)

    def reads(self) -> List[Json]:
        return [message["payload"] for message in self.asked if message.get("command_type", "").startswith("read_")]


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def core(state_dir: Path, story: Story) -> Iterator[FakeCore]:
    with FakeCore(socket_path(str(state_dir)), story.handle) as core:
        yield core


@pytest.fixture(params=["unix:", "ssh://localhost"])
def caller(core: FakeCore, state_dir: Path, twin: Any, request: pytest.FixtureRequest) -> Iterator[AgentClient]:
    """A client over the Unix socket, and one by way of `agentserver stdio`."""
    with twin(f"{request.param}{state_dir}", timeout=20) as caller:
        yield caller


@pytest.fixture
def hasty(story: Story) -> None:
    """A heart that beats so often that followers soon notice that it does not."""
    story.beat_secs = 0.02


# ---------------------------------------------------------------- addresses

def test_an_address_is_found_when_none_is_given(state_dir: Path) -> None:
    assert address.default_address({"AGENTSERVER_SERVER": "tcp://h:1", "HOME": "/x"}) == "tcp://h:1"
    environ = {"AGENTSERVER_STATE_DIR": str(state_dir), "HOME": "/x"}
    assert address.default_address(environ) == "tcp://127.0.0.1:5555"
    (state_dir / "core.sock").touch()
    assert address.default_address(environ) == f"unix:{state_dir}/core.sock"


@pytest.mark.parametrize("address, sentence", [
    ("5555", "not an address"), ("http://x", "not an address"),
    ("unix:", "not an address")])
def test_what_is_no_address_is_said(address: str, sentence: str) -> None:
    with pytest.raises(LinkError, match=sentence):
        AgentClient(address)


def test_without_pyzmq_the_local_socket_is_recommended() -> None:
    code = ("import sys; sys.modules['zmq'] = None\n"
            "import agentserver\n"
            "try: agentserver.AgentClient('tcp://127.0.0.1:1')\n"
            "except agentserver.LinkError as e: print(e)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=str(MAIN.parent.parent))
    assert "pip install pyzmq" in done.stdout and not done.stderr and done.stdout.count("\n") == 1


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "ipc:///no/such/socket", "unix:/no/such/socket"])
def test_nobody_there_is_said_soon(address: str, twin: Any) -> None:
    if not address.startswith("unix:"):
        pytest.importorskip("zmq")
    with twin(address, retry_secs=0) as caller, pytest.raises(LinkError, match="agentserver serve"):
        caller.health()


# ---------------------------------------------------------------- one request

def test_a_refusal_is_an_error_with_code_and_reply(caller: AgentClient) -> None:
    with pytest.raises(RequestError) as caught:
        caller.control("nobody", "get_status")
    assert (caught.value.code, str(caught.value)) == ("agent_not_found", "there is no such agent")
    assert caught.value.reply and caught.value.reply["success"] is False


def test_the_same_bytes_are_sent_again_when_the_core_died(caller: AgentClient, core: FakeCore, story: Story) -> None:
    assert caller.agent("worker").id == ID
    handler = core.handler

    def dies(raw: bytes, connection: Connection) -> Optional[bytes]:
        core.handler = handler
        connection.cut()
        return None

    core.handler = dies
    assert caller.agent("worker").id == ID
    assert core.heard[-1] == core.heard[-2] != core.heard[0]


def test_a_server_that_comes_back_is_found(caller: AgentClient, core: FakeCore, story: Story) -> None:
    assert caller.agent("worker").id == ID
    core.close(crash=True)
    successor: List[FakeCore] = []
    timer = threading.Timer(0.2, lambda: successor.append(FakeCore(core.path, story.handle)))
    timer.start()
    assert caller.agent("worker").id == ID
    timer.join()
    successor[0].close()


def test_silence_is_a_timeout_and_absence_is_not(caller: AgentClient, core: FakeCore, state_dir: Path) -> None:
    core.handler = lambda raw, connection: None
    with pytest.raises(RequestTimeout, match="safe"):
        caller.request({"type": "health_check_request"}, timeout=0.1)
    core.close()
    with type(caller)(f"unix:{state_dir}/core.sock") as other, pytest.raises(NotThere):
        other.health()


def test_a_first_request_that_is_cut_is_asked_again(twin: Any, state_dir: Path) -> None:
    """Somebody was there a moment ago; so nobody being there now is not yet the end."""
    path = socket_path(str(state_dir))
    successor: List[FakeCore] = []
    timer = threading.Timer(0.2, lambda: successor.append(FakeCore(path)))

    def dies(raw: bytes, connection: Connection) -> Optional[bytes]:
        core.close()
        timer.start()
        return None

    with FakeCore(path, dies) as core, twin(f"unix:{path}") as caller:
        assert caller.request({"type": "x"})["success"]
        timer.join()
        successor[0].close()


@pytest.mark.parametrize("answer", [b'{"request_id": "other", "success": true}', b"[]", b"hello"])
def test_a_reply_to_something_else_is_not_believed(caller: AgentClient, core: FakeCore, answer: bytes) -> None:
    if not caller.address.startswith("unix:"):
        pytest.skip("what is no object is passed over there until the protocol begins")
    if isinstance(caller, Driven) and b"other" in answer:
        pytest.skip("to it, that is the reply to a request that was cancelled")
    core.handler = lambda raw, connection: answer
    with pytest.raises(LinkError, match="is it an agentserver"):
        caller.health()


def test_a_spawn_says_what_it_does_not_know(caller: AgentClient) -> None:
    with pytest.raises(TypeError, match="enviroment"):
        caller.spawn(["true"], enviroment={})


def test_bytes_and_text_reach_stdin_as_they_are(caller: AgentClient, story: Story) -> None:
    agent = caller.agent("worker")
    for data in ("häß\n", b"\xff\0", "\udcff"):
        agent.write(data)
    sent = [message["payload"] for message in story.asked if message.get("command_type") == "write_stdin"]
    assert [(payload["data"], payload["encoding"]) for payload in sent] == [
        ("häß\n", "utf-8"), ("/wA=", "base64"), ("/w==", "base64")]


def test_a_batch_does_not_raise_for_those_that_refuse(caller: AgentClient, core: FakeCore) -> None:
    core.handler = lambda raw, connection: encode({
        "request_id": json.loads(raw)["request_id"], "success": False, "error": "1 of 1 failed", "failed": 1,
        "error_code": "invalid_state", "results": [{"agent_id": ID, "success": False}]})
    outcome = caller.batch("stop", [ID])
    assert (outcome.success, outcome.failed, len(outcome.results)) == (False, 1, 1)


@pytest.mark.parametrize("offset, limit", [(0, None), (0, 30), (3, 11), (3, None), (36, 5), (40, None)])
def test_a_list_too_large_for_a_reply_is_asked_for_in_halves(caller: AgentClient, core: FakeCore, offset: int,
                                                             limit: Optional[int]) -> None:
    """A reply holds at most three agents here; all come, in order, each once."""
    agents = [{"id": f"agent-{n}"} for n in range(37)]
    sizes: List[int] = []

    def handle(raw: bytes, connection: Connection) -> Optional[bytes]:
        message = json.loads(raw)
        end = None if message["limit"] is None else message["offset"] + message["limit"]
        page = agents[message["offset"]:end]
        sizes.append(len(page))
        fields = {"success": True, "agents": page, "total": len(agents)} if len(page) <= 3 else {
            "success": False, "error": "the reply would be too large", "error_code": "message_too_large"}
        return encode({"type": "list_agents_response", "request_id": message["request_id"], **fields})

    core.handler = handle
    wanted = agents[offset:] if limit is None else agents[offset:offset + limit]
    assert [info.id for info in caller.list(all=True, offset=offset, limit=limit)] == [a["id"] for a in wanted]
    assert len(sizes) <= 3 * max(len(wanted), 1)


def test_one_agent_too_large_for_a_reply_is_said(caller: AgentClient, core: FakeCore) -> None:
    core.handler = lambda raw, connection: encode({
        "request_id": json.loads(raw)["request_id"], "success": False, "error": "too large",
        "error_code": "message_too_large"})
    with pytest.raises(RequestError, match="too large"):
        caller.list()


# ---------------------------------------------------------------- following output

def followed(caller: AgentClient, **options: Any) -> Dict[str, bytes]:
    """Follow to the end and put together what came; each piece has to begin where the one before ended."""
    got, reached = {"stdout": b"", "stderr": b""}, {"stdout": 0, "stderr": 0}
    for agent_id, stream, chunk in caller.follow("worker", timeout=20, **options):
        assert agent_id == ID and chunk.offset == reached[stream]
        assert len(chunk.data) == chunk.next_offset - chunk.offset - chunk.dropped
        got[stream] += chunk.data
        reached[stream] = chunk.next_offset
    return got


class Follower:
    """Follows in a thread of its own, as people do: it sits waiting when the agent writes."""

    def __init__(self, caller: AgentClient) -> None:
        self.got = b""
        self._caller = caller
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with type(self._caller)(self._caller.address, timeout=20) as caller:
            for _, _, chunk in caller.follow("worker", streams=["stdout"], timeout=20):
                self.got += chunk.data

    def has(self, data: bytes) -> None:
        wait_until(lambda: self.got == data, what=f"{data!r}; there is {self.got!r}")

    def finished(self) -> bytes:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.got


class Both:
    """Follows both streams in a thread of its own."""

    def __init__(self, caller: AgentClient) -> None:
        self.got = {"stdout": b"", "stderr": b""}
        self._caller = caller
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with type(self._caller)(self._caller.address, timeout=20) as caller:
            for _, stream, chunk in caller.follow("worker", timeout=20):
                self.got[stream] += chunk.data

    def finished(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_an_ended_agent_is_followed_to_its_end_at_once(caller: AgentClient, story: Story) -> None:
    story.write(b"a" * 100_000)
    story.write(b"\xff\xfe", "stderr")
    story.end()
    assert followed(caller) == story.output


def test_pushed_bytes_are_used_without_asking(caller: AgentClient, story: Story) -> None:
    story.write(b"backlog\n")
    follower = Follower(caller)
    wait_until(lambda: len(story.reads()) == 2)      # the second finds nothing more
    for line in (b"one\n", b"\xff\xfe\n", b"two\n"):
        story.write(line)
        follower.has(story.output["stdout"])
    story.end()
    assert follower.finished() == story.output["stdout"] and len(story.reads()) == 2


def test_gaps_repeats_and_overlaps_are_mended(caller: AgentClient, story: Story) -> None:
    story.write(b"0123456789")
    follower = Follower(caller)
    wait_until(lambda: len(story.reads()) == 2)
    story.tell(0, 10)                      # all of it again
    story.tell(0, 5)                       # a part of it again
    story.write(b"abcdef", push=False)
    story.tell(8, 13)                      # overlapping both ways
    story.write(b"ghi", push=False)        # lost
    story.write(b"jkl")
    story.end()
    assert follower.finished() == story.output["stdout"] == b"0123456789abcdefghijkl"


def test_what_is_never_pushed_is_found_by_looking(caller: AgentClient, story: Story, hasty: None) -> None:
    chunks = caller.follow("worker")
    story.write(b"first")
    assert next(chunks)[2].data == b"first"
    story.write(b"second", push=False)
    assert next(chunks)[2].data == b"second"
    story.end(push=False)
    assert list(chunks) == []


def test_a_broken_connection_loses_and_repeats_nothing(caller: AgentClient, core: FakeCore, story: Story) -> None:
    story.write(b"before ")
    follower = Follower(caller)
    wait_until(lambda: len(story.reads()) == 2)
    story.write(b"meanwhile ", push=False)
    core.cut()
    follower.has(b"before meanwhile ")
    wait_until(lambda: len(story.listeners) == 2)
    story.write(b"after")
    story.end()
    assert follower.finished() == b"before meanwhile after"


def test_one_gap_stands_in_the_place_of_dropped_bytes(caller: AgentClient, story: Story) -> None:
    story.write(b"0123456789")
    story.first = 4
    story.end()
    (_, _, gap), (_, _, chunk) = caller.follow("worker", streams=["stdout"], since={"stdout": 1})
    assert gap == OutputDropped(ID, "stdout", 1, 4) and (gap.offset, gap.next_offset, gap.data) == (1, 4, b"")
    assert (chunk.data, chunk.offset, chunk.dropped) == (b"456789", 4, 0)


def test_a_gap_ends_a_line(caller: AgentClient, story: Story) -> None:
    story.write(b"one\nt")
    lines = caller.agent("worker").lines()
    assert next(lines) == "one"
    story.write(b"wo\nthree\n", push=False)
    story.first = 10
    story.end()
    assert list(lines) == ["t", "ree"]


def test_offsets_say_where_to_begin(caller: AgentClient, story: Story) -> None:
    story.write(b"0123456789")
    story.write(b"abc", "stderr")
    story.end()
    got = {stream: chunk.data for _, stream, chunk in caller.follow("worker", offsets={(ID, "stdout"): 8, "stderr": 1})}
    assert got == {"stdout": b"89", "stderr": b"bc"}


def test_a_lost_end_of_a_stream_is_looked_for_soon(caller: AgentClient, story: Story) -> None:
    """A message before the end did not come either, so the end is not waited for until the next regular look."""
    story.beat_secs = 20.0
    follower = Both(caller)
    wait_until(lambda: len(story.reads()) == 2)
    story.write(b"lost", push=False)
    story.write(b" and found")             # out of turn: something before it was dropped
    wait_until(lambda: follower.got["stdout"] == b"lost and found")
    story.happen("failed")
    story.tell(0, 0, "stderr")             # stderr is done; the end of stdout is dropped
    began = time.monotonic()
    follower.finished()
    assert follower.got == story.output and time.monotonic() - began < story.beat_secs / 2


def test_a_follower_can_be_bounded_in_time(caller: AgentClient) -> None:
    with pytest.raises(RequestTimeout):
        list(caller.follow("worker", timeout=0.05))


def test_a_heartbeat_tells_of_lost_output(caller: AgentClient, story: Story) -> None:
    """The last of it too, that no later message shows to be missing."""
    story.beat_secs = 3600.0   # it does not become impatient
    follower = Both(caller)
    wait_until(lambda: len(story.reads()) == 2)
    story.write(b"lost", push=False)
    story.write(b"lost too", "stderr", push=False)
    story.beat()
    wait_until(lambda: follower.got == story.output)
    story.end()
    follower.finished()


def test_a_follower_asks_nothing_while_hearts_beat(caller: AgentClient, story: Story) -> None:
    """Nor when an agent has written half a character, which is not told before its other half."""
    story.beat_secs = 0.1
    follower = Both(caller)
    wait_until(lambda: len(story.reads()) == 2)
    story.half = 1
    asked, beats = [2], [0]

    def quiet() -> bool:
        story.beat()
        beats[0] = beats[0] + 1 if len(story.asked) == asked[0] else 0
        asked[0] = len(story.asked)
        return len(story.reads()) > 2 and beats[0] > 30   # more than three times as long as it would wait for one
    wait_until(quiet)
    story.half = 0
    story.end()
    follower.finished()


def test_when_even_heartbeats_stay_away_the_truth_is_asked(caller: AgentClient, story: Story, hasty: None) -> None:
    follower = Both(caller)
    wait_until(lambda: len(story.reads()) > 4, what="looks without having been told")
    wait_until(lambda: len(story.listeners) > 1, what="listening anew: the connection may be dead")
    story.end(push=False)
    follower.finished()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_lost_or_repeated_each_byte_comes_once(
        caller: AgentClient, core: FakeCore, story: Story, hasty: None, seed: int) -> None:
    dice = random.Random(seed)

    def live() -> None:
        for _ in range(60):
            stream = dice.choice(["stdout", "stderr"])
            story.write(bytes(dice.randrange(256) for _ in range(dice.randrange(1, 40))), stream, dice.random() < 0.6)
            size = len(story.output[stream])
            begin = dice.randrange(size)
            if dice.random() < 0.5:
                story.tell(begin, dice.randrange(begin, size) + 1, stream)
            if dice.random() < 0.05:
                core.cut()
        story.end(dice.random() < 0.5)

    thread = threading.Thread(target=live)
    thread.start()
    got = followed(caller)
    thread.join()
    assert got == story.output


def test_lines_are_whole_whatever_the_chunks(caller: AgentClient, story: Story) -> None:
    agent = caller.agent("worker")
    for piece in (b"on", b"e\ntw", b"o\n\n", b"\xff", b"\nlast"):
        story.write(piece)
    assert list(agent.lines(follow=False)) == ["one", "two", "", "\ufffd", "last"]
    story.end()
    assert list(agent.lines()) == ["one", "two", "", "\ufffd", "last"]


@pytest.mark.parametrize("written, lines", [
    (b"12345678\n", ["12345678"]),
    (b"123456789\n\n", ["12345678", "9", ""]),
    ("1234567\u00e99 and more\n".encode(), ["1234567", "\u00e99 and ", "more"]),
    ("12345\U0001f600\n".encode(), ["12345", "\U0001f600"]),
    (b"\x80" * 10, ["\ufffd" * 8, "\ufffd" * 2])])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_a_longer_line_than_may_be_held_comes_in_pieces(caller: AgentClient, story: Story, written: bytes,
                                                        lines: List[str], at_once: int) -> None:
    for at in range(0, len(written), at_once):
        story.write(written[at:at + at_once])
    agent = caller.agent("worker")
    assert list(agent.lines(follow=False, max_line=8)) == lines
    story.end()
    assert list(agent.lines(max_line=8)) == lines


def test_a_line_without_end_is_not_held(caller: AgentClient, story: Story) -> None:
    agent = caller.agent("worker")
    story.write(b"x" * 100)
    endless = agent.lines(max_line=40)
    assert [next(endless), next(endless)] == ["x" * 40] * 2
    story.write(b"y" * 21)
    assert next(endless) == "x" * 20 + "y" * 20
    story.end()
    assert list(endless) == ["y"]
    with pytest.raises(ValueError, match="max_line"):
        next(agent.lines(max_line=3))


# ---------------------------------------------------------------- waiting

def test_waiting_ends_with_the_event(caller: AgentClient, story: Story) -> None:
    story.before_reply["get_status"] = lambda: threading.Timer(0.1, story.end).start()
    assert caller.agent("worker").wait(timeout=20).code == 3


def test_an_end_that_nobody_told_of_is_found(caller: AgentClient, story: Story, hasty: None) -> None:
    timer = threading.Timer(0.1, story.end, [False])
    timer.start()
    (info,) = caller.wait(["worker"], timeout=20)
    timer.join()
    assert info.status == "failed"


def test_waiting_for_a_status_ends_with_it_or_with_the_agent(caller: AgentClient, story: Story) -> None:
    assert caller.wait("worker", status="running")[0].status == "running"
    story.end()
    assert caller.wait("worker", status="paused", timeout=20)[0].status == "failed"


def test_waiting_can_be_bounded_and_names_who_is_late(caller: AgentClient) -> None:
    with pytest.raises(RequestTimeout, match=f"agent {ID} had not ended"):
        caller.wait("worker", timeout=0.05)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a caller has looked at the agent, so that what it learns next of it is what it is told."""
    event = threading.Event()
    real = hints.Hints.looked

    def look(self: hints.Hints, key: str) -> None:
        real(self, key)
        event.set()

    monkeypatch.setattr(hints.Hints, "looked", look)
    return event


def test_a_told_end_is_believed_when_the_server_has_gone(
        caller: AgentClient, core: FakeCore, story: Story, looked: threading.Event) -> None:
    """Without the seconds in which a server that was reached before is tried again."""
    def end_and_go() -> None:
        looked.wait(20)
        core.handler = lambda raw, connection: None   # it answers nothing more
        story.end()
        core.close()

    caller._calls.retry_secs = 1000.0   # were `caller` to ask after that, the test would hang
    thread = threading.Thread(target=end_and_go)
    thread.start()
    (info,) = caller.wait(ID, timeout=20)
    thread.join()
    assert (info.id, info.status, info.exit and info.exit.code) == (ID, "failed", 3)
    assert caller.wait([ID])[0].exit == info.exit, "and once more, as `run` does after the output"


def test_a_told_end_is_not_believed_of_an_agent_that_runs_again(
        caller: AgentClient, story: Story, looked: threading.Event) -> None:
    thread = threading.Thread(target=lambda: looked.wait(20) and story.end())
    thread.start()
    assert caller.agent("worker").wait(timeout=20).code == 3 and ID in caller._calls.ends
    thread.join()
    story.happen("running", push=False)
    with pytest.raises(RequestTimeout):
        caller.wait(ID, timeout=0.05)


# ---------------------------------------------------------------- events

def test_stored_events_come_in_order_each_once(caller: AgentClient, story: Story) -> None:
    for status in ("initializing", "running", "paused"):
        story.happen(status)
    events = caller.follow_events(since=1)
    got = [next(events)["sequence"] for _ in range(2)]
    story.happen("running")
    got.append(next(events)["sequence"])
    story.push(story.events[1])                                   # an old one again
    story.push({"type": "status_update", "topic": f"status.{ID}", "agent_id": ID, "update_type": "heartbeat",
                "sequence": 4})
    story.happen("paused", push=False)                            # lost
    story.happen("running")
    got += [next(events)["sequence"] for _ in range(2)]
    assert got == [2, 3, 4, 5, 6]
    events.close()  # type: ignore[attr-defined]


def soon(items: Iterator[Any]) -> Any:
    """Return the next item, or fail if it does not come by itself."""
    found: List[Any] = []
    thread = threading.Thread(target=lambda: found.append(next(items)), daemon=True)
    thread.start()
    wait_until(lambda: found, what="the next item")
    return found[0]


def test_a_server_heartbeat_tells_of_a_lost_event(caller: AgentClient, story: Story) -> None:
    story.beat_secs = 3600.0   # it does not become impatient
    story.happen("running")
    events = caller.follow_events(since=0)
    assert next(events)["sequence"] == 1
    story.happen("paused", push=False)
    story.push({"type": "server_update", "topic": "server", "state": "up", "sequence": 2})
    assert soon(events) == story.events[1]
    events.close()  # type: ignore[attr-defined]


def test_a_heartbeat_of_an_agent_tells_of_a_lost_event(caller: AgentClient, story: Story) -> None:
    story.beat_secs = 3600.0   # it does not become impatient
    story.happen("running")
    events = caller.follow_events(since=0, agent="worker")
    assert next(events)["sequence"] == 1
    story.happen("paused", push=False)
    story.beat()
    assert soon(events) == story.events[1]
    events.close()  # type: ignore[attr-defined]


def test_one_gap_stands_in_the_place_of_events_that_are_gone(caller: AgentClient, story: Story) -> None:
    for status in itertools.islice(itertools.cycle(["running", "paused"]), 7):
        story.happen(status)
    story.first_kept = 5
    events = caller.follow_events(since=2)
    gap = next(events)
    assert isinstance(gap, EventsDropped) and (gap.from_sequence, gap.to_sequence) == (3, 4)
    assert gap["type"] == "events_dropped" and gap["sequence"] == 4
    assert [next(events)["sequence"] for _ in range(3)] == [5, 6, 7]
    story.happen("running", push=False)       # missed, and gone before it was asked for
    story.happen("paused", push=False)
    story.first_kept = 9
    story.push({"type": "server_update", "topic": "server", "state": "up", "sequence": 9})
    gap = next(events)
    assert isinstance(gap, EventsDropped) and (gap.from_sequence, gap.to_sequence) == (8, 8)
    assert next(events)["sequence"] == 9
    events.close()  # type: ignore[attr-defined]


def test_from_now_on_means_nothing_old(caller: AgentClient, story: Story) -> None:
    story.happen("running")
    events = caller.follow_events(agent="worker")
    later = threading.Thread(target=lambda: (wait_until(lambda: story.listeners), story.happen("paused")))
    later.start()
    assert next(events)["sequence"] == 2
    later.join()
    events.close()  # type: ignore[attr-defined]


def test_the_newest_event_is_found_also_without_being_told(caller: AgentClient, story: Story) -> None:
    for status in itertools.islice(itertools.cycle(["running", "paused"]), 7):
        story.happen(status)
    assert caller._run(follow._latest(caller._calls)) == 7


# ---------------------------------------------------------------- over ZeroMQ

def test_the_same_over_zeromq(state_dir: Path, story: Story, twin: Any) -> None:
    zmq = pytest.importorskip("zmq")
    from agentserver import AgentServer, ServerConfig
    story.health_check_request = lambda message, connection: {  # type: ignore[attr-defined]
        "metadata": {"pub_endpoint": server.pub_endpoint}}
    story.shutdown_request = lambda message, connection: {}  # type: ignore[attr-defined]
    with FakeCore(socket_path(str(state_dir)), story.handle) as core:
        server = AgentServer(ServerConfig(state_dir=str(state_dir), endpoint=f"ipc://{state_dir}/rep",
                                          pub_endpoint="tcp://127.0.0.1:0"))
        thread = threading.Thread(target=server.start)
        thread.start()
        assert server.wait_running(20) and zmq
        with twin(server.endpoint, timeout=20) as caller:
            chunks = caller.follow("worker", streams=["stdout"], timeout=20)
            story.write(b"one ")
            got = next(chunks)[2].data
            core.cut()
            story.write(b"two ")
            story.write(b"three")
            story.end()
            assert got + b"".join(chunk.data for _, _, chunk in chunks) == b"one two three"
            assert caller.agent("worker").wait(20).code == 3
        server.stop()
        core.close()
        thread.join(20)


def test_a_lost_request_is_asked_again_over_zeromq(monkeypatch: pytest.MonkeyPatch, twin: Any) -> None:
    zmq = pytest.importorskip("zmq")
    from agentserver.shell.link import ZmqLink
    monkeypatch.setattr(ZmqLink, "attempt_secs", 0.1)
    heard: List[bytes] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            for turn in range(3):
                *route, raw = router.recv_multipart()
                heard.append(raw)
                if turn == 2:
                    reply = {"type": "x", "request_id": json.loads(raw)["request_id"], "success": True, "healthy": True}
                    router.send_multipart([*route, encode(reply)])

        thread = threading.Thread(target=answer)
        thread.start()
        with twin(f"tcp://127.0.0.1:{port}", timeout=20) as caller:
            assert caller.health().healthy
        thread.join()
    assert len(heard) == 3 and len(set(heard)) == 1


def test_publishing_off_does_not_stop_a_follower(
        caller: AgentClient, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LineLink, *_: Any, **__: Any) -> Json:
        raise LinkError("this server publishes nothing")

    monkeypatch.setattr(LineLink, "subscribe", refuse)
    monkeypatch.setattr(hints, "_BLIND_SECS", 0.02)
    timer = threading.Timer(0.1, lambda: (story.write(b"unheard"), story.end()))
    began = time.monotonic()
    timer.start()
    assert followed(caller)["stdout"] == b"unheard" and time.monotonic() >= began
    timer.join()


# ---------------------------------------------------------------- drivers

def test_a_step_that_a_driver_does_not_know_is_an_error() -> None:
    """It hung up instead, and the next request went over a new connection as if nothing had been asked."""
    step: Any = object()
    with client._Driver(AgentClient("unix:/nonexistent")) as driver, pytest.raises(TypeError, match="the step object"):
        driver._do(step)
    with pytest.raises(TypeError, match="the step object"):
        asyncio.run(aclient._Driver(aclient.AsyncAgentClient("unix:/nonexistent"))._do(step))
