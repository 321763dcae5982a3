"""Named pipes, links, directories, devices where files of an agent should be: nobody waits, no other file is touched.

Owns:    each kind of file below `agents/` against each kind of thing that an agent can put in its place.
Runs in: the test process; some with a real server.
Unaware: of how files are opened.
"""
from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path
from typing import Callable

import pytest
from support import Server, wait_until
from wire import LineWire, data_of

from agentserver.core import files
from agentserver.core.output import OutputLog

SECRET = b"a secret of somebody else\n"
KINDS = ["fifo", "link", "directory", "socket", "device"]


def put(kind: str, path: Path) -> Path:
    """Put something in the place of a file, or a directory; return the file that a link leads to."""
    secret = path.parent.parent / f"{path.name}.secret"
    secret.write_bytes(SECRET)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(secret)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            before = os.getcwd()
            os.chdir(path.parent)
            try:
                bound.bind(path.name)
            finally:
                os.chdir(before)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    return secret


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """What stands in the place of a file."""
    return str(request.param)


def first(name: str) -> str:
    """Return the name of the first file of a kind."""
    return f"{name}.{0:020d}"


# ---------------------------------------------------------------- the log alone

@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with output of an agent that has ended."""
    log = OutputLog(str(tmp_path / "agents" / "a"), 1 << 20)
    log.append("stdout", b"out\n")
    log.append("stderr", b"err\n")
    log.close()
    return tmp_path / "agents" / "a"


def test_reading_what_is_no_file_costs_that_stream_only(place: Path, kind: str) -> None:
    log = OutputLog(str(place), 1 << 20)
    secret = put(kind, place / first("stdout"))
    for _ in range(2):  # of a core that had seen the file, and of one that comes later
        got = log.read("stdout", 0, 100)
        assert got.data == b"" and log.read("stderr", 0, 100).data == b"err\n"
        log.times("stdout", 0, 4), log.times("stderr", 0, 4), log.offset_at("stderr", 1.0), log.disk_bytes()
        log = OutputLog(str(place), 1 << 20)
    assert secret.read_bytes() == SECRET


def test_why_bytes_are_gone_is_told(place: Path) -> None:
    log = OutputLog(str(place), 1 << 20)
    put("fifo", place / first("stdout"))
    got = log.read("stdout", 0, 100)
    assert got.dropped == 4 and log.why_dropped("stdout", got) == "file_gone"


def test_recording_goes_on_beside_what_is_no_file(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = put(kind, place / first("stdout"))
    clock = [1e9]
    log = OutputLog(str(place), 1 << 20, now=lambda: clock[0])
    log.append("stdout", b"lost")
    assert log.trouble and "where a file of the server should be" in log.trouble
    log.append("stderr", b"more\n")
    clock[0] += 10
    log.append("stdout", b"kept\n")
    end = log.span("stdout")[1]
    assert log.read("stdout", 0, 100).data == b"kept\n" and log.read("stderr", 0, 100).data == b"err\nmore\n"
    log.close()
    again = OutputLog(str(place), 1 << 20)
    assert again.span("stdout")[1] == end, "no offset is used twice"
    assert again.read("stdout", 0, 100).data == b"kept\n" and secret.read_bytes() == SECRET


def test_an_index_that_is_no_file_costs_times(place: Path, kind: str) -> None:
    secret = put(kind, place / first("index"))
    for _ in range(2):
        log = OutputLog(str(place), 1 << 20)
        log.append("stdout", b"more\n")
        assert log.read("stdout", 0, 100).data.startswith(b"out\nmore\n")
        assert log.times("stdout", 0, 4)[-1][1] == 4
        log.close()
    assert secret.read_bytes() == SECRET and len(list(place.glob("index.*"))) == 2


def test_a_directory_that_is_none(place: Path, kind: str) -> None:
    if kind == "directory":
        pytest.skip("that is what it should be")
    elsewhere = place.parent.parent / "elsewhere"
    shutil.copytree(place, elsewhere)
    put(kind, place)
    if kind == "link":
        place.unlink()
        place.symlink_to(elsewhere)
    log = OutputLog(str(place), 1 << 20)
    assert log.span("stdout") == (0, 0)
    log.append("stdout", b"lost")
    assert log.trouble and "where the directory of an agent should be" in log.trouble
    log.close()
    assert (elsewhere / first("stdout")).read_bytes() == b"out\n"


def test_new_files_replace_all_but_directories(tmp_path: Path, kind: str) -> None:
    (tmp_path / "agents" / "a").mkdir(parents=True)
    path = tmp_path / "agents" / "a" / "stdin.1"
    secret = put(kind, path)
    if kind == "directory":
        with pytest.raises(files.NotAFile, match="is a directory, where a file of the server should be"):
            files.new_file(str(path.parent), path.name)
        return
    fd = files.new_file(str(path.parent), path.name)
    os.write(fd, b"x")
    os.close(fd)
    assert path.read_bytes() == b"x" and path.stat().st_mode & 0o777 == 0o600 and secret.read_bytes() == SECRET


# ---------------------------------------------------------------- a server

Directory = Callable[[str], Path]


@pytest.fixture
def directory(shared: Server) -> Directory:
    """Where the files of an agent are."""
    return lambda agent: shared.state_dir / "agents" / agent


def test_nobody_waits_for_what_an_agent_has_put_there(unix: LineWire, directory: Directory, kind: str) -> None:
    ended = unix.ok("spawn_request", config={"command": ["sh", "-c", "echo hello; echo oh >&2"]})["agent_info"]["id"]
    unix.ended(ended)
    other = unix.spawn("echo")
    for name in ("stdout", "index"):
        put(kind, directory(ended) / first(name))
    reply = unix.read(ended, offset=0, times=True)
    assert reply["data"] is None and reply["dropped"] == 6 and reply["dropped_reason"] == "file_gone"
    assert data_of(unix.read(ended, "stderr", offset=0)) == b"oh\n"
    for stream in ("stdout", "both"):
        found = unix.ok("output_query_request", agent_id=ended, stream=stream, filter="h")
        assert found["lines"] == (["oh"] if stream == "both" else [])
    unix.control(ended, "inspect")
    put(kind, directory(other) / "stdin.1")
    written = unix.ask("control_command", agent_id=other, command_type="write_stdin", payload={"data": "x\n"})
    assert written["success"] == (kind != "directory")
    if kind == "directory":
        assert written["error_code"] == "unavailable" and "is a directory" in written["error"]
    else:
        unix.until_output(other, b"x\n")
    unix.control(ended, "remove")
    assert not directory(ended).exists()
    assert unix.ok("health_check_request")["healthy"]


def test_a_core_that_comes_is_not_stopped_either(start_server: Callable[..., Server], kind: str) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        agent = wire.ok("spawn_request", config={"command": ["echo", "hello"]})["agent_info"]["id"]
        ticker = wire.spawn("ticker", 0.01)
        wire.ended(agent)
    for each in (agent, ticker):
        for name in ("stdout", "index"):
            put(kind, server.state_dir / "agents" / each / first(name))
    os.kill(server.pids()["core"], 9)
    wait_until(lambda: _answers(server))
    with LineWire(server.socket_path) as wire:
        assert wire.status(ticker) == "running" and wire.read(agent, offset=0)["data"] is None
        end = wire.read(ticker, offset=0)["next_offset"]
        wait_until(lambda: wire.read(ticker, offset=end)["bytes"] > 0, what="recording to go on in another file")


def _answers(server: Server) -> bool:
    try:
        return bool(server.ask({"type": "health_check_request"})["success"])
    except (OSError, ValueError):
        return False


def test_a_link_in_the_place_of_a_directory_is_not_followed(unix: LineWire, directory: Directory,
                                                            tmp_path: Path) -> None:
    agent = unix.ok("spawn_request", config={"command": ["echo", "hello"]})["agent_info"]["id"]
    unix.ended(agent)
    shutil.move(directory(agent), tmp_path / "moved")
    directory(agent).symlink_to(tmp_path / "moved")
    unix.control(agent, "remove")
    wait_until(lambda: not directory(agent).is_symlink())
    assert (tmp_path / "moved" / first("stdout")).read_bytes() == b"hello\n"


@pytest.mark.parametrize("umask", [0, 0o027])
def test_all_that_the_server_makes_is_for_its_own_user(start_server: Callable[..., Server], umask: int) -> None:
    """And agents have the umask that the server was started with."""
    before = os.umask(umask)
    try:
        server = start_server()
    finally:
        os.umask(before)
    with LineWire(server.socket_path) as wire:
        agent = wire.ok("spawn_request", config={"command": ["sh", "-c", "umask; cat"]})["agent_info"]["id"]
        assert int(wire.lines(agent, 1)[0], 8) == umask
        wire.control(agent, "write_stdin", data="x\n")
        open_to_others = [path for path in server.state_dir.rglob("*") if path.lstat().st_mode & 0o077
                          and not path.is_relative_to(server.state_dir / "xdg")]
        assert not open_to_others
