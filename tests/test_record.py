"""`record` and `replay`: what an agent wrote, with the times, as a file, and shown again.

Owns:    both forms read by a strict reader; recordings made late, live, across gaps, attempts and resizes; the pace of
         a replay, and the terminal that it gives back.
Runs in: the test process; servers, agents, commands and terminals are real.
Unaware: of how output is stored and followed.
"""
from __future__ import annotations

import base64
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from person import Person
from support import DEADLINE_SECS, MAIN, ROOT, Server, agent, clean_environ, wait_until
from test_cli import line_of, running
from wire import process_state

from agentserver import AgentClient
from agentserver.cli import recording, replay
from agentserver.errors import RequestError
from agentserver.wire import rfc3339

Json = Dict[str, Any]
Events = List[List[Any]]


class Cli:
    """The command line with one server as its default."""

    def __init__(self, server: Optional[Server], home: Path) -> None:
        address = {"AGENTSERVER_SERVER": server.address("unix")} if server else {}
        self.environ = clean_environ(home, address)

    def start(self, *args: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, str(MAIN), *args], env=self.environ, cwd=str(ROOT), bufsize=0,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __call__(self, *args: str, stdin: bytes = b"", code: int = 0) -> Tuple[bytes, bytes]:
        with running(self.start(*args)) as process:
            out, error = process.communicate(stdin, timeout=DEADLINE_SECS)
        assert process.returncode == code, (args, process.returncode, out, error)
        assert b"Traceback" not in error
        return out, error


@pytest.fixture
def cli(shared: Server) -> Cli:
    return Cli(shared, shared.state_dir)


@pytest.fixture
def client(shared: Server) -> Iterator[AgentClient]:
    with AgentClient(shared.address("unix")) as client:
        yield client


# ---------------------------------------------------------------- strict readers

def times_of(events: Events) -> List[float]:
    times = [event[0] for event in events]
    assert all(isinstance(time, (int, float)) and not isinstance(time, bool) for time in times)
    assert times == sorted(times) and all(time >= 0 for time in times)
    return times


def parsed(data: bytes) -> Tuple[Json, Events]:
    assert data.endswith(b"\n")
    header, *events = [json.loads(line) for line in data.decode("utf-8").splitlines()]
    assert isinstance(header, dict) and all(isinstance(event, list) for event in events)
    times_of(events)
    return header, events


def asciicast(data: bytes) -> Tuple[Json, Events]:
    """Read what the definition of asciicast v2 allows, and nothing else."""
    header, events = parsed(data)
    assert header["version"] == 2
    kinds = {"version": int, "width": int, "height": int, "timestamp": int, "duration": float, "idle_time_limit": float,
             "command": str, "title": str, "env": dict, "theme": dict}
    for name, value in header.items():
        assert isinstance(value, kinds[name]) and not isinstance(value, bool), name
    assert header["width"] > 0 and header["height"] > 0
    assert all(isinstance(text, str) for pair in header.get("env", {}).items() for text in pair)
    for event in events:
        _, kind, text = event
        assert kind in ("o", "i", "m", "r") and isinstance(text, str)
        assert kind != "r" or re.fullmatch(r"[1-9]\d*x[1-9]\d*", text)
    return header, events


def ours(data: bytes) -> Tuple[Json, Events]:
    """Read what docs/recording.md allows, and nothing else."""
    header, events = parsed(data)
    assert header.pop("agentserver_recording") == 1
    assert set(header) == {"started_at", "agent_id", "name", "command"}
    for event in events:
        if event[1] in ("stdout", "stderr"):
            assert isinstance(event[2], str) and event[3:] in ([], ["base64"])
        else:
            assert len(event) == 3 and isinstance(event[2], dict)
            assert set(event[2]) == {"stream", "bytes"} if event[1] == "gap" else event[1] == "exit"
    return header, events


def bytes_of(events: Events, stream: str) -> bytes:
    return b"".join(base64.b64decode(event[2], validate=True) if event[3:] else event[2].encode()
                    for event in events if event[1] == stream)


# ---------------------------------------------------------------- recording pipes

