"""The chaos suite: run a server under a hand that does harm, and account for everything.

    run.py [--secs 180] [--seed N] [--faults "kill core,reload"] [--without …]     random faults
    run.py --kills 500 [--seed N]                                             SIGKILLs in a row, with latencies

Owns:    the order of a run: disk, server, clients, hand, the quiet at the end, the accounts, the summary.
Runs in: the chaos process; exit code 0 when nothing was lost, 1 when something was.
Unaware: of how harm is done (hand.py) and how it is found (accounting.py).
"""
from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parent.parent)]

from accounting import Json, Ledger  # noqa: E402
from cables import Cables  # noqa: E402
from clients import Client, EventFollower  # noqa: E402
from hand import FAULTS, Hand  # noqa: E402
from support import assert_nothing_left, marked_processes, scratch  # noqa: E402

CLIENTS, LIVE_EACH = 5, 7
DISK_MIB = 192
FLAGS = ["--max-agents", "300", "--status-update-interval-secs", "1", "--events-kept", "10000000",
         "--history-agents", "100000"]
QUIET_SECS = 120.0  # for all that was begun to end, once there are no more faults


def say(sentence: str) -> None:
    """Tell whoever watches."""
    print(f"{time.monotonic() - BEGAN:7.2f}  {sentence}", flush=True)


BEGAN = time.monotonic()


def settings() -> argparse.Namespace:
    """Read the command line; the environment has the defaults."""
    parser = argparse.ArgumentParser(description="chaos suite; see the head of this file")
    parser.add_argument("--secs", type=float, default=float(os.environ.get("CHAOS_SECS") or 180))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CHAOS_SEED") or random.randrange(10 ** 6)))
    parser.add_argument("--faults", default=os.environ.get("CHAOS_FAULTS", ""), help="only these, comma between")
    parser.add_argument("--without", default=os.environ.get("CHAOS_WITHOUT", ""), help="all but these")
    parser.add_argument("--pace", type=float, default=0.5, help="mean seconds between two faults")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the state directory of a run that lost something")
    parser.add_argument("--quiet", action="store_true", help="no line for each fault")
    parser.add_argument("--on-small-disk", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def with_small_disk() -> None:
    """Become a process in a mount namespace of its own, in which a small disk can be had; go on without if not."""
    program = shutil.which("unshare")
    argv = [program or "", "--user", "--map-root-user", "--mount"]
    if program and subprocess.call([*argv, "true"], stderr=subprocess.DEVNULL) == 0:
        os.execv(argv[0], [*argv, sys.executable, *sys.argv, "--on-small-disk"])


def home(small_disk: bool) -> Path:
    """Return a directory for everything of this run."""
    path = Path(tempfile.mkdtemp(prefix="ac-", dir="/tmp"))
    if small_disk:
        subprocess.check_call(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "none", str(path)])
    return path


def faults(args: argparse.Namespace) -> List[str]:
    """Return which faults to use, and say which not."""
    wanted = [f.strip() for f in args.faults.split(",") if f.strip()] or list(FAULTS)
    without = {f.strip() for f in args.without.split(",")}
    if not args.on_small_disk and "fill disk" in wanted:
        say("SKIPPED: the disk is not filled, because no mount namespace can be had here")
        without.add("fill disk")
    unknown = (set(wanted) | without) - set(FAULTS) - {""}
    if unknown:
        raise SystemExit(f"there is no fault {sorted(unknown)}; there are {', '.join(FAULTS)}")
    return [fault for fault in wanted if fault not in without]


def chaos(args: argparse.Namespace, where: Path) -> int:
    """One run; return the exit code."""
    truth = where / "truth"
    truth.mkdir()
    ledger = Ledger(truth, say)
    hand = Hand(where / "s", FLAGS, args.seed, faults(args), ledger, args.pace,
                (lambda _s: None) if args.quiet else say)
    cables = hand.cables = Cables(str(where), lambda: hand.endpoint, str(hand.server.socket_path))
    addresses = [f"unix:{cables.path}", cables.endpoint]
    clients = [Client(f"c{n}", args.seed, addresses, ledger, LIVE_EACH) for n in range(CLIENTS)]
    followers = [EventFollower("unix", lambda: addresses[0], ledger),
                 EventFollower("tcp", lambda: hand.endpoint, ledger)]
    try:
        for thread in (*clients, *followers):
            thread.start()
        time.sleep(1)
        hand.start()
        time.sleep(args.secs)
        hand.end()
        say("no more faults; waiting for the end of what was begun")
        for client in clients:
            client.spawning = False
        until = time.monotonic() + QUIET_SECS
        for client in clients:
            client.join(max(0.1, until - time.monotonic()))
            if client.is_alive():
                ledger.loss("no answer", f"client {client.name} is not done after {QUIET_SECS:g} s: "
                                         f"{[e.key + ' ' + e.id for e in client._unchecked()]}")
        events = settle(hand, ledger, followers)
        ledger.check_events(events, {f.name: list(f.seen)[:len(events)] for f in followers})
    finally:
        finish(hand, cables, ledger)
    return summary(args, hand, ledger)


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


def finish(hand: Hand, cables: Cables, ledger: Ledger) -> None:
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


def main() -> int:
    """Run and clean up."""
    args = settings()
    if not args.on_small_disk and not args.kills:
        with_small_disk()
    say(f"seed {args.seed}")
    where = home(args.on_small_disk)
    code = 1
    try:
        if args.kills:
            from kills import kills
            code = kills(args, where, say)
        else:
            code = chaos(args, where)
    finally:
        if code and args.keep:
            shutil.copytree(where, f"/tmp/chaos-{args.seed}", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
        if args.on_small_disk:
            subprocess.call(["umount", "-l", str(where)])
        shutil.rmtree(where, ignore_errors=True)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads that follow for ever need not be waited for
