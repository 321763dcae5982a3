"""Fixtures: servers, clients over every link, and the check that nothing stays behind.

Owns:    `state_dir`, `start_server`, `server` (fresh, one test), `link`, `twin`, `client` (shared servers, one
         test sees an empty one), and the check at the end of the session.
Runs in: the test process.
Unaware: of what is being tested; see support.py for the servers themselves.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

import pytest
from support import LINKS, Server, assert_nothing_left, marked_processes, short_dir, wait_until, without_ssh
from wire import LineWire, Wire, open_wire

if TYPE_CHECKING:
    from agentserver import AgentClient

for name in [name for name in os.environ if name.startswith("AGENTSERVER_")]:
    del os.environ[name]  # no test may meet the server of whoever runs the tests

# who starts the tests in the background of a script has them, and all they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def run_dir() -> Iterator[Path]:
    """The directory that everything of this test run lives in; at the end nothing of it may run."""
    path = short_dir()
    os.environ.update(without_ssh(path))
    try:
        yield path
        with contextlib.suppress(AssertionError):  # what a closed link leaves ends by itself, a moment later
            wait_until(lambda: not marked_processes(str(path)), 5.0)
        assert_nothing_left(str(path))
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def state_dir(run_dir: Path) -> Path:
    """A fresh, short directory; a server may make it its own."""
    return short_dir(run_dir)


@pytest.fixture
def start_server(run_dir: Path) -> Iterator[Callable[..., Server]]:
    """Start servers as a test wants them: `start_server(*flags, state_dir=…, endpoint=…, environ=…)`."""
    with contextlib.ExitStack() as running:
        def start(*flags: str, state_dir: Path | None = None, **options: object) -> Server:
            server = Server(state_dir or short_dir(run_dir), *flags, **options)  # type: ignore[arg-type]
            running.callback(server.close_if_running)
            return server
        yield start


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    """A fresh server on free loopback ports; at the end it is stopped and must leave nothing behind."""
    return start_server()


@pytest.fixture(scope="session")
def shared_servers(run_dir: Path) -> Iterator[Callable[[str], Server]]:
    """Return the running server for a link; started when first needed, started again if a test broke it."""
    running: dict[str, Server] = {}
    with contextlib.ExitStack() as endings:
        def server_for(link: str) -> Server:
            kind = "ipc" if link == "ipc" else "tcp"
            if kind not in running or running[kind].process.poll() is not None:
                home = short_dir(run_dir)
                ends = [f"ipc://{home}.req", f"ipc://{home}.pub"] if kind == "ipc" else ["tcp://127.0.0.1:0"] * 2
                running[kind] = Server(home, endpoint=ends[0], pub_endpoint=ends[1])
                endings.callback(running[kind].close)
            return running[kind]
        yield server_for


@pytest.fixture(params=LINKS)
def link(request: pytest.FixtureRequest) -> str:
    """Each way to reach a server; a test that uses it (or `client`) runs once over each."""
    return str(request.param)


@pytest.fixture
def shared_server(link: str, shared_servers: Callable[[str], Server]) -> Iterator[Server]:
    """A server that is reached over `link` and has no agents; other tests use it before and after."""
    server = shared_servers(link)
    yield server
    server.clear()


@pytest.fixture(params=["sync", "async"])
def twin(request: pytest.FixtureRequest) -> Any:
    """Each of the two clients, with the methods of `AgentClient`; what they do is the same."""
    from driven import TWINS
    return TWINS[request.param]


@pytest.fixture
def client(twin: Any, link: str, shared_server: Server) -> Iterator[AgentClient]:
    """Both clients, over each link."""
    with twin(shared_server.address(link)) as client:
        yield client


@pytest.fixture
def wire(link: str, shared_server: Server) -> Iterator[Wire]:
    """The protocol by hand, over each link, to a server without agents."""
    with open_wire(shared_server.address(link)) as wire:
        yield wire


@pytest.fixture
def shared(shared_servers: Callable[[str], Server]) -> Iterator[Server]:
    """A server that other tests use before and after; without agents."""
    server = shared_servers("tcp")
    yield server
    server.clear()


@pytest.fixture
def unix(shared: Server) -> Iterator[LineWire]:
    """The protocol by hand, over the Unix socket of the shared server."""
    with LineWire(shared.socket_path) as wire:
        yield wire