def test_both_streams_are_recorded_byte_for_byte_in_order(cli: Cli, client: AgentClient) -> None:
    code = ("import os, time\n"
            "for n in range(3):\n"
            "    os.write(1, b'out %d\\n' % n); time.sleep(0.05); os.write(2, b'err %d\\n' % n); time.sleep(0.05)\n"
            "for part in (b'\\xff\\xfe', b'x\\xf0\\x9f', b'\\x98', b'\\x80\\xc3', b'\\xa4', b'\\xc3'):\n"
            "    os.write(1, part); time.sleep(0.05)\n"
            "os._exit(4)")
    worker = client.spawn([sys.executable, "-c", code], name="worker")
    assert worker.wait(DEADLINE_SECS).code == 4
    header, events = ours(cli("record", "worker")[0])
    assert header["agent_id"] == worker.id and header["name"] == "worker" and header["command"][-1] == code
    assert header["started_at"] == worker.info().started_at
    assert [event[2] for event in events[:6]] == [f"{s} {n}\n" for n in range(3) for s in ("out", "err")]
    assert bytes_of(events, "stdout") == worker.read("stdout", 0).data
    assert bytes_of(events, "stderr") == worker.read("stderr", 0).data
    assert [event[2:] for event in events[6:-1]] == [
        ["//4=", "base64"], ["x"], ["\U0001f600"], ["ä"], ["ww==", "base64"]]
    assert events[-1][1] == "exit" and events[-1][2]["code"] == 4
    pauses = [after - before for before, after in zip(times_of(events), times_of(events)[1:-1])]
    assert min(pauses) >= 0.04


def test_a_recording_can_be_made_long_after(start_server: Callable[..., Server], state_dir: Path) -> None:
    server = start_server(state_dir=state_dir)
    with AgentClient(server.address("unix")) as client:
        worker = client.spawn(agent("lines", "300", "3000", str(state_dir.with_name("sum"))))
        worker.wait(DEADLINE_SECS)
        text = worker.read("stdout", 0, 1 << 20).data
        before = Cli(server, state_dir)("record", worker.id)[0]
    server.close()
    server = start_server(state_dir=state_dir)
    after = Cli(server, state_dir)("record", worker.id[:8])[0]
    assert after == before and bytes_of(ours(after)[1], "stdout") == text
    target = state_dir / "recording"
    assert Cli(server, state_dir)("record", "-o", str(target), worker.id) == (b"", b"")
    assert target.read_bytes() == before


def test_what_runs_is_recorded_so_far_or_to_its_end(cli: Cli, client: AgentClient) -> None:
    worker = client.spawn(agent("echo"))
    wait_until(lambda: worker.read("stdout", 0).data == b"ready\n")
    assert bytes_of(ours(cli("record", worker.id)[0])[1], "stdout") == b"ready\n"
    with running(cli.start("record", "--follow", worker.id)) as process:
        lines = [line_of(process), line_of(process)]
        assert json.loads(lines[1])[1:] == ["stdout", "ready\n"]
        worker.write("one\n")
        lines.append(line_of(process))
        assert json.loads(lines[2])[1:] == ["stdout", "one\n"], "it is there at once"
        worker.write("two\n", eof=True)
        rest, error = process.communicate(timeout=DEADLINE_SECS)
    assert (process.returncode, error) == (0, b"")
    followed = b"".join(lines) + rest
    assert followed == cli("record", worker.id)[0], "live or later, it is the same"
    assert ours(followed)[1][-1][1] == "exit"


def test_a_flood_is_followed_with_its_true_times(cli: Cli, client: AgentClient) -> None:
    worker = client.spawn(agent("burst", "3000000", "1000000"))
    with running(cli.start("record", "-f", worker.id)) as process:
        followed, _ = process.communicate(timeout=DEADLINE_SECS)
    header, events = ours(followed)
    assert bytes_of(events, "stdout") == worker.read("stdout", 0, 4 << 20).data and not followed.count(b'"gap"')
    assert bytes_of(events, "stderr") == worker.read("stderr", 0, 4 << 20).data


