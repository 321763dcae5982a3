"""The protocol spoken by hand: lines on the Unix socket or on pipes, frames on a ZeroMQ REQ socket.

Owns:    `LineWire`, `StdioWire` and `ZmqWire`, and what all can do with an agent; none of it uses our client library.
Runs in: the test process.
Unaware: of pytest and of how a server is started.

Every reply is checked for what the protocol promises of each reply: its type, its request id, and a sentence and a
known code where it failed.
"""
from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import uuid
from collections import deque
from typing import Any, Callable

import zmq
from support import DEADLINE_SECS, MAIN, agent, wait_until

from agentserver.errors import ERROR_CODES

Json = dict  # type: ignore[type-arg]

REPLIES = {
    "health_check_request": "health_check_response", "spawn_request": "spawn_response",
    "list_agents_request": "list_agents_response", "control_command": "command_response",
    "custom_action_request": "command_response", "batch_control_command": "batch_control_response",
    "output_query_request": "output_query_response",
    "stats_request": "stats_response", "events_request": "events_response",
    "subscribe_request": "subscribe_response", "shutdown_request": "shutdown_response",
    "reload_request": "reload_response",
}
TERMINAL = ("completed", "failed", "terminated")


def new_id() -> str:
    """Return a fresh request id."""
    return str(uuid.uuid4())


def refuse(name: str) -> Any:
    """Fail on NaN and Infinity, which are not JSON."""
    raise AssertionError(f"{name} in a reply")


def checked(reply: Json) -> Json:
    """Return `reply` if it is what every reply must be."""
    assert isinstance(reply, dict) and isinstance(reply.get("type"), str), reply
    assert "request_id" in reply and isinstance(reply.get("success"), bool), reply
    if not reply["success"]:
        assert reply.get("error_code") in ERROR_CODES, reply
        sentence = reply.get("error")
        assert isinstance(sentence, str) and len(sentence) > 10 and "Traceback" not in sentence, reply
    return reply


def data_of(chunk: Json) -> bytes:
    """Return the bytes of a read or of a `log_stream`."""
    if not chunk.get("data"):
        return b""
    if chunk.get("encoding") == "base64":
        return base64.b64decode(chunk["data"], validate=True)
    return str(chunk["data"]).encode("utf-8")


