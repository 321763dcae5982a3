"""Real servers for tests, and the question whether anything of them is left.

Owns:    `Server` (one `agentserver serve` in a state directory of its own), `wait_until`, and the
         search for processes that carry the mark of this test run.
Runs in: the test process; servers and agents are real processes beside it.
Unaware: of pytest's fixtures (conftest.py) and of what is being tested.

Every process that a test starts carries `TEST_RUN_MARK=<state directory>` in its environment; the
servers pass it on to their agents. So what is left of a server can be found and named.
"""
from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, TypeVar

import agentserver

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
AGENTS = TESTS / "agents"
MAIN = Path(agentserver.__file__).resolve().parent / "__main__.py"
MARK = "TEST_RUN_MARK"
LINKS = ("unix", "tcp", "ipc", "stdio")
#: how long a test waits for what has to happen; long, because it only matters when something is broken
DEADLINE_SECS = 30.0

T = TypeVar("T")


def without_ssh(mark: object) -> dict[str, str]:
    """Return what a client's environment needs so that `ssh://` addresses lead to this machine, without ssh."""
    program = f"{shlex.quote(sys.executable)} {shlex.quote(str(MAIN))}"
    return {"AGENTSERVER_SSH": str(AGENTS / "ssh"),
            "AGENTSERVER_SSH_COMMAND": f"{MARK}={mark} exec {program} stdio"}


def wait_until(condition: Callable[[], T], deadline: float = DEADLINE_SECS, what: str = "") -> T:
    """Return the first true value of `condition`; fail after `deadline` seconds. The only poll in the tests."""
    until = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= until:
            raise AssertionError(f"waited {deadline:g} s in vain for {what or condition}")
        time.sleep(0.01)


def agent(name: str, *args: str) -> list[str]:
    """Return the argv that runs `tests/agents/<name>.py` with this Python."""
    return [sys.executable, "-S", "-E", "-u", str(AGENTS / f"{name}.py"), *args]


def short_dir(parent: Path | None = None) -> Path:
    """Make a fresh directory whose path leaves room for a socket name (107 bytes in all)."""
    return Path(tempfile.mkdtemp(prefix="as-", dir=str(parent) if parent else "/tmp"))


