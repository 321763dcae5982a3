"""`ssh://` addresses: what they mean, what is said when they fail, and following over them whatever is killed.

Owns:    the tests of agentserver/core/ssh.py, with a stand-in for ssh, and with a real sshd where there is one.
Runs in: the test process; servers, ssh and `stdio` are real processes.
Unaware: of the links that are not ssh.
"""
from __future__ import annotations

import hashlib
import os
import pty
import random
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
import sshd
from support import (
    AGENTS,
    DEADLINE_SECS,
    MAIN,
    ROOT,
    Server,
    agent,
    clean_environ,
    marked_processes,
    wait_until,
    without_ssh,
)
from wire import LineWire

from agentserver import AgentClient
from agentserver.core import ssh
from agentserver.core.link import NotThere
from agentserver.errors import LinkError, RequestTimeout

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
#: makes its stdin the terminal of its session, as a terminal's own programs have it, and becomes the rest
ON_TERMINAL = "import fcntl, os, sys, termios as t; fcntl.ioctl(0, t.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
STAND_IN = (AGENTS / "ssh").read_text()


# ---------------------------------------------------------------- addresses

@pytest.mark.parametrize("address, target", [
    ("ssh://box", ssh.Target("box")),
    ("ssh://box/", ssh.Target("box")),
    ("ssh://ada@Box.example.org:2222", ssh.Target("Box.example.org", "ada", "2222")),
    ("ssh://ada@dom@box", ssh.Target("box", "ada@dom")),
    ("ssh://[::1]:22/var/lib/a%20b", ssh.Target("::1", "", "22", "/var/lib/a b")),
    ("ssh://box/~/state", ssh.Target("box", "", "", "~/state")),
    ("ssh://box?command=python3+-m%20agentserver stdio", ssh.Target("box", command="python3+-m agentserver stdio")),
])
def test_an_address_says_where(address: str, target: ssh.Target) -> None:
    assert ssh.parse(address) == target


@pytest.mark.parametrize("address, sentence", [
    ("ssh://", "write ssh://"), ("ssh:///path", "write ssh://"), ("ssh://box:port", "write ssh://"),
    ("ssh://-oProxyCommand=true", "no name"), ("ssh://-l@box", "no name"), ("ssh://%2dv@box", "no name"),
    ("ssh://a%0ab", "no name"), ("ssh://ada:secret@box", "password"), ("ssh://box?comand=x", "no option 'comand'"),
    ("ssh://box/a%00b", "NUL"), ("ssh://[box", "write ssh://"), ("ssh://box#x", "write ssh://")])
def test_what_is_no_address_is_said(address: str, sentence: str) -> None:
    with pytest.raises(LinkError, match=sentence):
        AgentClient(address)


def command_line(address: str, ask: bool = False, **environ: str) -> List[str]:
    return ssh.command_lines(ssh.parse(address), environ, ask)


def test_the_command_line_is_made_from_address_and_environment() -> None:
    line = command_line("ssh://ada@box:2222/a b")
    assert line[0] == "ssh" and line[-3:] == ["--", "ada@box", "agentserver stdio --state-dir '/a b'"]
    assert line[line.index("-p") + 1] == "2222" and "-oBatchMode=yes" in line
    assert "-oBatchMode=yes" not in command_line("ssh://box", ask=True) and "-p" not in command_line("ssh://box")
    line = command_line("ssh://box", AGENTSERVER_SSH="my-ssh -F 'a file'", AGENTSERVER_SSH_COMMAND="~/a.pyz stdio")
    assert line[:3] == ["my-ssh", "-F", "a file"] and line[-1] == "~/a.pyz stdio"
    assert command_line("ssh://box/d?command=x stdio", AGENTSERVER_SSH_COMMAND="y")[-1] == "x stdio --state-dir /d"
    with pytest.raises(LinkError, match="AGENTSERVER_SSH"):
        command_line("ssh://box", AGENTSERVER_SSH="'")


# ---------------------------------------------------------------- failures, with a stand-in for ssh

