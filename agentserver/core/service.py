"""The core process: the socket, the connections, the turn of the loop, the beginning and the end.

Owns:    `core.sock`, `core.lock`, the connections, and the order in which the parts are built.
Runs in: a process of its own, started by the keeper; one thread.
Unaware: of what a request means, and of the network.

At the end of each turn: commit, then push events, then send replies. So nobody hears of what a
SIGKILL could still undo.

Before we yield to a successor we listen no more, and tell every client so that it can send no more; what it had sent
by then is answered, and then its connection is closed. So no request is lost in between.
"""
from __future__ import annotations

import json
import os
import signal
import socket
from typing import Callable, Generator, Sequence

from ..config import ServerConfig
from ..errors import AgentServerError, RequestError
from ..messages import ShutdownRequest
from ..wire import Json, encode_text, read, rfc3339
from . import process, tree
from .adoption import Adoption
from .channel import Channel
from .connection import Connection
from .control import Control
from .counters import NAMES, Counters
from .facts import Facts
from .family import Family
from .feed import Feed
from .inherited import Inherited
from .lastwords import LastWords
from .listener import NAME, Listener
from .lock import held, restore
from .log import Log
from .orphan import end_orphaned
from .patience import Patience
from .peers import SHELL_LOCK, Caller, Hello, Shell, caller, is_keeper, is_ours, shell
from .privacy import shield
from .pushing import Pushing
from .queries import Queries
from .quota import Quota, give_back
from .reactor import READ, WRITE, Reactor, Timer
from .registry import Ask, Registry, check_registry
from .scheduler import Scheduler
from .supervisor import SERVER, Supervisor
from .takeover import End, Inheritance, Keeper, inherit, told_end
from .witness import Witness

CONNECTIONS_MOST = 1000  # or fewer, so that the agents keep their descriptors
YIELD_SECS = 2.0   # at most, for replies that are being made, or not read, when we are to yield to a successor
LAST_SECS = 0.5    # at most, for all others, during which nobody can connect
REFUSED_SECS = 1.0  # between two tries to accept a connection that fail
LINGER_SECS = 1.0  # at most, for clients that listen, after the last agent has ended
FINISH_SECS = 5.0  # at most, for tasks that are under way when we yield to a successor or end
RESTORE_PINGS = 3  # from one look at what lies in the state directory to the next
YIELDED = 3     # exit code of a core that left its work to a successor
WITHHELD_SECS = 2.0  # for which the disk may refuse, before local clients are cut off whose replies wait for it
YIELD_AGAIN_SECS = 0.2  # between two tries to write all down for a successor
TRIM_SECS = 600.0  # between two looks at what of the registry is past its time; or `events_secs`, if that is less


