"""Following, from outside: every byte and every event once and in order, whatever happens in between.

Owns:    shells killed each second, followers stopped and continued, high-water marks of 1, servers that go and
         come back, output past the cap; compared with what the agents wrote.
Runs in: the test process; servers, agents and followers (follower.py) are processes of their own.
Unaware: of how a follower does it: it uses the public client only.
"""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import DEADLINE_SECS, TESTS, Server, agent, clean_environ, wait_until
from wire import TERMINAL, LineWire

Json = dict  # type: ignore[type-arg]
FEW = "1"                # a high-water mark
MANY = "1000"
OVER_ZMQ = ("tcp", FEW)
LOCAL = ("unix", MANY)


class Follower:
    """One follower process."""

    def __init__(self, server: Server, link: str, hwm: str, *what: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "follower.py"), server.address(link), hwm, *map(str, what)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean_environ(server.state_dir))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == b"following\n", self.process.communicate()[1].decode()

    def send(self, number: int) -> None:
        """Signal it, if it is still there."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def told(self) -> Any:
        """Return what it has to say when it has seen everything."""
        out, error = self.process.communicate(timeout=2 * DEADLINE_SECS)
        assert self.process.returncode == 0, error.decode()
        return json.loads(out)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def follow() -> Iterator[Callable[..., Follower]]:
    """Start followers: `follow(server, link, hwm, "output", id, …)`."""
    with contextlib.ExitStack() as running:
        def start(*args: object) -> Follower:
            follower = Follower(*args)  # type: ignore[arg-type]
            running.callback(follower.close)
            return follower
        yield start


def written(sums: Path) -> dict[str, tuple[int, str]]:
    """Return size and hash of both streams, as an agent of lines.py left them."""
    size, digest, errors, of_errors = wait_until(lambda: sums.exists() and sums.read_text()).split()
    return {"stdout": (int(size), digest), "stderr": (int(errors), of_errors)}


def matches(told: Json, agents: dict[str, Path]) -> None:
    """Fail unless a follower was given just what the agents wrote."""
    for ref, sums in agents.items():
        for stream, (size, digest) in written(sums).items():
            account = told[f"{ref}.{stream}"]
            assert not account["wrong"] and not account["dropped"], (stream, account)
            assert (account["size"], account["sha256"]) == (size, digest), (stream, account, size)


def a_second_later() -> None:
    """Let the world go on for a second."""
    moment = time.monotonic() + 1.0
    wait_until(lambda: time.monotonic() >= moment)


def kill_shell(server: Server) -> None:
    """SIGKILL the shell that serves now, if there is one."""
    with contextlib.suppress(OSError, ValueError, ProcessLookupError):
        shell = server.pids().get("shell")
        if shell:
            os.kill(shell, signal.SIGKILL)


# ---------------------------------------------------------------- faults

def test_shells_die_followers_sleep_and_marks_are_one(start_server: Callable[..., Server], tmp_path: Path,
                                                      follow: Callable[..., Follower]) -> None:
    """The hash of what each follower was given is the hash of what each agent wrote; the events are all events."""
    server = start_server("--pub-hwm", FEW, "--status-update-interval-secs", "0.5")
    with LineWire(server.socket_path) as wire:
        agents = {}
        for rate in (300, 3000, 30_000):
            sums = tmp_path / f"sums-{rate}"
            agents[wire.spawn("lines", 0, rate, sums, stdin="null")] = sums
        last = wire.spawn("sleeper", name="the last")
        followers = [follow(server, *how, "output", *agents) for how in (OVER_ZMQ, LOCAL, OVER_ZMQ, LOCAL)]
        watchers = [follow(server, *how, "events", 0, last) for how in (OVER_ZMQ, LOCAL)]
        asleep = itertools.cycle([*followers, *watchers])
        for _ in range(6):
            sleeper = next(asleep)
            sleeper.send(signal.SIGSTOP)
            kill_shell(server)
            a_second_later()
            for ref in agents:
                wire.control(ref, "pause")
                wire.control(ref, "resume")
            sleeper.send(signal.SIGCONT)
        for ref in agents:
            wire.control(ref, "signal", signal="SIGTERM")
        for follower in followers:
            matches(follower.told(), agents)
        wire.control(last, "kill")
        wire.ended(last)
        history = wire.ok("events_request", limit=10_000)["events"]
        for watcher in watchers:
            assert watcher.told() == history, "no gap and nothing twice"


@pytest.mark.parametrize("how", [OVER_ZMQ, LOCAL, ("tcp", MANY)], ids=["few", "local", "many"])
def test_asleep_while_far_more_is_written_than_any_queue_holds(start_server: Callable[..., Server], tmp_path: Path,
                                                               follow: Callable[..., Follower],
                                                               how: tuple[str, str]) -> None:
    """One follower sleeps from the start to after the end; another one, which listens to the same, does not."""
    server = start_server("--backlog-bytes", "65536", "--pub-hwm", "10", "--status-update-interval-secs", "0.5")
    with LineWire(server.socket_path) as wire:
        sums = tmp_path / "sums"
        noisy = wire.spawn("", ready=False, command=[
            "/bin/sh", "-c", 'read x; exec "$@"', "sh", *agent("lines", "300000", "0", str(sums))])
        asleep, awake = follow(server, *how, "output", noisy), follow(server, *how, "output", noisy)
        asleep.send(signal.SIGSTOP)
        wire.control(noisy, "write_stdin", data="go\n")
        wire.ended(noisy)
        matches(awake.told(), {noisy: sums})
        asleep.send(signal.SIGCONT)
        matches(asleep.told(), {noisy: sums})


# ---------------------------------------------------------------- servers that go

def content(wire: LineWire, ref: str) -> Json:
    """Return size and hash of what a server has of an agent's output."""
    found = {}
    for stream in ("stdout", "stderr"):
        data = wire.output(ref, stream)
        found[f"{ref}.{stream}"] = (len(data), hashlib.sha256(data).hexdigest())
    return found


