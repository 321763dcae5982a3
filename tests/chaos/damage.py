"""The last part of a run: the registry is damaged under live agents, in every way there is, and the core dies of it.

Owns:    the ways of damage, and the question after each: what runs is listed, and what does not run is not said to.
Runs in: the chaos process, after the accounts; what was remembered is lost in it, so nothing else can be accounted for.
Unaware: of how the server finds its agents again. That none of them is left after its end is checked by closing.py.
"""
from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import Callable, Dict, List

from accounting import Ledger, alive_with
from hand import Hand
from support import wait_until

from agentserver import AgentClient
from agentserver.errors import AgentServerError

BACK_SECS = 60.0   # for a core that serves again, and for what runs to be listed
AGENTS = 5
MARK = "AGENTSERVER_AGENT_ID"


def delete(path: Path, _dice: random.Random) -> None:
    """Remove all files of the registry."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def empty(path: Path, _dice: random.Random) -> None:
    """Leave a file of no length."""
    for suffix in ("", "-wal"):
        os.truncate(path.with_name(path.name + suffix), 0)


def cut(path: Path, dice: random.Random) -> None:
    """Cut the file somewhere."""
    os.truncate(path, dice.randrange(path.stat().st_size))


def garble_pages(path: Path, dice: random.Random) -> None:
    """Write random bytes to random places, also to the log of what is not in the file yet."""
    for suffix in ("", "-wal"):
        with open(path.with_name(path.name + suffix), "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            for _ in range(20 if size else 0):
                file.seek(dice.randrange(size))
                file.write(dice.randbytes(16))


def garble_cells(path: Path, dice: random.Random) -> None:
    """Put something else in the place of one value in each table."""
    db = sqlite3.connect(path, timeout=10)
    try:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            column = dice.choice([row[1] for row in db.execute(f"PRAGMA table_info({table})") if not row[5]] or [""])
            if column:
                value = dice.choice(["{", b"\xff\x00", None, 2.5, "[1]", "x" * 5000])
                db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT max(rowid) FROM {table})"
                           if table != "meta" else f"UPDATE meta SET {column} = ?", (value,))
        db.commit()
    except sqlite3.Error:
        pass  # the damage before has left nothing to damage
    finally:
        db.close()


WAYS: Dict[str, Callable[[Path, random.Random], None]] = {
    "delete": delete, "empty": empty, "cut": cut, "garble pages": garble_pages, "garble cells": garble_cells}


def damage(hand: Hand, ledger: Ledger, dice: random.Random, say: Callable[[str], None]) -> None:
    """Damage the registry in each way, kill the core, and compare what runs with what is listed."""
    for way in dice.sample(sorted(WAYS), len(WAYS)):
        say(f"  damage the registry: {way}")
        ids = _spawn(hand)
        wait_until((hand.state_dir / "registry.db").exists, BACK_SECS, "the registry to be written anew")
        WAYS[way](hand.state_dir / "registry.db", dice)
        hand.signal("core", signal.SIGKILL)
        _compare(hand, ledger, ids, way)
        hand.done["damage registry"] = hand.done.get("damage registry", 0) + 1


def _spawn(hand: Hand) -> List[str]:
    with AgentClient(hand.server.address("unix")) as client:
        return [client.spawn(["/bin/sleep", "1000"]).id for _ in range(AGENTS)]


def _compare(hand: Hand, ledger: Ledger, ids: List[str], way: str) -> None:
    until = time.monotonic() + BACK_SECS
    wrong = ["no core serves again"]
    while wrong and time.monotonic() < until:
        time.sleep(0.05)
        try:
            wrong = _differences(hand, ids)
        except AgentServerError as e:
            wrong = [str(e)]
    for sentence in wrong:
        ledger.loss("lost status", f"the registry was damaged ({way}): {sentence}\n{hand.server.logs()}")


def _differences(hand: Hand, ids: List[str]) -> List[str]:
    with AgentClient(hand.server.address("unix"), timeout=5.0) as client:
        listed = {info.id: info for info in client.list(all=True)}
    wrong = []
    for agent_id in ids:
        runs, info = alive_with(MARK, agent_id), listed.get(agent_id)
        if runs and (info is None or info.finished):
            wrong.append(f"{agent_id} runs (pid {runs}) and is {info.status if info else 'not listed'}")
        elif not runs and info is not None and not info.finished:
            wrong.append(f"{agent_id} is {info.status} and does not run")
    return wrong
