"""How an agent ended, and what it does now, in sentences.

Owns:    one sentence for every reason an exit record may carry, and for every status.
Runs in: any thread; it is pure: the time is an argument.
Unaware: of servers and terminals.
"""
from __future__ import annotations

from typing import Callable

from ..results import AgentInfo, ExitRecord
from .show import duration, plural, since, size

_HINTS = {
    "SIGSEGV": "it touched memory that is not its own, a mistake in the program",
    "SIGABRT": "it gave up by itself with abort(3)",
    "SIGBUS": "it touched memory that is not there, a mistake in the program or a full disk",
    "SIGPIPE": "it wrote to something that nobody reads any more",
    "SIGXCPU": "it used more processor time than it was allowed to",
    "SIGKILL": "perhaps the kernel, which does this when memory runs out: see `dmesg`",
}


def sentences(info: AgentInfo, now: float) -> list[str]:
    """Return what there is to say about an agent."""
    return _ended(info, info.exit, now) if info.finished and info.exit else _present(info, now)


# ---------------------------------------------------------------- the end

def _ended(info: AgentInfo, record: ExitRecord, now: float) -> list[str]:
    told = [cause(record), _length(info, record, now)]
    if record.rusage:
        told.append(_use(record))
    if record.leaked:
        told.append(_leaked(record))
    if record.survivors:
        told.append(_survivors(record))
    if info.attempt > 1:
        told.append(f"This was attempt {info.attempt}.")
    return [sentence for sentence in told if sentence]


def cause(record: ExitRecord) -> str:
    """Return what brought the end about."""
    reason, _, limit = record.reason.partition(":")
    if reason == "limit":
        return f"It reached its limit {limit} and was therefore ended by the server; {_how(record)}."
    tell = _CAUSES.get(reason)
    return tell(record) if tell else f"It ended for the reason {record.reason!r}; {_how(record)}."


def _exited(record: ExitRecord) -> str:
    if record.code == 0:
        return "It ended by itself with exit code 0, which means success."
    return f"It ended by itself with exit code {record.code}, which means failure.{_code_hint(record.code)}"


def _code_hint(code: int | None) -> str:
    if code == 127:
        return " Shells use 127 for a command that was not found."
    if code == 126:
        return " Shells use 126 for a command that could not be executed."
    if code is not None and 128 < code < 160:
        return f" Shells use {code} for a command that signal {code - 128} ended."
    return ""


def _signaled(record: ExitRecord) -> str:
    name = record.signal or "a signal"
    if record.by:
        return f"{_who(record)} sent it {name}, and it ended by that."
    hint = record.raw.get("message") or _HINTS.get(name)
    return f"{name} ended it, and this server did not send that{f': {hint}' if hint else ''}."


def _stop(record: ExitRecord) -> str:
    if record.signal == "SIGKILL":
        return (f"{_who(record)} stopped it, and SIGKILL ended it: it was still there when its grace was over, "
                "or when somebody killed it before that.")
    return f"{_who(record)} stopped it; {_how(record)}."


def _kill(record: ExitRecord) -> str:
    return f"{_who(record)} killed it; {_how(record)}."


def _shutdown(record: ExitRecord) -> str:
    return f"The server was shut down and ended its agents; {_how(record)}."


def _not_started(record: ExitRecord) -> str:
    why = record.raw.get("message") or record.raw.get("error")
    return "It could not be started again" + (f": {why}" if why else "; the server's core.log says why") + "."


def _lost(record: ExitRecord) -> str:
    return ("The server lost it: it ended, or was ended, while none of the server's processes could see how, "
            "and nobody can know its exit code.")


_CAUSES: dict[str, Callable[[ExitRecord], str]] = {
    "exited": _exited, "signaled": _signaled, "stop": _stop, "kill": _kill, "shutdown": _shutdown,
    "not_started": _not_started, "lost": _lost,
}


def _who(record: ExitRecord) -> str:
    if not record.by:
        return "Somebody"
    return "The server" if record.by == "server" else f"A client ({record.by})"


def _how(record: ExitRecord) -> str:
    if record.signal:
        return f"{record.signal} ended it"
    return "its exit code is unknown" if record.code is None else f"it then ended with exit code {record.code}"


