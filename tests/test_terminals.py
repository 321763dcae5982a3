"""Agents on a pseudo-terminal: what they find, what they are told, what they type back; and that it outlives us.

Owns:    stdin=pty over every link; size and resize; keys that are signals; end of file; job control and real
         full-screen programs; core, keeper and all of us killed in the middle of it.
Runs in: the test process; servers, shells and editors are real.
Unaware: of what a terminal looks like to a person: nothing here draws a screen.
"""
from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import termios
import tty
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from manager import Manager, manager_in
from support import Server, agent, wait_until
from test_faults import back
from test_survival import by_request, kill_core, reload, successor
from wire import LineWire, Wire, alive, child_environ, process_state

from agentserver import AgentClient
from agentserver.cli.supervised import FDS_STORED
from agentserver.core import process, stdin, terminal
from agentserver.core.output import OutputLog
from agentserver.core.terminal import Terminal
from agentserver.errors import RequestError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SHELL = ["bash", "--norc", "--noprofile", "-i"]
SIZE = {"rows": 7, "cols": 33}


def told(wire: Wire, ref: str) -> list[dict[str, Any]]:
    """Return what at_terminal.py has said so far; what was typed is echoed between its lines."""
    lines = wire.so_far(ref)[0].split(b"\r\n")[:-1]
    return [json.loads(line[line.index(b"{"):]) for line in lines if b"{" in line]


def next_told(wire: Wire, ref: str, count: int) -> dict[str, Any]:
    """Return what at_terminal.py says as its `count`-th line, once it has."""
    return wait_until(lambda: told(wire, ref)[count - 1:count], what=f"{count} lines of at_terminal")[0]


def at_terminal(wire: Wire, *args: object, **config: Any) -> str:
    """Spawn at_terminal.py and wait for its first line."""
    config.setdefault("stdin", "pty")
    ref = wire.spawn("at_terminal", *args, ready=False, **config)
    assert next_told(wire, ref, 1)["ready"]
    return ref


def keys(wire: Wire, ref: str, text: str, **more: Any) -> None:
    """Type something."""
    wire.control(ref, "write_stdin", data=text, **more)


# ---------------------------------------------------------------- what an agent finds

def test_a_terminal_of_the_size_that_was_asked_for(wire: Wire) -> None:
    ref = at_terminal(wire, stdin=None, pty=SIZE)
    found = next_told(wire, ref, 1)
    assert found["size"] == [7, 33] and found["term"] == "xterm-256color"
    assert found["session"] and found["foreground"] and found["same"] == [True, True] and found["fds"] == [0, 1, 2]
    assert found["utf8"] and found["icrnl"] and found["echo"] and found["canonical"] and found["signals"]
    info = wire.info(ref)
    assert (info["stdin"], info["pty"]) == ("pty", SIZE)
    with open(f"/proc/{info['pid']}/stat") as stat:
        fields = stat.read().rpartition(") ")[2].split()
    assert int(fields[4]) == os.stat(found["tty"]).st_rdev, "tty_nr: its controlling terminal, as ps shows it"
    listed = {each["id"]: each for each in wire.agents()}[ref]
    assert listed["pty"] == SIZE


def test_a_terminal_without_a_size_has_the_usual_one(wire: Wire) -> None:
    ref = at_terminal(wire, environment={"TERM": "vt100"})
    found = next_told(wire, ref, 1)
    assert found["size"] == [24, 80] and found["term"] == "vt100"
    assert wire.info(ref)["pty"] == {"rows": 24, "cols": 80}
    other = wire.spawn("sleeper")
    assert wire.info(other)["pty"] is None


def test_output_is_raw_and_one_stream(wire: Wire) -> None:
    """What the line discipline makes of it, byte for byte: \\n becomes \\r\\n, and what is typed comes back."""
    ref = wire.ok("spawn_request", config={"command": ["sh", "-c", "printf 'a\\tb\\n\\033[1mc'; printf d >&2; read x; "
                                                       "printf '\\377'"], "stdin": "pty"})["agent_info"]["id"]
    wire.until_output(ref, b"a\tb\r\n\x1b[1mcd")
    reply = wire.read(ref, "stderr", offset=0)
    assert reply["eof"] and reply["data"] is None, "there is no second stream"
    keys(wire, ref, "é\r")
    assert wire.exit(ref)["code"] == 0
    assert wire.output(ref) == b"a\tb\r\n\x1b[1mcd" + "é\r\n".encode() + b"\xff"


def test_the_last_words_are_there(wire: Wire) -> None:
    """More than a terminal holds, written just before the end."""
    ref = wire.ok("spawn_request", config={"command": ["sh", "-c", "stty -opost; seq 100000"], "stdin": "pty"})
    assert wire.output(ref["agent_info"]["id"]) == b"".join(b"%d\n" % n for n in range(1, 100_001))


