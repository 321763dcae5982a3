"""What is no proper request: each gets exactly one clear error reply, and the next request is served.

Owns:    malformed, oversized and oddly framed messages, and spawns that the kernel refuses, over every link.
Runs in: the test process; the server is real and shared.
Unaware: of our client library.
"""
from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
import zmq
from support import Server, agent
from wire import LineWire, Wire, ZmqWire, checked, new_id

MIB = 1024 * 1024
HEALTH = b'{"type":"health_check_request","request_id":"h"}'
DEEP_ENOUGH = 64

MALFORMED = {
    "empty": b"", "spaces": b"  \t ", "word": b"hello", "truncated": HEALTH[:-1], "two objects": HEALTH + HEALTH,
    "trailing": HEALTH + b"x", "number": b"5", "text": b'"health_check_request"', "null": b"null", "true": b"true",
    "list": b"[" + HEALTH + b"]", "single quotes": b"{'type':'health_check_request'}", "comma": HEALTH[:-1] + b",}",
    "no quotes": b"{type:1}", "nan": b'{"type":"health_check_request","request_id":"h","x":NaN}',
    "infinity": b'{"type":"health_check_request","request_id":"h","x":-Infinity}',
    "1e999": b'{"type":"health_check_request","request_id":"h","x":1e999}',
    "long integer": b'{"type":"health_check_request","request_id":"h","x":' + b"9" * 5000 + b"}",
    "bom": b"\xef\xbb\xbf" + HEALTH, "latin-1": '{"type":"é"}'.encode("latin-1"),
    "utf-16": HEALTH.decode().encode("utf-16"),
    "0xff": b"\xff" * 10, "cut utf-8": b'{"type":"\xe2\x82"}', "surrogate bytes": b'{"type":"\xed\xa0\x80"}',
    "overlong": b'{"type":"\xc0\x80"}', "nul": b"\0", "nuls": b"\0" * 1000, "control character": b'{"type":"a\tb"}',
    "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
    "closed deep": b'{"type":"health_check_request","request_id":"h","x":' + b"[" * 64 + b"]" * 64 + b"}",
    "no type": b'{"request_id":"h"}', "type null": b'{"request_id":"h","type":null}',
    "type number": b'{"request_id":"h","type":5}', "type list": b'{"request_id":"h","type":[]}',
    "type object": b'{"request_id":"h","type":{}}', "no id": b'{"type":"health_check_request"}',
    "empty object": b"{}", "http": b"GET / HTTP/1.1\r", "half an escape": b'{"type":"\\ud8"}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_messages_are_answered(wire: Wire, name: str) -> None:
    reply = wire.raw(MALFORMED[name])
    assert reply["success"] is False, reply
    assert reply["error_code"] in ("bad_request", "unknown_type"), reply
    assert len(json.dumps(reply)) < 4096, "an error does not repeat the message"
    assert wire.raw(HEALTH)["request_id"] == "h"


def test_each_malformed_type_says_what_is_wrong(wire: Wire) -> None:
    for name, words in {"empty": "empty", "word": "JSON", "number": "object", "0xff": "UTF-8", "deep lists": "nested",
                        "closed deep": "nested", "no id": "request_id", "no type": "type"}.items():
        assert words in wire.raw(MALFORMED[name])["error"], name


def test_nesting_up_to_the_limit_is_served(wire: Wire) -> None:
    """The object itself is one level, so 63 lists fit."""
    inner = b"[" * (DEEP_ENOUGH - 1) + b"]" * (DEEP_ENOUGH - 1)
    assert wire.raw(HEALTH[:-1] + b',"x":' + inner + b"}")["success"]


def padded(size: int) -> bytes:
    """Return a health check of exactly `size` bytes."""
    head, tail = HEALTH[:-1] + b',"pad":"', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


@pytest.mark.parametrize("size, fits", [(10 * MIB, True), (10 * MIB + 1, False), (11 * MIB, False)])
def test_the_size_limit(wire: Wire, size: int, fits: bool) -> None:
    reply = wire.raw(padded(size))
    assert reply["success"] is fits
    if not fits:
        assert reply["error_code"] == "message_too_large" and str(10 * MIB) in reply["error"]
    assert wire.raw(HEALTH)["success"]


def test_a_line_beyond_everything_is_skipped_and_answered_once(unix: LineWire) -> None:
    piece = b"x" * MIB
    for _ in range(15):
        unix.socket.sendall(piece)
    unix.socket.sendall(b"\n" + HEALTH + b"\n")
    reply = checked(json.loads(unix.receive()))
    assert reply["error_code"] == "message_too_large" and reply["request_id"] is None
    assert json.loads(unix.receive())["request_id"] == "h"


def test_a_frame_beyond_everything_is_cut_and_the_others_are_served(shared: Server) -> None:
    address = shared.endpoint
    with ZmqWire(address) as other, ZmqWire(address) as greedy:
        greedy.send(b"x" * (11 * MIB + 1))
        assert other.raw(HEALTH)["success"]
        assert greedy.socket.poll(300) == 0, "no reply to a message that was cut"
        assert other.raw(HEALTH)["success"]
    with ZmqWire(address) as again:
        assert again.raw(HEALTH)["success"]


@pytest.mark.parametrize("frames", [
    [HEALTH, HEALTH], [HEALTH, b""], [b"", HEALTH], [b"", b"", HEALTH], [b""] * 3, [b"\xff"] * 50,
], ids=["two", "empty last", "empty first", "two empty", "all empty", "fifty"])
def test_several_frames_are_one_wrong_message(shared: Server, frames: list[bytes]) -> None:
    with ZmqWire(shared.endpoint) as wire:
        wire.socket.send_multipart(frames)
        reply = checked(json.loads(wire.receive()))
        assert reply["success"] is False and reply["error_code"] == "bad_request", reply
        assert "frame" in reply["error"]
        assert wire.raw(HEALTH)["success"]


def test_a_dealer_with_the_delimiter_is_served(shared: Server) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.linger, dealer.rcvtimeo = 0, 30_000
        dealer.connect(shared.endpoint)
        ids = {new_id() for _ in range(20)}
        for each in ids:
            dealer.send_multipart([b"", json.dumps({"type": "health_check_request", "request_id": each}).encode()])
        replies = [dealer.recv_multipart() for _ in ids]
        assert {json.loads(r[-1])["request_id"] for r in replies} == ids and {r[0] for r in replies} == {b""}
        dealer.send(HEALTH)  # without delimiter: dropped by libzmq, and must not harm
        dealer.send_multipart([b"", HEALTH])
        assert json.loads(dealer.recv_multipart()[-1])["request_id"] == "h"
    finally:
        dealer.close()
        context.term()


def test_newlines_inside_a_message(shared: Server, unix: LineWire) -> None:
    """A frame may hold them; on a line link each line is a message and gets its reply."""
    pretty = json.dumps(json.loads(HEALTH), indent=1).encode() + b"\n"
    with ZmqWire(shared.endpoint) as wire:
        assert wire.raw(pretty)["success"]
        assert wire.raw(b"\n")["success"] is False
    unix.socket.sendall(pretty + b"\n" + HEALTH + b"\r\n")
    replies = [json.loads(unix.receive()) for _ in range(pretty.count(b"\n") + 2)]
    assert [r["success"] for r in replies].count(True) == 1
    assert [r["request_id"] for r in replies if r["success"]] == ["h"]


def test_pipelined_lines_get_one_reply_each(unix: LineWire) -> None:
    ids = [new_id() for _ in range(500)]
    unix.socket.sendall(b"".join(json.dumps({"type": "stats_request", "request_id": i}).encode() + b"\n" for i in ids))
    assert sorted(json.loads(unix.receive())["request_id"] for _ in ids) == sorted(ids)


def test_a_message_in_small_pieces_is_one_message(unix: LineWire) -> None:
    for byte in HEALTH + b"\n":
        unix.socket.sendall(bytes([byte]))
    assert json.loads(unix.receive())["request_id"] == "h"


def test_a_client_that_leaves_in_mid_message_harms_nobody(shared: Server, unix: LineWire) -> None:
    for tail in (b"", HEALTH[:10], HEALTH, HEALTH + b"\n", b"x" * (11 * MIB)):
        leaver = socket.socket(socket.AF_UNIX)
        leaver.connect(str(shared.socket_path))
        leaver.sendall(tail)
        leaver.close()
        assert unix.raw(HEALTH)["success"]


def test_a_client_that_never_reads_harms_nobody(shared: Server, unix: LineWire) -> None:
    """Its replies stop at a bound; the others are served."""
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(shared.socket_path))
    silent.setblocking(False)
    line = json.dumps({"type": "stats_request", "request_id": "s" * 100}).encode() + b"\n"
    try:
        for _ in range(20_000):
            silent.send(line)
    except OSError:
        pass  # its own buffer is full, or the server has cut it off: both are fine
    assert unix.raw(HEALTH)["success"]
    rss = unix.ok("stats_request")["stats"]["core"]["rss_bytes"]
    assert rss < 150 * MIB
    silent.close()
    assert unix.raw(HEALTH)["success"]


