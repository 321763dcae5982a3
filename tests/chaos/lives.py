"""Thousands of short lives: whether our processes stay as small as they were, and every end is the right one.

Owns:    the mode `--lives N`: agents that print on both streams and exit with a code of their own, a hundred at a time.
Runs in: the chaos process.
Unaware: of faults; there are none.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Callable, Dict, Tuple

from accounting import Ledger
from closing import finish
from hand import Hand
from kills import PARTS, footprint

from agentserver import Agent, AgentClient

AT_ONCE = 100
WARM = 2000   # lives after which everything that is bounded by number has reached its bound
GROWTH = 1.1  # of private memory, between then and the end


def crowd(client: AgentClient, first: int, ledger: Ledger) -> None:
    """Let some agents live and end, all at once; compare each end."""
    agents: Dict[str, int] = {}
    for n in range(first, first + AT_ONCE):
        agent: Agent = client.spawn(["/bin/sh", "-c", f"echo out {n}; echo err {n} >&2; exit {n % 50}"])
        agents[agent.id] = n
    for info in client.wait(list(agents), timeout=60):
        n = agents[info.id]
        code = info.exit.code if info.exit else None
        spans = {name: span.end_offset for name, span in info.output.items()}
        if code != n % 50 or spans != {"stdout": len(f"out {n}\n"), "stderr": len(f"err {n}\n")}:
            ledger.loss("wrong", f"life {n} ({info.id}) ended with {code}, having written {spans}")
    ledger.counts["lives"] = ledger.counts.get("lives", 0) + AT_ONCE


def lives(args: argparse.Namespace, where: Path, say: Callable[[str], None]) -> int:
    """Run the mode; return the exit code."""
    ledger = Ledger(where.with_name(where.name + ".truth"), say)
    hand = Hand(where / "s", ["--max-agents", "300"], args.seed, [], ledger, 1.0, say)
    warm: Dict[str, Tuple[int, int]] = {}
    try:
        with AgentClient(hand.server.address("unix")) as client:
            for first in range(0, args.lives, AT_ONCE):
                crowd(client, first, ledger)
                if first + AT_ONCE == WARM:
                    warm = footprint(hand)
                if (first + AT_ONCE) % 1000 == 0:
                    say(f"{first + AT_ONCE} lives, {len(ledger.losses)} losses: "
                        + "; ".join(f"{name} {pss} KiB, {fds} fds" for name, (pss, fds) in footprint(hand).items()))
            after = footprint(hand)
        for name in PARTS if warm else ():
            (m1, f1), (m2, f2) = warm[name], after[name]
            if m2 > m1 * GROWTH or f2 > f1:
                ledger.loss("grown", f"{name}: from {m1} KiB and {f1} descriptors to {m2} KiB and {f2}")
    finally:
        finish(hand, None, ledger)
    print(f"\n{ledger.counts.get('lives', 0)} lives, {len(ledger.losses)} losses")
    for name in PARTS:
        (m1, f1), (m2, f2) = warm.get(name, (0, 0)), after.get(name, (0, 0))
        print(f"{name:6} memory (PSS) {m1} KiB after {WARM} lives, {m2} KiB at the end; descriptors {f1}, {f2}")
    return 1 if ledger.losses else 0
