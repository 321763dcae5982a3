"""Large work in slices: in order, fair between owners, and an error costs one task.

Owns:    the rules of `core/scheduler.py` and of the reactor's `soon`.
Runs in: the test process; the clock is an argument, so nothing waits.
Unaware: of requests and agents.
"""
from __future__ import annotations

from typing import Iterator, List

import pytest

from agentserver.core import scheduler
from agentserver.core.reactor import Reactor
from agentserver.core.scheduler import SLICE_SECS, Scheduler


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A reactor, a scheduler, and a list of what was done."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reactor = Reactor(self.clock)
        self.said: List[str] = []
        self.reactor.say = self.said.append
        self.scheduler = Scheduler(self.reactor)
        self.done: List[str] = []

    def steps(self, name: str, count: int, secs: float = 0.0001) -> Iterator[None]:
        for number in range(count):
            self.clock.now += secs
            self.done.append(f"{name}{number}")
            yield

    def turn(self) -> List[str]:
        """Do one turn of the loop and return what was done in it."""
        before = len(self.done)
        self.reactor.turn(wait=False)
        return self.done[before:]

    def turns(self) -> int:
        """Do turns until there is nothing left to do; return how many it took."""
        count = 0
        while self.scheduler.busy:
            self.turn()
            count += 1
        return count


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.reactor.close()


def test_a_turn_does_one_slice_and_the_loop_does_not_sleep_before_the_next(place: Place) -> None:
    place.scheduler.add("a", place.steps("a", 100))
    assert place.done == [], "not inside add"
    place.reactor.turn()  # would sleep for ever if it waited for a descriptor
    assert len(place.done) == pytest.approx(SLICE_SECS / 0.0001, abs=1)
    assert place.turns() == pytest.approx(100 * 0.0001 / SLICE_SECS, abs=1)
    assert place.done == [f"a{n}" for n in range(100)]


def test_a_turn_ends_after_each_slice(place: Place) -> None:
    ends: List[int] = []
    place.reactor.end_of_turn = lambda: ends.append(len(place.done))
    place.scheduler.add("a", place.steps("a", 100))
    place.turns()
    assert len(ends) >= 5 and ends == sorted(ends) and ends[0] < 100


def test_owners_take_turns_by_the_time_that_they_took(place: Place) -> None:
    place.scheduler.add("slow", place.steps("s", 10, 0.004))
    place.scheduler.add("quick", place.steps("q", 40, 0.001))
    while place.scheduler.busy and len(place.done) < 25:
        place.turn()
    slow = sum(name.startswith("s") for name in place.done)
    quick = len(place.done) - slow
    assert slow * 4 == pytest.approx(quick, abs=5), place.done


def test_tasks_of_one_owner_take_turns(place: Place) -> None:
    place.scheduler.add("one", place.steps("a", 3, 0.0))
    place.scheduler.add("one", place.steps("b", 3, 0.0))
    place.turns()
    assert place.done == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_who_asks_little_waits_for_one_step_whoever_else_asks_for_much(place: Place) -> None:
    for number in range(50):
        place.scheduler.add(f"greedy{number}", place.steps(f"g{number}.", 100, 0.003))
    for _ in range(100):
        place.turn()
    for number in range(50):
        place.scheduler.add("modest", place.steps(f"m{number}.", 1, 0.0001))
        assert f"m{number}.0" in place.turn()


def test_a_step_that_will_take_long_goes_behind_quick_ones(place: Place) -> None:
    for number in range(10):
        place.scheduler.add(f"large{number}", place.steps("L", 1, 0.1), cost=0.1)
    place.scheduler.add("small", place.steps("s", 1))
    place.turns()
    assert place.done[0] == "s0"


def test_who_had_much_is_served_again_after_a_bounded_time(place: Place) -> None:
    place.scheduler.add("old", place.steps("o", 1000, 0.1))
    place.turns()  # charged 100 seconds
    place.scheduler.add("new", place.steps("n", 10_000, 0.01))
    place.turn()
    place.scheduler.add("old", place.steps("again", 1, 0.001))
    before = place.clock.now
    while "again0" not in place.done:
        place.turn()
    assert place.clock.now - before <= scheduler.DEBT_SECS + 0.1


def test_an_idle_owner_has_saved_up_little(place: Place) -> None:
    place.scheduler.add("idle", place.steps("i", 1))
    place.scheduler.add("busy", place.steps("b", 1000, 0.001))
    for _ in range(100):
        place.turn()
    place.scheduler.add("idle", place.steps("now", 1000, 0.001))
    before = len(place.done)
    for _ in range(200):
        place.turn()
    new = place.done[before:]
    ahead = scheduler.CREDIT_SECS / 0.001
    assert sum(name.startswith("b") for name in new) == pytest.approx((len(new) - ahead) / 2, abs=5)


def test_an_error_ends_its_task_and_no_other(place: Place) -> None:
    def wrong() -> Iterator[None]:
        yield
        raise KeyError("a mistake")

    failed = place.scheduler.add("a", wrong())
    place.scheduler.add("a", place.steps("a", 5))
    place.scheduler.add("b", place.steps("b", 5))
    place.turns()
    assert failed.done and sorted(place.done) == [f"{name}{n}" for name in "ab" for n in range(5)]
    assert len(place.said) == 1 and "KeyError" in place.said[0]


def test_a_cancelled_task_does_nothing_more_and_is_closed(place: Place) -> None:
    closed: List[str] = []

    def steps() -> Iterator[None]:
        try:
            yield from place.steps("a", 1000, 0.001)
        finally:
            closed.append("closed")

    task = place.scheduler.add("a", steps())
    place.turn()
    task.cancel()
    task.cancel()
    assert closed == ["closed"] and task.done
    seen = len(place.done)
    place.turns()
    assert len(place.done) == seen


def test_a_task_may_cancel_itself_and_add_others(place: Place) -> None:
    def steps() -> Iterator[None]:
        place.scheduler.add("a", place.steps("other", 2))
        task.cancel()
        place.done.append("to the end of this step")
        yield
        place.done.append("never")

    task = place.scheduler.add("a", steps())
    place.turns()
    assert place.done == ["to the end of this step", "other0", "other1"] and not place.said


def test_finish_does_all_that_is_left(place: Place) -> None:
    place.scheduler.add("a", place.steps("a", 300, 0.001))
    place.scheduler.finish(10.0)
    assert len(place.done) == 300 and not place.scheduler.busy
    place.scheduler.add("a", place.steps("endless", 100_000, 0.001))
    place.scheduler.finish(0.5)
    assert place.scheduler.busy


def test_many_owners_are_forgotten_when_they_are_idle(place: Place) -> None:
    for number in range(5000):
        place.scheduler.add(f"owner{number}", place.steps("x", 1, 0.0))
        place.turn()
    assert len(place.scheduler._owners) <= 2 * scheduler.OWNERS_MOST


def test_soon_is_called_once_in_the_order_asked_and_an_error_costs_one_call(place: Place) -> None:
    def wrong() -> None:
        raise ValueError("a mistake")

    place.reactor.soon(lambda: place.done.append("first"))
    place.reactor.soon(wrong)
    place.reactor.soon(lambda: place.reactor.soon(lambda: place.done.append("in the next turn")))
    assert place.turn() == ["first"] and place.turn() == ["in the next turn"] and place.turn() == []
    assert len(place.said) == 1
