"""The command line where its surroundings are not as usual: closed descriptors, full disks, signals, silent servers.

Owns:    what every command does there. The commands come from the parser, so that a new one is checked too.
Runs in: the test process; each command is a process of its own.
Unaware: of what commands do where all is well (test_cli.py).
"""
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest
from person import Person
from support import DEADLINE_SECS, MAIN, Server, agent, clean_environ, wait_until
from wire import LineWire

from agentserver.cli import options

#: a command line for each command, in which DONE is an agent that has ended and LIVE one that waits
LINES = {
    "run": ["run", "--", "echo", "hi"], "attach": ["attach", "--read-only", "LIVE"], "spawn": ["spawn", "--", "true"],
    "ps": ["ps", "--all"], "info": ["info", "DONE"], "why": ["why", "DONE"], "logs": ["logs", "DONE"],
    "record": ["record", "DONE"], "replay": ["replay", "RECORDING"], "send": ["send", "LIVE", "hi"],
    "pause": ["pause", "LIVE"], "resume": ["resume", "LIVE"], "stop": ["stop", "LIVE"], "kill": ["kill", "LIVE"],
    "restart": ["restart", "LIVE"], "rm": ["rm", "DONE"], "signal": ["signal", "CONT", "LIVE"],
    "wait": ["wait", "DONE"],
    "events": ["events"], "health": ["health"], "stats": ["stats"], "reload": ["reload"], "shutdown": ["shutdown"],
    "doctor": ["doctor"], "serve": ["serve"], "stdio": ["stdio"]}
#: commands that need no server, or are one, or have no --timeout for another reason
ALONE = ("serve", "stdio", "replay", "doctor")
#: what is left out where all commands are tried on one server: they end or renew it, or print nothing
UNTRIED = ("serve", "shutdown", "reload", "send", "attach", "resume", "restart", "rm", "stdio")


def test_every_command_is_tried() -> None:
    assert sorted(LINES) == sorted(options.command_names())


class Edge:
    """A server with an agent that has ended, one that lives, and a recording."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.environ = clean_environ(server.state_dir, {"AGENTSERVER_SERVER": server.address("unix")})
        self.done, self.live = self.spawn("exit_with", "0"), self.spawn("sleeper")
        self.recording = folder / "recording"
        with LineWire(server.socket_path) as wire:
            wait_until(lambda: wire.status(self.done) == "completed")
        assert self.run("record", "DONE", "-o", str(self.recording)).returncode == 0

    def spawn(self, name: str, *args: str) -> str:
        return self.run("spawn", "--", *agent(name, *args)).stdout.strip()

    def argv(self, words: list[str] | tuple[str, ...]) -> list[str]:
        known = {"DONE": getattr(self, "done", ""), "LIVE": getattr(self, "live", ""),
                 "RECORDING": str(getattr(self, "recording", ""))}
        return [sys.executable, "-W", "error", str(MAIN), *(known.get(word, word) for word in words)]

    def run(self, *words: str, redirect: str = "", **how: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command, perhaps with a redirection as a shell writes it."""
        return subprocess.run(["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *self.argv(words)], text=True,
                              env={**self.environ, **how.pop("environ", {})}, timeout=DEADLINE_SECS,
                              **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                                 **how})


@pytest.fixture
def edge(shared: Server, tmp_path: Path) -> Edge:
    return Edge(shared, tmp_path)


# ---------------------------------------------------------------- descriptors

@pytest.mark.parametrize("redirect, why", [
    (">&-", "it is closed"), ("<&- >&-", "it is closed"), (">/dev/full", "No space left on device")])
def test_a_stdout_that_takes_nothing_is_one_sentence(edge: Edge, redirect: str, why: str) -> None:
    if "full" in redirect and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    lines = [words for name, words in LINES.items() if name not in UNTRIED and name not in ("stop", "kill")]
    json = [[words[0], "--json", *words[1:]] for words in lines if words[0] != "replay"]
    if redirect != ">/dev/full":
        lines = lines[::4]
    if redirect != ">&-":
        json = json[::4]
    for words in [*lines, *json, ["--help"], ["--version"], ["ps", "--help"], ["logs", "--grep", "ready", "DONE"],
                  ["logs", "-t", "DONE"], ["run", "-d", "--", "true"], ["events", "-f", "--since", "0"]]:
        done = edge.run(*words, redirect=redirect)
        said = [line for line in done.stderr.split("\n") if line.startswith("agentserver: error")]
        assert said[-1:] == [f"agentserver: error (output): stdout cannot be written: {why}"], (words, done)
        assert done.returncode == 1, (words, done)


def test_a_stderr_that_takes_nothing_changes_nothing(edge: Edge) -> None:
    for redirect in ("2>&-", *(["2>/dev/full"] if os.path.exists("/dev/full") else ())):
        assert edge.run("ps", redirect=redirect).returncode == 0
        assert edge.run("info", "nobody", redirect=redirect).returncode == 4
        assert edge.run("nonsense", redirect=redirect).returncode == 2
        assert edge.run("run", "--", "echo", "hi", redirect=redirect).stdout == "hi\n"


