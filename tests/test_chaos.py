"""A short run of the chaos suite; `make chaos` is the long one.

Owns:    one run in a process of its own, with a seed that a failure names.
Runs in: the test process.
Unaware: of what is done and how it is accounted for; see tests/chaos.
"""
from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS

SECS = "12"
CHAOS = [sys.executable, str(TESTS / "chaos" / "run.py"), "--quiet"]


@pytest.mark.skipif(not hasattr(os, "pidfd_open") or not Path("/proc/self/environ").exists(),
                    reason="the hand needs pidfds and /proc to signal nobody but its own server")
def test_nothing_is_lost_under_a_hand_that_does_harm() -> None:
    seed = os.environ.get("CHAOS_SEED") or str(random.randrange(10 ** 6))
    done = subprocess.run([*CHAOS, "--secs", SECS, "--seed", seed, "--population", "60",
                           "--without", "hang core,hang shell,suspend"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT,
                          timeout=280, text=True)
    print(done.stdout)  # pytest shows it when this fails
    assert done.returncode == 0, f"something was lost; again with CHAOS_SEED={seed}"
    assert re.search(r"^ +0  LOSSES", done.stdout, re.M)


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """The accounts find a line that is missing, one that is doubled, a wrong code and a second process."""
    sys.path.insert(0, str(TESTS / "chaos"))
    try:
        from accounting import Entry, Ledger
        from agents import TRUTH, numbered, seal
    finally:
        sys.path.remove(str(TESTS / "chaos"))
    out, end = [numbered("O", "a", n) for n in range(3)], seal("Z a 3")
    error = b"".join(numbered("E", "a", n) for n in range(3)) + end
    whole = b"".join(out) + end

    def losses(stdout: bytes, code: int = 7, processes: int = 1, sent: tuple[int, ...] = ()) -> list[str]:
        said: list[str] = []
        ledger = Ledger(tmp_path / os.urandom(4).hex(), said.append)
        for n in range(processes):
            taken = (0, 0, 0) if n else (len(whole), len(error), 0)
            (ledger.truth / f"a.{n}").write_bytes(TRUTH.pack(*taken))
        entry = Entry("a", "r", 7, 3, "reader", "c", accepted={"w": list(sent)} if sent else {})
        ledger.check(entry, {"attempt": 1, "status": "failed", "exit": {"code": code, "reason": "exited"}},
                     [{"exit": {}}], {"stdout": stdout, "stderr": error}, 0)
        return sorted({loss.split(":")[0] for loss in ledger.losses})
    assert losses(whole) == []
    assert "missing" in losses(out[0] + out[2] + end)
    assert "wrong" in losses(out[0] + out[0] + out[1] + out[2] + end)
    assert "wrong" in losses(whole.replace(b"O a 1", b"O a x"))
    assert losses(whole, code=8) == ["missing"]
    assert losses(whole, processes=2) == ["doubled"]
    assert losses(whole, sent=(0,)) == ["missing"]


def test_a_limit_that_comes_late_is_found(tmp_path: Path) -> None:
    """Beyond the time for which the server was away."""
    sys.path.insert(0, str(TESTS / "chaos"))
    try:
        from accounting import LATE_SECS, Entry, Ledger
    finally:
        sys.path.remove(str(TESTS / "chaos"))
    ledger = Ledger(tmp_path / "truth", lambda said: None)
    entry = Entry("a", "r", 7, 3, "free", "c", limit=1.5)

    def losses(duration: float) -> list[str]:
        ledger.losses.clear()
        record = {"code": None, "signal_number": 15, "reason": "limit:runtime_secs", "duration": duration}
        ledger._check_exit(entry, {"status": "terminated", "exit": record})
        return ledger.losses
    assert losses(1.6) == [] == losses(1.5 + LATE_SECS)
    assert "came 30.1 s late" in losses(31.6)[0] and "too early" in losses(1.2)[0]
    ledger.away += [[entry.asked - 100, entry.asked - 50], [entry.asked - 5, entry.asked + 20]]
    assert losses(31.6) == [] and ledger.absent_since(entry.asked) == 20