def test_what_is_no_longer_kept_is_told(start_server: Callable[..., Server]) -> None:
    server = start_server("--output-cap-bytes", "1048576")
    with AgentClient(server.address("unix")) as client:
        worker = client.spawn(agent("burst", "5000000", "10"))
        worker.wait(DEADLINE_SECS)
        span = worker.info().output["stdout"]
        _, events = ours(Cli(server, server.state_dir)("record", worker.id)[0])
        (gap,) = [event for event in events if event[1] == "gap"]
        assert gap[2] == {"stream": "stdout", "bytes": span.first_offset} and span.first_offset > 3_000_000
        assert events[1 if events[0][1] == "stderr" else 0] == gap
        assert bytes_of(events, "stdout") == b"".join(
            chunk.data for _, name, chunk in client.follow(worker.id, streams=["stdout"]) if chunk.data)


def test_several_attempts_are_one_recording(cli: Cli, client: AgentClient) -> None:
    worker = client.spawn(["sh", "-c", "echo attempt"])
    worker.wait(DEADLINE_SECS)
    first = worker.info().started_at
    worker.restart()
    wait_until(lambda: worker.info().finished and worker.info().attempt == 2)
    header, events = ours(cli("record", worker.id)[0])
    assert header["started_at"] == first and bytes_of(events, "stdout") == b"attempt\n" * 2
    assert [event[1] for event in events] == ["stdout", "stdout", "exit"]


def test_a_file_that_cannot_be_written_is_said(cli: Cli, client: AgentClient) -> None:
    error = cli("record", client.spawn(["true"]).id, "-o", "/no/such/file", code=1)[1]
    assert b"(bad_request): /no/such/file cannot be written: No such file" in error


def test_an_agent_has_to_be_named(cli: Cli) -> None:
    assert b"name an agent" in cli("record", code=2)[1]
    assert b"agent_not_found" in cli("record", "nobody", code=4)[1]
    assert b"one recording" in cli("replay", code=2)[1]
    assert b"above 0" in cli("replay", "--speed", "0", "x", code=2)[1]


# ---------------------------------------------------------------- recording terminals

def test_a_terminal_is_an_asciicast(cli: Cli, client: AgentClient) -> None:
    worker = client.spawn(agent("fullscreen", os.devnull), pty={"rows": 30, "cols": 100}, name="screen")
    wait_until(lambda: b"size 30x100" in worker.read("stdout", 0).data)
    with running(cli.start("record", "-f", worker.id)) as process:
        assert json.loads(line_of(process))["width"] == 100
        worker.client.control(worker.id, "resize", rows=20, cols=90)
        wait_until(lambda: b"size 20x90" in worker.read("stdout", 0).data)
        worker.write("a")
        wait_until(lambda: b"keys a" in worker.read("stdout", 0).data)
        worker.write("q")
        rest, error = process.communicate(timeout=DEADLINE_SECS)
    assert (process.returncode, error) == (0, b"")
    recorded = cli("record", "screen")[0]
    header, events = asciicast(recorded)
    assert recorded.partition(b"\n")[2] == rest, "live or later, it is the same"
    assert (header["height"], header["width"], header["title"]) == (30, 100, "screen")
    assert header["env"] == {"TERM": "xterm-256color"} and "fullscreen.py" in header["command"]
    text = "".join(event[2] for event in events if event[1] == "o")
    assert text.encode() == worker.read("stdout", 0, 1 << 20).data
    before, _, after = [event[2] for event in events].index("90x20"), None, [event[1] for event in events].index("r")
    assert before == after and "size 20x90" not in "".join(event[2] for event in events[:after])


def test_a_terminal_writes_what_is_no_text(cli: Cli, client: AgentClient) -> None:
    code = "import os, time\nfor part in (b'\\xc3', b'\\xa4\\xff', b'\\xe2\\x82'): os.write(1, part); time.sleep(0.05)"
    worker = client.spawn([sys.executable, "-c", code], stdin="pty", environment={"TERM": "vt100"})
    worker.wait(DEADLINE_SECS)
    header, events = asciicast(cli("record", worker.id)[0])
    assert [event[2] for event in events] == ["ä\ufffd", "\ufffd"] and "env" not in header
    assert (header["height"], header["width"]) == (24, 80)