def everything_dies(server: Server) -> None:
    """SIGKILL keeper, core and shell at once; what they leave is reaped and closed."""
    for pid in server.pids().values():
        os.kill(pid, signal.SIGKILL)
    server.process.wait()


def it_is_told_to_stop(server: Server) -> None:
    """End it gracefully."""
    assert server.stop() == 0


@pytest.mark.parametrize("how", [OVER_ZMQ, LOCAL], ids=["zmq", "local"])
@pytest.mark.parametrize("goes", [everything_dies, it_is_told_to_stop])
def test_a_server_goes_and_comes_back(start_server: Callable[..., Server], tmp_path: Path,
                                      follow: Callable[..., Follower], how: tuple[str, str],
                                      goes: Callable[[Server], None]) -> None:
    """A follower goes on at its offset with what is kept, and ends where the stream ends."""
    server = start_server("--orphans", "kill")
    with LineWire(server.socket_path) as wire:
        noisy = wire.spawn("lines", 0, 20_000, tmp_path / "sums", stdin="null")
        follower = follow(server, *how, "output", noisy)
        wire.until_output(noisy, b"\n10000 ")
    goes(server)
    again = start_server(state_dir=server.state_dir, endpoint=server.endpoint, pub_endpoint=server.pub_endpoint)
    with LineWire(again.socket_path) as wire:
        assert wire.status(noisy) in TERMINAL
        told = follower.told()
        assert {topic: (account["size"], account["sha256"]) for topic, account in told.items()} == content(wire, noisy)
        assert not any(account["wrong"] or account["dropped"] for account in told.values())


@pytest.mark.parametrize("how", [OVER_ZMQ, LOCAL], ids=["zmq", "local"])
def test_events_across_the_ends_of_servers(start_server: Callable[..., Server], follow: Callable[..., Follower],
                                           how: tuple[str, str]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        last = wire.spawn("exit_with", 0)
        watcher = follow(server, *how, "events", wire.ok("events_request")["next"], last)
        wire.ended(wire.spawn("exit_with", 1))
    it_is_told_to_stop(server)
    for _ in range(2):
        server = start_server(state_dir=server.state_dir, endpoint=server.endpoint, pub_endpoint=server.pub_endpoint)
        with LineWire(server.socket_path) as wire:
            wire.ended(wire.spawn("exit_with", 2))
            everything_dies(server)
    server = start_server(state_dir=server.state_dir, endpoint=server.endpoint, pub_endpoint=server.pub_endpoint)
    with LineWire(server.socket_path) as wire:
        wire.control(last, "restart")
        told = watcher.told()
        history = wire.ok("events_request", since=told[0]["sequence"] - 1, limit=10_000)["events"]
        assert told == history[:len(told)] and told[-1]["agent_id"] == last
        assert [event["sequence"] for event in told] == list(range(told[0]["sequence"], told[-1]["sequence"] + 1))


# ---------------------------------------------------------------- past the cap

@pytest.mark.parametrize("how", [OVER_ZMQ, LOCAL, ("tcp", MANY)], ids=["few", "local", "many"])
def test_what_is_past_the_cap_is_one_explicit_drop(start_server: Callable[..., Server],
                                                   follow: Callable[..., Follower], how: tuple[str, str]) -> None:
    server = start_server("--output-cap-bytes", str(256 * 1024), "--backlog-bytes", "65536")
    with LineWire(server.socket_path) as wire:
        burst = wire.spawn("", ready=False, command=["/bin/sh", "-c", "echo ready; read x; seq 1 1000000"])
        wire.until_output(burst, b"ready\n")
        follower = follow(server, *how, "output", burst)
        reader = LineWire(server.socket_path)  # for it nothing waits in the file
        reader.subscribe(f"{burst}.stdout")
        follower.send(signal.SIGSTOP)
        wire.control(burst, "write_stdin", data="go\n")
        wire.ended(burst)
        reader.close()
        follower.send(signal.SIGCONT)
        account = follower.told()[f"{burst}.stdout"]
        span = wire.info(burst)["output"]["stdout"]
        assert not account["wrong"] and account["end"] == span["end_offset"]
        (drop,) = account["dropped"]
        assert drop[1] == span["first_offset"] and account["size"] == span["end_offset"] - (drop[1] - drop[0])