class Wire:
    """One connection and what can be asked over it."""

    def send(self, raw: bytes) -> None:
        """Send one message."""
        raise NotImplementedError

    def receive(self) -> bytes:
        """Return the next reply."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def raw(self, message: bytes) -> Json:
        """Send bytes as one message and return its one reply."""
        self.send(message)
        return checked(json.loads(self.receive(), parse_constant=refuse))

    def ask(self, kind: str, **fields: Any) -> Json:
        """Send a request and return the reply, which may be a failed one."""
        fields.setdefault("request_id", new_id())
        reply = self.raw(json.dumps({"type": kind, **fields}).encode())
        assert reply["request_id"] == fields["request_id"], reply
        assert reply["type"] == REPLIES.get(kind, "error_response"), reply
        return reply

    def ok(self, kind: str, **fields: Any) -> Json:
        """Send a request that has to succeed."""
        reply = self.ask(kind, **fields)
        assert reply["success"], reply
        return reply

    def refused(self, code: str, kind: str, **fields: Any) -> str:
        """Send a request that has to fail with `code`, and return the sentence."""
        reply = self.ask(kind, **fields)
        assert not reply["success"] and reply["error_code"] == code, reply
        return str(reply["error"])

    # ------------------------------------------------------------ agents

    def spawn(self, program: str, /, *args: object, ready: bool = True, **config: Any) -> str:
        """Spawn a program of tests/agents and return its id, once it has printed `ready`."""
        config.setdefault("command", agent(program, *map(str, args)))
        started: str = self.ok("spawn_request", config=config)["agent_info"]["id"]
        if ready:
            self.until_output(started, b"ready\n")
        return started

    def control(self, ref: str, command: str, **payload: Any) -> Json:
        """Give a command that has to succeed, and return its data."""
        reply = self.ok("control_command", agent_id=ref, command_type=command, payload=payload)
        assert "status" in reply and reply["agent_id"], reply
        data: Json = reply["data"]
        return data

    def cannot(self, code: str, ref: str, command: str, **payload: Any) -> str:
        """Give a command that has to fail with `code`."""
        return self.refused(code, "control_command", agent_id=ref, command_type=command, payload=payload)

    def info(self, ref: str) -> Json:
        """Return agent_info."""
        info: Json = self.control(ref, "inspect")["agent_info"]
        return info

    def status(self, ref: str) -> str:
        """Return the status by `get_status`."""
        return str(self.control(ref, "get_status")["status"])

    def agents(self, **fields: Any) -> list[Json]:
        """Return what list_agents_request says."""
        found: list[Json] = self.ok("list_agents_request", **fields)["agents"]
        return found

    def ended(self, ref: str) -> Json:
        """Return agent_info once the agent has ended."""
        wait_until(lambda: self.status(ref) in TERMINAL, what=f"the end of {ref}")
        return self.info(ref)

    def exit(self, ref: str) -> Json:
        """Return the exit record once the agent has ended."""
        record: Json = self.ended(ref)["exit"]
        return record

    def read(self, ref: str, stream: str = "stdout", **payload: Any) -> Json:
        """Read once."""
        return self.control(ref, f"read_{stream}", **payload)

    def so_far(self, ref: str, stream: str = "stdout", offset: int = 0) -> tuple[bytes, bool]:
        """Return all there is now from `offset`, and whether that is the end."""
        text = b""
        while True:
            chunk = self.read(ref, stream, offset=offset, max_bytes=1024 * 1024)
            data = data_of(chunk)
            assert len(data) == chunk["bytes"] and chunk["next_offset"] == chunk["offset"] + len(data), chunk
            assert chunk["dropped"] == chunk["offset"] - offset == 0, chunk
            text += data
            offset = chunk["next_offset"]
            if chunk["eof"] or not data:
                return text, chunk["eof"]

    def output(self, ref: str, stream: str = "stdout") -> bytes:
        """Return everything a stream ever held, once it has ended."""
        parts: list[bytes] = []

        def complete() -> bool:
            text, eof = self.so_far(ref, stream, sum(map(len, parts)))
            parts.append(text)
            return eof
        wait_until(complete, what=f"the end of {stream}")
        return b"".join(parts)

    def until_output(self, ref: str, needle: bytes, stream: str = "stdout") -> bytes:
        """Return the output once `needle` is in it."""
        def found() -> bytes:
            text, eof = self.so_far(ref, stream)
            assert needle in text or not eof, f"{ref} ended without {needle!r}: {text[-1000:]!r}"
            return text if needle in text else b""
        return wait_until(found, what=f"{needle!r} in {stream}")

    def lines(self, ref: str, count: int) -> list[str]:
        """Return the first `count` complete lines of stdout once they are there."""
        def enough() -> bytes:
            text, _ = self.so_far(ref)
            return text if text.count(b"\n") >= count else b""
        return wait_until(enough, what=f"{count} lines").decode().splitlines()[:count]


class LineWire(Wire):
    """JSON lines on a Unix socket; event lines go to `events`."""

    def __init__(self, path: object) -> None:
        self.events: deque[Json] = deque()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_SECS)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise
        self._file = self.socket.makefile("rb")

    def send(self, raw: bytes) -> None:
        """Send one line."""
        self.socket.sendall(raw + b"\n")

    def line(self) -> Json:
        """Return the next line, whatever it is."""
        raw = self._file.readline()
        assert raw.endswith(b"\n"), f"the connection was closed after {raw!r}"
        line: Json = json.loads(raw, parse_constant=refuse)
        return line

    def receive(self) -> bytes:
        """Return the next reply; keep the events before it."""
        while True:
            raw = self._file.readline()
            assert raw.endswith(b"\n"), f"the connection was closed after {raw!r}"
            line = json.loads(raw, parse_constant=refuse)
            if "topic" not in line:
                return raw
            self.events.append(line)

    def event(self, fits: Callable[[Json], bool] = lambda _: True) -> Json:
        """Return the next event that fits; drop those before it."""
        while True:
            event = self.events.popleft() if self.events else self.line()
            if fits(event):
                assert "topic" in event, event
                return event

    def subscribe(self, *topics: str, **fields: Any) -> Json:
        """Subscribe to topic prefixes."""
        return self.ok("subscribe_request", topics=list(topics), **fields)

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self.socket.close()


class StdioWire(LineWire):
    """JSON lines on the stdin and stdout of `agentserver stdio`."""

    def __init__(self, state_dir: str) -> None:
        self.events = deque()
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(DEADLINE_SECS)
        with theirs:
            self.process = subprocess.Popen([sys.executable, str(MAIN), "stdio", "--state-dir", state_dir],
                                            stdin=theirs, stdout=theirs)
        self._file = self.socket.makefile("rb")

    def close(self) -> None:
        """End stdin; the process has to follow."""
        super().close()
        self.process.wait(DEADLINE_SECS)


class ZmqWire(Wire):
    """One frame per message on a REQ socket."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(DEADLINE_SECS * 1000))
        self.socket.connect(endpoint)

    def send(self, raw: bytes) -> None:
        """Send one frame."""
        self.socket.send(raw)

    def receive(self) -> bytes:
        """Return the next reply, which is one frame."""
        frames = self.socket.recv_multipart()
        assert len(frames) == 1, frames
        return frames[0]

    def close(self) -> None:
        """Close socket and context."""
        self.socket.close()
        self.context.term()


def open_wire(address: str) -> Wire:
    """Return a wire to an address as `AgentClient` takes it."""
    if address.startswith("ssh://localhost/"):
        return StdioWire(address[len("ssh://localhost"):])
    return LineWire(address[5:]) if address.startswith("unix:") else ZmqWire(address)


# ---------------------------------------------------------------- facts about processes, from outside

def alive(pid: int) -> bool:
    """Whether a process exists and something of it can run: the kernel calls it a zombie when its main thread has
    ended, though other threads run."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(process_state(f"{pid}/task/{thread}") not in ("", "Z", "X") for thread in threads)


def process_state(pid: object) -> str:
    """Return the kernel's letter for the state of a process, or a thread; empty when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def states(pids: list[int]) -> set[str]:
    """Return the states of all of them."""
    return {process_state(pid) for pid in pids}


def child_environ(pid: int) -> dict[bytes, bytes]:
    """Return the environment a process was started with."""
    with open(f"/proc/{pid}/environ", "rb") as f:
        pairs = [item.partition(b"=") for item in f.read().split(b"\0") if item]
    return {name: value for name, _, value in pairs}


def here(*names: str) -> str:
    """Return a path inside tests/agents."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "agents", *names)
