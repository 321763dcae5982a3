"""Clients where they do not belong: two threads at once, after a fork, in another event loop, when the time is over.

Owns:    that each gives a sentence, or works, and that nothing hangs, mixes replies or stays behind.
Runs in: the test process, with a real server, and with one that takes connections and says nothing.
Unaware: of what is asked.
"""
from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from support import DEADLINE_SECS, MAIN, Server, clean_environ, wait_until, without_ssh

from agentserver import AgentClient, AsyncAgentClient
from agentserver.errors import LinkError, RequestError, RequestTimeout


@pytest.fixture
def silent(run_dir: Path) -> Iterator[str]:
    """The address of something that takes connections and says nothing."""
    path = run_dir / f"silent-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(100)
        yield f"unix:{path}"


def test_two_threads_at_once(silent: str) -> None:
    """The second is refused, with a sentence."""
    with AgentClient(silent, timeout=1.0) as client:
        late: list[RequestTimeout] = []

        def ask() -> None:
            try:
                client.health()
            except RequestTimeout as e:
                late.append(e)
        first = threading.Thread(target=ask)
        first.start()
        wait_until(lambda: not client._turn, what="the first to wait for its reply")
        with pytest.raises(RequestError, match="another thread"):
            client.health()
        first.join(DEADLINE_SECS)
        assert late
        with pytest.raises(RequestTimeout):
            client.health()


@pytest.mark.parametrize("link", ["unix", "tcp", "stdio"])
def test_after_a_fork_both_have_a_connection(shared: Server, link: str) -> None:
    code = """if True:
        import os, sys, agentserver
        client = agentserver.AgentClient(sys.argv[1], timeout=20)
        before = client.health().metadata["pid"]
        child = os.fork()
        good = all(client.health().metadata["pid"] == before for _ in range(20))
        if child == 0:
            os._exit(0 if good else 1)
        print(good, os.waitpid(child, 0)[1], client.health().healthy)
        client.close()
    """
    environ = {**clean_environ(shared.state_dir), **without_ssh(shared.mark)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, shared.address(link)], env=environ, text=True,
                          cwd=str(MAIN.parent.parent), capture_output=True, timeout=DEADLINE_SECS)
    assert (done.stdout, done.stderr) == ("True 0 True\n", "")


@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_an_event_loop_of_its_own_for_each_run(shared: Server, link: str) -> None:
    """After the end of one loop a client goes on in the next; two that live are refused."""
    if link == "tcp":
        pytest.importorskip("zmq")
    client = AsyncAgentClient(shared.address(link))

    async def ask() -> bool:
        try:
            return (await client.health()).healthy
        finally:
            await client.close()
    assert asyncio.run(ask()) and asyncio.run(ask())

    async def elsewhere() -> str:
        await client.health()
        errors = []

        def other() -> None:
            try:
                asyncio.run(ask())
            except RequestError as e:
                errors.append(str(e))
        thread = threading.Thread(target=other)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0.01)
        assert (await client.health()).healthy
        await client.close()
        return errors[0]
    assert "another event loop" in asyncio.run(elsewhere())


def test_timeouts_bound_the_whole(silent: str, twin: Any) -> None:
    """Not each of the requests that a call consists of."""
    began = time.monotonic()
    with twin(silent, timeout=1000) as client:
        for call in (lambda: client.wait("x", timeout=0.1), lambda: list(client.follow("x", timeout=0.1))):
            with pytest.raises(RequestTimeout):
                call()
    with twin(silent, timeout=1000, deadline=time.monotonic() + 0.2) as client:
        calls = (client.health, client.list, lambda: client.wait("x"), lambda: list(client.follow("x")),
                 lambda: list(client.follow_events()), lambda: client.spawn(["true"]),
                 lambda: client.batch("stop", ["a"]))
        for call in calls:
            with pytest.raises(RequestTimeout, match="time given"):
                call()
    assert time.monotonic() - began < 60


def test_a_server_that_says_little_at_a_time_gets_no_more_time(run_dir: Path, twin: Any) -> None:
    """One byte now and then is no answer."""
    path = str(run_dir / f"slow-{time.monotonic_ns()}")
    over = threading.Event()

    def trickle() -> None:
        with listener.accept()[0] as peer, contextlib.suppress(OSError):  # it hangs up
            while not over.wait(0.02):
                peer.send(b"{")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(10)
        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        began = time.monotonic()
        with twin(f"unix:{path}", timeout=0.5) as client, pytest.raises((RequestTimeout, LinkError)):
            client.health()
        assert time.monotonic() - began < 30
        over.set()
        thread.join()


@pytest.mark.parametrize("secs", [float("inf"), 1e20, 3e6])
@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_any_time_may_be_given(shared: Server, twin: Any, link: str, secs: float) -> None:
    """Also one that no system call can count."""
    with twin(shared.address(link), timeout=secs) as client:
        worker = client.spawn(["sh", "-c", "echo x"])
        assert client.wait(worker.id, timeout=secs)[0].exit.code == 0
        assert b"".join(what.data for _, _, what in client.follow(worker.id, timeout=secs)) == b"x\n"


def test_ctrl_c_in_a_wait_leaves_no_thread(shared: Server) -> None:
    """The client is as good as before, and the program ends at once."""
    code = """if True:
        import sys, threading, agentserver
        client = agentserver.AgentClient(sys.argv[1])
        worker = client.spawn(["sleep", "1000"])
        try:
            print("waiting", flush=True)
            client.wait(worker.id)
        except KeyboardInterrupt:
            print(threading.active_count(), client.health().healthy, worker.status)
        worker.kill()
    """
    for link in ("unix", "tcp"):
        with subprocess.Popen([sys.executable, "-W", "error", "-c", code, shared.address(link)], stdout=subprocess.PIPE,
                              env=clean_environ(shared.state_dir), cwd=str(MAIN.parent.parent), text=True) as process:
            assert process.stdout and process.stdout.readline() == "waiting\n"
            wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "S")
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "1 True running\n" and process.wait(DEADLINE_SECS) == 0