def test_a_stdin_that_cannot_be_read_is_one_sentence(edge: Edge) -> None:
    for words in (["send", "LIVE", "-"], ["replay", "-"], ["stdio"]):
        done = edge.run(*words, redirect="<&-")
        assert (done.returncode, done.stderr) == (1, "agentserver: error (input): stdin cannot be read: it is closed\n")
    assert "stdin cannot be read: Bad file" in edge.run("send", "LIVE", "-", redirect="0>/dev/null").stderr
    assert edge.run("run", "--", "cat", redirect="<&-").returncode == 0, "for an agent that is an empty one"


def test_a_server_needs_none_of_the_three(state_dir: Path) -> None:
    environ = clean_environ(state_dir)
    script = 'exec "$@" <&- >&- 2>&-'
    process = subprocess.Popen(["/bin/sh", "-c", script, "sh", sys.executable, str(MAIN), "serve", "--state-dir",
                                str(state_dir), "--endpoint", "tcp://127.0.0.1:0", "--pub-endpoint", "none"],
                               env=environ)
    try:
        def healthy() -> bool:
            done = subprocess.run([sys.executable, str(MAIN), "health", "--server", f"unix:{state_dir}"], env=environ,
                                  capture_output=True)
            return done.returncode == 0
        wait_until(healthy)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECS) == 0


def test_a_recording_on_a_full_disk_is_one_sentence(edge: Edge) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = edge.run("record", "DONE", "-o", "/dev/full")
    assert done.returncode == 1 and "/dev/full cannot be written: No space" in done.stderr
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("words", [
    ["run", "--stdin", "null", "--", "sleep", "1000"], ["logs", "-f", "LIVE"], ["wait", "LIVE"], ["events", "-f"],
    ["stop", "--wait", "--grace-secs", "1000", "DEAF"], ["record", "-f", "LIVE"], ["send", "LIVE", "-"],
    ["ps", "--watch", "--json"], ["replay", "LONG"]])
def test_ctrl_c_ends_a_loop_around_what_waits(edge: Edge, tmp_path: Path, words: list[str]) -> None:
    """A shell goes on with its loop unless the command was ended by the signal itself."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    (tmp_path / "long").write_text('{"agentserver_recording": 1}\n[0, "stdout", "x\\n"]\n[9999, "stdout", "y\\n"]\n')
    deaf = edge.spawn("catcher", "9", "0") if "DEAF" in words else ""
    words = [{"LONG": str(tmp_path / "long"), "DEAF": deaf}.get(word, word) for word in words]
    script = 'for turn in 1 2 3; do echo "turn $turn"; "$@"; done; echo over'
    shell = (str(shutil.which("bash")), "--norc", "-c", script, "bash", *edge.argv(words))
    with Person(edge.environ, program=shell) as me:
        worked: list[str] = []

        def waits(text: str) -> bool:
            worked.append(work(me.process.pid))
            return "turn 1" in text and len(worked) > 4 and len(set(worked[-4:])) == 1 and worked[-1] != ""
        me.until(waits)
        me.type(b"\x03")
        me.end()
        seen = bytes(me.raw)
    if deaf:
        edge.run("kill", deaf)
    assert seen.count(b"turn ") == 1 and b"Traceback" not in seen and b"over" not in seen, seen


def work(shell: int) -> str:
    """Return how much the command of a shell has worked, "" unless it waits: what is the same twice has begun."""
    try:
        child = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0]
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return ""
    return " ".join(fields[11:13]) if fields[0] == "S" else ""


def test_who_starts_us_deaf_to_ctrl_c_is_obeyed(edge: Edge) -> None:
    """`command &` in a script: SIGINT is ignored, by `run` too."""
    script = 'trap "" INT; exec "$@"'
    with subprocess.Popen(["/bin/sh", "-c", script, "sh", *edge.argv(["run", "--", *agent("print_when")])],
                          env=edge.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"out still here\nexit 3\n")
        process.stdin.close()
        assert process.stdout.read() == b"still here\n" and process.wait(DEADLINE_SECS) == 3


# ---------------------------------------------------------------- time

@pytest.fixture(params=["unix", "tcp", "ssh"])
def silent(request: pytest.FixtureRequest, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of something that takes connections and says nothing."""
    if request.param == "ssh":
        monkeypatch.setenv("SILENT_SSH", "sh -c 'trap \"\" TERM; while :; do sleep 1; done'")
        yield "ssh://box"
        return
    if request.param == "tcp":
        pytest.importorskip("zmq")
    with socket.socket(socket.AF_UNIX if request.param == "unix" else socket.AF_INET) as listener:
        path = str(run_dir / f"silent-{time.monotonic_ns()}")
        listener.bind(path if request.param == "unix" else ("127.0.0.1", 0))
        listener.listen(4096)
        yield f"unix:{path}" if request.param == "unix" else f"tcp://127.0.0.1:{listener.getsockname()[1]}"


