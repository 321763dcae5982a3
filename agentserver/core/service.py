"""The core process: the socket, the connections, the turn of the loop, the beginning and the end.

Owns:    `core.sock`, `core.lock`, the connections, and the order in which the parts are built.
Runs in: a process of its own, started by the keeper; one thread.
Unaware: of what a request means, and of the network.

At the end of each turn: commit, then push events, then send replies. So nobody hears of what a
SIGKILL could still undo.
"""
from __future__ import annotations

import os
import signal
import socket
import struct
from typing import Callable, Sequence

from ..config import ServerConfig
from ..errors import AgentServerError
from ..messages import ShutdownRequest
from ..wire import Json, rfc3339
from . import process, tree
from .channel import Channel
from .connection import Connection
from .control import Control, Peer
from .counters import NAMES, Counters
from .facts import Facts
from .feed import Feed
from .lock import held
from .log import Log
from .reactor import READ, Reactor
from .registry import Registry
from .supervisor import Supervisor

CONNECTIONS_MOST = 1000  # or fewer, so that the agents keep their descriptors
TRIM_SECS = 600.0  # between two looks at what of the registry is past its time


class Service:
    """See the module. `started` is what the keeper told: {config, started_at, generation, keeper_pid, …}."""

    def __init__(self, started: Json, say: Callable[[str], None]) -> None:
        self.config = config = ServerConfig.from_json(started["config"])
        self.backlog_bytes, self.message_bytes = config.backlog_bytes, config.message_bytes
        self._say, self._started = say, started
        self._nofile = process.raise_descriptor_limit()[0]
        process.reserve()
        self.reactor = Reactor()
        self.registry = Registry("registry.db", say)
        self.counters = Counters("counters.bin", started["started_at"])
        self._config = self._named(config)
        feed = Feed(self.registry)
        self.supervisor = Supervisor(self._config, self.reactor, self.registry, feed, self.counters, os.environ,
                                     started.get("nofile", self._nofile), tree.become_subreaper(), say)
        self.facts = Facts(self._config, started)
        self.control = Control(self.supervisor, self.facts, self._stats, self._on_shutdown, config.message_bytes, say)
        self.handle = self.control.handle
        self._feed = feed
        self._connections: set[Connection] = set()
        left = process.descriptor_limit() - config.max_agents * process.FDS_PER_AGENT - process.FDS_RESERVE // 2
        self._connections_most = min(CONNECTIONS_MOST, max(process.FDS_RESERVE // 2, left))
        self._dirty: dict[Connection, None] = {}
        self.reactor.end_of_turn = self._end_of_turn
        self._listener: socket.socket | None = None
        self._inode = 0

    def _named(self, config: ServerConfig) -> ServerConfig:
        """Give the server the id it had before, where none was configured."""
        from dataclasses import replace

        from ..wire import new_id
        server_id = config.server_id or self.registry.get("server_id") or new_id()
        self.registry.put("server_id", server_id)
        return replace(config, server_id=server_id)

    # ------------------------------------------------------------ beginning and end

    def start(self, channel: Channel) -> None:
        """Take over what the registry knows, then listen, then say that we are ready."""
        self._channel = channel
        self.supervisor.load(self._orphans_of_a_dead_core())
        self.registry.trim(self.config.events_kept, self.config.requests_kept)
        self.supervisor.announce("up")
        self.registry.commit()
        self.reactor.on_signal(signal.SIGCHLD, self.supervisor.ending.reap)
        self.reactor.on_signal(signal.SIGTERM, self._stop)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._listen()
        self._channel_watch = self.reactor.watch(channel.fileno(), READ, self._on_channel)
        self.reactor.after(self.config.status_update_interval_secs, self._tick)
        self.reactor.after(TRIM_SECS, self._trim)
        self.supervisor.ending.reap()
        channel.send({"ready": {"pid": os.getpid(), "server_id": self._config.server_id}})
        self._hear(channel.pending())

    def _orphans_of_a_dead_core(self) -> list[tree.Proc]:
        """Return the keeper's children that were there before us and are no part of the server: what agents of
        a dead core left. As pid 1 a keeper also adopts strangers, and only marked processes are ours."""
        keeper, parts = self._started["keeper_pid"], self._started.get("parts", [])
        ours = tree.look(os.getpid())
        if keeper == 1 or ours is None or not self._started.get("again"):
            return []
        by_parent = tree.children_of(tree.scan((os.getpid(), *parts)))
        return tree.below(by_parent, [p for p in by_parent.get(keeper, ()) if p.start < ours.start])

    def _listen(self) -> None:
        """Bind inside the directory: a Unix address may have 107 bytes at most (unix(7)). The lock is ours, so
        a socket that is there belongs to nobody."""
        if os.path.lexists("core.sock"):
            os.unlink("core.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind("core.sock")
        finally:
            os.umask(before)
        self._inode = os.stat("core.sock").st_ino
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._accepting = self.reactor.watch(self._listener.fileno(), READ, self._accept)

    def run(self) -> None:
        """Serve until the server's own end, then close everything."""
        self.reactor.run()
        for connection in list(self._connections):
            connection.send_now()
            connection.close()
        if self._listener is not None:
            self._listener.close()
            if os.path.exists("core.sock") and os.stat("core.sock").st_ino == self._inode:
                os.unlink("core.sock")
        self.registry.close()
        self.counters.close()
        self.reactor.close()

    def _on_channel(self, _mask: int) -> None:
        self._hear(self._channel.receive())

    def _hear(self, words: Sequence[Json | None]) -> None:
        for word in words:
            if word is None:  # the keeper died; agents and clients need not notice
                self.reactor.unwatch(self._channel_watch)
                self._say("the keeper is gone; going on without")
            elif word.get("stop"):
                self._stop()

    def _stop(self) -> None:
        """End gracefully; asked a second time, hurry."""
        if self.supervisor.ending_all:
            self.supervisor.hurry()
        else:
            self.supervisor.shutdown("graceful", None, "server", self.reactor.stop)

    def _on_shutdown(self, request: ShutdownRequest, peer: Peer) -> None:
        self.supervisor.shutdown(request.mode, request.grace_secs, peer.name, self.reactor.stop)

    # ------------------------------------------------------------ the turn

    def _end_of_turn(self) -> None:
        self.supervisor.family.stale()
        self.registry.commit()
        self._feed.flush()
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            for connection in dirty:
                connection.send_now()
            for connection in dirty:
                if connection.waiting:
                    self.reactor.after(0, connection.work)

    def _tick(self) -> None:
        self.reactor.after(self.config.status_update_interval_secs, self._tick)
        self.supervisor.heartbeat()
        self.registry.checkpoint()

    def _trim(self) -> None:
        self.reactor.after(TRIM_SECS, self._trim)
        self.registry.trim(self.config.events_kept, self.config.requests_kept)

    # ------------------------------------------------------------ connections (connection.Desk)

    def _accept(self, _mask: int) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as e:  # out of descriptors: let those who wait wait a little longer
            self._say(f"a connection could not be accepted: {e}")
            self.reactor.change(self._accepting, 0)
            self.reactor.after(1.0, lambda: self.reactor.change(self._accepting, READ))
            return
        uid, name = peer_of(sock)
        if uid not in (os.getuid(), 0) or len(self._connections) >= self._connections_most:
            sock.close()
            return
        sock.setblocking(False)
        self._connections.add(Connection(sock, name, self))

    def hello(self, facts: Json) -> None:
        """A shell said where it listens."""
        self.facts.set_shell(facts)

    def dirty(self, connection: Connection) -> None:
        """Send what this connection has, at the end of the turn."""
        self._dirty[connection] = None

    def gone(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._connections.discard(connection)
        self._dirty.pop(connection, None)
        self._feed.subscribe(connection, ())
        if connection.shell is not None and not any(c.shell for c in self._connections):
            self.facts.set_shell({})

    def _stats(self) -> Json:
        by_status: dict[str, int] = {}
        for agent in self.supervisor.agents.values():
            by_status[agent.status] = by_status.get(agent.status, 0) + 1
        return {"started_at": rfc3339(self.facts.started_at), "uptime_secs": self.facts.uptime(),
                **{name: self.counters.get(name) for name in NAMES},
                "active_agents": self.supervisor.active, "agents_by_status": by_status, **self.facts.usage()}


def peer_of(sock: socket.socket) -> tuple[int, str]:
    """Return uid and name of who connected (SO_PEERCRED, unix(7)); elsewhere the socket's mode has to do."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.getuid(), "local"
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, f"local uid {uid} pid {pid}"


def main(sock: socket.socket) -> int:
    """Run the core for the keeper at the other end of `sock`."""
    channel = Channel(sock)
    started = channel.first()
    config = ServerConfig.from_json(started["config"])
    say = Log(os.path.join(config.state_dir, "core.log"), config.log_bytes)
    try:
        os.chdir(config.state_dir)
        with held("core.lock"):
            service = Service(started, say)
            service.start(channel)
            service.run()
    except AgentServerError as e:
        return channel.fail(str(e))
    except OSError as e:
        return channel.fail(f"the core could not go on in {config.state_dir}: {e}")
    return 0
