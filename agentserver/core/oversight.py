"""What the keeper looks after in every turn, beside starting and ending: parts that stand still, copies that it lacks,
its own lock.

Owns:    what the core is to tell of the server's parts, and the pace of these looks.
Runs in: the keeper.
Unaware: of how a part is started again: the end of one that was killed here is seen like any other.
"""
from __future__ import annotations

import os
import time
from signal import SIGKILL
from typing import Callable, Sequence

from ..errors import StartError
from . import process
from .channel import Json
from .held import Held
from .lock import restore
from .part import Part
from .pulse import Pulse

LOCK_SECS = 6.0  # between two looks at whether our lock's file is still there


class Oversight:
    """See the module. `lock` is the descriptor of the keeper's own lock in `state_dir`; `news(part)` returns what a
    part is told together with the question whether it answers."""

    def __init__(self, held: Held, lock: int, state_dir: str, say: Callable[[str], None],
                 news: Callable[[Part], Json]) -> None:
        self._held, self._lock, self._state_dir, self._say = held, lock, state_dir, say
        self._pulse = Pulse(self._stands_still, news=news)
        self._lock_at, self._lock_lost = 0.0, False
        self._core: Part | None = None  # the one that hears of the others
        #: what a core is to tell whoever asks: `stands_still` and `last_killed`
        self.told: Json = {}

    def due(self, parts: Sequence[Part]) -> list[float]:
        """Return when `work` has to be called next."""
        return self._pulse.due(parts)

    def work(self, core: Part, parts: Sequence[Part]) -> None:
        """Do what is due; `parts` are those that have to answer."""
        self._core = core
        for part in self._pulse.work(parts):
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.told.update(stands_still="", last_killed=f"{now}: {part.killed}")
            self._tell_core()
            process.send(part.pid, SIGKILL)
        self._keep_lock()
        self._ask_again(core)

    def _stands_still(self, part: Part, sentence: str) -> None:
        """A part does not answer, or ("") does again: say so, and let the core tell whoever asks."""
        self._say(sentence or f"the {part.name} (process {part.pid}) answers again")
        self.told["stands_still"] = sentence
        self._tell_core()

    def _tell_core(self) -> None:
        if self._core is not None and self._core.channel is not None and self._core.answers:
            self._core.channel.send({"parts": self.told})

    def _keep_lock(self) -> None:
        """A cleaner of old files may remove our lock's file; then another `serve` would take itself for the first."""
        if time.monotonic() < self._lock_at:
            return
        self._lock_at = time.monotonic() + LOCK_SECS
        try:
            restore(self._lock, os.path.join(self._state_dir, "keeper.lock"))
        except (OSError, StartError) as e:
            if not self._lock_lost:
                self._say(f"the lock of {self._state_dir} was removed and cannot be had again: {e}")
            self._lock_lost = True

    def _ask_again(self, core: Part) -> None:
        """Let the core give us again what we had no room for."""
        lost = self._held.lost(time.monotonic()) if core.channel is not None else []
        if lost and core.channel is not None:
            self._say(f"there was no room for descriptors of {len(lost)} agents, which a death of the core would cost; "
                      "raise the limit (ulimit -Hn)")
            core.channel.send({"hold_again": lost})
