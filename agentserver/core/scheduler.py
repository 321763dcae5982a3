"""Large work in small steps: the loop's time, shared fairly between those for whom it works.

Owns:    the tasks that are not done yet, whose turn is next, and how long one slice of the loop's turn is.
Runs in: the core's thread; one slice in each turn of the loop, after descriptors and deadlines.
Unaware: of what a task does, and of requests and replies.

A task is a generator. It does a little, at most about a millisecond, and yields; the scheduler goes on with it
later. Whatever would take longer than that at once (a batch, the end of a thousand agents, a long list) is written
so:

    def steps():
        for agent in agents:
            stop(agent)
            yield            # or, where a round is very short: if pace.over(): yield; pace.begin()
        done()

    task = scheduler.add(owner, steps())

Between two steps other requests are served, agents end and are removed, and the transaction of the turn is
committed: a step looks again at what it remembers from before its yield. `task.cancel()` closes the generator.
An error inside a step ends that task and is logged; the other tasks go on.

Fair: each owner (the name of a client, or "" for the server itself) is charged the time that its tasks took. The
owner that was charged least is next, its own tasks in turn. An owner that was idle has saved up `CREDIT_SECS` at most,
so that who asks little, now and then, waits for one step of another, however many others ask for much. One that had
much owes `DEBT_SECS` at most. `cost` announces that a step will take long (seconds): it is charged when the task is
added, so that such a step goes behind quick ones.
"""
from __future__ import annotations

import heapq
from collections import deque
from typing import Callable, Deque, Generator

from .reactor import Reactor

SLICE_SECS = 0.002   # of each turn; a step that is under way is not interrupted
STEP_SECS = 0.001    # after which a task had better yield; see Pace
CREDIT_SECS = 0.05   # that an owner can have been charged less than the one that is served
DEBT_SECS = 0.5      # that an owner can have been charged more
OWNERS_MOST = 1000   # idle owners whose charges are remembered


class Pace:
    """How long the step at work has taken. `if pace.over(): yield; pace.begin()` in a loop makes its steps."""

    __slots__ = ("_clock", "_until")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._until = self._clock() + STEP_SECS

    def over(self) -> bool:
        """Whether the step has taken long enough."""
        return self._clock() >= self._until


class Task:
    """Work that is done in steps; `done` when its generator has ended, was cancelled or has failed."""

    __slots__ = ("_running", "_steps", "done")

    def __init__(self, steps: Generator[object, None, object]) -> None:
        self._steps = steps
        self._running = False
        self.done = False

    def step(self) -> None:
        """Do one step, if it is not done."""
        if self.done:
            return
        self._running = True
        try:
            next(self._steps)
        except StopIteration:
            self.done = True
        except BaseException:
            self.done = True
            raise
        finally:
            self._running = False
        if self.done:  # cancelled by its own step
            self._steps.close()

    def cancel(self) -> None:
        """Leave the rest undone; a step that is under way is done to its end."""
        if not self.done:
            self.done = True
            if not self._running:
                self._steps.close()


class _Owner:
    """One for whom we work: what it was charged, in seconds, and its tasks, next one first."""

    __slots__ = ("charged", "tasks")

    def __init__(self) -> None:
        self.charged = 0.0
        self.tasks: Deque[Task] = deque()


class Scheduler:
    """See the module."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._owners: dict[str, _Owner] = {}   # those that began a task last are last
        self._remembered_most = OWNERS_MOST
        self._queue: list[tuple[float, int, _Owner]] = []  # owners with tasks, least charged first
        self._count = 0       # of entries in the queue, so that equals are served in the order in which they came
        self._least = 0.0     # what an owner had been charged when it was served last; it only grows
        self._expected = False  # a slice is due in this turn or the next
        self._turn, self._until = -1, 0.0  # up to when small things are done at once in this turn

    @property
    def free(self) -> bool:
        """Whether something small may be done at once: nobody waits for a turn, and in this one not much was."""
        if self._queue:
            return False
        if self._turn != self._reactor.turns:
            self._turn, self._until = self._reactor.turns, self._reactor.clock() + SLICE_SECS
            return True
        return self._reactor.clock() < self._until

    @property
    def busy(self) -> bool:
        """Whether there is a task that is not done."""
        return bool(self._queue)

    def add(self, name: str, steps: Generator[object, None, object], cost: float = 0.0) -> Task:
        """Begin a task for an owner; its first step is done in this turn or the next, not inside this call."""
        task = Task(steps)
        owner = self._owners.pop(name, None) or _Owner()
        self._owners[name] = owner
        owner.tasks.append(task)
        if len(owner.tasks) == 1:
            owner.charged = max(owner.charged, self._least - CREDIT_SECS) + cost
            self._enter(owner)
            if len(self._owners) > self._remembered_most:
                self._forget_idle()
        self._expect()
        return task

    def finish(self, secs: float) -> None:
        """Do all steps of all tasks at once, for at most so many seconds: the loop has ended."""
        until = self._reactor.clock() + secs
        while self._queue and self._reactor.clock() < until:
            self._step()

    # ------------------------------------------------------------ turns

    def _expect(self) -> None:
        if not self._expected:
            self._expected = True
            self._reactor.soon(self._slice)

    def _slice(self) -> None:
        """Do steps for one slice of the loop's turn, one at least."""
        self._expected = False
        clock = self._reactor.clock
        until = clock() + SLICE_SECS
        while self._queue:
            self._step()
            if clock() >= until:
                break
        if self._queue:
            self._expect()

    def _step(self) -> None:
        """Do one step of the next task of the owner that was charged least."""
        clock = self._reactor.clock
        charged, _, owner = heapq.heappop(self._queue)
        if charged > self._least:
            self._least = charged
        task, began = owner.tasks[0], clock()
        self._reactor.guard("a task", task.step)
        owner.charged += clock() - began
        owner.tasks.popleft()
        if not task.done:
            owner.tasks.append(task)
        if owner.tasks:
            self._enter(owner)

    def _enter(self, owner: _Owner) -> None:
        if owner.charged > self._least + DEBT_SECS:
            owner.charged = self._least + DEBT_SECS
        self._count += 1
        heapq.heappush(self._queue, (owner.charged, self._count, owner))

    def _forget_idle(self) -> None:
        """Bound the remembered owners: of the idle ones the half goes that began nothing for the longest."""
        idle = [name for name, owner in self._owners.items() if not owner.tasks]
        for name in idle[:len(idle) // 2 + 1]:
            del self._owners[name]
        self._remembered_most = max(OWNERS_MOST, 2 * len(self._owners))