@pytest.fixture
def stand_in(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Let `ssh` be this script; each start of it leaves a line in the file that is returned."""
    log = state_dir / "starts"

    def make(script: str) -> Path:
        program = state_dir / "ssh"
        program.write_text(f"#!/bin/sh\necho $$ >> {log}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("AGENTSERVER_SSH", str(program))
        return log
    return make


def starts(log: Path) -> List[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.mark.parametrize("script, sentence", [
    ("echo 'warning' >&2; echo 'Permission denied (publickey).' >&2; exit 255",
     r"^ssh to box failed: Permission denied \(publickey\)\.$"),
    ("printf '\\033[1mHost key verification failed.\\r\\n' >&2; exit 255",
     r"^ssh to box failed: .*Host key verification failed\.$"),
    ("echo 'sh: 1: agentserver: not found' >&2; exit 127",
     r"^agentserver is not installed on box, .*sh: 1: agentserver: not found.*AGENTSERVER_SSH_COMMAND"),
    ("echo 'agentserver: error (unavailable): no server runs at /x' >&2; exit 3", "^box: no server runs at /x$"),
    ("echo 'some trouble' >&2; exit 1", "box ended the link before it began, with exit code 1: some trouble"),
    ("kill -KILL $$", "before it began, with signal 9"),
    ("exit 0", "before it began, with exit code 0"),
    ("exit 255", "^ssh to box failed: it ended without saying why")])
def test_a_failure_is_told_in_the_words_of_who_knows(stand_in: Callable[[str], Path], script: str,
                                                     sentence: str) -> None:
    log = stand_in(script)
    with AgentClient("ssh://box") as client, pytest.raises(NotThere, match=sentence):
        client.health()
    assert len(starts(log)) == 1, "who was refused does not knock again at once"


def test_a_program_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSERVER_SSH", "/no/such/ssh -v")
    with AgentClient("ssh://box") as client, pytest.raises(NotThere, match="'/no/such/ssh'.*AGENTSERVER_SSH"):
        client.health()


def test_who_was_refused_waits_longer_each_time(
        stand_in: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in("exit 255")
    now = [1000.0]
    route = ssh.SshRoute("ssh://box")
    monkeypatch.setattr(ssh.time, "monotonic", lambda: now[0])

    def knock() -> None:
        with route.dial() as connection:
            assert connection.recv(1) == b""
        raise route.broke("it closed the connection", False)
    for count, secs in enumerate((0.5, 1.0, 2.0, 4.0, 8.0, 8.0), 1):
        for _ in range(3):
            with pytest.raises(NotThere, match="ssh to box failed"):
                knock()
            assert len(starts(log)) == count
        now[0] += secs + 0.01


@needs_proc
def test_an_ssh_that_never_gets_through_is_ended(stand_in: Callable[[str], Path]) -> None:
    log = stand_in("trap '' TERM HUP\nexec sleep 1000")
    with AgentClient("ssh://box", timeout=0.5) as client, pytest.raises(RequestTimeout):
        client.health()
    pid, = starts(log)
    assert not os.path.exists(f"/proc/{pid}")


def test_what_a_login_shell_prints_is_passed_over(server: Server, stand_in: Callable[[str], Path]) -> None:
    stand_in("echo Welcome; echo; echo '  * please read the news'\n" + STAND_IN)
    with AgentClient(server.address("stdio")) as client:
        assert client.health().healthy


def test_much_noise_on_stderr_stops_nothing(server: Server, stand_in: Callable[[str], Path]) -> None:
    stand_in("head -c 1000000 /dev/zero | tr '\\0' 'x' >&2\n" + STAND_IN)
    with AgentClient(server.address("stdio")) as client:
        assert client.health().healthy
        assert client.spawn(["true"]).wait(DEADLINE_SECS).code == 0


@needs_proc
def test_asking_and_following_is_one_connection(server: Server, stand_in: Callable[[str], Path]) -> None:
    log = stand_in(STAND_IN)
    with AgentClient(server.address("stdio")) as client:
        worker = client.spawn(agent("lines", "100", "1000", str(server.state_dir / "sum")))
        assert len(list(worker.lines())) == 101 and worker.wait(DEADLINE_SECS).code == 0
        assert len(starts(log)) == 1
    pid, = starts(log)
    wait_until(lambda: _fields(pid)[:1] in ([], ["Z"]), what="ssh to end with its link")
    stand_in("exit 255")
    with AgentClient("ssh://box") as other, pytest.raises(LinkError):
        other.health()
    assert not os.path.exists(f"/proc/{pid}"), "and the next one that is started reaps it"


@needs_proc
def test_ctrl_c_is_not_for_the_link(server: Server, stand_in: Callable[[str], Path]) -> None:
    """On a terminal, where ssh may ask for a password, the key reaches every process; `run` goes on with its link."""
    log = stand_in(STAND_IN)
    environ = clean_environ(server.state_dir, {**without_ssh(server.mark), "AGENTSERVER_SSH": str(log.parent / "ssh"),
                                               "AGENTSERVER_SERVER": server.address("stdio")})
    command = ["run", "--stdin", "null", "--", *agent("catcher", "2", "0")]
    terminal, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", ON_TERMINAL, sys.executable, str(MAIN), *command], env=environ,
                               stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        _until(terminal, b"ready")
        before = starts(log)
        os.write(terminal, b"\x03")
        _until(terminal, b"SIGINT\r")
        assert [pid for pid in before if not os.path.exists(f"/proc/{pid}")] == []
    finally:
        with LineWire(server.socket_path) as wire:
            wire.ok("batch_control_command", labels={}, command_type="kill")
        while _read(terminal):
            pass
        process.wait(DEADLINE_SECS)
        os.close(terminal)


def _until(fd: int, text: bytes) -> None:
    said = b""
    while text not in said:
        piece = _read(fd)
        assert piece, said
        said += piece


def _read(fd: int) -> bytes:
    assert select.select([fd], [], [], DEADLINE_SECS)[0], "nothing came"
    try:
        return os.read(fd, 65536)
    except OSError:  # the end of a terminal
        return b""


# ---------------------------------------------------------------- following, whatever is killed

class Followed:
    """Follows all output of an agent in a thread, and the events of the server in another."""

    def __init__(self, address: str, agent_id: str) -> None:
        self.got: Dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self.events: List[int] = []
        self.errors: List[BaseException] = []
        self._threads = [threading.Thread(target=self._safely, args=(work, address, agent_id), daemon=True)
                         for work in (self._follow, self._listen)]
        for thread in self._threads:
            thread.start()

    def _safely(self, work: Callable[[AgentClient, str], None], address: str, agent_id: str) -> None:
        try:
            with AgentClient(address, retry_secs=DEADLINE_SECS) as client:
                work(client, agent_id)
        except BaseException as e:
            self.errors.append(e)

    def _follow(self, client: AgentClient, agent_id: str) -> None:
        for _, stream, chunk in client.follow(agent_id, timeout=2 * DEADLINE_SECS):
            assert not chunk.dropped
            self.got[stream] += chunk.data

    def _listen(self, client: AgentClient, agent_id: str) -> None:
        for event in client.follow_events(since=0):
            self.events.append(event["sequence"])
            if event.get("agent_id") == agent_id and event["status"] in ("completed", "failed", "terminated"):
                return

    def finished(self) -> None:
        for thread in self._threads:
            thread.join(3 * DEADLINE_SECS)
            assert not thread.is_alive()
        assert not self.errors, self.errors


def links_of(server: Server) -> Dict[str, List[int]]:
    """Return the ssh processes that we have started, and every `stdio`; the stand-in for ssh becomes `stdio`."""
    ours = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _fields(int(pid))[1:2] == [str(os.getpid())]]
    return {"ssh": [pid for pid in ours if _name(pid) == "ssh"],
            "stdio": [pid for pid, command in marked_processes(str(server.state_dir.parent)).items()
                      if f"{MAIN} stdio" in command]}


def _fields(pid: int) -> List[str]:
    """Return the fields of /proc/PID/stat from the state on: state, parent, …"""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()
    except OSError:
        return []


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as name:
            return name.read().strip()
    except OSError:
        return ""


def disturbed(server: Server, address: str, secs: int) -> None:
    """Follow an agent while links and core are killed at random; compare with what it wrote."""
    dice, sum_file = random.Random(7), server.state_dir / "sum"
    with LineWire(server.socket_path) as wire:
        agent_id = wire.spawn("lines", secs * 200, 200, sum_file)
    followed = Followed(address, agent_id)
    wait_until(lambda: followed.got["stdout"] and followed.events)
    for victim in dice.sample(["ssh", "stdio", "core"] * 2, 6):
        before = len(followed.got["stdout"])
        for pid in [server.pids()["core"]] if victim == "core" else links_of(server)[victim]:
            _kill(pid)
        wait_until(lambda before=before: len(followed.got["stdout"]) > before or sum_file.exists(),
                   what=f"the loss of {victim} to be over")
    followed.finished()
    out_size, out_hash, error_size, error_hash = sum_file.read_text().split()
    for stream, size, digest in (("stdout", out_size, out_hash), ("stderr", error_size, error_hash)):
        got = followed.got[stream]
        assert (len(got), hashlib.sha256(got).hexdigest()) == (int(size), digest), stream
    assert followed.events == list(range(1, len(followed.events) + 1))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@needs_proc
def test_nothing_is_missed_or_doubled_whatever_is_killed(server: Server) -> None:
    disturbed(server, server.address("stdio"), 3)


# ---------------------------------------------------------------- a real sshd

@pytest.fixture(scope="module")
def machine(run_dir: Path) -> Iterator[sshd.Sshd]:
    """A host that is reached with nothing but ssh."""
    lacking = sshd.missing()
    if lacking:
        pytest.skip(lacking)
    home = run_dir / "sshd"
    home.mkdir()
    daemon = sshd.Sshd(home)
    yield daemon
    daemon.close()


@pytest.fixture
def address(machine: sshd.Sshd, server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the fresh `server`, by way of a real sshd."""
    monkeypatch.setenv("AGENTSERVER_SSH", machine.ssh)
    return f"ssh://machine{server.state_dir}"


def test_a_machine_is_controlled_with_nothing_but_ssh(address: str) -> None:
    with AgentClient(address) as client:
        assert client.health().healthy
        mirror = client.spawn([sys.executable, "-u", "-c", "print(input()[::-1])"], name="mirror")
        mirror.write("stressed\n")
        assert list(mirror.lines()) == ["desserts"] and mirror.wait(DEADLINE_SECS).code == 0
        large = client.spawn(agent("zeros", "20000000"))
        assert sum(len(chunk.data) for _, _, chunk in client.follow(large.id)) >= 20_000_000


@needs_proc
def test_following_over_ssh_whatever_is_killed(address: str, server: Server) -> None:
    disturbed(server, address, 4)


def test_a_key_that_is_not_known_is_refused(machine: sshd.Sshd, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSERVER_SSH", f"{machine.ssh} -o PreferredAuthentications=password")
    with AgentClient(address) as client, pytest.raises(NotThere, match="ssh to machine failed: .*Permission denied"):
        client.health()


def test_a_machine_without_agentserver_is_told_of(address: str) -> None:
    with AgentClient(address + "?command=agentserver-that-is-not-there") as client:
        with pytest.raises(NotThere, match="not installed on machine.*AGENTSERVER_SSH_COMMAND"):
            client.health()


def test_a_key_may_be_for_nothing_else(machine: sshd.Sshd, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    key = machine.add_key("restricted", f'restrict,command="{os.environ["AGENTSERVER_SSH_COMMAND"]} '
                                        f'--state-dir {server.state_dir}"')
    monkeypatch.setenv("AGENTSERVER_SSH", machine.ssh_with(key))
    with AgentClient("ssh://machine?command=touch /tmp/never") as client:
        assert client.health().metadata["state_dir"] == str(server.state_dir)


# ---------------------------------------------------------------- the command line

class Cli:
    """The command line with an `ssh://` address as its default."""

    def __init__(self, server: Server, program: str = "") -> None:
        self.environ = clean_environ(server.state_dir, {
            **without_ssh(server.mark), "AGENTSERVER_SERVER": f"ssh://machine{server.state_dir}"})
        if program:
            self.environ["AGENTSERVER_SSH"] = program

    def start(self, *args: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, str(MAIN), *args], env=self.environ, cwd=str(ROOT),
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __call__(self, *args: str, code: int = 0) -> str:
        with self.start(*args) as process:
            out, error = process.communicate(timeout=DEADLINE_SECS)
        assert process.returncode == code, (args, process.returncode, out, error)
        assert error.count(b"\n") == (code == 3)
        return str(out.decode())


def test_every_command_works_over_ssh(server: Server) -> None:
    cli = Cli(server)
    worker = cli("spawn", "--name", "worker", "--", *agent("echo")).strip()
    with cli.start("logs", "-f", "worker") as logs, cli.start("events", "-f", "--since", "0") as events:
        assert logs.stdout and logs.stdout.readline() == b"ready\n"
        cli("send", "worker", "hello")
        assert logs.stdout.readline() == b"hello\n"
        assert "worker" in cli("ps") and "running" in cli("info", "worker")
        cli("stop", "worker", "--wait")
        assert logs.communicate(timeout=DEADLINE_SECS)[0] == b"" and logs.returncode == 0
        assert events.stdout
        while b"terminated" not in (line := events.stdout.readline()):
            assert line
        events.terminate()
        events.communicate()
    assert cli("wait", worker, code=143) and "stopped it" in cli("why", "worker")
    cli("rm", "worker")
    assert cli("health") and cli("stats") and "generation 2" in cli("reload")
    assert "has ended" in cli("shutdown")
    assert cli("ps", code=3) == ""


def test_the_command_line_goes_over_a_real_ssh(machine: sshd.Sshd, server: Server) -> None:
    cli = Cli(server, machine.ssh)
    assert cli("run", "--", "sh", "-c", "echo out; exit 7", code=7) == "out\n"
    with cli.start("run", "--", *agent("echo")) as run:
        out, error = run.communicate(timeout=DEADLINE_SECS)
    assert (run.returncode, out, error) == (0, b"ready\n", b"eof after 0 bytes\n")
