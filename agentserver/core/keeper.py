"""The keeper: start core and shell, start them again when they die, end them in order.

Owns:    `keeper.lock`, the channels to core and shell, the pace of starting them again, and copies of what
         a new core needs to go on where a dead one stopped: agents' descriptors, and ends it reaped.
Runs in: `agentserver serve` itself, or a detached process when `AgentServer` is embedded.
Unaware: of requests, agents and output. It parses nothing from outside and has no policy; that is
         why it does not die. It is the child subreaper: what a dead core leaves comes back here.

The core is done when it exits with 0, whoever asked it to; anything else is a crash. Agents live on
through it: they become our children, their output waits in the pipes whose ends we hold, and the new
core is handed everything before it begins.
"""
from __future__ import annotations

import os
import select
import signal
import socket
import time
from typing import Callable

from ..config import ServerConfig
from ..errors import StartError
from . import leftovers, privacy, process, tree
from .channel import Json, readable
from .finding import find
from .held import Held
from .log import Log
from .notify import Notify, stored
from .oversight import Oversight
from .part import Part
from .renew import Renewal, become

WORDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what a person or a service manager says to us
PART_STOP_SECS = 5.0         # for a part to leave when told, before it is killed
RELOAD_SECS = 60.0           # for a successor to serve, before it is killed and the core before it goes on


class Keeper:
    """See the module. `on_ready` gets the sentence that says where the server listens."""

    def __init__(self, config: ServerConfig, with_shell: bool, on_ready: Callable[[str], None], lock: int,
                 log: str) -> None:
        self._config, self._on_ready, self._lock, self._log = config, on_ready, lock, log
        self._say = Log(log or None, config.log_bytes)
        self._renewal, self._reload_asked = Renewal(self._say), False
        self._started_at, self._generation = time.time(), 1
        self._core_bytes = privacy.shield()
        self._nofile = process.raise_descriptor_limit()[0]
        self._notify = Notify(os.environ)
        self._held = Held(self._notify, stored(os.environ))
        self._core = Part("core", config)
        self._shell = Part("shell", config) if with_shell else None
        self._next: Part | None = None     # a successor of the core, while a reload is under way
        self._why = ""                     # it failed, the last time that one did
        self._before: Part | None = None   # the core that a successor has replaced, until it has left
        self._oversight = Oversight(self._held, lock, config.state_dir, self._say, self._news)
        self._announced = False
        self._serves = False    # the server has been up, perhaps before us: whatever we cannot do, its agents live on
        self._stopping = 0.0    # monotonic time by which the core has to be gone
        self._last_core = False  # while we stop, one more core is started to end what a dead one left
        self._wake, wake_out = socket.socketpair()
        self._wake.setblocking(False)
        wake_out.setblocking(False)
        self._wake_out = wake_out
        for number in (signal.SIGCHLD, *WORDS):
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)
        signal.set_wakeup_fd(wake_out.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # who started us, we ourselves perhaps, may have blocked them

    @property
    def _parts(self) -> list[Part]:
        return [self._core] if self._shell is None else [self._core, self._shell]

    @property
    def _everyone(self) -> list[Part]:
        return [*self._parts, *(part for part in (self._next, self._before) if part is not None)]

    @property
    def _cores(self) -> list[Part]:
        """Return those that are agents' parents: not one that only stands by."""
        return [self._core] + ([self._before] if self._before is not None else [])

    def run(self) -> int:
        """Serve until the core is done; return the exit code. Raise `StartError` if the server cannot start at all."""
        try:
            if not self._core.pid:
                self._adopt()
            code = self._look_after()
        except Exception:
            if not (self._serves and self._core.pid):  # else it goes on without us, for another keeper to find
                self._end_all()
            raise
        else:
            self._notify.stopping()
            return code if self._end_all() else 1
        finally:
            self._notify.close()
            signal.set_wakeup_fd(-1)
            self._wake.close()
            self._wake_out.close()

    def _look_after(self) -> int:
        while True:
            self._again()
            self._reload()
            self._renew()
            self._wait()
            code = self._reap()
            if code is not None:
                return code
            self._reaped()
            self._announce()

    # ------------------------------------------------------------ starting

    def _adopt(self) -> None:
        """If a core is there that lost its keeper, be its keeper. It gives us copies of all it holds."""
        found = find(self._config.state_dir, self._wake)
        if found is None:
            return
        word = found.word
        self._core.adopt(found.channel, word)
        self._held.drop()
        self._serves = True
        self._notify.ready()  # not when the shell is: what it waits for, the manager may not wait for
        self._started_at, self._generation = float(word["started_at"]), int(word["generation"])
        if self._shell is not None:
            self._shell.endpoints = {k: v for k, v in word["shell"].items() if k.endswith("endpoint")}
        self._hear(self._core, found.words)

    def _hello(self, **more: object) -> Json:
        return {"config": self._config.to_json(), "started_at": self._started_at, "generation": self._generation,
                "keeper_pid": os.getpid(), "nofile": self._nofile, "core_bytes": self._core_bytes,
                "holds_listeners": True, "parts": self._oversight.told, **more}

    def _news(self, part: Part) -> Json:
        """Return what the core is told together with a question whether it answers: what it may not look up itself."""
        if part is not self._core:
            return {}
        shell = self._shell.open_descriptors if self._shell is not None else 0
        return {"open": {"keeper": privacy.open_descriptors(), "shell": shell}}

    def _start(self, part: Part) -> None:
        part.start(self._hello(**part.endpoints))
        if part is self._shell:
            process.bound(part.pid, self._config.shell_memory_bytes)
        if part is self._core:
            self._hand_over(part)
            if self._stopping:
                self._stopping = time.monotonic() + self._config.shutdown_timeout_secs + PART_STOP_SECS

    def _hand_over(self, core: Part) -> None:
        """Give a core what it is to go on with; and if the server is being ended, that word too."""
        assert core.channel is not None
        self._held.hand_over(core.channel)
        if self._stopping:
            core.stop()

    def _missing(self) -> list[Part]:
        """Return the parts that are to be started (again) when their time has come."""
        return [part for part in self._parts if not part.pid
                and not (part is self._core and self._next is not None)  # it is succeeded
                and not (part is self._shell and self._stopping > 0)]

    def _again(self) -> None:
        for part in self._missing():
            if time.monotonic() >= part.again_at:
                try:
                    self._start(part)
                except OSError as e:  # no memory, or Python itself is being replaced: nothing to end the others for
                    part.dead()
                    if self._stopping and part is self._core:
                        raise StartError(f"the {part.name} cannot be started to end what a dead one left: {e}") from e
                    if not self._serves:
                        raise StartError(f"the {part.name} cannot be started: {e}") from None
                    self._say(f"the {part.name} cannot be started: {e}; trying again")

    def _announce(self) -> None:
        """Say once where the server listens."""
        if self._announced or not all(part.pid and part.ready for part in self._parts):
            return
        self._announced = self._serves = True
        self._notify.ready()
        self._on_ready(self._where())

    def _where(self) -> str:
        from .. import __version__
        where = [f"unix:{os.path.join(self._config.state_dir, 'core.sock')}"]
        if self._shell is not None:
            where.insert(0, self._shell.ready["endpoint"])
            if self._shell.ready.get("pub_endpoint"):
                where.insert(1, f"publishing on {self._shell.ready['pub_endpoint']}")
        return f"agentserver {__version__} is ready: " + ", ".join(where)

    # ------------------------------------------------------------ waiting

    def _wait(self) -> None:
        """Sleep until a part speaks or dies, a signal comes, or it is time to start one again."""
        due = [part.again_at for part in self._missing()] + self._notify.due
        due += [self._stopping] if self._stopping else []
        due += [self._next.began + RELOAD_SECS] if self._next is not None and self._next.pid else []
        due += self._renewal.due + self._oversight.due(self._watched)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        channels = {part.channel.fileno(): part for part in self._everyone if part.channel is not None}
        for fd, part in channels.items():
            assert part.channel is not None
            poll.register(fd, select.POLLIN | (select.POLLOUT if part.channel.unsent else 0))
        for fd, _mask in poll.poll(max(0.0, min(due) - time.monotonic()) * 1000 if due else None):
            if fd in channels:
                self._listen_to(channels[fd])
            else:
                self._on_signals(self._wake.recv(4096))
        self._notify.work()
        self._oversight.work(self._core, self._watched)
        self._kill_overdue(time.monotonic())

    @property
    def _watched(self) -> list[Part]:
        """Return the parts that have to answer. A shell waits for its core before it serves, and is not needed at the
        server's end."""
        shell = [self._shell] if self._shell is not None and self._core.ready and not self._stopping else []
        before = [self._before] if self._before is not None else []
        return [part for part in (self._core, *before, *shell)
                if part.channel is not None and (part.answers or part.starts or part.leaves)]

    def _kill_overdue(self, now: float) -> None:
        """End the cores that had to be gone, or to serve, by now; their ends come as SIGCHLD."""
        if self._stopping and now >= self._stopping:
            for part in (self._core, self._next):
                if part is not None and part.pid:
                    self._say("the core did not end in time and is killed")
                    process.send(part.pid, signal.SIGKILL)
            self._stopping = now + PART_STOP_SECS
        elif self._next is not None and self._next.pid and now >= self._next.began + RELOAD_SECS:
            self._next.failed = f"the new core did not serve after {RELOAD_SECS:g} s"
            process.send(self._next.pid, signal.SIGKILL)
        self._renewal.end_late(now)

    def _listen_to(self, part: Part) -> None:
        """Take what a part says, to the last word: a dead core's descriptors are still in the socket."""
        channel = part.channel
        assert channel is not None
        channel.flush()
        self._hear(part, channel.receive())

    def _hear(self, part: Part, words: list[Json | None]) -> None:
        for word in words:
            if word is None:  # it is dying; its end comes as SIGCHLD
                if part.channel is not None:
                    part.channel.close()
                part.channel = None
                return
            part.hear(word)
            self._held.hear(word)
            self._succeed(part, word)

    # ------------------------------------------------------------ reload

    def _reload(self) -> None:
        """If a reload was asked for and none is under way, start a successor beside the core. Until it serves, the
        core before it stays ready to go on."""
        idle = self._next is None and self._before is None and self._core.pid and self._core.ready
        if self._reload_asked and idle and not self._stopping:
            self._reload_asked = False
            self._notify.reloading()
            self._next = Part("core", self._config)
            try:
                self._next.start(self._hello(standby=True, generation=self._generation + 1))
            except OSError as e:  # as in `_again`
                self._not_succeeded(f"the new core cannot be started: {e}")

    def _succeed(self, part: Part, word: Json) -> None:
        """One step of a reload: stand by, yield, hand over, serve, leave."""
        core, following = self._core, self._next
        if word.get("reload"):
            self._reload_asked = True
        elif "standby" in word and part is following and core.channel is not None:
            core.channel.send({"yield": True})
        elif "yielded" in word and part is core:
            core.yielded = True
            if following is None:  # it has failed meanwhile
                self._go_on()
            elif following.channel is not None:
                self._hand_over(following)
        elif "ready" in word and part is following:
            self._core, self._next, self._before = following, None, core if core.pid else None
            self._generation += 1
            self._renewal.ask()
            self._notify.ready()
            if core.channel is not None:
                core.leave()
                core.channel.send({"leave": True})
            if self._shell is not None:
                self._shell.stop(again=True)  # it is started again with the new code, on the same endpoints

    def _renew(self) -> None:
        """After a reload: if our own code has changed too, become it, in place; the parts need not notice."""
        parts = [part for part in self._everyone if part.pid]
        quiet = self._notify.quiet and self._next is None and self._before is None and all(
            part.channel is not None and part.ready and part.channel.quiet for part in parts)
        if not quiet or self._stopping or len(parts) != len(self._parts):
            return
        try:
            found = self._renewal.step()
            if found is not None:
                self._become(found)
        except OSError as e:
            self._renewal.stay(str(e))

    def _become(self, found: tuple[int, ...]) -> None:
        """Become our newer version, unless something has been said that we have not acted on: then a little later."""
        signal.pthread_sigmask(signal.SIG_BLOCK, WORDS)  # what comes from now on waits for the new one of us
        try:
            if self._word_waits():  # first what has come already
                self._renewal.ask()
            else:
                self._execute(found)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _execute(self, found: tuple[int, ...]) -> None:
        held, ends = self._held.state()
        state = {"state_dir": self._config.state_dir, "config": self._config.to_json(), "lock": self._lock,
                 "log": self._log, "started_at": self._started_at, "generation": self._generation,
                 "nofile": self._nofile, "core_bytes": self._core_bytes, "core": self._core.state(), "held": held,
                 "ends": ends, "stamp": found, "told": self._oversight.told,
                 "shell": self._shell.state() if self._shell is not None else None}
        fds = [fd for names in held.values() for fd in names.values()]
        fds += [fd for part in self._parts for fd in part.descriptors]
        with self._notify.carried(os.environ):
            become([*process.program(), "_renewed"], state, [self._lock, *fds])

    def _word_waits(self) -> bool:
        """Whether somebody has said something that we have not acted on."""
        try:
            return not set(WORDS).isdisjoint(self._wake.recv(4096, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    def restore(self, state: Json) -> None:
        """Go on as the newer version of the keeper that wrote `state`."""
        self._started_at, self._generation, self._nofile = state["started_at"], state["generation"], state["nofile"]
        self._core_bytes = state.get("core_bytes", self._core_bytes)
        self._renewal.restore(state.get("stamp"))
        self._oversight.told = state.get("told", {})
        self._core.restore(state["core"])
        if self._shell is not None:
            self._shell.restore(state["shell"])
        self._held.restore(state["held"], state["ends"])
        self._announced = self._serves = True
        self._wake_out.send(bytes([signal.SIGCHLD]))  # one may have come just before

    def _not_succeeded(self, why: str) -> None:
        """The successor did not come up: the core goes on, and says why."""
        core, self._next, self._why = self._core, None, why
        self._notify.ready()
        self._say(f"the reload failed, the server goes on as before: {why}")
        if core.channel is not None and core.yielded:
            self._go_on()
        elif core.channel is not None:
            core.channel.send({"reload_failed": why})

    def _go_on(self) -> None:
        """Let the core that has yielded serve again."""
        core = self._core
        assert core.channel is not None
        core.yielded, core.ready, core.asked, core.silent = False, {}, 0, 0.0  # it begins anew
        core.channel.send({"resume": True})
        self._hand_over(core)
        core.channel.send({"reload_failed": self._why})

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            if not self._stopping:
                self._stopping = time.monotonic() + self._config.shutdown_timeout_secs + PART_STOP_SECS
                self._core.again_at = 0.0
                self._say(f"ending the server and all its agents, in at most {self._config.shutdown_timeout_secs:g} s; "
                          "the same signal again hurries")
                self._notify.stopping(self._config.shutdown_timeout_secs + 2 * PART_STOP_SECS)
            self._serving().stop()
        elif signal.SIGHUP in numbers:
            self._reload_asked = True

    # ------------------------------------------------------------ ends

    def _reap(self) -> int | None:
        """Collect who ended, adopted strangers too; return the exit code when the server is done."""
        for adopted in self._everyone:
            if adopted.pid and not adopted.ours and adopted.channel is None:
                code = self._part_ended(adopted, 0 if adopted.done else 1)
                if code is not None:
                    return code
        for pid, ended, seen in process.collect(tree.look):
            part = next((part for part in self._everyone if part.pid == pid), None)
            if part is None and not self._renewal.ended(pid, ended):
                if any(core.pid and (core.channel is None or core.channel.hung_up) for core in self._cores):
                    self._held.core_ended()  # it hung up, and is just ending: its children may be seen to end before it
                self._held.ended(pid, ended, seen, self._serving().channel)
            if part is None:
                continue
            while part.channel is not None:  # to the end: see _listen_to
                self._listen_to(part)
            done = self._part_ended(part, ended.code if ended.code is not None else -(ended.signal or 0))
            if done is not None:
                return done
        return None

    def _reaped(self) -> None:
        """A core asked for the ends up to now, and has them."""
        for part in self._everyone:
            if part.asks_ends and part.channel is not None:
                part.asks_ends = False
                part.channel.send({"reaped": True})

    def _serving(self) -> Part:
        """Return the core that serves, or is about to: it is to hear of what happens."""
        return self._next if self._next is not None and self._core.yielded else self._core

    def _part_ended(self, part: Part, code: int) -> int | None:
        ready = part.ready
        if part in self._cores:
            self._held.core_ended()
        part.dead()
        if part is self._before:
            self._before = None
            return None
        if part is self._next:
            self._not_succeeded(part.failed or f"the new core ended with {code}; see core.log")
            return None
        done = part is self._core and code == 0  # all has ended, whatever successor there may be
        if part is self._core and not done and self._next is not None and self._next.channel is not None:
            if not part.yielded:  # the successor is there already, so that it takes over now
                part.yielded = True
                self._hand_over(self._next)
            return None
        if part is self._shell and (self._stopping or (code == 0 and (ready or part.leaving))):
            return None
        if done or (part is self._core and self._last_core):
            return int(code != 0)
        if part is self._core:
            self._last_core = self._stopping > 0
        self._died(part, code)
        return None

    def _died(self, part: Part, code: int) -> None:
        how = f"with {code}" if code >= 0 else f"by {process.signal_name(-code)}"
        why = part.killed or part.failed or f"the {part.name} ended {how}; see {part.name}.log"
        if not self._serves:
            raise StartError(why)
        self._say(f"{why}; starting it again")

    def _end_all(self) -> bool:
        """End the parts, and after a core that could not come back to do it the agents; return whether all has gone."""
        finished = self._core.done
        self._end_parts()
        if finished or not self._stopping:
            return True
        grace = min(self._config.grace_secs, self._config.shutdown_timeout_secs)
        self._notify.stopping(grace + PART_STOP_SECS)
        return leftovers.end(self._held.agents, grace, self._pause, self._say)

    def _pause(self, secs: float) -> bool:
        """Wait for a moment, and reap; return whether a signal asks us to hurry."""
        readable([self._wake.fileno()], secs)
        try:
            heard = self._wake.recv(4096)
        except BlockingIOError:
            heard = b""
        for pid, _ended, _seen in process.collect(tree.look):
            for part in self._everyone:
                if part.pid == pid:
                    part.dead()
        self._notify.work()
        return signal.SIGTERM in heard or signal.SIGINT in heard

    def _end_parts(self) -> None:
        """Let the parts that still run leave, core first; kill what does not."""
        self._renewal.end_late(float("inf"))
        for part in self._parts:
            part.stop()
        until = time.monotonic() + PART_STOP_SECS
        while any(part.pid for part in self._parts) and time.monotonic() < until:
            self._pause(max(0.0, until - time.monotonic()))
        for part in self._everyone:
            if part.pid and part.ours:
                process.send(part.pid, signal.SIGKILL)
