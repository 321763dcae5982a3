"""How an agent ends: the stop ladder, the exit, what is left of its tree, the exit record.

Owns:    the rungs (own way to finish, SIGTERM, SIGKILL) and the order of things at an exit.
Runs in: the core's thread; each rung is started here and finished by a deadline or a SIGCHLD.
Unaware: of requests and of what happens to an agent after its end.

At an exit: reap the leader, take over what the pipes hold, find who is left of the tree, name and
kill them, and only when they are gone record the end. So "ended" means that nothing of it runs.
"""
from __future__ import annotations

import time
from signal import SIGCONT, SIGINT, SIGKILL, SIGTERM
from typing import Callable, Iterable, Iterator, Sequence

from ..errors import RequestError
from ..wire import Json, rfc3339
from . import lifecycle, process, tree
from .agent import Agent
from .family import Family
from .lastwords import LastWords
from .process import Ended
from .reactor import Reactor
from .rounds import each
from .run import Run
from .scheduler import Scheduler, Task
from .tree import Proc

REAPED_MOST = 200  # children that are reaped in one turn
AT_ONCE = 50      # processes of a tree that are killed in one step
CHASES = 5        # looks at what has just come to us, before one at all processes
PAUSE_SECS = 0.01  # between two such steps
AGAIN_SECS = 1.0  # SIGKILL is repeated at this pace while something of a tree is left (D state, fork races)
LEAKED_MOST = 1000  # of a tree that are named in an exit record
WITH_CORE = ("it ended in the moment in which the server's core did, so that the likely cause is the kernel: a program "
             "may ask it for a signal when its parent dies (PR_SET_PDEATHSIG, prctl(2)), as some sandboxes do")
LEFTOVER_SECS = 5.0  # the end is recorded after this time though something unkillable is left
#: why something outlived its agent: it is another user's; it does not end (state D); the setting `orphans` says so
NOT_PERMITTED, UNKILLABLE, LEFT_ALONE = "not_permitted", "unkillable", "left_alone"


