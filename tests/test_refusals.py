"""A program that cannot be started: the true cause is named, in one sentence, by `spawn` and after a restart.

Owns:    one small broken program for each cause; that no value of the environment is ever told.
Runs in: the test process; the server and the programs are real.
Unaware: of how the cause is found.
"""
from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from support import Server, wait_until
from wire import LineWire, new_id

from agentserver.core import refusal

LINUX = sys.platform.startswith("linux")


def program(path: Path, content: bytes, mode: int = 0o755) -> str:
    """Write a program and return its path."""
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def elf(machine: int = 62, bits: int = 2, loader: bytes = b"") -> bytes:
    """Return the header of an ELF file with at most one program header, which names the loader."""
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF" + bytes([bits, 1, 1]), 2, machine, 1, 0x400000, 64, 0, 0, 64, 56,
                       bool(loader), 0, 0, 0)
    entry = struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, len(loader) + 1, len(loader) + 1, 1) if loader else b""
    return head + entry + loader + b"\0" * 200


def with_loader(loader: bytes) -> bytes:
    """Return a real program of this machine whose loader has another name, of the same length."""
    image = Path(shutil.which("true") or pytest.skip("no true")).read_bytes()
    at = image.find(b"/ld-")
    if at < 0:
        pytest.skip("`true` needs no loader here")
    start, end = image.rfind(b"\0", 0, at) + 1, image.find(b"\0", at)
    return image[:start] + loader.ljust(end - start, b"x") + image[end:]


Made = Callable[[Path], Any]
CASES: dict[str, tuple[Made, str]] = {
    "not there": (lambda at: str(at), "there is no program"),
    "below a file": (lambda at: program(at, b"x") + "/x", "there is no program"),
    "dangling link": (lambda at: (at.symlink_to("/no/such"), str(at))[1], "is a link to '/no/such', which is not"),
    "directory": (lambda at: (at.mkdir(), str(at))[1], "is a directory, not a program"),
    "named pipe": (lambda at: (os.mkfifo(at, 0o755), str(at))[1], "is not a file"),
    "mode": (lambda at: program(at, b"#!/bin/sh\n", 0o644), "is not executable for the server's user; chmod +x"),
    "empty": (lambda at: program(at, b""), "is empty, and so not a program"),
    "text": (lambda at: program(at, b"echo hello\n"), "is not a program: it has neither"),
    "Windows": (lambda at: program(at, b"MZ\x90\0rest"), "is a program for Windows"),
    "no interpreter": (lambda at: program(at, b"#!/no/such -x\n"), "the interpreter '/no/such', which does not exist"),
    "no word": (lambda at: program(at, b"#!  \n"), "names no interpreter in its first line"),
    "circle of links": (lambda at: (at.symlink_to(at.name), str(at))[1], "is a link that leads in a circle"),
    "byte order mark": (lambda at: program(at, b"\xef\xbb\xbf#!/bin/sh\n"), "begins with a byte order mark"),
    "CR LF": (lambda at: program(at, b"#!/bin/sh\r\necho hello\r\n"), "end as on Windows (CR LF)"),
    "interpreter is a directory": (lambda at: program(at, b"#!/tmp\n"), "'/tmp' is a directory, not a program"),
    "interpreter is text": (lambda at: program(at, f"#!{program(at.with_name('in'), b'hm')}\n".encode()),
                            "cannot be executed: "),
    "another machine": (lambda at: program(at, elf(machine=8)), "is a program for MIPS, and this machine runs"),
    "damaged": (lambda at: program(at, b"\x7fELF\x02\x01\x01" + b"\0" * 9), "is damaged"),
    "no loader": (lambda at: program(at, with_loader(b"/lib/ld-no.so.9")), "needs the loader '/lib/ld-no.so.9"),
    "script of a program without a loader": (
        lambda at: program(at, f"#!{program(at.with_name('in'), with_loader(b'/lib/ld-no.so.9'))}\n".encode()),
        "needs the loader '/lib/ld-no.so.9"),
    "an argument": (lambda at: ["/bin/echo", "x", "y" * 200_000], "argument 2 has 200000 bytes, and this system"),
    "all arguments": (lambda at: ["/bin/echo", *["y" * 100_000] * 60], "the arguments and the environment have 6"),
}


@pytest.mark.skipif(not LINUX, reason="the sentences are about what Linux says")
@pytest.mark.parametrize("case", CASES)
def test_the_true_cause_is_named(unix: LineWire, tmp_path: Path, case: str) -> None:
    make, words = CASES[case]
    made = make(tmp_path / "the-program")
    sentence = unix.refused("spawn_failed", "spawn_request",
                            config={"command": made if isinstance(made, list) else [made]})
    assert words in sentence and "\n" not in sentence and len(sentence) < 600, sentence
    if case not in ("an argument", "all arguments"):
        assert "the-program" in sentence, sentence


@pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="mounts a small disk")
def test_a_mount_without_exec_is_named(unix: LineWire, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,size=1m", "none", str(tmp_path)]
    if subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip("nothing can be mounted here")
    try:
        made = program(tmp_path / "x", b"#!/bin/sh\n")
        assert "mounted noexec" in unix.refused("spawn_failed", "spawn_request", config={"command": [made]})
    finally:
        subprocess.check_call(["umount", str(tmp_path)])


def test_a_directory_that_is_gone_is_named(unix: LineWire, tmp_path: Path) -> None:
    gone, file = tmp_path / "gone", tmp_path / "file"
    file.touch()
    for cwd, words in ((gone, "does not exist, or not any more"), (file, "is not a directory")):
        sentence = unix.refused("spawn_failed", "spawn_request", config={"command": ["true"], "cwd": str(cwd)})
        assert words in sentence and str(cwd) in sentence
    gone.mkdir()
    agent = unix.ok("spawn_request", config={"command": ["true"], "cwd": str(gone)})["agent_info"]["id"]
    unix.ended(agent)
    gone.rmdir()
    sentence = unix.cannot("spawn_failed", agent, "restart")
    record = unix.exit(agent)
    assert "not any more" in sentence and record["reason"] == "not_started" and record["message"] == sentence


def test_a_state_directory_that_was_moved_is_named(start_server: Callable[..., Server]) -> None:
    """Not the program, which is there."""
    server = start_server()
    moved = server.state_dir.with_name("moved")
    with LineWire(server.socket_path) as wire:
        server.state_dir.rename(moved)
        try:
            sentence = wire.refused("spawn_failed", "spawn_request", config={"command": ["/bin/true"]})
        finally:
            moved.rename(server.state_dir)
        assert "its state directory may have been moved" in sentence
        wire.ended(wire.ok("spawn_request", config={"command": ["/bin/true"]})["agent_info"]["id"])


def test_a_restart_that_fails_later_keeps_its_reason(unix: LineWire, tmp_path: Path) -> None:
    """The restart of one that runs is answered before it can fail."""
    path = tmp_path / "agent"
    script = b"#!/bin/sh\necho read; exec sleep 1000\n"
    agent = unix.ok("spawn_request", config={"command": [program(path, script)]})
    ref = agent["agent_info"]["id"]
    unix.until_output(ref, b"read\n")  # before that the shell would read what is written now
    path.write_bytes(b"#!/no/such\n")
    unix.control(ref, "restart", grace_secs=1)
    wait_until(lambda: unix.info(ref)["attempt"] == 2 and unix.status(ref) == "failed")
    assert "'/no/such', which does not exist" in unix.exit(ref)["message"]
    attempts = unix.control(ref, "inspect")["attempts"]
    assert "message" not in attempts[0]["exit"] and attempts[1]["exit"]["message"] == unix.exit(ref)["message"]


SECRET = "hunter2"


@pytest.mark.parametrize("environment", [
    {"PATH": f"/{SECRET}"}, [f"TOKEN={SECRET}"], f"TOKEN={SECRET}", {f"TOKEN={SECRET}": ""}, {"TOKEN": [SECRET]},
    {"TOKEN": SECRET + "\0"}, {"TOKEN": SECRET * 30_000}], ids=str)
def test_no_sentence_tells_a_value_of_the_environment(unix: LineWire, environment: Any) -> None:
    for command in (["no-such-program"], ["/bin/true"]):
        reply = unix.ask("spawn_request", request_id=new_id(), config={"command": command, "environment": environment})
        assert SECRET not in str(reply.get("error")), reply


def test_nothing_is_guessed_where_the_file_does_not_tell(tmp_path: Path) -> None:
    good = program(tmp_path / "good", b"#!/bin/sh\n")
    assert refusal.why_not(OSError(errno.ENOMEM, ""), good, [good], {}) == (
        f"{good!r} could not be started: {os.strerror(errno.ENOMEM)}")
    assert "RLIMIT_NPROC" in refusal.why_not(OSError(errno.EAGAIN, ""), good, [good], {})
    assert "written just now" in refusal.why_not(OSError(errno.ETXTBSY, ""), good, [good], {})
    long = refusal.why_not(OSError(errno.E2BIG, ""), good, [good], {"NAME": SECRET * 40_000})
    assert "variable 'NAME' has" in long and SECRET not in long
