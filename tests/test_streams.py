"""stdin, stdout and stderr: every byte once, nothing lost, nothing that blocks; and who follows is pushed to.

Owns:    acknowledged writes, the bounded buffer, close and end of file; reads by offset, times, the cap, ends of
         streams; subscriptions on the Unix socket.
Runs in: the test process; servers and agents are real.
Unaware: of segments and indexes (test_output.py).
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Callable

import pytest
from support import Server, wait_until
from wire import LineWire, Wire, data_of, new_id

MIB = 1024 * 1024
BUFFER = MIB


# ---------------------------------------------------------------- stdin

def read_by_deaf(wire: Wire, deaf: str) -> tuple[int, str]:
    """Let the deaf agent read, and return how much it got and its SHA-256."""
    os.kill(wire.info(deaf)["pid"], signal.SIGUSR1)
    size, digest = wire.output(deaf).decode().splitlines()[1].split()
    return int(size), digest


def test_writes_are_all_or_nothing(unix: LineWire) -> None:
    deaf, accepted, refused = unix.spawn("deaf"), hashlib.sha256(), 0
    total, size = 0, 200_000
    while size:
        piece = bytes(total + i & 0x7F for i in range(size)).decode()
        reply = unix.ask("control_command", agent_id=deaf, command_type="write_stdin", payload={"data": piece})
        if reply["success"]:
            assert reply["data"]["bytes_written"] == size and 0 <= reply["data"]["buffered"] <= BUFFER
            accepted.update(piece.encode())
            total += size
        else:
            assert reply["error_code"] == "stdin_full", reply
            refused += 1
            size //= 10
    assert refused >= 5 and BUFFER <= total <= BUFFER + 1024 * 1024, "one buffer and what the pipe holds"
    assert unix.ok("health_check_request")["healthy"]
    unix.control(deaf, "close_stdin")
    assert read_by_deaf(unix, deaf) == (total, accepted.hexdigest())


def test_a_write_larger_than_the_buffer_is_refused_whole(unix: LineWire) -> None:
    echo = unix.spawn("echo")
    sentence = unix.cannot("stdin_full", echo, "write_stdin", data="x" * (2 * MIB))
    assert str(BUFFER) in sentence
    unix.control(echo, "write_stdin", data="after", eof=True)
    assert unix.output(echo) == b"ready\nafter"


def test_the_buffer_size_is_a_setting(start_server: Callable[..., Server]) -> None:
    server = start_server("--stdin-buffer-bytes", "4096")
    with LineWire(server.socket_path) as wire:
        echo = wire.spawn("echo")
        wire.control(echo, "write_stdin", data="x" * 4096)
        wire.cannot("stdin_full", echo, "write_stdin", data="x" * 100_000)


def test_close_comes_after_what_is_buffered(unix: LineWire) -> None:
    deaf = unix.spawn("deaf")
    text = "0123456789" * 80_000
    assert unix.control(deaf, "write_stdin", data=text)["buffered"] > 0, "more than a pipe holds"
    assert unix.control(deaf, "close_stdin")["closed"] is True
    unix.cannot("stdin_closed", deaf, "write_stdin", data="too late")
    assert read_by_deaf(unix, deaf) == (800_000, hashlib.sha256(text.encode()).hexdigest())


def test_a_large_text_goes_through(unix: LineWire) -> None:
    echo, text = unix.spawn("echo"), os.urandom(700_000).hex()
    sent = 0
    while sent < len(text):
        reply = unix.ask("control_command", agent_id=echo, command_type="write_stdin",
                         payload={"data": text[sent:sent + 300_000]})
        if reply["success"]:
            sent += reply["data"]["bytes_written"]
        else:
            assert reply["error_code"] == "stdin_full"
    unix.control(echo, "close_stdin")
    assert unix.output(echo) == b"ready\n" + text.encode()
    assert unix.output(echo, "stderr") == b"eof after %d bytes\n" % len(text)


def test_an_empty_write_and_eof(unix: LineWire) -> None:
    echo = unix.spawn("echo")
    assert unix.control(echo, "write_stdin", data="")["bytes_written"] == 0
    assert unix.control(echo, "write_stdin", data=[])["bytes_written"] == 0
    unix.control(echo, "write_stdin", data="", eof=True)
    assert unix.exit(echo)["code"] == 0 and unix.output(echo, "stderr") == b"eof after 0 bytes\n"


@pytest.mark.parametrize("payload", [
    {"data": [256]}, {"data": [-1]}, {"data": [1.5]}, {"data": ["a"]}, {"data": [True]}, {"data": {}}, {"data": 5},
    {"data": "no base64!", "encoding": "base64"}, {"data": "QUJ", "encoding": "base64"},
    {"data": "x", "encoding": "latin-1"},
    {"data": "x", "eof": 1}, {"data": "\ud800"},
], ids=repr)
def test_writes_that_cannot_be_meant(unix: LineWire, payload: dict) -> None:  # type: ignore[type-arg]
    echo = unix.spawn("echo")
    unix.cannot("bad_request", echo, "write_stdin", **payload)
    unix.control(echo, "close_stdin")
    assert unix.output(echo) == b"ready\n"


def test_stdin_null_says_how_to_get_one(unix: LineWire) -> None:
    report = unix.spawn("sleeper", stdin="null")
    sentence = unix.cannot("stdin_closed", report, "write_stdin", data="x")
    assert "stdin=null" in sentence and "stdin=pipe" in sentence
    unix.cannot("stdin_closed", report, "close_stdin")


def test_stdin_of_the_dead(unix: LineWire) -> None:
    gone = unix.spawn("exit_with", 0)
    unix.ended(gone)
    reply = unix.ask("control_command", agent_id=gone, command_type="write_stdin", payload={"data": "x"})
    assert reply["error_code"] in ("invalid_state", "stdin_closed")


def test_an_agent_that_closed_its_stdin(unix: LineWire) -> None:
    """EPIPE is an answer to the writer, not a signal to the server."""
    closer = unix.spawn("", command=["/bin/sh", "-c", "exec 0<&-; echo ready; sleep 1000"])

    def refused() -> bool:
        reply = unix.ask("control_command", agent_id=closer, command_type="write_stdin", payload={"data": "x" * 1000})
        return reply.get("error_code") == "stdin_closed"
    wait_until(refused, what="stdin_closed")
    assert unix.status(closer) == "running"


def test_close_twice(unix: LineWire) -> None:
    sleeper = unix.spawn("sleeper")
    unix.control(sleeper, "close_stdin")
    unix.cannot("stdin_closed", sleeper, "close_stdin")


def test_a_paused_agent_takes_writes(unix: LineWire) -> None:
    echo = unix.spawn("echo")
    unix.control(echo, "pause")
    unix.control(echo, "write_stdin", data="meanwhile\n")
    unix.control(echo, "resume")
    unix.until_output(echo, b"meanwhile\n")


# ---------------------------------------------------------------- stdout and stderr

@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 1_000_000, 5_000_000])
def test_nothing_is_lost_when_it_exits_right_after_writing(unix: LineWire, size: int) -> None:
    burst = unix.spawn("burst", size, size // 3, ready=False)
    assert unix.exit(burst)["code"] == 0
    pattern = bytes(range(251)) * (size // 251 + 1)
    assert unix.output(burst) == b"ready\n" + pattern[:size]
    assert unix.output(burst, "stderr") == pattern[:size // 3]


def test_text_without_newline_is_seen_at_once(unix: LineWire) -> None:
    agent = unix.spawn("no_newline")
    unix.until_output(agent, b"no newline at the end")
    assert unix.status(agent) == "running"
    unix.control(agent, "close_stdin")
    assert unix.output(agent) == b"ready\nno newline at the end"


def test_a_hundred_thousand_lines_per_second(unix: LineWire, tmp_path: Path) -> None:
    """While one agent prints as fast as that, every byte is kept and others are served."""
    sums = tmp_path / "sums"
    lines = unix.spawn("lines", 100_000, 100_000, sums)
    asked = 0
    while unix.status(lines) == "running":
        assert unix.ok("health_check_request")["healthy"]
        asked += 1
    assert asked > 10 and unix.exit(lines)["code"] == 0
    out, err = unix.output(lines), unix.output(lines, "stderr")
    assert out.count(b"\n") == 100_001
    assert sums.read_text().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                        str(len(err)), hashlib.sha256(err).hexdigest()]


def test_the_oldest_output_is_dropped_past_the_cap(start_server: Callable[..., Server]) -> None:
    cap = 2 * MIB
    server = start_server("--output-cap-bytes", str(cap))
    with LineWire(server.socket_path) as wire:
        burst = wire.spawn("burst", 10_000_000, 0, ready=False)
        wire.ended(burst)
        span = wire.info(burst)["output"]["stdout"]
        assert span["end_offset"] == 10_000_006 and 0 < span["first_offset"] < span["end_offset"]
        assert span["end_offset"] - span["first_offset"] <= cap
        on_disk = sum(f.stat().st_size for f in (server.state_dir / "agents" / burst).iterdir())
        assert on_disk <= cap * 1.1
        chunk = wire.read(burst, offset=100)
        assert chunk["offset"] == chunk["first_offset"] == span["first_offset"]
        assert chunk["dropped"] == span["first_offset"] - 100
        assert data_of(chunk) == bytes((chunk["offset"] - 6 + i) % 251 for i in range(chunk["bytes"]))
        last = wire.read(burst, offset=span["end_offset"] - 10)
        assert data_of(last) == bytes((10_000_000 - 10 + i) % 251 for i in range(10)) and last["eof"]


def test_a_quiet_stream_outlives_a_noisy_one(start_server: Callable[..., Server]) -> None:
    """The cap is per agent: whatever goes, the offsets say so."""
    server = start_server("--output-cap-bytes", str(MIB))
    with LineWire(server.socket_path) as wire:
        burst = wire.spawn("burst", 3_000_000, 10, ready=False)
        wire.ended(burst)
        err = wire.read(burst, "stderr", offset=0)
        assert err["bytes"] + err["dropped"] == 10


def test_times_of_output(unix: LineWire) -> None:
    told = unix.spawn("print_when")
    unix.control(told, "write_stdin", data="out first\n")
    unix.until_output(told, b"first\n")
    moment = time.monotonic() + 0.01  # what comes within a millisecond shares a time
    wait_until(lambda: time.monotonic() > moment)
    unix.control(told, "write_stdin", data="out second\nexit 0\n")
    unix.ended(told)
    chunk = unix.read(told, offset=0, times=True)
    stamps = [stamp for stamp, _ in chunk["times"]]
    assert stamps == sorted(stamps) and len(stamps) >= 2 and chunk["times"][-1][1] >= chunk["next_offset"]
    ends = [end for _, end in chunk["times"]]
    assert ends == sorted(ends) and {12, 19} <= set(ends)
    info = unix.info(told)
    assert info["started_at"] <= stamps[0] and stamps[-1] <= info["finished_at"]
    second = unix.read(told, since=stamps[ends.index(12) + 1])
    assert data_of(second) == b"second\n", "from the first byte written at or after this time"
    assert unix.read(told, since="2100-01-01T00:00:00Z")["bytes"] == 0
    unix.cannot("bad_request", told, "read_stdout", since="yesterday")


def test_eof_is_told_of_a_living_agent_too(unix: LineWire) -> None:
    closer = unix.spawn("", command=["/bin/sh", "-c", "echo ready; exec 1>&-; sleep 1000"])
    assert unix.output(closer) == b"ready\n"
    assert unix.status(closer) == "running" and unix.read(closer, "stderr", offset=0)["eof"] is False


def test_the_files_are_what_was_written(shared: Server, unix: LineWire) -> None:
    """They can be read with tail and grep: byte for byte, mode 0600, in a directory that is ours alone."""
    binary = unix.spawn("binary", 2)
    unix.ended(binary)
    folder = shared.state_dir / "agents" / binary
    files = sorted(folder.glob("stdout.*"))
    assert b"".join(f.read_bytes() for f in files) == b"ready\n" + (bytes(range(256)) + b"\xff\xfe\xe2\x82") * 2
    assert all(f.stat().st_mode & 0o077 == 0 for f in folder.iterdir())
    assert shared.state_dir.stat().st_mode & 0o077 == 0


def test_two_readers_do_not_steal_from_each_other(shared: Server, unix: LineWire) -> None:
    burst = unix.spawn("burst", 10, 0)
    unix.ended(burst)
    with LineWire(shared.socket_path) as other:
        assert data_of(unix.read(burst, offset=6)) == data_of(other.read(burst, offset=6)) == bytes(range(10))


# ---------------------------------------------------------------- subscriptions

def streamed(wire: LineWire, ref: str, stream: str = "stdout", offset: int = 0) -> bytes:
    """Follow a subscribed stream by pushed messages, filling gaps by reading, until `eof`."""
    text = b""
    while True:
        event = wire.event(lambda e: e["topic"] == f"{ref}.{stream}")
        assert event["type"] == "log_stream" and event["agent_id"] == ref and event["stream_type"] == stream
        start, end = event["offset"], event["next_offset"]
        assert end - start == len(data_of(event)), event
        if start > offset:
            gap = wire.read(ref, stream, offset=offset, max_bytes=min(start - offset, 4 * MIB))
            text += data_of(gap)
            offset = gap["next_offset"]
            while offset < start:
                gap = wire.read(ref, stream, offset=offset, max_bytes=min(start - offset, 4 * MIB))
                text += data_of(gap)
                offset = gap["next_offset"]
        text += data_of(event)[max(0, offset - start):]
        offset = max(offset, end)
        if event["eof"]:
            return text


def test_a_new_subscription_is_answered_with_the_offset(unix: LineWire) -> None:
    sleeper = unix.spawn("sleeper", "hello")
    unix.until_output(sleeper, b"hello\n")
    unix.subscribe(f"{sleeper}.stdout")
    event = unix.event()
    assert (event["offset"], event["next_offset"], event["eof"]) == (12, 12, False) and not event["data"]
    unix.subscribe(f"{sleeper}.stdout", announce=[f"{sleeper}.stdout"])
    assert unix.event()["offset"] == 12, "asked for again"
    unix.subscribe(f"{sleeper}.stdout", f"{sleeper}.stderr")
    assert unix.event()["topic"] == f"{sleeper}.stderr", "only what is new on this connection"


def test_output_is_pushed_with_offsets_until_eof(unix: LineWire) -> None:
    told = unix.spawn("print_when")
    unix.subscribe(f"{told}.stdout", f"{told}.stderr")
    assert {unix.event()["topic"] for _ in range(2)} == {f"{told}.stdout", f"{told}.stderr"}
    unix.control(told, "write_stdin", data="out grüße\n")
    event = unix.event()
    assert event["topic"] == f"{told}.stdout" and data_of(event) == "grüße\n".encode()
    assert (event["offset"], event["next_offset"]) == (6, 14) and event["encoding"] == "utf-8" and event["timestamp"]
    unix.control(told, "write_stdin", data="err oh\n")
    event = unix.event()
    assert event["topic"] == f"{told}.stderr" and data_of(event) == b"oh\n" and event["offset"] == 0
    unix.control(told, "write_stdin", data="exit 0\n")
    ends = {}
    while len(ends) < 2:
        event = unix.event()
        ends[event["topic"]] = event["eof"]
    assert set(ends.values()) == {True}


def test_a_subscription_after_the_end_gets_eof(unix: LineWire) -> None:
    gone = unix.spawn("exit_with", 0)
    unix.ended(gone)
    unix.output(gone)
    unix.subscribe(f"{gone}.stdout")
    event = unix.event()
    assert event["offset"] == 6 and event["eof"] is True


def test_pushed_bytes_are_the_bytes(unix: LineWire) -> None:
    binary = unix.spawn("print_when")
    unix.subscribe(f"{binary}.stdout")
    first = unix.event()
    unix.control(binary, "write_stdin", data=list(b"out \xff\xfe\x00\xe2\x82\n"))
    event = unix.event()
    assert event["offset"] == first["next_offset"]


def test_a_flood_reaches_a_follower_complete(unix: LineWire, tmp_path: Path) -> None:
    """Messages may be skipped when it cannot keep up; offsets show it, and reading fills the gap."""
    sums = tmp_path / "sums"
    lines = unix.spawn("lines", 150_000, 0, sums)
    unix.subscribe(f"{lines}.stdout")
    text = streamed(unix, lines)
    wait_until(sums.exists)
    assert sums.read_text().split()[:2] == [str(len(text)), hashlib.sha256(text).hexdigest()]


def test_an_event_is_on_disk_before_it_is_pushed(unix: LineWire, shared: Server) -> None:
    """Also one that comes of what was done after the commit of its turn: stdin is closed only then."""
    import sqlite3
    sleeper = unix.spawn("sleeper")
    unix.subscribe(f"status.{sleeper}")
    unix.control(sleeper, "close_stdin")
    event = unix.event(lambda event: event.get("data") == {"stdin": "closed"})
    with contextlib.closing(sqlite3.connect(str(shared.state_dir / "registry.db"))) as db:
        assert db.execute("SELECT max(sequence) FROM events").fetchone()[0] >= event["sequence"]


def test_a_subscriber_that_does_not_read_costs_little(shared: Server, unix: LineWire, tmp_path: Path) -> None:
    with LineWire(shared.socket_path) as lazy:
        lazy.subscribe("")
        before = unix.ok("stats_request")["stats"]["core"]["rss_bytes"]
        lines = unix.spawn("burst", 30_000_000, 0, ready=False)
        unix.ended(lines)
        after = unix.ok("stats_request")["stats"]["core"]["rss_bytes"]
        assert after - before < 20 * MIB
        assert unix.ok("health_check_request")["healthy"]


def test_a_sleeper_that_listens_alone_misses_nothing(start_server: Callable[..., Server]) -> None:
    """What it does not take waits in the file, not in memory."""
    server = start_server("--backlog-bytes", "65536")
    with LineWire(server.socket_path) as wire, LineWire(server.socket_path) as asleep:
        burst = wire.spawn("", ready=False, command=["/bin/sh", "-c", "read x; seq 1 1000000"])
        asleep.subscribe(f"{burst}.stdout")
        assert asleep.event()["offset"] == 0
        wire.control(burst, "write_stdin", data="go\n")
        wire.ended(burst)
        events = [asleep.event()]
        while not events[-1]["eof"]:
            events.append(asleep.event())
            assert events[-1]["offset"] == events[-2]["next_offset"], "no gap"
        assert b"".join(map(data_of, events)) == wire.output(burst) == b"".join(b"%d\n" % n for n in range(1, 1000001))
        assert wire.ok("stats_request")["stats"]["messages_dropped"] == 0


def test_a_sleeper_is_told_what_it_missed_when_it_reads_again(start_server: Callable[..., Server]) -> None:
    """Others read the same stream, so it is not waited for; a word at the end tells it of the gap, not a timer."""
    server = start_server("--backlog-bytes", "65536", "--status-update-interval-secs", "3600")
    with LineWire(server.socket_path) as wire, LineWire(server.socket_path) as asleep:
        burst = wire.spawn("", ready=False, command=["/bin/sh", "-c", "read x; seq 1 300000; echo oh >&2"])
        asleep.subscribe(f"{burst}.", f"status.{burst}", "server")
        with LineWire(server.socket_path) as awake:
            awake.subscribe(f"{burst}.stdout")
            wire.control(burst, "write_stdin", data="go\n")
            while not awake.event()["eof"]:
                pass
        wire.ended(burst)
        assert wire.ok("stats_request")["stats"]["messages_dropped"] > 0
        latest = wire.ok("events_request", since=2 ** 62)["next"]
        ends = {name: span["end_offset"] for name, span in wire.info(burst)["output"].items()}
        seen: set[object] = set()
        while not {("stdout", ends["stdout"], True), ("stderr", ends["stderr"], True), latest} <= seen:
            event = asleep.event()
            seen.add((event["stream_type"], event["next_offset"], event["eof"]) if event["type"] == "log_stream"
                     else event["sequence"])


def test_topics_are_prefixes_and_replace_the_ones_before(unix: LineWire) -> None:
    one, two = unix.spawn("print_when"), unix.spawn("print_when")
    unix.subscribe(f"{one}.")
    unix.control(one, "write_stdin", data="err a\n")
    unix.event(lambda e: e["topic"] == f"{one}.stderr" and e["data"])
    reply = unix.subscribe(f"{two}.stdout")
    assert reply["success"]
    unix.events.clear()
    unix.control(one, "write_stdin", data="out not seen\n")
    unix.control(two, "write_stdin", data="out seen\n")
    event = unix.event(lambda e: e.get("data"))
    assert event["topic"] == f"{two}.stdout" and data_of(event) == b"seen\n"
    unix.subscribe()
    unix.control(two, "write_stdin", data="out gone\nexit 0\n")
    unix.ended(two)
    assert not [e for e in unix.events if e["data"] and "gone" in e["data"]]


def test_status_events_are_gap_free(unix: LineWire) -> None:
    unix.subscribe("status.", "server")
    ids = [unix.spawn("exit_with", n % 2) for n in range(10)]
    for each in ids:
        unix.ended(each)
    last = unix.ok("events_request", limit=10_000, since=0)
    while last["more"]:
        last = unix.ok("events_request", limit=10_000, since=last["next"])
    seen = [unix.event(lambda e: e.get("update_type") not in ("heartbeat", "output_available"))]
    while seen[-1]["sequence"] < last["next"]:
        event = unix.event(lambda e: e.get("update_type") not in ("heartbeat", "output_available"))
        assert event["sequence"] == seen[-1]["sequence"] + 1, "no gap, no repetition, in order"
        seen.append(event)
    stored = unix.ok("events_request", since=seen[0]["sequence"] - 1, limit=10_000)["events"]
    assert [e["sequence"] for e in stored] == [e["sequence"] for e in seen]
    assert [{k: v for k, v in e.items() if k != "topic"} for e in stored] == \
        [{k: v for k, v in e.items() if k != "topic"} for e in seen], "the same objects"


def test_since_replays_what_was_missed(shared: Server, unix: LineWire) -> None:
    unix.subscribe("status.")
    first = unix.spawn("exit_with", 0)
    start = unix.event(lambda e: e["agent_id"] == first)["sequence"]
    unix.ended(first)
    second = unix.spawn("exit_with", 0)
    unix.ended(second)
    with LineWire(shared.socket_path) as late:
        late.subscribe(f"status.{first}", f"status.{second}", since=start - 1)
        replayed = [late.event() for _ in range(4)]
        assert replayed[0]["sequence"] == start
        sequences = [e["sequence"] for e in replayed]
        assert sequences == sorted(set(sequences))
        assert {e["agent_id"] for e in replayed} == {first, second}
        assert late.ok("subscribe_request", topics=[f"status.{new_id()}"], since=0)["success"]


def test_a_follower_sees_end_and_exit_record(unix: LineWire) -> None:
    unix.subscribe("status.")
    gone = unix.spawn("exit_with", 7)
    end = unix.event(lambda e: e["agent_id"] == gone and e["status"] == "failed")
    assert end["update_type"] in ("completed", "terminated", "error", "status_changed") and end["message"]
    assert "7" in str(end["data"]) or "7" in end["message"]


def test_the_end_is_an_event_after_all_output(unix: LineWire) -> None:
    """Whoever sees the end can read everything."""
    unix.subscribe("status.")
    for _ in range(5):
        burst = unix.spawn("burst", 300_000, 0, ready=False)
        unix.event(lambda e: e["agent_id"] == burst and e["status"] == "completed")
        assert unix.info(burst)["output"]["stdout"]["end_offset"] == 300_006
        assert unix.so_far(burst)[1] is True


def test_subscribe_edges(unix: LineWire) -> None:
    for wrong in ({}, {"topics": "status."}, {"topics": [1]}, {"topics": ["x"], "since": -1}, {"topics": None}):
        unix.refused("bad_request", "subscribe_request", **wrong)
    assert unix.ok("health_check_request")["healthy"]


def test_subscribe_is_refused_over_zeromq(shared: Server) -> None:
    from wire import ZmqWire
    with ZmqWire(shared.endpoint) as wire:
        assert "publish" in wire.refused("bad_request", "subscribe_request", topics=["status."])


def test_heartbeats_come_at_the_interval(start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "0.2")
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper")
        wire.subscribe("status.", "server")
        first = wire.event(lambda e: e.get("type") == "server_update")
        assert first["state"] == "up" and first["active_agents"] == 1 and first["server_id"] and first["timestamp"]
        wire.event(lambda e: e.get("type") == "server_update")
        beat = wire.event(lambda e: e.get("update_type") == "heartbeat" and e["type"] == "status_update")
        assert beat["agent_id"] == sleeper and beat["status"] == "running"
        stored = wire.ok("events_request")["events"]
        assert not [e for e in stored if e.get("update_type") in ("heartbeat", "output_available")]
        assert beat["sequence"] == stored[-1]["sequence"], "carries the latest"


def test_a_write_to_a_stdin_that_turns_out_closed(unix: LineWire) -> None:
    """What is never going to be read was not written."""
    each = unix.spawn("", command=["/bin/sh", "-c", "exec <&-; echo ready; sleep 1000"], stdin="pipe")
    unix.cannot("stdin_closed", each, "write_stdin", data="x")


def test_the_largest_read_of_control_characters_fits(unix: LineWire) -> None:
    """Each NUL takes six bytes in JSON."""
    size = 4 * 1024 * 1024
    each = unix.spawn("", command=["/usr/bin/head", "-c", str(size), "/dev/zero"], ready=False)
    unix.ended(each)
    got, eof = 0, False
    while not eof:
        chunk = unix.read(each, offset=got, max_bytes=size)
        assert chunk["bytes"] > 0 and set(data_of(chunk)) == {0}
        got, eof = chunk["next_offset"], chunk["eof"]
    assert got == size
