"""Two versions meet: a server of an older one is reloaded to this one, and back, with its agents alive.

Owns:    the older version's tree, from git, and what agents must not notice of the change.
Runs in: the test process; it signals only the parts of servers that it started.
Unaware: of what differs between the two.
"""
from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import MAIN, ROOT, Server, short_dir, wait_until
from test_faults import zmq_answers
from test_survival import by_request, kill_core, reload, successor, told
from wire import LineWire

OLD = "a35bbb9"  # a commit: the first version whose agents live on through every later one
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")


@pytest.fixture(scope="module")
def old(run_dir: Path) -> Path:
    """The package of the older version."""
    where = short_dir(run_dir)
    try:
        tree = subprocess.run(["git", "-C", str(ROOT), "archive", OLD, "agentserver"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no git here")
    if tree.returncode:
        pytest.skip(f"the commit {OLD} is not here: a part of the history only, or no git repository at all")
    subprocess.run(["tar", "-x", "-C", str(where)], input=tree.stdout, check=True)
    return where / "agentserver"


class Changing:
    """A server whose code on disk is replaced."""

    def __init__(self, start_server: Callable[..., Server], where: Path, begin: Path) -> None:
        self._package, self._puts = where / "agentserver", 0
        self.put(begin)
        self.program = [sys.executable, str(self._package / "__main__.py")]
        self.server = start_server(program=self.program, environ={"PYTHONPATH": ""})

    def put(self, package: Path) -> None:
        """Replace the code, by one that tells when a keeper has become it."""
        shutil.rmtree(self._package, ignore_errors=True)
        shutil.copytree(package, self._package, ignore=shutil.ignore_patterns("__pycache__"))
        self._puts += 1
        with open(self._package / "core" / "keeper.py", "a") as file:
            file.write(f"\nimport sys\n'_renewed' in sys.argv and open({str(self._become)!r}, 'w').close()\n")

    @property
    def _become(self) -> Path:
        return self._package.with_name(f"become.{self._puts}")

    def become(self, package: Path) -> None:
        """Reload to other code; return when keeper, core and shell are of it."""
        self.put(package)
        before = wait_until(lambda: {"keeper", "core", "shell"} <= set(self.server.pids()) and self.server.pids(),
                            what="the shell to be known")
        reload(self.server, by_request)
        wait_until(lambda: told(self.server).get("shell_pid") not in (None, "", str(before["shell"])), what="the shell")
        wait_until(self._become.exists, what="the keeper to become its other version")
        assert zmq_answers(self.server.endpoint) and self.server.pids()["keeper"] == before["keeper"]


@pytest.mark.parametrize("first", ["old", "new"])
def test_agents_live_through_another_version_and_back(first: str, old: Path, start_server: Callable[..., Server],
                                                      run_dir: Path, tmp_path: Path) -> None:
    """Output at its offsets, stdin once, exit codes, with deaths of the core on the way."""
    versions = [old, MAIN.parent] if first == "old" else [MAIN.parent, old]
    changing = Changing(start_server, short_dir(run_dir), versions[0])
    server = changing.server
    with LineWire(server.socket_path) as wire:
        large = {f"label {n}": "x" * 200 for n in range(50)}  # such a record is not written whole each time
        busy, echo = wire.spawn("lines", 0, 2000, tmp_path / "sums"), wire.spawn("echo", labels=large)
        late, pty = wire.spawn("echo", labels=large), wire.spawn("sleeper", stdin="pty", ready=False)
        wire.until_output(pty, b"ready")
        ending = [wire.spawn("catcher", 1, 5), wire.spawn("catcher", 1, 6), wire.spawn("catcher", 1, 7)]
        wire.control(late, "pause")
        sent = b"".join(b"%07d\n" % n for n in range(30_000))
        wire.control(late, "write_stdin", data=sent.decode())
        pids = {each: wire.info(each)["pid"] for each in (busy, echo, late, pty)}
    for version, code in zip([*versions[::-1], versions[1]], (5, 6, 7)):
        changing.become(version)
        kill_core(server)
        with LineWire(server.socket_path) as wire:
            assert {each: wire.info(each)["pid"] for each in pids} == pids
            assert wire.info(echo)["labels"] == wire.info(late)["labels"] == large
            wire.control(echo, "write_stdin", data=f"{code}\n")
            wire.control(ending[code - 5], "signal", signal="SIGUSR1")
            assert wire.exit(ending[code - 5])["code"] == code
    with LineWire(server.socket_path) as wire:
        wire.control(late, "resume")
        wire.control(late, "close_stdin")
        assert wire.output(late) == b"ready\n" + sent and wire.exit(late)["code"] == 0
        wire.control(echo, "close_stdin")
        assert wire.output(echo) == b"ready\n5\n6\n7\n"
        wire.control(busy, "stop")
        assert wire.exit(busy)["code"] == 0
        out, err = wire.output(busy), wire.output(busy, "stderr")
        assert (tmp_path / "sums").read_text().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                                          str(len(err)), hashlib.sha256(err).hexdigest()]
        wire.control(pty, "kill")
        assert wire.exit(pty)["signal"] == "SIGKILL"


@pytest.mark.parametrize("first", ["old", "new"])
def test_a_keeper_of_another_version_comes(first: str, old: Path, start_server: Callable[..., Server]) -> None:
    """It becomes the keeper of a core that is older, or newer, than itself; the core then dies."""
    versions = [old, MAIN.parent] if first == "old" else [MAIN.parent, old]
    programs = [[sys.executable, str(each / "__main__.py")] for each in versions]
    server = start_server(program=programs[0], environ={"PYTHONPATH": ""})
    with LineWire(server.socket_path) as wire:
        each = wire.spawn("echo")
        pid = wire.info(each)["pid"]

    def start(**options: object) -> Server:
        return start_server(program=programs[1], environ={"PYTHONPATH": ""}, **options)
    heir = successor(start, server)
    kill_core(heir)
    with LineWire(heir.socket_path) as wire:
        assert wire.info(each)["pid"] == pid
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n"
    server.process.stdout.close()  # type: ignore[union-attr]
