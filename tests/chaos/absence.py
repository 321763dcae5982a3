"""When the server was away: its core dead, stopped or hung, so that nothing of what it has to do on time could be done.

Owns:    a thread that asks for the server's health again and again, and notes how long it got no answer.
Runs in: the chaos process.
Unaware: of what the hand does.
"""
from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

from accounting import Ledger

PAUSE_SECS = 0.05     # between two questions
LEAST_SECS = 0.2      # without an answer that count as being away
PATIENCE_SECS = 0.5   # for one answer
ASK = json.dumps({"type": "health_check_request", "request_id": "absence"}).encode() + b"\n"


class Absence(threading.Thread):
    """See the module; `path` is the core's socket."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        super().__init__(name="absence", daemon=True)
        self._path, self._ledger = str(path), ledger

    def run(self) -> None:
        """Ask for ever."""
        last = time.monotonic()
        while True:
            answered, now = self._answers(), time.monotonic()
            if answered:
                if now - last > LEAST_SECS:
                    self._ledger.away.append([last, now])
                last = now
            time.sleep(PAUSE_SECS)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(PATIENCE_SECS)
                link.connect(self._path)
                link.sendall(ASK)
                return bool(link.recv(65536))
        except OSError:
            return False
