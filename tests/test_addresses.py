"""What an address and a path mean, to server, client and command line alike.

Owns:    the checks of endpoints that clients are given, of `~`, of IPv6, of a deleted working directory.
Runs in: the test process, with real servers and commands.
Unaware: of what a server may listen on (test_config.py).
"""
from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from support import DEADLINE_SECS, MAIN, ROOT, Server, agent, clean_environ

from agentserver import AgentClient, ServerConfig, address, endpoint, paths
from agentserver.errors import ConfigError, LinkError


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def command(environ: dict[str, str], *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run([sys.executable, str(MAIN), *words], env=environ, stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, timeout=DEADLINE_SECS, **options)


# ---------------------------------------------------------------- endpoints

@pytest.mark.parametrize("given, host, port", [
    ("127.0.0.1:1", "127.0.0.1", 1), ("box.example:65535", "box.example", 65535), ("[::1]:5555", "::1", 5555),
    ("[fe80::1%eth0]:05555", "fe80::1%eth0", 5555), ("bücher.example:9", "bücher.example", 9)])
def test_places_that_can_be_connected_to(given: str, host: str, port: int) -> None:
    assert endpoint.tcp(given) == (host, port)
    assert endpoint.tcp(str(endpoint.tcp(given))[6:]) == (host, port)


#: what is wrong, and a word of what is said of it
WRONG = [
    ("127.0.0.1:65536", "65535"), ("127.0.0.1:70991", "65535"), ("127.0.0.1:0", "65535"), ("127.0.0.1:-1", "65535"),
    ("127.0.0.1:+5", "65535"), ("127.0.0.1:٣", "65535"), ("127.0.0.1:5５", "65535"), ("127.0.0.1:²", "65535"),
    ("127.0.0.1:1_0", "65535"), ("127.0.0.1: 5", "65535"), ("127.0.0.1:5\n", "65535"), ("127.0.0.1:", "65535"),
    ("127.0.0.1", "65535"), ("", "65535"), (":5555", "no host"), ("*:5555", "no host"), ("[]:5555", "no host"),
    ("::1:5555", "brackets"), ("[::1:5555", "brackets"), ("a b:5555", "is no host"), ("a/b:5555", "is no host"),
    ("127.0.0.1;127.0.0.1:5555", "is no host"), ("[127.0.0.1]:5555", "is no host"), ("a@b:5555", "is no host"),
    ("127.0.0.1:5555/", "65535"), ("127.0.0.1:" + "9" * 5000, "65535")]


@pytest.mark.parametrize("given, says", WRONG)
def test_what_cannot_be_connected_to_is_refused_at_once(twin: Any, given: str, says: str) -> None:
    pytest.importorskip("zmq")
    with pytest.raises(LinkError, match=says) as e:
        twin("tcp://" + given)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("given, says", [
    ("ipc://", "socket file"), ("ipc://*", "socket file"), ("ipc://@abstract", "socket file"), ("ipc:///a\0b", "NUL"),
    ("ipc:///" + "x" * 107, "107"), ("ssh://box:65536", "65535"), ("ssh://box:0", "65535"), ("ssh://box:٣", "65535"),
    ("ssh://box:-1", "65535"), ("unix:~nobody-of-this-name/x", "not known"),
    ("ipc://~nobody-of-this-name/x", "not known")])
def test_other_addresses_that_mean_nothing(twin: Any, given: str, says: str) -> None:
    pytest.importorskip("zmq")
    with pytest.raises((LinkError, ConfigError), match=says):
        twin(given)


def test_a_command_line_says_the_same_in_one_line(shared: Server) -> None:
    host, _, port = shared.endpoint.rpartition(":")
    done = command(clean_environ(shared.state_dir), "spawn", "--server", f"{host}:{int(port) + 65536}", "--", "true")
    assert done.returncode == 3 and "65535" in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
    assert shared.ask({"type": "list_agents_request", "all": True})["agents"] == [], "it reached nobody else"


@pytest.mark.parametrize("signal", ["²", "٣", "--5", "-", "1_0"])
def test_a_number_in_other_digits_is_no_signal(shared: Server, signal: str) -> None:
    done = command(clean_environ(shared.state_dir, {"AGENTSERVER_SERVER": shared.address("unix")}),
                   "signal", "--", signal, "nobody")
    assert done.returncode in (1, 4) and "internal" not in done.stderr


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_ipv6(start_server: Callable[..., Server], twin: Any) -> None:
    """Requests, and following what is published."""
    pytest.importorskip("zmq")
    server = start_server(endpoint="tcp://[::1]:0", pub_endpoint="tcp://[::1]:0")
    assert server.endpoint.startswith("tcp://[::1]:") and server.pub_endpoint.startswith("tcp://[::1]:")
    with twin(server.endpoint, timeout=DEADLINE_SECS) as client:
        worker = client.spawn(agent("exit_with", "7"))
        chunks = [what.data for _, stream, what in client.follow(worker.id) if stream == "stdout"]
        assert b"".join(chunks) == b"ready\n" and client.wait(worker.id)[0].exit.code == 7
    port = int(server.endpoint.rpartition(":")[2])
    with twin(f"tcp://[0:0::1]:{port}") as client:
        assert client.health().healthy, "another spelling"


def test_a_name_is_tried_at_all_its_addresses(shared: Server) -> None:
    """`localhost` may be ::1 first, where nobody listens."""
    pytest.importorskip("zmq")
    with AgentClient(f"tcp://localhost:{shared.endpoint.rpartition(':')[2]}") as client:
        assert client.health().healthy


def test_a_name_that_is_not_looked_up_in_time(monkeypatch: pytest.MonkeyPatch, twin: Any) -> None:
    """getaddrinfo(3) has no deadline of its own."""
    pytest.importorskip("zmq")
    ask = socket.getaddrinfo

    def slow(*given: Any, **named: Any) -> Any:
        if named.get("flags"):
            return ask(*given, **named)
        time.sleep(60)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    began = time.monotonic()
    with twin("tcp://box.invalid:5555", timeout=0.2) as client, pytest.raises(Exception, match="in time|within"):
        client.health()
    assert time.monotonic() - began < 30


# ---------------------------------------------------------------- paths

def test_home_is_found_in_every_place(start_server: Callable[..., Server], state_dir: Path) -> None:
    """A server in `~/kept`, however it was told so, is the one that clients, `stdio` and `doctor` mean by it."""
    home, kept = state_dir, state_dir / "kept"
    server = start_server(state_dir=kept, environ={"HOME": str(home)})
    environ = clean_environ(kept, {"HOME": str(home), "AGENTSERVER_STATE_DIR": "~/kept"})
    for words in (["health"], ["health", "--server", "unix:~/kept"], ["health", "--server", "unix:~/kept/core.sock"]):
        assert str(kept) in command(environ, *words).stdout
    asked = '{"type": "health_check_request", "request_id": "1"}\n'
    for flags in ([], ["--state-dir", "~/kept"]):
        done = subprocess.run([sys.executable, str(MAIN), "stdio", *flags], input=asked, env=environ, text=True,
                              capture_output=True, timeout=DEADLINE_SECS)
        assert str(kept) in done.stdout
    assert f"{kept}" in command(environ, "doctor").stdout
    refused = command({**environ, "AGENTSERVER_ENDPOINT": "tcp://127.0.0.1:0"}, "serve")
    assert refused.returncode == 1 and f"{kept} is already served" in refused.stderr
    code = "import agentserver; print(agentserver.AgentClient().health().metadata['state_dir'])"
    done = subprocess.run([sys.executable, "-c", code], env=environ, text=True, capture_output=True, cwd=str(ROOT))
    assert done.stdout.strip() == str(kept) == server.metadata["state_dir"], done.stderr


def test_the_state_directory_is_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HOME": "/home/u", "AGENTSERVER_STATE_DIR": "~/kept"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert paths.state_dir(environ) == "/home/u/kept"
    assert address.default_address(environ) == address.DEFAULT_ENDPOINT
    assert ServerConfig().resolved("/w").state_dir == "/home/u/kept"
    assert ServerConfig(state_dir="~/other").resolved("/w").state_dir == paths.state_dir(environ, "~/other")


def test_a_home_that_is_not_known_is_said() -> None:
    with pytest.raises(ConfigError, match="~nobody-of-this-name"):
        ServerConfig(state_dir="~nobody-of-this-name/x").resolved("/w")
    assert paths.expanded("./~x") == "./~x" and paths.expanded("a/~") == "a/~"


def test_in_a_directory_that_was_deleted(shared: Server, run_dir: Path) -> None:
    """What needs no working directory works; what does says so."""
    environ = clean_environ(shared.state_dir, {"AGENTSERVER_SERVER": shared.address("unix")})

    def there(*words: str) -> "subprocess.CompletedProcess[str]":
        script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
        return subprocess.run(["/bin/sh", "-c", script, "sh", sys.executable, str(MAIN), *words], env=environ,
                              text=True, capture_output=True, stdin=subprocess.DEVNULL, cwd=str(run_dir),
                              timeout=DEADLINE_SECS)
    for words in (["ps"], ["health"], ["spawn", "--cwd", "/", "--", "true"], ["run", "--cwd", "/", "--", "true"]):
        done = there(*words)
        assert done.returncode == 0, (words, done)
    for words in (["serve", "--state-dir", str(run_dir / "new")], ["spawn", "--", "true"],
                  ["serve", "--state-dir", "relative"]):
        done = there(*words)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, (words, done)
        assert "directory" in done.stderr and "internal" not in done.stderr
    assert there("doctor").returncode in (0, 1) and not os.path.exists(run_dir / "new")
