"""AsyncAgentClient, driven from synchronous tests, so that one suite is for both clients.

Owns:    `Driven`, with the methods of AgentClient: each is awaited on the event loop of a thread of its own.
Runs in: the test process.
Unaware: of what is tested, and of each method: all are passed on.
"""
from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any, Iterator, Optional

from agentserver import AgentClient, AsyncAgentClient

DEADLINE_SECS = 60.0


class Passed:
    """An object whose coroutines are awaited and whose asynchronous iterators are iterated elsewhere."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if inspect.ismethod(value):
            return lambda *given, **named: self._settled(value(*given, **named))
        return self._settled(value)

    def _settled(self, value: Any) -> Any:
        if inspect.isawaitable(value):
            value = asyncio.run_coroutine_threadsafe(_await(value), self._loop).result(DEADLINE_SECS)
        if hasattr(value, "__anext__"):
            return self._iterate(value)
        return Passed(value, self._loop) if type(value).__name__ == "AsyncAgent" else value

    def _iterate(self, items: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._settled(items.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            if not self._loop.is_closed():
                self._settled(items.aclose())


async def _await(value: Any) -> Any:
    return await value


class Driven(Passed):
    """An AsyncAgentClient with a loop of its own; a context manager."""

    def __init__(self, address: Optional[str] = None, **options: Any) -> None:
        super().__init__(AsyncAgentClient(address, **options), asyncio.new_event_loop())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
        self._settled(self._loop.shutdown_asyncgens())   # as asyncio.run does
        self._settled(self._loop.shutdown_default_executor())
        left = [task for task in asyncio.all_tasks(self._loop) if not task.done()]
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_SECS)
        self._loop.close()
        assert not left, f"left running: {left}"


#: both clients, by name
TWINS = {"sync": AgentClient, "async": Driven}
