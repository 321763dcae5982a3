"""Hints: what is told of agents, and which of them to look at without having been told.

Owns:    listening, anew when it broke; when the truth of something has to be read again; the ends that were told.
Runs in: a client; it waits for nothing itself (talk.py).
Unaware: of what is read, and of the link: lost hints, slow joins and a restarted server all look like "read again".

While nothing happens, nothing is asked: every agent that lives has a heartbeat, which tells where its streams end
and what happened to it last, and the server has one with the number of its last event. So what was missed shows at the
next heartbeat, and only when those stay away too is looked without having been told.
"""
from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional

from .calls import Calls, Json
from .errors import AgentServerError, RequestTimeout
from .results import AgentInfo
from .talk import Hear, Listen, Pause, Talk

SERVER = ""            # the key of what is not about one agent

_FIRST_LOOK = 0.05     # a subscription that nobody confirms may take effect late: look again soon, then less often
_LOSSY_SECS = 2.0      # so long after something was missed, a moment without a word may mean that the last was missed
_BLIND_SECS = 0.5      # how often to look when nothing is told at all (publishing off, server away)
_BEAT_SECS = 10.0      # between heartbeats, where the server does not say
_QUIET_BEATS = 2.5     # after so many without a word of something, look
_LISTEN_SECS = 10.0    # for the server to say where it publishes
_ENDS_KEPT = 1000


class Hints:
    """What is told of some agents, or of the server, and which of them to look at without having been told.

    Listening never fails: where something may be missing, the agent is due to be looked at.
    """

    def __init__(self, calls: Calls, topics: Iterable[str], keys: Iterable[str], deadline: float) -> None:
        self._calls, self._topics, self._deadline = calls, tuple(topics), deadline
        self._due = dict.fromkeys(keys, 0.0)      # when each has to be looked at, unless it is heard of before
        self._unsure: Dict[str, float] = {}       # of whom no word has come since listening began: when to look again
        self._lost_at: Dict[str, float] = {}      # when it was last noticed that something had been missed
        self._check_at = 0.0                      # nobody is due before this
        self._listening, self._listen_at = False, 0.0
        self._quiet_secs = _QUIET_BEATS * _BEAT_SECS
        self._waited = 0.0                        # in vain for a word of anybody
        self._heard = False                       # anything, since listening began
        #: the newest event when listening began, where the server says so
        self.sequence: Optional[int] = None

    # ------------------------------------------------------------ listening

    def next(self, wait: bool = True) -> Talk[Optional[Json]]:
        """Return the next hint; `None` when somebody may be due. Raise `RequestTimeout` at the caller's deadline."""
        now = self._calls.clock()
        if not self._listening and now >= self._listen_at:
            yield from self._listen()
            return None
        if wait and self._check_at <= now:
            return None
        if now >= self._deadline:
            raise RequestTimeout("it was not over within the time given")
        left = min(self._check_at, self._deadline) - now if wait else 0.0
        if not self._listening:
            yield Pause(max(min(left, self._listen_at - now), 0.0))
            return None
        return (yield from self._hear(left))

    def heard(self) -> Talk[Optional[Json]]:
        """Return what has come already, if anything: an end that was told with the last output."""
        return (yield from self._hear(0.0)) if self._listening else None

    def _listen(self) -> Talk[None]:
        try:
            metadata = (yield from self._calls.health(_LISTEN_SECS, patience=0.0)).metadata
            reply = yield Listen(self._topics, str(metadata.get("pub_endpoint") or ""), _LISTEN_SECS)
        except AgentServerError:
            self._cut(_BLIND_SECS)
            return
        self._quiet_secs = _QUIET_BEATS * _number(metadata.get("status_update_interval_secs"), _BEAT_SECS)
        self._listening, self._heard, self._waited, self.sequence = True, False, 0.0, reply.get("sequence")
        self._unsure = {} if reply else dict.fromkeys(self._due, _FIRST_LOOK)
        self._all_due()

    def _hear(self, timeout: float) -> Talk[Optional[Json]]:
        try:
            event: Optional[Json] = yield Hear(timeout)
        except AgentServerError:
            self._cut(0.0 if self._heard else _BLIND_SECS)
            return None
        if event:
            self._note(event)
            return event
        self._waited += timeout
        if self._waited >= self._quiet_secs:  # not even a heartbeat: the connection may be dead and nobody know
            self._cut(0.0)
        return None

    def _note(self, event: Json) -> None:
        self._heard, self._waited = True, 0.0
        key, now = event.get("agent_id") or SERVER, self._calls.clock()
        if now < self._lost_at.get(key, 0.0) + _LOSSY_SECS:
            self._look_after(key, _FIRST_LOOK)
        elif key in self._due:
            self._due[key] = now + self._quiet_secs
            self._unsure.pop(key, None)
        _note_end(self._calls.ends, event)

    def _cut(self, pause: float) -> None:
        self._listening, self._listen_at = False, self._calls.clock() + pause
        self._all_due()

    def _all_due(self) -> None:
        self._due = dict.fromkeys(self._due, 0.0)
        self._check_at = 0.0

    # ------------------------------------------------------------ whom to look at

    def due(self) -> List[str]:
        """Return who has to be looked at now; of each, say `looked`."""
        now = self._calls.clock()
        if now < self._check_at:
            return []
        self._check_at = min((at for at in self._due.values() if at > now), default=float("inf"))
        return [key for key, at in self._due.items() if at <= now]

    def looked(self, key: str) -> None:
        """Note that the truth of one was read: until told otherwise, that is trusted for a while."""
        after = self._unsure.get(key, self._quiet_secs) if self._listening else _BLIND_SECS
        if key in self._unsure:
            self._unsure[key] = min(3 * after, self._quiet_secs)
        self._look_after(key, after)

    def look_soon(self, key: str) -> None:
        """Look again in a moment, then less often: a server drops hints for whom they come too fast."""
        self._unsure[key], self._lost_at[key] = _FIRST_LOOK, self._calls.clock()
        self._look_after(key, _FIRST_LOOK)

    def look_now(self, key: str) -> None:
        """Look as soon as possible: something was told out of turn."""
        self._look_after(key, 0.0)

    def _look_after(self, key: str, secs: float) -> None:
        self._due[key] = self._calls.clock() + secs
        self._check_at = min(self._check_at, self._due[key])

    def forget(self, key: str) -> None:
        """Care no longer about one."""
        self._due.pop(key, None)
        self._lost_at.pop(key, None)


def _number(text: Any, default: float) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return default


def _note_end(ends: Dict[str, AgentInfo], event: Json) -> None:
    """Keep what was told of an agent's end, until it is told that the agent was started again."""
    agent_id, data = event.get("agent_id"), event.get("data")
    if event.get("type") != "status_update" or not agent_id:
        return
    info = AgentInfo.of({"id": agent_id, "status": event.get("status"), "finished_at": event.get("timestamp"),
                         "exit": data.get("exit") if isinstance(data, dict) else None})
    if not info.finished:
        ends.pop(agent_id, None)
    elif info.exit:  # a heartbeat tells that it has ended, but not how
        ends[agent_id] = info
        if len(ends) > _ENDS_KEPT:
            del ends[next(iter(ends))]
