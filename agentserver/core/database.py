"""The registry's file: one sqlite3 database, and what is done when it is locked, full, damaged or gone.

Owns:    `registry.db` (WAL, synchronous=NORMAL: it survives a SIGKILL of ours, and a power cut may take the last
         moments but never consistency), and its repair.
Runs in: the core's thread. A write waits for another process's lock once, for 50 ms; then it is refused at once.
Unaware: of what the tables mean.

A damaged file is never mended in place. All rows that can still be read are copied into a new file, `refill`
adds what the server knows, and the damaged file is kept aside. The same is done when the file is deleted or
replaced while it is open: the open database can still be read, but nothing that is written there would last.
"""
from __future__ import annotations

import glob
import os
import sqlite3
import time
from typing import Any, Callable, Iterable, List, Mapping, NamedTuple, Tuple

from ..errors import RequestError, StartError
from .backlog import Statement

START_LOCK_MS, LOCK_MS = 2000, 50  # waiting for another process's lock: at the start, and in the first refused write
LOOK_SECS = 0.05    # between two looks, at writes, whether the file is still there
REPAIR_SECS = 5.0   # between two tries to begin a new file
ASIDE_MOST = 5      # damaged files that are kept
_SUFFIXES = ("", "-wal", "-shm")
_NEW = ".new"       # of a file that is to take the place of a damaged one
#: what an operating system refuses for a while; anything else is damage
_REFUSALS = ("locked", "disk I/O error", "disk is full", "readonly", "unable to open", "out of memory", "interrupted",
             "locking protocol", "too big")
#: a statement that can never be carried out: a bug, which must not keep the others from the disk
_UNFIT = (OverflowError, ValueError, TypeError, sqlite3.InterfaceError, sqlite3.ProgrammingError)


class Schema(NamedTuple):
    """What is in the file: the version that its header bears; what makes the tables; what was added to that version
    since, with the name of its last part; the tables, with the column that a scan follows and those that it reads."""

    version: int
    script: str
    added: str
    last_added: str
    tables: Mapping[str, Tuple[str, str]]


class Trouble(NamedTuple):
    """Why nothing can be written: the sentence, whether another process holds a lock, and since when (monotonic)."""

    why: str
    locked: bool
    since: float


