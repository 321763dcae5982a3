"""What the server survives: nonsense from clients, and SIGKILL.

Owns:    the benchmarks `malformed` and `killed`.
Runs in: the benchmark process.
Unaware: of how the server does it.
"""
from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Dict, List

from caller import open_client
from harness import BenchError, Server, UnixClient, memory, request, until
from table import Benchmark, Figures, Row, least, most

MESSAGES: List[bytes] = [
    b"", b" ", b"\x00", b"{", b"}", b"[]", b"[1]", b"null", b"true", b"1", b"1e999", b'"text"', b"{}", b"NaN",
    b"\xff\xfe", b"\xf0\x28\x8c\x28", b'{"type"}', b'{"type":1}', b'{"type":null}', b'{"type":"x"}',
    b'{"type":"health_check_request"}', b'{"type":"health_check_request","request_id":1}',
    b'{"type":"health_check_request","request_id":""}', b'{"type":"health_check_request","request_id":"a"} x',
    b'{"type":"health_check_request","request_id":"' + b"a" * 1000 + b'"}',
    b'{"type":"nothing_request","request_id":"a"}', b'{"request_id":"a"}',
    b'{"type":"spawn_request","request_id":"a"}', b'{"type":"spawn_request","request_id":"a","config":1}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":"ls"}}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":[]}}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":[""]}}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":["a\\u0000b"]}}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":["/nowhere/at/all"]}}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":["ls"],"cwd":"/nowhere"}}',
    b'{"type":"spawn_request","request_id":"a","config":{"command":["ls"],"environment":{"A":1}}}',
    b'{"type":"spawn_request","request_id":"a","config":{"model_backend":"unheard of"}}',
    b'{"type":"control_command","request_id":"a"}',
    b'{"type":"control_command","request_id":"a","agent_id":"none","command_type":"stop"}',
    b'{"type":"control_command","request_id":"a","agent_id":"none","command_type":"fly"}',
    b'{"type":"batch_control_command","request_id":"a","command_type":"stop"}',
    b'{"type":"list_agents_request","request_id":"a","limit":-1}',
    b'{"type":"list_agents_request","request_id":"a","filter_status":"happy"}',
    b'{"type":"events_request","request_id":"a","since":NaN}',
    b'{"type":"events_request","request_id":"a","since":1e400}',
    b"[" * 100_000, b'{"a":' * 10_000, b'{"type":"x","request_id":"\\ud800"}', b"x" * 1_000_000,
]
TOO_LARGE = b'{"type":"health_check_request","request_id":"' + b"a" * (10_500 * 1024) + b'"}'
HUGE = 50_000_000


def mutated(count: int) -> List[bytes]:
    """Return real requests with some bytes changed, the same ones each time."""
    dice = random.Random(7)
    real = [request("health_check_request"), request("list_agents_request", limit=3), request("stats_request"),
            request("control_command", agent_id="nobody", command_type="write_stdin", payload={"data": "x"})]
    found = []
    for _ in range(count):
        message = bytearray(dice.choice(real))
        for _ in range(dice.randint(1, 4)):
            message[dice.randrange(len(message))] = dice.randrange(256)
        found.append(bytes(message).replace(b"\n", b" "))
    return found


