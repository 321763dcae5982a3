"""docs/streams.md, and the clients without our library that it points to: exact copies, whatever is killed meanwhile.

Owns:    that examples/follow_without_*.py and javascript/follow.mjs miss and repeat nothing, that they go on where
         another was killed, and that each JSON shown in the document is what a server sends.
Runs in: the test process; servers, agents and followers are real processes.
Unaware: of our client library.
"""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import javascript
import pytest
from support import DEADLINE_SECS, ROOT, Server, clean_environ, short_dir, wait_until
from wire import LineWire, data_of

Json = dict  # type: ignore[type-arg]
EXAMPLES = ROOT / "examples"
PROGRAMS = ("zeromq", "unix", "javascript")
STREAMS = ("stdout", "stderr")
STEP = 150_000  # bytes that come between two kills


class Follower:
    """One of the programs, following one agent into a directory; it can be killed and another be started."""

    def __init__(self, server: Server, agent: str, directory: Path) -> None:
        self.agent, self.directory, self._server = agent, directory, server
        self._process: subprocess.Popen[bytes] | None = None
        self.shown = {name: directory.with_name(f"{directory.name}.{name}") for name in STREAMS}

    def start(self, program: str) -> None:
        """Go on, as one of PROGRAMS."""
        argv = {"zeromq": lambda: [sys.executable, str(EXAMPLES / "follow_without_library.py"), self._server.endpoint],
                "unix": lambda: [sys.executable, str(EXAMPLES / "follow_without_zeromq.py"),
                                 str(self._server.socket_path)],
                "javascript": lambda: [*javascript.script(self._server.state_dir.parent), self._server.endpoint],
                }[program]()
        with open(self.shown["stdout"], "ab") as out, open(self.shown["stderr"], "ab") as error:
            self._process = subprocess.Popen([*argv, self.agent, str(self.directory)], stdin=subprocess.DEVNULL,
                                             stdout=out, stderr=error, env=clean_environ(self._server.state_dir))

    def kill(self) -> None:
        """SIGKILL it."""
        assert self._process is not None and self._process.poll() is None
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Return the exit code once it has ended by itself."""
        assert self._process is not None
        return self._process.wait(2 * DEADLINE_SECS)

    def abandon(self) -> None:
        """End what a failed test has left."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def path(self, stream: str) -> Path:
        """The copy of a stream."""
        return self.directory / f"{self.agent}.{stream}"

    def size(self) -> int:
        """How long the copies are."""
        return sum(self.path(stream).stat().st_size for stream in STREAMS if self.path(stream).exists())

    def goes_on(self) -> None:
        """Wait until the copies have grown by a step."""
        before = self.size()

        def grown() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.shown["stderr"].read_bytes()[-2000:].decode(errors="replace")
            return self.size() >= before + STEP
        wait_until(grown, what="the copies to grow")

    def events(self) -> list[Json]:
        """The copy of the events."""
        return [json.loads(line) for line in (self.directory / "events").read_bytes().splitlines()]


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Callable[..., Follower]]:
    """Make followers: `follower(server, agent)`."""
    made: list[Follower] = []

    def new(server: Server, agent: str) -> Follower:
        made.append(Follower(server, agent, tmp_path / f"copy{len(made)}"))
        return made[-1]
    yield new
    for each in made:
        each.abandon()


def kill_part(server: Server, part: str) -> None:
    """SIGKILL the shell or the core, and wait until there is another."""
    before = server.pids()[part]
    os.kill(before, signal.SIGKILL)

    def another() -> bool:
        try:
            return server.pids().get(part, before) != before
        except (OSError, ValueError):
            return False  # the core is being started again
    wait_until(another, what=f"another {part}")


def all_events(wire: LineWire) -> list[Json]:
    """Return every event there is, and see that it is every one."""
    page = wire.ok("events_request", since=0, limit=10_000)
    assert not page["more"] and [e["sequence"] for e in page["events"]] == list(range(1, page["next"] + 1))
    return list(page["events"])


def written(agent_file: Path, stream: str) -> bytes:
    """What the agent says that it wrote."""
    return agent_file.with_name(f"{agent_file.name}.{stream}").read_bytes()


