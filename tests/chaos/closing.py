"""The end of a run: the quiet, the last accounts, the server's own end, the summary.

Owns:    waiting for what was begun, fetching events and lists, and what is printed.
Runs in: the chaos process.
Unaware: of which faults there were.
"""
from __future__ import annotations

import argparse
import sys
import time
from typing import Dict, List, Optional, Sequence

from accounting import Json, Ledger
from cables import Cables
from clients import Client, EventFollower
from hand import Hand
from support import assert_nothing_left, marked_processes, scratch

QUIET_SECS = 120.0  # for all that was begun to end, once there are no more faults


def quiet(clients: Sequence[Client], ledger: Ledger) -> None:
    """Begin nothing more, and wait until each client has checked all it has begun."""
    for client in clients:
        client.spawning = False
    until = time.monotonic() + QUIET_SECS
    for client in clients:
        client.join(max(0.1, until - time.monotonic()))
        if client.is_alive():
            ledger.loss("no answer", f"client {client.name} is not done after {QUIET_SECS:g} s: {client.unfinished()}")


def settle(hand: Hand, ledger: Ledger, followers: List[EventFollower]) -> List[Json]:
    """Return all events, once every follower had the time to see them; check the list of agents."""
    listed: List[Json] = []
    while True:
        page = hand.server.ask({"type": "list_agents_request", "all": True, "limit": 500, "offset": len(listed)})
        listed += page["agents"]
        if len(listed) >= page["total"] or not page["agents"]:
            break
    ledger.check_list(listed)
    events: List[Json] = []
    more = True
    while more:
        page = hand.server.ask({"type": "events_request", "since": len(events) and events[-1]["sequence"],
                                "limit": 5000})
        events += page["events"]
        more = page["more"]
    until = time.monotonic() + 30
    while any(len(f.seen) < len(events) for f in followers) and time.monotonic() < until:
        time.sleep(0.05)
    return events


def finish(hand: Hand, cables: Optional[Cables], ledger: Ledger) -> None:
    """End the server; nothing of it may be left."""
    try:
        code = hand.server.stop()
        if code:
            ledger.loss("wrong", f"serve ended with {code}")
        left = marked_processes(str(hand.state_dir))
        if left:
            ledger.loss("left running", str(left))
            assert_nothing_left(str(hand.state_dir))
        if any(scratch(hand.state_dir).iterdir()):
            ledger.loss("left running", f"files in TMPDIR: {list(scratch(hand.state_dir).iterdir())}")
    except AssertionError as e:
        ledger.loss("no answer", str(e)[:3000])
    finally:
        hand.server.abandon()
        if cables is not None:
            cables.close()


def summary(args: argparse.Namespace, hand: Hand, ledger: Ledger) -> int:
    """Print what was done and what was lost; return the exit code."""
    counts: Dict[str, int] = ledger.counts
    print(f"\nchaos: seed {args.seed}, {args.secs:g} s, Python {sys.version.split()[0]}")
    print(f"{sum(hand.done.values())} faults: " + ", ".join(f"{n} × {fault}" for fault, n in sorted(hand.done.items())))
    if hand.cables is not None:
        print(f"{hand.cables.count} connections cut")
    for name in sorted(counts):
        print(f"{counts[name]:>12,}  {name}")
    print(f"{ledger.lateness:12.3f}  seconds that a limit came late at most")
    print(f"{len(ledger.losses):>12,}  LOSSES" + ("" if ledger.losses else ": nothing was lost, nothing was doubled"))
    for loss in ledger.losses[:40]:
        print("  " + loss[:1000])
    if ledger.losses:
        print(hand.server.logs())
        print(f"again: CHAOS_SEED={args.seed} CHAOS_SECS={args.secs:g} make chaos")
    return int(bool(ledger.losses))