# ---------------------------------------------------------------- the form

def test_characters_are_cut_only_between_them() -> None:
    for text in ("", "a", "ä", "€", "😀", "x😀"):
        data = text.encode()
        assert recording.whole(data) == len(data)
        for cut in range(1, len(text[-1:].encode())):
            assert recording.whole(data[:-cut]) == len(data) - len(text[-1:].encode())
    for junk in (b"\xff", b"\x80", b"\x80\x80\x80\x80", b"a\xc0", b"\xf5\x80", b"\xc3\xa4\xa4"):
        assert recording.whole(junk) == len(junk)


def test_a_gap_ends_a_character() -> None:
    made = recording.Lines("2023-11-14T22:13:20Z")
    lines = [line for part in (made.output("", "stdout", b"\xc3"), made.gap("", "stdout", 5),
                               made.output("", "stdout", b"\xa4")) for line in part]
    assert [json.loads(line)[1:] for line in lines] == [
        ["stdout", "ww==", "base64"], ["gap", {"stream": "stdout", "bytes": 5}], ["stdout", "pA==", "base64"]]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_was_written_comes_back(seed: int) -> None:
    """In pieces of any size, of any bytes, with clocks that jump: every byte, in order, and time never goes back."""
    dice = random.Random(seed)
    written, lines, clock = {"stdout": b"", "stderr": b""}, [], 1_700_000_000.0
    made = recording.Lines("2023-11-14T22:13:20Z")
    header = made.header({recording.OURS: 1})
    for _ in range(100):
        stream = dice.choice(["stdout", "stderr"])
        data = bytes(dice.choice((0x41, 0xC3, 0xA4, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF))
                     for _ in range(dice.randrange(6)))
        clock += dice.choice((0.0, 0.001, 5.0, -3.0))
        lines += made.output(rfc3339(clock), stream, data)
        written[stream] += data
        if dice.random() < 0.05:
            lines += made.gap("", stream, 5)
    lines += made.rest("stdout", "stderr")
    player = recording.Player("x", header[0].encode())
    events = list(recording.events(player, iter(line.encode() for line in lines)))
    assert [event.secs for event in events] == sorted(event.secs for event in events)
    assert {stream: b"".join(e.data for e in events if e.stream == stream) for stream in written} == written


@pytest.mark.parametrize("text, sentence", [
    ("", "line 1: this is not JSON"), ("hello", "line 1: this is not JSON"), ("[]", "line 1: this is not a recording"),
    ('{"version": 3}', "line 1: this is not a recording"), ('{"agentserver_recording": 2}', "not a recording"),
    ('{"version": 2}\nx', "line 2: this is not JSON"), ('{"version": 2}\n[1]', "line 2: an event is a list"),
    ('{"version": 2}\n[null, "o", "x"]', "line 2: an event begins with the seconds"),
    ('{"version": 2}\n\n[-1, "o", "x"]', "an event begins with the seconds"),
    ('{"version": 2}\n[1, "o", 5]', "not the text"), ('{"version": 2}\n[1, "o", "\\ud800"]', None),
    ('{"agentserver_recording": 1}\n[0, "stdout", "abc", "base64"]', "not the text"),
    ('{"agentserver_recording": 1}\n[0, "something new", {}]\n[0, "stdout", "x", "utf-8"]', None),
    ("[" * 100_000, "line 1: this is not JSON")])
def test_what_is_no_recording_is_said(state_dir: Path, text: str, sentence: Optional[str]) -> None:
    file = state_dir / "file"
    file.write_text(text)
    out, error = Cli(None, state_dir)("replay", str(file), code=1 if sentence else 0)
    assert (sentence or "") in error.decode() and error.count(b"\n") == bool(sentence)


def test_a_file_that_is_not_there_is_said(state_dir: Path) -> None:
    error = Cli(None, state_dir)("replay", "/no/such/file", code=1)[1]
    assert b"(bad_request): /no/such/file cannot be read: No such file" in error


# ---------------------------------------------------------------- replaying