class Database:
    """See the module. `say` gets a sentence whenever something had to be repaired or put aside; `refill` returns the
    statements that write what the server knows into a new file."""

    def __init__(self, path: str, schema: Schema, say: Callable[[str], None], now: Callable[[], float],
                 refill: Callable[[], Iterable[Statement]]) -> None:
        self._path, self._schema, self._say, self._now, self._refill = path, schema, say, now, refill
        self._shown = os.path.abspath(path)
        self.trouble: Trouble | None = None
        self.unfolded = False      # something was written since the last checkpoint
        self._unfoldable = False   # the last try to move the log into the file has failed, and that was said
        self.changes = 0           # rows that the last write has changed
        self._repaired_at = self._scanned_at = self._looked_at = float("-inf")
        self._files: dict[str, tuple[int, int]] = {}  # what we have open, by suffix: device and inode
        self._db = self._open()
        self._files = self._identities()

    # ------------------------------------------------------------ opening

    def _open(self) -> sqlite3.Connection:
        self._end_repair()
        if os.path.exists(self._path) and not os.path.isfile(self._path):  # opening a named pipe would wait for ever
            return self._begin_anew(None, "is not a file")
        try:
            return self._connect(self._path)
        except sqlite3.OperationalError as e:  # a full disk, a lock, no descriptor: nothing is wrong with the file
            if not _is_damage(e):
                raise StartError(f"the registry {self._shown} cannot be opened: {e}") from None
            why = str(e)
        except sqlite3.DatabaseError as e:
            why = str(e)
        damaged = sqlite3.connect(self._path, isolation_level=None)
        try:
            return self._begin_anew(damaged, f"could not be read ({why})")
        except (sqlite3.Error, OSError) as e:
            raise StartError(f"the registry {self._shown} could not be read ({why}), and a new one cannot be begun: "
                             f"{e}") from None

    def _end_repair(self) -> None:
        """A core before us may have died after it had put the old file aside, and before the new one had its name.
        That one is complete: closed as it was, it has no log."""
        fresh = self._path + _NEW
        if not os.path.lexists(self._path) and os.path.isfile(fresh) and not os.path.lexists(fresh + "-wal"):
            self._put_aside()
            os.replace(fresh, self._path)

    def _connect(self, path: str) -> sqlite3.Connection:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        db.text_factory = _lenient
        try:
            db.execute(f"PRAGMA busy_timeout = {START_LOCK_MS}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA secure_delete = ON")           # what is removed is overwritten; see also `fold`
            db.execute("PRAGMA wal_autocheckpoint = 8000")  # pages; sooner when it is quiet, see `fold`
            db.execute("PRAGMA cache_size = -1024")  # KiB
            self._agree(db)
            db.execute(f"PRAGMA busy_timeout = {LOCK_MS}")  # from here on the loop waits with us
        except BaseException:
            db.close()
            raise
        return db

    def _agree(self, db: sqlite3.Connection) -> None:
        """Bring the schema to our version; refuse the registry of a newer one."""
        schema = self._schema
        found = _version(db, schema.version)
        if found > schema.version:  # nothing is wrong with it, so it is not put aside: its agents would be lost
            raise StartError(_newer(self._shown, found, schema.version))
        if found < schema.version:
            db.executescript(schema.script)
        if db.execute("PRAGMA user_version").fetchone()[0] != schema.version:
            db.execute(f"PRAGMA user_version = {schema.version}")
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (schema.last_added,)).fetchone():
            db.executescript(schema.added)
        for table, (key, columns) in schema.tables.items():  # a table or a column that is gone is found now
            db.execute(f"SELECT {columns} FROM {table} ORDER BY {key} LIMIT 0").fetchone()

    # ------------------------------------------------------------ writing

    def write(self, statements: List[Statement]) -> bool:
        """Carry out all of them in one transaction; return False, with `trouble` set, if that cannot be done now."""
        lost = self._lost() if time.monotonic() > self._looked_at + LOOK_SECS else ""
        if lost and not self._repair(lost):
            return self._refused(sqlite3.OperationalError(lost))
        e = self._transaction(statements)
        if e is not None and self._is_damaged(e) and self._repair(f"is damaged ({e})"):
            e = self._transaction(statements)
        if e is not None:
            return self._refused(e)
        self.unfolded = True
        if self.trouble is not None:
            self.trouble = None
            self._db.execute(f"PRAGMA busy_timeout = {LOCK_MS}")
            self._say("the registry can be written again")
        return True

    def _transaction(self, statements: List[Statement]) -> sqlite3.Error | None:
        db, before = self._db, self._db.total_changes
        at = 0
        try:
            db.execute("BEGIN IMMEDIATE")
            for sql, values in statements:
                db.execute(sql, values)
                at += 1
            db.execute("COMMIT")
        except _UNFIT as e:
            _roll_back(db)
            self._say(f"something cannot be written into the registry and is left out ({statements[at][0]:.60}): {e}")
            del statements[at]
            return self._transaction(statements)
        except sqlite3.Error as e:
            _roll_back(db)
            return e
        self.changes = db.total_changes - before
        return None

    def _refused(self, e: sqlite3.Error) -> bool:
        locked = "locked" in str(e)
        why = "another process holds a lock on it" if locked else str(e)
        if self.trouble is None:
            self._say(f"the registry cannot be written: {why}; trying again until it can")
            self.trouble = Trouble(why, locked, time.monotonic())
            self._db.execute("PRAGMA busy_timeout = 0")  # we have waited once; that is enough
        elif (self.trouble.why, self.trouble.locked) != (why, locked):
            self.trouble = Trouble(why, locked, self.trouble.since)
        return False

    def refusal(self, done: str = "nothing was done") -> RequestError:
        """Return what to tell who asked for something that cannot be written down."""
        why, locked, _since = self.trouble or Trouble("it was just repaired", False, 0.0)
        what = ("let that process end, or end it" if locked else "make room on the server's disk, or see core.log")
        return RequestError(f"the server cannot write its registry ({why}), so {done}; {what}, and ask again",
                            "unavailable")

    # ------------------------------------------------------------ reading

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """Return all rows of a query; raise `RequestError(unavailable)` when they cannot be read."""
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as e:
            try:
                if self._is_damaged(e) and self._repair(f"could not be read ({e})"):
                    return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as again:
                e = again
            raise RequestError(f"the registry cannot be read: {e}", "unavailable") from None

    # ------------------------------------------------------------ damage

    def _identities(self) -> dict[str, tuple[int, int]]:
        return {suffix: _identity(self._path + suffix) for suffix in _SUFFIXES}

    def _lost(self) -> str:
        """Return why what we write would not last, "" if it does: somebody deleted or replaced the file."""
        self._looked_at = time.monotonic()
        for suffix, ours in self._files.items():
            there = _identity(self._path + suffix)
            if there != ours:
                return f"was {'replaced' if there[1] else 'deleted'} ({os.path.basename(self._path)}{suffix})"
        return ""

    def look(self) -> None:
        """See whether the file is still there, and begin a new one if not; called when nothing is written for long."""
        lost = self._lost()
        if lost:
            self._repair(lost)

    def _is_damaged(self, e: sqlite3.Error) -> bool:
        """Whether the file is wrong, and not only the moment. An I/O error may be either: the file is wrong if not all
        of it can be read."""
        if "disk I/O error" not in str(e) or time.monotonic() < self._scanned_at + REPAIR_SECS:
            return _is_damage(e)
        self._scanned_at = time.monotonic()
        try:
            for table, (key, columns) in self._schema.tables.items():
                for _row in self._db.execute(f"SELECT {_as_blobs(columns)} FROM {table} ORDER BY {key}"):
                    pass
        except sqlite3.Error:
            return True
        return False

    def _repair(self, why: str) -> bool:
        """Begin a new file with all that is known; return whether that went well."""
        if time.monotonic() < self._repaired_at + REPAIR_SECS:
            return False
        self._repaired_at = time.monotonic()
        try:
            self._db = self._begin_anew(self._db, why)
        except (sqlite3.Error, OSError) as e:
            self._say(f"the registry {why}, and a new one cannot be begun: {e}; trying again")
            return False
        return True

    def _begin_anew(self, damaged: sqlite3.Connection | None, why: str) -> sqlite3.Connection:
        fresh = self._path + _NEW
        _remove(fresh)
        db = self._connect(fresh)
        try:
            db.execute("BEGIN")
            counts = {table: _copy(damaged, db, table, key, columns)
                      for table, (key, columns) in self._schema.tables.items()} if damaged is not None else {}
            for sql, values in self._refill():
                db.execute(sql, values)
            db.execute("COMMIT")
        finally:
            db.close()
        try:
            aside = self._put_aside()
        except OSError:
            _remove(fresh)  # it would be taken for the end of a repair, some day
            raise
        if damaged is not None:
            _close(damaged)  # before the new one is opened: sqlite deletes a log by its name
        try:
            os.replace(fresh, self._path)
            db = self._connect(self._path)
        except (sqlite3.Error, OSError) as e:
            raise SystemExit(f"the new registry {self._shown} cannot be opened: {e}") from None  # the next core tries
        self._files = self._identities()
        kept = f"it was kept as {aside} and " if aside else ""
        self._say(f"the registry {why}; {kept}a new one was begun, with "
                  f"{counts.get('agents', 0)} agents and {counts.get('events', 0)} events that could be read")
        return db

    def _put_aside(self) -> str:
        """Rename what there is of the old file; return the new name, "" if there was nothing."""
        stem = aside = f"{self._path}.unreadable-{int(self._now())}"
        count = 0
        while os.path.lexists(aside):
            count += 1
            aside = f"{stem}.{count}"
        found = [suffix for suffix in _SUFFIXES if os.path.lexists(self._path + suffix)]
        for suffix in found:
            os.replace(self._path + suffix, aside + suffix)
            if os.path.isfile(aside + suffix):
                os.chmod(aside + suffix, 0o600)
        all_kept = glob.glob(glob.escape(self._path) + ".unreadable-*")
        kept = [name for name in all_kept if not name.endswith(_SUFFIXES[1:])]
        for name in sorted(kept, key=os.path.getmtime)[:-ASIDE_MOST]:
            for suffix in _SUFFIXES:
                if os.path.isfile(name + suffix):
                    os.unlink(name + suffix)
        return aside if found else ""

    # ------------------------------------------------------------ the log

    def fold(self, all_of_it: bool) -> bool:
        """Move what was committed from the log into the file: milliseconds, so when nobody waits. `all_of_it`: leave
        the log empty, so that nothing that was removed stays in it. Return whether that was possible."""
        mode = "TRUNCATE" if all_of_it else "PASSIVE"
        try:
            self._db.execute("PRAGMA busy_timeout = 0")
            busy = self._db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0]
            if self.trouble is None:
                self._db.execute(f"PRAGMA busy_timeout = {LOCK_MS}")
        except sqlite3.Error as e:  # a full disk: what was committed stays in the log
            if not self._unfoldable:
                self._say(f"the registry's log cannot be moved into it: {e}; trying again until it can")
            self._unfoldable = True
            return False
        self._unfoldable = False
        self.unfolded = self.unfolded and bool(busy)
        return not busy

    def close(self) -> None:
        """Let go of the file."""
        _close(self._db)


