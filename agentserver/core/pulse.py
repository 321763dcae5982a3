"""Whether the parts of the server still answer: asked every two seconds, said after five, ended after ten.

Owns:    the question, how long its answer has been missing, and whether a part that does not answer may be killed.
Runs in: the keeper.
Unaware: of what a part does. One that never said that it answers, because it is older than this question, is not asked.

Only time in which the keeper itself ran is counted. When it sees that it was stopped (Ctrl-Z, a debugger, a suspended
machine), all counts begin anew: the parts may have been stopped with it. A part that a tracer holds, or that sleeps in
the kernel where no signal wakes it (state D), is only spoken of: SIGKILL would cost a debugger's work, or not help.
"""
from __future__ import annotations

import time
from typing import Callable, Sequence

from . import tree
from .channel import Json
from .part import Part

ASK_SECS = 2.0        # between two questions to a part
TOLD_SECS = 5.0       # without an answer, before it is said
GIVEN_UP_SECS = 10.0  # without an answer, before the part is killed and started again
LEAVE_SECS = 15.0     # for a part that was told to leave to be gone, before the same; its last replies take seconds
START_SECS = 30.0     # without a word, for a part that does not serve yet, before the same
NEWS_ASKS = 5         # from one question that comes with news to the next
GAP_SECS = 1.0        # by which the keeper may wake too late before it takes itself for one that was stopped


class Pulse:
    """See the module. `stands_still(part, sentence)` hears that a part does not answer, and "" when it does again;
    `news(part)` is told to a part with some of the questions."""

    def __init__(self, stands_still: Callable[[Part, str], None], clock: Callable[[], float] = time.monotonic,
                 news: Callable[[Part], Json] = lambda part: {}) -> None:
        self._stands_still, self._news, self._clock = stands_still, news, clock
        self._woke = clock()
        self._ask_at = self._woke + ASK_SECS
        self._number = 0

    def due(self, parts: Sequence[Part]) -> list[float]:
        """Return when `work` has to be called next, if there is anybody to ask."""
        return [self._ask_at] if any(part.answers or part.starts or part.leaves for part in parts) else []

    def work(self, parts: Sequence[Part]) -> list[Part]:
        """Count, ask and say what is due; return the parts that have to be killed. To be called in every turn, after
        the parts were heard."""
        now = self._clock()
        ran, self._woke = now - self._woke, now
        for part in parts:
            if ran > ASK_SECS + GAP_SECS:  # it was we who stood still
                part.silent = 0.0
            elif part.asked or part.starts or part.leaves:
                part.silent += ran
            self._speak(part)
        if now >= self._ask_at:
            self._ask_at = now + ASK_SECS
            self._ask(parts)
        return [part for part in parts if self._given_up(part)]

    def _ask(self, parts: Sequence[Part]) -> None:
        self._number += 1
        for part in parts:
            if part.answers and not part.asked and part.channel is not None:
                part.asked = self._number
                news = self._news(part) if self._number % NEWS_ASKS in (1, 2) else {}  # at 1 the parts have told none
                part.channel.send({"ping": self._number, **news})

    def _speak(self, part: Part) -> None:
        if part.answers and part.silent >= TOLD_SECS and not part.still:
            why = tree.hindered(part.pid)
            part.still = f"the {part.name} (process {part.pid}) has not answered for {TOLD_SECS:g} s" + (
                f"; it {why}" if why else "")
            self._stands_still(part, part.still)
        elif part.still and not part.asked:
            part.still = ""
            self._stands_still(part, "")

    @staticmethod
    def _given_up(part: Part) -> bool:
        most, what = ((LEAVE_SECS, "was told to leave and did not within") if part.leaves else
                      (START_SECS, "did not begin to serve within") if part.starts else
                      (GIVEN_UP_SECS, "did not answer for"))
        if part.silent < most or tree.held_up(part.pid):
            return False
        part.killed = f"the {part.name} (process {part.pid}) {what} {most:g} s and was killed"
        part.silent, part.still = 0.0, ""
        return True