def follow_through_deaths(server: Server, follower: Callable[..., Follower], file: Path, order: list[str]) -> None:
    """Let the programs follow, each killed after a while, with the shell and the core killed in between."""
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("mixed", str(file), ready=False)
    copy = follower(server, agent)
    for program, part in zip(order, ("shell", "core", "", "")):
        copy.start(program)
        copy.goes_on()
        if part:
            kill_part(server, part)
            copy.goes_on()
        copy.kill()
    copy.start(order[-1])
    copy.goes_on()
    with LineWire(server.socket_path) as wire:
        wire.control(agent, "close_stdin")
        assert copy.end() == 0, copy.shown["stderr"].read_bytes()[-2000:]
        assert wire.status(agent) == "completed"
        assert copy.events() == all_events(wire)
    for stream in STREAMS:
        assert copy.path(stream).read_bytes() == written(file, stream), f"{stream} is not an exact copy"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_killed_follower_goes_on_exactly(program: str, server: Server, tmp_path: Path,
                                           follower: Callable[..., Follower]) -> None:
    if program == "javascript":
        javascript.script(server.state_dir.parent)  # skips before anything was begun
    follow_through_deaths(server, follower, tmp_path / "written", [program] * 3)


def test_one_program_goes_on_where_another_was_killed(server: Server, tmp_path: Path,
                                                      follower: Callable[..., Follower]) -> None:
    """What is kept is the protocol's numbers, and nothing of a language or a link."""
    javascript.script(server.state_dir.parent)
    order = ["unix", "javascript", "zeromq", "javascript", "unix"]
    follow_through_deaths(server, follower, tmp_path / "written", order)


@pytest.mark.parametrize("program", PROGRAMS)
def test_output_past_the_cap_is_told_and_leaves_a_hole(program: str, start_server: Callable[..., Server],
                                                       follower: Callable[..., Follower]) -> None:
    server = start_server("--output-cap-bytes", "65536")
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("burst", 1_000_000, 1000, ready=False)
        kept = wire.ended(agent)["output"]
        first, end = kept["stdout"]["first_offset"], kept["stdout"]["end_offset"]
        assert 0 < first < end == 1_000_006
        copy = follower(server, agent)
        copy.start(program)
        assert copy.end() == 0
        data = copy.path("stdout").read_bytes()
        tail, _ = wire.so_far(agent, offset=first)
        assert data == bytes(first) + tail and len(tail) == end - first
        assert copy.shown["stdout"].read_bytes() == tail, "what is kept is shown"
        assert copy.shown["stderr"].read_bytes().replace(copy.path("stderr").read_bytes(), b"", 1).decode().split() == \
            f"[{first} bytes of stdout are gone]".split()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_follower_of_an_idle_agent_asks_nothing(program: str, start_server: Callable[..., Server],
                                                  follower: Callable[..., Follower]) -> None:
    server = start_server("--status-update-interval-secs", "0.1")
    with LineWire(server.socket_path) as wire:
        sleeper = wire.spawn("sleeper", "hello")
        copy = follower(server, sleeper)
        copy.start(program)
        wait_until(lambda: copy.size() == len("ready\nhello\n"), what="the copy")
        wire.subscribe(f"status.{sleeper}")

        def asked_during(beats: int) -> int:
            before = wire.ok("stats_request")["stats"]["requests"]
            for _ in range(beats):
                wire.event()
            return int(wire.ok("stats_request")["stats"]["requests"]) - before - 1
        wait_until(lambda: not asked_during(3), what="it to be silent")
        assert asked_during(20) == 0
        wire.control(sleeper, "kill")
        assert copy.end() == 0


def test_an_agent_on_a_terminal_has_one_stream(server: Server, follower: Callable[..., Follower]) -> None:
    with LineWire(server.socket_path) as wire:
        agent = wire.spawn("", command=["sh", "-c", "stty -a; echo error >&2; read line; stty size; sleep 1000"],
                           stdin="pty", pty={"rows": 30, "cols": 100}, ready=False)
        assert wire.read(agent, "stderr", offset=0)["eof"], "it ends before it began"
        copy = follower(server, agent)
        copy.start("zeromq")
        wait_until(lambda: copy.size() and b"error\r\n" in copy.path("stdout").read_bytes(), what="its stderr")
        assert b"rows 30; columns 100" in copy.path("stdout").read_bytes()
        wire.control(agent, "resize", rows=24, cols=80)
        wire.control(agent, "write_stdin", data="typed\r")
        wait_until(lambda: b"typed\r\n24 80\r\n" in copy.path("stdout").read_bytes(), what="the echo and the new size")
        wire.control(agent, "write_stdin", data="\u0003")
        assert copy.end() == 0
        assert copy.path("stdout").read_bytes() == wire.output(agent) and not copy.path("stderr").read_bytes()


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_agent_that_is_not_there_is_one_sentence(program: str, server: Server,
                                                    follower: Callable[..., Follower]) -> None:
    copy = follower(server, "nobody")
    copy.start(program)
    assert copy.end() == 1
    said = copy.shown["stderr"].read_text().splitlines()
    assert len(said) == 1 and "nobody" in said[0] and said[0].endswith("(agent_not_found)")


