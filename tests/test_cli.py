"""The command line as a person and a script use it: real commands against a real server.

Owns:    exit codes, --json, what goes to stdout and what to stderr, run with stdin and Ctrl-C, following, waiting.
Runs in: the test process; each command is a process of its own.
Unaware: of how a command is made (test_cli_units.py).
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import DEADLINE_SECS, MAIN, ROOT, Server, agent, clean_environ, wait_until
from wire import LineWire, alive


class Cli:
    """The `agentserver` command with one server as its default."""

    def __init__(self, server: Server, address: str) -> None:
        self.server = server
        self.environ = clean_environ(server.state_dir, {"AGENTSERVER_SERVER": address})

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command with pipes on all three."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, str(MAIN), *args], env=self.environ, cwd=str(ROOT), bufsize=0, **pipes)

    def run(self, *args: str, stdin: bytes = b"", code: int = 0) -> tuple[str, str]:
        """Run a command to its end, which has to be `code`, and return stdout and stderr."""
        with self.start(*args) as process:
            try:
                out, error = process.communicate(stdin, timeout=DEADLINE_SECS)
            finally:
                process.kill()
        assert process.returncode == code, (args, process.returncode, out, error)
        assert b"Traceback" not in error, error
        return out.decode(), error.decode()

    def json(self, *args: str, code: int = 0) -> Any:
        """Run with --json and return its one document."""
        return json.loads(self.run(*args, *(() if "--json" in args else ("--json",)), code=code)[0])

    def spawn(self, name: str, /, *args: str, flags: tuple[str, ...] = ()) -> str:
        """Spawn by command line; wait until it is ready."""
        ref = self.run("spawn", *flags, "--", *agent(name, *args))[0].strip()
        with LineWire(self.server.socket_path) as wire:
            wire.until_output(ref, b"ready\n")
        return ref


@pytest.fixture
def cli(shared: Server) -> Cli:
    """The command line over the Unix socket of the shared server."""
    return Cli(shared, shared.address("unix"))


@pytest.fixture(params=["unix", "tcp"])
def either(request: pytest.FixtureRequest, shared: Server) -> Cli:
    """The command line over the Unix socket, and over ZeroMQ."""
    return Cli(shared, shared.address(request.param))


def line_of(process: subprocess.Popen[bytes], stream: str = "stdout") -> bytes:
    """Return the next line of a running command."""
    fd, line, until = getattr(process, stream).fileno(), b"", time.monotonic() + DEADLINE_SECS
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
        byte = os.read(fd, 1) if readable else b""
        assert byte, f"{'the end' if readable else 'nothing'} after {line!r}"
        line += byte
    return line


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a command that a test started, whatever happens."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    """Return code, rest of stdout and rest of stderr."""
    out, error = process.communicate(timeout=DEADLINE_SECS)
    assert b"Traceback" not in error, error
    return process.returncode, out, error


# ---------------------------------------------------------------- run

def test_run_shows_each_stream_on_its_own_and_exits_with_the_code(either: Cli) -> None:
    with running(either.start("run", "--", *agent("exit_with", "7", "went", "wrong"))) as process:
        assert ended(process) == (7, b"ready\n", b"went wrong\n")
    out, _ = either.run("run", "--", *agent("exit_with", "0"))
    assert out == "ready\n"


def test_run_passes_stdin_and_its_end(either: Cli) -> None:
    sent = os.urandom(3_000_000)
    with running(either.start("run", "--", *agent("echo"))) as process:
        code, out, error = process.communicate(sent, timeout=60)[0], None, None
        assert process.returncode == 0 and code == b"ready\n" + sent and out is error is None


def test_run_is_interactive(either: Cli) -> None:
    with running(either.start("run", "--", *agent("echo"))) as process:
        assert process.stdin is not None and line_of(process) == b"ready\n"
        for word in (b"one\n", b"two\n"):
            process.stdin.write(word)
            process.stdin.flush()
            assert line_of(process) == word, "while both sides stay open"
        process.stdin.close()
        process.stdin = None
        assert ended(process) == (0, b"", b"eof after 8 bytes\n")


def test_run_writes_bytes_as_they_are(either: Cli) -> None:
    with running(either.start("run", "--", *agent("binary", "100"), stdin=subprocess.DEVNULL)) as process:
        code, out, error = ended(process)
        assert code == 0 and out == b"ready\n" + (bytes(range(256)) + b"\xff\xfe\xe2\x82") * 100
        assert error == (bytes(range(255, -1, -1)) + b"\xc3") * 100


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_run_tells_the_signal_as_a_shell_does(cli: Cli, number: signal.Signals) -> None:
    cli.run("run", "--", *agent("die_by", str(int(number))), code=128 + number)


def test_the_ladder_of_ctrl_c(either: Cli) -> None:
    """SIGINT, then stop, then kill."""
    with running(either.start("run", "--grace-secs", "1000", "--", *agent("catcher", "9", "0"))) as process:
        assert line_of(process) == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert line_of(process) == b"SIGINT\n"
        process.send_signal(signal.SIGINT)
        assert line_of(process) == b"SIGTERM\n"
        process.send_signal(signal.SIGINT)
        code, out, _ = ended(process)
        assert code == -signal.SIGINT, "what Ctrl-C has ended ends by it, so that a shell's loop does"
        assert out in (b"", b"SIGCONT\n"), "stop wakes what is stopped"
    with LineWire(either.server.socket_path) as wire:
        assert wire.agents() == []


def test_one_ctrl_c_that_the_agent_heeds(cli: Cli) -> None:
    with running(cli.start("run", "--", *agent("catcher", "1", "42"))) as process:
        assert line_of(process) == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert ended(process)[:2] == (42, b"SIGINT\nbye\n")


def test_run_detached_prints_the_id_only(cli: Cli) -> None:
    ref = cli.run("run", "--detach", "--name", "away", "--", *agent("sleeper"))[0].strip()
    assert cli.json("info", ref)["agent_info"]["name"] == "away" and ref in cli.run("info", ref)[0]
    with LineWire(cli.server.socket_path) as wire:
        assert wire.status(ref) == "running"


def test_run_that_cannot_start(cli: Cli) -> None:
    out, error = cli.run("run", "--", "/nonexistent/program", code=1)
    assert out == "" and "spawn_failed" in error and "/nonexistent/program" in error and len(error.splitlines()) == 1


def test_run_with_a_reader_that_leaves(cli: Cli) -> None:
    """`run … | head -1`: the agent is not left running unseen for ever, and there is no traceback."""
    with running(cli.start("run", "--", *agent("ticker", "0.01"))) as process:
        assert process.stdout is not None and line_of(process) == b"ready\n"
        process.stdout.close()
        process.stdout = None
        assert process.wait(DEADLINE_SECS) != 0
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()


def test_run_shows_output_live(cli: Cli) -> None:
    """A line is on our stdout while the agent waits for the next."""
    with running(cli.start("run", "--", *agent("print_when"))) as process:
        assert process.stdin is not None and line_of(process) == b"ready\n"
        process.stdin.write(b"err to the other\nout here\n")
        process.stdin.flush()
        assert line_of(process) == b"here\n" and line_of(process, "stderr") == b"to the other\n"
        process.stdin.write(b"exit 0\n")
        process.stdin.flush()
        assert ended(process)[0] == 0


def test_run_goes_on_when_the_shell_dies(cli: Cli, shared: Server) -> None:
    over = Cli(shared, shared.endpoint)
    with running(over.start("run", "--", *agent("echo"))) as process:
        assert process.stdin is not None and line_of(process) == b"ready\n"
        shell = shared.pids()["shell"]
        os.kill(shell, signal.SIGKILL)
        process.stdin.write(b"after\n")
        process.stdin.flush()
        assert line_of(process) == b"after\n"
        process.stdin.close()
        process.stdin = None
        assert ended(process)[0] == 0


def test_run_uses_my_directory_and_chosen_variables(cli: Cli, tmp_path: Path) -> None:
    cli.environ["FROM_ME"] = "mine"
    out, _ = cli.run("run", "--cwd", str(tmp_path), "--env", "GIVEN=1", "--env", "FROM_ME", "--", *agent("report"))
    report = json.loads(out.splitlines()[1])
    assert report["cwd"] == str(tmp_path) and report["environment"]["GIVEN"] == "1"
    assert report["environment"]["FROM_ME"] == "mine"
    report = json.loads(cli.run("run", "--", *agent("report"))[0].splitlines()[1])
    assert report["cwd"] == str(ROOT), "here"


# ---------------------------------------------------------------- spawn, ps, info, why

def test_spawn_and_ps(either: Cli) -> None:
    ref = either.spawn("sleeper", flags=("--name", "napper", "--label", "team=a", "--metadata", '{"k": [1]}'))
    listed = either.json("ps")
    agents = listed["agents"] if isinstance(listed, dict) else listed
    assert [a["id"] for a in agents] == [ref] and agents[0]["labels"] == {"team": "a"}
    assert agents[0]["metadata"] == {"k": [1]}
    text = either.run("ps")[0]
    assert "napper" in text and "running" in text and ref[:8] in text and "\x1b" not in text
    assert ref not in either.run("ps", "--label", "team=b")[0]
    assert "napper" in either.run("ps", "--label", "team=a", "--status", "running")[0]
    either.run("kill", "napper", "--wait")
    assert "napper" not in either.run("ps")[0] and "napper" in either.run("ps", "-a")[0]
    assert ref not in str(either.json("spawn", "--json", "--", *agent("exit_with", "0")))


def test_ps_of_nothing(cli: Cli) -> None:
    out, _ = cli.run("ps")
    assert "Traceback" not in out
    listed = cli.json("ps")
    assert (listed["agents"] if isinstance(listed, dict) else listed) == []


def test_info_and_why(cli: Cli) -> None:
    ref = cli.spawn("exit_with", "3", "a reason")
    cli.run("wait", ref, code=3)
    assert ref in cli.run("info", ref)[0] and ref in json.dumps(cli.json("info", ref))
    why = cli.run("why", ref)[0]
    assert "3" in why and "a reason" in why, "the code, and its last words"
    daemoniser = cli.spawn("daemoniser", "exit", "keep")
    cli.run("wait", daemoniser)
    with LineWire(cli.server.socket_path) as wire:
        daemon = wire.lines(daemoniser, 2)[1]
    assert daemon in cli.run("why", daemoniser)[0], "who was left over is named"
    stubborn = cli.spawn("stubborn", flags=("--grace-secs", "0.1"))
    assert "running" in cli.run("why", stubborn)[0]
    cli.run("stop", stubborn, "--wait")
    assert "SIGKILL" in cli.run("why", stubborn)[0]
    assert isinstance(cli.json("why", stubborn), dict)


# ---------------------------------------------------------------- logs

def test_logs(either: Cli) -> None:
    ref = either.spawn("print_when")
    with LineWire(either.server.socket_path) as wire:
        wire.control(ref, "write_stdin", data="".join(f"out line {n}\n" for n in range(20)) + "err oh\nexit 0\n")
        wire.ended(ref)
    with running(either.start("logs", ref)) as process:
        code, out, error = ended(process)
        assert code == 0 and out == b"ready\n" + b"".join(b"line %d\n" % n for n in range(20)) and error == b"oh\n"
    assert either.run("logs", "-n", "2", "--stream", "stdout", ref)[0] == "line 18\nline 19\n"
    assert either.run("logs", "-n", "3", ref) == ("line 18\nline 19\n", "oh\n"), "of both streams together"
    assert either.run("logs", "-n", "1", ref) == ("", "oh\n")
    assert either.run("logs", "-n", "0", "--stream", "stdout", ref)[0] == ""
    assert either.run("logs", "--stream", "stderr", ref) == ("", "oh\n"), "on the right stream"
    stamped = either.run("logs", "-t", "--stream", "stdout", ref)[0].splitlines()
    assert len(stamped) == 21 and all(line.split()[0][:2] == "20" for line in stamped)
    assert stamped[-1].endswith("line 19")
    assert either.run("logs", "--since", "1h", "--stream", "stdout", ref)[0].endswith("line 19\n")
    assert either.run("logs", "--since", "2100-01-01T00:00:00Z", ref) == ("", "")
    lines = [json.loads(line) for line in either.run("logs", "--json", ref)[0].splitlines()]
    assert "line 19" in "".join(line.get("data") or "" for line in lines)
    assert all(isinstance(line, dict) for line in lines)


def test_logs_follow_until_the_end(either: Cli) -> None:
    ref = either.spawn("print_when")
    with running(either.start("logs", "-f", ref)) as process, LineWire(either.server.socket_path) as wire:
        assert line_of(process) == b"ready\n"
        for n in range(3):
            wire.control(ref, "write_stdin", data=f"out live {n}\n")
            assert line_of(process) == b"live %d\n" % n
        wire.control(ref, "write_stdin", data="err last\nexit 9\n")
        code, out, error = ended(process)
        assert (code, out, error) == (0, b"", b"last\n"), "it shows; `wait` and `run` return the code"


def test_logs_follow_a_flood_completely(either: Cli, tmp_path: Path) -> None:
    ref = either.spawn("lines", "60000", "0", str(tmp_path / "sums"))
    with running(either.start("logs", "-f", ref)) as process:
        code, out, error = ended(process)
    sums = (tmp_path / "sums").read_text().split()
    assert code == 0 and hashlib.sha256(out).hexdigest() == sums[1] and hashlib.sha256(error).hexdigest() == sums[3]


def test_logs_follow_from_the_last_lines(cli: Cli) -> None:
    ref = cli.spawn("print_when")
    with LineWire(cli.server.socket_path) as wire:
        wire.control(ref, "write_stdin", data="out one\nout two\n")
        wire.until_output(ref, b"two\n")
        with running(cli.start("logs", "-f", "-n", "1", ref)) as process:
            assert line_of(process) == b"two\n"
            wire.control(ref, "write_stdin", data="out three\nexit 0\n")
            assert ended(process)[1] == b"three\n"


def test_ctrl_c_ends_following_not_the_agent(cli: Cli) -> None:
    ref = cli.spawn("sleeper")
    with running(cli.start("logs", "-f", ref)) as process:
        assert line_of(process) == b"ready\n"
        process.send_signal(signal.SIGINT)
        code, _, error = ended(process)
        assert code == -signal.SIGINT and b"Traceback" not in error
    with LineWire(cli.server.socket_path) as wire:
        assert wire.status(ref) == "running"


def test_logs_with_a_pattern(either: Cli) -> None:
    ref, other = either.spawn("print_when"), either.spawn("print_when", flags=("--name", "two"))
    with LineWire(either.server.socket_path) as wire:
        for each in (ref, other):
            data = "".join(f"out line {n}\n" for n in range(20)) + "err oh\nexit 0\n"
            wire.control(each, "write_stdin", data=data)
            wire.ended(each)
    assert either.run("logs", "--grep", "1[78]", ref) == ("line 17\nline 18\n", "")
    assert either.run("logs", "--grep", "^line", "-n", "2", "--stream", "stdout", ref)[0] == "line 18\nline 19\n"
    assert either.run("logs", "--grep", "no such line", ref, code=1) == ("", "")
    assert "oh" in either.run("logs", "--grep", ".", "--stream", "stderr", ref)[0]
    found, = [json.loads(line) for line in either.run("logs", "--json", "--grep", "e 3$", ref)[0].splitlines()]
    assert (found["type"], found["text"]) == ("line", "line 3") and found["agent_id"].startswith(ref[:8])
    two = either.run("logs", "--grep", "line 1$", ref, other)[0]
    assert sorted(line.split("|")[1].strip() for line in two.splitlines()) == ["line 1"] * 2 and "two|" in two
    assert "not a regular expression" in either.run("logs", "--grep", "(", ref, code=1)[1]
    for flags in (("-f",), ("-t",), ("--since", "1h")):
        assert "--grep" in either.run("logs", "--grep", "x", *flags, ref, code=2)[1]


def test_logs_with_a_pattern_page_by_page(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"".join(b"line %d\n" % n for n in range(25_000)) + (b"x" * 3_000_000 + b"\n") * 5)
    ref = cli.run("spawn", "--", "cat", str(tmp_path / "out"))[0].strip()
    cli.run("wait", ref)
    assert cli.run("logs", "--grep", "^line .*7$", ref)[0] == "".join(f"line {n}\n" for n in range(7, 25_000, 10))
    assert cli.run("logs", "--grep", "^line", ref)[0].count("\n") == 25_000
    assert len(cli.run("logs", "--grep", "xx", ref)[0]) == 5 * 3_000_001, "a page of fewer lines where they are long"


def test_logs_of_several_agents_say_whose_line_it_is(cli: Cli) -> None:
    one, two = (cli.spawn("exit_with", "0", flags=("--name", name)) for name in ("first", "second"))
    cli.run("wait", one, two)
    out = cli.run("logs", one, two)[0]
    assert "first" in out and "second" in out and out.count("ready") == 2


# ---------------------------------------------------------------- send

def test_send(either: Cli) -> None:
    ref = either.spawn("echo")
    either.run("send", ref, "hello", "world")
    either.run("send", ref, "-", stdin=b"from \xff stdin\n")
    either.run("send", ref, "last", "--eof")
    with LineWire(either.server.socket_path) as wire:
        assert wire.output(ref) == b"ready\nhello world\nfrom \xff stdin\nlast\n"
    assert "stdin" in either.run("send", ref, "too late", code=1)[1]


def test_send_much_to_a_slow_reader(cli: Cli) -> None:
    """More than the buffer: it is passed on as it drains."""
    ref = cli.spawn("echo")
    cli.run("send", ref, "-", "--eof", stdin=b"x" * 3_000_000)
    with LineWire(cli.server.socket_path) as wire:
        assert wire.output(ref) == b"ready\n" + b"x" * 3_000_000


# ---------------------------------------------------------------- control

def test_control(either: Cli) -> None:
    ref = either.spawn("catcher", "2", "0")
    with LineWire(either.server.socket_path) as wire:
        either.run("pause", ref)
        assert wire.status(ref) == "paused"
        assert "invalid_state" in either.run("pause", ref, code=1)[1]
        either.run("resume", ref)
        either.run("signal", "USR1", ref)
        wire.until_output(ref, b"SIGUSR1\n")
        either.run("restart", ref)
        wait_until(lambda: wire.info(ref)["attempt"] == 2 and wire.status(ref) == "running")
        either.run("kill", ref)
        assert wire.ended(ref)["exit"]["reason"] == "kill"
        either.run("rm", ref)
        assert wire.agents(all=True) == []


def test_many_at_once(cli: Cli) -> None:
    refs = [cli.spawn("sleeper", flags=("--label", "team=a")) for _ in range(3)]
    other = cli.spawn("sleeper")
    with LineWire(cli.server.socket_path) as wire:
        cli.run("pause", "--label", "team=a")
        assert [wire.status(r) for r in (*refs, other)] == ["paused"] * 3 + ["running"]
        assert "invalid_state" in cli.run("pause", refs[0], other, code=1)[1]
        assert wire.status(other) == "paused"
        cli.run("stop", "--all", "--wait")
        assert wire.agents() == []
        cli.run("rm", "--all")
        assert wire.agents(all=True) == []


def test_control_needs_to_know_whom(cli: Cli) -> None:
    ref = cli.spawn("sleeper")
    for command in (("stop",), ("kill",), ("rm",), ("signal", "term")):
        cli.run(*command, code=2)
    with LineWire(cli.server.socket_path) as wire:
        assert wire.status(ref) == "running"


# ---------------------------------------------------------------- wait

def test_wait(either: Cli) -> None:
    refs = [either.spawn("print_when") for _ in range(2)]
    with running(either.start("wait", *refs)) as process, LineWire(either.server.socket_path) as wire:
        wire.control(refs[0], "write_stdin", data="exit 0\n")
        wire.ended(refs[0])
        assert process.poll() is None, "all of them"
        wire.control(refs[1], "write_stdin", data="exit 6\n")
        assert ended(process)[0] == 6
    either.run("wait", refs[0])
    either.run("wait", refs[1], code=6)


def test_wait_for_any_and_for_a_status(cli: Cli) -> None:
    told, sleeper = cli.spawn("print_when"), cli.spawn("sleeper")
    with LineWire(cli.server.socket_path) as wire:
        with running(cli.start("wait", "--any", told, sleeper)) as process:
            wire.control(told, "write_stdin", data="exit 4\n")
            assert ended(process)[0] == 4
        with running(cli.start("wait", "--for", "paused", sleeper)) as process:
            wire.control(sleeper, "pause")
            assert ended(process)[0] == 0
        cli.run("wait", "--for", "paused", sleeper)
        wire.control(sleeper, "kill")
    cli.run("wait", sleeper, code=137)


def test_timeouts_are_124(cli: Cli) -> None:
    ref = cli.spawn("sleeper")
    assert "timeout" in cli.run("wait", "--timeout", "0.2", ref, code=124)[1]
    with LineWire(cli.server.socket_path) as wire:
        assert wire.status(ref) == "running"


# ---------------------------------------------------------------- events, health, stats, shutdown

def test_events(either: Cli) -> None:
    with LineWire(either.server.socket_path) as wire:
        last = 0
        while (page := wire.ok("events_request", since=last))["events"]:
            last = page["next"]
    ref = either.spawn("exit_with", "2")
    either.run("wait", ref, code=2)
    lines = [json.loads(line) for line in either.run("events", "--since", str(last), "--json")[0].splitlines()]
    assert [line["sequence"] for line in lines] == list(range(last + 1, last + 1 + len(lines)))
    assert {line["agent_id"] for line in lines} == {ref} and lines[-1]["status"] == "failed"
    assert "failed" in either.run("events", "--since", str(last))[0]


def test_events_followed(either: Cli) -> None:
    with running(either.start("events", "-f", "--since", "0", "--json")) as process:
        first = json.loads(line_of(process))["sequence"]
        ref = either.spawn("exit_with", "0")
        before = first
        while True:
            event = json.loads(line_of(process))
            assert event["sequence"] == before + 1, "no gap"
            before = event["sequence"]
            if event["agent_id"] == ref and event["status"] == "completed":
                break
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == -signal.SIGINT


def test_health_and_stats(either: Cli) -> None:
    assert either.json("health")["healthy"] is True
    assert either.server.metadata["server_id"] in either.run("health")[0]
    assert either.json("stats")["requests"] > 0
    assert "requests" in either.run("stats")[0]


def test_reload(start_server: Callable[..., Server]) -> None:
    """The agents, the keeper and the addresses stay; core and shell are others when the command returns."""
    server = start_server()
    for address in (server.address("unix"), server.endpoint):
        cli = Cli(server, address)
        ref, before = cli.spawn("echo"), server.pids()
        generation = int(cli.json("health")["metadata"]["generation"])
        out, _ = cli.run("reload")
        assert f"generation {generation + 1}" in out and len(out.splitlines()) == 1
        after = server.pids()
        assert after["keeper"] == before["keeper"]
        assert after["core"] != before["core"] and after["shell"] != before["shell"]
        cli.run("send", ref, "--eof", "still there")
        cli.run("wait", ref)
        assert cli.run("logs", "--stream", "stdout", ref)[0] == "ready\nstill there\n"
    assert cli.json("reload")["generation"] == generation + 2


def test_reload_that_fails_says_why(start_server: Callable[..., Server], run_dir: Path) -> None:
    package = run_dir / "reload-fails" / "agentserver"
    shutil.copytree(MAIN.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    cli, core = Cli(server, server.address("unix")), server.pids()["core"]
    service = package / "core" / "service.py"
    good, facts = service.read_text(), service.stat()
    service.write_text("raise RuntimeError('broken')\n")
    for flags in ((), ("--json",)):
        out, error = cli.run("reload", *flags, code=1)
        assert out == "" and "error (internal): the reload failed" in error and len(error.splitlines()) == 1
    assert server.pids()["core"] == core
    service.write_text(good)
    os.utime(service, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as it was, so that the keeper need not be renewed
    cli.run("reload")
    assert server.pids()["core"] != core


def test_shutdown(start_server: Callable[..., Server]) -> None:
    server = start_server()
    cli = Cli(server, server.endpoint)
    ref = cli.spawn("stubborn", flags=("--grace-secs", "0.2"))
    with LineWire(server.socket_path) as wire:
        pid = wire.info(ref)["pid"]
    cli.run("shutdown")
    assert server.process.wait(DEADLINE_SECS) == 0 and not alive(pid)
    drained = start_server()
    cli = Cli(drained, drained.address("unix"))
    ref = cli.spawn("print_when")
    with running(cli.start("shutdown", "--drain")) as process:
        wait_until(lambda: not drained.ask({"type": "spawn_request", "config": {"command": ["/bin/true"]}})["success"])
        with LineWire(drained.socket_path) as wire:
            wire.control(ref, "write_stdin", data="exit 0\n")
        assert ended(process)[0] == 0
    assert drained.process.wait(DEADLINE_SECS) == 0


# ---------------------------------------------------------------- errors and their codes

def test_exit_codes(cli: Cli, tmp_path: Path) -> None:
    out, error = cli.run("info", "nobody", code=4)
    assert out == "" and "agent_not_found" in error and len(error.splitlines()) == 1
    for command in (("stop", "nobody"), ("wait", "nobody"), ("logs", "nobody"), ("send", "nobody", "x"),
                    ("why", "nobody")):
        assert "agent_not_found" in cli.run(*command, code=4)[1]
    for usage in ((), ("no-such-command",), ("ps", "--no-such-flag"), ("info",), ("ps", "--status", "dead"),
                  ("spawn",), ("logs", "x", "-n", "many"), ("events", "--since", "-1"),
                  ("spawn", "--env", "", "--", "x")):
        cli.run(*usage, code=2)
    for address in (f"unix:{tmp_path}/none.sock", "tcp://127.0.0.1:1", f"ipc://{tmp_path}/none"):
        out, error = cli.run("health", "--server", address, "--timeout", "1", code=3)
        assert out == "" and address.partition(":")[2].strip("/").split("/")[0] in error
        assert len(error.splitlines()) == 1


def test_errors_with_json_keep_stdout_for_json(cli: Cli) -> None:
    for command, code in ((("info", "nobody"), 4), (("spawn", "--", "/nonexistent"), 1)):
        out, error = cli.run(*command, "--json", code=code)
        if out:
            assert json.loads(out)["error_code"]
        assert error and "Traceback" not in error


def test_ambiguous_agents(cli: Cli) -> None:
    for _ in range(2):
        cli.spawn("sleeper", flags=("--name", "twin"))
    assert "ambiguous_agent" in cli.run("kill", "twin", code=1)[1]


def test_no_server_by_default(run_dir: Path) -> None:
    environ = clean_environ(run_dir / "no-such-state")
    environ["XDG_STATE_HOME"] = str(run_dir / "empty")
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", 5555)) == 0:  # it is not ours: ask nothing of it
            pytest.skip("something listens on tcp://127.0.0.1:5555")
    done = subprocess.run([sys.executable, str(MAIN), "run", "--timeout", "1", "--", "true"], env=environ,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=DEADLINE_SECS)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1 and b"serve" in done.stderr, "it says how to start one"


def test_the_default_server_is_the_local_one(start_server: Callable[..., Server], run_dir: Path,
                                             state_dir: Path) -> None:
    home = state_dir / "agentserver"
    server = start_server(state_dir=home)
    environ = {**clean_environ(home), "XDG_STATE_HOME": str(state_dir)}
    done = subprocess.run([sys.executable, str(MAIN), "health", "--json"], env=environ, capture_output=True, check=True)
    assert json.loads(done.stdout)["metadata"]["pid"] == str(server.process.pid)


def test_doctor(cli: Cli) -> None:
    out, _ = cli.run("doctor")
    assert "pyzmq" in out or "zmq" in out
    assert isinstance(cli.json("doctor"), (dict, list))


def test_version_and_help(cli: Cli) -> None:
    from agentserver import __version__
    assert __version__ in cli.run("--version")[0]
    text = cli.run("--help")[0]
    for command in ("serve", "run", "spawn", "ps", "info", "why", "logs", "send", "pause", "resume", "stop", "kill",
                    "restart", "rm", "signal", "wait", "events", "health", "stats", "reload", "shutdown",
                    "doctor"):
        assert command in text, command


# ---------------------------------------------------------------- agents on a terminal of their own

def test_run_with_a_terminal(either: Cli) -> None:
    out, _ = either.run("run", "--pty", "5x7", "--", "sh", "-c", "stty size; cat", stdin=b"typed\n")
    assert "5 7\r\n" in out and out.count("typed\r\n") == 2, "what is typed is shown, and then comes back"


def test_send_to_a_terminal_presses_return(cli: Cli) -> None:
    ref = cli.run("spawn", "--stdin", "pty", "--", *agent("raw"))[0].strip()
    with LineWire(cli.server.socket_path) as wire:
        wire.until_output(ref, b"ready\n")
    assert "24 rows, 80 columns" in cli.run("info", ref)[0] and "runs on a terminal" in cli.run("why", ref)[0]
    cli.run("send", ref, "some", "words")
    cli.run("send", ref, "--eof")
    cli.run("wait", ref)
    assert cli.run("logs", ref)[0].split() == ["ready", "11", hashlib.sha256(b"some words\r").hexdigest()]


# ---------------------------------------------------------------- on a terminal

def on_terminal(cli: Cli, *args: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command whose stdout and stderr are a terminal; return it and our end of that."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(MAIN), *args], stdin=subprocess.DEVNULL, stdout=theirs,
                               stderr=theirs, env={**cli.environ, "TERM": "xterm"}, cwd=str(ROOT))
    os.close(theirs)
    return process, ours


def shown(ours: int, needle: bytes = b"\0never") -> bytes:
    """Return what a terminal showed, up to `needle` or its end."""
    text, until = b"", time.monotonic() + DEADLINE_SECS
    while needle not in text and time.monotonic() < until:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        text += piece
    return text


def test_long_waits_show_progress_on_a_terminal(cli: Cli) -> None:
    ref = cli.spawn("sleeper", flags=("--name", "long-one"))
    process, ours = on_terminal(cli, "wait", ref)
    try:
        assert b"waiting for" in shown(ours, b"waiting for")
        with LineWire(cli.server.socket_path) as wire:
            wire.control(ref, "kill")
        shown(ours)
        assert process.wait(DEADLINE_SECS) == 137
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_colour_is_for_terminals_that_want_it(cli: Cli) -> None:
    cli.spawn("sleeper")
    cli.environ.pop("NO_COLOR", None)
    for wanted in (True, False):
        if not wanted:
            cli.environ["NO_COLOR"] = "1"
        process, ours = on_terminal(cli, "ps")
        text = shown(ours)
        process.wait()
        os.close(ours)
        assert (b"\x1b[" in text) is wanted and b"running" in text
    assert "\x1b" not in cli.run("ps")[0]


def test_ps_watch(cli: Cli) -> None:
    cli.spawn("sleeper", flags=("--name", "first-one"))
    with running(cli.start("ps", "--watch", "--json")) as process:
        assert b"first-one" in line_of(process)
        cli.spawn("sleeper", flags=("--name", "second-one"))
        while b"second-one" not in line_of(process):
            pass
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == -signal.SIGINT
    process, ours = on_terminal(cli, "ps", "--watch")
    try:
        assert b"first-one" in shown(ours, b"first-one")
        cli.spawn("sleeper", flags=("--name", "third-one"))
        assert b"third-one" in shown(ours, b"third-one")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECS) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()
        os.close(ours)
