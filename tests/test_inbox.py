"""One peer's requests: in their order, one after another, and none of them holds another peer's.

Owns:    the rules of `core/inbox.py`.
Runs in: the test process; the host is a stand-in, and nothing waits.
Unaware: of sockets and of what a request means.
"""
from __future__ import annotations

from typing import Dict, Iterator, List, Optional

import pytest

from agentserver.core.control import Peer, Steps
from agentserver.core.inbox import PROMISED_MOST, Inbox
from agentserver.core.pending import Pending
from agentserver.core.reactor import Reactor
from agentserver.core.scheduler import Scheduler


class Host:
    """What an inbox needs; `b"deed 3 x"` is done in three steps, `b"promise"` is promised, `b"wrong"` is a mistake."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.scheduler = Scheduler(self.reactor)
        self.takes_replies, self.abandoned = True, False
        self.did: List[str] = []
        self.answers: List[bytes] = []
        self.promises: List[Pending] = []
        self.deferred: List[int] = []
        self.mistakes: List[Exception] = []
        self.held = 0
        self.inboxes: Dict[str, Inbox] = {}

    def asked(self, raw: Optional[bytes], peer: Peer) -> Steps:
        kind, *rest = (raw or b"").decode().split()
        if kind == "wrong":
            raise KeyError(kind)
        if kind == "promise":
            self.promises.append(Pending(lambda: None))
            return self.promises[-1]
        for number in range(int(rest[0]) if rest else 0):
            self.did.append(f"{rest[1]}{number}")
            yield kind == "look"
        return raw or b""

    def answer(self, tag: int, reply: bytes) -> None:
        self.answers.append(b"%d " % tag + reply)

    def later(self, tag: int) -> None:
        self.deferred.append(tag)

    def handled(self, size: int) -> None:
        self.held -= size

    def mistake(self, error: Exception) -> None:
        self.mistakes.append(error)

    def put(self, name: str, tag: int, raw: bytes) -> None:
        self.held += len(raw)
        self.inboxes.setdefault(name, Inbox(Peer(name, None, name), self)).put(tag, raw)

    def turns(self) -> None:
        while self.scheduler.busy:
            self.reactor.turn(wait=False)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.reactor.close()


def test_requests_of_a_peer_are_done_one_after_another(host: Host) -> None:
    host.put("one", 1, b"steps 3 a")
    host.put("one", 2, b"steps 3 b")
    host.put("two", 3, b"steps 3 c")
    host.turns()
    assert [did for did in host.did if did[0] in "ab"] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert host.did.index("c2") < host.did.index("b2"), "the other peer does not wait for both"
    assert sorted(host.answers) == [b"1 steps 3 a", b"2 steps 3 b", b"3 steps 3 c"]
    assert host.held == 0 and all(inbox.idle for inbox in host.inboxes.values())


def test_a_promise_holds_neither_the_next_request_nor_another_peer(host: Host) -> None:
    for tag in range(PROMISED_MOST):
        host.put("one", tag, b"promise")
    host.put("one", 100, b"last")
    host.put("two", 200, b"other")
    host.turns()
    assert host.deferred == list(range(PROMISED_MOST))
    assert host.answers == [b"200 other"], "so many are promised that the next one of the same peer waits"
    host.promises[3].complete(b"made")
    host.turns()
    assert host.answers[1:] == [b"3 made", b"100 last"]
    assert not host.inboxes["one"].idle and not host.inboxes["one"].working


def test_nothing_is_begun_while_replies_are_not_taken(host: Host) -> None:
    host.takes_replies = False
    host.put("one", 1, b"x")
    host.turns()
    assert not host.answers and host.inboxes["one"].working
    host.takes_replies = True
    host.inboxes["one"].go_on()
    host.turns()
    assert host.answers == [b"1 x"]


def test_of_a_peer_that_has_gone_deeds_are_done_and_looks_are_left(host: Host) -> None:
    host.abandoned = True
    host.put("one", 1, b"look 1000 a")
    host.put("two", 2, b"deed 50 b")
    host.turns()
    assert host.did.count("a0") == 1 and "a1" not in host.did and "b49" in host.did
    assert host.answers == [b"2 deed 50 b"]


def test_a_closed_connection_drops_what_waits_and_finishes_what_is_at_work(host: Host) -> None:
    stopped: List[str] = []
    host.put("one", 1, b"promise")
    host.turns()
    host.promises[0]._stop = lambda: stopped.append("stopped")
    host.put("one", 2, b"deed 20000 a")
    host.put("one", 3, b"never")
    host.reactor.turn(wait=False)
    host.inboxes["one"].clear()
    host.turns()
    assert stopped == ["stopped"] and "a19999" in host.did and host.answers == [b"2 deed 20000 a"]


def test_what_is_dropped_before_it_was_begun_is_no_mistake(host: Host) -> None:
    said: List[str] = []
    host.reactor.say = said.append
    host.put("two", 1, b"deed 1 a")  # or the next one would be done at once
    host.put("one", 1, b"never")
    host.inboxes["one"].clear()
    host.turns()
    assert not said and host.answers == [b"1 deed 1 a"] and host.inboxes["one"].idle


def test_what_is_small_is_done_at_once_where_nobody_waits(host: Host) -> None:
    host.put("one", 1, b"hello")
    assert host.answers == [b"1 hello"], "not only in the next turn"
    host.put("two", 1, b"deed 2 a")
    host.put("one", 2, b"again")
    assert len(host.answers) == 1, "another one is at work, and they take turns"
    host.turns()
    assert host.answers[1:] == [b"2 again", b"1 deed 2 a"]


def test_a_mistake_costs_one_request(host: Host) -> None:
    host.put("one", 1, b"wrong")
    host.put("one", 2, b"right")
    host.turns()
    assert len(host.mistakes) == 1 and host.answers[1] == b"2 right" and b'"internal"' in host.answers[0]
