"""A conversation with a server, without the waiting: what it can ask for, and how it goes on.

Owns:    the steps that a conversation is made of, and the one way to resume it.
Runs in: any thread; it is pure.
Unaware: of links and event loops. A driver does each step: `AgentClient` by calling, `AsyncAgentClient` by awaiting.

A conversation is a generator that yields steps and is sent what came of them, or thrown the error. So that
who asks, waits, retries and follows is written once, and both clients do the same.
"""
from __future__ import annotations

from typing import Any, Callable, Generator, Iterable, NamedTuple, Optional, Tuple, TypeVar, Union

from .errors import LinkError, RequestTimeout

T = TypeVar("T")


class Ask(NamedTuple):
    """Send a request that has this id, once; gives the raw reply.

    `timeout` is for this try; where many ask at once, it may have to wait for its turn at most `left` seconds.
    """

    raw: bytes
    request_id: str
    timeout: float
    left: float


class HangUp(NamedTuple):
    """Let go of the way requests take: what came over it makes no sense."""


class Listen(NamedTuple):
    """Listen to these topics (prefixes); gives what confirms it, if anything does. `endpoint` publishes them."""

    topics: Tuple[str, ...]
    endpoint: str
    timeout: float


class Hear(NamedTuple):
    """Wait for the next thing that is told; gives it, or `None` after `timeout` seconds."""

    timeout: float


class Pause(NamedTuple):
    """Do nothing for a while."""

    secs: float


class Item(NamedTuple):
    """Hand this to whoever iterates."""

    value: Any


class Over(NamedTuple):
    """Not a step, but the end: the conversation has returned this."""

    value: Any


Step = Union[Ask, HangUp, Listen, Hear, Pause, Item]
Talk = Generator[Step, Any, T]


def resume(talk: Talk[Any], answer: Any = None, error: Optional[BaseException] = None) -> Union[Step, Over]:
    """Begin a conversation, or go on with what came of its last step; return the next one, or the end."""
    try:
        return talk.send(answer) if error is None else talk.throw(error)
    except StopIteration as end:
        return Over(end.value)


def until(talk: Talk[T], deadline: float, clock: Callable[[], float], late: Callable[[], str]) -> Talk[T]:
    """Have a conversation that is over at a deadline, whatever it waits for then: each step gets what is left.

    Where the server was not reached at last, that is the error; else a `RequestTimeout`, whose sentence `late` returns.
    """
    absent: Optional[LinkError] = None
    try:
        step = resume(talk)
        while not isinstance(step, Over):
            if isinstance(step, Item):
                yield step
                step = resume(talk)
                continue
            left = deadline - clock()
            if left <= 0:
                raise absent or RequestTimeout(late())
            try:
                answer = yield _clipped(step, left)
            except Exception as e:
                absent = e if isinstance(e, LinkError) else None
                step = resume(talk, error=e)
            else:
                absent = None if isinstance(step, Ask) else absent
                step = resume(talk, answer)
        end: T = step.value
        return end
    finally:
        talk.close()


def _clipped(step: Step, secs: float) -> Step:
    """Return a step that takes no longer than this."""
    if isinstance(step, Ask):
        return step._replace(timeout=min(step.timeout, secs), left=min(step.left, secs))
    if isinstance(step, (Listen, Hear)):
        return step._replace(timeout=min(step.timeout, secs))
    return Pause(min(step.secs, secs)) if isinstance(step, Pause) else step


def through(talk: Talk[T], change: Callable[[Any], Iterable[Any]]) -> Talk[T]:
    """Have a conversation whose items are each replaced by what `change` makes of it."""
    try:
        step = resume(talk)
        while not isinstance(step, Over):
            if isinstance(step, Item):
                for value in change(step.value):
                    yield Item(value)
                step = resume(talk)
                continue
            try:
                answer = yield step
            except Exception as e:
                step = resume(talk, error=e)
            else:
                step = resume(talk, answer)
        end: T = step.value
        return end
    finally:
        talk.close()
