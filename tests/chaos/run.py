"""The chaos suite: run a server under a hand that does harm, and account for everything.

    run.py [--secs 180] [--seed N] [--faults "kill core,reload"] [--without …]     random faults
    run.py --kills 500 [--seed N]                                             SIGKILLs in a row, with latencies
    run.py --lives 10000                                                      short lives, with footprint

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
from typing import List

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE.parent), str(HERE.parent.parent)]

from absence import Absence  # noqa: E402
from accounting import Ledger  # noqa: E402
from cables import Cables  # noqa: E402
from clients import Client, EventFollower  # noqa: E402
from closing import finish, quiet, settle, summary  # noqa: E402
from damage import damage  # noqa: E402
from hand import FAULTS, Hand  # noqa: E402
from kills import kills  # noqa: E402
from lives import lives  # noqa: E402
from population import Population  # noqa: E402

CLIENTS, LIVE_EACH = 5, 7
DISK_MIB = 192
FLAGS = ["--max-agents", "2000", "--status-update-interval-secs", "1", "--events-kept", "10000000",
         "--history-agents", "100000"]


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
    parser.add_argument("--population", type=int, default=1000, help="quiet agents that live through the whole run")
    parser.add_argument("--no-damage", dest="damage", action="store_false", help="leave the registry whole at the end")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--lives", type=int, default=0)
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
    ledger = Ledger(where.with_name(where.name + ".truth"), say)
    hand = Hand(where / "s", FLAGS, args.seed, faults(args), ledger, args.pace,
                (lambda _s: None) if args.quiet else say)
    cables = hand.cables = Cables(str(where), lambda: hand.endpoint, str(hand.server.socket_path))
    addresses = [f"unix:{cables.path}", cables.endpoint]
    clients = [Client(f"c{n}", args.seed, addresses, ledger, LIVE_EACH) for n in range(CLIENTS)]
    absence = Absence(hand.server.socket_path, ledger)
    followers = [EventFollower("unix", lambda: addresses[0], ledger),
                 EventFollower("tcp", lambda: hand.endpoint, ledger)]
    try:
        population = Population(addresses[0], args.population, ledger)
        for thread in (*clients, *followers, absence):
            thread.start()
        time.sleep(1)
        hand.start()
        time.sleep(args.secs)
        hand.end()
        say("no more faults; waiting for the end of what was begun")
        quiet(clients, ledger)
        population.end()
        events = settle(hand, ledger, followers)
        ledger.check_events(events, {f.name: list(f.seen)[:len(events)] for f in followers})
        if args.damage:
            damage(hand, ledger, random.Random(f"{args.seed} damage"), say)
    finally:
        finish(hand, cables, ledger)
    return summary(args, hand, ledger)


def main() -> int:
    """Run and clean up."""
    args = settings()
    if not (args.on_small_disk or args.kills or args.lives):
        with_small_disk()
    say(f"seed {args.seed}")
    where = home(args.on_small_disk)
    code = 1
    try:
        if args.kills:
            code = kills(args, where, FLAGS, say)
        elif args.lives:
            code = lives(args, where, say)
        else:
            code = chaos(args, where)
    finally:
        if code and args.keep:
            shutil.copytree(where, f"/tmp/chaos-{args.seed}", dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("*.sock"))
        if args.on_small_disk:
            subprocess.call(["umount", "-l", str(where)])
        for path in (where, where.with_name(where.name + ".truth")):
            shutil.rmtree(path, ignore_errors=True)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads that follow for ever need not be waited for