class Service:
    """See the module. `started` is what the first keeper told: {config, started_at, generation, …}; `keeper` is who it
    is now; `inherited` is what agents get."""

    def __init__(self, started: Json, keeper: Keeper, lock: int, inherited: Inherited,
                 say: Callable[[str], None]) -> None:
        self.config = config = ServerConfig.from_json(started["config"])
        self.backlog_bytes, self.message_bytes = config.backlog_bytes, config.message_bytes
        self._say = say
        process.reserve()
        give_back()
        self.reactor = Reactor()
        self.scheduler = Scheduler(self.reactor)
        self.registry = Registry("registry.db", say, config.events_kept, config.events_secs, config.requests_kept,
                                 boot=tree.boot_id(), after=self.reactor.after)
        self._patience = Patience(self.reactor, self.scheduler, self.registry)
        self.counters = Counters("counters.bin", started["started_at"])
        self._config = self._named(config)
        self.facts = Facts(self._config, started, keeper.pid)
        self.registry.put("started", self.facts.remember_start(self.registry.get("started"), tree.boot_id()))
        feed = Feed(self.registry, self.counters, self._config.server_id, self.facts.generation)
        self._pushing = Pushing(feed, self.reactor, config.pub_hwm // 4)
        self._keeper = keeper
        self._last_words = LastWords("ends.jsonl")
        self._witness = Witness(os.path.join(config.state_dir, "spawning"))
        family = Family(tree.become_subreaper(), self._keeper, self.facts.parts, self.reactor.clock)
        self.supervisor = Supervisor(self._config, self.reactor, self.scheduler, self.registry, feed, self._pushing,
                                     self.counters, os.environ, inherited, family, self._last_words,
                                     self._witness, self._keeper, say)
        self._adoption = Adoption(self.supervisor, self.registry, self.reactor, family, self._keeper, say)
        self._queries = Queries(self.reactor, family.helpers, config)
        self.control = Control(self.supervisor, self._queries, self.facts, self._stats, self._on_shutdown,
                               self._on_reload, self._patience, config.message_bytes, say)
        self.handle = self.control.handle
        self._feed = feed
        self._connections: dict[Connection, None] = {}  # who was quiet for the longest is first
        left = process.descriptor_limit() - config.max_agents * process.FDS_PER_AGENT - process.FDS_RESERVE // 2
        self._connections_most = min(CONNECTIONS_MOST, max(process.FDS_RESERVE // 2, left))
        self._dirty: dict[Connection, None] = {}
        self._quota: Quota[Connection] = Quota()
        self._durable = True  # what this turn has done is on disk
        self._withheld: dict[Connection, float] = {}  # whose replies wait for the disk, and until when at most
        self._yielding: Timer | None = None
        self._known: list[int] = []  # ends that the keeper told of, for it to forget after the next commit
        self._parts_of_end = (self._commit, self._acknowledge, self._pushing.flush, self._push, self._answer_keeper,
                              self._send, self._push_more)
        self.reactor.end_of_turn, self.reactor.say = self._end_of_turn, say
        self._stranger_named = self._refusing = False
        self._listener: Listener | None = None
        self._lock, self._trouble = lock, ""
        self._owing: set[Connection] = set()  # who is answered before we yield
        self.yielded = False  # a successor is ready to take over
        self.kept = Inheritance({}, {})  # what we yielded

    def _named(self, config: ServerConfig) -> ServerConfig:
        """Give the server the id it had before, where none was configured."""
        from dataclasses import replace

        from ..wire import new_id
        server_id = config.server_id or self.registry.get("server_id") or new_id()
        try:
            named = replace(config, server_id=server_id)
        except AgentServerError as e:
            named = replace(config, server_id=new_id())
            self._say(f"the server's id in the registry is damaged, and it is {named.server_id} now: {e}")
        self.registry.put("server_id", named.server_id)
        return named

    # ------------------------------------------------------------ beginning and end

    def start(self, left: Inheritance) -> None:
        """Take over what the registry knows and the keeper held, then listen, then say that we are ready."""
        left.ends.update({pid: End(0, False, ended) for pid, ended in self._last_words.before.items()})
        self._known += left.ends
        self._adoption.load(left, self._witness)
        self._trim_some()
        self.supervisor.announce("up")
        self.registry.commit()
        self.reactor.on_signal(signal.SIGCHLD, self.supervisor.ending.reap)
        self.reactor.on_signal(signal.SIGTERM, self._stop)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._listen()
        self._channel_watch = self.reactor.watch(self._keeper.channel.fileno(), READ, self._on_channel)
        self.reactor.after(self.config.status_update_interval_secs, self._tick)
        self.reactor.after(min(TRIM_SECS, self.config.events_secs), self._trim)
        self.supervisor.ending.reap()
        self._go_on_ending()
        self._keeper.channel.send({"ready": self._ready()})
        words, self._keeper.words = self._keeper.words, []
        self._hear([*words, *self._keeper.channel.pending()])

    def _ready(self) -> Json:
        return {"pid": os.getpid(), "server_id": self._config.server_id, "answers": True}

    def _listen(self) -> None:
        self._listener = Listener()
        self._accepting = self.reactor.watch(self._listener.fileno(), READ, self._accept)

    def _restore(self) -> None:
        """Put back what somebody has removed: a cleaner of old files, say."""
        try:
            if self._listener is not None and not self._listener.there:
                before, watched = self._listener, self._accepting
                self._listen()
                self.reactor.unwatch(watched)
                before.close(followed=True)
                self._say(f"{NAME} had been removed, and is there again")
            restore(self._lock, "core.lock")
            self._witness.restore()
            self._last_words.restore()
            self.registry.look()
        except (OSError, AgentServerError) as e:  # the directory itself has gone, or another server has come
            if str(e) != self._trouble:
                self._trouble = str(e)
                self._say(f"what lies in {self.config.state_dir} cannot be restored: {e}")

    def run(self) -> None:
        """Serve until the server's own end, then close everything."""
        self.reactor.run()
        self.scheduler.finish(FINISH_SECS)
        self._end_of_turn()
        self._queries.close(None if self.yielded else RequestError("the server is shutting down", "shutting_down"))
        for connection in list(self._connections):
            self.reactor.guard("sending", connection.send_now)
            connection.close()
        if self._listener is not None:
            self._listener.close(self.yielded)
        if self.yielded:
            self.registry.make_whole()
            self.kept = Inheritance(self.supervisor.let_go(), {})
        else:
            self._keeper.channel.last({"done": True})
        self.registry.close()
        self.counters.close()
        self._last_words.close()
        self._witness.close()
        self.reactor.close()

    def _on_channel(self, mask: int) -> None:
        if mask & WRITE:
            self._keeper.channel.flush()
        if mask & READ:
            self._hear(self._keeper.channel.receive())

    def _hear(self, words: Sequence[Json | None]) -> None:
        for word in words:
            self.reactor.guard("a word of the keeper", self._heed, word)

    def _heed(self, word: Json | None) -> None:
        if word is None:  # the keeper died; agents and clients need not notice
            self.reactor.unwatch(self._channel_watch)
            self._say("the keeper is gone; going on without")
            self._adoption.keeper_lost()
        elif "ended" in word:
            pid, start = word["ended"][:2]
            self.supervisor.ending.departed(pid, start, told_end(word))
            self._known.append(pid)
        elif word.get("stop"):
            self._stop()
        elif word.get("yield"):
            self._yield()
        elif "ping" in word:
            self._keeper.channel.send({"pong": word["ping"]})
            changed = self.facts.look_at_shell()
            if changed is not None:
                self._say(changed or "the program that serves the network runs again")
            self.facts.set_open(word.get("open"))
            if word["ping"] % RESTORE_PINGS == 0:
                self._restore()
        elif "parts" in word:
            self.facts.set_parts(word["parts"])
        elif "hold_again" in word:
            self.supervisor.hold_again(word["hold_again"])
        elif "reload_failed" in word:
            self._owing.clear()
            if self._yielding is not None:
                self._yielding.cancel()
            self.facts.set_reload_failed(word["reload_failed"])

    def _yield(self) -> None:
        """Let a successor go on, as soon as all who have asked are answered. Those first whom that may take a while:
        meanwhile the others are served. Not before all that only we know is on disk."""
        if not self.registry.make_whole():
            self._yielding = self.reactor.after(YIELD_AGAIN_SECS, self._yield)
            return
        self._owing = {connection for connection in self._connections if connection.owes}
        for connection in list(self._owing):
            connection.finish()
        self._yielding = self.reactor.after(YIELD_SECS, self._yield_now)
        if not self._owing:
            self._yield_now()

    def _yield_now(self) -> None:
        if not self.yielded:
            self.yielded = True
            self._listen_no_more()
            for connection in list(self._connections):
                connection.finish()
            self.reactor.after(LAST_SECS, self.reactor.stop)
            self._leave_when_alone()

    def _listen_no_more(self) -> None:
        """Refuse who comes from now on, who then comes again; who has connected by now is heard."""
        assert self._listener is not None
        self.reactor.unwatch(self._accepting)
        for sock in self._listener.last():
            self._admit(sock)

    def _leave_when_alone(self) -> None:
        if self.yielded and not self._connections:
            self.reactor.stop()

    def keeper_came(self, sock: socket.socket, caller: Caller) -> None:
        """A new keeper takes the place of one that died: it gets copies of all we hold."""
        if self._channel_watch.active or not is_keeper(caller):  # while the old one lives, there can be no other
            sock.close()
            return
        sock.setblocking(True)
        channel = Channel(sock)
        self._keeper.channel, self._keeper.pid = channel, caller.pid
        self.facts.set_keeper(self._keeper.pid)
        self._channel_watch = self.reactor.watch(channel.fileno(), READ, self._on_channel)
        channel.send({"ready": self._ready(), "shell": self.facts.listened, "started_at": self.facts.started_at,
                      "generation": self.facts.generation})
        self.supervisor.hold_again(self.supervisor.agents)
        self._say("a new keeper has come")
        self._end_orphaned()

    def _end_orphaned(self) -> None:
        end_orphaned(self.facts, self.reactor, lambda: self._channel_watch.active)

    def _stop(self) -> None:
        """End gracefully; asked a second time, hurry."""
        if self.supervisor.ending_all:
            self.supervisor.hurry()
        else:
            self.supervisor.shutdown("graceful", None, SERVER, self._down)

    def _on_shutdown(self, request: ShutdownRequest, ask: Ask) -> None:
        """The next core, if there has to be one, goes on with it; what is ended by a signal, the keeper remembers."""
        self.registry.put("ending", encode_text({"started_at": self.facts.started_at, "mode": request.mode,
                                                 "grace_secs": request.grace_secs}))
        self.supervisor.shutdown(request.mode, request.grace_secs, ask, self._down)

    def _go_on_ending(self) -> None:
        try:
            ending = json.loads(self.registry.get("ending") or "{}")
            if ending.get("started_at") != self.facts.started_at:  # it was another server's
                return
            request = read(ShutdownRequest, ending)
        except (ValueError, TypeError, AttributeError, RecursionError, RequestError) as e:
            self._say(f"what the registry says of an end of the server is damaged, and it goes on: {e}")
            return
        self.supervisor.shutdown(request.mode, request.grace_secs, SERVER, self._down)

    def _down(self) -> None:
        """All agents have ended. Clients that listen get a moment to ask what became of theirs."""
        self._down_at = self.reactor.clock() + LINGER_SECS
        self._leave()

    def _leave(self) -> None:
        listening = any(connection.topics for connection in self._connections)
        if listening and self.reactor.clock() < self._down_at:
            self.reactor.after(LINGER_SECS / 20, self._leave)
        else:
            self.reactor.stop()

    def _on_reload(self) -> None:
        if not self._channel_watch.active:
            raise RequestError("the server's keeper is gone, and only it can reload; start one with: agentserver serve",
                               "unavailable")
        self.facts.set_reload_failed("")
        self._keeper.channel.send({"reload": True})

    # ------------------------------------------------------------ the turn

    def _end_of_turn(self) -> None:
        """Each part is done also when one before it has failed."""
        self._durable = False
        for part in self._parts_of_end:
            try:
                part()
            except Exception as e:
                self.reactor.mistake("the end of a turn", e)

    def _commit(self) -> None:
        self.supervisor.family.stale()
        self._durable = self.registry.commit(again=False)
        if self._durable:
            self.supervisor.committed()
            self._durable = self.registry.commit()  # what came of that; stdin is closed only now, for example
            if not self.supervisor.ending.parting:
                self._last_words.known()
                while self._known:
                    self._keeper.known(self._known.pop())

    def _acknowledge(self) -> None:
        """Let no reply to a deed leave before that is on disk. Whoever is served alone, and has waited for long, is cut
        off: who asks again is told when it is."""
        if not self._durable:
            now = self.reactor.clock()
            for connection in self._dirty:
                if connection.withhold() and connection not in self._withheld:
                    self._withheld[connection] = now + max(0.0, WITHHELD_SECS - self.registry.trouble_secs)
                    self.reactor.at(self._withheld[connection], _more)
            for connection in [each for each, until in self._withheld.items() if until <= now and each.may_be_cut]:
                connection.close()
        elif self._withheld:
            for connection in self._withheld:
                connection.acknowledge()
                self._dirty[connection] = None
            self._withheld = {}
        self._patience.look()

    def _push(self) -> None:
        self._feed.flush(self._durable)

    def _push_more(self) -> None:
        """After all was sent: who took something has room for more, and nothing else may wake us for that."""
        if self._pushing.ready:
            self.reactor.soon(_more)

    def _answer_keeper(self) -> None:
        self.reactor.change(self._channel_watch, READ | (WRITE if self._keeper.channel.unsent else 0))

    def _send(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for connection in dirty:
            if not self.reactor.guard("sending", connection.send_now):
                connection.close()
            elif connection in self._connections:  # it is the last one that was quiet
                del self._connections[connection]
                self._connections[connection] = None
                self._quota.note(connection, 0 if connection.shell else connection.kept)
        while (greediest := self._quota.greediest) is not None:
            self._say("local clients make the core keep too much; the one with the most is cut off: "
                      f"{greediest.name}, {greediest.kept} bytes")
            greediest.close()

    def _tick(self) -> None:
        self.reactor.after(self.config.status_update_interval_secs, self._tick)
        self.supervisor.heartbeat()
        self._restore()
        self.registry.checkpoint()

    def _trim(self) -> None:
        self.reactor.after(min(TRIM_SECS, self.config.events_secs), self._trim)
        self._trim_some()

    def _trim_some(self) -> None:
        if self.registry.trim():
            self.reactor.after(0, self._trim_some)

    # ------------------------------------------------------------ connections (connection.Desk)

    def _accept(self, _mask: int) -> None:
        assert self._listener is not None
        try:
            sock = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as e:  # out of descriptors or memory: those who wait wait a little longer
            if not self._refusing:
                self._say(f"no connection can be accepted for now: {e.strerror}")
            self._refusing = True
            self._cut_quiet(known=False)
            self.reactor.change(self._accepting, 0)
            self.reactor.after(REFUSED_SECS, lambda: self.reactor.change(self._accepting, READ))
            return
        self._refusing = False
        self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """Take a new connection in, if it is our user's and there is room."""
        who = caller(sock)
        full = len(self._connections) >= self._connections_most
        if who.uid not in (os.getuid(), 0) or (full and not self._cut_quiet(known=True) and not is_ours(who)):
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock, who, self)
        self._connections[connection] = None
        if self.yielded:
            connection.finish()

    def _cut_quiet(self, known: bool) -> bool:
        """Cut off one that is quiet, if there is one: first who never asked, then, if `known` may go too, who was quiet
        for the longest. An honest client connects again."""
        quiet = [each for each in self._connections if each.quiet and (known or not each.known)]
        for connection in sorted(quiet, key=lambda each: each.known)[:1]:
            connection.close()
        return bool(quiet)

    def hello(self, hello: Hello, caller: Caller) -> Shell | None:
        """A peer says that it is a shell, and where it listens: note that if it is."""
        found = shell(hello, caller)
        if found is not None:
            self.facts.set_shell(found)
            self._end_orphaned()
        elif not self._stranger_named:
            self._stranger_named = True
            self._say(f"process {caller.pid} claims to be this server's shell without holding {SHELL_LOCK}; it is "
                      "served like any local client")
        return found

    def dirty(self, connection: Connection) -> None:
        """Send what this connection has, at the end of the turn."""
        self._dirty[connection] = None

    def dropped(self) -> None:
        """Count a message that somebody was too slow for."""
        self.counters.add("messages_dropped")

    def caught_up(self, connection: Connection, missed: list[str]) -> None:
        """Tell who was too slow where the topics stand of which something was dropped."""
        def tell() -> Generator[None, None, None]:
            for _ in self.control.announce(missed, connection):
                if connection not in self._connections:
                    return
                yield
        self.scheduler.add(connection.name, tell())

    def gone(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._connections.pop(connection, None)
        self._quota.forget(connection)
        self._dirty.pop(connection, None)
        self._withheld.pop(connection, None)
        self._feed.subscribe(connection, ())
        if connection.shell is not None and not any(c.shell for c in self._connections):
            self.facts.set_shell(None)
        if connection in self._owing:
            self._owing.discard(connection)
            if not self._owing:
                self._yield_now()
        self._leave_when_alone()

    def _stats(self) -> Json:
        by_status: dict[str, int] = {}
        for agent in self.supervisor.agents.values():
            by_status[agent.status] = by_status.get(agent.status, 0) + 1
        return {"started_at": rfc3339(self.facts.started_at), "uptime_secs": self.facts.uptime(),
                **{name: self.counters.get(name) for name in NAMES},
                "active_agents": self.supervisor.active, "agents_by_status": by_status, **self.facts.usage()}


def _more() -> None:
    """Nothing but another turn."""


def main(sock: socket.socket) -> int:
    """Run the core for the keeper at the other end of `sock`.

    As a successor it first only shows that it could serve, and waits until the core before it has let go. That one goes
    on when it fails, or when the keeper dies meanwhile."""
    umask, core_bytes = os.umask(0o077), shield()  # what we make and hold is nobody else's business
    process.raise_descriptor_limit()
    channel = Channel(sock)
    started = channel.next()
    config, keeper = ServerConfig.from_json(started["config"]), Keeper(channel, started["keeper_pid"])
    inherited = Inherited(started["nofile"], umask, core_bytes=started.get("core_bytes", core_bytes))
    say = Log(os.path.join(config.state_dir, "core.log"), config.log_bytes)
    try:
        os.chdir(config.state_dir)
        if started.get("standby"):
            check_registry("registry.db")
            channel.send({"standby": True})
        left = inherit(keeper.channel)
        while True:
            with held("core.lock") as lock:
                service = Service(started, keeper, lock, inherited, say)
                service.start(left)
                service.run()
            if not service.yielded:
                return 0
            try:
                if keeper.succeeded():
                    return YIELDED
                left = inherit(keeper.channel)
                service.kept.close()
                say("the new core did not come up; going on")
            except EOFError:  # a successor may have the lock by now; else it will not be one
                left = service.kept
    except AgentServerError as e:
        return keeper.channel.fail(str(e))
    except EOFError:
        return keeper.channel.fail("the keeper is gone")
    except OSError as e:
        return keeper.channel.fail(f"the core could not go on in {config.state_dir}: {e}")
