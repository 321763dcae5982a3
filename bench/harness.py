"""A server to measure, raw clients to measure it with, and how to sum up what was measured.

Owns:    starting `agentserver serve` in a directory of its own and ending it; the raw clients; percentiles.
Runs in: the benchmark process.
Unaware: of what is measured, and of agentserver's code: it uses the command line and the protocol only.
"""
from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import zmq

TREE = Path(__file__).resolve().parent.parent
_ids = itertools.count(1)
_RUN = os.urandom(4).hex()


class BenchError(Exception):
    """A benchmark could not be run; the sentence says why."""


def until(ready: Callable[[], Any], secs: float, what: str) -> Any:
    """Return the first true value of `ready()`, asked every millisecond, or raise after `secs`."""
    deadline = time.monotonic() + secs
    while True:
        value = ready()
        if value:
            return value
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: nothing after {secs:g} s")
        time.sleep(0.001)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def request(kind: str, **fields: Any) -> bytes:
    """Return a request as bytes, with an id of its own."""
    return json.dumps({"type": kind, "request_id": f"bench-{_RUN}-{next(_ids)}", **fields}).encode()


# ---------------------------------------------------------------- raw clients

class ZmqClient:
    """One REQ socket and nothing else."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 1)
        self._socket.setsockopt(zmq.RCVTIMEO, 60_000)
        self._socket.connect(endpoint)

    def ask(self, message: bytes) -> bytes:
        self._socket.send(message)
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close()


class UnixClient:
    """One stream socket; a reply ends where its line ends."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._socket.settimeout(None)
        self._recv = self._socket.recv

    def ask(self, message: bytes) -> bytes:
        self._socket.sendall(message + b"\n")
        return self.line()

    def line(self) -> bytes:
        data = self._recv(1 << 16)
        if data.endswith(b"\n"):
            return data
        parts = [data]
        while data and not data.endswith(b"\n"):
            data = self._recv(1 << 20)
            parts.append(data)
        if not data:
            raise BenchError("the server closed the connection")
        return b"".join(parts)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class Subscriber:
    """Events over the Unix socket, one at a time; several may come in one piece."""

    def __init__(self, path: str, topics: List[str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(path)
        self._file = self._socket.makefile("rb")
        self._socket.sendall(request("subscribe_request", topics=topics) + b"\n")
        self._kept: List[Dict[str, Any]] = []
        while "topic" in (message := json.loads(self._file.readline())):
            self._kept.append(message)
        expect(message)

    def next(self) -> Dict[str, Any]:
        if self._kept:
            return self._kept.pop(0)
        line = self._file.readline()
        if not line:
            raise BenchError("the server closed the subscription")
        message: Dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def expect(reply: Any) -> Dict[str, Any]:
    """Return a reply as an object, or say what the server said instead."""
    obj: Dict[str, Any] = json.loads(reply) if isinstance(reply, bytes) else reply
    if not obj.get("success"):
        raise BenchError(f"{obj.get('type')}: {obj.get('error_code')}: {obj.get('error')}")
    return obj


# ---------------------------------------------------------------- the server

class Server:
    """`agentserver serve` in a temporary directory on free ports; a context manager."""

    def __init__(self, **settings: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="asbench-"))
        self.state_dir = self.directory / "state"
        self.path = str(self.state_dir / "core.sock")
        self._settings = {"endpoint": "tcp://127.0.0.1:0", "pub_endpoint": "tcp://127.0.0.1:0",
                          "max_agents": 1100, **settings}
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._client: Optional[UnixClient] = None
        self.metadata: Dict[str, str] = {}

    def launch(self) -> None:
        """Start the process; do not wait for it."""
        flags = [word for name, value in self._settings.items()
                 for word in ("--" + name.replace("_", "-"), str(value))]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AGENTSERVER_")}
        environ["PYTHONPATH"] = str(TREE)
        with open(self.directory / "serve.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentserver", "serve", "--state-dir", str(self.state_dir), *flags],
                cwd=self.directory, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

    def __enter__(self) -> "Server":
        self.launch()
        try:
            until(self._answers, 20, "agentserver serve did not answer")
        except BaseException:
            print((self.directory / "serve.log").read_text(errors="replace"), file=sys.stderr)
            self.__exit__()
            raise
        return self

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise BenchError("agentserver serve ended: "
                             + (self.directory / "serve.log").read_text(errors="replace").strip())
        try:
            self.metadata = self.health()["metadata"]
        except (OSError, BenchError):
            return False
        return self.metadata.get("endpoint", "").startswith("tcp://")

    def __exit__(self, *_exc: object) -> None:
        self.close_client()
        if self._process is not None:
            self._end(self._process)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        """Ask it to end; after a while, end what is left of the processes that this object started."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                print("bench: the server did not end on SIGTERM within 40 s; killing it", file=sys.stderr)
                process.kill()
                process.wait()
        for name in ("core_pid", "shell_pid"):
            pid = int(self.metadata.get(name, 0))
            if pid > 1 and str(self.state_dir) in os.fsdecode(_read(f"/proc/{pid}/environ")
                                                             + _read(f"/proc/{pid}/cmdline")):
                os.kill(pid, signal.SIGKILL)

    # -- asking

    @property
    def client(self) -> UnixClient:
        if self._client is None:
            self._client = UnixClient(self.path)
        return self._client

    def close_client(self) -> None:
        """Forget the connection; the next question opens a new one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def ask(self, kind: str, **fields: Any) -> Dict[str, Any]:
        return expect(self.client.ask(request(kind, **fields)))

    def control(self, agent: str, command: str, **payload: Any) -> Dict[str, Any]:
        reply = self.ask("control_command", agent_id=agent, command_type=command, payload=payload)
        data: Dict[str, Any] = reply.get("data") or {}
        return data

    def health(self) -> Dict[str, Any]:
        return self.ask("health_check_request")

    def spawn(self, argv: Sequence[str], **config: Any) -> str:
        reply = self.ask("spawn_request", config={"command": list(argv), **config})
        identity: str = reply["agent_info"]["id"]
        return identity

    def spawn_many(self, count: int, argv: Sequence[str] = ("sleep", "1000"), **config: Any) -> List[str]:
        return [self.spawn(argv, **config) for _ in range(count)]

    def kill(self, agents: Sequence[str]) -> None:
        """End these agents and forget them."""
        for start in range(0, len(agents), 200):
            self.ask("batch_control_command", command_type="kill", agent_ids=list(agents[start:start + 200]))
        until(lambda: self.health()["active_agents"] == 0, 60, "killed agents did not end")

    @property
    def endpoint(self) -> str:
        return self.metadata["endpoint"]

    @property
    def pub_endpoint(self) -> str:
        return self.metadata["pub_endpoint"]

    def pids(self) -> Dict[str, int]:
        """Return the processes of the server by their job, as they are now."""
        metadata = self.health()["metadata"]
        return {"keeper": int(metadata["pid"]), "core": int(metadata["core_pid"]), "shell": int(metadata["shell_pid"])}


# ---------------------------------------------------------------- what the kernel knows

def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def memory(pid: int) -> Dict[str, float]:
    """Return RSS and PSS of a process, and the peak of its RSS, in KiB."""
    names, found = {"Rss": "rss", "Pss": "pss", "VmHWM": "peak"}, {}
    for line in (_read(f"/proc/{pid}/smaps_rollup") + _read(f"/proc/{pid}/status")).decode().splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[names[name]] = float(rest.split()[0])
    if "rss" in found:
        found.setdefault("pss", found["rss"])  # only root may look into a part of the server: at most so much
    return found


def cpu_ticks(pid: int) -> int:
    """Return user and system time of a process in clock ticks."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
    return int(fields[11]) + int(fields[12])


def cpu_nanoseconds(pid: int) -> int:
    """Return the time that all threads of a process have run, to the nanosecond."""
    return sum(int(_read(f"/proc/{pid}/task/{task}/schedstat").split()[0]) for task in os.listdir(f"/proc/{pid}/task"))


def scratch_file(directory: Path, size: int) -> Path:
    """Return a file of `size` random bytes (not UTF-8, not repeating within 1 MiB)."""
    path = directory / f"data-{size}"
    if not path.exists():
        block = os.urandom(1 << 20)
        with open(path, "wb") as file:
            for index in range(0, size, len(block)):
                file.write((index.to_bytes(8, "big") + block[8:])[:size - index])
    return path