def test_a_terminal_is_left_and_taken_again(unix: LineWire, tmp_path: Path) -> None:
    """No process has it open for a while; /dev/tty opens it again, and nothing of it was an end."""
    ref = unix.ok("spawn_request", config={"stdin": "pty", "cwd": str(tmp_path), "command": [
        "sh", "-c", "echo first; exec </dev/null >/dev/null 2>&1; while [ ! -e go ]; do sleep 0.01; done; "
        "echo second >/dev/tty; read x </dev/tty; echo $x >/dev/tty"]})["agent_info"]["id"]
    pid = unix.info(ref)["pid"]
    unix.until_output(ref, b"first")
    wait_until(lambda: os.readlink(f"/proc/{pid}/fd/2") == "/dev/null")
    assert not unix.read(ref, offset=0)["eof"] and unix.status(ref) == "running"
    (tmp_path / "go").touch()
    unix.until_output(ref, b"second")
    keys(unix, ref, "third\n")
    assert unix.exit(ref)["code"] == 0 and unix.output(ref) == b"first\r\nsecond\r\nthird\r\nthird\r\n"


# ---------------------------------------------------------------- size

def test_resize_is_told_kept_and_given_to_the_next_attempt(wire: Wire) -> None:
    ref = at_terminal(wire, pty=SIZE)
    since = wire.ok("events_request", limit=10_000)["next"]
    assert wire.control(ref, "resize", rows=50, cols=132) == {"rows": 50, "cols": 132}
    assert next_told(wire, ref, 2) == {"size": [50, 132]}
    wire.control(ref, "resize", rows=50, cols=132)
    wire.control(ref, "resize", rows=51, cols=132)
    assert next_told(wire, ref, 3) == {"size": [51, 132]}, "SIGWINCH comes when the size is another one"
    events = [e for e in wire.ok("events_request", since=since)["events"] if e["agent_id"] == ref]
    assert [(e["update_type"], e["status"], e["data"]["pty"]["rows"]) for e in events] == [
        ("status_changed", "running", 50), ("status_changed", "running", 51)]
    keys(wire, ref, "", eof=True)
    wire.ended(ref)
    assert wire.info(ref)["pty"] == {"rows": 51, "cols": 132}
    before = len(told(wire, ref))
    wire.control(ref, "restart")
    assert next_told(wire, ref, before + 1)["size"] == [51, 132]


def test_what_cannot_be_resized(wire: Wire) -> None:
    piped, ref = wire.spawn("sleeper"), at_terminal(wire)
    assert "stdin is pipe" in wire.cannot("invalid_state", piped, "resize", rows=1, cols=1)
    for size in ({"rows": 0, "cols": 1}, {"rows": 1}, {"rows": 1, "cols": 65536}, {"rows": "1", "cols": 1}, {}):
        wire.cannot("bad_request", ref, "resize", **size)
    keys(wire, ref, "", eof=True)
    wire.ended(ref)
    wire.cannot("invalid_state", ref, "resize", rows=1, cols=1)


def test_the_client_library_knows_terminals(client: AgentClient) -> None:
    shell = client.spawn(["sh", "-c", "read x; stty size; cat"], pty=SIZE)
    assert shell.info().stdin == "pty" and shell.info().pty == SIZE
    shell.resize(3, 4)
    assert shell.info().pty == {"rows": 3, "cols": 4}
    shell.write("go\nlast", eof=True)
    assert shell.wait().code == 0
    assert [chunk.data for _, stream, chunk in client.follow(shell.id) if stream == "stderr" and chunk.data] == []
    assert b"3 4\r\n" in b"".join(chunk.data for _, _, chunk in client.follow(shell.id))


# ---------------------------------------------------------------- what is typed

def test_keys_that_are_signals(wire: Wire) -> None:
    ref = at_terminal(wire)
    keys(wire, ref, "half\x03")
    assert next_told(wire, ref, 2) == {"signal": "SIGINT"}
    keys(wire, ref, "whole\r")
    assert next_told(wire, ref, 3) == {"read": "whole\n"}, "Ctrl-C took the half line with it"
    keys(wire, ref, "\x1c")
    record = wire.exit(ref)
    assert record["signal"] == "SIGQUIT" and record["by"] is None


