"""An agent's screen on mine: what it shows is written here, and at the end its traces are taken back.

Owns:    stdout while attached, the thread that follows the agent, and from `start` on the client that this uses.
Runs in: that thread; `close` and the rest are called by the main thread.
Unaware: of keys and signals. What to write to begin with is redraw.py's.
"""
from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Callable, Optional

from ..errors import LinkError, RequestTimeout
from . import out, redraw, run
from .escapes import CANCEL, Modes

if TYPE_CHECKING:
    from ..client import AgentClient
    from ..results import AgentInfo, Chunk, OutputDropped

STUCK_SECS = 1.0            # for a terminal that takes nothing any more, before it is left as it is
_LAST_LINE = b"\x1b[m\x1b[999B"
_MOVED = re.compile(rb"\x1b\[[0-9;]*[AFHdf]")  # the cursor was sent upwards: there may be something below it
_LOOK_BACK = 4096           # bytes


class Screen:
    """Show an agent's output on stdout until it ends. `changed` is called when one of the fields was set."""

    def __init__(self, client: AgentClient, info: AgentInfo, rows: Optional[int], fresh: bool,
                 changed: Callable[[], None]) -> None:
        self._client, self._info, self._rows, self._fresh, self._changed = client, info, rows, fresh, changed
        #: the agent's screen is on mine; whether its program had better draw it again
        self.drawn = self.doubtful = False
        self.ended: Optional[AgentInfo] = None
        self.failed: Optional[BaseException] = None
        self._modes = Modes()
        self._recent = b""
        self._writing = threading.Lock()
        self._closed = self._suspended = False

    def start(self) -> None:
        """Begin to show."""
        threading.Thread(target=self._run, name="screen", daemon=True).start()

    def _run(self) -> None:
        try:
            with self._client:
                since = 0 if self._fresh else self._draw()
                self.drawn = True
                self._changed()
                self.ended = run.to_the_end(self._client, self._info.id, None, self._show, since)
        except RequestTimeout as e:
            self.failed = LinkError(str(e))
        except Exception as e:  # whatever it is, the terminal has to be given back
            self.failed = e
        self._changed()

    def _draw(self) -> int:
        """Show what is on the agent's screen now; return up to where in its output that is."""
        agent = self._client.agent(self._info.id)
        span = agent.info().output["stdout"]
        picture = redraw.picture(agent, span.first_offset, span.end_offset)
        self._modes, self.doubtful = picture.modes, picture.doubtful
        away = b"\r\n" * (self._rows or 0)  # what is on my screen scrolls up; it is not erased
        self._write(b"\x1b[m" + away + b"\x1b[H\x1b[J" + picture.data)
        return picture.offset

    def _show(self, _stream: str, what: Chunk | OutputDropped) -> None:
        if what.dropped or len(what.data) > redraw.FLOOD:
            self._write(redraw.flood(what.data, self._modes, what.dropped))
        else:
            self._modes.feed(what.data)
            self._write(what.data)

    def _write(self, data: bytes) -> None:
        with self._writing:
            if not self._closed:
                out.write(1, data)
                self._recent = (self._recent + data[-_LOOK_BACK:])[-_LOOK_BACK:]

    # ------------------------------------------------------------ for the main thread

    def suspend(self) -> None:
        """Give my terminal back for a while; nothing is shown until `resume`."""
        self._suspended = self._writing.acquire(timeout=STUCK_SECS)
        if self._suspended:
            self._leave(True)

    def resume(self) -> None:
        """Take my terminal again, empty; the agent's program is to draw on it."""
        if self._suspended or self._writing.acquire(timeout=STUCK_SECS):
            before = b"" if self._suspended else CANCEL + self._modes.undo()  # what is pushed twice is not popped twice
            self._suspended = False
            out.write(1, before + b"\x1b[H\x1b[2J" + self._modes.redo())
            self._writing.release()

    def close(self, away: bool) -> None:
        """Show nothing more, and undo what was switched on. With `away` the cursor goes below what is shown."""
        if self._writing.acquire(timeout=STUCK_SECS):
            self._closed = True
            self._leave(away)

    def _leave(self, away: bool) -> None:
        below = _LAST_LINE if _MOVED.search(self._recent) and not self._modes.alternate else b""
        try:
            out.write(1, CANCEL + self._modes.undo() + (below + b"\r\n" if away else b""))
        except OSError:
            pass  # it is gone
