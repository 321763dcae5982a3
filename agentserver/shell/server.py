"""AgentServer: the shell as a Python object.

Owns:    `shell.lock`, the sockets and the order in which they come and go.
Runs in: `start` blocks the thread that calls it; everything else may be called from any thread.
Unaware: of agents. What happens to them at the end is the core's business; it is only asked to shut down.
"""
from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence

import zmq

from ..core.framelink import FrameLink
from ..core.link import LineLink, dial, socket_path
from ..core.lock import await_free, held
from ..core.serving import start_detached
from ..core.state_dir import prepare
from ..errors import LinkError, RequestError, StartError
from ..results import Health, ServerStats
from ..wire import encode, new_id
from .connections import Connections
from .cutting import Cutter
from .endpoints import router_socket
from .listening import Bound, bind, put_back
from .loop import Owner, RequestLoop
from .monitor import Monitor
from .zap import Zap

if TYPE_CHECKING:
    from ..config import ServerConfig

Json = Dict[str, Any]

NO_PUBLISHING = "none"
_ABSENT_SECS = 1.0        # a core without its socket for so long has ended on purpose
_UNLINKED_SECS = 0.2      # the same while closing: less is a core that is being started again
_CRASHED_SECS = 3.0       # while closing, nobody waits longer for a core that died
_LAST_REPLY_MS = 500      # for replies that are still on their way out at the end


class AgentServer:
    """A server on this machine. An object serves once.

    `start` takes over the thread that calls it, and starts a detached keeper (which starts the core)
    when the state directory has none. `stop` ends the server gracefully, agents included.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config = config.resolved()
        self._state_dir = config.state_dir
        self._stopper = Stopper(config.shutdown_timeout_secs + 10.0)
        self._running = threading.Event()
        self._started = False
        self._bound = (config.endpoint, "" if config.pub_endpoint == NO_PUBLISHING else config.pub_endpoint)

    @property
    def endpoint(self) -> str:
        """Where requests are taken; the real port once the server runs."""
        return self._bound[0]

    @property
    def pub_endpoint(self) -> str:
        """Where events are published; `""` when they are not."""
        return self._bound[1]

    def start(self) -> None:
        """Serve until `stop`, a shutdown request, or Ctrl-C (a graceful end too; a second one hurries).

        Raises `StartError`: already served, address in use, the core does not start.
        """
        if self._started:
            raise StartError("this AgentServer has been started before; make a new one")
        self._started = True
        if self._stopper.asked:
            return
        prepare(self._state_dir)
        with held(os.path.join(self._state_dir, "shell.lock")):
            front = Front(self._config, self._state_dir)
            try:
                front.open(self._config.endpoint, self._config.pub_endpoint)
                self._bound = front.endpoints
                self._start_core()
                self._run(front)
            finally:
                self._running.clear()
                front.close()
        await_free(os.path.join(self._state_dir, "keeper.lock"), _CRASHED_SECS)

    def _start_core(self) -> None:
        try:
            dial(socket_path(self._state_dir)).close()
        except LinkError:
            start_detached(self._config)

    def _run(self, front: Front) -> None:
        loop = front.loop(self._stopper)
        try:
            if loop.meet():
                self._running.set()
                loop.run()
        except KeyboardInterrupt:
            self.stop()
            loop.run()
            raise

    def stop(self) -> None:
        """End the server gracefully; returns at once, `start` returns when it is done.

        Callable from any thread and from a signal handler, also before `start`, which then does nothing.
        """
        self._stopper.stop()

    def is_running(self) -> bool:
        """Whether requests are being served."""
        return self._running.is_set()

    def wait_running(self, timeout: Optional[float] = None) -> bool:
        """Wait until requests are served, for at most `timeout` seconds; return whether they are."""
        return self._running.wait(timeout)

    def stats(self) -> ServerStats:
        """Return the server's counters (all zero when it does not run); `LinkError` when its core is away."""
        return ServerStats.of(self._ask("stats_request").get("stats"))

    def active_agent_count(self) -> int:
        """Return how many agents are not finished; 0 when the server does not run."""
        return Health.of(self._ask("health_check_request")).active_agents

    def uptime_secs(self) -> float:
        """Return since when the server is up, in seconds, across deaths of its parts; 0 when it does not run."""
        return Health.of(self._ask("health_check_request")).uptime_secs

    def _ask(self, kind: str) -> Json:
        if not self.is_running():
            return {}
        link = LineLink(socket_path(self._state_dir))  # one per call: links belong to one thread
        try:
            raw = link.request(encode({"type": kind, "request_id": new_id()}), self._config.request_timeout_secs)
        finally:
            link.close()
        reply: Json = json.loads(raw)
        if not reply.get("success", True):
            raise RequestError(str(reply.get("error")), str(reply.get("error_code") or ""), reply)
        return reply


