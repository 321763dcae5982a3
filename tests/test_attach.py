"""`attach` and `run -t`, by a person at a terminal.

Owns:    what is seen and typed, every way to leave and that the terminal is as before, sizes, several at once, the
         server's deaths meanwhile, real programs.
Runs in: the test process; commands, servers, agents and terminals are real.
Unaware: of how it is made (test_attach_units.py), and of pseudo-terminals in the core (test_terminals.py).
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from person import ANSWER, Person
from support import MAIN, ROOT, Server, agent, clean_environ, wait_until, without_ssh
from test_faults import back
from test_terminals import foreground
from wire import process_state

from agentserver import AgentClient
from agentserver.client import Agent

DETACH = b"\x10\x11"  # Ctrl-P Ctrl-Q
SHELL = ["bash", "--norc", "--noprofile"]


class Place:
    """A server, and people who come to it."""

    def __init__(self, server: Server, link: str) -> None:
        self.server = server
        address = f"ssh://machine{server.state_dir}" if link == "ssh" else server.address(link)
        self.environ = clean_environ(server.state_dir, {
            **without_ssh(server.mark), "AGENTSERVER_SERVER": address, "PS1": "inner$ "})
        self.client = AgentClient(server.address("unix" if link == "ssh" else link))
        self._leaving = contextlib.ExitStack()

    def person(self, *args: str, **options: Any) -> Person:
        """Someone who types `agentserver ARGS`."""
        return self._leaving.enter_context(Person(self.environ, *args, **options))

    def run(self, *args: str, stdin: Any = subprocess.DEVNULL) -> "subprocess.CompletedProcess[str]":
        """Run a command without a terminal."""
        return subprocess.run([sys.executable, str(MAIN), *args], env=self.environ, cwd=str(ROOT), stdin=stdin,
                              capture_output=True, text=True, timeout=60)

    def spawn(self, *command: str, **config: Any) -> Agent:
        """Spawn on a terminal."""
        config.setdefault("pty", {"rows": 24, "cols": 80})
        return self.client.spawn(command, **config)

    def fullscreen(self, log: Path, **config: Any) -> Agent:
        """Spawn the full-screen program, and wait until it has drawn."""
        ref = self.spawn(*agent("fullscreen", str(log)), **config)
        wait_until(lambda: b"last line" in ref.read("stdout", 0).data, what="the first screen")
        return ref

    def close(self) -> None:
        """Everybody leaves."""
        self._leaving.close()
        self.client.close()


@pytest.fixture(params=["unix", "tcp", "ssh"])
def place(request: pytest.FixtureRequest, shared: Server) -> Iterator[Place]:
    """A shared server over each link."""
    found = Place(shared, request.param)
    yield found
    found.close()


@pytest.fixture
def near(shared: Server) -> Iterator[Place]:
    """A shared server, over its socket."""
    found = Place(shared, "unix")
    yield found
    found.close()


@pytest.fixture
def own(start_server: Callable[..., Server], request: pytest.FixtureRequest) -> Iterator[Place]:
    """A server that the test may break."""
    found = Place(start_server(), getattr(request, "param", "unix"))
    yield found
    found.close()


def drew(screen: str) -> bool:
    return "last line" in screen


# ---------------------------------------------------------------- run -t

def test_run_t_is_the_program_on_my_terminal(place: Place) -> None:
    me = place.person("run", "-t", "--env", "PS1", "--", *SHELL, rows=30, cols=101)
    me.until("inner$")
    assert me.is_raw
    me.type("stty size; tty -s && echo $TERM\r")
    me.until(lambda text: "30 101" in text and "\nxterm-256color" in text)
    me.type("exit 7\r")
    assert me.end() == 7
    me.assert_as_before()
    assert "agentserver:" not in me.vt.text(), "an end of its own needs no words"


def test_what_was_on_my_screen_stays_where_run_t_begins(near: Place) -> None:
    me = near.person("run", "-t", "--", "printf", "hello")
    assert me.end() == 0 and me.vt.text() == "hello" and b"\x1b[2J" not in me.raw and b"\x1b[H" not in me.raw


def test_ctrl_c_and_ctrl_z_are_the_agents(near: Place) -> None:
    me = near.person("run", "-t", "--env", "PS1", "--", *SHELL)
    me.until("inner$")
    me.type("sh -c 'echo begun; exec sleep 1000'\r")
    me.until("\nbegun")
    me.type(b"\x1a")
    me.until("Stopped")
    me.type("fg\r")
    me.until(lambda text: text.count("sleep 1000") >= 3)
    inner, = near.client.list()
    wait_until(lambda: foreground(inner.pid or 0), what="the job to have the terminal, a moment after that")
    me.type(b"\x03")
    me.until(lambda text: text.endswith("inner$"))
    me.type("echo $?\r")
    me.until("130")
    me.type("exit 4\r")
    assert me.end() == 4


def test_detached_it_goes_on_and_can_be_attached_again(place: Place) -> None:
    me = place.person("run", "-t", "--name", "kept", "--env", "PS1", "--", *SHELL)
    me.until("inner$")
    me.type("echo $((6 * 7)) apples\r")
    before = me.until("42 apples\ninner$")
    me.type(DETACH)
    assert me.end() == 0
    me.assert_as_before()
    ref = re.search(r"to attach again: agentserver attach (\w{8})", me.said())
    assert ref and place.client.agent(ref[1]).info().name == "kept"
    again = place.person("attach", ref[1])
    assert again.until("42 apples\ninner$") == before
    again.type("exit 3\r")
    assert again.end() == 3
    again.assert_as_before()


def test_with_detach_it_only_starts(near: Place) -> None:
    me = near.person("run", "-t", "-d", "--", "sleep", "1000", rows=11, cols=44)
    assert me.end() == 0
    assert near.client.agent(me.vt.text().strip()).info().pty == {"rows": 11, "cols": 44}
    done = near.run("spawn", "-t", "--json", "--", "sleep", "1000")
    assert '"stdin":"pty"' in done.stdout.replace(" ", ""), "also where there is no terminal to be like"
    done = near.run("spawn", "--stdin", "pty", "--", "sleep", "1000")
    assert near.client.agent(done.stdout.strip()).info().pty == {"rows": 24, "cols": 80}


# ---------------------------------------------------------------- the screen again

def test_a_full_screen_program_looks_the_same_after_attaching_again(place: Place, tmp_path: Path) -> None:
    ref = place.fullscreen(tmp_path / "log")
    me = place.person("attach", ref.id)
    me.type("abc")
    before = me.until("keys abc")
    modes = set(me.vt.modes)
    assert me.vt.alternate and {"?1000", "?1006", "?1004", "?2004", "?1", "keypad", "25 off", "other keys", "shape",
                                "kitty True1"} <= modes
    me.type(DETACH)
    assert me.end() == 0
    me.assert_as_before()
    again = place.person("attach", ref.id)
    again.until(lambda text: text == before)
    assert again.vt.alternate and again.vt.modes == modes
    again.type("q")
    assert again.end() == 0
    again.assert_as_before()


def test_the_screen_is_redrawn_where_its_beginning_is_long_gone(near: Place, tmp_path: Path) -> None:
    """Then the program is made to draw it again: it gets another size for a moment."""
    ref = near.fullscreen(tmp_path / "log")
    assert ref.info().attach_info == {"command": f"agentserver attach {ref.id}"}
    ref.write("w")
    wait_until(lambda: b"keys w" in ref.read("stdout", max(0, near_end(ref) - 100)).data)
    me = near.person("attach", ref.id)
    me.until(lambda text: text.startswith("size 24x80\nkeys w") and drew(text))
    me.type("q")
    assert me.end() == 0
    me.assert_as_before()
    assert ref.info().attach_info is None


def near_end(ref: Agent) -> int:
    return ref.info().output["stdout"].end_offset


def test_the_answers_to_old_questions_are_not_typed(near: Place, tmp_path: Path) -> None:
    ref = near.fullscreen(tmp_path / "log")
    me = near.person("attach", ref.id)
    me.until(drew)
    me.answering = True
    me.type("d")
    wait_until(lambda: me.look() is not None and b"d" + ANSWER in (tmp_path / "log").read_bytes(),
               what="the terminal's answer to reach the program")
    me.type(DETACH)
    assert me.end() == 0 and len(me.vt.asked) == 3
    again = near.person("attach", ref.id)
    again.answering = True
    again.until(drew)
    again.type("q")
    assert again.end() == 0 and not again.vt.asked
    assert (tmp_path / "log").read_bytes().count(ANSWER) == 1


def test_what_was_on_my_screen_scrolls_away_and_is_not_lost(near: Place) -> None:
    ref = near.spawn(*SHELL, environment={"PS1": "inner$ "})
    script = f"for i in 1 2 3 4 5; do echo mine $i; done; exec {sys.executable} {MAIN} attach {ref.id}"
    me = near.person(program=("sh", "-c", script))
    me.until("inner$")
    assert "mine" not in me.vt.text()
    scrolled = me.raw.decode().split("mine 5\r\n")[1]
    assert scrolled.index("\r\n" * 24) < scrolled.index("\x1b[J"), "by as much as the screen has rows"
    me.type(DETACH)
    assert me.end() == 0


# ---------------------------------------------------------------- leaving

def _by_keys(me: Person, ref: Agent) -> int:
    me.type(DETACH)
    return 0


def _by_an_end(me: Person, ref: Agent) -> int:
    me.type("x")
    return 9


def _by_a_kill(me: Person, ref: Agent) -> int:
    ref.kill()
    return 137


def _by_signal(number: signal.Signals) -> Callable[[Person, Agent], int]:
    def leave(me: Person, ref: Agent) -> int:
        me.signal(number)
        return 131 if number == signal.SIGQUIT else -number
    return leave


LEAVING = {"keys": _by_keys, "end": _by_an_end, "kill": _by_a_kill, "term": _by_signal(signal.SIGTERM),
           "hup": _by_signal(signal.SIGHUP), "int": _by_signal(signal.SIGINT), "quit": _by_signal(signal.SIGQUIT)}


@pytest.mark.parametrize("way", LEAVING)
def test_the_terminal_is_as_before_however_i_leave(way: str, place: Place, tmp_path: Path) -> None:
    ref = place.fullscreen(tmp_path / "log")
    me = place.person("attach", ref.id)
    me.until(drew)
    assert me.vt.alternate and me.is_raw
    assert LEAVING[way](me, ref) == me.end()
    me.assert_as_before()
    ends = way in ("end", "kill")
    assert ("to attach again" in me.said()) != ends
    assert ref.info().finished == ends
    if way == "kill":
        assert "killed it" in me.said()


def test_it_is_as_before_when_the_whole_server_is_killed(own: Place, tmp_path: Path) -> None:
    ref = own.fullscreen(tmp_path / "log")
    me = own.person("attach", ref.id)
    me.until(drew)
    for pid in own.server.pids().values():
        os.kill(pid, signal.SIGKILL)
    assert me.end() == 3
    me.assert_as_before()
    told = me.said().split("the server went away: ")[1]
    assert told.count(ref.id[:8]) == 1 and f"agentserver attach {ref.id[:8]}" in told and told.count(";") == 1, told


def test_time_can_be_limited(near: Place, tmp_path: Path) -> None:
    ref = near.fullscreen(tmp_path / "log")
    me = near.person("attach", "--timeout", "0.5", ref.id)
    assert me.end() == 124
    me.assert_as_before()
    assert not ref.info().finished


def test_it_can_be_suspended(near: Place, tmp_path: Path) -> None:
    ref = near.fullscreen(tmp_path / "log")
    me = near.person("attach", ref.id)
    me.until(drew)
    modes = set(me.vt.modes)
    me.signal(signal.SIGTSTP)
    wait_until(lambda: process_state(me.process.pid) == "T", what="the command to stop")
    me.look()
    me.assert_as_before()
    me.signal(signal.SIGCONT)
    me.until(lambda text: me.vt.alternate and drew(text) and text.startswith("size 24x80"))
    assert me.is_raw and me.vt.modes == modes
    me.type("q")
    assert me.end() == 0
    me.assert_as_before()


def test_it_can_be_stopped_without_a_word(near: Place, tmp_path: Path) -> None:
    """Nobody knows then what became of the terminal; it is made new, and nothing of that is left at the end."""
    ref = near.fullscreen(tmp_path / "log")
    me = near.person("attach", ref.id)
    me.until(drew)
    me.signal(signal.SIGSTOP)
    wait_until(lambda: process_state(me.process.pid) == "T", what="the command to stop")
    me.look()
    cleared = me.raw.count(b"\x1b[2J")
    me.signal(signal.SIGCONT)
    me.until(lambda text: me.raw.count(b"\x1b[2J") > cleared and me.vt.alternate and drew(text))
    me.type(DETACH)
    assert me.end() == 0
    me.assert_as_before()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("ended", [False, True])
def test_begun_in_the_background_it_waits_to_be_continued(near: Place, tmp_path: Path, ended: bool) -> None:
    ref = near.fullscreen(tmp_path / "log")
    me = near.person(program=(*SHELL, "-i"))
    command = shlex.join([sys.executable, str(MAIN), "attach", ref.id])
    me.type(f"{command} & echo; echo job $! begun\r")
    me.until(lambda text: re.search(r"job \d+ begun", text))
    pid = int(re.findall(r"job (\d+) begun", me.look())[0])
    wait_until(lambda: me.look() is not None and process_state(pid) == "T", what="it to be stopped")
    if ended:
        me.type("kill %1\r")
        wait_until(lambda: me.look() is not None and not os.path.exists(f"/proc/{pid}"), what="it to end")
        me.type("jobs\r")
        me.until("Terminated")
        assert "mistake" not in me.said()
    else:
        me.type("fg\r")
        me.until(lambda text: me.vt.alternate and drew(text))
        assert me.is_raw
        me.type(DETACH)
        me.until("detached")
    me.type("exit\r")
    me.end()
    me.assert_as_before()


def test_other_keys_can_detach(near: Place, tmp_path: Path) -> None:
    ref = near.fullscreen(tmp_path / "log")
    me = near.person("attach", "--detach-keys", "ctrl-a,d", ref.id)
    me.until(drew)
    me.type(b"\x10\x11\x01a\x01\x01d")
    assert me.end() == 0
    assert (tmp_path / "log").read_bytes() == b"\x10\x11\x01a\x01"
    near.environ["AGENTSERVER_DETACH_KEYS"] = "^x"
    me = near.person("attach", ref.id)
    me.until(drew)
    me.type(b"\x18")
    assert me.end() == 0


def test_a_string_that_was_only_begun_is_ended_on_my_terminal(near: Place) -> None:
    ref = near.spawn("sh", "-c", r"printf '\033[?1000h\033[?1049hready\033Pq cut off'; exec sleep 1000")
    me = near.person("attach", ref.id)
    me.until("ready")
    assert me.vt.modes
    me.type(b"\x10\x11")
    assert me.end() == 0
    me.assert_as_before()
    assert "detached" in me.said()


def test_a_lone_ctrl_p_waits_for_the_next_key_only(near: Place, tmp_path: Path) -> None:
    ref = near.fullscreen(tmp_path / "log")
    me = near.person("attach", ref.id)
    me.until(drew)
    me.type(b"a\x10")
    me.until("keys a")
    assert (tmp_path / "log").read_bytes() == b"a"
    me.type(b"b")
    me.until("keys a\x10b".replace("\x10", ""))
    assert (tmp_path / "log").read_bytes() == b"a\x10b"


# ---------------------------------------------------------------- sizes, and several at once

def test_the_agent_gets_my_size_and_follows_it(place: Place, tmp_path: Path) -> None:
    ref = place.fullscreen(tmp_path / "log")
    me = place.person("attach", ref.id, rows=31, cols=90)
    me.until("size 31x90")
    for cols in range(89, 60, -1):
        me.resize(20, cols)
    me.until("size 20x61")
    assert ref.info().pty == {"rows": 20, "cols": 61}


def test_several_see_the_same_and_all_may_type(place: Place, tmp_path: Path) -> None:
    ref = place.fullscreen(tmp_path / "log")
    first, second = place.person("attach", ref.id), place.person("attach", ref.id)
    for me in (first, second):
        me.until(drew)
    first.type("a")
    second.until("keys a")
    second.type("b")
    first.until("keys ab")
    second.type(DETACH)
    assert second.end() == 0
    first.type("c")
    first.until("keys abc")
    first.type("q")
    assert first.end() == 0


def test_who_only_watches_changes_nothing(place: Place, tmp_path: Path) -> None:
    ref = place.fullscreen(tmp_path / "log")
    watcher = place.person("attach", "--read-only", ref.id, rows=40, cols=100)
    watcher.until(drew)
    watcher.type("ignored")
    watcher.resize(41, 101)
    me = place.person("attach", ref.id)
    me.until(drew)
    me.type("seen")
    watcher.until("keys seen")
    assert (tmp_path / "log").read_bytes() == b"seen"
    wait_until(lambda: ref.info().pty == {"rows": 24, "cols": 80}, what="no size but mine")
    watcher.type(b"\x03")
    assert watcher.end() == 0
    watcher.assert_as_before()


def test_watching_needs_no_terminal(near: Place) -> None:
    ref = near.spawn("sh", "-c", "echo shown; read x; exit 5")
    with subprocess.Popen([sys.executable, str(MAIN), "attach", "--read-only", ref.id], env=near.environ,
                          cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as watching:
        assert watching.stdout is not None
        shown = b""
        while b"shown\r\n" not in shown:
            shown += watching.stdout.read(100) or pytest.fail("it ended")
        ref.write("\r")
        assert watching.wait(30) == 5
    assert ref.info().pty == {"rows": 24, "cols": 80}


# ---------------------------------------------------------------- what cannot be

def test_what_makes_no_sense_is_refused(near: Place) -> None:
    pipe, terminal = near.client.spawn(agent("echo")), near.spawn("true")
    near.client.wait(terminal.id)
    done = near.run("attach", "--read-only", pipe.id)
    assert done.returncode == 1 and "logs -f" in done.stderr and "send" in done.stderr
    done = near.run("attach", "--read-only", terminal.id)
    assert done.returncode == 1 and "has ended (completed)" in done.stderr
    assert near.run("attach", "--read-only", "nobody").returncode == 4
    for args, word in ((("attach", pipe.id), "stdin is none; use --read-only"),
                       (("run", "-t", "--", "true"), "leave -t"),
                       (("attach", "--json", "--read-only", pipe.id), "--json"),
                       (("attach", "--detach-keys", "ctrl-pp", pipe.id), "no key for detaching"),
                       (("run", "-t", "--stdin", "null", "--", "true"), "leave one of them out")):
        done = near.run(*args)
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1, (args, done)
    assert [each.id for each in near.client.list()] == [pipe.id], "nothing was spawned for a run that cannot be"


# ---------------------------------------------------------------- deaths of the server

@pytest.mark.parametrize("own", ["unix", "tcp", "ssh"], indirect=True)
def test_keys_typed_while_the_server_dies_arrive_once(own: Place) -> None:
    ref = own.spawn(*agent("raw"))
    me = own.person("attach", ref.id)
    me.until("ready")
    typed = b""
    for part in ("core", "shell", "core"):
        pid = wait_until(lambda: own.server.pids().get(part, 0), what=f"the pid of the {part}")
        for number in range(60):
            if number == 30:
                os.kill(pid, signal.SIGKILL)
            piece = b"%s %d-" % (part.encode(), number)
            typed += piece
            me.type(piece)
            me.look(0.005)
        back(own.server, part, pid)
    me.type(b"\x04")
    me.until(f"{len(typed)} {hashlib.sha256(typed).hexdigest()}")
    assert me.end() == 0
    me.assert_as_before()


def test_ssh_asks_for_no_password_while_keys_go_to_an_agent(near: Place) -> None:
    script = ("import sys, tty; from agentserver.core import ssh; print('asks', ssh.may_ask()); tty.setraw(0);"
              "print('asks', ssh.may_ask(), end='\\r\\n'); sys.stdout.flush()")
    me = near.person(program=(sys.executable, "-c", script))
    assert me.end() == 0 and me.vt.lines()[:2] == ["asks True", "asks False"]


# ---------------------------------------------------------------- much

def test_after_a_flood_the_prompt_comes_soon(place: Place) -> None:
    """Nobody could read all of that; what is shown is the last."""
    me = place.person("run", "-t", "--env", "PS1", "--", *SHELL)
    me.until("inner$")
    me.type("yes 'a line of a flood' | head -c 6000000; echo; echo over\r")
    me.until("\nover\ninner$")
    me.type("exit\r")
    assert me.end() == 0


def test_pasting_more_than_anybody_holds_arrives(place: Place) -> None:
    """The agent reads nothing at first: the server's buffer fills, then ours, then the keyboard has to wait."""
    ref = place.spawn(*agent("raw", "wait"))
    me = place.person("attach", ref.id)
    me.until("ready")
    pasted = bytes(range(5, 16)) * 160_000 + b"\x11\x10\x10"
    pasting = threading.Thread(target=me.type, args=(pasted + b"\x04",))
    pasting.start()
    wait_until(lambda: not select.select([], [me.master], [], 0.5)[1], what="a keyboard that has to wait")
    ref.signal("SIGUSR1")
    wait_until(lambda: me.look() is not None and not pasting.is_alive(), what="everything to be typed")
    me.until(f"{len(pasted)} {hashlib.sha256(pasted).hexdigest()}")
    assert me.end() == 0


