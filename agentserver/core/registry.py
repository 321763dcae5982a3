"""Everything that must be remembered: agents, attempts, request ids, events.

Owns:    `registry.db` (sqlite3, WAL, synchronous=NORMAL: survives a SIGKILL of ours, and a power cut
         may take the last moments but never consistency).
Runs in: the core's thread.
Unaware: of what a record means. Records are JSON, so that fields of a newer version survive an older one.

Writes are queued and go to disk in one transaction at `commit`, which the service calls at the end
of each turn, before any reply of that turn leaves. So durable comes before acknowledged, and a
hundred requests in one turn cost one transaction. While the disk refuses, the queue waits.
"""
from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from typing import Any, Callable, Iterator, NamedTuple

from ..errors import RequestError, StartError
from ..wire import Json, encode_text
from ..wire import decode as decode_json

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
#: added without a new SCHEMA_VERSION: a version that does not know it can go on with the registry
_ADDED = """
CREATE TABLE IF NOT EXISTS progress (request_id TEXT, position INTEGER, at REAL, digest BLOB, results TEXT,
                                     PRIMARY KEY (request_id, position));
"""
REQUEST_SECS = 24 * 3600.0
QUEUE_MOST = 100_000  # statements that wait while the disk refuses
TRIM_EVERY = 50  # events; between two looks whether there are too many


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


