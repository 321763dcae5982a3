"""`health`, `stats`, `events`, `reload`, `shutdown`: the server itself.

Owns:    what is shown of it, and how its renewal and its end are waited for.
Runs in: the main thread of a command.
Unaware: of what a server does to be renewed or to end.
"""
from __future__ import annotations

import os
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Callable, Iterator

from ..errors import AgentServerError, LinkError, RequestError, RequestTimeout
from ..results import EventsDropped
from ..wire import Json
from . import connect, exits, out, show

if TYPE_CHECKING:
    from ..client import AgentClient

LOOK_SECS = 0.1        # between two looks whether the server is still there
LOOK_ANSWER_SECS = 2.0  # how long such a look may take
LAST_STEPS_SECS = 5.0  # from its closed socket to the end of its process


# ---------------------------------------------------------------- health, stats

def health(given: Namespace) -> int:
    """Print how the server is; return 1 if it is not well."""
    with connect.connect(given) as client:
        found = client.health()
    if given.json:
        out.document(found.raw)
    else:
        facts = {"healthy": "yes" if found.healthy else "no", "protocol": found.protocol_version,
                 "uptime": show.duration(found.uptime_secs), "active agents": str(found.active_agents)}
        show.say(*show.pairs([*facts.items(), *((k, str(v)) for k, v in found.metadata.items())]))
    return exits.OK if found.healthy else exits.FAILED


def stats(given: Namespace) -> int:
    """Print the server's counters."""
    with connect.connect(given) as client:
        found = client.stats()
    if given.json:
        out.document(found.raw)
    else:
        show.say(*show.pairs(_counters(found.raw)))
    return exits.OK


