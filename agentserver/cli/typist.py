"""What is typed, on its way to an agent's terminal; and the size that this is to have.

Owns:    the thread that sends both, and from `start` on the client that this uses. What is typed while it waits for
         the server goes out together.
Runs in: a thread of its own; `type`, `resize` and the rest are called by the main thread.
Unaware: of where keys and sizes come from.
"""
from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, Optional, Tuple

from ..errors import RequestError

if TYPE_CHECKING:
    from ..client import Agent, AgentClient

MOST_WAITING = 256 * 1024  # bytes, before no more are to be read from the keyboard
#: between a key and a size: less forgets the key that it has just read when SIGWINCH comes in that moment
APART_SECS = 0.05
#: the agent is just being restarted, or ends: that is told by its output
_NOT_NOW = ("invalid_state", "stdin_closed", "agent_not_found")


class Typist:
    """Send keys and sizes to one agent, in the background. `changed` is called when it failed, or has room again."""

    def __init__(self, client: AgentClient, agent_id: str, changed: Callable[[], None]) -> None:
        self._client, self._agent_id, self._changed = client, agent_id, changed
        self.failed: Optional[BaseException] = None
        self._news = threading.Condition()
        self._keys = b""
        self._size: Optional[Tuple[int, int]] = None
        self._typed_at = self._resized_at = 0.0  # monotonic
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keys", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    @property
    def room(self) -> bool:
        """Whether more keys are welcome."""
        return len(self._keys) < MOST_WAITING

    def type(self, keys: bytes) -> None:
        """Send keys, with the next request."""
        with self._news:
            self._keys += keys
            self._news.notify()

    def resize(self, rows: int, cols: int) -> None:
        """Give the agent's terminal a size. Of those that come while a request is under way only the last is sent."""
        with self._news:
            self._size = (rows, cols)
            self._news.notify()

    def finish(self, secs: float) -> None:
        """Wait so long for what was typed to be sent; what is left is dropped."""
        self._over.set()
        with self._news:
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join(secs)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        from ..client import Agent
        try:
            with self._client:
                agent = Agent(self._client, self._agent_id)
                while self._turn(agent):
                    continue
        except Exception as e:  # whatever it is, the terminal has to be given back
            self.failed = e
            self._changed()

    def _turn(self, agent: Agent) -> bool:
        """Send what there is, or wait for it; return whether there may be more."""
        with self._news:
            while not (self._keys or self._size or self._over.is_set()):
                self._news.wait()
            keys, size, self._keys, self._size = self._keys, self._size, b"", None
        if len(keys) >= MOST_WAITING:
            self._changed()
        try:
            if size:
                self._apart_from(self._typed_at)
                agent.client.control(agent.id, "resize", rows=size[0], cols=size[1])
                self._resized_at = time.monotonic()
            if keys:
                self._apart_from(self._resized_at)
                self._send(agent, keys)
                self._typed_at = time.monotonic()
        except RequestError as e:
            if e.code not in _NOT_NOW:
                raise
        return bool(keys or size)

    def _apart_from(self, other: float) -> None:
        self._over.wait(max(0.0, other + APART_SECS - time.monotonic()))

    def _send(self, agent: Agent, keys: bytes) -> None:
        from .stdin import pour
        pour(agent, keys, self._over.wait)
