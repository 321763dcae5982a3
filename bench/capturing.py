"""How fast output reaches the disk, and whether every byte of it does.

Owns:    the benchmark `capture`.
Runs in: the benchmark process.
Unaware: of how the server stores output; what it stored is read back through the protocol.
"""
from __future__ import annotations

import binascii
import contextlib
import hashlib
import time
from pathlib import Path
from typing import List, Tuple

import bare
from harness import Server, Subscriber, scratch_file
from table import Benchmark, Figures, Row, most, ratio_least

ENDED = ("completed", "failed", "terminated")
MB = 1_000_000
READ = 4 << 20


class Capture(Benchmark):
    """From the go to the end of programs that print a file, against a bare pipe → file loop."""

    name = "capture"
    about = "capture 1 × 200 MB and 20 × 10 MB, byte-exact"
    runs = 3
    shapes: Tuple[Tuple[str, int, int], ...] = (("one", 1, 200 * MB), ("many", 20, 10 * MB))
    rows = (
        Row("one", "capture 1 × 200 MB", "MB/s", "one", ratio_least(0.7)),
        Row("many", "capture 20 × 10 MB", "MB/s", "many", ratio_least(0.7)),
        Row("wrong", "bytes lost or corrupted in both", "bytes", "", most(0)),
    )

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        self._directory = self._stack.enter_context(bare.scratch())
        bare.warm(self._directory, 600 * MB)
        if not self.limits_only:
            self._server = self._stack.enter_context(Server(output_cap_bytes=1 << 30))

    def stop(self) -> None:
        self._stack.close()

    def base(self) -> Figures:
        found: Figures = {}
        for name, count, size in self.shapes:
            for how, move in bare.MOVERS.items():
                took = bare.capture(self._program(size), count, self._directory, move)
                found[f"{name} {how}"] = count * size / took / MB
            found[name] = max(found[f"{name} {how}"] for how in bare.MOVERS)
            for file in self._directory.glob("out-*"):
                file.unlink()
        return found

    def ours(self) -> Figures:
        found: Figures = {"wrong": 0}
        for name, count, size in self.shapes:
            took, agents = self._captured(count, size)
            found[name] = count * size / took / MB
            found["wrong"] += sum(self._wrong(agent, scratch_file(self._directory, size)) for agent in agents)
            for agent in agents:
                self._server.control(agent, "remove")
        return found

    def _program(self, size: int) -> List[str]:
        return bare.gated(scratch_file(self._directory, size))

    def _captured(self, count: int, size: int) -> Tuple[float, List[str]]:
        """Return the seconds from the go to the last end event, and the agents."""
        agents = self._server.spawn_many(count, self._program(size))
        subscriber = Subscriber(self._server.path, ["status."])
        time.sleep(bare.SETTLE_SECS)
        began = time.monotonic()
        self._server.ask("batch_control_command", command_type="close_stdin", agent_ids=agents)
        running = set(agents)
        while running:
            event = subscriber.next()
            if event.get("status") in ENDED:
                running.discard(event["agent_id"])
        took = time.monotonic() - began
        subscriber.close()
        return took, agents

    def _wrong(self, agent: str, expected: Path) -> int:
        """Read the output back; return how many bytes are missing, too many, or at least one if any differs."""
        data_hash, offset = hashlib.sha256(), 0
        while True:
            part = self._server.control(agent, "read_stdout", offset=offset, max_bytes=READ)
            data = part["data"] or ""
            data_hash.update(binascii.a2b_base64(data) if part.get("encoding") == "base64" else data.encode())
            if part["next_offset"] == offset:
                break
            offset = part["next_offset"]
        if offset != expected.stat().st_size:
            return abs(offset - expected.stat().st_size)
        return int(data_hash.digest() != hashlib.sha256(expected.read_bytes()).digest())