def _counters(raw: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _counters(value, f"{prefix}{name} ")
        elif value is not None:
            yield _title(prefix + name), _counted(name, value)


def _title(name: str) -> str:
    """Return a counter's name for people, without the unit that its value is shown with."""
    for unit in ("_bytes", "_secs"):
        name = name[:-len(unit)] if name.endswith(unit) else name
    return name.replace("_", " ")


def _counted(name: str, value: Any) -> str:
    if isinstance(value, (int, float)) and "bytes" in name:
        return show.size(value)
    if isinstance(value, (int, float)) and name.endswith("secs"):
        return show.duration(value)
    return str(value)


# ---------------------------------------------------------------- events

def events(given: Namespace) -> int:
    """Print what happened; with --follow what happens."""
    with connect.patient(given) as client:
        shown = _Shown(given)
        if not given.follow:
            for event in _kept(client, given.since or 0):
                shown.show(event)
            return exits.OK
        for event in client.follow_events(since=given.since):
            if isinstance(event, EventsDropped):
                _tell_gap(event.from_sequence, event.to_sequence)
            else:
                shown.show(event)
    return exits.OK


def _kept(client: AgentClient, since: int) -> Iterator[Json]:
    """Yield the stored events after `since`, page by page."""
    first = True
    while True:
        page = client.events(since=since, limit=1000)
        if first and since and page.first_kept > since + 1:
            _tell_gap(since + 1, page.first_kept - 1)
        yield from page.events
        if not page.more:
            return
        since, first = page.next, False


def _tell_gap(first: int, last: int) -> None:
    exits.note(f"the events from {first} to {last} are no longer kept")


class _Shown:
    """Print events, one per line, at once."""

    def __init__(self, given: Namespace) -> None:
        self._json = given.json

    def show(self, event: Json) -> None:
        if self._json:
            out.document(event)
        else:
            out.write(1, (event_line(event) + "\n").encode("utf-8", "backslashreplace"))


def event_line(event: Json) -> str:
    """Return an event as one line: number, time, who, status, what."""
    who = str(event.get("agent_id") or "server")[:8]
    status = str(event.get("status") or event.get("state") or "")
    at = str(event.get("timestamp") or "")[:19].replace("T", " ")
    told = str(event.get("message") or event.get("update_type") or event.get("type") or "")
    head = f"{event.get('sequence', '?'):>6}  {at}  {show.clean(who):8}  "
    return f"{head}{show.paint(status.ljust(12), show.status_style(status))}  {show.clean(told)}".rstrip()


# ---------------------------------------------------------------- reload

def reload(given: Namespace) -> int:
    """Renew the server's processes, and wait until the new ones serve."""
    limit = given.begun + (connect.ANSWER_SECS if given.timeout is None else given.timeout)
    with connect.connect(given) as client, connect.progress("reloading"):
        before = client.health().metadata
        generation = int(client.reload()["generation"])
        while not _renewed(after := _metadata(client, limit), generation, before):
            if time.monotonic() >= limit:
                raise RequestTimeout("the server has not been renewed within the time given; it goes on with that, "
                                     "and `agentserver health` shows its generation")
            time.sleep(LOOK_SECS)
    if given.json:
        out.document({"generation": int(after["generation"]), "version": after.get("version", ""), "metadata": after})
    else:
        show.say(f"the server at {client.address} was reloaded: generation {after['generation']}, "
                 f"version {after.get('version', '?')}")
    return exits.OK


def _metadata(client: AgentClient, limit: float) -> dict[str, str]:
    client.timeout = max(limit - time.monotonic(), LOOK_SECS)
    return client.health().metadata


def _renewed(now: dict[str, str], generation: int, before: dict[str, str]) -> bool:
    """Whether a new core serves, and for the network a new shell, where there was one; raise if that failed."""
    if now.get("reload_failed"):
        raise RequestError(f"the reload failed, and the server goes on as before: {now['reload_failed']}", "internal")
    shell_is_new = not before.get("endpoint") or (bool(now.get("endpoint"))
                                                  and now.get("shell_pid") != before.get("shell_pid"))
    return int(now["generation"]) > generation and shell_is_new


# ---------------------------------------------------------------- shutdown

def shutdown(given: Namespace) -> int:
    """End the server, wait until it is gone, and say so."""
    with connect.patient(given) as client:
        pid = str(client.health().metadata.get("pid", ""))
        reply = _end(client, given, pid)
        _wait_gone(client, pid, given)
        if connect.is_local(client) and not _ended(pid):
            raise RequestTimeout(f"the server answers no more, but its process {pid} has not ended")
        if given.json:
            out.document(reply)
        else:
            show.say(f"the server at {client.address} has ended")
    return exits.OK


def _end(client: AgentClient, given: Namespace, pid: str) -> Json:
    """Ask the server to end, and return its reply. A server whose disk is full cannot write down that it was asked: it
    ends, but its reply never comes."""
    try:
        return client.shutdown(drain=given.drain)
    except AgentServerError as e:
        gone = e.code == "unavailable" and connect.is_local(client) and pid.isdigit() and not _runs(int(pid))
        if not gone and e.code != "shutting_down":
            raise
    return {"type": "shutdown_response", "success": True, "state": "down"}


def _wait_gone(client: AgentClient, pid: str, given: Namespace) -> None:
    """Wait until nobody answers any more, or another server does."""
    doing, seen = "draining" if given.drain else "ending", ""
    limit = connect.deadline(given)
    # one that does not wait long, for all looks: over ssh a connection is dear
    with connect.progress(doing) as shown, \
            connect.again(client, given, timeout=LOOK_ANSWER_SECS, retry_secs=0) as looker:
        while True:
            left = _active(looker, pid, connect.is_local(client))
            if limit is not None and time.monotonic() >= limit:
                raise RequestTimeout(f"the server is still {doing}{seen}; it goes on with that")
            if left is None:
                return
            seen = f", with {show.plural(left, 'agent')} left"
            shown["what"] = f"{doing}{seen}"
            time.sleep(LOOK_SECS)


def _active(looker: AgentClient, pid: str, local: bool) -> int | None:
    """Return how many agents the server with this pid still has; None if it is not there. A local one whose socket is
    there is there, also while it does not answer; through a network, what takes a connection may be anybody."""
    for _ in range(2):  # a connection that broke says nothing yet: the core may have been started again
        try:
            found = looker.health()
            return found.active_agents if str(found.metadata.get("pid", "")) == pid else None
        except LinkError:
            continue
        except RequestTimeout:
            return 0 if local else None
        except AgentServerError as e:
            return None if e.code == "unavailable" else 0
    return None


def _ended(pid: str) -> bool:
    """Wait for the last steps of a local server's process, so that a new one can be started in its directory; return
    whether it has ended."""
    until = time.monotonic() + LAST_STEPS_SECS
    while pid.isdigit() and _runs(int(pid)):
        if time.monotonic() >= until:
            return False
        time.sleep(LOOK_SECS / 10)
    return True


def _runs(pid: int) -> bool:
    """Whether a process exists and has not ended; one that its parent has not reaped has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except (OSError, IndexError):
        return not os.path.isdir("/proc/self") and _signalable(pid)


def _signalable(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "health": health, "stats": stats, "events": events, "reload": reload, "shutdown": shutdown}
