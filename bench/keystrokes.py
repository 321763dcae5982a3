"""How soon a person sees what was typed: a key through `attach` to the agent's terminal, and its echo back.

Owns:    the benchmark `keys`.
Runs in: the benchmark process, which is the terminal; the command line and the agent are processes of their own.
Unaware: of how the server does it.
"""
from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from typing import Dict, List

from harness import TREE, BenchError, Server, percentile
from table import Benchmark, Figures, Row, most

#: the same without a server: a raw terminal here, a terminal with `cat` there, bytes copied between them
RELAY = """
import os, pty, select, sys, tty
pid, inner = pty.fork()
if not pid:
    os.execvp("cat", ["cat"])
tty.setraw(0)
os.write(1, b"ready")
while True:
    for fd in select.select([0, inner], [], [])[0]:
        data = os.read(fd, 65536)
        if not data or data.endswith(b"\\x11"):
            os.close(inner)
            sys.exit()
        os.write(inner if fd == 0 else 1, data)
"""
DETACH = b"\x10\x11"


class Keys(Benchmark):
    """From a key to its echo on the screen, one after the other."""

    name = "keys"
    about = "keystroke to echo through attach"
    count = 300
    pause = 0.004
    rows = (
        Row("zmq_p50", "keystroke → echo through attach, p50, ZeroMQ", "ms", "p50", most(2)),
        Row("zmq_p99", "keystroke → echo through attach, p99, ZeroMQ", "ms", "p99"),
        Row("unix_p50", "keystroke → echo through attach, p50, Unix socket", "ms", "p50", most(2)),
        Row("unix_p99", "keystroke → echo through attach, p99, Unix socket", "ms", "p99"),
    )

    def start(self) -> None:
        self._server = None if self.limits_only else Server().__enter__()

    def stop(self) -> None:
        if self._server is not None:
            self._server.__exit__()

    def base(self) -> Figures:
        return self._typed("", [sys.executable, "-S", "-c", RELAY], {})

    def ours(self) -> Figures:
        server = self._server
        assert server is not None
        agent = server.spawn(("sh", "-c", "printf ready; exec cat"), pty={"rows": 24, "cols": 80})
        command = [sys.executable, "-m", "agentserver", "attach", agent]
        found = {**self._typed("zmq_", command, {"AGENTSERVER_SERVER": server.endpoint}),
                 **self._typed("unix_", command, {"AGENTSERVER_SERVER": f"unix:{server.path}"})}
        server.kill([agent])
        return found

    def _typed(self, prefix: str, command: List[str], environ: Dict[str, str]) -> Figures:
        master, slave = os.openpty()
        try:
            with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL,
                                  env={**os.environ, "PYTHONPATH": str(TREE), **environ}) as process:
                _until(master, b"ready")
                while _heard(master, 0.5):  # what a new size makes of the screen
                    continue
                try:
                    times = [self._one(master) for _ in range(self.count)]
                    os.write(master, DETACH)
                    process.wait(20)
                finally:
                    process.kill()
        finally:
            os.close(master)
            os.close(slave)
        return {f"{prefix}p50": percentile(times, 0.5) * 1e3, f"{prefix}p99": percentile(times, 0.99) * 1e3}

    def _one(self, master: int) -> float:
        time.sleep(self.pause)
        began = time.monotonic()
        os.write(master, b"x")
        _until(master, b"x")
        return time.monotonic() - began


def _until(master: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        data = _heard(master, 20)
        if not data:
            raise BenchError(f"{text!r} was never seen on the screen")
        seen += data


def _heard(master: int, secs: float) -> bytes:
    return os.read(master, 65536) if select.select([master], [], [], secs)[0] else b""