class Ending:
    """See the module. `ended(agent, given, record)` gets the input for the table and the exit record;
    `save(agent)` puts what was decided on disk, so that a new core goes on with the ladder where a dead one stood;
    `denied(agent, number, pids)` hears each time who may not be signalled."""

    def __init__(self, reactor: Reactor, scheduler: Scheduler, family: Family, last_words: LastWords,
                 drain_secs: float, finish_secs: float, ended: Callable[[Agent, str, Json], None],
                 save: Callable[[Agent], None], denied: Callable[[Agent, int, list[int]], None],
                 say: Callable[[str], None]) -> None:
        self._reactor, self._scheduler, self._family, self._last_words = reactor, scheduler, family, last_words
        self._ended, self._save, self._denied, self._say = ended, save, denied, say
        self._drain_secs, self._finish_secs = drain_secs, finish_secs
        self._parting: dict[str, Agent] = {}  # leader gone, others of the tree not yet
        self._fresh: set[str] = set()         # those of them from whose pipes nothing was taken over yet
        self._due: dict[str, tuple[Agent, float]] = {}  # those of them that are to be looked at, and since when
        self._task: Task | None = None

    # ------------------------------------------------------------ the ladder

    def decide(self, agent: Agent, reason: str, by: str, grace_secs: float, rung: str = "begin") -> bool:
        """Enter into the record that an attempt is to end, and where on the ladder; return whether that is new.
        The first cause stays the cause; a later, shorter grace still counts. Nothing is sent yet."""
        before = agent.ending
        agent.ending = {**(before or {"reason": reason, "by": by}), "grace_secs": grace_secs}
        if before is None or rung == "kill":
            agent.ending.update(rung=rung, at=self._reactor.clock())
        return before is None

    def begin(self, agent: Agent, first: bool = True) -> None:
        """Start the ladder that was decided: the backend's own way if it has one, else SIGTERM."""
        if not (first and self._asked_its_own_way(agent)):
            self.terminate(agent)
            return
        if agent.status == lifecycle.PAUSED:
            self._family.signal(agent, SIGCONT)
        self._next(agent, "terminate", self._finish_secs)

    def _asked_its_own_way(self, agent: Agent) -> bool:
        """Ask an agent to end as its backend says; return whether there was a way."""
        run = agent.run
        assert run is not None
        if agent.finish == "sigint":
            self._family.signal(agent, SIGINT)
        elif agent.finish == "close_stdin" and run.stdin.open:
            try:
                run.stdin.close()
            except RequestError:  # at a terminal that is an end of file to be typed, and there may be no room for it
                return False
        else:
            return False
        return True

    def _next(self, agent: Agent, rung: str, secs: float) -> None:
        assert agent.ending is not None
        agent.ending = {**agent.ending, "rung": rung, "at": self._reactor.clock() + secs}
        self._save(agent)
        self.go_on(agent)

    def go_on(self, agent: Agent) -> None:
        """Wait for the next rung of a ladder that was begun, by us or by the core before us."""
        run, ending = agent.run, agent.ending
        assert run is not None and ending is not None
        if run.ladder is not None:
            run.ladder.cancel()
        run.ladder = self._reactor.at(ending["at"], lambda: self._climb(agent))

    def _climb(self, agent: Agent) -> None:
        """Do what the rung says. What fails is tried again: nothing else ends the agent."""
        run, ending = agent.run, agent.ending
        if run is None or ending is None or run.ended is not None:
            return
        run.ladder = self._reactor.after(AGAIN_SECS, lambda: self._climb(agent))
        rung = {"begin": self.begin, "terminate": self.terminate}.get(ending["rung"], self.kill)
        failsafe = run.ladder
        rung(agent)
        failsafe.cancel()

    def terminate(self, agent: Agent) -> None:
        """SIGTERM to the tree, at a terminal SIGHUP to whom that does not reach, and SIGKILL after the grace."""
        assert agent.ending is not None
        self._denied(agent, SIGTERM, self._family.signal(agent, SIGTERM))
        if agent.stdin == "pty":
            self._family.hang_up(agent)
        self._family.signal(agent, SIGCONT)  # a stopped process acts on SIGTERM only when it goes on (signal(7))
        now = self._reactor.clock()
        latest = now + agent.ending["grace_secs"]
        kill_at = min(agent.ending.get("kill_at", latest), latest)
        agent.ending = {**agent.ending, "kill_at": kill_at}  # a later stop cannot put the SIGKILL off
        self._next(agent, "kill", kill_at - now)

    def kill(self, agent: Agent) -> None:
        """SIGKILL the whole tree, and again while something of it is left."""
        run = agent.run
        if run is None or run.ended is not None:
            return
        members = self._family.members([agent])[agent.id]
        _note(run, members[:AT_ONCE])
        denied = self._family.signal(agent, SIGKILL, AT_ONCE)
        self._kill_rest(agent, run, members[AT_ONCE:], denied)
        self._next(agent, "kill", AGAIN_SECS)

    def _kill_rest(self, agent: Agent, run: Run, rest: list[Proc], denied: list[int]) -> None:
        """Name and kill the rest of a large tree a little later: hundreds that die at once take all processors, and
        nobody else is served meanwhile."""
        if rest:
            run.killer = self._reactor.after(PAUSE_SECS, lambda: self._kill_some(agent, run, rest, denied))
            return
        run.killer = None
        if run.ended is None:
            self._denied(agent, SIGKILL, denied)

    def _kill_some(self, agent: Agent, run: Run, rest: list[Proc], denied: list[int]) -> None:
        _note(run, rest[:AT_ONCE])
        denied = denied + tree.send_all(rest[:AT_ONCE], SIGKILL)
        self._kill_rest(agent, run, rest[AT_ONCE:], denied)
        if run.killer is None:
            self._look_again_now(agent)

    def name(self, agent: Agent) -> None:
        """Note who is alive beside the leader, while there is still a command line to read."""
        run = agent.run
        assert run is not None
        _note(run, self._family.members([agent])[agent.id])

    # ------------------------------------------------------------ the exit

    @property
    def parting(self) -> bool:
        """Whether somebody's end was seen that is not recorded yet."""
        return bool(self._parting)

    def reap(self) -> None:
        """Collect the children that ended: leaders, orphans that came back to us, and those that work for us."""
        gone: list[Agent] = []
        helped: list[tuple[Callable[[Ended], None], Ended]] = []
        family = self._family
        for pid, code, number in process.ended([*family.leaders, *family.helpers]):
            agent = family.reaped(pid)
            if agent is None or agent.run is None:
                helped.append((family.helped(pid), process.reap(pid)))
            else:
                self._reap_leader(agent, agent.run, pid, code, number)
                gone.append(agent)
            if len(gone) + len(helped) >= REAPED_MOST:  # the rest in the next turn
                self._reactor.soon(self.reap)
                break
        self._all_part(gone)
        for tell, ended in helped:
            self._reactor.guard("the end of a process of ours", tell, ended)

    def _reap_leader(self, agent: Agent, run: Run, pid: int, code: int | None, number: int | None) -> None:
        if not self._family.sees:  # the group's number is ours only until its leader is reaped
            process.send_group(pid, SIGKILL)
        self._reactor.guard("noting an end", self._last_words.note, pid, code, number)
        run.ended = process.reap(pid)

    def departed(self, pid: int, start: int, ended: Ended) -> None:
        """The keeper saw the end of a process that a core before us had started, or of something such a one left."""
        agent = self._family.leaders.get(pid)
        gone = []
        if agent is not None and agent.run is not None and start in (agent.start, 0):
            self._family.reaped(pid)
            agent.run.ended = ended
            gone.append(agent)
        self._all_part(gone)

    def _all_part(self, gone: list[Agent]) -> None:
        """Look at all whose leader is gone: these, and those of whose trees something may have ended now."""
        for agent in gone:
            self._parting[agent.id] = agent
            self._fresh.add(agent.id)
        if self._parting:
            self._family.stale()
            now = self._reactor.clock()
            self._due.update((agent_id, (agent, now)) for agent_id, agent in self._parting.items())
            self._work()

    def _work(self) -> None:
        if self._due and (self._task is None or self._task.done):
            self._task = self._scheduler.add(
                "", each(self._next_due(), self._parts, self._reactor, "the end of an agent"))

    def _next_due(self) -> Iterator[Agent]:
        while self._due:
            agent, since = self._due.pop(next(iter(self._due)))
            self._family.recent(since)
            yield agent

    def _parts(self, agent: Agent) -> None:
        if agent.id in self._fresh:
            self._fresh.discard(agent.id)
            try:
                self._part(agent)
            finally:
                self._look_again(agent)  # whatever goes wrong now: its end is recorded
        if agent.id in self._parting:
            self._clear(agent)

    def _part(self, agent: Agent) -> None:
        """The leader is gone; what it wrote is taken over, what it left is looked for."""
        run = agent.run
        assert run is not None
        for timer in (run.ladder, run.limit):
            if timer is not None:
                timer.cancel()
        run.ladder = self._reactor.after(LEFTOVER_SECS, lambda: self._give_up(agent))
        run.drain()

    def _look_again(self, agent: Agent) -> None:
        """Look again in a moment: those that are not our children yet give no sign of their end."""
        run = agent.run
        if run is not None and agent.id in self._parting:
            if run.limit is not None:
                run.limit.cancel()
            run.limit = self._reactor.after(AGAIN_SECS / 10, lambda: self._look_again_now(agent))

    def _look_again_now(self, agent: Agent) -> None:
        if agent.id in self._parting:
            self._due[agent.id] = (agent, self._reactor.clock())
            self._look_again(agent)
            self._work()

    def _clear(self, agent: Agent) -> None:
        """Kill what is left of a tree; record the end when nothing is."""
        run = agent.run
        assert run is not None
        if run.killer is not None:  # looks again when it is through
            return
        left = []
        if self._family.orphans():
            self._chase(agent, run)
            left = self._left(agent)
        if not left:
            self._finish(agent)
            return
        _note(run, left[:AT_ONCE])
        tree.send_all(left[:AT_ONCE], SIGKILL)
        self._look_again(agent)
        self._kill_rest(agent, run, left[AT_ONCE:], [])

    def _chase(self, agent: Agent, run: Run) -> None:
        """Kill what came to us just now, as long as something does, before a look at all processes takes its time."""
        for _ in range(CHASES):
            come = self._family.come()
            ours = [proc for proc in come if self._family.owner(proc) == agent.id] if len(come) <= AT_ONCE else []
            if not ours:
                return
            _note(run, ours)
            tree.send_all(ours, SIGKILL)

    def _left(self, agent: Agent) -> list[Proc]:
        """Return what lives of a tree whose leader is gone."""
        return self._family.members([agent])[agent.id] + self._family.strays(agent)

    def _give_up(self, agent: Agent) -> None:
        if agent.id in self._parting:
            self._reactor.guard("the end of an agent", self._finish_without, agent)

    def _finish_without(self, agent: Agent) -> None:
        """Record the end of an agent though something of its tree lives on, and who that is."""
        run = agent.run
        assert run is not None
        self._family.stale()
        left = self._left(agent)
        for proc in left:
            command = run.leaked.pop(proc.pid, "") or tree.command_of(proc.pid)
            why = NOT_PERMITTED if tree.send(proc, SIGKILL) == tree.NOT_PERMITTED else UNKILLABLE
            run.survivors.append({"pid": proc.pid, "command": command, "why": why})
        self._family.give_up(left)
        named = ", ".join(f"{one['pid']} ({one['command']}, {one['why']})" for one in run.survivors[:5])
        self._say(f"{agent.label()} has ended, but of its tree something cannot be ended; going on without: {named}")
        self._finish(agent)

    def _finish(self, agent: Agent) -> None:
        run = self._parting.pop(agent.id).run
        assert run is not None
        self._due.pop(agent.id, None)
        for timer in (run.ladder, run.limit, run.killer):
            if timer is not None:
                timer.cancel()
        self._family.remove(agent)
        self._reactor.guard("the last output of an agent", self._let_go, agent)
        self._ended(agent, *verdict(agent, run, self._reactor.clock()))

    def _let_go(self, agent: Agent) -> None:
        run = agent.run
        assert run is not None
        if run.drain():
            self.close(agent)
        else:  # someone else holds the pipe: read on for a moment, then let go
            run.ladder = self._reactor.after(self._drain_secs, lambda: self.close(agent))

    def close(self, agent: Agent) -> None:
        """Let go of the pipes of an attempt that has ended."""
        if agent.run is not None:
            agent.run.close()
            agent.run = None


