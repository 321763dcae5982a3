"""Single values on the command line: read and checked.

Owns:    durations, times, pairs, JSON, and the flags that are made from the server's settings.
Runs in: the main thread, called by argparse.
Unaware: of commands.
"""
from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError
from typing import Any

from ..core.lifecycle import STATUSES

__all__ = ["STATUSES", "add_settings", "as_utf8", "count", "factor", "json_object", "moment", "pair", "seconds",
           "terminal_size", "variable"]

_MOST_SECS = 3650 * 86400.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _number(text: str) -> float | None:
    """Return a plain decimal number; Python's other spellings (nan, 1_0, 1e3) are not for people."""
    digits = text.replace(".", "", 1)
    return float(text) if digits.isascii() and digits.isdigit() else None


def _span(text: str) -> float | None:
    """Return seconds from `90`, `1.5`, `30s`, `10m`, `2h`, `7d`."""
    unit = _UNITS.get(text[-1:].lower())
    return _number(text) if unit is None else None if (n := _number(text[:-1])) is None else n * unit


def seconds(text: str) -> float:
    """Read a duration."""
    found = _span(text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is not a duration such as 10, 0.5, 30s, 10m or 2h")
    if found > _MOST_SECS:
        raise ArgumentTypeError(f"{text!r} is more than 3650 days; leave it out where nothing is to end it")
    return found


def factor(text: str) -> float:
    """Read a number above 0."""
    found = _number(text)
    if not found:
        raise ArgumentTypeError(f"{text!r} is not a number above 0 such as 2 or 0.5")
    return found


def count(text: str) -> int:
    """Read a whole number from 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def terminal_size(text: str) -> dict[str, int]:
    """Read the size of a terminal."""
    rows, x, cols = text.lower().partition("x")
    if not (x and all(part.isascii() and part.isdigit() and len(part) < 6 for part in (rows, cols))):
        raise ArgumentTypeError(f"{text!r} is not ROWSxCOLS such as 24x80")
    return {"rows": int(rows), "cols": int(cols)}


def moment(text: str) -> str:
    """Read a time, or a duration back from now, as RFC 3339 text."""
    import time

    from ..errors import RequestError
    from ..wire import from_rfc3339, rfc3339
    back = _span(text)
    try:
        return rfc3339(time.time() - back if back is not None else from_rfc3339(text))
    except (RequestError, ValueError, OverflowError, OSError):
        raise ArgumentTypeError(f"{text!r} is neither a time such as 2026-01-31T12:00:00Z nor a duration "
                                "such as 30s, 10m, 2h or 1d") from None


def pair(text: str) -> tuple[str, str]:
    """Read K=V."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ArgumentTypeError(f"{text!r} is not of the form K=V")
    return name, value


def variable(text: str) -> tuple[str, str]:
    """Read K=V, or K for the value that the variable has here. The value is not shown in an error."""
    name, equals, value = text.partition("=")
    if not name:
        raise ArgumentTypeError("a variable needs a name: K=V, or K to pass mine")
    if not equals:
        found = os.environ.get(name)
        if found is None:
            raise ArgumentTypeError(f"{name} is not set here; give it a value: {name}=…")
        value = found
    return name, value


def as_utf8(value: Any) -> Any:
    """Return text of the command line as it is meant where the locale has another encoding: as UTF-8, if it is that."""
    if isinstance(value, str):
        return os.fsencode(value).decode("utf-8", "surrogateescape")
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_utf8, value))
    return value


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    from ..errors import RequestError
    from ..wire import decode
    try:
        return decode(text.encode("utf-8", "surrogateescape"))
    except RequestError as e:
        raise ArgumentTypeError(f"not a JSON object: {e}") from None


def add_settings(parser: ArgumentParser) -> None:
    """Add a flag for every setting of the server. They stay text: sources.py reads and checks all sources alike."""
    from ..config import SETTINGS
    for setting in SETTINGS:
        text = f"{setting.help} [{setting.wanted}; default: {setting.shown_default}]"
        parser.add_argument(setting.flag, dest=f"setting_{setting.name}", metavar="V",
                            help=text.replace("`", "").replace("%", "%%"))
