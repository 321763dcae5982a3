"""SIGKILLs of core and shell in a row: how long nobody answers, and whether our processes stay as small as they were.

Owns:    the mode `--kills N`: the kills, the probes that ask all the time, the footprint before and after.
Runs in: the chaos process.
Unaware: of the other faults. Agents, clients and accounts are the same.
"""
from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from accounting import Ledger
from clients import Client, EventFollower
from closing import finish, quiet, settle, summary
from hand import Hand, find

from agentserver import AgentClient
from agentserver.errors import AgentServerError

PARTS = ("keeper", "core", "shell")
WARM_UP = 5
GONE_SECS = 30.0


class Probe(threading.Thread):
    """Asks for health all the time; keeps when each request was sent and when it was answered."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address, self.over = address, False
        self.asked: List[Tuple[float, float]] = []

    def run(self) -> None:
        """Ask until told to end."""
        with AgentClient(self._address, timeout=GONE_SECS) as client:
            while not self.over:
                began = time.monotonic()
                try:
                    client.health()
                except AgentServerError:
                    continue  # what the client was not answered counts until it is
                finally:
                    self.asked.append((began, time.monotonic()))
                time.sleep(0.005)


def percentile(values: List[float], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def footprint(hand: Hand) -> Dict[str, Tuple[int, int]]:
    """Return private and shared memory (PSS, KiB) and the number of descriptors of each part."""
    found = {}
    for name in PARTS:
        part = find(name, hand.state_dir, hand.server.process.pid)
        if part is not None:
            try:
                rollup = Path(f"/proc/{part.pid}/smaps_rollup").read_text()
                found[name] = (int(rollup.partition("\nPss:")[2].split()[0]), len(os.listdir(f"/proc/{part.pid}/fd")))
            except PermissionError:  # only root may look into a part
                found[name] = (0, 0)
            part.close()
    return found


def kill(hand: Hand, name: str, client: AgentClient) -> Tuple[float, float]:
    """SIGKILL one part; return when, and when its successor has answered."""
    part = hand.part(name)
    assert part is not None, f"there is no {name}"
    began = time.monotonic()
    part.send(signal.SIGKILL)
    part.close()
    while time.monotonic() < began + GONE_SECS:
        try:
            if client.health().metadata.get(f"{name}_pid") not in (None, "", str(part.pid)):
                break
        except AgentServerError:
            continue
    return began, time.monotonic()


def kills(args: argparse.Namespace, where: Path, flags: List[str], say: Callable[[str], None]) -> int:
    """Run the mode; return the exit code."""
    ledger = Ledger(where.with_name(where.name + ".truth"), say)
    hand = Hand(where / "s", flags, args.seed, [], ledger, 1.0, say)
    addresses = [hand.server.address("unix"), hand.endpoint]
    clients = [Client(f"k{n}", args.seed, addresses, ledger, 5, kept=0.0) for n in range(3)]
    followers = [EventFollower("unix", lambda: addresses[0], ledger)]
    probes = [Probe(addresses[n % 2]) for n in range(4)]
    dice = random.Random(f"{args.seed} kills")
    windows: Dict[str, List[Tuple[float, float]]] = {"core": [], "shell": []}
    ask = {"core": AgentClient(addresses[0]), "shell": AgentClient(addresses[1])}
    ask["shell"].health()
    try:
        for _ in range(WARM_UP):
            for name in windows:
                kill(hand, name, ask[name])
        followers[0].start()  # stays to the end, so it is there when it begins
        time.sleep(1)
        before = footprint(hand)
        for thread in (*clients, *probes):
            thread.start()
        for n in range(args.kills):
            time.sleep(dice.random() * 0.4)
            name = dice.choice(("core", "shell"))
            windows[name].append(kill(hand, name, ask[name]))
            hand.done["kill " + name] = hand.done.get("kill " + name, 0) + 1
            if n % 50 == 49:
                say(f"{n + 1} kills, {ledger.counts.get('agents checked', 0)} agents checked, "
                    f"{len(ledger.losses)} losses")
        quiet(clients, ledger)
        for probe in probes:
            probe.over = True
            probe.join(GONE_SECS)
        for name in windows:  # so that both are as young as they were
            kill(hand, name, ask[name])
        time.sleep(1)
        after = footprint(hand)
        events = settle(hand, ledger, followers)
        ledger.check_events(events, {f.name: list(f.seen)[:len(events)] for f in followers})
    finally:
        for each in ask.values():
            each.close()
        finish(hand, None, ledger)
    report(windows, probes, before, after)
    return summary(args, hand, ledger)


def report(windows: Dict[str, List[Tuple[float, float]]], probes: List[Probe],
           before: Dict[str, Tuple[int, int]], after: Dict[str, Tuple[int, int]]) -> None:
    """Print latencies and footprint."""
    print()
    for name, spans in windows.items():
        took = [end - began for began, end in spans]
        print(f"{name:6} killed {len(spans)} times; its successor has answered after "
              f"{percentile(took, 0.5) * 1e3:.0f} ms median, {percentile(took, 0.99) * 1e3:.0f} ms p99, "
              f"{max(took, default=0) * 1e3:.0f} ms at most")
        for link, some in (("unix", probes[::2]), ("tcp", probes[1::2])):
            late = [done - asked for probe in some for asked, done in probe.asked
                    if any(began <= asked < end for began, end in spans)
                    or any(asked <= began < done for began, end in spans)]
            print(f"       {len(late)} requests over {link} meanwhile: {percentile(late, 0.5) * 1e3:.0f} ms median, "
                  f"{percentile(late, 0.99) * 1e3:.0f} ms p99, {max(late, default=0) * 1e3:.0f} ms at most")
    for name in PARTS:
        (m1, f1), (m2, f2) = before.get(name, (0, 0)), after.get(name, (0, 0))
        print(f"{name:6} memory (PSS) {m1} KiB before, {m2} KiB after; descriptors {f1} before, {f2} after")
