"""`pause`, `resume`, `stop`, `kill`, `restart`, `rm`, `signal`: one command for one agent or many at once.

Owns:    which agents are meant, what was done with each, and the exit code of it all.
Runs in: the main thread of a command.
Unaware: of what a command does to an agent.
"""
from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING, Any, Callable

from ..core.lifecycle import ALIVE, IDLE, PAUSED, RUNNING, TERMINAL, THINKING
from ..errors import RequestError
from . import agents, connect, exits, out, show

if TYPE_CHECKING:
    from ..client import AgentClient
    from ..results import AgentInfo
    from ..wire import Json

_LIVE = ALIVE | {IDLE}
#: which agents --all and --label mean
_MEANT = {"pause": frozenset((RUNNING, THINKING)), "resume": frozenset((PAUSED,)), "rm": TERMINAL}
_DONE = {"pause": "paused", "resume": "resumed", "stop": "stopping", "kill": "killing", "restart": "restarting",
         "rm": "removed"}
_ON_THE_WIRE = {"rm": "remove"}
_NO_AGENT = {"pause": "running", "resume": "paused", "rm": "finished"}


def control(given: Namespace) -> int:
    """Give a command to agents; print one line for each; return 1 if any of them failed."""
    waits = getattr(given, "wait", False)
    with (connect.patient if waits else connect.connect)(given) as client:
        refs, names = _refs(client, given)
        if not refs:
            return _nobody(given)
        if waits and given.subcommand == "rm":
            refs = _wait_first(client, given, refs)
        results = _ask(client, given, refs)
        if waits and given.subcommand != "rm":
            _wait_after(client, given, results)
    for ref, result in zip(refs, results):
        _tell(result, connect.label(names[ref]) if ref in names else show.clean(ref), given)
    if given.json:
        out.document({"results": results, "successful": sum(bool(r["success"]) for r in results),
                      "failed": sum(not r["success"] for r in results)})
    return _exit_code(results)


def _refs(client: AgentClient, given: Namespace) -> tuple[list[str], dict[str, AgentInfo]]:
    """Return the agents that are meant, and what is known of those that were listed."""
    selected = connect.chosen(client, given, _MEANT.get(given.subcommand, _LIVE))
    if selected is None:
        return list(dict.fromkeys(given.agents)), {}
    return [info.id for info in selected], {info.id: info for info in selected}


def _nobody(given: Namespace) -> int:
    if given.json:
        out.document({"results": [], "successful": 0, "failed": 0})
    else:
        show.say(f"there is no {_NO_AGENT.get(given.subcommand, 'live')} agent"
                 + (" with this label" if given.label else ""))
    return exits.OK


def _payload(given: Namespace) -> dict[str, Any]:
    if given.subcommand == "signal":
        return {"signal": int(given.signal) if re.fullmatch("[0-9]{1,8}", given.signal) else given.signal}
    payload: dict[str, Any] = {}
    if getattr(given, "grace_secs", None) is not None:
        payload["grace_secs"] = given.grace_secs
    if getattr(given, "force", False):
        payload["force"] = True
    return payload


# ---------------------------------------------------------------- asking

def _ask(client: AgentClient, given: Namespace, refs: list[str]) -> list[Json]:
    """Return what became of each agent, in the form of a batch's results."""
    command = _ON_THE_WIRE.get(given.subcommand, given.subcommand)
    if len(refs) > 1:
        return client.batch(command, refs, **_payload(given)).results
    try:
        reply = client.command(refs[0], command, **_payload(given))
    except RequestError as e:
        return [{"agent_id": refs[0], "success": False, "error": str(e), "error_code": e.code}]
    return [{"agent_id": reply["agent_id"], "success": True, "status": reply.get("status"), "data": reply.get("data")}]


def _wait_first(client: AgentClient, given: Namespace, refs: list[str]) -> list[str]:
    """Wait until the agents have ended; those that are not there are left for the command to complain about."""
    known = []
    for ref in refs:
        try:
            known.append(client.agent(ref).id)
        except RequestError:
            continue
    if known:
        with connect.progress(f"waiting for {show.plural(len(known), 'agent')} to end"):
            client.wait(known, timeout=connect.left(given))
    return refs


def _wait_after(client: AgentClient, given: Namespace, results: list[Json]) -> None:
    """Wait until those that were reached have ended, and add how."""
    begun = [result for result in results if result["success"]]
    if not begun:
        return
    with connect.progress(f"waiting for {show.plural(len(begun), 'agent')} to end"):
        ended = client.wait([result["agent_id"] for result in begun], timeout=connect.left(given))
    for result, info in zip(begun, ended):
        result.update(status=info.status, exit=info.exit.raw if info.exit else None, agent_info=info.raw)


# ---------------------------------------------------------------- telling

def _tell(result: Json, who: str, given: Namespace) -> None:
    if not result["success"]:
        exits.complain(str(result.get("error_code") or "internal"), str(result.get("error") or "it was refused"))
    elif not given.json:
        show.say(f"{who}: {_done(result, given)}")


def _done(result: Json, given: Namespace) -> str:
    from ..results import AgentInfo
    if "agent_info" in result:
        return agents.status(AgentInfo.of(result["agent_info"]))
    data = result.get("data") or {}
    done = _DONE.get(given.subcommand)
    if given.subcommand == "restart":
        done = f"restarting, attempt {data.get('attempt', '?')}"
    elif given.subcommand == "signal":
        done = f"sent {data.get('signal_sent') or given.signal}"
    denied = data.get("not_permitted")
    return str(done) + (
        f", but not to {', '.join(map(str, denied))}: the server is not permitted to signal that" if denied else "")


def _exit_code(results: list[Json]) -> int:
    """Return 0 if all went well, 4 if the only trouble is that agents were not found, else 1 (or what the one says)."""
    codes = {exits.of_code(str(result.get("error_code"))) for result in results if not result["success"]}
    if not codes:
        return exits.OK
    return codes.pop() if len(codes) == 1 else exits.FAILED


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    name: control for name in ("pause", "resume", "stop", "kill", "restart", "rm", "signal")}