def test_the_end_of_file_is_a_character(wire: Wire) -> None:
    """After a whole line one, after a half line two; more can follow, because nothing is closed."""
    ref = at_terminal(wire, 4)
    assert wire.control(ref, "close_stdin") == {"closed": True}
    assert next_told(wire, ref, 2) == {"eof": 1}
    keys(wire, ref, "more\n")
    assert next_told(wire, ref, 3) == {"read": "more\n"}
    assert wire.ask("control_command", agent_id=ref, command_type="write_stdin",
                    payload={"data": "no end", "eof": True})["data"]["bytes_written"] == 6
    assert [next_told(wire, ref, 4), next_told(wire, ref, 5)] == [{"read": "no end"}, {"eof": 2}]
    keys(wire, ref, "line\r", eof=True)
    assert [next_told(wire, ref, 6), next_told(wire, ref, 7)] == [{"read": "line\n"}, {"eof": 3}]
    keys(wire, ref, "again")
    wire.control(ref, "close_stdin")
    assert [next_told(wire, ref, 8), next_told(wire, ref, 9)] == [{"read": "again"}, {"eof": 4}]
    assert wire.exit(ref)["code"] == 0
    assert not [e for e in wire.ok("events_request", limit=10_000, agent_id=ref)["events"] if "stdin" in e["data"]]
    wire.cannot("stdin_closed", ref, "write_stdin", data="x")
    wire.cannot("stdin_closed", ref, "close_stdin")


def test_the_end_of_file_is_what_the_program_has_set(unix: LineWire) -> None:
    ref = at_terminal(unix, 1, 0x18)
    keys(unix, ref, "\x04\n")
    assert next_told(unix, ref, 2) == {"read": "\x04\n"}, "this one means nothing now"
    unix.control(ref, "close_stdin")
    assert next_told(unix, ref, 3) == {"eof": 1}


def test_raw_mode_takes_everything_as_it_is(unix: LineWire) -> None:
    """All bytes but the end-of-file character, far more than a terminal holds, to an agent that reads late."""
    ref = unix.spawn("raw", "wait", stdin="pty")
    data = bytes(n for n in range(256) if n != 4) * 3000
    sent = 0
    while sent < len(data):
        piece = data[sent:sent + 100_000]
        reply = unix.control(ref, "write_stdin", data=base64.b64encode(piece).decode(), encoding="base64")
        assert reply["bytes_written"] == len(piece)
        sent += len(piece)
    assert reply["buffered"] > 500_000
    assert "wait" in unix.cannot("stdin_full", ref, "write_stdin", data="x" * 500_000)
    unix.control(ref, "close_stdin")
    os.kill(unix.info(ref)["pid"], signal.SIGUSR1)
    assert unix.output(ref) == b"ready\n%d %s\n" % (len(data), hashlib.sha256(data).hexdigest().encode())


def test_the_end_of_file_needs_room_too(start_server: Callable[..., Server]) -> None:
    """Nothing grows without a bound, and `eof` with data is all or nothing."""
    server = start_server("--stdin-buffer-bytes", "4096")
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("raw", "wait", stdin="pty")
        sent = 0
        while wire.ask("control_command", agent_id=ref, command_type="write_stdin",
                       payload={"data": "x" * 4096})["success"]:
            sent += 4096
        while wire.ask("control_command", agent_id=ref, command_type="write_stdin", payload={"data": "y"})["success"]:
            sent += 1
        wire.cannot("stdin_full", ref, "close_stdin")
        wire.cannot("stdin_full", ref, "write_stdin", data="", eof=True)
        os.kill(wire.info(ref)["pid"], signal.SIGUSR1)
        wait_until(lambda: wire.ask("control_command", agent_id=ref, command_type="close_stdin")["success"])
        assert wire.output(ref).split()[1] == b"%d" % sent


def test_a_terminal_and_the_rest_of_the_commands(wire: Wire) -> None:
    """pause, resume, signal, inspect, stop, kill: as with pipes."""
    ref = at_terminal(wire)
    pid = wire.info(ref)["pid"]
    wire.control(ref, "pause")
    wait_until(lambda: process_state(pid) == "T")
    keys(wire, ref, "later\n")
    wire.control(ref, "resize", rows=9, cols=9)
    wire.control(ref, "resume")
    assert {next_told(wire, ref, n).get("read") for n in (2, 3)} == {"later\n", None}
    wire.control(ref, "signal", signal="int")
    assert next_told(wire, ref, 4) == {"signal": "SIGINT"}
    assert [proc["pid"] for proc in wire.control(ref, "inspect")["tree"]] == []
    wire.control(ref, "stop")
    record = wire.exit(ref)
    assert (record["signal"], record["reason"]) == ("SIGTERM", "stop") and not alive(pid)
    assert wire.read(ref, offset=0)["eof"]
    wire.control(ref, "restart")
    wire.control(ref, "kill")
    assert wire.exit(ref)["signal"] == "SIGKILL"


# ---------------------------------------------------------------- real programs

def shell(wire: Wire, *more: str, **config: Any) -> str:
    """Spawn an interactive bash and wait for its prompt."""
    config.setdefault("pty", {"rows": 24, "cols": 80})
    ref = str(wire.ok("spawn_request", config={
        "command": [*SHELL, *more], "environment": {"PS1": "<$?>", "HOME": "/nonexistent"}, **config,
    })["agent_info"]["id"])
    wire.until_output(ref, b"<0>")
    return ref


