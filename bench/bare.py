"""The raw limits: nothing but the mechanism itself, in as few lines as Python needs.

Owns:    the bases that agentserver is measured against.
Runs in: the benchmark process, or (`rep`) a process of its own: `python bare.py rep FILE`.
Unaware: of agentserver.
"""
from __future__ import annotations

import json
import os
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

#: says that it is there, waits for the end of its stdin, then says when it ended
LAST_WORDS = (sys.executable, "-S", "-E", "-c", "import os, time; os.write(1, b'ready\\n'); os.read(0, 1); "
                                                "os.write(1, b'%d' % time.monotonic_ns()); os._exit(0)")
READY = 6  # bytes of it that come first
CHUNK = 65536
SETTLE_SECS = 0.1  # for programs that were started to come to their first wait


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="asbench-") as directory:
        yield Path(directory)


# ---------------------------------------------------------------- requests

#: as large as a real reply to a health check
SAMPLE = {"type": "health_check_response", "request_id": "1", "success": True, "healthy": True,
          "protocol_version": "1.0.0", "uptime_secs": 12.345678, "active_agents": 0,
          "metadata": {"server_id": "agentserver", "endpoint": "tcp://127.0.0.1:5555",
                       "pub_endpoint": "tcp://127.0.0.1:5556", "max_agents": "100", "version": "0.1.0",
                       "hostname": "localhost", "pid": "1234", "shell_pid": "1236", "core_pid": "1235",
                       "generation": "1"}}


@contextmanager
def sample(reply: Any = None) -> Iterator[str]:
    """Give a file that holds the reply to build."""
    with scratch() as directory:
        (directory / "reply.json").write_text(json.dumps(reply or SAMPLE))
        yield str(directory / "reply.json")


def rep(sample: str) -> None:
    """A REP loop that parses each request and builds a reply of the size of `sample`."""
    import zmq
    reply = json.loads(Path(sample).read_bytes())
    encode = json.JSONEncoder(separators=(",", ":")).encode
    threading.Thread(target=lambda: os._exit(len(sys.stdin.read())), daemon=True).start()
    socket = zmq.Context().socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    while True:
        asked = json.loads(socket.recv())
        reply["request_id"] = asked["request_id"]
        socket.send(encode(reply).encode())


class Served:
    """A loop of one of these files in a process of its own, until the end of its stdin; gives its endpoint."""

    def __init__(self, file: str, *arguments: str) -> None:
        self._file, self._arguments = file, arguments  # the latter: the name of the loop, and what that takes

    def __enter__(self) -> str:
        file = Path(__file__).with_name(f"{self._file}.py")
        self._process = subprocess.Popen([sys.executable, str(file), *self._arguments],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def __exit__(self, *_exc: object) -> None:
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


# ---------------------------------------------------------------- processes

def popen(argv: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start a program the way an agent is started: three pipes, a session of its own."""
    return subprocess.Popen(list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def discard(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End what `popen` started."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


def exit_notice() -> float:
    """Return the seconds from a program's end to its notice by pidfd."""
    child = popen(LAST_WORDS)
    assert child.stdin is not None and child.stdout is not None
    handle = os.pidfd_open(child.pid)
    os.read(child.stdout.fileno(), READY)
    child.stdin.close()
    select.select([handle], [], [])
    seen = time.monotonic_ns()
    said = int(os.read(child.stdout.fileno(), 64))
    os.close(handle)
    child.stdin = None
    child.communicate()
    return (seen - said) / 1e9


# ---------------------------------------------------------------- capture

def _read_write(pipe: int, file: int) -> int:
    data = os.read(pipe, CHUNK)
    return os.write(file, data) if data else 0


def _splice(pipe: int, file: int) -> int:
    return os.splice(pipe, file, CHUNK)


def _movers() -> Dict[str, Callable[[int, int], int]]:
    found: Dict[str, Callable[[int, int], int]] = {"read/write": _read_write}
    if hasattr(os, "splice"):
        found["splice"] = _splice
    return found


MOVERS = _movers()


def warm(directory: Path, size: int) -> None:
    """Fill and free the page cache once: the first touch of a virtual machine's memory costs ten times a later one."""
    with open(directory / "warm", "wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(bytes(1 << 20))
    (directory / "warm").unlink()


def gated(path: Path) -> List[str]:
    """Return a program that prints a file when its stdin is closed, so that starting it is not what is measured."""
    return ["sh", "-c", 'read go; exec cat "$0"', str(path)]


def capture(argv: Sequence[str], count: int, directory: Path, move: Callable[[int, int], int]) -> float:
    """Return the seconds from the go to the end of file of `count` gated programs whose output goes to files."""
    files = [os.open(directory / f"out-{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
             for index in range(count)]
    children = [popen(argv) for _ in range(count)]
    time.sleep(SETTLE_SECS)
    began = time.monotonic()
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
        child.stdin = None
    if count == 1:
        assert children[0].stdout is not None
        pipe = children[0].stdout.fileno()
        while move(pipe, files[0]):
            pass
    else:
        _capture_many(children, files, move)
    took = time.monotonic() - began
    for child, file in zip(children, files):
        child.communicate()
        os.close(file)
    return took


def _capture_many(children: List["subprocess.Popen[bytes]"], files: List[int],
                  move: Callable[[int, int], int]) -> None:
    with selectors.DefaultSelector() as selector:
        for child, file in zip(children, files):
            assert child.stdout is not None
            selector.register(child.stdout.fileno(), selectors.EVENT_READ, file)
        while selector.get_map():
            for key, _mask in selector.select():
                if not move(key.fd, key.data):
                    selector.unregister(key.fd)


if __name__ == "__main__":
    {"rep": rep}[sys.argv[1]](*sys.argv[2:])
