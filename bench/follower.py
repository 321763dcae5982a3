"""Followers as processes of their own, so that none of their time is the server's or the benchmark's.

    follower.py ages ADDRESS AGENT       how old each line was when it came; the lines are times
    follower.py drink ADDRESS AGENT      one stream to its end: how much, how fast, SHA-256
    follower.py crowd ADDRESS COUNT AGENT…  COUNT who follow all the agents, a thread each: SHA-256 of every stream
    follower.py events ADDRESS COUNT     the first COUNT events, how long they took
    follower.py asleep ENDPOINT COUNT    COUNT SUB sockets that want everything and take nothing

Owns:    following with `AgentClient`. Says `ready` when it listens, and one JSON object at the end.
Runs in: a process that a benchmark starts.
Unaware: of what is to be compared with what.
"""
from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from typing import Any, Callable, Dict, List

from harness import memory, percentile

from agentserver import AgentClient, OutputDropped


def ages(address: str, agent: str) -> Dict[str, Any]:
    """Return percentiles of how old lines were, in seconds; the first one only says that the listening has begun."""
    found: List[float] = []
    rest = b""
    with AgentClient(address) as client:
        for _id, _stream, what in client.follow(agent, streams=("stdout",)):
            heard = time.monotonic_ns()
            *lines, rest = (rest + what.data).split(b"\n")
            if b"ready" in lines:
                print("ready", flush=True)
            found += [(heard - int(line)) / 1e9 for line in lines if line.isdigit()]
    return {"p50": percentile(found, 0.5), "p99": percentile(found, 0.99), "count": len(found)}


def drink(address: str, agent: str) -> Dict[str, Any]:
    """Follow one stream to its end; the time begins with the first byte after the word `ready`."""
    sha, size, dropped, began, before = hashlib.sha256(), 0, 0, 0.0, 0
    with AgentClient(address) as client:
        for _id, _stream, what in client.follow(agent, streams=("stdout",)):
            if isinstance(what, OutputDropped):
                dropped += what.dropped
                continue
            if not size:
                before = _peak()
                print("ready", flush=True)
            elif not began:
                began = time.monotonic()
            sha.update(what.data)
            size += len(what.data)
    return {"bytes": size, "dropped": dropped, "secs": time.monotonic() - began, "sha256": sha.hexdigest(),
            "grown": _peak() - before}


def _peak() -> float:
    """Return the most memory that this process has had at a time, in KiB. (What getrusage(2) says is the parent's.)"""
    return memory(os.getpid())["peak"]


def crowd(address: str, count: str, *agents: str) -> List[Dict[str, str]]:
    """Let many follow all; return, for each of them, the SHA-256 of each agent's stdout."""
    found: List[Dict[str, str]] = []
    here = threading.Barrier(int(count) + 1)

    def one() -> None:
        shas = {agent: hashlib.sha256() for agent in agents}
        waiting = set(agents)
        with AgentClient(address) as client:
            for agent, _stream, what in client.follow(agents, streams=("stdout",)):
                shas[agent].update(b"lost" if isinstance(what, OutputDropped) else what.data)
                if waiting:
                    waiting.discard(agent)
                    if not waiting:
                        here.wait()
        found.append({agent: sha.hexdigest() for agent, sha in shas.items()})
    threads = [threading.Thread(target=one) for _ in range(int(count))]
    for thread in threads:
        thread.start()
    here.wait()
    print("ready", flush=True)
    for thread in threads:
        thread.join()
    return found


def events(address: str, count: str) -> Dict[str, Any]:
    """Follow the events from the first one on."""
    got = 0
    with AgentClient(address) as client:
        client.health()
        began = time.monotonic()
        for got, _event in enumerate(client.follow_events(0), 1):
            if got == int(count):
                break
        return {"secs": time.monotonic() - began, "count": got}


def asleep(endpoint: str, count: str) -> None:
    """Subscribe to everything, and never take anything."""
    import zmq
    context = zmq.Context()
    for _ in range(int(count)):
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        socket.poll(10_000)  # the answer to the subscription
    print("ready", flush=True)
    time.sleep(3600)


MODES: Dict[str, Callable[..., Any]] = {"ages": ages, "drink": drink, "crowd": crowd, "events": events,
                                         "asleep": asleep}

if __name__ == "__main__":
    print(json.dumps(MODES[sys.argv[1]](*sys.argv[2:])), flush=True)