def since(wire: Wire, ref: str, offset: int, needle: bytes) -> bytes:
    """Return what was shown after `offset`, once `needle` is in it."""
    def found() -> bytes:
        text = wire.so_far(ref, offset=offset)[0]
        return text if needle in text else b""
    return wait_until(found, what=f"{needle!r} on the screen")


def type_and_see(wire: Wire, ref: str, text: str, needle: bytes) -> bytes:
    """Type, and return what was shown since, once `needle` is in it."""
    end = wire.info(ref)["output"]["stdout"]["end_offset"]
    keys(wire, ref, text)
    return since(wire, ref, end, needle)


def foreground(pid: int) -> int:
    """Return who has the terminal of a shell, once it runs a program of its own; 0 while that is the shell (tpgid)."""
    with open(f"/proc/{pid}/stat") as stat, contextlib.suppress(FileNotFoundError):
        group = int(stat.read().rpartition(") ")[2].split()[5])
        with open(f"/proc/{group}/cmdline", "rb") as job, open(f"/proc/{pid}/cmdline", "rb") as ours:
            return group if job.read() != ours.read() else 0
    return 0


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_shell_with_job_control(wire: Wire) -> None:
    ref = shell(wire)
    assert b"no job control" not in wire.so_far(ref)[0]
    pid = wire.info(ref)["pid"]
    keys(wire, ref, "sleep 1000\r")
    job = wait_until(lambda: foreground(pid), what="the job")
    assert b"Stopped" in type_and_see(wire, ref, "\x1a", b"<148>") and process_state(job) == "T"
    assert b"sleep 1000" in type_and_see(wire, ref, "fg\r", b"sleep 1000")
    wait_until(lambda: process_state(job) == "S" and foreground(pid) == job)
    type_and_see(wire, ref, "\x03", b"<130>")
    wait_until(lambda: not alive(job))
    keys(wire, ref, "sleep 1000 &\r")
    type_and_see(wire, ref, "jobs\r", b"Running")
    job = children(pid)[0]
    wire.control(ref, "stop")
    record = wire.exit(ref)
    assert record["reason"] == "stop" and record["duration"] < 9, "a shell ignores SIGTERM, and ends by SIGHUP"
    wait_until(lambda: not alive(job))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_pause_does_not_take_the_job_from_the_foreground(unix: LineWire) -> None:
    """A shell that goes on before its job would see it stopped, and prompt."""
    ref = shell(unix)
    pid = unix.info(ref)["pid"]
    keys(unix, ref, "bash -c 'cat; true'; echo $?\r")
    inner = wait_until(lambda: children(pid), what="the job")[0]
    job = wait_until(lambda: children(inner), what="its child")[0]
    type_and_see(unix, ref, "one\r", b"one\r\none")
    for _ in range(5):
        unix.control(ref, "pause")
        wait_until(lambda: [process_state(each) for each in (pid, inner, job)] == ["T"] * 3)
        unix.control(ref, "resume")
        wait_until(lambda: process_state(job) == "S")
    type_and_see(unix, ref, "two\r", b"two\r\ntwo")
    shown = type_and_see(unix, ref, "\x04", b"<0>")
    assert b"0" in shown and b"Stopped" not in unix.so_far(ref)[0]
    type_and_see(unix, ref, "\x04", b"exit")
    assert unix.exit(ref)["code"] == 0


#: starts a child so that it cannot be stopped itself until somebody opens the pipe that it is given (vfork(2))
UNSTOPPABLE = """import os, signal, sys
open_it = (os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)
os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}, file_actions=[open_it])
signal.pause()
"""