class Watch:
    """A screen with a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seen: List[Tuple[float, bytes]] = []
        self.held = iter(())   # type: Iterator[float]

    def wait(self, until: float) -> float:
        held = next(self.held, 0.0)
        self.now = max(self.now, until + held)
        return held

    def show(self, event: recording.Event) -> None:
        self.seen.append((round(self.now - 100.0, 6), event.data))


@pytest.mark.parametrize("speed, idle, held, expected", [
    (1.0, None, (), [0.5, 0.5, 1.5, 61.5]), (2.0, None, (), [0.25, 0.25, 0.75, 30.75]),
    (1.0, 2.0, (), [0.5, 0.5, 1.5, 3.5]), (0.5, 2.0, (), [1.0, 1.0, 3.0, 7.0]), (1.0, 0.0, (), [0.0, 0.0, 0.0, 0.0]),
    (1.0, 1.0, (0.0, 0.0, 9.0), [0.5, 0.5, 10.5, 11.5])])
def test_the_pace_is_kept(monkeypatch: pytest.MonkeyPatch, speed: float, idle: Optional[float], held: Tuple[float, ...],
                          expected: List[float]) -> None:
    watch = Watch()
    watch.held = iter(held)
    monkeypatch.setattr(replay.time, "monotonic", lambda: watch.now)
    events = [recording.Event(secs, "stdout", b"%d" % n) for n, secs in enumerate((0.5, 0.5, 1.5, 61.5))]
    replay._play(iter(events), watch, speed, idle)
    assert [at for at, _ in watch.seen] == expected


def test_each_stream_goes_to_its_own(state_dir: Path) -> None:
    lines = ['{"agentserver_recording": 1, "idle_time_limit": 0.01}',
             '[0.0, "stdout", "out\\n"]', '[500, "stderr", "err\\n"]', '[1000, "stdout", "/w==", "base64"]',
             '[2000, "gap", {}]', '[9000, "exit", {"code": 3}]']
    cli = Cli(None, state_dir)
    assert cli("replay", "-", stdin="\n".join(lines).encode()) == (b"out\n\xff", b"err\n")
    (state_dir / "file").write_text("\n".join(lines[:-1]).replace("0.01", "1000") + "\n")
    assert cli("replay", str(state_dir / "file"), "--speed", "1000000") == (b"out\n\xff", b"err\n")
    assert cli("replay", str(state_dir / "file"), "--max-idle", "0") == (b"out\n\xff", b"err\n")


def test_ctrl_c_ends_it(state_dir: Path) -> None:
    (state_dir / "file").write_text('{"agentserver_recording": 1}\n[0, "stdout", "x\\n"]\n[9999, "stdout", "y\\n"]\n')
    with running(Cli(None, state_dir).start("replay", str(state_dir / "file"))) as process:
        assert line_of(process) == b"x\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=DEADLINE_SECS) == (b"", b"") and process.returncode == -signal.SIGINT


@pytest.fixture
def cast(cli: Cli, client: AgentClient, state_dir: Path) -> str:
    """A full-screen program that has switched on all that there is, asked the terminal, and died: recorded."""
    worker = client.spawn(agent("fullscreen", os.devnull), pty={"rows": 24, "cols": 80})
    wait_until(lambda: b"last line" in worker.read("stdout", 0).data)
    worker.write("dab")
    wait_until(lambda: b"keys dab" in worker.read("stdout", 0).data)
    worker.write("x")
    worker.wait(DEADLINE_SECS)
    file = state_dir / "screen.cast"
    cli("record", worker.id, "-o", str(file))
    return str(file)


def test_a_terminal_shows_the_same_and_is_given_back(cli: Cli, cast: str) -> None:
    _, events = asciicast(Path(cast).read_bytes())
    with open(cast, "a") as file:
        file.write('[100000, "o", "never"]\n')
    with Person(cli.environ, "replay", cast, "--max-idle", "5000") as me:
        me.answering = True
        me.until("keys dab")
        assert me.is_unseen and me.vt.alternate and not me.vt.asked, "it was made harmless"
        me.type("\x03")
        assert me.end() == -signal.SIGINT
        me.assert_as_before()
        assert "^C" not in me.said() and "never" not in me.said()


def test_a_terminal_is_given_back_at_the_end(cli: Cli, cast: str) -> None:
    with Person(cli.environ, "replay", cast, "--max-idle", "0.1") as me:
        assert me.end() == 0
        me.assert_as_before()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_and_the_terminal_is_given_back(cli: Cli, cast: str, number: signal.Signals) -> None:
    with open(cast, "a") as file:
        file.write('[100000, "o", "never"]\n')
    with Person(cli.environ, "replay", cast) as me:
        me.until("keys dab")
        me.signal(number)
        assert me.end() == -number
        me.assert_as_before()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_begun_in_the_background_it_waits_for_the_foreground(cli: Cli, state_dir: Path) -> None:
    file = state_dir / "x.cast"
    file.write_text('{"version": 2, "width": 80, "height": 24}\n[0, "o", "shown"]\n[5000, "o", "later"]\n')
    with Person(cli.environ, program=("bash", "--norc", "--noprofile", "-i")) as me:
        me.type(shlex.join([sys.executable, str(MAIN), "replay", str(file)]) + " & echo; echo job $! begun\r")
        me.until(lambda text: re.search(r"job \d+ begun", text))
        pid = int(re.findall(r"job (\d+) begun", me.look())[0])
        wait_until(lambda: me.look() is not None and process_state(pid) == "T", what="it to be stopped")
        me.type("fg\r")
        me.until(lambda text: "shown" in text and me.is_unseen)
        me.type("\x03")
        wait_until(lambda: me.look() is not None and not process_state(pid), what="it to end")
        me.type("exit\r")
        me.end()
        me.assert_as_before()


def test_the_space_bar_holds_it(cli: Cli, state_dir: Path) -> None:
    file = state_dir / "x.cast"
    file.write_text('{"version": 2, "width": 80, "height": 24}\n[0, "o", "first"]\n'
                    + "".join(f'[{n / 10}, "o", "."]\n' for n in range(1, 30)) + '[3, "o", "last"]\n')
    with Person(cli.environ, "replay", str(file)) as me:
        me.until("first.")
        me.type(" ")
        held, seen = -1, me.look().count(".")
        while held != seen:   # what was under way before the key
            held, seen = seen, me.look(0.5).count(".")
        assert held < 29
        me.type(" ")
        me.until("last")
        assert me.end() == 0


def test_a_string_that_was_only_begun_is_ended_on_my_terminal(cli: Cli, state_dir: Path) -> None:
    file = state_dir / "x.cast"
    file.write_text('{"version": 2, "width": 80, "height": 24}\n[0, "o", "\\u001b[?1000hcut\\u001bPq off"]\n')
    with Person(cli.environ, "replay", str(file)) as me:
        assert me.end() == 0
        assert "cut" in me.said()
        me.assert_as_before()


def test_a_terminal_that_is_smaller_is_told_of(cli: Cli, cast: str) -> None:
    with Person(cli.environ, "replay", cast, "--max-idle", "0", rows=20, cols=70) as me:
        assert me.end() == 0
        assert b"24 rows and 80 columns" in bytes(me.raw)


def test_a_pipe_gets_the_bytes_as_they_were(cli: Cli, cast: str) -> None:
    _, events = asciicast(Path(cast).read_bytes())
    text = "".join(event[2] for event in events if event[1] == "o")
    assert cli("replay", cast, "--max-idle", "0")[0].decode() == text


def test_a_wrong_line_gives_the_terminal_back_first(cli: Cli, cast: str) -> None:
    with open(cast, "a") as file:
        file.write("oops\n")
    with Person(cli.environ, "replay", cast, "--max-idle", "0") as me:
        assert me.end() == 1
        me.assert_as_before()
        assert "this is not JSON" in me.said()


def test_a_line_has_a_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replay, "LONGEST_LINE", 100)
    file = tmp_path / "file"
    file.write_text('{"agentserver_recording": 1}\n[0, "stdout", "' + "x" * 200)
    with open(file, "rb") as source, pytest.raises(RequestError, match="more than 100 bytes"):
        source.readline()
        list(replay._lines(source, "file"))
