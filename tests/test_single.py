"""The single file, with and without pyzmq; and the other ways to start the program.

Owns:    that dist/agentserver.pyz serves, controls and keeps exit codes, and that a path or `-m` does the same.
Runs in: the test process; the file is run as real processes, away from the checkout.
Unaware: of what the commands do beyond that.
"""
from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Callable

import pytest
from support import AGENTS, DEADLINE_SECS, MAIN, ROOT, Server, clean_environ

from agentserver import __version__


@pytest.fixture(scope="session")
def pyz(run_dir: Path) -> Path:
    """The single file, freshly built."""
    target = run_dir / "agentserver.pyz"
    subprocess.run([sys.executable, str(ROOT / "tools" / "single.py"), str(target)], check=True,
                   stdout=subprocess.DEVNULL)
    return target


@pytest.fixture(scope="session")
def bare_python(run_dir: Path) -> str:
    """A Python that has no pyzmq, and nothing else."""
    venv.EnvBuilder(symlinks=True).create(run_dir / "bare")
    return str(run_dir / "bare" / "bin" / "python")


@pytest.fixture(params=["with pyzmq", "without pyzmq"])
def python(request: pytest.FixtureRequest, bare_python: str) -> str:
    """A Python that has pyzmq, and one that does not."""
    return sys.executable if request.param == "with pyzmq" else bare_python


#: so that the checkout cannot be imported instead of what is in the file
ALONE = {"PYTHONPATH": ""}


def run(argv: list[str], state_dir: Path, environ: dict[str, str] | None = None,
        cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    return subprocess.run(argv, env=clean_environ(state_dir, environ), cwd=str(cwd or state_dir), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=2 * DEADLINE_SECS)


def test_the_file_serves_and_controls(pyz: Path, python: str, start_server: Callable[..., Server]) -> None:
    server = start_server(program=[python, str(pyz)], environ=ALONE, cwd=pyz.parent)

    def command(name: str, *args: str) -> subprocess.CompletedProcess[str]:
        return run([python, str(pyz), name, "--server", server.address("unix"), *args], server.state_dir, ALONE)
    done = command("run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    done = command("spawn", "--name", "cat", "--", "cat")
    assert done.returncode == 0, done.stderr
    assert command("send", "cat", "hello", "--eof").returncode == 0
    assert command("wait", done.stdout.strip()).returncode == 0
    assert command("logs", "cat").stdout == "hello\n"
    assert command("logs", "cat", "--grep", "^h").stdout == "hello\n"
    assert command("info", "nobody").returncode == 4


def test_the_file_is_both_ends_of_ssh(pyz: Path, python: str, start_server: Callable[..., Server]) -> None:
    server = start_server(program=[python, str(pyz)], environ=ALONE, cwd=pyz.parent)
    environ = {**ALONE, "AGENTSERVER_SSH": str(AGENTS / "ssh"), "AGENTSERVER_SSH_COMMAND": f"{python} {pyz} stdio"}
    done = run([python, str(pyz), "run", "--server", server.address("stdio"), "--", "sh", "-c", "echo hello; exit 7"],
               server.state_dir, environ)
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello\n", "")


def test_the_network_works_with_pyzmq(pyz: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(program=[sys.executable, str(pyz)], environ=ALONE, cwd=pyz.parent)
    done = run([sys.executable, str(pyz), "run", "--server", server.endpoint, "--", "echo", "hello"],
               server.state_dir, ALONE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_without_pyzmq_one_sentence_says_what_is_missing(
        pyz: Path, bare_python: str, start_server: Callable[..., Server]) -> None:
    server = start_server(program=[bare_python, str(pyz)], environ=ALONE, cwd=pyz.parent)
    said = server.ready + server.errors.read_text()
    assert said.count("pyzmq") >= 1 and "Traceback" not in said
    assert [line for line in said.splitlines() if "pip install pyzmq" in line]
    done = run([bare_python, str(pyz), "ps", "--server", "tcp://127.0.0.1:5555"], server.state_dir, ALONE)
    assert done.returncode == 3 and "pyzmq" in done.stderr and done.stderr.count("\n") == 1


def test_the_file_is_a_program_and_a_library(pyz: Path, state_dir: Path) -> None:
    assert os.access(pyz, os.X_OK)
    assert run([sys.executable, str(pyz), "--version"], state_dir, ALONE).stdout == f"agentserver {__version__}\n"
    assert run([sys.executable, str(pyz), "no-such-command"], state_dir, ALONE).returncode == 2
    code = "import agentserver; print(agentserver.__file__, agentserver.AgentClient.__name__)"
    done = run([sys.executable, "-c", code], state_dir, {"PYTHONPATH": str(pyz)})
    assert done.stdout == f"{pyz}/agentserver/__init__.py AgentClient\n", done.stderr


def test_equal_sources_give_equal_bytes(state_dir: Path) -> None:
    built = []
    for zone in ("UTC", "Asia/Tokyo"):
        target = state_dir / zone.replace("/", "-")
        done = run([sys.executable, str(ROOT / "tools" / "single.py"), str(target)], state_dir, {"TZ": zone})
        assert done.returncode == 0, done.stderr
        built.append(target.read_bytes())
    assert built[0] == built[1]


@pytest.mark.parametrize("start", [[str(MAIN)], [str(MAIN.parent)], ["-P", str(MAIN)], ["-m", "agentserver"]],
                         ids=["file", "folder", "file, safe path", "module"])
def test_every_way_to_start_is_the_same_program(start: list[str], state_dir: Path) -> None:
    if "-P" in start and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    done = run([sys.executable, *start, "--version"], state_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"agentserver {__version__}\n", "")
    assert run([sys.executable, *start, "no-such-command"], state_dir).returncode == 2


def test_our_files_do_not_shadow_others(state_dir: Path) -> None:
    """Run by path, `import config` must not find agentserver/config.py."""
    code = (f"import sys, runpy; sys.argv = [{str(MAIN)!r}, '--version']; sys.path[0] = {str(MAIN.parent)!r}\n"
            f"try: runpy.run_path({str(MAIN)!r}, run_name='__main__')\n"
            "except SystemExit: pass\n"
            f"print({str(MAIN.parent)!r} in sys.path)")
    assert run([sys.executable, "-c", code], state_dir).stdout.endswith("False\n")
