"""One command on many agents, step by step.

Owns:    the results of one batch while it is at work, the bound on them, and how far it has come.
Runs in: the core's thread, as part of a task: others are served between two steps.
Unaware: of what a command does, and of how the reply travels.

The reply is bounded while it is made: room for saying "not tried" of everything that is left is kept, and what would
take it away is not tried. What was done, and how far the batch has come, is in one transaction at the end of each step;
a core that goes on with it after a death begins where that ended.
"""
from __future__ import annotations

import json
from typing import Any, Callable, Generator, NamedTuple, Sequence

from ..errors import RequestError
from ..wire import Json, encode_text
from .agent import Agent
from .commands import EFFECTS, Commands, Encoded
from .registry import Ask, Registry
from .scheduler import Pace
from .standstill import Standstill

DEED_BYTES = 8 * 1024  # most that the result of a command with an effect can have
FULL = ("not tried, because the reply is full; ask for it in another request", "message_too_large")
FAILED = ("not tried, because one before it failed", "invalid_state")
_CHOSEN = -1  # the position under which the agents are remembered that labels chose


class Work(NamedTuple):
    """What a batch is to do: a command, checked, for whom, and how many bytes its results may have together."""

    command: str
    payload: Any
    ask: Ask
    fail_fast: bool
    room: int


class Batch:
    """See the module. `find` returns the agent that a reference means, or raises `RequestError`; `mistake` logs one."""

    def __init__(self, work: Work, find: Callable[[str], Agent], commands: Commands, registry: Registry,
                 standstill: Standstill, mistake: Callable[[str, Exception], None]) -> None:
        self._work, self._find, self._commands, self._mistake = work, find, commands, mistake
        self._registry, self._standstill = registry, standstill
        self._effect = work.command in EFFECTS
        self._success = _Success()
        self._refs: Sequence[str] = ()
        self._room = work.room
        self._saved = 0   # so many results are on disk
        self._stop: tuple[str, str] | None = None  # why nothing more is tried
        #: JSON texts, in the order of the agents
        self.results: list[str] = []
        #: the codes of those that failed
        self.failed: list[str] = []

    def steps(self, refs: Sequence[str] | None, choose: Callable[[], Generator[bool, None, list[str]]],
              pace: Pace) -> Generator[bool, None, None]:
        """Do all, in steps; each yields whether the rest may be left undone. Without `refs`, `choose` says for whom."""
        yield from self._begin(refs, choose)
        begun: set[str] = set()
        since = self._commands.now()
        for ref in self._refs[len(self.results):]:
            self._commands.recent(since)
            self._one(ref)
            if pace.over() and len(self.results) < len(self._refs):
                begun |= self._standstill.take()
                self._save(refs is None)
                yield not self._effect
                pace.begin()
        self._standstill.give_back(begun)

    def _begin(self, refs: Sequence[str] | None,
               choose: Callable[[], Generator[bool, None, list[str]]]) -> Generator[bool, None, None]:
        """Begin anew, or where a core before us had come to."""
        progress = self._registry.progress(self._work.ask.request_id) if self._effect else {}
        self._refs = progress.pop(_CHOSEN, []) or refs or ()
        if refs is None and not self._refs:
            self._refs = yield from choose()
        self._room -= len(self._refs) * _SKIPPED_BYTES + len(encode_text(list(self._refs)))
        if self._room < (DEED_BYTES if self._effect else 0):
            raise RequestError(f"a reply for {len(self._refs)} agents would have more than {self._work.room} bytes; "
                               "name fewer at once", "message_too_large")
        for position in sorted(progress):
            if position != len(self.results):  # a part before it is damaged; `begun` keeps others from being done twice
                break
            for text in progress[position]:
                self._room -= len(text) - _skipped(self._refs[len(self.results)])
                self._add(text, json.loads(text)["error_code"])
        self._saved = len(self.results)

    # ------------------------------------------------------------ one agent

    def _one(self, ref: str) -> None:
        if self._stop is None and self._effect and self._room < DEED_BYTES:
            self._stop = FULL
        if self._stop is not None:
            self._add(_refused(ref, *self._stop), self._stop[1])
            return
        try:
            self._try(ref)
        except RequestError as e:
            self._failed(ref, str(e), e.code)
        except OSError as e:  # of the output files
            self._failed(ref, f"the server's disk or descriptors failed: {e.strerror}", "unavailable")
        except Exception as e:
            self._mistake("a command of a batch", e)
            self._failed(ref, "something failed inside the server; its core.log says what", "internal")

    def _failed(self, ref: str, sentence: str, code: str) -> None:
        self._fit(ref, _refused(ref, sentence, code), code)
        if self._work.fail_fast and self._stop is None:
            self._stop = FAILED

    def _try(self, ref: str) -> None:
        agent = self._find(ref)
        cursors = dict(agent.cursors)
        data = self._commands.do(agent, self._work.command, self._work.payload, self._work.ask)
        if not self._fit(ref, self._success.text(agent, data), None):
            agent.cursors = cursors  # it was not read after all

    def _fit(self, ref: str, text: str, code: str | None) -> bool:
        """Add a result if there is room for it; else this one and all after it count as not tried."""
        more = len(text) - _skipped(ref)
        if more > max(0, self._room):
            self._stop = FULL
            self._add(_refused(ref, *FULL), FULL[1])
            return False
        self._room -= more
        self._add(text, code)
        return True

    def _add(self, text: str, code: str | None) -> None:
        self.results.append(text)
        if code is not None:
            self.failed.append(code)

    def _save(self, chosen: bool) -> None:
        if self._effect:
            if chosen and not self._saved:
                self._registry.advance(self._work.ask, _CHOSEN, list(self._refs))
            self._registry.advance(self._work.ask, self._saved, self.results[self._saved:])
            self._saved = len(self.results)


def _refused(ref: str, sentence: str, code: str) -> str:
    return encode_text({"agent_id": ref, "success": False, "status": None, "error": sentence, "error_code": code,
                        "data": None})


_SKIPPED_BYTES = len(_refused("", *FULL))


def _skipped(ref: str) -> int:
    """Return the bytes that it takes to say of an agent that it was not tried."""
    return _SKIPPED_BYTES + len(encode_text(ref))


class _Success:
    """Write the items of a batch that went well. The data of neighbours is mostly equal and encoded once."""

    def __init__(self) -> None:
        self._data: Json | Encoded = {}
        self._text = "{}"

    def text(self, agent: Agent, data: Json | Encoded) -> str:
        if data != self._data:
            self._data = data
            self._text = b"".join(data.json).decode("ascii") if isinstance(data, Encoded) else encode_text(data)
        return (f'{{"agent_id":"{agent.id}","success":true,"status":"{agent.status}","error":null,"error_code":null,'
                f'"data":{self._text}}}')
