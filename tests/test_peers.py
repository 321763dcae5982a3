"""Who is who on the core's socket: only the kernel says, whatever a header claims.

Owns:    forged headers, hellos and keepers; a core that believes one would signal, spare or name the wrong process.
Runs in: the test process, which has the uid of the server, as an agent has.
Unaware: of what a shell passes on for its clients (test_shell.py).
"""
from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator

import pytest
from support import Server, wait_until
from test_fuzz import ODD, mutate_value
from wire import Json, LineWire, ZmqWire, alive, checked

from agentserver.core import peers
from agentserver.core.framing import KEEPER, PREFACE, FrameDecoder, frame
from agentserver.wire import MAX_WIRE, new_id

SEED = int(os.environ.get("FUZZ_SEED", "20261123"))


class FrameWire:
    """A peer that speaks frames and says what it likes of itself."""

    def __init__(self, server: Server, **hello: object) -> None:
        self.socket = server.connect()
        self.socket.sendall(PREFACE + frame(0, json.dumps(hello).encode(), b""))
        self._decoder, self._tag = FrameDecoder(MAX_WIRE), 0

    def ask(self, kind: str, header: object = None, **fields: object) -> Json:
        """Send a request with this header beside it, and return the reply."""
        self._tag += 1
        head = b"" if header is None else json.dumps(header).encode()
        message = {"type": kind, "request_id": new_id(), **fields}
        self.socket.sendall(frame(self._tag, head, json.dumps(message).encode()))
        while True:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            for tag, _header, body in self._decoder.feed(data):
                if tag == self._tag:
                    return checked(json.loads(body))

    def __enter__(self) -> FrameWire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that no server has to do with."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; print(flush=True); signal.pause()"],
                               stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


# ---------------------------------------------------------------- who claims to be the shell

def test_a_process_that_a_header_names_is_not_signalled(shared: Server, victim: subprocess.Popen[bytes]) -> None:
    """A core that took it for a shell of a dead keeper would end it."""
    with FrameWire(shared, pid=victim.pid, keeper_pid=1, role="requests", endpoint="tcp://127.0.0.1:1") as stranger:
        assert stranger.ask("health_check_request")["metadata"]["endpoint"] == shared.endpoint
    assert shared.ask({"type": "stats_request"})["stats"]["shell"]["pid"] == shared.pids()["shell"]
    assert victim.poll() is None


@pytest.mark.parametrize("pid", ["abc", [1], {"a": 1}, 1.5, True, 2 ** 70, None])
def test_what_a_stranger_calls_its_pid_changes_nothing(shared: Server, pid: object) -> None:
    with FrameWire(shared, pid=pid, role="requests"), LineWire(shared.socket_path) as wire:
        started = wire.spawn("tree", 1, 2)
        tree: list[int] = json.loads(wire.lines(started, 2)[1])
        assert wire.ok("stats_request")["stats"]["shell"]["pid"] == shared.pids()["shell"]
        wire.control(started, "kill")
        wire.ended(started)
        assert not any(map(alive, tree))


def test_a_descendant_that_calls_itself_the_shell_is_ended_with_its_agent(shared: Server) -> None:
    with LineWire(shared.socket_path) as wire:
        started = wire.spawn("tree", 2, 1)
        tree: list[int] = json.loads(wire.lines(started, 2)[1])
        with FrameWire(shared, pid=tree[-1], role="requests"):
            os.kill(tree[1], signal.SIGKILL)   # so that it comes back to the core, as its parts do
            wire.control(started, "kill")
            wire.ended(started)
            assert not any(map(alive, tree))


def test_only_a_shell_says_who_asks(shared: Server) -> None:
    with FrameWire(shared, role="requests") as stranger, ZmqWire(shared.endpoint) as honest:
        for wire, by in ((stranger, f"pid {os.getpid()}"), (honest, "client")):
            config = {"command": ["sleep", "1000"]}
            spawned = wire.ask("spawn_request", config=config)["agent_info"]["id"]
            command = {"agent_id": spawned, "command_type": "kill"}
            header = {"header": {"name": "the administrator"}} if wire is stranger else {}
            assert wire.ask("control_command", **header, **command)["success"]
            with LineWire(shared.socket_path) as looking:
                assert by in looking.exit(spawned)["by"]


@pytest.mark.parametrize("hello", [{"role": 5}, {"keeper_pid": "x"}, {"keeper_pid": -1}, {"endpoint": ["a"]},
                                   {"pub_endpoint": "x" * 5000}])