class Stopper:
    """The owner of a loop that runs in somebody's own process: ends when the core has ended."""

    def __init__(self, most_secs: float) -> None:
        self.wake_fd, self._waker = os.pipe()
        os.set_blocking(self.wake_fd, False)
        os.set_blocking(self._waker, False)
        self._most_secs = most_secs
        self._deadline = float("inf")
        self.asked = False
        self.closing = False
        self.followed = False

    def stop(self) -> None:
        """Ask for the end; no lock and no waiting, because a signal handler may call it."""
        self.asked = True
        try:
            os.write(self._waker, b"\0")
        except OSError:
            pass  # full: it was asked already

    def woken(self) -> None:
        """Note that the end was asked for."""
        try:
            os.read(self.wake_fd, 4096)
        except OSError:
            pass
        if not self.closing:
            self.closing = True
            self._deadline = time.monotonic() + self._most_secs

    def over(self, absent: bool, gone_secs: float) -> bool:
        """Whether the core has ended: it took its socket away, or it died while it was to end."""
        if self.closing:
            gone = gone_secs > (_UNLINKED_SECS if absent else _CRASHED_SECS)
            return gone or time.monotonic() > self._deadline
        return absent and gone_secs > _ABSENT_SECS

    def __del__(self) -> None:
        os.close(self.wake_fd)  # not sooner: `stop` may be called at any time
        os.close(self._waker)


class Front:
    """The sockets of one serving shell: ROUTER, XPUB with its monitor thread, who is asked about peers, the link to the
    core."""

    def __init__(self, config: ServerConfig, state_dir: str, keeper_pid: int = 0) -> None:
        """`keeper_pid`: who started this process, if a keeper did."""
        self._config = config
        self._hello: Json = {"pid": os.getpid(), "keeper_pid": keeper_pid}
        self._core = socket_path(state_dir)
        self._context: zmq.Context[Any] = zmq.Context()
        self._zap, self._cutter = Zap(self._context), Cutter()
        self._router = router_socket(self._context)
        self._connections = Connections(self._context, self._router, self._cutter, alone=bool(keeper_pid))
        self._zap.watch(self._connections)
        self.bound: List[Bound] = []   # for requests and, if there is publishing, for that
        self._monitor: Optional[Monitor] = None
        self._link: Optional[FrameLink] = None

    def open(self, endpoint: str, pub_endpoint: str, patience_secs: float = 0.0,
             left: Sequence[Optional[Bound]] = (None, None)) -> None:
        """Bind both sockets, or go on with what a shell before us has `left`; raise `StartError`."""
        self.bound = [bind(self._router, endpoint, patience_secs, left[0])]
        if pub_endpoint and pub_endpoint != NO_PUBLISHING:
            self._monitor = Monitor(self._context, self._zap, self._cutter, self._core, pub_endpoint,
                                    self._config.pub_hwm, patience_secs, left[1])
            self.bound.append(self._monitor.start({**self._hello, "endpoint": self.bound[0].endpoint}))
        self._zap.bound_connections()

    def put_back(self) -> bool:
        """See that the files of `ipc://` sockets are there, and put back what somebody has removed; return whether we
        listen on another socket now than when this was asked last."""
        before = list(self.bound)
        self.bound[0] = put_back(self._router, self.bound[0])
        if self._monitor is not None:
            self.bound[1] = self._monitor.put_back()
        return self.bound != before

    @property
    def endpoints(self) -> tuple[str, str]:
        """The real addresses, for requests and for publishing; the latter is `""` without."""
        return self.bound[0].endpoint, self.bound[1].endpoint if self._monitor is not None else ""

    def loop(self, owner: Owner) -> RequestLoop:
        """Return the loop that serves requests for this owner."""
        endpoint, pub_endpoint = self.endpoints
        self._link = FrameLink(self._core, {**self._hello, "role": "requests", "endpoint": endpoint,
                                            "pub_endpoint": pub_endpoint, "pipelined": True})
        return RequestLoop(self._router, self._connections, endpoint, self._link, owner,
                           self._config.request_timeout_secs)

    def close(self, followed: bool = False) -> None:
        """Let the last replies out and close everything; safe to call half-way. A shell that follows this one finds the
        files of `ipc://` sockets in their place: to whoever comes meanwhile, the server is not gone."""
        self._zap.unwatch(self._connections)
        self._connections.close()
        self._router.close(linger=_LAST_REPLY_MS)  # first: who has its last reply asks the next shell
        if self._monitor is not None:
            self._monitor.stop(followed)
        if self._link is not None:
            self._link.close()
        self._zap.close()
        self._context.term()
        self._cutter.close()
        if self.bound and not followed:
            self.bound[0].release()