@pytest.mark.parametrize("program", PROGRAMS)
def test_where_no_server_answers_it_says_so(program: str, start_server: Callable[..., Server],
                                            follower: Callable[..., Follower]) -> None:
    """It goes on asking: a server that is away for a while is no reason to stop."""
    server = start_server()
    server.close()
    copy = follower(server, "somebody")
    copy.start(program)
    where = str(server.socket_path) if program == "unix" else server.endpoint
    said = wait_until(lambda: copy.shown["stderr"].read_text(), what="a word").splitlines()
    assert len(said) == 1 and said[0].startswith(f"[no answer from {where} (")
    copy.kill()


def test_the_one_in_javascript_says_how_it_is_used(tmp_path: Path) -> None:
    done = subprocess.run(javascript.script(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "usage: follow.mjs ENDPOINT AGENT DIRECTORY\n")


# ---------------------------------------------------------------- the document

DOCUMENT = (ROOT / "docs" / "streams.md").read_text("utf-8")
SHOWN = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", DOCUMENT, re.M | re.S)]


def shape(value: Any) -> Any:
    """Return a value with its names and types alone."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value).__name__


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Return a JSON value in which the agent that is shown is one that is there."""
    text = json.dumps(value)
    for shown, real in names.items():
        text = text.replace(shown, real)
    return json.loads(text)


@pytest.fixture(scope="module")
def really_sent(run_dir: Path) -> Iterator[tuple[Server, str, list[Json]]]:
    """An agent, and all that a server sends to whoever asks for it and listens to it."""
    server = Server(short_dir(run_dir), "--status-update-interval-secs", "0.1")
    try:
        with LineWire(server.socket_path) as wire, LineWire(server.socket_path) as ear:
            agent = wire.spawn("print_when")
            wire.until_output(agent, b"ready\n")
            sent = [ear.subscribe(f"{agent}.stdout", f"{agent}.stderr", "status.", "server"), *ear.events]
            sent.append(wire.ok("events_request", since=0))
            wire.control(agent, "write_stdin", data="out grüße\n")
            wire.control(agent, "write_stdin", data=list(b"out \xff\n"))
            wire.until_output(agent, b"\xff\n")
            for offset, most in ((6, 8), (16, 100)):
                sent.append(wire.ok("control_command", agent_id=agent, command_type="read_stdout",
                                    payload={"offset": offset, "max_bytes": most}))
            while sent[-1].get("type") != "status_update" or sent[-1]["update_type"] != "heartbeat":
                sent.append(ear.line())
            wire.control(agent, "write_stdin", data="exit 0\n")
            while sent[-1].get("update_type") != "completed":
                sent.append(ear.line())
        yield server, agent, sent
    finally:
        server.close()


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: f"{shown['type']}")
def test_json_in_the_document_is_what_is_sent(shown: Json, really_sent: tuple[Server, str, list[Json]]) -> None:
    server, agent, sent = really_sent
    if shown["type"].endswith("_request") or shown["type"] == "control_command":
        (known,) = {found for found in re.findall(r'"agent_id": "([^"]*)"', DOCUMENT)}
        with LineWire(server.socket_path) as wire:
            wire.ok(shown["type"], **{name: value for name, value in renamed(shown, {known: agent}).items()
                                      if name not in ("type", "request_id")})
        return
    alike = [each for each in sent if each.get("type") == shown["type"]]
    assert shape(shown) in [shape(each) for each in alike], f"really: {json.dumps(alike[:3])[:3000]}"


def test_numbers_in_the_document_agree_with_each_other() -> None:
    def chunks(value: Json) -> Iterator[Json]:
        if "next_offset" in value:
            yield value
        elif isinstance(value.get("data"), dict):
            yield from chunks(value["data"])
    found = [chunk for shown in SHOWN for chunk in chunks(shown)]
    assert len(found) >= 5
    for chunk in found:
        assert chunk["next_offset"] - chunk["offset"] == len(data_of(chunk)) == chunk.get("bytes", len(data_of(chunk)))


def test_examples_that_the_document_names_exist() -> None:
    named = set(re.findall(r"\.\./(examples/[\w./]+)", DOCUMENT))
    assert len(named) == 3 and all((ROOT / name).exists() for name in named)
