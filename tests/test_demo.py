"""The demonstration and the examples are run, against real servers.

Owns:    that each does what it says and leaves nothing behind.
Runs in: the test process; the programs are real processes.
Unaware: of how they do it.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import DEADLINE_SECS, ROOT, Server, assert_nothing_left, clean_environ, scratch

EXAMPLES = ROOT / "examples"


def run(state_dir: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run one of the examples to its end."""
    return subprocess.run([sys.executable, str(EXAMPLES / name), *args], env=clean_environ(state_dir), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=str(ROOT), timeout=6 * DEADLINE_SECS)


def test_the_demo_goes_as_it_should_and_leaves_nothing(state_dir: Path) -> None:
    done = run(state_dir, "demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All went as it should." in done.stdout and "FAIL" not in done.stdout
    assert not list(scratch(state_dir).iterdir())
    assert_nothing_left(str(state_dir))


def test_spawn_and_follow(server: Server) -> None:
    done = run(server.state_dir, "spawn_and_follow.py", "--server", server.endpoint, "--",
               "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "err\n")


def test_chat_with_agent(server: Server) -> None:
    done = run(server.state_dir, "chat_with_agent.py", "--server", server.endpoint, "where LineDecoder", "what?")
    assert done.returncode == 0, done.stderr
    said = [line.partition(":")[2].strip() for line in done.stdout.splitlines()]
    assert said[1:] == ["where LineDecoder", said[2], "what?", "I do not know 'what?'", "good-bye"]
    assert said[2].startswith("LineDecoder is defined in core/framing.py at line ")


def test_batch(server: Server, tmp_path: Path) -> None:
    for name, words in (("three", "one two three"), ("none", "")):
        (tmp_path / name).write_text(words)
    done = run(server.state_dir, "batch.py", "--server", server.endpoint,
               str(tmp_path / "three"), str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["paused:  2", "resumed: 2", f"{tmp_path}/three: completed, 3 words",
                                        f"{tmp_path}/none: completed, 0 words"]


@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_async_client(server: Server, link: str) -> None:
    done = run(server.state_dir, "async_client.py", "--server", server.address(link), "ada", "grace", "edsger")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[-1] == "3 of 3 ended well"
    for name in ("ada", "grace", "edsger"):
        assert lines.index(f"{name} | who are you?") < lines.index(f"{name} | good day, {name}")


def test_watch_status(start_server: Callable[..., Server]) -> None:
    server = start_server("--status-update-interval-secs", "0.1")
    watching = subprocess.Popen([sys.executable, str(EXAMPLES / "watch_status.py"), server.pub_endpoint, "2"],
                                env=clean_environ(server.state_dir), stdout=subprocess.PIPE, text=True)
    with watching as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline().startswith("the server is up")  # so the subscription is in
        agent = server.ask({"type": "spawn_request", "config": {"command": ["true"]}})["agent_info"]["id"]
        lines = [line for line in watcher.stdout if not line.startswith("the server is up")]
    assert watcher.returncode == 0
    assert [line.split()[1:] for line in lines] == [[agent[:8], "running"], [agent[:8], "completed"]]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "demo.py"))
def test_an_example_without_arguments_says_how_it_is_used(state_dir: Path, name: str) -> None:
    done = run(state_dir, name)
    assert done.returncode != 0 and "Traceback" not in done.stderr and name in done.stderr


@pytest.mark.parametrize("name", ["async_client.py", "batch.py", "chat_with_agent.py", "spawn_and_follow.py"])
def test_an_example_without_a_server_ends_with_one_sentence(state_dir: Path, name: str) -> None:
    done = run(state_dir, name, "--server", f"unix:{state_dir}/core.sock", "README.md")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "(unavailable)" in done.stderr
