"""What travels, before it means anything: strict JSON, checks of values, dataclasses to and from objects.

Owns:    the size, depth and number of values of a message, the checks a field can be given, times, ids, bytes as text.
Runs in: any thread; it is pure.
Unaware: of which messages there are (messages.py, results.py).

Reading is strict where a caller could be hurt (types, bounds, NUL bytes) and lenient where the
protocol wants to grow: unknown fields of a message are ignored, absent and `null` are the same.
"""
from __future__ import annotations

import json
import math
import re
from dataclasses import MISSING, field, fields
from typing import Any, Callable, Dict, Type, TypeVar

from .errors import RequestError

MAX_MESSAGE = 10 * 1024 * 1024   # bytes, both ways; above it: message_too_large
MAX_WIRE = 11 * 1024 * 1024      # bytes; above it a connection is cut
MAX_DEPTH = 64
MAX_VALUES = 100_000             # of one request: commas and opening brackets outside texts
GLIMPSE_BYTES = 4096             # at the beginning and at the end of a message that is too much to be read
MAX_INT = 2 ** 63 - 1            # counts and offsets live in 64-bit columns

Check = Callable[[Any, str], Any]
Json = Dict[str, Any]
T = TypeVar("T")


# ---------------------------------------------------------------- strict JSON

def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:32]} is too large")
    return number


def _integer(text: str) -> int:
    if len(text) > 20:  # int() of a long text is quadratic before Python 3.11
        raise ValueError(f"the integer {text[:20]}… is too large")
    return int(text)


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_canonical = json.JSONEncoder(separators=(",", ":"), allow_nan=False, sort_keys=True).encode


def encode(message: Json) -> bytes:
    """Return a message as compact ASCII JSON; lone surrogates travel as escapes and come back as they were."""
    return _encode(message).encode("ascii")


def encode_text(value: Any) -> str:
    """Return any JSON value as compact ASCII JSON text, for columns and for fragments of replies."""
    return _encode(value)


def canonical(message: Json) -> bytes:
    """Return the form in which two requests are compared: sorted keys, without the request id."""
    return _canonical({k: v for k, v in message.items() if k != "request_id"}).encode("ascii")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _separators(raw: bytes) -> int:
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def too_many(raw: bytes, most: int = MAX_VALUES) -> bool:
    """Tell, without building any, whether JSON holds more than `most` values: items of lists, members of objects.

    All is done by searches that run at the speed of memory, since whoever sent this may have meant harm."""
    if _separators(raw) <= most:  # texts included: nearly always
        return False
    raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quotation mark begins or ends a text
    if raw.count(b'"') > 4 * (most + 1):  # two for a name and two for its value
        return True
    return _separators(b"".join(raw.split(b'"')[::2])) > most


def glimpse(raw: bytes, name: str) -> str | None:
    """Return a member that is text of a message that is too much to be read, if it is near its beginning or its end."""
    pattern = re.compile(rb'(?<!\\)"%s"\s*:\s*("(?:[^"\\]|\\.)*")' % name.encode("ascii"))
    found = pattern.search(raw, 0, GLIMPSE_BYTES) or pattern.search(raw, max(0, len(raw) - GLIMPSE_BYTES))
    try:
        return str(json.loads(found.group(1))) if found else None
    except ValueError:
        return None


def decode(raw: bytes, limit: int = MAX_MESSAGE) -> Json:
    """Return the JSON object in `raw`, or raise `RequestError` with a sentence that says what is wrong (RFC 8259)."""
    if len(raw) > limit:
        raise RequestError(f"the message has {len(raw)} bytes and at most {limit} are allowed; "
                           "send less at once", "message_too_large")
    value = _parsed(raw)
    if not isinstance(value, dict):
        raise RequestError("the message must be a JSON object")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _too_deep(value):
        raise RequestError(f"the message is nested deeper than {MAX_DEPTH} levels")
    return value


