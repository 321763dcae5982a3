"""Exit codes, and how whatever went wrong becomes one line.

Owns:    the numbers, the mapping from errors to them, and the only writing of error lines.
Runs in: the process of a person or script, any thread.
Unaware: of commands.
"""
from __future__ import annotations

import os
import sys

from ..errors import AgentServerError, LinkError, RequestError, RequestTimeout
from . import streams

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
TIMEOUT = 124
SIGINT = 2
INTERRUPTED = 128 + SIGINT
LONGEST_SENTENCE = 2000
PIPE = 141         # 128 + SIGPIPE: whoever read our output has gone

_BY_CODE = {"agent_not_found": NOT_FOUND, "timeout": TIMEOUT,
            "unavailable": UNREACHABLE}


class UsageError(Exception):
    """The command line itself is wrong; nothing was asked of a server."""


class Signalled(Exception):
    """A signal that was caught has ended the command; everything is as it was before."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def leave(number: int) -> None:
    """End by a signal, if one has ended the command; else see that none that comes now shows a traceback."""
    import signal
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # not SIGQUIT: that would leave a core dump
        try:
            streams.flush()
        except OSError:
            pass
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
        os.kill(os.getpid(), number)


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
    elif isinstance(error, streams.StreamError):
        if error.fd:
            streams.forget(error.fd)
        complain(error.code, str(error))
    elif isinstance(error, UnicodeEncodeError):
        complain("usage", f"{error.object!r} cannot be given to the system in the locale's encoding "
                 f"({error.encoding}); use a UTF-8 locale, such as LC_ALL=C.UTF-8")
    elif isinstance(error, OSError):
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
            if len(sentence) > LONGEST_SENTENCE:  # what was given is repeated in it, and that may be anything
                sentence = f"{sentence[:LONGEST_SENTENCE // 2]} … {sentence[-LONGEST_SENTENCE // 2:]}"
            sys.stderr.write(f"agentserver: {clean(sentence)}\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        streams.forget(2)
