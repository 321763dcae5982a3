"""The longest that one client has to wait because of what another one asks, request by request.

Owns:    the benchmark `waiting`.
Runs in: the benchmark process; who waits are processes of their own (prober.py), one on each link.
Unaware: of what is asked (dear.py), and of how the server does it.

`python bench/waiting.py [WORD…]` prints every request with its worst wait, beside what such a check takes when nothing
is asked: the worst of as long a time just before. With words, only requests that have one of them in their names.
"""
from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

from dear import MIB, TREE_MS, Case, all_cases
from harness import BenchError, Server
from table import Benchmark, Figures, Row, most

PROBER = str(Path(__file__).with_name("prober.py"))
IDLE_SECS = 0.3       # looked at before each request, and waited for after it
AGENTS_MOST = 1200


@dataclass(frozen=True)
class Wait:
    """What was measured of one case, in milliseconds; `idle` is the worst of the moments before it, `secs` how long it
    took."""

    case: Case
    worst: float
    idle: float
    median: float
    secs: float


class Probers:
    """Who waits: a client on each link."""

    def __init__(self, server: Server) -> None:
        self._processes = [subprocess.Popen([sys.executable, PROBER, address], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, text=True)
                           for address in (server.path, server.endpoint)]

    def look(self) -> Tuple[float, float]:
        """Return the median and the worst wait since the last look, on whichever link it was longer."""
        found = []
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in self._processes:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if len(words) != 3:
                raise BenchError("a prober has ended")
            found.append((float(words[1]), float(words[2])))
        return max(median for median, _worst in found), max(worst for _median, worst in found)

    def close(self) -> None:
        for process in self._processes:
            process.communicate()



def waits(words: Sequence[str] = ()) -> Iterator[Wait]:
    """Ask one after another, and yield what others had to wait."""
    with Server(max_agents=AGENTS_MOST, history_agents=2 * AGENTS_MOST) as server:
        probers = Probers(server)
        try:
            for case in all_cases(server):
                if not words or any(word in case.name for word in words):
                    yield _measured(case, server, probers)
        finally:
            probers.close()


def _measured(case: Case, server: Server, probers: Probers) -> Wait:
    time.sleep(0.05)  # what came before has ended
    probers.look()
    time.sleep(IDLE_SECS)
    median, idle = probers.look()
    began = time.monotonic()
    try:
        case.do(server)
    except (BenchError, OSError):  # refused by closing the connection
        pass
    secs = time.monotonic() - began
    time.sleep(0.05)
    return Wait(case, probers.look()[1], idle, median, secs)


class Waiting(Benchmark):
    """What others wait for the dearest request: of up to 1 MiB, of more, and for a tree of many processes."""

    name = "waiting"
    about = "worst wait of other clients for each request that could be dear"
    runs = 1
    rows = (
        Row("small", "worst wait for another's request of up to 1 MiB", "ms", "", most(50)),
        Row("large", "  for a larger one, of what its size allows", "%", "", most(100)),
        Row("tree", "  for a tree of 500 processes", "ms", "", most(100)),
        Row("idle", "  when nothing is asked", "ms"),
    )

    def ours(self) -> Figures:
        found = list(waits())
        large = [wait for wait in found if wait.case.size() > MIB]
        trees = [wait for wait in found if wait.case.target == TREE_MS]
        small = [wait for wait in found if wait not in large and wait not in trees]
        return {"small": max(wait.worst for wait in small), "tree": max(wait.worst for wait in trees),
                "large": max(wait.worst / wait.case.bound() * 100 for wait in large),
                "idle": max(wait.idle for wait in found)}


def main(words: List[str]) -> int:
    """Print each as it comes, then the worst."""
    found = []
    print(f"{'':48s} {'MiB':>6s} {'worst':>8s} {'target':>7s} {'idle':>7s} {'median':>7s} {'took':>8s}", flush=True)
    for wait in waits(words):
        found.append(wait)
        missed = "  MISSED" if wait.worst > wait.case.bound() else ""
        print(f"{wait.case.name:48.48s} {wait.case.size() / MIB:6.1f} {wait.worst:8.1f} {wait.case.bound():7.0f} "
              f"{wait.idle:7.1f} {wait.median:7.2f} {wait.secs * 1000:8.0f}{missed}", flush=True)
    print(f"{sum(wait.worst > wait.case.bound() for wait in found)} of {len(found)} missed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
