"""The lifecycle is one table; whatever is not in it is an error, and the documentation prints the same."""
from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from agentserver.core import lifecycle
from agentserver.core.lifecycle import ALIVE, INPUTS, STATUSES, TERMINAL, TRANSITIONS, InvalidTransition, step

PAIRS = list(itertools.product(STATUSES, INPUTS))

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"


def printed_table() -> dict[tuple[str, str], str]:
    """Read the table of the page: lines of statuses, two spaces or more, then `input -> status` pairs."""
    (block,) = [block for block in re.findall(r"```\n(.*?)```", PAGE.read_text("utf-8"), re.S) if " -> init" in block]
    pairs: dict[tuple[str, str], str] = {}
    for line in block.strip().splitlines():
        statuses, steps = re.split(r"  +", line.strip(), maxsplit=1)
        for status, one in itertools.product(statuses.split(", "), steps.split(", ")):
            given, after = one.split(" -> ")
            assert (status, given) not in pairs, f"{status} {given} is printed twice"
            pairs[status, given] = after
    return pairs


@pytest.mark.parametrize("status,given", PAIRS)
def test_every_pair_is_in_the_table_or_an_error(status: str, given: str) -> None:
    if (status, given) in TRANSITIONS:
        assert step(status, given) == TRANSITIONS[status, given]
    else:
        with pytest.raises(InvalidTransition, match=f"{given}.*{status}"):
            step(status, given)


@pytest.mark.parametrize("status,given", [("running", "nonsense"), ("nonsense", "start"), ("", "")])
def test_unknown_words_are_errors(status: str, given: str) -> None:
    with pytest.raises(InvalidTransition):
        step(status, given)


def test_the_table_speaks_only_known_words() -> None:
    assert {status for status, _ in TRANSITIONS} | set(TRANSITIONS.values()) == set(STATUSES)
    assert {given for _, given in TRANSITIONS} == set(INPUTS)
    assert TERMINAL | ALIVE | {lifecycle.IDLE} == set(STATUSES) and not TERMINAL & ALIVE
    assert len(set(STATUSES)) == len(STATUSES) == 8 and len(set(INPUTS)) == len(INPUTS)


def test_every_status_is_reached_from_idle() -> None:
    reached = {lifecycle.IDLE}
    while True:
        more = {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(STATUSES)


@pytest.mark.parametrize("status", STATUSES)
def test_an_end_is_reached_from_everywhere(status: str) -> None:
    seen, todo = set(), [status]
    while todo:
        here = todo.pop()
        seen.add(here)
        todo += [after for (before, _), after in TRANSITIONS.items() if before == here and after not in seen]
    assert seen & TERMINAL


@pytest.mark.parametrize("status", sorted(ALIVE))
def test_a_process_can_end_in_any_way_at_any_time(status: str) -> None:
    ends = {given: step(status, given) for given in ("exited_ok", "exited_bad", "ended_by_us", "lost")}
    assert ends == {"exited_ok": "completed", "exited_bad": "failed", "ended_by_us": "terminated", "lost": "failed"}


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_only_a_restart_leaves_an_end(status: str) -> None:
    assert {given: after for (before, given), after in TRANSITIONS.items() if before == status} == \
        {"restart": "initializing"}


def test_no_input_leads_nowhere() -> None:
    assert not [pair for pair, after in TRANSITIONS.items() if pair[0] == after]


def test_the_documentation_prints_the_table() -> None:
    assert printed_table() == TRANSITIONS