def _length(info: AgentInfo, record: ExitRecord, now: float) -> str:
    at = record.at or info.finished_at
    ran = f"It ran for {duration(record.duration)}" if record.duration else "It ran for no time that could be measured"
    return f"{ran} and ended {since(at, now)} ago, at {at}." if at else ran + "."


def _use(record: ExitRecord) -> str:
    parts = []
    cpu = record.rusage.get("cpu_secs")
    memory = record.rusage.get("max_rss_bytes")
    if isinstance(cpu, (int, float)):
        parts.append(f"{duration(cpu)} of processor time")
    if isinstance(memory, (int, float)) and memory:
        parts.append(f"at most {size(memory)} of memory")
    return f"It used {' and '.join(parts)}." if parts else ""


def _leaked(record: ExitRecord) -> str:
    named = "; ".join(f"{item.get('pid')} {item.get('command') or ''}".strip() for item in record.leaked)
    was = "was" if len(record.leaked) == 1 else "were"
    return (f"{plural(len(record.leaked), 'process').capitalize()} that it had started {was} still alive then and "
            f"{was} ended too: {named}.")


_WHY_ALIVE = {"not_permitted": "the server is not permitted to signal it: it runs as another user",
              "unkillable": "it did not end by SIGKILL: perhaps it waits for a disk, which state D in `ps` tells",
              "left_alone": "the setting orphans = leave says so"}


def _survivors(record: ExitRecord) -> str:
    named = "; ".join(f"{item.get('pid')} {item.get('command') or ''}".strip()
                      + f" ({_WHY_ALIVE.get(str(item.get('why')), 'nobody knows why')})"
                      for item in record.survivors)
    was = "was" if len(record.survivors) == 1 else "were"
    return f"{plural(len(record.survivors), 'process').capitalize()} that it had started {was} not ended: {named}."


# ---------------------------------------------------------------- the present

def _present(info: AgentInfo, now: float) -> list[str]:
    told = [_doing(info, now)]
    if info.want == "down" and not info.finished:
        told.append("It has been asked to end and has not ended yet.")
    if info.not_permitted:
        told.append(_not_permitted(info))
    if info.want == "restart" and not info.finished:
        told.append("It is to be started again as soon as it has ended.")
    if info.attempt > 1:
        told.append(f"This is attempt {info.attempt}.")
    if info.exit and not info.finished:
        told.append(f"The attempt before: {cause(info.exit)}")
    told += _output(info)
    return told


def _not_permitted(info: AgentInfo) -> str:
    named = ", ".join(f"{one.get('pid')} ({one.get('command') or 'unknown'})" for one in info.not_permitted)
    return (f"{info.not_permitted[0].get('signal')} could not be sent to {named}: the server is not permitted to "
            "signal what runs as another user. End it as that user, or as root.")


def _doing(info: AgentInfo, now: float) -> str:
    process = f" as process {info.pid}" if info.pid else ""
    age = since(info.started_at or info.created_at, now)
    if info.status == "paused":
        how = f" ({info.pause_mode})" if info.pause_mode else ""
        return f"It is paused{how}, for {since(info.paused_at, now)} now{process}; `resume` lets it go on."
    if info.status == "idle":
        return f"It waits for {age} to be started."
    if info.status == "initializing":
        return f"It is being started, for {age} now."
    if info.status == "thinking":
        return f"It has been running for {age}{process} and is thinking."
    if info.finished:
        return f"It is {info.status}; how it came to that is not recorded."
    return f"It has been running for {age}{process}."


def _output(info: AgentInfo) -> list[str]:
    wrote = [f"{size(span.end_offset)} to {stream}" for stream, span in sorted(info.output.items(), reverse=True)
             if span.end_offset]
    told = [f"It has written {' and '.join(wrote)}." if wrote else "It has written nothing yet."]
    if info.stdin in ("pipe", "pty") and not info.finished:
        told.append("Its stdin is a pipe: `send` writes to it." if info.stdin == "pipe" else
                    "It runs on a terminal: `attach` shows it, `send` types on it.")
    return told