def test_a_hello_of_wrong_types_ends_its_connection(shared: Server, hello: Json) -> None:
    before = shared.pids()
    with FrameWire(shared, **hello) as wrong, pytest.raises((EOFError, ConnectionError)):
        wrong.ask("health_check_request")
    with FrameWire(shared) as wrong, pytest.raises((EOFError, ConnectionError)):
        wrong.ask("health_check_request", {"name": hello})
    assert shared.pids() == before


def test_thousands_of_forged_headers(start_server: Callable[..., Server]) -> None:
    server = start_server()
    before, rng = server.ask({"type": "health_check_request"})["metadata"], random.Random(SEED)
    print(f"seed {SEED}")
    hello: Json = {"pid": 1, "keeper_pid": 2, "role": "requests", "endpoint": "tcp://a:1", "kind": "z"}
    for _ in range(1000):
        forged = mutate_value(rng, {**hello, rng.choice(["pid", "keeper_pid", "role"]): rng.choice(ODD)})
        with FrameWire(server, **(forged if isinstance(forged, dict) else {"": forged})) as wire:
            with contextlib.suppress(EOFError, ConnectionError):
                for _ in range(3):
                    wire.ask("stats_request", mutate_value(rng, {"name": "n", "kind": "zmq", "pid": rng.choice(ODD)}))
    stats = server.ask({"type": "stats_request"})
    assert stats["success"] and stats["stats"]["shell"]["pid"] == int(before["shell_pid"])
    assert server.ask({"type": "health_check_request"})["metadata"] == before
    assert "Traceback" not in server.logs()
    assert server.logs().count("without holding shell.lock") == 1


def test_a_shell_that_has_left_is_no_liar(start_server: Callable[..., Server]) -> None:
    """It had the lock when it said hello, and has it no more when the core hears that."""
    server = start_server()
    core = server.pids()["core"]
    os.kill(core, signal.SIGSTOP)
    FrameWire(server, role="requests").socket.close()
    os.kill(core, signal.SIGCONT)
    log = server.state_dir / "core.log"
    assert server.pids()["core"] == core and not (log.exists() and "claims" in log.read_text())


# ---------------------------------------------------------------- who claims to be the keeper

def test_a_stranger_is_no_keeper(start_server: Callable[..., Server]) -> None:
    """Whoever is, gets copies of all descriptors, and may end the server."""
    server = start_server()
    core = server.pids()["core"]
    server.process.kill()
    server.process.wait()
    wait_until(lambda: "the keeper is gone" in server.logs(), what="the core to notice")
    with server.connect() as stranger:
        stranger.sendall(KEEPER)
        assert stranger.recv(65536) == b""
    heir = start_server(state_dir=server.state_dir)
    assert heir.pids()["core"] == core and heir.pids()["keeper"] == heir.process.pid


# ---------------------------------------------------------------- who holds a lock

@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Work in a directory as a core does, which holds its own lock; take others there."""
    monkeypatch.chdir(tmp_path)
    files = []

    def take(name: str) -> None:
        files.append(open(name, "w"))
        fcntl.flock(files[-1], fcntl.LOCK_EX)
    take("core.lock")
    yield take
    for file in files:
        file.close()


HELLO = peers.Hello(endpoint="tcp://127.0.0.1:5")
OURS = peers.Caller(os.getuid(), os.getpid())


def test_who_holds_the_lock_is_the_shell(locks: Callable[[str], None]) -> None:
    if peers._holds(OURS.pid, "core.lock") is None:
        pytest.skip("this system does not tell who holds a lock")
    assert peers.shell(HELLO, OURS) is None           # there is no such lock
    Path("shell.lock").touch()
    assert peers.shell(HELLO, OURS) is None           # nobody holds it
    locks("shell.lock")
    found = peers.shell(HELLO, OURS)
    assert found is not None and (found.hello, found.pid) == (HELLO, os.getpid()) and found.start
    assert peers.shell(HELLO, OURS._replace(pid=os.getppid())) is None
    assert not peers.is_keeper(OURS)


def test_where_the_system_does_not_tell_the_mode_of_the_socket_has_to_do(
        locks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def untold() -> None:
        raise FileNotFoundError
    monkeypatch.setattr(peers, "_flocks", untold)
    assert peers.shell(HELLO, OURS) is not None
    monkeypatch.setattr(peers, "_flocks", set)
    assert peers.shell(HELLO, OURS) is not None
    monkeypatch.setattr(peers, "_flocks", lambda: {(os.getpid(), "00:01", 1)})  # a file system with numbers of its own
    assert peers.shell(HELLO, OURS) is not None
    os.unlink("core.lock")
    assert peers.shell(HELLO, OURS) is None
