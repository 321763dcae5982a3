"""`ps`, `info`, `why`: who is there, everything about one, how it ended.

Owns:    which facts are shown of an agent, and in which order.
Runs in: the main thread of a command.
Unaware: of columns and colours (show.py) and of the sentences of `why` (reasons.py).
"""
from __future__ import annotations

import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Callable, Iterator

from ..results import AgentInfo, ExitRecord
from ..wire import Json
from . import connect, out, show

if TYPE_CHECKING:
    from ..client import Agent, AgentClient

HEAD = ("ID", "NAME", "STATUS", "AGE", "COMMAND")
LAST_LINES = 5
LONGEST = 500         # columns of a command or a line of output in `why`


# ---------------------------------------------------------------- ps

def ps(given: Namespace) -> int:
    """Print the agents, oldest first."""
    if given.watch:
        from . import watch
        return watch.watch(given)
    with connect.connect(given) as client:
        print_agents(found(client, given), given.json)
    return 0


def found(client: AgentClient, given: Namespace) -> list[AgentInfo]:
    """Return the agents that the flags of `ps` select."""
    return connect.listed(client, given.status, given.all, dict(given.label))


def print_agents(infos: list[AgentInfo], as_json: bool) -> None:
    """Print a list of agents."""
    if as_json:
        out.document([info.raw for info in infos])
    else:
        show.say(*lines(infos, time.time(), show.terminal_columns()))


def lines(infos: list[AgentInfo], now: float, columns: int) -> list[str]:
    """Return the table of `ps`."""
    short = show.short_ids([info.id for info in infos])
    rows = [(short[info.id], info.name or "-", status(info), show.since(info.started_at or info.created_at, now),
             what(info)) for info in infos]
    return show.table(HEAD, rows, styled=2, columns=columns)


def status(info: AgentInfo) -> str:
    """Return the status, for a finished agent with how it ended, for one that is being stopped with that."""
    if info.finished and info.exit:
        how = ending(info)
        return f"{info.status} ({how})" if how else info.status
    return f"{info.status} (ending)" if info.want == "down" and not info.finished else info.status


def ending(info: AgentInfo) -> str:
    """Return in a word or two how an agent ended; nothing where all went well."""
    record = info.exit
    if record is None:
        return "unknown"
    if record.reason == "exited" and record.code == 0:
        return ""
    how = record.signal or ("" if record.code is None else f"exit {record.code}")
    why = record.reason if record.reason not in ("exited", "signaled") else ""
    return ", ".join(part for part in (why, how) if part) or "unknown"


def what(info: AgentInfo) -> str:
    """Return what an agent runs: its backend and task, or its command."""
    if info.model_backend:
        return f"{info.model_backend}: {info.task}" if info.task else info.model_backend
    import shlex
    return " ".join(map(shlex.quote, info.command))


# ---------------------------------------------------------------- info

def info(given: Namespace) -> int:
    """Print everything about one agent."""
    with connect.connect(given) as client:
        agent = client.agent(given.agents[0])
        record = agent.inspect()
    if given.json:
        out.document(record)
    else:
        about = AgentInfo.of(record.get("agent_info") or record)
        facts = [*_facts(about, time.time()), *_rest(record)]
        show.say(*show.pairs((name, value) for name, value in facts if value))
    return 0


def _facts(info: AgentInfo, now: float) -> Iterator[tuple[str, str]]:
    yield "id", info.id
    yield "name", info.name
    yield "status", status(info)
    yield "backend", info.model_backend
    yield "command", what(info) if not info.model_backend else " ".join(info.command)
    yield "task", info.task
    yield "directory", info.cwd
    yield "process", str(info.pid or "-")
    yield "attempt", str(info.attempt)
    yield "stdin", info.stdin + (f" of {info.pty['rows']} rows, {info.pty['cols']} columns" if info.pty else "")
    for name, stamp in (("created", info.created_at), ("started", info.started_at), ("paused", info.paused_at),
                        ("finished", info.finished_at)):
        if stamp:
            yield name, f"{stamp} ({show.since(stamp, now)} ago)"
    for stream, span in sorted(info.output.items(), reverse=True):
        gone = f", the first {show.size(span.first_offset)} are no longer kept" if span.first_offset else ""
        yield stream, show.size(span.end_offset) + gone
    for name, pairs in (("label", info.labels), ("metadata", info.metadata)):
        for key, value in pairs.items():
            yield name, f"{key}={value if isinstance(value, str) else _compact(value)}"
    if info.finished and info.exit:
        from .reasons import sentences
        for sentence in sentences(info, now):
            yield "end", sentence


def _rest(record: Json) -> Iterator[tuple[str, str]]:
    """Yield what `inspect` tells besides the agent itself, whatever a server may add to it."""
    known = record.get("agent_info") or {}
    for name, value in record.items():
        if name == "spec" and isinstance(value, dict):
            value = {key: item for key, item in value.items() if key not in known}
        if name == "attempts" and isinstance(value, list):
            yield from _attempts(value[:-1] if known.get("exit") else value)
        elif name != "agent_info" and value not in (None, {}, []):
            yield from _nested(name, value)


def _attempts(attempts: list[Json]) -> Iterator[tuple[str, str]]:
    """Yield how each attempt before the last ended."""
    from .reasons import cause
    for attempt in attempts:
        how = cause(ExitRecord.of(attempt.get("exit")))
        yield f"attempt {attempt.get('attempt')}", f"{attempt.get('started_at')}: {how}"


def _nested(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if item not in (None, "", {}, []):
                yield from _nested(f"{name}.{key}", item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, item in enumerate(value, 1):
            yield f"{name}[{number}]", " ".join(f"{k}={_plain(v)}" for k, v in item.items() if v not in (None, {}, []))
    else:
        yield name, _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _compact(value)


def _compact(value: Any) -> str:
    import json
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- why

def why(given: Namespace) -> int:
    """Tell how an agent ended, or what it does now, with the last it wrote."""
    from .reasons import sentences
    with connect.connect(given) as client:
        agent = client.agent(given.agents[0])
        about = agent.info()
        told = sentences(about, time.time())
        last = _last_output(agent, about)
    if given.json:
        out.document({"agent_id": about.id, "name": about.name, "status": about.status,
                      "exit": about.exit.raw if about.exit else None, "sentences": told, "last_output": last})
        return 0
    state = "has failed" if about.status == "failed" else f"is {about.status}"
    head = f"Agent {connect.label(about)} ({show.cut(show.clean(what(about)), LONGEST)}) {state}."
    show.say(head, *map(show.clean, told))
    for stream, shown in last.items():
        show.say(f"The last of its {stream}:", *("  " + show.cut(show.clean(line), LONGEST) for line in shown))
    return 0


def _last_output(agent: Agent, info: AgentInfo) -> dict[str, list[str]]:
    from .tail import last_lines
    last = {stream: last_lines(agent, stream, info.output[stream], LAST_LINES)
            for stream in ("stdout", "stderr") if stream in info.output}
    return {stream: found for stream, found in last.items() if found}


COMMANDS: dict[str, Callable[[Namespace], int]] = {"ps": ps, "info": info, "why": why}
