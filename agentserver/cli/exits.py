"""Exit codes, and how whatever went wrong becomes one line.

Owns:    the numbers, the mapping from errors to them, and the only writing of error lines.
Runs in: the process of a person or script, any thread.
Unaware: of commands.
"""
from __future__ import annotations

import os
import sys

from ..errors import AgentServerError, LinkError, RequestError, RequestTimeout

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
TIMEOUT = 124
INTERRUPTED = 130  # 128 + SIGINT
PIPE = 141         # 128 + SIGPIPE: whoever read our output has gone

_BY_CODE = {"agent_not_found": NOT_FOUND, "timeout": TIMEOUT,
            "unavailable": UNREACHABLE}


class UsageError(Exception):
    """The command line itself is wrong; nothing was asked of a server."""


def of_code(error_code: str) -> int:
    """Return the exit code for a failed reply's error code."""
    return _BY_CODE.get(error_code, FAILED)


def of(error: BaseException) -> int:
    """Return the exit code for an error."""
    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, LinkError):
        return UNREACHABLE
    if isinstance(error, RequestTimeout):
        return TIMEOUT
    return of_code(error.code) if isinstance(error, RequestError) else FAILED


def explain(error: BaseException) -> int:
    """Say on stderr, in one line, what went wrong, and return the exit code."""
    if isinstance(error, UsageError):
        complain("usage", str(error))
    elif isinstance(error, AgentServerError):
        complain(error.code, str(error))
    elif isinstance(error, OSError):
        forget_stdout()
        what = error.strerror or str(error)
        complain("internal", f"{error.filename}: {what}" if error.filename else what)
    else:
        complain("internal", f"{type(error).__name__}: {error}; this is a mistake in agentserver, please report it")
    return of(error)


def complain(code: str, sentence: str) -> None:
    """Write one error line, with the code that a script can test."""
    note(f"error ({code}): {sentence}")


def note(sentence: str) -> None:
    """Write one line about what happens to stderr; without a stderr nobody is told, and that is all."""
    from .show import clean
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"agentserver: {clean(sentence)}\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        pass


def forget_stdout() -> None:
    """Keep the interpreter from writing to a stdout that is gone, and complaining about it, when it ends."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass
