"""Policy: what is wanted against what is, for every agent.

Owns:    the agents, what each command means for one of them, limits, retention, and the server's own end.
Runs in: the core's thread. Commands start things; ends arrive as events (ending.py).
Unaware: of messages, replies and request ids (control.py), and of sockets (service.py).
"""
from __future__ import annotations

import os
import time
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Callable, Iterable, Iterator, Mapping, Sequence

from ..config import ServerConfig
from ..errors import RequestError
from ..messages import AgentConfig
from ..wire import Json, is_id, new_id, read, rfc3339, to_wire
from . import lifecycle, tree
from .agent import Agent, new_record
from .counters import Counters
from .ending import Ending, exit_record
from .family import Family
from .feed import Feed, Subscriber
from .inherited import Inherited, new_tag
from .lastwords import LastWords
from .losses import Losses
from .names import Names
from .output import OutputLog
from .process import signal_name
from .pushing import Pushing
from .reactor import Reactor
from .registry import Ask, Registry
from .rounds import each
from .run import Run
from .scheduler import Scheduler, Task
from .standstill import Standstill
from .starting import Starting
from .stdin import Stdin
from .takeover import Keeper
from .terminal import Terminal
from .trash import Trash
from .witness import Witness

SERVER = Ask("server")
NAMED_MOST = 100        # processes of one agent that may not be signalled
KILL_MARGIN_SECS = 1.0  # of a shutdown's time is kept for SIGKILL to do its work