# ---------------------------------------------------------------- real programs

def _needs(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")


def _again(place: Place, me: Person, ref: str) -> Person:
    """Detach and attach; the screen has to be the same."""
    before = me.look(0.3)
    me.type(DETACH)
    assert me.end() == 0
    me.assert_as_before()
    again = place.person("attach", ref)
    again.until(lambda text: text == before)
    return again


def test_vim(near: Place, tmp_path: Path) -> None:
    _needs("vim")
    (tmp_path / "file").write_text("".join(f"line {n}\n" for n in range(200)))
    me = near.person("run", "-t", "--name", "vim", "--", "vim", "-u", "NONE", "-i", "NONE", str(tmp_path / "file"))
    me.until("line 20")
    me.type("100GOtyped here\x1b")
    me.until(lambda text: "typed here" in text and "line 99" in text)
    me = _again(near, me, "vim")
    me.resize(12, 60)
    me.until(lambda text: len(text.splitlines()) <= 12 and "typed here" in text)
    me.type(":wq\r")
    assert me.end() == 0
    me.assert_as_before()
    assert "line 98\ntyped here\nline 99\n" in (tmp_path / "file").read_text()


def test_less(near: Place, tmp_path: Path) -> None:
    _needs("less")
    (tmp_path / "file").write_text("".join(f"line {n}\n" for n in range(500)))
    me = near.person("run", "-t", "--name", "less", "--env", "LESS=", "--", "less", str(tmp_path / "file"))
    me.until("line 10")
    me.type("/line 333\r")
    me.until("line 340")
    me = _again(near, me, "less")
    me.type("q")
    assert me.end() == 0
    me.assert_as_before()


def test_htop(near: Place) -> None:
    _needs("htop")
    me = near.person("run", "-t", "--name", "htop", "--", "htop", "-d", "100")
    me.until("F10")
    me.type(DETACH)
    assert me.end() == 0
    me.assert_as_before()
    again = near.person("attach", "htop")
    again.until(lambda text: "F10" in text and "PID" in text)
    again.type("q")
    assert again.end() == 0
    again.assert_as_before()


def test_python(near: Place) -> None:
    me = near.person("run", "-t", "--name", "python", "--", sys.executable, "-E", "-q")
    me.until(">>>")
    me.type("[n * n for n in range(9)]\r")
    me.until("64]\n>>>")
    me = _again(near, me, "python")
    me.type("import os; os._exit(4)\r")  # and whatever it has switched on stays so
    assert me.end() == 4
    me.assert_as_before()