def test_a_tree_that_does_not_stand_still_keeps_nobody_waiting(unix: LineWire, shared: Server, tmp_path: Path) -> None:
    """Not even those who ask for something while it is being paused."""
    os.mkfifo(tmp_path / "pipe")
    ref = unix.spawn("", ready=False, stdin="pty", command=[sys.executable, "-S", "-c", UNSTOPPABLE,
                                                            str(tmp_path / "pipe")])
    leader = unix.info(ref)["pid"]
    child = wait_until(lambda: children(leader), what="its child")[0]
    wait_until(lambda: process_state(leader) == "D", what="it to be held up")
    unix.send(json.dumps({"type": "control_command", "request_id": "pause it", "agent_id": ref,
                          "command_type": "pause"}).encode())
    answered = 0
    with LineWire(shared.socket_path) as other:
        while not select.select([unix.socket], [], [], 0)[0]:
            other.ok("health_check_request")
            answered += 1
    reply = json.loads(unix.receive())
    assert reply["success"] and reply["request_id"] == "pause it" and reply["data"]["paused"]
    assert answered > 5, "the core waited"
    assert process_state(child) == "T", "what can be stopped is"
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    unix.control(ref, "resume")
    wait_until(lambda: process_state(leader) == process_state(child) == "S", what="both to go on")
    os.close(pipe)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_job_that_was_stopped_before_a_pause_is_so_after_it(start_server: Callable[..., Server]) -> None:
    """Also when the core that paused it has died."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = shell(wire)
        pid = wire.info(ref)["pid"]
        keys(wire, ref, "sleep 1000\r")
        job = wait_until(lambda: foreground(pid), what="the job")
        type_and_see(wire, ref, "\x1a", b"<148>")
        keys(wire, ref, "cat\r")
        other = wait_until(lambda: foreground(pid), what="the other job")
        wire.control(ref, "pause")
        assert {process_state(each) for each in (pid, job, other)} == {"T"}, "the reply has come"
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        wire.control(ref, "resume")
        wait_until(lambda: process_state(other) == "S", what="the job in the foreground to go on")
        assert process_state(job) == "T"
        wire.control(ref, "signal", signal="SIGSTOP")
        assert {process_state(each) for each in (pid, job, other)} == {"T"}
        wire.control(ref, "signal", signal="SIGCONT")
        type_and_see(wire, ref, "\x04", b"<0>")
        assert b"Stopped" in type_and_see(wire, ref, "jobs\r", b"sleep 1000") and process_state(job) == "T"
        wire.control(ref, "kill")
        wire.ended(ref)


@pytest.mark.skipif(not shutil.which("vim"), reason="needs vim")
def test_vim_edits_a_file(wire: Wire, tmp_path: Path) -> None:
    ref = str(wire.ok("spawn_request", config={
        "command": ["vim", "-u", "NONE", "-i", "NONE", "-n", "text"], "pty": {"rows": 10, "cols": 40},
        "cwd": str(tmp_path)})["agent_info"]["id"])
    wait_until(lambda: wire.so_far(ref)[0].count(b"~") >= 8, what="a screen of ten rows")
    keys(wire, ref, "ihello\x1b")
    wire.control(ref, "resize", rows=20, cols=60)
    wait_until(lambda: b"lines=20" in type_and_see(wire, ref, ":set lines?\r", b"lines="), what="a taller screen")
    keys(wire, ref, ":wq\r")
    assert wire.exit(ref)["code"] == 0 and (tmp_path / "text").read_text() == "hello\n"
    assert b"\x1b[?1049h" in wire.output(ref) and b"\x1b[?1049l" in wire.output(ref), "the other screen, and back"


@pytest.mark.skipif(not shutil.which("less"), reason="needs less")
def test_less_shows_a_page_at_a_time(wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("".join(f"line {n}\n" for n in range(100)))
    ref = str(wire.ok("spawn_request", config={"command": ["less", str(path)], "environment": {"LESS": ""},
                                               "pty": {"rows": 6, "cols": 40}})["agent_info"]["id"])
    shown = wire.until_output(ref, b"line 4")
    assert b"line 5" not in shown
    keys(wire, ref, " ")
    assert b"line 10" not in wire.until_output(ref, b"line 9")
    keys(wire, ref, "G")
    wire.until_output(ref, b"line 99")
    keys(wire, ref, "q")
    assert wire.exit(ref)["code"] == 0


def test_python_with_readline(wire: Wire) -> None:
    pytest.importorskip("readline")
    ref = str(wire.ok("spawn_request", config={
        "command": [sys.executable, "-q"], "stdin": "pty",
        "environment": {"PYTHON_BASIC_REPL": "1", "PYTHONSTARTUP": "", "TERM": "vt100"}})["agent_info"]["id"])
    wire.until_output(ref, b">>> ")
    type_and_see(wire, ref, "6 * 9\r", b"54")
    type_and_see(wire, ref, "\x1b[A\x7f7\r", b"42")  # the line before, its last character mended
    type_and_see(wire, ref, "import time; time.sleep(1000)\r", b"1000)")
    type_and_see(wire, ref, "\x03", b"KeyboardInterrupt")
    keys(wire, ref, "raise SystemExit(3)\r")
    assert wire.exit(ref)["code"] == 3


# ---------------------------------------------------------------- whose processes they are

def test_orphans_on_two_terminals_are_told_apart(unix: LineWire) -> None:
    """Sessions of their own, empty environments, parents gone: what they hold tells whose they are."""
    def spawn() -> tuple[str, int]:
        ref = unix.ok("spawn_request", config={"stdin": "pty", "grace_secs": 1000, "command": [
            "sh", "-c", "(setsid env -i sleep 1000 & echo pid $!); exec cat"]})["agent_info"]["id"]
        return ref, int(unix.until_output(ref, b"\n").split()[1])
    (one, first), (two, second) = spawn(), spawn()
    wait_until(lambda: not child_environ(first) and not child_environ(second), what="both to be what they are")
    unix.control(one, "kill")
    assert {item["pid"] for item in unix.exit(one)["leaked"]} == {first}
    wait_until(lambda: not alive(first))
    assert alive(second) and unix.status(two) == "running"
    unix.control(two, "close_stdin")
    record = unix.exit(two)
    assert record["code"] == 0 and {item["pid"] for item in record["leaked"]} == {second}


# ---------------------------------------------------------------- the stop ladder

def test_a_backend_that_ends_at_the_end_of_file(start_server: Callable[..., Server], tmp_path: Path) -> None:
    """`finish = close_stdin` types it; where there is no room for it, SIGTERM comes at once."""
    (tmp_path / "as.ini").write_text("[backend cat]\nargv = cat\nstdin = pty\nfinish = close_stdin\n[backend raw]\n"
                                     f"argv = {' '.join(agent('raw', 'wait'))}\nstdin = pty\nfinish = close_stdin\n")
    server = start_server("--config", str(tmp_path / "as.ini"), "--stdin-buffer-bytes", "4096")
    with LineWire(server.socket_path) as wire:
        cat, raw = (wire.ok("spawn_request", config={"model_backend": name})["agent_info"]["id"]
                    for name in ("cat", "raw"))
        keys(wire, cat, "half a line")
        wire.control(cat, "stop")
        record = wire.exit(cat)
        assert (record["code"], record["reason"]) == (0, "stop") and wire.output(cat) == b"half a line" * 2
        wire.until_output(raw, b"ready")
        for piece in ("x" * 4096, "x"):
            while wire.ask("control_command", agent_id=raw, command_type="write_stdin",
                           payload={"data": piece})["success"]:
                pass
        wire.control(raw, "stop")
        assert wire.exit(raw)["signal"] == "SIGTERM"


# ---------------------------------------------------------------- where the kernel or Python lacks something

@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Terminal, int, OutputLog]]:
    """A terminal in raw mode, its other side, and where its output goes."""
    ours, slave = terminal.make(5, 6)
    tty.setraw(slave)
    made, log = Terminal(ours), OutputLog(str(tmp_path / "log"), 1 << 20)
    yield made, slave, log
    made.close()
    os.close(slave)
    log.close()


def captured(made: Terminal, log: OutputLog) -> bytes:
    """Return everything that was captured, once there is nothing more."""
    with contextlib.suppress(BlockingIOError):
        while made.capture(log):
            pass
    return log.read("stdout", 0, 1 << 20).data


def refuse(*_: object) -> int:
    """Stand for a call that this kernel does not make here."""
    raise OSError(errno.EINVAL, "not here")


@pytest.mark.parametrize("instead", [None, refuse], ids=["python", "kernel"])
def test_output_without_splice(pair: tuple[Terminal, int, OutputLog], monkeypatch: pytest.MonkeyPatch,
                               instead: Callable[..., int] | None) -> None:
    """Also what a core that had it left in the relay comes out, first."""
    made, slave, log = pair
    os.write(slave, b"one ")
    if "relay.in" in made.descriptors():
        assert captured(made, log) == b"one "
        os.write(made.descriptors()["relay.in"], b"two ")
    else:
        os.write(slave, b"two ")
    monkeypatch.setattr(terminal, "_splice", instead)
    later = Terminal({name: os.dup(fd) for name, fd in made.descriptors().items()})
    os.write(slave, b"x" * 10_000)
    assert captured(later, log) == b"one two " + b"x" * 10_000
    os.write(slave, b"end")
    assert captured(later, log).endswith(b"xend")
    later.close()


def test_typing_without_sendfile(pair: tuple[Terminal, int, OutputLog], monkeypatch: pytest.MonkeyPatch,
                                 tmp_path: Path) -> None:
    """Reading and writing instead; the position says how much was taken."""
    made, slave, _ = pair
    data = os.urandom(100_000).replace(b"\4", b"5")
    (tmp_path / "stdin").write_bytes(data)
    monkeypatch.setattr(os, "sendfile", refuse)
    file, taken = os.open(tmp_path / "stdin", os.O_RDONLY), b""
    os.set_blocking(slave, False)
    while len(taken) < len(data):
        with contextlib.suppress(BlockingIOError):
            stdin._move(file, made.master, len(data))
        with contextlib.suppress(BlockingIOError):
            taken += os.read(slave, 4096)
    assert taken == data and os.lseek(file, 0, os.SEEK_CUR) == len(data)
    os.close(file)


@pytest.mark.parametrize("before, typed", [
    (b"", 1), (b"line\n", 1), (b"line\r", 1), (b"\3", 1), (b"x\4", 1), (b"\x15", 1), (b"x", 2), (b"line\n x", 2)])
def test_how_often_the_end_of_file_is_typed(before: bytes, typed: int) -> None:
    ours, slave = terminal.make(1, 1)
    assert terminal.end_of_file(ours["pty"], before) == b"\4" * typed
    mode = termios.tcgetattr(slave)
    mode[6][termios.VEOF] = b"\0"
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    assert terminal.end_of_file(ours["pty"], b"") == b"\4", "it is switched off, and has to be something"
    tty.setraw(slave)
    assert terminal.end_of_file(ours["pty"], before) == b"\4"
    for fd in (*ours.values(), slave):
        os.close(fd)


def test_no_terminal_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> tuple[int, int]:
        raise OSError(errno.ENOSPC, "none")
    monkeypatch.setattr(os, "openpty", none_left)
    with pytest.raises(RequestError, match="no terminal") as refused:
        process.ends("pty", {"rows": 1, "cols": 1})
    assert refused.value.code == "spawn_failed"


# ---------------------------------------------------------------- survival

def grown(wire: Wire, refs: list[str]) -> None:
    """Wait until each of them has written more."""
    ends = {ref: wire.info(ref)["output"]["stdout"]["end_offset"] for ref in refs}
    for ref, end in ends.items():
        wait_until(lambda: wire.info(ref)["output"]["stdout"]["end_offset"] > end, what="a flood to go on")


def keeper_and_core(start_server: Callable[..., Server], server: Server) -> Server:
    """Kill the keeper, let another come, and kill the core then."""
    heir = successor(start_server, server)
    kill_core(heir)
    return heir


EVENTS: dict[str, Callable[..., Any]] = {
    "kill": lambda start, server: kill_core(server), "reload": lambda start, server: reload(server, by_request),
    "keeper": keeper_and_core}


@pytest.mark.skipif(not hasattr(os, "splice"), reason="without splice a death of the core may cost a chunk")
@pytest.mark.parametrize("happens", sorted(EVENTS))
def test_a_flood_loses_nothing(start_server: Callable[..., Server], tmp_path: Path, happens: str) -> None:
    """As fast as terminals take it; every byte, in order, three times over."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        floods = {wire.spawn("flood", tmp_path / f"sum{n}", ready=False, stdin="pty"): tmp_path / f"sum{n}"
                  for n in range(3)}
        grown(wire, list(floods))
    for _ in range(3):
        server = EVENTS[happens](start_server, server) or server
        with LineWire(server.socket_path) as wire:
            grown(wire, list(floods))
    with LineWire(server.socket_path) as wire:
        for ref in floods:
            wire.control(ref, "stop")
        for ref, path in floods.items():
            record = wire.exit(ref)
            assert record["code"] == 0 or (happens == "keeper" and record["code"] is None)
            size, digest = path.read_text().split()
            span = wire.info(ref)["output"]["stdout"]
            assert span["end_offset"] == int(size)
            if not span["first_offset"]:
                assert hashlib.sha256(wire.output(ref)).hexdigest() == digest