def check(path: str, version: int) -> None:
    """Raise `StartError` if a core that knows this version of the schema could not go on with a file."""
    if not os.path.isfile(path):  # a new one is begun
        return
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        found = _version(db, version)
    except sqlite3.OperationalError as e:
        raise StartError(f"the registry cannot be read: {e}") from None
    except sqlite3.DatabaseError:  # damage is mended at the start
        return
    finally:
        db.close()
    if found > version:
        raise StartError(_newer(os.path.abspath(path), found, version))


def _lenient(text: bytes) -> str:
    """Return damaged text as text: sqlite3 would refuse the whole query for one row, as if the file were damaged."""
    return text.decode("utf-8", "replace")


def _version(db: sqlite3.Connection, ours: int) -> int:
    """Return the version of a file's schema. Its header and its table meta both tell it, so that a damaged header is
    not taken for a newer version."""
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    if found > ours:
        row = db.execute("SELECT CAST(value AS TEXT) FROM meta WHERE key = 'schema'").fetchone()
        if row and str(row[0]).isdecimal():
            found = int(row[0])
    return found


def _newer(path: str, found: int, ours: int) -> str:
    return (f"the registry {path} was written by a newer version (schema {found}, ours {ours}); use that one, or "
            "another state directory")


def _remove(path: str) -> None:
    for suffix in _SUFFIXES:
        if os.path.lexists(path + suffix):
            os.unlink(path + suffix)


