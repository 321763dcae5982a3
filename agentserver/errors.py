"""What can go wrong, and whose fault it is.

Owns:    the exception classes, and the list of codes a failed reply may carry.
Runs in: any thread; it is pure.
Unaware: of sockets, processes and how an error reaches a person.

An error is a sentence that says what was wrong and what to do, plus a code that a program can
test. The class says who is to blame: the caller (`RequestError`), the person who configured the
server (`ConfigError`), the machine it was to run on (`StartError`), the way between client and
server (`LinkError`).
"""
from __future__ import annotations

from typing import Any

ERROR_CODES = (
    "bad_request", "message_too_large", "unknown_type", "unknown_command", "agent_not_found",
    "ambiguous_agent", "invalid_state", "limit_reached", "unknown_backend", "spawn_failed",
    "stdin_closed", "stdin_full", "pattern_too_slow", "not_permitted", "rate_limited", "timeout",
    "request_id_conflict", "shutting_down", "unavailable", "internal",
)


class AgentServerError(Exception):
    """Root of every error of ours: `str(error)` is the sentence, `error.code` the code."""

    default_code = "internal"

    def __init__(self, message: str, code: str = "", reply: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        #: the whole failed reply, where the error came back from a server
        self.reply = reply


class RequestError(AgentServerError):
    """The caller asked for what cannot be done; nothing was changed."""

    default_code = "bad_request"


class ConfigError(AgentServerError):
    """A setting is wrong; the sentence names the file and line, variable or flag."""

    default_code = "bad_request"


class StartError(AgentServerError):
    """The server cannot run here: port in use, directory served or not writable, too few descriptors."""

    default_code = "unavailable"


class LinkError(AgentServerError):
    """The server was not reached, or the link to it broke and stayed broken."""

    default_code = "unavailable"


class RequestTimeout(AgentServerError):
    """No answer, or not the awaited state, within the caller's time."""

    default_code = "timeout"
