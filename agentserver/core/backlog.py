"""What waits to be written into the registry: of each thing its newest state, in an order that can be carried out.

Owns:    the statements that were not committed yet, by what they are about, and how many bytes they have.
Runs in: the core's thread; it is pure.
Unaware: of sqlite3 and of what a statement means.

A turn's writes wait here until its end; while the disk refuses they wait longer. A statement about something
takes the place of the one before it, so that an agent that changes again and again costs no more.
"""
from __future__ import annotations

from typing import Any, Hashable, Iterator, List, Tuple

Statement = Tuple[str, Tuple[Any, ...]]

BACKLOG_BYTES = 16 * 1024 * 1024  # then no event is kept; ends and request ids are
REFUSED_BYTES = 24 * 1024 * 1024  # then what would have to be remembered is refused; ends are still kept
_STATEMENT_BYTES = 300            # of a statement beside its values


class Backlog:
    """See the module."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, Statement] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, key: Hashable, sql: str, *values: Any) -> None:
        """Let a statement about `key` wait, last of all, instead of the one that waits."""
        self.drop(key)
        self._waiting[key] = sql, values
        self.bytes += _size(values)

    def drop(self, key: Hashable) -> None:
        """Forget what waits about `key`."""
        before = self._waiting.pop(key, None)
        if before is not None:
            self.bytes -= _size(before[1])

    def get(self, key: Hashable) -> Tuple[Any, ...] | None:
        """Return the values that wait about `key`."""
        found = self._waiting.get(key)
        return None if found is None else found[1]

    def of(self, kind: str) -> Iterator[Tuple[Any, ...]]:
        """Yield the values that wait about all keys (kind, …)."""
        return (values for key, (_sql, values) in self._waiting.items() if isinstance(key, tuple) and key[0] == kind)

    def statements(self) -> List[Statement]:
        """Return all of them, in order."""
        return list(self._waiting.values())

    def clear(self) -> None:
        """They are on disk."""
        self._waiting.clear()
        self.bytes = 0


def _size(values: Tuple[Any, ...]) -> int:
    return _STATEMENT_BYTES + sum(len(value) for value in values if isinstance(value, (str, bytes)))
