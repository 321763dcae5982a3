"""`send`: write to an agent's stdin.

Owns:    what TEXT and - mean.
Runs in: the main thread of a command.
Unaware: of how a full buffer is waited for (stdin.py).
"""
from __future__ import annotations

import os
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Callable

from . import connect, out, streams
from .exits import UsageError

if TYPE_CHECKING:
    from ..client import Agent


def send(given: Namespace) -> int:
    """Write one line, or all of my stdin; with --eof close the agent's stdin afterwards."""
    if not given.text and not given.eof:
        raise UsageError("`agentserver send`: give the TEXT to send, or - for my stdin, or --eof")
    raw = given.text == ["-"]
    with (connect.patient(given) if raw else connect.connect(given)) as client:
        agent = client.agent(given.agents[0])
        if raw:
            count = _all_of_stdin(agent, given)
        else:
            line = os.fsencode(" ".join(given.text)) + _return(agent) if given.text else b""
            count = agent.write(line, eof=given.eof) if line else 0
        if given.eof and (raw or not given.text):
            agent.close_stdin()
    if given.json:
        out.document({"agent_id": agent.id, "bytes_written": count, "eof": given.eof})
    return 0


def _return(agent: Agent) -> bytes:
    """Return what ends a line: at a terminal the key, from which the terminal makes what the program wants."""
    return b"\r" if agent.info().stdin == "pty" else b"\n"


def _all_of_stdin(agent: Agent, given: Namespace) -> int:
    """Copy descriptor 0 to its end; return how many bytes that were."""
    from .stdin import PIECE, pour
    count = 0

    def wait(secs: float) -> bool:
        time.sleep(secs)
        return False

    with connect.progress(f"sending to agent {agent.id[:8]}"):
        while data := streams.read(PIECE):
            count += pour(agent, data, wait)
    return count


COMMANDS: dict[str, Callable[[Namespace], int]] = {"send": send}