def _note(run: Run, procs: Iterable[Proc]) -> None:
    for proc in procs:
        if proc.pid not in run.leaked and len(run.leaked) < LEAKED_MOST:
            run.leaked[proc.pid] = tree.command_of(proc.pid)


def verdict(agent: Agent, run: Run, clock: float) -> tuple[str, Json]:
    """Return what the end means for the lifecycle, and the exit record. The cause is who sent what, which we know."""
    ended = run.ended
    assert ended is not None
    number = ended.signal or (ended.code or 0) - 128  # 128+N: how a shell reports, and a program imitates, signal N
    given, reason, by = lifecycle.EXITED_BAD, "exited" if ended.signal is None else "signaled", None
    if agent.ending is not None:
        given, reason, by = lifecycle.ENDED_BY_US, agent.ending["reason"], agent.ending["by"]
    elif str(number) in agent.signalled:
        given, reason, by = lifecycle.ENDED_BY_US, "signaled", agent.signalled[str(number)]
    elif ended.code == 0:
        given = lifecycle.EXITED_OK
    elif ended.code is None and ended.signal is None:  # it ended while nobody who could know was there
        given, reason = lifecycle.LOST, "lost"
    return given, exit_record(reason, by, max(0.0, clock - agent.began), ended,
                              [{"pid": pid, "command": command} for pid, command in run.leaked.items()], run.survivors,
                              WITH_CORE if ended.with_core and reason == "signaled" and by is None else "")


def exit_record(reason: str, by: str | None, duration: float, ended: Ended | None, leaked: Sequence[Json] = (),
                survivors: Sequence[Json] = (), message: str = "") -> Json:
    """Return the exit record of the protocol; `ended` is None when nobody saw the end."""
    number = ended.signal if ended else None
    most = ended.max_rss_bytes if ended else None
    if most is not None and most <= process.own_peak_bytes():
        most = None
    return {"code": ended.code if ended else None,
            "signal": process.signal_name(number) if number else None, "signal_number": number,
            "reason": reason, "by": by, "at": rfc3339(time.time()), "duration": round(duration, 6),
            "rusage": {"cpu_secs": ended.cpu_secs, "max_rss_bytes": most} if ended else {},
            "leaked": list(leaked), "survivors": list(survivors[:LEAKED_MOST]),
            **({"message": message} if message else {})}
