"""One client among several: asks the same thing as fast as it is answered.

Owns:    its socket. Says "ready", waits for a line, asks for some seconds, prints how often it was answered.
Runs in: a process of its own: `python caller.py ADDRESS SECONDS` (tcp://… or the path of a Unix socket).
Unaware: of what the reply means.
"""
from __future__ import annotations

import sys
import time
from typing import List, Tuple

from harness import UnixClient, ZmqClient, percentile

QUESTION = b'{"type":"health_check_request","request_id":"%d"}'


def open_client(address: str) -> "ZmqClient | UnixClient":
    return ZmqClient(address) if "://" in address else UnixClient(address)


def ask_for(client: "ZmqClient | UnixClient", secs: float) -> Tuple[float, List[float]]:
    """Return requests per second, and how long each took in seconds."""
    ask, clock = client.ask, time.perf_counter
    times: List[float] = []
    began = before = clock()
    end = began + secs
    while before < end:
        number = b"%d" % len(times)
        reply = ask(QUESTION.replace(b"%d", number))
        after = clock()
        times.append(after - before)
        before = after
        if number not in reply:
            raise SystemExit(f"the reply to request {number!r} was {reply[:200]!r}")
    return len(times) / (before - began), times


def main() -> None:
    client = open_client(sys.argv[1])
    client.ask(QUESTION.replace(b"%d", b"0"))
    print("ready", flush=True)
    sys.stdin.readline()
    rate, times = ask_for(client, float(sys.argv[2]))
    print(rate, percentile(times, 0.99))
    client.close()


if __name__ == "__main__":
    main()