MORE = [["logs", "-f", "LIVE"], ["stop", "LIVE", "--wait"], ["rm", "LIVE", "--wait"], ["record", "-f", "LIVE"],
        ["events", "-f"], ["stop", "--all"], ["ps", "--watch", "--json"], ["logs", "--grep", "x", "LIVE"],
        ["run", "-d", "--", "true"], ["wait", "--any", "LIVE", "DONE"], ["send", "LIVE", "--eof"],
        ["kill", "--label", "a=b"], ["shutdown", "--drain"]]


def test_timeout_bounds_every_command(silent: str, run_dir: Path) -> None:
    lines = [words for name, words in LINES.items() if name not in ALONE] + MORE
    if not silent.startswith("unix:"):
        lines = lines[::3]  # each takes its time
    environ = clean_environ(run_dir / "nowhere", {
        "AGENTSERVER_SERVER": silent, "AGENTSERVER_SSH": os.environ.get("SILENT_SSH", "ssh")})

    def run(words: list[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, str(MAIN), words[0], "--timeout", "0.2", *words[1:]], env=environ,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_SECS)
    with ThreadPoolExecutor(4) as some:
        for words, done in zip(lines, some.map(run, lines)):
            assert done.returncode == 124 and done.stderr.count("\n") == 1 and not done.stdout, (words, done)


def test_timeout_bounds_what_waits_for_no_server(edge: Edge, tmp_path: Path) -> None:
    """A reader that does not read, a stdin without end, a recording."""
    long = tmp_path / "long"
    long.write_text('{"agentserver_recording": 1}\n[0, "stdout", "x\\n"]\n[9999, "stdout", "y\\n"]\n')
    flood = edge.run("run", "-d", "--", sys.executable, "-c", "print('x' * 1000000)").stdout.strip()
    reader, writer = os.pipe()
    try:
        for words in (["send", "--timeout", "1", "LIVE", "-"], ["replay", "--timeout", "1", str(long)]):
            assert edge.run(*words, stdin=reader).returncode == 124, words
        done = edge.run("logs", "-f", "--timeout", "1", flood, stdout=writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 124 and done.stderr.count("\n") == 1


def test_no_time_at_all_is_a_look(edge: Edge) -> None:
    assert edge.run("wait", "--timeout", "0", "DONE").returncode == 0
    late = edge.run("wait", "--timeout", "0", "LIVE")
    assert late.returncode == 124 and "had not ended" in late.stderr


# ---------------------------------------------------------------- locales

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_an_ascii_locale_changes_no_text(edge: Edge) -> None:
    """What is typed reaches the server as it is meant, and what is shown is escaped where it cannot be shown."""
    made = edge.run("run", "--name", "é", "--label", "k=ü", "--metadata", '{"a": "é"}', "--", "echo", "héllo→",
                    environ=ASCII)
    assert (made.returncode, made.stdout, made.stderr) == (0, "héllo→\n", "")
    found = edge.run("ps", "--all", "--json", "--label", "k=ü")
    assert '"name":"\\u00e9"' in found.stdout and "h\\u00e9llo" in found.stdout and "udc" not in found.stdout
    for words, shown in ((["ps", "-a", "--label", "k=ü"], "\\xe9"), (["info", "é"], "h\\xe9llo"),
                         (["why", "é"], "h\\xe9llo"), (["logs", "--grep", "é", "é"], "héllo→"),
                         (["wait", "é"], "\\xe9: completed"), (["events"], "")):
        done = edge.run(*words, environ=ASCII)
        assert done.returncode == 0 and shown in done.stdout and not done.stderr, (words, done)
    assert "\\xe9" in edge.run("info", "nobodyé", environ=ASCII).stderr
    assert edge.run("rm", "é", environ=ASCII).returncode == 0


def test_a_server_in_an_ascii_locale_serves_any_text(start_server: Any, run_dir: Path) -> None:
    server = start_server(state_dir=run_dir / "sé", environ=ASCII)
    (run_dir / "dé").mkdir()
    for _generation in range(2):
        reply = server.ask({"type": "spawn_request", "config": {
            "command": ["sh", "-c", 'echo "é $K"; pwd'], "cwd": str(run_dir / "dé"), "environment": {"K": "ü"}}})
        with LineWire(server.socket_path) as wire:
            wire.until_output(reply["agent_info"]["id"], f"é ü\n{run_dir}/dé\n".encode())
        assert subprocess.run([sys.executable, str(MAIN), "reload", "--server", f"unix:{server.state_dir}"],
                              env=clean_environ(server.state_dir), timeout=DEADLINE_SECS).returncode == 0


def test_a_path_that_the_locale_cannot_express_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.ini").write_text(f"[server]\nstate_dir = {tmp_path}/é\n", encoding="utf-8")
    done = subprocess.run([sys.executable, str(MAIN), "serve", "--config", str(tmp_path / "x.ini")], text=True,
                          env=clean_environ(tmp_path / "s", ASCII), capture_output=True, timeout=DEADLINE_SECS)
    assert done.returncode != 0 and "UTF-8 locale" in done.stderr and done.stderr.count("\n") == 1
