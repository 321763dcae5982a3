"""What the server costs: memory and CPU with 1,000 children, and the time until it first answers.

Owns:    the benchmarks `footprint` and `launch`.
Runs in: the benchmark process; reads /proc.
Unaware: of how the server does it.
"""
from __future__ import annotations

import socket
import time
from typing import Dict

import bare
from harness import Server, UnixClient, ZmqClient, cpu_nanoseconds, cpu_ticks, memory, percentile, request, until
from table import Benchmark, Figures, Row, most

CHILDREN = 1000
#: has printed, so that its output is being recorded, and does nothing from then on
CHECKPOINT_SECS = 12.0  # a little more than the default of status_update_interval_secs
QUIET = ("sh", "-c", "echo ready; exec sleep 1000")
SAID = len("ready\n")


class Footprint(Benchmark):
    """Keeper, core and shell together, with 1,000 children that do nothing; stdout and stderr are captured."""

    name = "footprint"
    about = "memory and idle CPU with 1,000 children (20 s of silence)"
    runs = 1
    idle_secs = 20.0
    rows = (
        Row("rss", "memory with 1,000 children, RSS", "MiB", "", most(70)),
        Row("pss", "memory with 1,000 children, PSS", "MiB", "", most(45)),
        Row("per_child", "memory per child, with capture (RSS)", "KiB", "", most(12)),
        Row("empty_rss", "memory without children, RSS", "MiB"),
        Row("empty_pss", "memory without children, PSS", "MiB"),
        Row("keeper", "  of it the keeper, RSS with 1,000", "MiB"),
        Row("core", "  of it the core, RSS with 1,000", "MiB"),
        Row("shell", "  of it the shell, RSS with 1,000", "MiB"),
        Row("idle", "idle CPU with 1,000 children", "%", "", most(0.05)),
        Row("ticks", "  clock ticks used meanwhile", "ticks"),
    )

    def ours(self) -> Figures:
        with Server() as server:
            first = server.spawn_many(5, QUIET)  # what is imported late has been imported now
            until(lambda: _captured(server) >= 5 * SAID, 60, "the first output")
            server.kill(first)
            pids = server.pids()
            empty = _sum(pids)
            agents = server.spawn_many(CHILDREN, QUIET)
            until(lambda: _captured(server) >= (CHILDREN + 5) * SAID, 60, "output")
            full = _sum(pids)
            found = {"rss": full["rss"] / 1024, "pss": full["pss"] / 1024,
                     "empty_rss": empty["rss"] / 1024, "empty_pss": empty["pss"] / 1024,
                     "per_child": (full["rss"] - empty["rss"]) / CHILDREN,
                     **{name: memory(pid)["rss"] / 1024 for name, pid in pids.items()},
                     **self._idle(pids)}
            server.kill(agents)
        return found

    def _idle(self, pids: Dict[str, int]) -> Figures:
        time.sleep(CHECKPOINT_SECS)  # what the last spawn left to do: the registry's log is moved into it
        ticks, used = _ticks(pids), _used(pids)
        time.sleep(self.idle_secs)
        return {"idle": (_used(pids) - used) / 1e9 / self.idle_secs * 100, "ticks": _ticks(pids) - ticks}


def _captured(server: Server) -> int:
    return int(server.ask("stats_request")["stats"]["bytes_captured"])


def _sum(pids: Dict[str, int]) -> Figures:
    found = [memory(pid) for pid in pids.values()]
    return {name: sum(one[name] for one in found) for name in ("rss", "pss")}


def _ticks(pids: Dict[str, int]) -> int:
    return sum(cpu_ticks(pid) for pid in pids.values())


def _used(pids: Dict[str, int]) -> int:
    return sum(cpu_nanoseconds(pid) for pid in pids.values())


class Launch(Benchmark):
    """From the start of the process to its first reply, against a Python process with one REP socket."""

    name = "launch"
    about = "launch to first answer"
    count = 3
    rows = (
        Row("zmq", "launch → first answer, ZeroMQ", "ms", "bare", most(200)),
        Row("unix", "launch → first answer, Unix socket", "ms", "bare", most(200)),
        Row("end", "SIGTERM → gone, no agents", "ms"),
    )

    def base(self) -> Figures:
        return {"bare": percentile([self._bare() for _ in range(self.count)], 0.5) * 1e3}

    @staticmethod
    def _bare() -> float:
        with bare.sample() as file:
            began = time.monotonic()
            with bare.Served("bare", "rep", file) as endpoint:
                client = ZmqClient(endpoint)
                client.ask(request("health_check_request"))
                took = time.monotonic() - began
                client.close()
        return took

    def ours(self) -> Figures:
        remote = [self._ours(remote=True) for _ in range(self.count)]
        local = [self._ours(remote=False) for _ in range(self.count)]
        return {"zmq": percentile([first for first, _end in remote], 0.5) * 1e3,
                "unix": percentile([first for first, _end in local], 0.5) * 1e3,
                "end": percentile([end for _first, end in remote + local], 0.5) * 1e3}

    def _ours(self, *, remote: bool) -> "tuple[float, float]":
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        server = Server(endpoint=endpoint)
        began = time.monotonic()
        server.launch()
        try:
            client = ZmqClient(endpoint) if remote else until(lambda: _connected(server), 20, "core.sock")
            client.ask(request("health_check_request"))
            took = time.monotonic() - began
            client.close()
            until(server._answers, 20, "the server did not answer")
        finally:
            ending = time.monotonic()
            server.__exit__()
        return took, time.monotonic() - ending


def _connected(server: Server) -> "UnixClient | None":
    try:
        return UnixClient(server.path)
    except OSError:
        return None


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
