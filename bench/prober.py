"""A client that only asks whether the server is well, and says how long it had to wait: started by waiting.py.

Owns:    one connection, to the address that is its argument, and the times of its health checks.
Runs in: a process of its own, so that nothing that the benchmark does delays it.
Unaware: of what goes on meanwhile.

For each line on stdin it prints the checks since the last one, the median and the worst wait, in milliseconds.
"""
from __future__ import annotations

import select
import statistics
import sys
import time

from caller import open_client

PAUSE_SECS = 0.001
CHECK = b'{"type":"health_check_request","request_id":"probe"}'


def main() -> None:
    """Ask until stdin ends."""
    client = open_client(sys.argv[1])
    waits = []
    while True:
        began = time.perf_counter()
        if b'"success":true' not in client.ask(CHECK)[:200].replace(b": ", b":"):
            raise SystemExit("a health check failed")
        waits.append((time.perf_counter() - began) * 1000)
        if select.select([sys.stdin], [], [], PAUSE_SECS)[0]:
            if not sys.stdin.readline():
                return
            print(len(waits), statistics.median(waits), max(waits), flush=True)
            waits = []


main()
