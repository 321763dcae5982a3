"""`run`: an agent as if it were a program here: its output, my stdin, my Ctrl-C, its exit code.

Owns:    the three of them at once, and what happens when the server goes away meanwhile.
Runs in: the main thread follows the output; one thread carries stdin, one what Ctrl-C asks for.
Unaware: of how output is pushed and gaps are filled (follow.py).
"""
from __future__ import annotations

import signal
import threading
import time
from argparse import Namespace
from types import FrameType
from typing import TYPE_CHECKING, Any, Callable, Union

from ..errors import AgentServerError, LinkError, RequestTimeout
from ..results import AgentInfo, Chunk, OutputDropped
from . import connect, exits, out, pieces, show, spawn

if TYPE_CHECKING:
    from ..client import AgentClient

Shown = Callable[[str, Union[Chunk, OutputDropped]], None]  # called with a stream and what of it is next

_STEPS = (("SIGINT", "sent SIGINT to the agent; Ctrl-C again stops it"),
          ("stop", "stopping the agent; Ctrl-C again kills it"),
          ("kill", "killing the agent"))


def run(given: Namespace) -> int:
    """Spawn an agent and stay with it until it has ended; return its exit code."""
    spawn.check(given)
    if given.detach:
        return spawn.spawn(given)
    if given.terminal:
        from .attach import run_attached
        return run_attached(given)
    with connect.patient(given) as client, _Interrupts() as interrupts:
        limit = connect.deadline(given)
        agent = spawn.start(client, given)
        info = agent.info()
        if given.json:
            out.document({"type": "spawned", "agent_info": info.raw})
        interrupts.aim(lambda: connect.again(client, given), agent.id)
        try:
            ended = _accompany(client, given, info, limit)
        except RequestTimeout as e:
            raise RequestTimeout(f"{e}; the agent goes on as {agent.id}") from None
        except LinkError as e:
            raise LinkError(f"the server went away while the agent {agent.id} ran: {e}; when it is back, `agentserver "
                            f"why {agent.id[:8]}` tells what became of the agent", e.code, e.reply) from None
        except BrokenPipeError:
            if show.is_terminal(2):
                exits.note(f"nobody reads the output any more; the agent goes on as {agent.id}, until "
                           f"it ends or: agentserver kill {agent.id[:8]}")
            raise
    if given.json:
        out.document({"type": "ended", "agent_info": ended.raw})
    if interrupts.count and ended.exit and ended.exit.signal:
        raise exits.Signalled(signal.SIGINT)  # as if it had been this program that Ctrl-C has ended
    tell_end(ended)
    return ended.exit.returncode if ended.exit else exits.FAILED


def _accompany(client: AgentClient, given: Namespace, info: AgentInfo, limit: float | None) -> AgentInfo:
    """Show the output while stdin goes the other way; return the agent when it has ended."""
    pump = None
    if info.stdin != "null":
        from .stdin import Pump, ignore_background_reads
        ignore_background_reads()
        pump = Pump(lambda: connect.again(client, given), info.id)
        pump.start()
    try:
        write = pieces.write_json if given.json else pieces.write_raw
        return to_the_end(client, info.id, limit, lambda stream, what: write(pieces.followed(info.id, stream, what)))
    finally:
        if pump is not None:
            pump.stop()


def to_the_end(client: AgentClient, agent_id: str, limit: float | None, shown: Shown, since: int = 0) -> AgentInfo:
    """Show all output (stdout from `since` on), also of another attempt if somebody restarts the agent meanwhile.

    Returns the agent when it has ended.
    """
    reached = {"stdout": since, "stderr": 0}
    while True:
        for _, stream, what in client.follow([agent_id], since=reached, timeout=_left(limit)):
            reached[stream] = what.next_offset
            shown(stream, what)
        ended = client.wait([agent_id], timeout=_left(limit))[0]
        if ended.finished and all(span.end_offset <= reached.get(name, 0) for name, span in ended.output.items()):
            return ended


def _left(limit: float | None) -> float | None:
    return None if limit is None else max(limit - time.monotonic(), 0.001)


def tell_end(info: AgentInfo) -> None:
    """Say why it ended where the exit code alone would mislead; on a terminal, wherever somebody ended it."""
    record = info.exit
    odd = record is None or record.reason in ("lost", "not_started") or record.reason.startswith("limit:")
    if odd or (record and record.reason != "exited" and show.is_terminal(2)):
        from .reasons import sentences
        exits.note(f"{connect.label(info)}: {sentences(info, time.time())[0]}")


class _Interrupts:
    """Ctrl-C: first SIGINT to the agent, then stop, then kill. Before there is an agent, it just ends us."""

    def __init__(self) -> None:
        from queue import SimpleQueue
        self._asked: SimpleQueue[bool] = SimpleQueue()  # put() may be called from a signal handler
        self._before: Any = None
        self._thread: threading.Thread | None = None
        #: how often it was pressed
        self.count = 0

    def __enter__(self) -> _Interrupts:
        return self

    def aim(self, connect_again: Callable[[], AgentClient], agent_id: str) -> None:
        """From now on Ctrl-C is for this agent."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return  # whoever started us in the background wants it to have no effect
        self._thread = threading.Thread(target=self._serve, args=(connect_again, agent_id), name="ctrl-c", daemon=True)
        self._thread.start()
        self._before = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            signal.signal(signal.SIGINT, self._before)
            self._asked.put(False)
            self._thread.join(2.0)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._asked.put(True)

    def _serve(self, connect_again: Callable[[], AgentClient], agent_id: str) -> None:
        """Carry out what each Ctrl-C means; that it came too late is no error."""
        count = 0
        while self._asked.get():
            step, sentence = _STEPS[min(count, 2)]
            count += 1
            if show.is_terminal(2):
                exits.note(sentence)
            try:
                with connect_again() as client:
                    if step == "SIGINT":
                        client.control(agent_id, "signal", signal="SIGINT")
                    else:
                        client.control(agent_id, step)
            except AgentServerError as e:
                if e.code not in ("invalid_state", "agent_not_found"):
                    exits.complain(e.code, str(e))


COMMANDS: dict[str, Callable[[Namespace], int]] = {"run": run}
