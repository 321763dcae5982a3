"""Everything that must be remembered: agents, attempts, request ids, events.

Owns:    the tables of the registry, what they mean, and what waits to be written.
Runs in: the core's thread.
Unaware: of files, locks and damage to a file (database.py), and of what a record means. Records are JSON, so that
         fields of a newer version survive an older one.

Writes wait in a backlog and go to disk in one transaction at `commit`, which the service calls at the end
of each turn, before any reply of that turn leaves. So durable comes before acknowledged, and a
hundred requests in one turn cost one transaction. Reading commits nothing: it sees what waits, too.

An agent waits by reference, and its record is made when it is written. A large record has two parts: what was
asked for stays in the table agents, and what changes goes to the table states; a version that does not know
that table finds all in agents when it takes over from us (`make_whole`), or when the status has changed.
"""
from __future__ import annotations

import json
import sys
import time
from typing import Any, Callable, Iterator, List, NamedTuple, Protocol

from ..errors import RequestError
from ..wire import Json, encode_text
from ..wire import decode as decode_json
from .backlog import BACKLOG_BYTES, REFUSED_BYTES, Backlog, Statement
from .database import Database, Schema, check

SCHEMA_VERSION = 2  # 1: agents had a request_id, and there was no table begun
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta     (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS agents   (id TEXT PRIMARY KEY, created REAL, finished REAL, spec TEXT, record TEXT);
CREATE TABLE IF NOT EXISTS attempts (agent_id TEXT, attempt INTEGER, record TEXT,
                                     PRIMARY KEY (agent_id, attempt));
CREATE TABLE IF NOT EXISTS requests (request_id TEXT PRIMARY KEY, at REAL, digest BLOB, agent_id TEXT, reply BLOB);
CREATE INDEX IF NOT EXISTS requests_by_time  ON requests (at);
CREATE INDEX IF NOT EXISTS requests_by_agent ON requests (agent_id);
DROP INDEX IF EXISTS agents_by_request;
CREATE TABLE IF NOT EXISTS begun    (request_id TEXT, agent_id TEXT, at REAL, digest BLOB,
                                     PRIMARY KEY (request_id, agent_id));
CREATE TABLE IF NOT EXISTS events   (sequence INTEGER PRIMARY KEY, at REAL, agent_id TEXT, message TEXT);
CREATE INDEX IF NOT EXISTS events_by_agent ON events (agent_id, sequence);
CREATE TABLE IF NOT EXISTS quarantine (at REAL, source TEXT, why TEXT, content TEXT);
"""
#: what a version before does not know, and keeps right without knowing it: when it writes a whole record, the part in
#: `states` is gone
_ADDED = """
CREATE TABLE IF NOT EXISTS progress (request_id TEXT, position INTEGER, at REAL, digest BLOB, results TEXT,
                                     PRIMARY KEY (request_id, position));
CREATE TABLE IF NOT EXISTS states (agent_id TEXT PRIMARY KEY, record TEXT) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS states_of_whole AFTER UPDATE OF record ON agents
    BEGIN DELETE FROM states WHERE agent_id = OLD.id; END;
CREATE TRIGGER IF NOT EXISTS states_of_none AFTER DELETE ON agents
    BEGIN DELETE FROM states WHERE agent_id = OLD.id; END;
INSERT OR REPLACE INTO meta VALUES ('schema', '2');
"""
#: the tables, by what a scan follows, with the columns that are copied from a damaged file
_TABLES = {
    "meta": ("key", "key, value"), "agents": ("rowid", "id, created, finished, spec, record"),
    "states": ("agent_id", "agent_id, record"), "attempts": ("rowid", "agent_id, attempt, record"),
    "requests": ("rowid", "request_id, at, digest, agent_id, reply"),
    "begun": ("rowid", "request_id, agent_id, at, digest"),
    "progress": ("rowid", "request_id, position, at, digest, results"),
    "events": ("sequence", "sequence, at, agent_id, message"), "quarantine": ("rowid", "at, source, why, content")}
_WHOLE = Schema(SCHEMA_VERSION, _SCHEMA, _ADDED, "states_of_none", _TABLES)
ATTEMPTS_MOST = 1000  # of one agent, the last ones
REQUEST_SECS = 24 * 3600.0
TRIM_EVERY = 50       # events; between two looks whether there are too many
TRIM_ROWS = 1000      # that are removed in one turn
SPLIT_BYTES = 4096    # of what never changes in a record; where there is more, it is not written each time
RETRY_SECS = 0.2      # between two tries to write what was refused
SCRUB_SECS = 2.0      # after a removal, until nothing removed is left in the log; later while somebody reads it
LOCK_SECS = 2.0       # for another process to let go of its lock, while those wait who ask for something
QUARANTINE_ROWS = 1000  # rows that could not be read, kept aside
SEQUENCE_MOST = 2 ** 53  # a larger number is none that we gave


class Ask(NamedTuple):
    """Who asks for a deed, and under which request id it is done once. `begun` names the agents on which a core
    before us, which died before it could reply, had begun it."""

    by: str
    request_id: str = ""
    digest: bytes = b""
    begun: frozenset[str] = frozenset()


class Remembered(NamedTuple):
    """A request that was seen before: the digest of its content, the reply if it got one, else where it was begun.
    What is not `durable` waits for a disk that refuses; its reply must not leave before."""

    digest: bytes
    reply: bytes | None
    begun: frozenset[str] = frozenset()
    durable: bool = True


class Stored(Protocol):
    """An agent, as far as the registry knows it."""

    id: str
    created_at: float
    finished_at: float | None

    def texts(self) -> tuple[str, str]:
        """Return its record as JSON, in two objects: what never changes, the same text each time, and what does."""

    @property
    def stage(self) -> tuple[object, ...]:
        """What tells a version that does not know `states` whether and where it runs."""


class Row(NamedTuple):
    """One row of the table agents. `record` is None where it cannot be read, and `why` says why not."""

    number: int
    id: str
    record: Json | None
    why: str


class _Kept:
    """What of an agent is on disk: the text that never changes, as it was written last, and the stage with it; and
    whether what changes is in the table states."""

    __slots__ = ("agent", "fixed", "split", "stage")

    def __init__(self, agent: Stored, split: bool) -> None:
        self.agent, self.split = agent, split
        self.fixed = ""
        self.stage: tuple[object, ...] = ()


class _Part(NamedTuple):
    """What is to be written of an agent, and what is on disk of it then."""

    kept: _Kept
    statement: Statement
    fixed: str
    stage: tuple[object, ...]
    split: bool


class Registry:
    """See the module. `say` gets a sentence whenever something had to be repaired or put aside. `now` is the time that
    rows are stamped with; `boot` tells this boot from all others. `after(secs, call)` calls back later."""

    def __init__(self, path: str, say: Callable[[str], None], events_kept: int, events_secs: float,
                 requests_kept: int, now: Callable[[], float] = time.time,
                 boot: str = "",
                 after: Callable[[float, Callable[[], None]], object] = lambda secs, call: None) -> None:
        self._say, self._now, self._after = say, now, after
        self._events_kept, self._events_secs, self._requests_kept = events_kept, events_secs, requests_kept
        self._backlog = Backlog()
        self._agents: dict[str, _Kept] = {}
        self._changed: dict[str, _Kept] = {}  # those that are to be written
        self._specs: dict[str, str] = {}      # of agents that are not on disk yet
        self._split: set[str] = set()         # agents that a core before us has left in two parts
        self._fresh: dict[str, Remembered] = {}  # by request id, of what waits
        self._unsettled: dict[str, set[object]] = {}  # agents, or parts, of which something was begun, by request id
        self._meta: dict[str, str] = {}
        self._unkept = 0          # events that were not kept, while too much waited
        self._retrying = self._scrubbing = False
        self._db = Database(path, _WHOLE, say, now, self._everything)
        self._meta = self._read_meta()
        self._clock_set = self._first_clock(boot)
        self._given = self._newest()
        #: the number of the newest event that is on disk
        self.sequence = self._given

    # ------------------------------------------------------------ the transaction

    @property
    def trouble(self) -> str:
        """Why the last commit failed, or ""."""
        return self._db.trouble.why if self._db.trouble is not None else ""

    @property
    def trouble_secs(self) -> float:
        """For how long nothing could be written."""
        return time.monotonic() - self._db.trouble.since if self._db.trouble is not None else 0.0

    @property
    def patient(self) -> bool:
        """Whether another process holds a lock that it may let go of in a moment."""
        return self._db.trouble is not None and self._db.trouble.locked and self.trouble_secs < LOCK_SECS

    def refusal(self) -> RequestError:
        """Return what to tell who asked for something that cannot be written down."""
        return self._db.refusal()

    def check_room(self) -> None:
        """Refuse what would have to be remembered when too much waits to be written already."""
        if self._backlog.bytes >= REFUSED_BYTES:
            raise self._db.refusal()

    def commit(self, again: bool = True) -> bool:
        """Put all that waits on disk at once; return False, with `trouble` set, if the disk refuses. With `again` it is
        tried whatever was refused just before."""
        if not self._changed and not self._backlog and not self.trouble:
            return True
        if self.trouble and not again and self._retrying:
            return False
        parts = [part for kept in list(self._changed.values()) for part in self._part(kept)]
        if not self._db.write([*(part.statement for part in parts), *self._backlog.statements()]):
            self._retry()
            return False
        for part in parts:
            part.kept.fixed, part.kept.stage, part.kept.split = part.fixed, part.stage, part.split
        for waiting in (self._changed, self._specs, self._backlog, self._fresh):
            waiting.clear()
        self.sequence = self._given
        if self._unkept:
            self._say(f"{self._unkept} events were not kept while too much waited to be written")
            self._unkept = 0
        return True

    def _retry(self) -> None:
        """Have another turn soon, at whose end all is tried again."""
        if not self._retrying:
            self._retrying = True
            self._after(RETRY_SECS, self._try_again)

    def _try_again(self) -> None:
        self._retrying = False

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        return self._db.rows(sql, *values)

    def _one(self, sql: str, *values: Any) -> Any:
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    def _quarantine_row(self, source: str, why: str, content: Any, sql: str, *values: Any) -> None:
        """Keep a row that cannot be read in the table quarantine, say so, and delete it where it was."""
        self._say(f"{source} cannot be read and was put aside (table quarantine): {why}")
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        self._backlog.put(("quarantine", source), "INSERT INTO quarantine VALUES (?, ?, ?, ?)", self._now(), source,
                          why, text)
        self._backlog.put(("damaged", source), sql, *values)

    # ------------------------------------------------------------ time and meta

    def _first_clock(self, boot: str) -> float | None:
        """Return what the clock has said beside the time since boot, when a core of this boot first looked."""
        if not boot:
            return None
        before, _, told = self.get("clock").partition(" ")
        try:
            first = float(told) if before == boot else self._now() - _since_boot()
        except ValueError:
            first = self._now() - _since_boot()
        self.put("clock", f"{boot} {first!r}")
        return first

    def age_time(self) -> float:
        """Return the time to tell by how old something is: what the clock says, but not more than since it was first
        looked at in this boot. A clock that is set forward must not make everything old at once."""
        return self._now() if self._clock_set is None else min(self._now(), self._clock_set + _since_boot())

    def _read_meta(self) -> dict[str, str]:
        found = {}
        for key, value in self._rows("SELECT CAST(key AS BLOB), CAST(value AS BLOB) FROM meta"):
            try:
                found[key.decode()] = value.decode()
            except (AttributeError, UnicodeDecodeError) as e:
                self._say(f"a word about the server that was remembered cannot be read ({key!r:.60}): {e}")
        return found

    def get(self, key: str) -> str:
        """Return a remembered word about the server itself, or ""."""
        return self._meta.get(key, "")

    def put(self, key: str, value: str) -> None:
        """Remember a word about the server itself."""
        if self._meta.get(key) != value:
            self._meta[key] = value
            self._backlog.put(("meta", key), "INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    # ------------------------------------------------------------ agents

    def add_agent(self, agent: Stored, spec: Json) -> None:
        """Remember a new agent, and what it was asked for."""
        self._agents[agent.id] = self._changed[agent.id] = _Kept(agent, False)
        self._specs[agent.id] = encode_text(spec)

    def know(self, agent: Stored) -> None:
        """Take in an agent that is on disk as it is."""
        self._agents[agent.id] = _Kept(agent, agent.id in self._split)

    def save_agent(self, agent: Stored) -> None:
        """Remember how an agent is now."""
        kept = self._agents.get(agent.id)
        if kept is not None:
            self._changed[agent.id] = kept

    def _part(self, kept: _Kept) -> list[_Part]:
        """Return what is to be written of an agent: all of it, or what changes if the rest is large and on disk."""
        agent = kept.agent
        try:
            fixed, changing = agent.texts()
        except ValueError as e:  # a bug, which must not keep the others from the disk
            self._say(f"the record of agent {agent.id} cannot be written: {e}")
            return []
        split = len(fixed) > SPLIT_BYTES and fixed is kept.fixed and agent.stage == kept.stage
        statement = (("INSERT OR REPLACE INTO states VALUES (?, ?)", (agent.id, changing)) if split
                     else self._whole(agent, fixed, changing))
        return [_Part(kept, statement, fixed, agent.stage, split)]

    def _whole(self, agent: Stored, fixed: str, changing: str) -> Statement:
        return ("INSERT INTO agents (id, created, finished, spec, record) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET finished = excluded.finished, record = excluded.record",
                (agent.id, agent.created_at, agent.finished_at, self._specs.get(agent.id, "{}"),
                 f"{fixed[:-1]},{changing[1:]}"))

    def make_whole(self) -> bool:
        """Write whole records, and all that waits, for a successor that may be of a version before; as `commit`."""
        for agent_id, kept in self._agents.items():
            if kept.split:
                kept.fixed = ""
                self._changed[agent_id] = kept
        return self.commit()

    def _everything(self) -> Iterator[Statement]:
        """Return what writes all that we know of agents and server into a file that has lost it."""
        for key, value in self._meta.items():
            yield "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value)
        for kept in self._agents.values():
            yield self._whole(kept.agent, *kept.agent.texts())

    def agents(self) -> Iterator[Row]:
        """Yield every agent, in the order in which they were asked for."""
        states = dict(self._rows("SELECT CAST(agent_id AS BLOB), CAST(record AS BLOB) FROM states"))
        self._split = {(key or b"").decode("utf-8", "replace") for key in states}
        for number, key, record in self._rows("SELECT rowid, CAST(id AS BLOB), CAST(record AS BLOB) FROM agents "
                                              "ORDER BY rowid"):
            agent_id = (key or b"").decode("utf-8", "replace")
            try:
                yield Row(number, agent_id, {**_decoded(record), **self._state(agent_id, states.get(key))}, "")
            except Exception as e:
                yield Row(number, agent_id, None, str(e) or repr(e))

    def _state(self, agent_id: str, stored: bytes | None) -> Json:
        """Return what has changed since the record was written; without it the record is only older."""
        try:
            return _decoded(stored) if stored is not None else {}
        except RequestError as e:
            self._say(f"what has changed of agent {agent_id} lately cannot be read: {e}")
            return {}

    def quarantine(self, row: Row, why: str, forget: bool = True) -> None:
        """Put one unreadable record aside, so that everything else loads; `forget` deletes its row."""
        content = self._one("SELECT CAST(record AS BLOB) FROM agents WHERE rowid = ?", row.number)
        self._quarantine_row(f"the record of agent {row.id}", why, content,
                             "DELETE FROM agents WHERE rowid = ? AND ?", row.number, forget)

    def spec(self, agent_id: str) -> Json:
        """Return what an agent was spawned with, environment values included; nothing if that was lost."""
        found = self._specs.get(agent_id, "").encode() or self._one(
            "SELECT CAST(spec AS BLOB) FROM agents WHERE id = ?", agent_id)
        return _decoded(found) if found else {}

    def remove_agent(self, agent_id: str) -> None:
        """Forget an agent with its attempts and request ids; its events stay until their own time."""
        self._agents.pop(agent_id, None)
        self._changed.pop(agent_id, None)
        self._specs.pop(agent_id, None)
        for attempt in [values[1] for values in self._backlog.of("attempt") if values[0] == agent_id]:
            self._backlog.drop(("attempt", agent_id, attempt))
        for table, column in (("agents", "id"), ("attempts", "agent_id"), ("requests", "agent_id"),
                              ("begun", "agent_id")):
            self._backlog.put(("gone", table, agent_id), f"DELETE FROM {table} WHERE {column} = ?", agent_id)
        self._scrub_later()

    def _scrub_later(self) -> None:
        if not self._scrubbing:
            self._scrubbing = True
            self._after(SCRUB_SECS, self._scrub)

    def _scrub(self) -> None:
        """Leave nothing of what was removed in the log."""
        self._scrubbing = False
        if not self.commit() or not self._db.fold(all_of_it=True):
            self._scrub_later()

    def save_attempt(self, agent_id: str, attempt: int, record: Json) -> None:
        """Remember one attempt with its exit record."""
        self._backlog.put(("attempt", agent_id, attempt), "INSERT OR REPLACE INTO attempts VALUES (?, ?, ?)", agent_id,
                          attempt, encode_text(record))
        if attempt > ATTEMPTS_MOST:
            self._backlog.put(("attempts", agent_id), "DELETE FROM attempts WHERE agent_id = ? AND attempt <= ?",
                              agent_id, attempt - ATTEMPTS_MOST)

    def attempts(self, agent_id: str) -> list[Json]:
        """Return the attempts of an agent that are kept, first to last, also those that wait to be written."""
        found = {}
        for attempt, stored in self._rows("SELECT attempt, CAST(record AS BLOB) FROM attempts WHERE agent_id = ? "
                                          "ORDER BY attempt DESC LIMIT ?", agent_id, ATTEMPTS_MOST):
            try:
                found[int(attempt)] = _decoded(stored)
            except Exception as e:
                self._quarantine_row(f"attempt {attempt!r:.20} of agent {agent_id}", str(e), stored,
                                     "DELETE FROM attempts WHERE agent_id = ? AND attempt IS ?", agent_id, attempt)
        found.update((number, _decoded(record.encode())) for agent, number, record in self._backlog.of("attempt")
                     if agent == agent_id)
        return [found[number] for number in sorted(found)[-ATTEMPTS_MOST:]]

    # ------------------------------------------------------------ requests that were done

    def begin(self, ask: Ask, agent_id: str) -> bool:
        """Put on disk that a deed is about to be done to an agent, with all that was written before; as `commit`.

        What cannot be done and remembered at once (starting a process, a signal) is thus never done twice."""
        if ask.request_id:
            self._unsettled.setdefault(ask.request_id, set()).add(agent_id)
            self._backlog.put(("begun", ask.request_id, agent_id), "INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?)",
                              _key(ask.request_id), agent_id, self._now(), ask.digest)
        return self.commit()

    def settle(self, request_id: str) -> None:
        """Forget what was begun for a request: it is remembered with its reply, or it was refused."""
        for what in self._unsettled.pop(request_id, ()):
            self._backlog.drop(("begun", request_id, what))
            self._backlog.drop(("progress", request_id, what))
            self._backlog.put(("settled", request_id), "DELETE FROM begun WHERE request_id = ?", _key(request_id))
            self._backlog.put(("unfinished", request_id), "DELETE FROM progress WHERE request_id = ?", _key(request_id))

    def advance(self, ask: Ask, position: int, results: list[str]) -> None:
        """Remember, with the deeds of this turn, how far a request has come that is done in several."""
        self._unsettled.setdefault(ask.request_id, set()).add(position)
        self._backlog.put(("progress", ask.request_id, position),
                          "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)", _key(ask.request_id), position,
                          self._now(), ask.digest, encode_text(results))

    def progress(self, request_id: str) -> dict[int, list[str]]:
        """Return how far a request had come when a core before us died: results by position."""
        found = {}
        for position, stored in self._rows("SELECT position, CAST(results AS BLOB) FROM progress WHERE request_id = ?",
                                           _key(request_id)):
            try:
                found[int(position)] = [str(text) for text in _strict.decode(stored.decode("ascii"))]
            except (ValueError, TypeError, AttributeError, RecursionError) as e:
                self._quarantine_row(f"a part of request {request_id}", str(e), stored,
                                     "DELETE FROM progress WHERE request_id = ? AND position IS ?", _key(request_id),
                                     position)
        return found

    def remember(self, ask: Ask, reply: bytes, agent_id: str | None = None) -> None:
        """Remember the reply to a request that did something. `agent_id`: keep it as long as that agent."""
        self._backlog.put(("request", ask.request_id), "INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?)",
                          _key(ask.request_id), self._now(), ask.digest, agent_id, reply)
        self._fresh[ask.request_id] = Remembered(ask.digest, reply, durable=False)
        self.settle(ask.request_id)

    def recall(self, request_id: str) -> Remembered | None:
        """Return what was remembered of a request, or of its beginning."""
        if request_id in self._fresh and not (self.trouble and self.commit()):
            return self._fresh[request_id]
        rows = self._rows("SELECT digest, CAST(reply AS BLOB), NULL FROM requests WHERE request_id = ?1 UNION ALL "
                          "SELECT digest, NULL, CAST(agent_id AS BLOB) FROM begun WHERE request_id = ?1 UNION ALL "
                          "SELECT digest, NULL, NULL FROM progress WHERE request_id = ?1", _key(request_id))
        if rows and rows[0][1] is None and self._backlog.get(("settled", request_id)):
            return None  # it was refused, in this very turn
        if not rows:
            return None
        digest, reply = rows[0][:2]
        if not isinstance(digest, bytes) or (reply is not None and not _is_reply_to(reply, request_id)):
            raise RequestError("this request was done or begun before, but what was remembered of it is damaged; look "
                               "at the agents to see what became of it", "unavailable")
        begun = frozenset(row[2].decode("utf-8", "replace") for row in rows if row[2])
        if reply is None:
            self._unsettled[request_id] = {"", *begun}
        return Remembered(digest, reply, begun)

    # ------------------------------------------------------------ events

    def add_event(self, at: float, agent_id: str | None, message: Json) -> str:
        """Give an event the next number of the server-wide sequence, keep it, and return it as JSON text; "" when
        too much waits for the disk already: no number is given in vain."""
        if self._backlog.bytes >= BACKLOG_BYTES:
            if not self._unkept:
                self._say(f"{self._backlog.bytes} bytes wait to be written into the registry; until they are, no event "
                          "is kept. The ends of agents are")
            self._unkept += 1
            return ""
        self._given += 1
        text = encode_text({**message, "sequence": self._given})
        self._backlog.put(("event", self._given), "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?)", self._given, at,
                          agent_id, text)
        if self._given % TRIM_EVERY == 0:
            self._backlog.put(("trim",), "DELETE FROM events WHERE sequence IN (SELECT sequence FROM events WHERE "
                              f"sequence <= ? ORDER BY sequence LIMIT {TRIM_ROWS})", self._given - self._events_kept)
        return text

    def events(self, since: int, limit: int, agent_id: str | None = None) -> list[str]:
        """Return up to `limit` events after `since`, as JSON text; also those of this turn, which the caller must not
        tell before the next commit, but none that the disk has refused. One that cannot be read is put aside."""
        where, who = ("AND agent_id = ?", (agent_id,)) if agent_id else ("", ())
        found: list[str] = []
        at = since
        while len(found) < limit:
            rows = self._rows(f"SELECT sequence, CAST(message AS BLOB) FROM events WHERE sequence > ? {where} "
                              "ORDER BY sequence LIMIT ?", at, *who, limit - len(found))
            found += self._readable(rows)
            if not rows:
                break
            at = rows[-1][0]
        waiting = [] if self.trouble else list(self._backlog.of("event"))
        found += [text for number, _at, agent, text in waiting if number > since and agent_id in (None, agent)]
        return found[:limit]

    def _readable(self, rows: list[Any]) -> list[str]:
        """Return the texts of rows that are JSON objects with the right number; mostly all of them are, at once."""
        try:
            texts = [text.decode("ascii") for _number, text in rows]
            if [event["sequence"] for event in _strict.decode(f"[{','.join(texts)}]")] == [row[0] for row in rows]:
                return texts
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            pass
        return [text for number, stored in rows for text in self._readable_event(number, stored)]

    def _readable_event(self, number: int, stored: Any) -> list[str]:
        try:
            text = stored.decode("ascii")
            if _strict.decode(text)["sequence"] == number:
                return [text]
            why = "it bears another number"
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as e:
            why = str(e)
        self._quarantine_row(f"event {number}", why, stored, "DELETE FROM events WHERE sequence = ?", number)
        return []

    def _newest(self) -> int:
        """Return the number of the newest event; one that is damaged may bear any."""
        told = self.get("sequence")
        newest = int(told) if told.isdecimal() and len(told) < 17 and int(told) < SEQUENCE_MOST else 0
        for number, stored in self._rows("SELECT sequence, CAST(message AS BLOB) FROM events ORDER BY sequence DESC "
                                         "LIMIT 100"):
            if number < SEQUENCE_MOST and self._readable([(number, stored)]):
                return max(newest, int(number))
        return newest

    @property
    def first_kept(self) -> int:
        """The oldest sequence that can be asked for; one past the last when none is kept."""
        on_disk = self._one("SELECT min(sequence) FROM events")
        waiting = next((values[0] for values in self._backlog.of("event")), None)
        return int(on_disk or waiting or self.sequence + 1)

    def last_event_of(self, agent_id: str) -> int:
        """Return the number of an agent's newest event that is on disk, 0 if none is."""
        return int(self._one("SELECT max(sequence) FROM events WHERE agent_id = ?", agent_id) or 0)

    def last_events(self) -> dict[str, int]:
        """Return the number of the newest event of each agent that has any."""
        return {str(agent_id): number for agent_id, number in self._rows(
            "SELECT CAST(agent_id AS TEXT), max(sequence) FROM events WHERE agent_id IS NOT NULL GROUP BY agent_id")}

    def has_events_of(self, agent_id: str) -> bool:
        """Whether events of an agent are kept, which may itself be forgotten."""
        return bool(self._rows("SELECT 1 FROM events WHERE agent_id = ? LIMIT 1", agent_id)) or any(
            agent == agent_id for _number, _at, agent, _text in self._backlog.of("event"))

    # ------------------------------------------------------------ bounds

    def trim(self) -> bool:
        """Drop some of what is past its time or its number; of the events always the oldest, so that no gap can arise.
        Return whether there may be more: what is removed in one turn is bounded."""
        now = self.age_time()
        self.put("sequence", str(self._given))
        if not self.commit():
            return False
        young = self._one("SELECT sequence FROM events WHERE at >= ? ORDER BY sequence LIMIT 1",
                          now - self._events_secs)
        first = max(self._given + 1 if young is None else young, self._given + 1 - self._events_kept)
        old = "agent_id IS NULL AND (at < ? OR at <= (SELECT at FROM requests WHERE agent_id IS NULL ORDER BY at DESC "
        some = f"LIMIT {TRIM_ROWS})"
        statements: List[Statement] = [
            (f"DELETE FROM events WHERE sequence IN (SELECT sequence FROM events WHERE sequence < ? ORDER BY sequence "
             f"{some}", (first,)),
            (f"DELETE FROM requests WHERE rowid IN (SELECT rowid FROM requests WHERE {old}LIMIT 1 OFFSET ?)) {some}",
             (now - REQUEST_SECS, self._requests_kept)),
            (f"DELETE FROM begun WHERE rowid IN (SELECT rowid FROM begun WHERE at < ? {some}", (now - REQUEST_SECS,)),
            (f"DELETE FROM progress WHERE rowid IN (SELECT rowid FROM progress WHERE at < ? {some}",
             (now - REQUEST_SECS,)),
            ("DELETE FROM quarantine WHERE rowid <= (SELECT max(rowid) FROM quarantine) - ?", (QUARANTINE_ROWS,))]
        return self._db.write(statements) and self._db.changes >= TRIM_ROWS

    def look(self) -> None:
        """See that what is written is still there for the next core, and write it anew if not."""
        self._db.look()

    def checkpoint(self) -> None:
        """When it is quiet: move what was committed from the log into the file."""
        if self._db.unfolded:
            self._db.fold(all_of_it=False)

    def close(self) -> None:
        """Commit and let go of the file."""
        if not self.commit():
            self._say(f"the registry could not be written to the end ({self.trouble}); the last changes are lost")
        self._db.close()


def check_registry(path: str) -> None:
    """Raise `StartError` if a core of this version could not go on with the registry of the one before it."""
    check(path, SCHEMA_VERSION)


def _since_boot() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_strict = json.JSONDecoder(parse_constant=_refuse)


def _is_reply_to(reply: bytes, request_id: str) -> bool:
    try:
        return bool(_strict.decode(reply.decode("ascii"))["request_id"] == request_id)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _key(request_id: str) -> str:
    """Return a request id as column text: JSON may hold lone surrogates, which sqlite's UTF-8 cannot."""
    return encode_text(request_id)


def _decoded(stored: bytes) -> Json:
    """Return what we stored; it may be larger than any message, because escapes have grown it."""
    if stored is None:
        raise RequestError("there is nothing in it")
    return decode_json(stored, limit=sys.maxsize)
