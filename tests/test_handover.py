"""What core and keeper say to each other when one core gives way to the next, spoken word by word.

Owns:    the words in awkward orders, and a keeper that is not the first.
Runs in: the test process, which is the keeper here.
Unaware: of what is handed over; test_survival.py sees that from outside.
"""
from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Iterator

import pytest
from support import DEADLINE_SECS, clean_environ, wait_until
from wire import LineWire

from agentserver.config import ServerConfig
from agentserver.core.channel import Channel, Json
from agentserver.core.framing import KEEPER
from agentserver.core.link import dial
from agentserver.core.lock import held_by_another, lock
from agentserver.core.part import Part
from agentserver.core.service import YIELDED
from agentserver.errors import AgentServerError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a child subreaper")
NOBODY = 2 ** 22 + 1  # no pid is as high


class Core:
    """A core that was told to begin, and what it says."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "core.sock"
        self._lock = lock(str(state_dir / "keeper.lock"))  # which is how the core knows a keeper
        config = ServerConfig.from_json({"state_dir": str(state_dir)})
        self._part = Part("core", config)
        self._part.start({"config": config.to_json(), "started_at": time.time(), "generation": 1,
                          "keeper_pid": os.getpid(), "nofile": 1024})
        self.pid = self._part.pid
        assert self._part.channel is not None
        self.channel = self._part.channel

    def says(self, what: str) -> Json:
        """Wait for a word of this kind; others are left, and nothing is held."""
        until = time.monotonic() + DEADLINE_SECS
        while True:
            for word in self.channel.pending() or self._more(until):
                assert word is not None, f"the core went away, and never said {what!r}"
                for fd in word.get("fds", ()):
                    os.close(fd)
                if what in word:
                    return word

    def _more(self, until: float) -> list[Json | None]:
        assert select.select([self.channel], [], [], max(0.0, until - time.monotonic()))[0], "the core says nothing"
        return self.channel.receive()

    def begin(self) -> None:
        """Hand over nothing, and wait until it serves."""
        self.channel.send({"go": True})
        assert self.says("ready")["ready"]["pid"] == self.pid

    def adopt(self) -> None:
        """Let its keeper die, and be the next one."""
        self.channel.close()
        sock = self.called()
        sock.sendall(KEEPER)
        self.channel = Channel(sock)
        assert self.says("ready")["ready"]["pid"] == self.pid

    def called(self) -> socket.socket:
        """Return a connection, once it listens."""
        def connected() -> socket.socket | None:
            try:
                return dial(str(self.path))
            except (AgentServerError, OSError):
                return None
        return wait_until(connected, what="the core to listen")  # type: ignore[return-value]

    def ended(self) -> int:
        """Wait for its end, and return its exit code."""
        waiting = os.pidfd_open(self.pid)
        try:
            assert select.select([waiting], [], [], DEADLINE_SECS)[0], "the core did not end"
        finally:
            os.close(waiting)
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        """Kill it if it is still there."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.channel.close()
        os.close(self._lock)


@pytest.fixture(params=[False, True], ids=["first keeper", "next keeper"])
def core(request: pytest.FixtureRequest, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    """A core that serves, and whose keeper the test is, or has become."""
    for name, value in clean_environ(state_dir).items():
        monkeypatch.setenv(name, value)
    core = Core(state_dir)
    try:
        core.begin()
        if request.param:
            core.adopt()
        yield core
    finally:
        core.close()


@pytest.fixture(params=[False, True], ids=["", "an end crosses it"])
def yielded(request: pytest.FixtureRequest, core: Core) -> Core:
    """That core when it has yielded. The keeper tells of ends until it hears that, so that such a word may cross it."""
    core.channel.send({"yield": True})
    core.says("yielded")
    if request.param:
        core.channel.send({"ended": [NOBODY, 0, False, 0, None, None, None]})
    return core


def test_a_keeper_that_dies_when_the_core_has_yielded(core: Core) -> None:
    """Nobody could tell the core any more to go on; so it does, with all that it had, and another keeper may come."""
    with LineWire(core.path) as wire:
        each = wire.spawn("echo")
        pid = wire.info(each)["pid"]
    core.channel.send({"yield": True})
    core.says("yielded")
    core.channel.close()
    core.called().close()
    with LineWire(core.path) as wire:
        assert wire.info(each)["pid"] == pid
        wire.control(each, "write_stdin", data="x\n", eof=True)
        assert wire.output(each) == b"ready\nx\n" and wire.exit(each)["code"] == 0
    core.adopt()


@pytest.mark.parametrize(("last", "answer"), [("yield", "yielded"), ("stop", "done")])
def test_what_does_not_fit_is_said_all_the_same(core: Core, last: str, answer: str) -> None:
    """A keeper that is slow for a moment: more is to be said to it than fits between the two."""
    os.kill(core.pid, signal.SIGSTOP)
    for n in range(2000):
        core.channel.send({"ended": [NOBODY + n, 0, False, 0, None, None, None]})
    core.channel.send({last: True})
    os.kill(core.pid, signal.SIGCONT)
    wait_until(lambda: core.channel.flush() or not core.channel.unsent, what="all to be said")
    lock = str(core.path.parent / "core.lock")
    wait_until(lambda: not (core.path.exists() and held_by_another(lock)), what="it to have done what it was told")
    core.says(answer)


def test_it_yields_and_leaves(yielded: Core) -> None:
    yielded.channel.send({"leave": True})
    assert yielded.ended() == YIELDED


def test_it_yields_and_goes_on(yielded: Core) -> None:
    """Its successor did not come up. It serves as before, under the keeper it has, and can yield again."""
    yielded.channel.send({"resume": True})
    yielded.begin()
    with LineWire(yielded.path) as wire:
        told = wire.ok("health_check_request")["metadata"]
        assert (told["pid"], told["core_pid"]) == (str(os.getpid()), str(yielded.pid))
    yielded.channel.send({"yield": True})
    yielded.says("yielded")
    yielded.channel.send({"leave": True})
    assert yielded.ended() == YIELDED
