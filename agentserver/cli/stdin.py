"""My stdin, for an agent: read here, written there, however slowly the agent reads.

Owns:    `pour`, which gets any amount of bytes into an agent's bounded buffer, and `Pump`, the thread of `run`.
Runs in: `send` in the main thread; Pump in a thread of its own, with a client of its own.
Unaware: of output and of how the agent ends.
"""
from __future__ import annotations

import errno
import os
import select
import threading
from typing import TYPE_CHECKING, Callable

from ..errors import AgentServerError, RequestError

if TYPE_CHECKING:
    from ..client import Agent, AgentClient

PIECE = 64 * 1024
SMALL = 4096           # bytes; no server has a smaller buffer
SHORTEST_PAUSE = 0.002  # seconds between two attempts to write into a full buffer
LONGEST_PAUSE = 0.2
BACKGROUND_SECS = 0.5  # between two looks whether a background job was brought to the foreground


def pour(agent: Agent, data: bytes, over: Callable[[float], bool]) -> int:
    """Write all of `data`, waiting while the agent's buffer is full; return how many bytes were accepted.

    `over(secs)` waits and tells whether to give up. The pieces shrink when they do not fit, because the buffer
    may be smaller than any of them; only when a small one does not fit is waited.
    """
    at, size, pause = 0, PIECE, SHORTEST_PAUSE
    while at < len(data):
        try:
            agent.write(data[at:at + size])
        except RequestError as e:
            if e.code != "stdin_full":
                raise
            if size <= SMALL:
                if over(pause):
                    break
                pause = min(pause * 2, LONGEST_PAUSE)
            size = max(1, size // 2)
            continue
        at, size, pause = at + size, min(size * 2, PIECE), SHORTEST_PAUSE
    return min(at, len(data))


class Pump:
    """Copy descriptor 0 to an agent's stdin until one of them ends."""

    def __init__(self, connect: Callable[[], AgentClient], agent_id: str) -> None:
        self._connect, self._agent_id = connect, agent_id
        self._ended = threading.Event()
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, name="stdin", daemon=True)

    def start(self) -> None:
        """Begin to copy."""
        self._thread.start()

    def stop(self) -> None:
        """End the copying: the agent needs nothing any more."""
        self._ended.set()
        os.write(self._wake_writer, b"!")
        self._thread.join(2.0)  # a request that hangs must not keep `run` from ending
        if not self._thread.is_alive():
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _run(self) -> None:
        """Copy; that the agent or the server has gone is for the main thread to tell."""
        try:
            from ..client import Agent
            with self._connect() as client:
                self._copy(Agent(client, self._agent_id))
        except (AgentServerError, OSError):
            return

    def _copy(self, agent: Agent) -> None:
        while not self._ended.is_set():
            data = self._next()
            if data is None:
                continue
            if not data:
                agent.close_stdin()
                return
            pour(agent, data, self._ended.wait)

    def _next(self) -> bytes | None:
        """Return what was typed, b"" at the end, None when there is nothing to do now."""
        readable, _, _ = select.select([0, self._wake_reader], [], [])
        if 0 not in readable or self._ended.is_set():
            return None
        try:
            return os.read(0, PIECE)
        except BlockingIOError:
            return None
        except OSError as e:
            if e.errno == errno.EIO and self._in_background():
                self._ended.wait(BACKGROUND_SECS)
                return None
            return b""

    def _in_background(self) -> bool:
        """Whether the terminal belongs to another job of the shell just now (tcgetpgrp(3))."""
        try:
            return os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp()
        except OSError:
            return False


def ignore_background_reads() -> None:
    """Let a read of the terminal by a background job fail instead of stopping the job (SIGTTIN in tty(4))."""
    import signal
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
