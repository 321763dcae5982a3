"""Measure agentserver against its raw limits: `make bench`, or `python bench/run.py [NAME…]`.

Owns:    the list of benchmarks and the command line.
Runs in: the benchmark process.
Unaware: of what is measured.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from typing import List, Tuple, Type

import zmq
from answering import Flood, Requests, Status
from capturing import Capture
from enduring import Killed, Malformed
from following import Crowd, Dead, Follow, Torrent
from footprint import Footprint, Launch
from harness import BenchError
from keystrokes import Keys
from replaying import Replay
from spawning import Spawn
from surviving import Many
from table import HEADS, Benchmark, Result, lines, measure, text
from telling import Exit, Lines
from waiting import Waiting

BENCHMARKS: Tuple[Type[Benchmark], ...] = (Requests, Flood, Status, Spawn, Exit, Lines, Keys, Follow, Torrent,
                                           Crowd, Dead, Replay, Capture, Launch, Malformed, Killed, Many, Waiting,
                                           Footprint)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure agentserver against its raw limits.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; all if none is given: "
                        + "; ".join(f"{b.name} ({b.about})" for b in BENCHMARKS))
    parser.add_argument("--runs", type=int, help="interleaved runs of each (default: 5, slow ones fewer)")
    parser.add_argument("--base", action="store_true", help="measure the raw limits only")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    given = parser.parse_args()
    unknown = set(given.names) - {b.name for b in BENCHMARKS}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    return given


def machine() -> str:
    """Say where the figures come from."""
    return (f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
            f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}, load {os.getloadavg()[0]:.2f}, "
            f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")


def run(kind: Type[Benchmark], given: argparse.Namespace) -> List[Result]:
    """Run one benchmark; one that fails is reported and does not stop the others."""
    benchmark = kind()
    benchmark.limits_only = given.base
    try:
        return measure(benchmark, given.runs or benchmark.runs)
    except (BenchError, OSError) as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return [Result(row, None, None, None) for row in benchmark.rows]


def main() -> int:
    """Keep the bytecode of what is started as an installed program does, whatever this shell says of that."""
    given = arguments()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="as-bench-") as cache:
        os.environ["PYTHONPYCACHEPREFIX"] = cache
        return report(given)


def report(given: argparse.Namespace) -> int:
    """Run what was chosen, and print the figures as they come."""
    chosen = [b for b in BENCHMARKS if not given.names or b.name in given.names]
    widths = (52, 5, 8, 11, 6, 12, 12)
    if not given.json:
        print(machine(), *text([HEADS], widths), sep="\n", flush=True)
    found = []
    for kind in chosen:
        results = [r for r in run(kind, given) if r.row.base or not given.base]
        found += [(kind.name, result) for result in results]
        if not given.json:
            print("", *text(lines(results), widths), sep="\n", flush=True)
    if given.json:
        print(json.dumps({"machine": machine(), "rows": [r.to_json(name) for name, r in found]}, indent=1))
    return int(any(r.verdict == "not measured" for _name, r in found) and not given.base)


if __name__ == "__main__":
    raise SystemExit(main())
