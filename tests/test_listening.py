"""Between two shells: the addresses are neither closed nor free.

Owns:    the listening sockets that the keeper holds while a shell is dead, replaced, or starting.
Runs in: the test process; it signals only the shells of servers that it started.
Unaware: of requests and of what a shell does with who came meanwhile.
"""
from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Callable

import pytest
from support import Server, wait_until
from test_faults import back, zmq_answers
from test_reload import copied
from test_survival import by_request, reload
from wire import alive

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def call(endpoint: str) -> None:
    """Connect as any program would; raise `OSError` when nobody listens."""
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_UNIX if scheme == "ipc" else socket.AF_INET, socket.SOCK_STREAM) as caller:
        caller.settimeout(10)
        caller.connect(address if scheme == "ipc" else (host, int(port)))


def call_without_shell(server: Server) -> None:
    """Call both addresses while there is no shell: it is killed, and the keeper cannot start another meanwhile."""
    shell = server.pids()["shell"]
    server.process.send_signal(signal.SIGSTOP)
    try:
        os.kill(shell, signal.SIGKILL)
        # its sockets are closed by the last of its threads, after the first has become a zombie
        wait_until(lambda: not alive(shell) and os.listdir(f"/proc/{shell}/task") == [str(shell)], what="its death")
        for endpoint in (server.endpoint, server.pub_endpoint):
            call(endpoint)
    finally:
        server.process.send_signal(signal.SIGCONT)
    back(server, "shell", shell)
    assert zmq_answers(server.endpoint)


def ends(kind: str, state_dir: Path) -> dict[str, str]:
    return {"endpoint": f"ipc://{state_dir}.req", "pub_endpoint": f"ipc://{state_dir}.pub"} if kind == "ipc" else {}


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_nobody_is_refused_while_a_shell_is_dead(kind: str, start_server: Callable[..., Server],
                                                 state_dir: Path) -> None:
    server = start_server(state_dir=state_dir, **ends(kind, state_dir))
    held = set()
    for _ in range(3):
        call_without_shell(server)
        held.add(len(os.listdir(f"/proc/{server.process.pid}/fd")))
    assert len(held) == 1, "the keeper holds each socket once"


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_nobody_is_refused_in_a_reload(kind: str, start_server: Callable[..., Server], state_dir: Path) -> None:
    server = start_server(state_dir=state_dir, **ends(kind, state_dir))
    over, refused, called = threading.Event(), [], [0]

    def come() -> None:
        while not over.wait(0.005):  # as many as the queue has room for
            try:
                call(server.endpoint)
                call(server.pub_endpoint)
                called[0] += 1
            except OSError as e:
                refused.append(e)
    coming = threading.Thread(target=come)
    coming.start()
    try:
        for _ in range(3):
            shell, before = server.pids()["shell"], called[0]
            reload(server, by_request)
            back(server, "shell", shell)
            wait_until(lambda n=before: refused or called[0] > n)
    finally:
        over.set()
        coming.join()
    assert not refused, refused[0]


def test_a_keeper_that_became_its_new_code_holds_them_still(start_server: Callable[..., Server],
                                                            run_dir: Path) -> None:
    package, told = copied(run_dir / "renewed-held"), run_dir / "renewed-held" / "told"
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    with open(package / "core" / "keeper.py", "a") as file:
        file.write(f"\nopen({str(told)!r}, 'a').write('%d\\n' % os.getpid())\n")
    shell = server.pids()["shell"]
    reload(server, by_request)
    wait_until(lambda: told.exists() and f"{server.process.pid}\n" in told.read_text(), what="the new keeper")
    back(server, "shell", shell)
    call_without_shell(server)


@pytest.mark.parametrize("old, older", [
    ("left_behind(hello)", "(None, None)"),
    ('"files": files,', "")], ids=["takes none", "gives none"])
def test_a_shell_that_knows_nothing_of_this_serves_too(old: str, older: str, start_server: Callable[..., Server],
                                                       run_dir: Path) -> None:
    """After a reload to an older version; it finds the address taken by what the keeper holds, once."""
    package = copied(run_dir / f"older-{len(older)}")
    server = start_server(program=[sys.executable, str(package / "__main__.py")], environ={"PYTHONPATH": ""})
    child = package / "shell" / "child.py"
    assert child.read_text().count(old) == 1
    child.write_text(child.read_text().replace(old, older))
    for _ in range(2):
        shell = server.pids()["shell"]
        os.kill(shell, signal.SIGKILL)
        back(server, "shell", shell)
        assert zmq_answers(server.endpoint)


def test_a_socket_whose_file_is_gone_is_made_anew(start_server: Callable[..., Server], state_dir: Path) -> None:
    """A program that cleans up took it away: whoever goes on listening there is found by nobody."""
    server = start_server(state_dir=state_dir, **ends("ipc", state_dir))
    paths = [Path(server.endpoint[6:]), Path(server.pub_endpoint[6:])]
    for path in paths:
        path.unlink()
    shell = server.pids()["shell"]
    os.kill(shell, signal.SIGKILL)
    back(server, "shell", shell)
    assert zmq_answers(server.endpoint)
    call(server.pub_endpoint)
    assert server.stop() == 0
    assert not any(path.exists() for path in paths)
