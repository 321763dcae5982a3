"""Requests that wait while another process holds a lock on the registry.

Owns:    those requests, in order, until the lock is gone or was held for too long.
Runs in: the core's thread; nothing here waits, and everybody else is served meanwhile.
Unaware: of what a request asks for. One that waits has changed nothing.
"""
from __future__ import annotations

from typing import Callable, Generator, NamedTuple, Union

from .pending import Pending
from .reactor import Reactor
from .registry import Registry
from .scheduler import Scheduler

Steps = Generator[object, None, Union[bytes, Pending]]

WAITING_MOST = 1000                 # requests
WAITING_BYTES = 16 * 1024 * 1024    # that they have together


class _Waiting(NamedTuple):
    promise: Pending
    again: Callable[[], Steps]
    size: int


class Patience:
    """See the module."""

    def __init__(self, reactor: Reactor, scheduler: Scheduler, registry: Registry) -> None:
        self._reactor, self._scheduler, self._registry = reactor, scheduler, registry
        self._waiting: list[_Waiting] = []
        self._bytes = 0

    def wait(self, again: Callable[[], Steps], size: int) -> Pending | None:
        """Promise the reply to a request that `again` handles, later; None if there is no reason or no room to wait."""
        if not self._registry.patient or len(self._waiting) >= WAITING_MOST or self._bytes + size > WAITING_BYTES:
            return None
        promise = Pending(lambda: None)
        self._waiting.append(_Waiting(promise, again, size))
        self._bytes += size
        return promise

    def look(self) -> None:
        """At the end of each turn: let those go on who have waited long enough, for better or worse."""
        if self._waiting and not self._registry.patient:
            waiting, self._waiting, self._bytes = self._waiting, [], 0
            self._reactor.soon(lambda: self._begin(waiting))

    def _begin(self, waiting: list[_Waiting]) -> None:
        self._scheduler.add("", self._go_on(waiting))

    def _go_on(self, waiting: list[_Waiting]) -> Generator[object, None, None]:
        for promise, again, _size in waiting:
            if promise.then is None:  # who asked has gone, and nothing was done
                continue
            reply = yield from again()
            if isinstance(reply, Pending):
                reply.then = promise.complete
            else:
                promise.complete(reply)
            yield None
