"""What the documents show is run: sessions, README's Python, and the client in docs/protocol.md.

Owns:    the runner for fenced `console` blocks: `$ command` lines, and the output expected below each.
Runs in: the test process; commands run in bash, in an empty directory, against a real server.
Unaware: of what the commands are about.

In expected output `…` stands for anything within a line, alone on a line for any lines, and runs of
blanks count as one. Blocks in other languages (`sh`, `ini`, `text`) are shown, not run.
"""
from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import AGENTS, DEADLINE_SECS, MAIN, ROOT, Server, assert_nothing_left, clean_environ, wait_until

README = ROOT / "README.md"
WITH_SESSIONS = (README, *(ROOT / "docs" / name for name in ("ssh.md", "recording.md")))


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)


def steps(block: str) -> list[tuple[str, str]]:
    """Return each command of a session with the output that is expected of it."""
    pieces = re.split(r"^\$ (.*)\n", block, flags=re.M)
    assert not pieces[0], "a session begins with a command"
    return list(zip(pieces[1::2], pieces[2::2]))


def pattern(expected: str) -> str:
    """Return the regular expression that an expected output stands for."""
    lines = []
    for line in expected.splitlines():
        words = re.escape(re.sub(r"\s+", " ", line.strip())).replace(r"\ ", " ")
        lines.append(r"(.*\n)*" if words == "…" else words.replace("…", ".*").replace(" ", " +") + " *\n")
    return "".join(lines)


def matches(expected: str, got: str) -> bool:
    """Tell whether output is what was shown."""
    plain = "".join(re.sub(r"[ \t]+", " ", line.strip()) + "\n" for line in got.splitlines())
    return re.fullmatch(pattern(expected), plain) is not None


class Session:
    """A person's terminal: `agentserver` on PATH, an `ssh` that leads here, an empty working directory, a home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        work, programs = home / "work", home / "bin"
        work.mkdir()
        programs.mkdir()
        self._script(programs / "agentserver", f'exec "{sys.executable}" "{MAIN}" "$@"')
        self._script(programs / "python3", f'exec "{sys.executable}" "$@"')
        self._script(programs / "ssh", f'[ $# = 3 ] && set -- -- "$@"; exec "{AGENTS / "ssh"}" "$@"')
        environ = clean_environ(home, {"HOME": str(home), "AGENTSERVER_ENDPOINT": "tcp://127.0.0.1:0",
                                       "AGENTSERVER_PUB_ENDPOINT": "tcp://127.0.0.1:0"})
        environ["PATH"] = f"{programs}:{environ['PATH']}"
        self._given = {"cwd": str(work), "env": environ, "stdin": subprocess.DEVNULL, "text": True}
        self._server: subprocess.Popen[str] | None = None

    @staticmethod
    def _script(path: Path, line: str) -> None:
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def run(self, command: str) -> str:
        """Run one command as bash would, and return what it printed."""
        if command.startswith("agentserver serve"):
            return self._serve(command)
        done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=4 * DEADLINE_SECS, **self._given)  # type: ignore[call-overload]
        return str(done.stdout)

    def _serve(self, command: str) -> str:
        """Start the server in the background and return what it says when it is ready."""
        if self._server is not None:
            assert self.end() == 0, "the session ends one server before the next"
        log = self.home / "serve.out"
        with open(log, "w") as out:
            self._server = subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=out, stderr=out,
                                            **self._given)  # type: ignore[call-overload]
        wait_until(lambda: "\n" in log.read_text() or self._server and self._server.poll() is not None)
        return log.read_text()

    def end(self) -> int | None:
        """Return the exit code of the server, which the session is expected to have ended itself."""
        assert self._server is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(DEADLINE_SECS)
        return self._server.poll()

    def abandon(self) -> None:
        """Kill what a session that failed half-way has left."""
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            self._server.wait(DEADLINE_SECS)


@pytest.mark.parametrize("document", WITH_SESSIONS, ids=lambda path: path.name)
def test_sessions_run_as_shown(document: Path, state_dir: Path) -> None:
    session = Session(state_dir)
    try:
        for block in blocks(document, "console"):
            for command, expected in steps(block):
                got = session.run(command)
                assert matches(expected, got), f"$ {command}\n--- expected\n{expected}--- got\n{got}"
        assert session.end() == 0
        assert_nothing_left(str(state_dir))
    finally:
        session.abandon()


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_the_python_in_the_readme_runs(code: str, server: Server) -> None:
    environ = clean_environ(server.state_dir, {"AGENTSERVER_SERVER": server.endpoint})
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=str(ROOT), timeout=4 * DEADLINE_SECS,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    for shown in re.findall(r"# prints (.*)", code):
        assert shown in done.stdout


def test_the_client_in_the_protocol_document_runs(server: Server) -> None:
    (code,) = blocks(ROOT / "docs" / "protocol.md", "python")
    code = code.replace("tcp://127.0.0.1:5555", server.endpoint)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=4 * DEADLINE_SECS,
                          env={**os.environ, "PYTHONWARNINGS": "default"})
    assert (done.returncode, done.stdout) == (0, b"hello\n")


def test_commands_named_in_the_readme_exist() -> None:
    from agentserver.cli import HOMES
    named = set(re.findall(r"`agentserver ([a-z]+)", README.read_text("utf-8")))
    assert named <= set(HOMES), f"README names {named - set(HOMES)}"


def test_the_comparison_itself() -> None:
    check: Callable[[str, str], bool] = matches
    assert check("a … c\n", "a  b   c\n") and not check("a … c\n", "a b\nc\n")
    assert check("one\n…\nlast\n", "one\ntwo\nthree\nlast\n") and not check("one\n", "one\ntwo\n")
    assert check("", "") and not check("", "x\n") and check("…\n", "")
