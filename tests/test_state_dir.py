"""Which directory a server takes for its state, and that it changes nothing about one that was there.

Owns:    the rules of core/state_dir.py, and that `serve` and `doctor` follow them.
Runs in: the test process, with real servers.
Unaware: of what is kept there.
"""
from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import DEADLINE_SECS, MAIN, Server, clean_environ

from agentserver.cli import doctor
from agentserver.core import state_dir as rules
from agentserver.errors import StartError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(path: Path) -> str:
    """Return what `serve` says when it does not take a directory."""
    done = subprocess.run([sys.executable, str(MAIN), "serve", "--state-dir", str(path), "--endpoint",
                           "tcp://127.0.0.1:0", "--pub-endpoint", "none"], env=clean_environ(path), text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=DEADLINE_SECS)
    assert done.returncode == 3 or done.returncode == 1, done
    assert done.stderr.count("\n") == 1 and str(path) in done.stderr
    return done.stderr


@pytest.mark.parametrize("given", [0o1777, 0o755, 0o2775, 0o700])
def test_a_directory_with_others_files_is_left_alone(run_dir: Path, given: int) -> None:
    there = run_dir / f"shared-{given:o}"
    there.mkdir()
    (there / "somebody-elses-file").write_text("theirs")
    os.chmod(there, given)
    assert "agentserver" in refused(there)
    assert mode(there) == given and os.listdir(there) == ["somebody-elses-file"]
    assert doctor.state_dir(str(there)).state == doctor.BROKEN


@pytest.mark.parametrize("given", [0o1777, 0o777, 0o770, 0o1770, 0o720])
def test_one_that_others_can_write_is_refused(tmp_path: Path, given: int) -> None:
    """Also empty, and one that a server has used: who can write there can put his own socket there."""
    os.chmod(tmp_path, given)
    with pytest.raises(StartError, match="by others"):
        rules.prepare(str(tmp_path))
    (tmp_path / "keeper.lock").touch()
    with pytest.raises(StartError, match="by others"):
        rules.prepare(str(tmp_path))
    assert mode(tmp_path) == given


@pytest.mark.parametrize("holds", [[], ["lost+found"], ["agents"], ["keeper.lock", "x"], ["registry.db", "y"]])
def test_an_empty_one_and_a_state_directory_are_used_as_they_are(tmp_path: Path, holds: list[str]) -> None:
    for name in holds:
        (tmp_path / name).mkdir() if name in ("lost+found", "agents") else (tmp_path / name).touch()
    os.chmod(tmp_path, 0o755)
    rules.prepare(str(tmp_path))
    assert mode(tmp_path) == 0o755


def test_a_new_one_is_ours_alone_whatever_the_umask(tmp_path: Path) -> None:
    for umask in (0, 0o777, 0o022):
        before = os.umask(umask)
        try:
            rules.prepare(str(tmp_path / f"new-{umask:o}"))
        finally:
            os.umask(before)
        assert mode(tmp_path / f"new-{umask:o}") == 0o700


def test_a_link_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    rules.prepare(str(tmp_path / "link"))
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name in ("dangling", "file", "file/below"):
        with pytest.raises(StartError, match="state directory"):
            rules.prepare(str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_one_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(StartError, match="another user"):
        rules.prepare(str(tmp_path))


def test_what_a_server_writes_is_private_by_itself(start_server: Callable[..., Server], run_dir: Path) -> None:
    """In a directory that everybody may look into, and under a umask that lets everybody do everything."""
    there = run_dir / "open"
    there.mkdir(0o755)
    before = os.umask(0)
    try:
        server = start_server(state_dir=there)
    finally:
        os.umask(before)
    spawned = server.ask({"type": "spawn_request", "config": {"command": ["sh", "-c", "echo out"], "stdin": "pipe"}})
    assert spawned["success"]
    found = [Path(folder, name) for folder, folders, files in os.walk(there) for name in (*folders, *files)
             if name != "xdg"]
    assert len(found) > 5 and [path for path in found if mode(path) & 0o077 and not path.is_symlink()] == []
    assert mode(there) == 0o755