class Malformed(Benchmark):
    """Broken, hostile, oversized and mutated messages: is each answered, and does memory stay flat?"""

    name = "malformed"
    about = "malformed messages: all answered, memory flat"
    runs = 1
    count = 2000
    rows = (
        Row("answered", "malformed messages answered", "%", "", least(100)),
        Row("messages", "  how many were sent, over both links", "n"),
        Row("growth", "memory growth over the second half", "MiB", "", most(2)),
        Row("huge", "peak memory growth for one line of 50 MB", "MiB", "", most(32)),
    )

    def ours(self) -> Figures:
        messages = MESSAGES + mutated(self.count)
        with Server() as server:
            huge = self._huge(server)  # first: a peak can be measured only once
            answered = sum(self._send(address, messages) for address in (server.endpoint, server.path))
            before = _rss(server)
            answered += sum(self._send(address, messages) for address in (server.endpoint, server.path))
            growth = _rss(server) - before
            answered += self._too_large(server)
            return {"answered": answered / (4 * len(messages) + 2) * 100, "messages": 4 * len(messages) + 2,
                    "growth": growth / 1024, "huge": huge / 1024}

    @staticmethod
    def _send(address: str, messages: List[bytes]) -> int:
        client = open_client(address)
        answered = 0
        for message in messages:
            reply = json.loads(client.ask(message))
            answered += "success" in reply
        client.close()
        return answered

    def _too_large(self, server: Server) -> int:
        return sum(self._send(address, [TOO_LARGE]) for address in (server.endpoint, server.path))

    def _huge(self, server: Server) -> float:
        """Send one line that nobody may keep; return by how much the core's peak memory grew."""
        core = server.pids()["core"]
        before = _peak(core)
        reply = json.loads(UnixClient(server.path).ask(b"x" * HUGE))
        if reply.get("error_code") != "message_too_large":
            raise BenchError(f"a line of 50 MB was answered with {reply}")
        return _peak(core) - before


def _rss(server: Server) -> float:
    return sum(memory(pid)["rss"] for pid in server.pids().values())


def _peak(pid: int) -> float:
    """Return the most memory a process has ever had, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0])


class Killed(Benchmark):
    """SIGKILL of one process of ours with 20 agents at work: how many go on, and how soon is there an answer?"""

    name = "killed"
    about = "SIGKILL of shell, core, keeper: what happens to 20 agents"
    runs = 1
    agents = 20
    rows = (
        Row("shell", "agents that go on when the shell is SIGKILLed", "of 20", "", least(20)),
        Row("core", "agents that go on when the core is SIGKILLed", "of 20", "", least(20)),
        Row("keeper", "agents that go on when the keeper is SIGKILLed", "of 20", "", least(20)),
        Row("shell_back", "shell SIGKILLed → answer to a waiting ZeroMQ client", "ms"),
        Row("core_back", "core SIGKILLed → answer to a waiting ZeroMQ client", "ms"),
    )

    def ours(self) -> Figures:
        return {**self._kill("shell"), **self._kill("core"), **self._kill("keeper")}

    def _kill(self, who: str) -> Figures:
        with Server() as server:
            server.spawn_many(self.agents)
            pids = [agent["pid"] for agent in server.ask("list_agents_request")["agents"]]
            starts = {pid: _started(pid) for pid in pids}
            parts = server.pids()
            victim = parts[who]
            os.kill(victim, signal.SIGKILL)
            try:
                return {**self._back(server, who, victim), who: _alive(starts)}
            finally:
                for pid, started in starts.items():
                    if started and _started(pid) == started:
                        os.kill(pid, signal.SIGKILL)
                if who == "keeper":  # nobody else would end the two that it left
                    server.ask("shutdown_request")
                    until(lambda: not any(os.path.exists(f"/proc/{parts[part]}") for part in ("core", "shell")), 30,
                          "core and shell are still there without their keeper")

    def _back(self, server: Server, who: str, victim: int) -> Figures:
        """Wait for an answer from the successor; return after how many ms it came."""
        if who == "keeper":
            return {}
        began = time.monotonic()
        server.close_client()
        until(lambda: _successor(server, who, victim), 30, f"no answer after SIGKILL of the {who}")
        return {f"{who}_back": (time.monotonic() - began) * 1e3}


def _successor(server: Server, who: str, victim: int) -> bool:
    """Ask over ZeroMQ with a socket of its own; say whether another process than the victim is there."""
    client = open_client(server.endpoint)
    try:
        metadata: Dict[str, str] = json.loads(client.ask(request("health_check_request"))).get("metadata", {})
    finally:
        client.close()
    server.metadata = metadata or server.metadata
    return metadata.get(f"{who}_pid", str(victim)) != str(victim)


def _started(pid: int) -> bytes:
    """Return the start time of a process, b"" if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return b""
    return b"" if fields[0] == b"Z" else fields[19]


def _alive(starts: Dict[int, bytes]) -> int:
    return sum(bool(started) and _started(pid) == started for pid, started in starts.items())