def _parsed(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8").strip(" \t\r\n")
        if not text:
            raise RequestError("the message is empty; send one JSON object")
        value, end = _decoder.raw_decode(text)
    except UnicodeDecodeError as e:
        raise RequestError(f"the message is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}") from None
    except RecursionError:
        raise RequestError(f"the message is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as e:
        raise RequestError(f"the message is not valid JSON: {e}") from None
    if end != len(text):
        raise RequestError(f"the message is not one JSON object: something follows it at character {end}")
    return value


# ---------------------------------------------------------------- checks: (value, where) -> value, or RequestError

def _wrong(where: str, wanted: str, value: Any) -> RequestError:
    shown = _encode(value[:60] if isinstance(value, str) else value)
    return RequestError(f"{where} must be {wanted}, not {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _count(value: Any, where: str, what: str, most: int) -> None:
    if len(value) > most:
        raise RequestError(f"{where} has {len(value)} {what} and may have at most {most}")


def text(most: int = MAX_MESSAGE, least: int = 0) -> Check:
    """Text of `least` to `most` characters."""
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise _wrong(where, "text", value)
        if not least <= len(value) <= most:
            raise RequestError(f"{where} must have {least} to {most} characters and has {len(value)}")
        return value
    return check


def os_text(most: int = MAX_MESSAGE, least: int = 0) -> Check:
    """Text that can be handed to the operating system: no NUL, and encodable."""
    inner = text(most, least)

    def check(value: Any, where: str) -> str:
        checked: str = inner(value, where)
        if "\0" in checked:
            raise RequestError(f"{where} contains a NUL character, which no program can be given")
        try:
            checked.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise RequestError(f"{where} contains a lone surrogate, which no program can be given") from None
        return checked
    return check


_os_text = os_text()


def whole(least: int = 0, most: int = MAX_INT) -> Check:
    """A whole number within bounds."""
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(where, "a whole number", value)
        if not least <= value <= most:
            raise _wrong(where, f"from {least} to {most}", value)
        return value
    return check


def seconds(most: float = 10 * 365 * 86400.0, zero: bool = True) -> Check:
    """A duration in seconds."""
    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(where, "a number of seconds", value)
        if not 0 <= value <= most or not (zero or value):
            raise _wrong(where, f"{'at least' if zero else 'more than'} 0 and at most {most:g} seconds", value)
        return float(value)
    return check


def boolean(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


def mapping(value: Any, where: str) -> Json:
    """Any JSON object."""
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    return value


def anything(value: Any, where: str) -> Any:
    """Any JSON value."""
    return value


def one_of(*words: str) -> Check:
    """One of a few words."""
    def check(value: Any, where: str) -> str:
        if value not in words:
            raise _wrong(where, "one of " + ", ".join(words), value)
        return str(value)
    return check


def list_of(inner: Check, least: int = 0, most: int = MAX_MESSAGE) -> Check:
    """A list of `least` to `most` items that all pass `inner`."""
    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        if len(value) < least:
            raise RequestError(f"{where} must have at least {least} item{'s' if least > 1 else ''}")
        if len(value) > most:
            raise RequestError(f"{where} has {len(value)} items and may have at most {most}; send several requests")
        try:
            return [inner(item, where) for item in value]
        except RequestError:  # again, to say which one it is
            return [inner(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return check


def map_of(inner: Check, most: int = MAX_MESSAGE, name: Check | None = None) -> Check:
    """An object of at most `most` members whose values all pass `inner`, and whose names pass `name`."""
    def check(value: Any, where: str) -> dict[str, Any]:
        _count(mapping(value, where), where, "members", most)
        if name is not None:
            for key in value:
                name(key, f"a name in {where}")
        return {key: inner(item, f"{where}.{key}") for key, item in value.items()}
    return check


def environment(value: Any, where: str) -> dict[str, str]:
    """Names and values for environ(7). The sentence of an error never shows a value, nor what may be one."""
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object: name -> value")
    for name, item in value.items():
        if not name:
            raise RequestError(f"{where} has the name ''; a name is not empty")
        if "=" in name:
            raise RequestError(f"{where} has a name with '=' in it, after {name.partition('=')[0][:60]!r}; give the "
                               "value apart from its name")
        _os_text(name, f"a name in {where}")
        if not isinstance(item, str):
            raise RequestError(f"{where}.{name} must be text")
        _os_text(item, f"{where}.{name}")
    return dict(value)


def stdin_data(value: Any, where: str) -> str | bytes:
    """Text, or bytes as an array of 0 to 255."""
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, list) and not any(isinstance(item, bool) for item in value):
            return bytes(value)
    except (TypeError, ValueError):
        pass
    raise RequestError(f"{where} must be text or an array of whole numbers from 0 to 255")


def signal_spec(value: Any, where: str) -> str | int:
    """A signal by name or number; whether this system knows it is decided where signals are sent."""
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return value
    raise _wrong(where, "the name or number of a signal", value)


def record(cls: Type[T]) -> Check:
    """An object that reads as `cls`. Names that `cls` does not know are refused: whoever sets a limit relies on it."""
    def check(value: Any, where: str) -> T:
        known = [name for name, _check, _required in _plan(cls)]
        for name, item in mapping(value, where).items():
            if name not in known and item is not None:
                raise RequestError(f"{where}.{name[:64]} is not known to this version, and what is not enforced is not "
                                   f"accepted; leave it out (known: {', '.join(known)})")
        return read(cls, value, where)
    return check


# ---------------------------------------------------------------- reading and writing dataclasses

def wire(check: Check, default: Any = MISSING, **kwargs: Any) -> Any:
    """Declare a field that travels: how it is checked, and what its absence means."""
    if default is MISSING and "default_factory" not in kwargs:
        return field(metadata={"check": check})
    if default is not MISSING:
        kwargs["default"] = default
    return field(metadata={"check": check}, **kwargs)


_plans: dict[type, tuple[tuple[str, Check, bool], ...]] = {}


def _plan(cls: type) -> tuple[tuple[str, Check, bool], ...]:
    plan = _plans.get(cls)
    if plan is None:
        plan = _plans[cls] = tuple(
            (f.name, f.metadata["check"], f.default is MISSING and f.default_factory is MISSING)
            for f in fields(cls) if "check" in f.metadata)
    return plan


def read(cls: Type[T], obj: Json, where: str = "") -> T:
    """Return `obj` as `cls`; raise `RequestError` naming the field that is wrong or missing."""
    values = {}
    for name, check, required in _plan(cls):
        value = obj.get(name)
        if value is not None:
            values[name] = check(value, f"{where}.{name}" if where else name)
        elif required:
            raise RequestError(f"{where + '.' if where else ''}{name} is missing")
    return cls(**values)


def to_wire(message: Any) -> Json:
    """Return a request or payload as JSON object; what is `None` is left out."""
    out: Json = {"type": message.type} if hasattr(message, "type") else {}
    for name, _check, _required in _plan(type(message)):
        value = getattr(message, name)
        if value is None:
            continue
        if isinstance(value, bytes):
            value = list(value)
        out[name] = to_wire(value) if hasattr(type(value), "__dataclass_fields__") else value
    return out


# ---------------------------------------------------------------- bytes, ids and times

def wire_bytes(data: str | None, encoding: str | None) -> bytes:
    """Return the bytes that travelled as text or as base64."""
    if not data:
        return b""
    if encoding == "base64":
        import binascii
        return binascii.a2b_base64(data)
    return data.encode("utf-8", "surrogatepass")


def wire_text(data: bytes) -> tuple[str, str]:
    """Return bytes as (data, encoding): text if they are valid UTF-8, else base64."""
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        import binascii
        return binascii.b2a_base64(data, newline=False).decode("ascii"), "base64"


def json_data(data: bytes) -> tuple[bytes, str]:
    """Return what `wire_text` does, with the text as JSON: the quick way for what is mostly plain ASCII."""
    text, encoding = wire_text(data)
    plain = data if encoding == "utf-8" else text.encode("ascii")
    if plain.isascii() and len(plain.translate(None, _RARE)) == len(plain) and len(
            plain.translate(None, _ESCAPED)) * 16 >= len(plain) * 15:  # a search costs little where it finds little
        for raw, escaped in _ESCAPES:
            plain = plain.replace(raw, escaped)
        return b'"%s"' % plain, encoding
    return encode_text(text).encode("ascii"), encoding


#: what JSON must escape and output often holds; the backslash first
_ESCAPES = ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t"), (b"\x1b", b"\\u001b"))
_ESCAPED = b"".join(raw for raw, _escaped in _ESCAPES)
_RARE = bytes(code for code in range(128) if (code < 32 or code == 127) and code not in b"\n\r\t\x1b")


def new_id() -> str:
    """Return a random UUID as text (RFC 9562, version 4), without importing `uuid`."""
    import os
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text_ = raw.hex()
    return f"{text_[:8]}-{text_[8:12]}-{text_[12:16]}-{text_[16:20]}-{text_[20:]}"


_AN_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def is_id(text_: str) -> bool:
    """Whether a text has the form of an agent's id, as `new_id` makes them."""
    return _AN_ID.fullmatch(text_) is not None


def rfc3339(unix: float) -> str:
    """Return seconds since the epoch as RFC 3339 UTC text with microseconds."""
    import time
    micros = round(unix * 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micros // 1_000_000)) + f".{micros % 1_000_000:06d}Z"


def from_rfc3339(stamp: str, where: str = "time") -> float:
    """Return RFC 3339 text as seconds since the epoch, or raise `RequestError`."""
    from datetime import datetime, timezone
    try:
        moment = datetime.fromisoformat(stamp[:-1] + "+00:00" if stamp[-1:] in "Zz" else stamp)
    except ValueError:
        raise RequestError(f"{where} must be an RFC 3339 time such as 2026-01-31T12:00:00Z, "
                           f"not {stamp[:40]!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