def test_http_on_the_socket_is_no_way_in(unix: LineWire) -> None:
    unix.socket.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for _ in range(3):
        assert checked(json.loads(unix.receive()))["success"] is False


# ---------------------------------------------------------------- what the kernel refuses

def test_a_missing_program(wire: Wire) -> None:
    for command in (["/nonexistent/program"], ["no-such-program-anywhere"], ["./not-here"]):
        sentence = wire.refused("spawn_failed", "spawn_request", config={"command": command})
        assert command[0] in sentence
    assert wire.agents(all=True) == [], "a spawn that could not start leaves no record"


def test_programs_that_cannot_be_executed(wire: Wire, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(os.urandom(100))
    garbage.chmod(stat.S_IRWXU)
    no_interpreter = tmp_path / "no-interpreter"
    no_interpreter.write_text("#!/nonexistent/interpreter\n")
    no_interpreter.chmod(stat.S_IRWXU)
    for program in (plain, tmp_path, garbage, no_interpreter, plain / "below"):
        sentence = wire.refused("spawn_failed", "spawn_request", config={"command": [str(program)]})
        assert str(program) in sentence
    assert wire.agents(all=True) == []


def test_working_directories_that_are_none(wire: Wire, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for cwd in (str(tmp_path / "missing"), str(file), str(file / "below"), "x" * 4000):
        sentence = wire.refused("spawn_failed", "spawn_request", config={"command": agent("sleeper"), "cwd": cwd})
        assert cwd[:40] in sentence and "cwd" in sentence or "directory" in sentence, sentence
    assert wire.agents(all=True) == []


def test_a_cwd_is_where_the_agent_runs(wire: Wire, tmp_path: Path) -> None:
    report = wire.spawn("report", cwd=str(tmp_path))
    assert json.loads(wire.lines(report, 2)[1])["cwd"] == str(tmp_path.resolve())


def test_a_program_is_found_in_the_agents_own_path(wire: Wire, tmp_path: Path) -> None:
    program = tmp_path / "own-program"
    program.write_text("#!/bin/sh\necho ready\n")
    program.chmod(stat.S_IRWXU)
    found = wire.spawn("", command=["own-program"], environment={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert wire.exit(found)["code"] == 0


@pytest.mark.parametrize("config", [
    {"command": ["/bin/true", "x" * 200_000]}, {"command": ["/bin/true", *["x" * 100_000] * 60]},
    {"command": ["/bin/true"], "environment": {"BIG": "x" * 200_000}},
    {"command": ["/bin/true"], "environment": {f"N{i}": "x" * 100_000 for i in range(60)}},
    {"command": ["/" + "x" * 5000]}, {"command": ["x" * 300]},
], ids=["one argument", "all arguments", "one variable", "all variables", "path", "name"])
def test_too_long_for_the_kernel(wire: Wire, config: dict) -> None:  # type: ignore[type-arg]
    sentence = wire.refused("spawn_failed", "spawn_request", config=config)
    assert len(sentence) < 1000, "an error does not repeat the argument"
    assert wire.raw(HEALTH)["success"] and wire.agents(all=True) == []


def test_long_arguments_that_fit_arrive(wire: Wire) -> None:
    long = "y" * 100_000
    sleeper = wire.spawn("sleeper", long)
    assert wire.lines(sleeper, 2)[1] == long


def test_arguments_and_environment_arrive_byte_for_byte(wire: Wire) -> None:
    odd = ["", " ", "a b", "$HOME `id` ; && |", "é", "\\", '"', "\n", "*", "--", "-x"]
    sleeper = wire.spawn("sleeper", *odd, environment={"ODD": "é $HOME\n", "EMPTY": ""})
    pid = wire.info(sleeper)["pid"]
    assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-1 - len(odd):-1] == [o.encode() for o in odd]
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert "ODD=é $HOME\n".encode() in environ and b"EMPTY=" in environ


def test_metadata_that_would_not_fit_into_a_reply(unix: LineWire) -> None:
    """The limit is the reply's: outside ASCII JSON needs twice the bytes. A failed spawn leaves no agent."""
    config = {"command": ["/bin/sleep", "1000"]}
    unix.send(json.dumps({"type": "spawn_request", "request_id": new_id(), "config": config,
                          "metadata": {"ballast": "\u6f22" * 2_500_000}}, ensure_ascii=False).encode())
    assert json.loads(unix.receive())["error_code"] == "message_too_large"
    assert unix.agents() == []