class Registry:
    """See the module. `say` gets a sentence whenever something had to be repaired or put aside."""

    def __init__(self, path: str, say: Callable[[str], None], events_kept: int, events_secs: float,
                 requests_kept: int, now: Callable[[], float] = time.time) -> None:
        self._say, self._now = say, now
        self._events_kept, self._events_secs, self._requests_kept = events_kept, events_secs, requests_kept
        self._queue: list[tuple[str, tuple[Any, ...]]] = []
        self._written = False   # since the last checkpoint
        self._fresh: dict[str, Remembered] = {}  # by request id, of what is in the queue
        self._unsettled: set[str] = set()  # request ids of which something was begun, until they are settled
        #: why the last commit failed, or ""
        self.trouble = ""
        self._db = self._open(path)
        self._given = max(int(self._one("SELECT max(sequence) FROM events") or 0), int(self.get("sequence") or 0))
        #: the number of the newest event that is on disk
        self.sequence = self._given

    # ------------------------------------------------------------ opening

    def _open(self, path: str) -> sqlite3.Connection:
        try:
            return self._connect(path)
        except sqlite3.OperationalError as e:  # a full disk, a lock, no descriptor: nothing is wrong with the file
            raise StartError(f"the registry {os.path.abspath(path)} cannot be opened: {e}") from None
        except sqlite3.DatabaseError as e:
            aside = f"{path}.unreadable-{int(self._now())}"
            for suffix in ("", "-wal", "-shm"):
                if os.path.exists(path + suffix):
                    os.replace(path + suffix, aside + suffix)
            self._say(f"the registry could not be read ({e}); it was kept as {aside} and a new one was begun")
            return self._connect(path)

    def _connect(self, path: str) -> sqlite3.Connection:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        db.execute("PRAGMA busy_timeout = 2000")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA wal_autocheckpoint = 8000")  # pages; sooner when it is quiet, see checkpoint
        db.execute("PRAGMA cache_size = -1024")  # KiB
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            db.close()  # nothing is wrong with it, so it is not put aside: its agents would be lost to the newer one
            raise StartError(_newer(path, version))
        if version < SCHEMA_VERSION:
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.executescript(_ADDED)
        # a damaged page is found now, not when it is needed
        db.execute("SELECT total(length(CAST(record AS BLOB))) FROM agents").fetchone()
        db.execute("SELECT max(sequence) FROM events").fetchone()
        db.execute("PRAGMA busy_timeout = 50")  # ms; from here on the loop waits with us
        return db

    # ------------------------------------------------------------ the queue and the transaction

    def _write(self, sql: str, *values: Any) -> None:
        if len(self._queue) < QUEUE_MOST:
            self._queue.append((sql, values))

    def commit(self) -> bool:
        """Put everything queued on disk at once; return False, with `trouble` set, if the disk refuses."""
        if not self._queue:
            return not self.trouble
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for sql, values in self._queue:
                self._db.execute(sql, values)
            self._db.execute("COMMIT")
        except sqlite3.Error as e:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if not self.trouble:
                self._say(f"the registry cannot be written: {e}; trying again until it can")
            self.trouble = str(e)
            return False
        self._queue.clear()
        self._fresh.clear()
        self._written, self.sequence = True, self._given
        if self.trouble:
            self._say("the registry can be written again")
            self.trouble = ""
        return True

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        self.commit()
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as e:
            raise RequestError(f"the registry cannot be read: {e}", "unavailable") from None

    def _one(self, sql: str, *values: Any) -> Any:
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    # ------------------------------------------------------------ meta

    def get(self, key: str) -> str:
        """Return a remembered word about the server itself, or ""."""
        return str(self._one("SELECT value FROM meta WHERE key = ?", key) or "")

    def put(self, key: str, value: str) -> None:
        """Remember a word about the server itself."""
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    # ------------------------------------------------------------ agents

    def add_agent(self, agent_id: str, created: float, spec: Json, record: Json) -> None:
        """Remember a new agent."""
        self._write("INSERT INTO agents (id, created, spec, record) VALUES (?, ?, ?, ?)", agent_id, created,
                    encode_text(spec), encode_text(record))

    def save_agent(self, agent_id: str, finished: float | None, record: Json) -> None:
        """Remember how an agent is now."""
        self._write("UPDATE agents SET finished = ?, record = ? WHERE id = ?", finished, encode_text(record), agent_id)

    def agents(self) -> Iterator[tuple[str, Json]]:
        """Yield (id, record) of every agent, oldest first; those that cannot be read are put aside."""
        for agent_id, record in self._rows("SELECT id, CAST(record AS BLOB) FROM agents ORDER BY created, id"):
            try:
                yield agent_id, _decoded(record)
            except Exception as e:
                self.quarantine(agent_id, str(e), (record or b"").decode("utf-8", "replace"))

    def quarantine(self, agent_id: str, why: str, content: str) -> None:
        """Put one unreadable record aside, so that everything else loads."""
        self._say(f"the record of agent {agent_id} cannot be read and was put aside (table quarantine): {why}")
        self._write("INSERT INTO quarantine VALUES (?, ?, ?, ?)", self._now(), f"agents/{agent_id}", why, content)
        self._write("DELETE FROM agents WHERE id = ?", agent_id)

    def spec(self, agent_id: str) -> Json:
        """Return what an agent was spawned with, environment values included."""
        found = self._one("SELECT CAST(spec AS BLOB) FROM agents WHERE id = ?", agent_id)
        return _decoded(found) if found else {}

    def remove_agent(self, agent_id: str) -> None:
        """Forget an agent with its attempts and request ids; its events stay until their own time."""
        self._write("DELETE FROM agents WHERE id = ?", agent_id)
        self._write("DELETE FROM attempts WHERE agent_id = ?", agent_id)
        self._write("DELETE FROM requests WHERE agent_id = ?", agent_id)
        self._write("DELETE FROM begun WHERE agent_id = ?", agent_id)

    def save_attempt(self, agent_id: str, attempt: int, record: Json) -> None:
        """Remember one attempt with its exit record."""
        self._write("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?)", agent_id, attempt, encode_text(record))

    def attempts(self, agent_id: str) -> list[Json]:
        """Return the attempts of an agent, first to last; refuse while the last may not be on disk."""
        if not self.commit():
            raise RequestError(f"the registry cannot be written ({self.trouble}), and so not all can be told yet; make "
                               "room on the server's disk, and ask again", "unavailable")
        rows = self._rows("SELECT CAST(record AS BLOB) FROM attempts WHERE agent_id = ? ORDER BY attempt", agent_id)
        return [_decoded(row[0]) for row in rows]

    # ------------------------------------------------------------ requests that were done

    def begin(self, ask: Ask, agent_id: str) -> bool:
        """Put on disk that a deed is about to be done to an agent, with all that was written before; as `commit`.

        What cannot be done and remembered at once (starting a process, a signal) is thus never done twice."""
        if ask.request_id:
            self._unsettled.add(ask.request_id)
            self._write("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?)", _key(ask.request_id), agent_id, self._now(),
                        ask.digest)
        return self.commit()

    def settle(self, request_id: str) -> None:
        """Forget what was begun for a request: it is remembered with its reply, or it was refused."""
        if request_id in self._unsettled:
            self._unsettled.discard(request_id)
            self._write("DELETE FROM begun WHERE request_id = ?", _key(request_id))
            self._write("DELETE FROM progress WHERE request_id = ?", _key(request_id))

    def advance(self, ask: Ask, position: int, results: list[str]) -> None:
        """Remember, with the deeds of this turn, how far a request has come that is done in several."""
        self._unsettled.add(ask.request_id)
        self._write("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)", _key(ask.request_id), position,
                    self._now(), ask.digest, encode_text(results))

    def progress(self, request_id: str) -> dict[int, list[str]]:
        """Return how far a request had come when a core before us died: results by position."""
        rows = self._rows("SELECT position, CAST(results AS BLOB) FROM progress WHERE request_id = ?", _key(request_id))
        return {position: json.loads(results) for position, results in rows}

    def remember(self, ask: Ask, reply: bytes, agent_id: str | None = None) -> None:
        """Remember the reply to a request that did something. `agent_id`: keep it as long as that agent."""
        self._write("INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?, ?)", _key(ask.request_id), self._now(),
                    ask.digest, agent_id, reply)
        self._fresh[ask.request_id] = Remembered(ask.digest, reply, durable=False)
        self.settle(ask.request_id)

    def recall(self, request_id: str) -> Remembered | None:
        """Return what was remembered of a request, or of its beginning."""
        if request_id in self._fresh and not self.commit():
            return self._fresh[request_id]
        rows = self._rows("SELECT digest, reply, NULL FROM requests WHERE request_id = ?1 UNION ALL "
                          "SELECT digest, NULL, agent_id FROM begun WHERE request_id = ?1 UNION ALL "
                          "SELECT digest, NULL, NULL FROM progress WHERE request_id = ?1", _key(request_id))
        if not rows:
            return None
        if rows[0][1] is None:
            self._unsettled.add(request_id)
        return Remembered(rows[0][0], rows[0][1], frozenset(row[2] for row in rows if row[2]))

    # ------------------------------------------------------------ events

    def add_event(self, at: float, agent_id: str | None, message: Json) -> str:
        """Give an event the next number of the server-wide sequence, keep it, and return it as JSON text; "" when
        too much waits for the disk already: no number is given in vain."""
        if len(self._queue) >= QUEUE_MOST:
            return ""
        self._given += 1
        text = encode_text({**message, "sequence": self._given})
        self._write("INSERT INTO events VALUES (?, ?, ?, ?)", self._given, at, agent_id, text)
        if self._given % TRIM_EVERY == 0:
            self._write("DELETE FROM events WHERE sequence <= ?", self._given - self._events_kept)
        return text

    def events(self, since: int, limit: int, agent_id: str | None = None) -> list[str]:
        """Return up to `limit` events after `since`, as JSON text."""
        where, values = ("AND agent_id = ?", (since, agent_id, limit)) if agent_id else ("", (since, limit))
        return [row[0] for row in self._rows(
            f"SELECT message FROM events WHERE sequence > ? {where} ORDER BY sequence LIMIT ?", *values)]

    @property
    def first_kept(self) -> int:
        """The oldest sequence that can be asked for; one past the last when none is kept."""
        return int(self._one("SELECT min(sequence) FROM events") or self.sequence + 1)

    def last_event_of(self, agent_id: str) -> int:
        """Return the number of an agent's newest event that is kept, 0 if none is."""
        return int(self._one("SELECT max(sequence) FROM events WHERE agent_id = ?", agent_id) or 0)

    def has_events_of(self, agent_id: str) -> bool:
        """Whether events of an agent are kept, which may itself be forgotten."""
        return bool(self._rows("SELECT 1 FROM events WHERE agent_id = ? LIMIT 1", agent_id))

    # ------------------------------------------------------------ bounds

    def trim(self) -> None:
        """Drop what is past its time or its number; of the events always the oldest, so that no gap can arise."""
        now = self._now()
        self.put("sequence", str(self._given))
        young = self._one("SELECT sequence FROM events WHERE at >= ? ORDER BY sequence LIMIT 1",
                          now - self._events_secs)
        self._write("DELETE FROM events WHERE sequence < ?",
                    max(self._given + 1 if young is None else young, self._given + 1 - self._events_kept))
        self._write("DELETE FROM requests WHERE agent_id IS NULL AND (at < ? OR at <= (SELECT at FROM requests "
                    "WHERE agent_id IS NULL ORDER BY at DESC LIMIT 1 OFFSET ?))",
                    now - REQUEST_SECS, self._requests_kept)
        self._write("DELETE FROM begun WHERE at < ?", now - REQUEST_SECS)
        self._write("DELETE FROM progress WHERE at < ?", now - REQUEST_SECS)
        self.commit()

    def checkpoint(self) -> None:
        """Move what was committed from the log into the database: milliseconds, so when nobody waits."""
        if self._written:
            self._written = False
            try:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as e:  # a full disk: what was committed stays in the log
                self._say(f"the registry's log cannot be moved into it: {e}; trying again later")
                self._written = True

    def close(self) -> None:
        """Commit and let go of the file."""
        self.commit()
        self._db.close()


def check_registry(path: str) -> None:
    """Raise `StartError` if a core of this version could not go on with the registry of the one before it."""
    if not os.path.exists(path):
        return
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as e:
        raise StartError(f"the registry cannot be read: {e}") from None
    finally:
        db.close()
    if version > SCHEMA_VERSION:
        raise StartError(_newer(path, version))


def _newer(path: str, version: int) -> str:
    return (f"the registry {os.path.abspath(path)} was written by a newer version (schema {version}, ours "
            f"{SCHEMA_VERSION}); use that one, or another state directory")


def _key(request_id: str) -> str:
    """Return a request id as column text: JSON may hold lone surrogates, which sqlite's UTF-8 cannot."""
    return encode_text(request_id)


def _decoded(stored: bytes) -> Json:
    """Return what we stored; it may be larger than any message, because escapes have grown it."""
    return decode_json(stored, limit=sys.maxsize)