def _is_damage(e: sqlite3.Error) -> bool:
    return not (isinstance(e, sqlite3.OperationalError) and any(word in str(e) for word in _REFUSALS))


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def _as_blobs(columns: str) -> str:
    """Read text as bytes: damaged text may be no UTF-8, which sqlite3 would refuse to return."""
    return ", ".join(f"CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END, typeof({name})"
                     for name in columns.split(", "))


def _copy(damaged: sqlite3.Connection, db: sqlite3.Connection, table: str, key: str, columns: str) -> int:
    """Copy the rows of one table that can be read, from both ends towards the damage; return how many there are."""
    marks = ", ".join("?" * len(columns.split(", ")))
    for direction in ("ASC", "DESC"):
        try:
            rows: Iterable[Any] = damaged.execute(
                f"SELECT {_as_blobs(columns)} FROM {table} ORDER BY {key} {direction}")
            for row in rows:
                values = [value.decode("utf-8", "replace") if kind in ("text", b"text") else value
                          for value, kind in zip(row[::2], row[1::2])]
                _insert(db, f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})", values)
            break
        except sqlite3.Error:  # the scan met the damage; the rest can be met from the other end
            continue
    return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def _insert(db: sqlite3.Connection, sql: str, values: list[Any]) -> None:
    try:
        db.execute(sql, values)
    except (*_UNFIT, sqlite3.IntegrityError):  # one row that makes no sense
        pass


def _roll_back(db: sqlite3.Connection) -> None:
    try:
        if db.in_transaction:
            db.execute("ROLLBACK")
    except sqlite3.Error:
        pass


def _close(db: sqlite3.Connection) -> None:
    try:
        db.close()
    except sqlite3.Error:  # a damaged file may refuse even that
        pass