class Supervisor:
    """See the module. Everything it needs from outside is an argument."""

    def __init__(self, config: ServerConfig, reactor: Reactor, scheduler: Scheduler, registry: Registry, feed: Feed,
                 pushing: Pushing, counters: Counters, environ: Mapping[str, str], inherited: Inherited, family: Family,
                 last_words: LastWords, witness: Witness, keeper: Keeper, say: Callable[[str], None]) -> None:
        self.config, self.reactor, self.registry, self.counters = config, reactor, registry, counters
        self.scheduler = scheduler
        self.feed, self.pushing = feed, pushing
        self.stdin_limit = config.stdin_buffer_bytes
        self.agents: dict[str, Agent] = {}
        self._names = Names()
        self._finished: dict[str, None] = {}  # ids of finished agents, oldest end first
        self._say, self.boot = say, tree.boot_id()
        self.family, self._keeper = family, keeper
        self.starting = Starting(config, registry, environ, inherited, witness, keeper, self.directory, reactor.clock)
        self.ending = Ending(reactor, scheduler, family, last_words, config.drain_secs, config.finish_secs, self.on_end,
                             self.save, self.not_permitted, say)
        self.standstill = Standstill(reactor, scheduler, family, self.save)
        self._trash = Trash(os.path.join(config.state_dir, "trash"), scheduler, reactor.clock, say)
        self._retaining: Task | None = None
        self._losses = Losses(reactor, feed, self.save, lambda: bool(registry.trouble), say)
        self._after_commit: list[Callable[[], None]] = []
        self.state = "up"  # up, draining, down
        self.ending_all = False  # a graceful end has begun; a drain only waits
        self._on_down: Callable[[], None] = lambda: None

    # ------------------------------------------------------------ who is there

    @property
    def live(self) -> Iterator[Agent]:
        """The agents that have a process."""
        return iter([agent for agent in self.agents.values() if agent.alive])

    @property
    def active(self) -> int:
        """How many agents have a process; `max_agents` bounds this."""
        return len(self.agents) - len(self._finished)

    def find(self, ref: str) -> Agent:
        """Return the agent that a request names: by id, by name (live, else the newest finished), by prefix."""
        agent = self.agents.get(ref)
        if agent is not None:
            return agent
        # what has the form of an id means only that agent, also when it is forgotten; older versions let a name be such
        named = [] if is_id(ref) else self._names.named(ref)
        alive = [agent_id for agent_id in named if agent_id not in self._finished]
        finished = [agent_id for agent_id in named if agent_id in self._finished][-1:]
        found = alive or finished or (self._names.beginning(ref) if len(ref) >= 4 else [])
        if len(found) > 1:
            raise RequestError(f"{ref!r} could be any of {len(found)} agents ({', '.join(found[:5])}); use an id",
                               "ambiguous_agent")
        if found:
            return self.agents[found[0]]
        raise RequestError(f"there is no agent {ref!r}, neither running nor among the finished ones that are kept",
                           "agent_not_found")

    # ------------------------------------------------------------ spawn

    def check_room(self) -> None:
        """Refuse new work when the server is full or ending."""
        if self.state != "up":
            raise RequestError("the server is shutting down and takes no new work", "shutting_down")
        if self.active >= self.config.max_agents:
            raise RequestError(f"{self.active} agents are running and max_agents is {self.config.max_agents}; "
                               "stop one, or raise max_agents", "limit_reached")

    def check_memory(self) -> None:
        """Refuse what has to be remembered when nothing can be."""
        if self.registry.trouble and not self.registry.commit():
            raise self.registry.refusal()

    def spawn(self, config: AgentConfig, metadata: Json, ask: Ask) -> Agent:
        """Start an agent; raise `RequestError`, leaving no trace, when it cannot be started."""
        self.check_room()
        launch = self.starting.plan(config)
        agent_id = new_id()
        limits = config.limits.runtime_secs if config.limits else None
        record = new_record(
            name=config.name, model_backend=config.model_backend, task=config.task, command=launch.argv,
            cwd=os.path.abspath(os.path.join(self.config.agent_dir, config.cwd or "")), stdin=launch.stdin,
            pty=launch.pty,
            grace_secs=self.config.grace_secs if config.grace_secs is None else config.grace_secs,
            runtime_secs=limits or self.config.runtime_secs, labels=config.labels, metadata=metadata,
            created_at=time.time(), boot=self.boot, tag=new_tag())
        agent = Agent(agent_id, self.output(agent_id), {**record, "finish": launch.finish})
        agent.step(lifecycle.START)
        if len(agent.info_json()) > self.config.message_bytes * 9 // 10:
            raise RequestError("what is to be known of this agent would not fit into a reply; give it less metadata",
                               "message_too_large")
        self.registry.add_agent(agent, to_wire(config))
        try:
            self.attend(agent, self.starting.start(agent, launch, ask))
        except BaseException:
            self._erase(agent)
            raise
        self.agents[agent_id] = agent
        self._names.add(agent_id, agent.name)
        self.started(agent)
        return agent

    def enter(self, agents: Iterable[Agent]) -> None:
        """Take in the agents that the registry knows."""
        self.agents = {agent.id: agent for agent in agents}
        self._names = Names((agent.id, agent.name) for agent in self.agents.values())
        for agent in self.agents.values():
            self.registry.know(agent)
        self._trash.finish()
        ended = [agent for agent in self.agents.values() if agent.terminal]
        last = self.registry.last_events()  # in the order of these, whatever the clock was set to
        self._finished = {agent.id: None for agent in sorted(
            ended, key=lambda agent: (last.get(agent.id, 0), agent.finished_at or 0))}

    def admit(self, agent: Agent) -> None:
        """Take in an agent that runs and that the registry does not know."""
        self.agents[agent.id] = agent
        self._names.add(agent.id, agent.name)
        self.registry.add_agent(agent, {})

    def found(self, agent: Agent) -> None:
        """Tell that an agent is listed again."""
        message = f"its record was lost; process {agent.pid} runs, and is listed again"
        self._say(f"{agent.label()}: {message}")
        self.feed.agent_event(agent.id, "error", agent.status, message, {"attempt": agent.attempt, "pid": agent.pid})

    def output(self, agent_id: str) -> OutputLog:
        """Return what is kept of an agent's output."""
        return OutputLog(self.directory(agent_id), self.config.output_cap_bytes)

    def directory(self, agent_id: str) -> str:
        """Return where the files of an agent are."""
        return os.path.join(self.config.state_dir, "agents", agent_id)

    def attend(self, agent: Agent, ends: Mapping[str, int], stdin_file: int = -1) -> None:
        """Watch over a leader that runs, from its start or from where a core before us had to leave it."""
        agent.run = self.run(agent, ends, stdin_file)
        self.family.add(agent)
        if agent.runtime_secs:
            agent.run.limit = self.reactor.at(agent.began + agent.runtime_secs,
                                              lambda: self._limit(agent, "runtime_secs"))

    def run(self, agent: Agent, ends: Mapping[str, int], stdin_file: int) -> Run:
        """Return an attempt by our ends of its pipes, or of its terminal."""
        terminal = Terminal(ends) if "pty" in ends else None
        stdin = Stdin(agent, terminal.typing() if terminal else ends.get("stdin", -1), self, stdin_file)
        return Run(agent.id, ends, terminal, agent.output, stdin, self)

    def started(self, agent: Agent) -> None:
        """Enter and tell that an attempt has begun; without a pid that is all that is known of it."""
        agent.step(lifecycle.STARTED)
        self.save(agent)
        again = f"started again (attempt {agent.attempt})" if agent.attempt > 1 else "started"
        self.feed.agent_event(agent.id, "status_changed", agent.status,
                              f"{again} as process {agent.pid}" if agent.pid else again,
                              {"attempt": agent.attempt, "pid": agent.pid})

    # ------------------------------------------------------------ what may be asked of one agent

    def running(self, agent: Agent, verb: str) -> Run:
        """Return the live run of an agent, or refuse what cannot be done without one."""
        if agent.run is None or not agent.alive or agent.run.ended is not None:
            raise RequestError(f"{agent.label()} is {agent.status} and cannot be {verb}", "invalid_state")
        return agent.run

    def stop(self, agent: Agent, ask: Ask, grace_secs: float | None, reason: str = "stop", want: str = "down") -> None:
        """Begin the stop ladder. The intent is on disk before the first signal, so that nothing can undo it."""
        self.running(agent, "stopped")
        first = self.ending.decide(agent, reason, ask.by, agent.grace_secs if grace_secs is None else grace_secs)
        self._want(agent, want, ask)
        self.ending.begin(agent, first)

    def kill(self, agent: Agent, ask: Ask, reason: str = "kill") -> None:
        """SIGKILL the whole tree."""
        self.running(agent, "killed")
        self.ending.decide(agent, reason, ask.by, 0.0, "kill")
        self._want(agent, "down", ask)
        self.ending.kill(agent)

    def _want(self, agent: Agent, want: str, ask: Ask) -> None:
        agent.want = want
        agent.changed()
        self.save(agent)
        self.registry.begin(ask, agent.id)

    def save(self, agent: Agent) -> None:
        """Put the agent's record on disk with this turn."""
        self.registry.save_agent(agent)

    def restart(self, agent: Agent, ask: Ask, grace_secs: float | None) -> int:
        """Start a new attempt, after ending the one that runs; return its number."""
        if self.state != "up":
            raise RequestError("the server is shutting down and restarts nothing", "shutting_down")
        self._asked(agent)
        if agent.alive:
            self.stop(agent, ask, grace_secs, want="restart")
            return agent.attempt + 1
        self.check_room()
        self.save(agent)
        self.starting.check_disk(agent)
        self._again(agent, ask)
        return agent.attempt

    def _again(self, agent: Agent, ask: Ask) -> None:
        self.ending.close(agent)
        self._keeper.release(agent.id, [])
        agent.step(lifecycle.RESTART)
        self._finished.pop(agent.id, None)
        agent.attempt, agent.want, agent.exit, agent.finished_at = agent.attempt + 1, "up", None, None
        agent.boot, agent.tag = self.boot, new_tag()
        agent.forget_attempt()
        self.start_again(agent, ask)

    def start_again(self, agent: Agent, ask: Ask) -> None:
        """Start an attempt of an agent that is known; if it cannot be, the record says so, and `RequestError`."""
        try:
            launch = self.starting.plan(self._asked(agent))
            agent.command, agent.stdin = launch.argv, launch.stdin
            agent.pty = launch.pty and (agent.pty or launch.pty)  # it keeps the size that somebody gave it
            self.save(agent)
            self.attend(agent, self.starting.start(agent, launch, ask))
        except RequestError as e:
            self.on_end(agent, lifecycle.NOT_STARTED,
                        exit_record("not_started", None, 0.0, None, message=str(e)), str(e))
            raise
        self.started(agent)

    def _asked(self, agent: Agent) -> AgentConfig:
        """Return what an agent was spawned with, or refuse what needs that when it was lost."""
        spec = self.registry.spec(agent.id)
        if not spec:
            raise RequestError(f"what {agent.label()} was spawned with was lost with its record; spawn another one",
                               "invalid_state")
        return read(AgentConfig, spec, "config")

    def pause(self, agent: Agent, ask: Ask) -> None:
        """SIGSTOP the whole tree. What of it stood still before is on disk before the first signal."""
        self.running(agent, "paused")
        if agent.ending is not None or agent.status == lifecycle.PAUSED:
            what = "being stopped" if agent.ending is not None else "paused already"
            raise RequestError(f"{agent.label()} is {what}", "invalid_state")
        self._check_permitted(agent)
        agent.still = self.standstill.before(agent)
        agent.step(lifecycle.PAUSE)
        agent.paused_at, agent.pause_mode = time.time(), "forced"
        self._changed(agent, "paused: the whole tree gets SIGSTOP")
        self.registry.begin(ask, agent.id)
        self.standstill.begin(agent)

    def resume(self, agent: Agent) -> None:
        """SIGCONT the whole tree, but what stood still before it was paused."""
        self.running(agent, "resumed")
        if agent.status != lifecycle.PAUSED:
            raise RequestError(f"{agent.label()} is {agent.status}, not paused", "invalid_state")
        self._check_permitted(agent)
        self.not_permitted(agent, SIGCONT, self.family.go_on(agent, agent.still))
        agent.step(lifecycle.RESUME)
        self._not_paused(agent)
        self._changed(agent, "resumed: what the pause had stopped got SIGCONT")

    def _not_paused(self, agent: Agent) -> None:
        agent.paused_at = agent.pause_mode = None
        agent.still = {}

    def signal(self, agent: Agent, number: int, ask: Ask) -> None:
        """Signal the whole tree. Stopping and continuing are pause and resume, so that the status stays true."""
        self.running(agent, "signalled")
        if number == SIGSTOP and agent.status != lifecycle.PAUSED and agent.ending is None:
            self.pause(agent, ask)
        elif number == SIGCONT and agent.status == lifecycle.PAUSED:
            self.resume(agent)
        else:
            self._check_permitted(agent)
            agent.signalled = {**agent.signalled, str(number): ask.by}
            self.save(agent)
            self.registry.begin(ask, agent.id)
            if number == SIGKILL:
                self.ending.name(agent)
            self.not_permitted(agent, number, self.family.signal(agent, number))

    def _check_permitted(self, agent: Agent) -> None:
        """Refuse to signal a tree whose leader we may not signal."""
        if not self.family.may_signal(agent):
            raise RequestError(f"{agent.label()} runs as another user by now (process {agent.pid}), and the server is "
                               "not permitted to signal it; signal it as that user, or as root", "not_permitted")

    def not_permitted(self, agent: Agent, number: int, pids: Sequence[int]) -> None:
        """Enter into the record who of a tree may not be signalled, and tell it once."""
        before = {one["pid"] for one in agent.not_permitted}
        if before == set(pids):
            return
        name = signal_name(number)
        agent.not_permitted = [{"pid": pid, "command": tree.command_of(pid), "signal": name}
                               for pid in pids[:NAMED_MOST]]
        agent.changed()
        self.save(agent)
        if before < set(pids):
            named = ", ".join(f"{one['pid']} ({one['command']})" for one in agent.not_permitted[:5])
            self.feed.agent_event(agent.id, "error", agent.status, f"{name} was not sent to {named}: the server is not "
                                  "permitted to signal what runs as another user",
                                  {"not_permitted": agent.not_permitted})

    def resize(self, agent: Agent, rows: int, cols: int) -> None:
        """Give an agent's terminal another size, and to its next attempt's too; the kernel sends it SIGWINCH."""
        if agent.stdin != "pty":
            raise RequestError(f"{agent.label()} does not run on a terminal (stdin is {agent.stdin}); spawn it with "
                               "stdin=pty", "invalid_state")
        terminal = self.running(agent, "resized").terminal
        if terminal is None or not terminal.resize(rows, cols):
            raise RequestError(f"the terminal of {agent.label()} is gone", "invalid_state")
        size = {"rows": rows, "cols": cols}
        if size != agent.pty:
            agent.pty = size
            agent.changed()
            self._changed(agent, f"its terminal has {rows} rows and {cols} columns now", {"pty": size})

    def _changed(self, agent: Agent, message: str, data: Json | None = None) -> None:
        self.save(agent)
        self.feed.agent_event(agent.id, "status_changed", agent.status, message, data)

    def remove(self, agent: Agent) -> None:
        """Forget a finished agent and its output."""
        if agent.alive:
            raise RequestError(f"{agent.label()} is {agent.status}; stop it before it is removed", "invalid_state")
        self._forget(agent)

    def _forget(self, agent: Agent) -> None:
        self.ending.close(agent)
        self._losses.forget(agent)
        del self.agents[agent.id]
        self._names.remove(agent.id, agent.name)
        self._finished.pop(agent.id, None)
        self._erase(agent)

    def _erase(self, agent: Agent) -> None:
        agent.output.close()
        self.registry.remove_agent(agent.id)
        self.after_commit(lambda: self._trash.throw(self.directory(agent.id)))

    # ------------------------------------------------------------ what happens to them

    def hold(self, agent_id: str, name: str, fd: int) -> None:
        """Give the keeper a copy of a descriptor."""
        self._keeper.hold(agent_id, {name: fd})

    def after_commit(self, call: Callable[[], None]) -> None:
        """Call back when this turn is on disk and the keeper has what it was given."""
        self._after_commit.append(call)

    def committed(self) -> None:
        """Do what had to wait for the disk; the service calls it after each commit that went well."""
        if self._after_commit and self._keeper.has_everything:
            calls, self._after_commit = self._after_commit, []
            for call in calls:
                self.reactor.guard("what had to wait for the disk", call)

    def release(self, agent_id: str, names: list[str]) -> None:
        """Tell the keeper what it need not hold any longer."""
        self._keeper.release(agent_id, names)

    def _limit(self, agent: Agent, which: str) -> None:
        run = agent.run
        if run is not None and run.ended is None and agent.alive and agent.ending is None:
            run.limit = self.reactor.after(1.0, lambda: self._limit(agent, which))  # if what follows fails
            self.feed.agent_event(agent.id, "status_changed", agent.status, f"{which} is reached, so it is ended",
                                  {"limit": which})
            self.stop(agent, SERVER, None, f"limit:{which}")

    def stdin_ended(self, agent_id: str, why: str) -> None:
        """Tell that an agent's stdin was closed."""
        agent = self.agents.get(agent_id)
        if agent is not None:
            self.feed.agent_event(agent_id, "status_changed", agent.status, why, {"stdin": "closed"})

    def output_lost(self, agent_id: str) -> None:
        """Tell that output was dropped, or could not be recorded."""
        self._losses.look(self.agents[agent_id])

    def on_end(self, agent: Agent, given: str, record: Json, why: str = "") -> None:
        """An attempt is over and nothing of it runs: record it, tell it, and do what is wanted next."""
        again = agent.want == "restart" and self.state == "up"
        agent.step(given)
        agent.exit, agent.finished_at, agent.pid = record, time.time(), None
        self._not_paused(agent)
        agent.not_permitted = []
        if agent.want == "restart":
            agent.want = "down"
        self._finished[agent.id] = None
        self.registry.save_attempt(agent.id, agent.attempt, {
            "attempt": agent.attempt, "started_at": rfc3339(agent.started_at) if agent.started_at else None,
            "exit": record})
        self.save(agent)
        kind = {lifecycle.COMPLETED: "completed", lifecycle.TERMINATED: "terminated"}.get(agent.status, "error")
        self.feed.agent_event(agent.id, kind, agent.status, why or summary(record), {"exit": record})
        if again:
            try:
                self._again(agent, SERVER)
            except RequestError as e:
                self._say(f"{agent.label()} could not be restarted: {e}")
        self.after_commit(lambda: self._forget_held(agent))
        self.reactor.guard("retention", self.retain)
        self._maybe_down()

    def _forget_held(self, agent: Agent) -> None:
        """Its end is on disk: the keeper need not know of it any longer."""
        if not agent.alive:
            self._keeper.release(agent.id, [])

    # ------------------------------------------------------------ over time

    def let_go(self) -> dict[str, dict[str, int]]:
        """Close our ends of everything; a successor has copies of them. Return such copies as it was handed."""
        kept = {}
        for agent in self.agents.values():
            if agent.run is not None:
                kept[agent.id] = {name: os.dup(fd) for name, fd in agent.run.descriptors().items() if fd >= 0}
                agent.run.let_go()
        return kept

    def hold_again(self, agent_ids: Iterable[str]) -> None:
        """Give the keeper copies of everything of some agents: a new one has nothing, and one may have had no room."""
        for agent_id in agent_ids:
            agent = self.agents.get(agent_id)
            if agent is not None and agent.run is not None:
                self._keeper.hold(agent.id, agent.run.descriptors())
                if agent.run.ended is None and agent.pid is not None:
                    self._keeper.hold_pid(agent.id, agent.pid, agent.start)

    def retain(self) -> None:
        """Forget the oldest finished agents past `history_agents` or `history_secs`."""
        if self._retaining is None or self._retaining.done:
            self._retaining = self._each(self._too_old(), self._forget, "the removal of an agent")

    def _too_old(self) -> Iterator[Agent]:
        """Yield the oldest finished agent for as long as it is one too many; whoever asks forgets it."""
        before = ""
        while self._finished and (oldest := next(iter(self._finished))) != before:
            agent, before = self.agents[oldest], oldest
            kept = (agent.finished_at or 0) >= self.registry.age_time() - self.config.history_secs
            if kept and len(self._finished) <= self.config.history_agents:
                return
            yield agent

    def _each(self, agents: Iterable[Agent], deed: Callable[[Agent], object], what: str) -> Task:
        """Do something to many agents, while others are served."""
        return self.scheduler.add("", each(agents, deed, self.reactor, what))

    def heartbeat(self) -> None:
        """Tell listeners who is there, and whose output has grown; also of the ended, where somebody asked for one."""
        self.retain()
        self.pushing.tidy()
        if not self.feed.anyone:
            return
        self.greet()
        followed = (self.agents.get(topic[7:]) for topic in self.feed.topics if topic.startswith("status."))
        ended = [agent for agent in followed if agent is not None and not agent.alive]
        self._each([*self.live, *ended], self.beat, "the heartbeat of an agent")

    def beat(self, agent: Agent, only: Subscriber | None = None) -> None:
        """Tell listeners, or a new one, how an agent is and where its output stands."""
        kept = agent.kept()
        size = sum(span["end_offset"] for span in kept.values())
        kind = "heartbeat" if only is not None or size == agent.reported else "output_available"
        self.feed.heartbeat(agent.id, kind, agent.status, kept, only)
        if only is None:
            agent.reported = size

    def greet(self, only: Subscriber | None = None) -> None:
        """Tell listeners, or a new one, that the server is there and which event is the latest."""
        self.feed.server_heartbeat(self.state, self.active, only)

    # ------------------------------------------------------------ the server's own end

    def announce(self, state: str) -> None:
        """Enter a state of the server and tell it."""
        self.state = state
        self.feed.server_event(state, self.active)

    def shutdown(self, mode: str, grace_secs: float | None, ask: Ask, done: Callable[[], None]) -> None:
        """Take no more work; end all agents in bounded time, or (drain) wait for them. Asked again, it hurries."""
        self._on_down = done
        if self.state == "up":
            self.announce("draining")
        if mode == "drain":
            self._maybe_down()
            return
        self.ending_all = True
        bound, began = max(0.0, self.config.shutdown_timeout_secs - KILL_MARGIN_SECS), self.reactor.clock()

        def stop(agent: Agent) -> None:
            self.family.recent(began)
            if agent.alive and agent.run is not None and agent.run.ended is None:
                grace = agent.grace_secs if grace_secs is None else grace_secs
                self.stop(agent, ask, min(grace, bound), reason="shutdown")
        self._each(self.live, stop, "stopping an agent")
        self.reactor.after(bound, self.hurry)
        self.reactor.after(self.config.shutdown_timeout_secs, self._down)
        self._maybe_down()

    def hurry(self) -> None:
        """SIGKILL whatever still runs."""
        began = self.reactor.clock()

        def kill(agent: Agent) -> None:
            self.family.recent(began)
            if agent.alive and agent.run is not None and agent.run.ended is None:
                self.kill(agent, SERVER, "shutdown")
        self._each(self.live, kill, "killing an agent")

    def _maybe_down(self) -> None:
        if self.state == "draining" and not self.active:
            self._down()

    def _down(self) -> None:
        if self.state != "down":
            for agent in self.live:
                self._say(f"{agent.label()} could not be ended in time")
            self._kill_leftovers()
            self.announce("down")
            self._on_down()

    def _kill_leftovers(self) -> None:
        """Leave nothing that agents have left; what forks faster than it is found is looked for again."""
        until = self.reactor.clock() + KILL_MARGIN_SECS
        left = self.family.everyone()
        for proc in left:
            self._say(f"process {proc.pid}, left by an agent that has ended, is killed")
        while (left or self.family.come()) and self.reactor.clock() < until:
            while (come := self.family.come()) and self.reactor.clock() < until:
                tree.send_all(come, SIGKILL)
            stuck = {(proc.pid, proc.start) for proc in tree.end(left, KILL_MARGIN_SECS / 4)}
            left = [proc for proc in self.family.everyone() if (proc.pid, proc.start) not in stuck]
        for proc in self.family.everyone():
            self._say(f"process {proc.pid} runs on: it cannot be killed, or the server is not permitted to")


def summary(record: Json) -> str:
    """Return an exit record in a few words."""
    how = f"exit code {record['code']}" if record["code"] is not None else record["signal"] or "unknown end"
    by = f" by {record['by']}" if record["by"] else ""
    left = f"; {len(record['leaked'])} process(es) of its tree had to be killed" if record["leaked"] else ""
    on = f"; {len(record['survivors'])} process(es) of its tree could not be ended" if record["survivors"] else ""
    return f"{record['reason']}{by}: {how}{left}{on}"