def marked_processes(mark: str) -> dict[int, str]:
    """Return pid and command of every living process whose environment holds a mark that starts with `mark`; also of
    the parts of a server in that directory, whose environment only root may read."""
    needle = f"{MARK}={mark}".encode()
    found, parts = {}, parts_of(Path(mark)) if os.getuid() else set()
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if int(entry) in parts or needle in Path("/proc", entry, "environ").read_bytes():
                    command = Path("/proc", entry, "cmdline").read_bytes()
                    found[int(entry)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
    return found


def parts_of(state_dir: Path) -> set[int]:
    """Return the processes that hold the locks of a server, as far as the kernel tells (/proc/locks)."""
    try:
        files = {str(path.stat().st_ino) for path in state_dir.glob("*.lock")}
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return set()
    return {int(words[4]) for words in lines if words[1] == "FLOCK" and words[5].rpartition(":")[2] in files}


def assert_nothing_left(mark: str) -> None:
    """Fail, naming them, if marked processes live; end them first, so that one failure stays one failure."""
    left = marked_processes(mark)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    assert not left, f"left running: {left}"


def clean_environ(state_dir: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a program under test: no settings of ours but the ones given, and the mark."""
    environ = {k: v for k, v in os.environ.items()
               if not k.startswith(("AGENTSERVER_", "PYTEST_")) and k != "PYTHONDONTWRITEBYTECODE"}
    environ.update({MARK: str(state_dir), "AGENTSERVER_PASS_ENVIRONMENT": MARK,
                    "XDG_STATE_HOME": str(state_dir / "xdg"), "TMPDIR": str(scratch(state_dir)),
                    "PYTHONPYCACHEPREFIX": str(state_dir.parent / "pycache"), "NO_COLOR": "1",
                    "PYTHONPATH": str(MAIN.parent.parent)})
    environ.update(extra or {})
    return environ


def scratch(state_dir: Path) -> Path:
    """Return the TMPDIR of a server under test; it has to be empty when the server has gone."""
    path = state_dir.with_name(state_dir.name + ".tmp")
    path.mkdir(exist_ok=True)
    return path


class Server:
    """One `agentserver serve`: started when constructed, ready when the constructor returns."""

    def __init__(self, state_dir: Path, *flags: str, endpoint: str = "tcp://127.0.0.1:0",
                 pub_endpoint: str = "tcp://127.0.0.1:0", program: list[str] | None = None,
                 environ: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self.state_dir = state_dir
        self.mark = str(state_dir)
        self.errors = state_dir.with_name(state_dir.name + ".stderr")
        argv = [*(program or [sys.executable, str(MAIN)]), "serve", "--state-dir", str(state_dir),
                "--endpoint", endpoint, "--pub-endpoint", pub_endpoint, *flags]
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                cwd=str(cwd or ROOT), env=clean_environ(state_dir, environ))
        try:
            self.ready = self._until_ready()
            networked = "tcp://" in self.ready or "ipc://" in self.ready
            self.metadata: dict[str, str] = wait_until(
                lambda: self._metadata_if(networked), what="the core to know where the shell listens")
        except BaseException:
            self.abandon()
            raise

    def _until_ready(self) -> str:
        """Return what `serve` says until it has said that it listens."""
        assert self.process.stdout is not None
        data, until = b"", time.monotonic() + DEADLINE_SECS
        while b" is ready: " not in data or not data.endswith(b"\n"):
            readable, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            assert piece, f"serve did not become ready; it said {data!r}\n{self.logs()}"
            data += piece
        return data.decode()

    def _metadata_if(self, networked: bool) -> dict[str, str]:
        metadata: dict[str, str] = self.ask({"type": "health_check_request"})["metadata"]
        return metadata if metadata["endpoint"] or not networked else {}

    @property
    def endpoint(self) -> str:
        """The ZeroMQ request endpoint that is really bound."""
        return self.metadata["endpoint"]

    @property
    def pub_endpoint(self) -> str:
        """The ZeroMQ endpoint for subscribers that is really bound."""
        return self.metadata["pub_endpoint"]

    @property
    def socket_path(self) -> Path:
        """The core's Unix socket."""
        return self.state_dir / "core.sock"

    def address(self, link: str) -> str:
        """Return what `AgentClient` is to be given: "unix", "stdio", or the server's own "tcp" or "ipc"."""
        if link == "unix":
            return f"unix:{self.socket_path}"
        if link == "stdio":
            return f"ssh://localhost{self.state_dir}"
        assert self.endpoint.startswith(f"{link}://"), f"this server listens on {self.endpoint}"
        return self.endpoint

    def connect(self) -> socket.socket:
        """Return a raw connection to the core's socket."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(DEADLINE_SECS)
        try:
            link.connect(str(self.socket_path))
        except OSError:
            link.close()
            raise
        return link

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one request as a line, without our client library, and return the reply."""
        message = {"request_id": os.urandom(8).hex(), **message}
        with self.connect() as link, link.makefile("rb") as lines:
            link.sendall(json.dumps(message).encode() + b"\n")
            reply = json.loads(lines.readline())
        assert isinstance(reply, dict)
        return reply

    def pids(self) -> dict[str, int]:
        """Return the pids of keeper, core and shell now."""
        metadata = self.ask({"type": "health_check_request"})["metadata"]
        return {part: int(metadata[key]) for part, key in
                (("keeper", "pid"), ("core", "core_pid"), ("shell", "shell_pid")) if metadata.get(key)}

    def clear(self) -> None:
        """Kill and forget every agent, so that the next test finds an empty server."""
        def some(**fields: Any) -> list[str]:
            for limit in (100, 1):  # one at a time where a test left agents too heavy for one reply
                reply = self.ask({"type": "list_agents_request", "limit": limit, **fields})
                if reply["success"]:
                    return [a["id"] for a in reply["agents"]]
            raise AssertionError(reply)
        while ids := some():
            self.ask({"type": "batch_control_command", "command_type": "kill", "agent_ids": ids})
            wait_until(lambda: not set(ids) & set(some()), what="the agents of the last test to be gone")
        while ids := some(all=True):
            self.ask({"type": "batch_control_command", "command_type": "remove", "agent_ids": ids})

    def logs(self) -> str:
        """Return what the server's processes said, for the message of a failing test."""
        files = [self.errors, *sorted(self.state_dir.glob("*.log"))]
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-4000:]}" for f in files if f.exists())

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the server gracefully and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(2 * DEADLINE_SECS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"serve did not end\n{self.logs()}") from None
        finally:
            if self.process.stdout:
                self.process.stdout.close()

    def abandon(self) -> None:
        """Kill whatever there is of this server, without a word."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        for pid in marked_processes(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue

    def close_if_running(self) -> None:
        """Close, unless the test has ended the server itself."""
        if self.process.poll() is None:
            self.close()
        elif self.process.stdout:
            self.process.stdout.close()

    def close(self) -> None:
        """End the server and fail unless it ended well and left nothing behind."""
        try:
            code = self.stop()
            assert code == 0, f"serve ended with {code}\n{self.logs()}"
            assert_nothing_left(self.mark)
            assert not self.socket_path.exists(), "core.sock was left behind"
            left = list(scratch(self.state_dir).iterdir())
            assert not left, f"left in TMPDIR: {left}"
        finally:
            self.abandon()


def serve(*flags: str, program: list[str] | None = None, environ: dict[str, str] | None = None,
          until_ready: bool = False) -> tuple[int, str, str]:
    """Run a `serve` that is expected to end by itself, and return its exit code, stdout and stderr.

    With `until_ready` it may become ready, and is then ended.
    """
    home = short_dir()
    argv = [*(program or [sys.executable, str(MAIN)]), "serve", *flags]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=clean_environ(home, environ), cwd=str(ROOT))
    try:
        if until_ready and process.stdout is not None:
            first = process.stdout.readline()
            if first:
                process.terminate()
        out, error = process.communicate(timeout=DEADLINE_SECS)
        assert_nothing_left(str(home))
        return process.returncode, out.decode(), error.decode()
    finally:
        process.kill()
        process.wait()
        for pid in marked_processes(str(home)):
            os.kill(pid, signal.SIGKILL)
        for path in (home, scratch(home)):
            shutil.rmtree(path, ignore_errors=True)