@pytest.mark.parametrize("happens", sorted(EVENTS))
def test_what_is_typed_arrives_once(start_server: Callable[..., Server], happens: str) -> None:
    """Far more than a terminal holds waits for an agent that reads late; and so does the end of file after it."""
    server, data = start_server(), b"".join(b"%07d\n" % n for n in range(50_000))
    with LineWire(server.socket_path) as wire:
        ref = wire.spawn("raw", "wait", stdin="pty", pty={"rows": 5, "cols": 6})
        pid = wire.info(ref)["pid"]
        for start in range(0, len(data), 100_000):
            keys(wire, ref, data[start:start + 100_000].decode())
    server = EVENTS[happens](start_server, server) or server
    os.kill(pid, signal.SIGUSR1)
    server = EVENTS[happens](start_server, server) or server
    with LineWire(server.socket_path) as wire:
        wire.control(ref, "close_stdin")
        assert wire.output(ref) == b"ready\n%d %s\n" % (len(data), hashlib.sha256(data).hexdigest().encode())
        assert wire.info(ref)["pty"] == {"rows": 5, "cols": 6}


def test_a_terminal_goes_with_the_last_of_us(start_server: Callable[..., Server]) -> None:
    """Where nobody holds our side of it, the kernel hangs up, as it does not to an agent on pipes."""
    server = start_server("--orphans", "leave")
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("sleeper", ready=False, stdin=stdin) for stdin in ("pipe", "pty")]
        for each in ids:
            wire.until_output(each, b"ready")
        there, gone = (wire.info(each)["pid"] for each in ids)
    for pid in server.pids().values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(gone), what="SIGHUP")
    assert alive(there)
    server.abandon()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_shell_notices_nothing(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        ref = shell(wire)
        type_and_see(wire, ref, "x=5; cat\r", b"cat\r\n")
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        type_and_see(wire, ref, "typed\r", b"typed\r\ntyped")
        wire.control(ref, "resize", rows=11, cols=99)
        type_and_see(wire, ref, "\x03", b"<130>")
        type_and_see(wire, ref, "stty size; echo $x\r", b"11 99\r\n5")
    reload(server, by_request)
    with LineWire(server.socket_path) as wire:
        assert wire.info(ref)["pty"] == {"rows": 11, "cols": 99}
        keys(wire, ref, "exit 3\r")
        assert wire.exit(ref)["code"] == 3 and wire.output(ref).endswith(b"exit\r\n")


def test_an_end_while_there_is_no_core(server: Server, tmp_path: Path) -> None:
    """What it wrote before waits in the terminal."""
    with LineWire(server.socket_path) as wire:
        ref = wire.ok("spawn_request", config={"stdin": "pty", "cwd": str(tmp_path), "command": [
            "sh", "-c", "stty -opost; echo ready; while [ ! -e go ]; do sleep 0.01; done; seq 500; exit 7"],
        })["agent_info"]["id"]
        pid = wire.info(ref)["pid"]
        wire.until_output(ref, b"ready")
    core = server.pids()["core"]
    os.kill(core, signal.SIGSTOP)
    (tmp_path / "go").touch()
    wait_until(lambda: process_state(pid) == "Z", what="the end of the agent")
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    with LineWire(server.socket_path) as wire:
        assert wire.exit(ref)["code"] == 7
        assert wire.output(ref) == b"ready\n" + b"".join(b"%d\n" % n for n in range(1, 501))


@pytest.fixture
def manager(run_dir: Path) -> Iterator[Manager]:
    """A service manager with a store of descriptors."""
    made = manager_in(run_dir)
    yield made
    made.close()


@pytest.mark.skipif(not hasattr(os, "splice"), reason="without splice there is no relay")
def test_terminals_live_in_the_store(start_server: Callable[..., Server], manager: Manager, tmp_path: Path) -> None:
    """All of us killed at once: terminal, relay, and what was typed come back from the service manager."""
    server, data = start_server(environ=manager.environ()), b"0123456789" * 20_000
    with LineWire(server.socket_path) as wire:
        flood, late = wire.spawn("flood", tmp_path / "sum", ready=False, stdin="pty"), wire.spawn(
            "raw", "wait", stdin="pty")
        grown(wire, [flood])
        keys(wire, late, data.decode())
        pid = wire.info(late)["pid"]
        wanted = {f"{flood}.pty", f"{flood}.relay.in", f"{flood}.relay.out", f"{late}.pty", f"{late}.stdin.1"}
        wait_until(lambda: wanted <= set(manager.store), what="everything to be stored")
    for part in server.pids().values():
        os.kill(part, signal.SIGKILL)
    server.process.wait()
    os.kill(pid, signal.SIGUSR1)
    again = manager.start_again(start_server, server.state_dir)
    with LineWire(again.socket_path) as wire:
        grown(wire, [flood])
        wire.control(flood, "stop")
        wire.control(late, "close_stdin")
        assert wire.output(late) == b"ready\n%d %s\n" % (len(data), hashlib.sha256(data).hexdigest().encode())
        wire.ended(flood)
        assert wire.info(flood)["output"]["stdout"]["end_offset"] == int((tmp_path / "sum").read_text().split()[0])
        wait_until(lambda: not manager.store, what="nothing to be stored any more")


def terminals_of(pid: int) -> list[str]:
    """Return what of terminals, pipes and agents' files a process has open."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [what for what in found if what.startswith(("/dev/pt", "pipe:")) or "/agents/" in what]


def test_nothing_is_left_open(server: Server) -> None:
    """After terminals have come and gone, in core and keeper; nor is one held that a spawn could not use."""
    pids = server.pids()
    with open(f"/proc/{pids['core']}/stat") as stat:
        assert stat.read().rpartition(") ")[2].split()[4] == "0", "the core has no terminal, whatever it opens"
    before = {part: terminals_of(pid) for part, pid in pids.items()}
    with LineWire(server.socket_path) as wire:
        live = at_terminal(wire)
        keys(wire, live, "x")
        assert len(terminals_of(pids["core"])) - len(before["core"]) <= process.FDS_PER_AGENT
        assert len(terminals_of(pids["keeper"])) - len(before["keeper"]) <= FDS_STORED
        for n in range(10):
            ref = wire.ok("spawn_request", config={"command": ["cat"], "stdin": "pty"})["agent_info"]["id"]
            keys(wire, ref, "x" * n)
            wire.control(ref, "kill" if n % 2 else "close_stdin")
            wire.ended(ref)
            wire.refused("spawn_failed", "spawn_request", config={"command": ["/nonexistent"], "stdin": "pty"})
        wire.control(live, "kill")
        wire.ended(live)
        for part in ("core", "keeper"):
            wait_until(lambda: terminals_of(pids[part]) == before[part], what=f"the {part} to hold nothing any more")
