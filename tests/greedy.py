"""A subscriber that wants far too much, as a process of its own: `greedy.py ENDPOINT COUNT streams|noise SEED`.

Owns:    one XSUB socket and the subscriptions that it sends; says `sent` when all are on their way.
Runs in: a process that a test starts and kills.
Unaware: of what happens to it.
"""
from __future__ import annotations

import random
import sys
import time

import zmq


def main(endpoint: str, count: str, kind: str, seed: str) -> None:
    """See the module."""
    rng, xsub = random.Random(seed), zmq.Context().socket(zmq.XSUB)
    xsub.sndhwm = 0
    xsub.connect(endpoint)
    for n in range(int(count)):
        noise = rng.getrandbits(8 * 60).to_bytes(60, "big")
        xsub.send(b"\1" + (f"{noise.hex()[:36]}.stdout".encode() if kind == "streams" else noise * (1 + n % 10)))
    print("sent", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
