"""The keeper: start core and shell, start them again when they die, end them in order.

Owns:    `keeper.lock`, the channels to core and shell, and the pace of starting them again.
Runs in: `agentserver serve` itself, or a detached process when `AgentServer` is embedded.
Unaware: of requests, agents and output. It parses nothing from outside and has no policy; that is
         why it does not die. It is the child subreaper: what a dead core leaves comes back here.

The core is done when it exits with 0, whoever asked it to; anything else is a crash. Descriptors of
agents will be held here when agents are to survive the core (see docs/architecture.md).
"""
from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import time
from typing import Callable, Mapping

from ..config import ServerConfig
from ..errors import AgentServerError, StartError
from . import process, tree
from .channel import Channel, Json
from .lock import held, held_by_another
from .log import Log, redirect

BACKOFF_SECS = (0.05, 5.0)   # first and longest pause before a dead part is started again
STEADY_SECS = 10.0           # after so long alive, a death is a first one again
FDS_PER_AGENT, FDS_RESERVE = process.FDS_PER_AGENT, process.FDS_RESERVE
PART_STOP_SECS = 5.0         # for a part to leave when told, before it is killed


class Part:
    """Core or shell: how it is started, whether it lives, when it may be started again."""

    def __init__(self, name: str, config: ServerConfig) -> None:
        self.name, self._config = name, config
        self.pid = 0
        self.channel: Channel | None = None
        self.ready: Json = {}
        self.failed = ""        # the sentence with which it gave up
        self.began = 0.0        # monotonic
        self.again_at = 0.0     # when to start it (again)
        self._pause = 0.0

    def start(self, word: Json) -> None:
        """Start the process and tell it `word`."""
        self.began = time.monotonic()
        ours, theirs = socket.socketpair()
        log = os.open(os.path.join(self._config.state_dir, self.name + ".log"),
                      os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self.pid = process.start([*program(), "_" + self.name], {0: theirs.fileno(), 1: log, 2: log})
        finally:
            theirs.close()
            os.close(log)
        self.channel, self.ready, self.failed = Channel(ours), {}, ""
        self.channel.send(word)

    def dead(self) -> None:
        """It has ended: note when it may be started again."""
        now = time.monotonic()
        first, most = BACKOFF_SECS
        self._pause = first if now - self.began > STEADY_SECS else min(max(first, self._pause * 2), most)
        self.pid, self.again_at = 0, now + (0.0 if self._pause == first else self._pause)
        if self.channel is not None:
            for heard in self.channel.receive():
                self.hear(heard)
            self.channel.close()
            self.channel = None

    def hear(self, word: Json | None) -> None:
        """Note what it said."""
        if word is not None:
            self.ready = word.get("ready", self.ready)
            self.failed = word.get("failed", self.failed)

    def stop(self) -> None:
        """Ask it to leave."""
        if self.channel is not None:
            self.channel.send({"stop": True})


class Keeper:
    """See the module. `on_ready` gets the sentence that says where the server listens."""

    def __init__(self, config: ServerConfig, with_shell: bool, on_ready: Callable[[str], None],
                 say: Callable[[str], None]) -> None:
        self._config, self._on_ready, self._say = config, on_ready, say
        self._started_at = time.time()
        self._nofile = process.descriptor_limit()
        self._core = Part("core", config)
        self._shell = Part("shell", config) if with_shell else None
        self._was_ready = False
        self._stopping = 0.0    # monotonic time by which the core has to be gone
        self._last_core = False  # while we stop, one more core is started to end what a dead one left
        self._wake, wake_out = socket.socketpair()
        self._wake.setblocking(False)
        wake_out.setblocking(False)
        self._wake_out = wake_out
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started us may have blocked what we wait for
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_out.fileno(), warn_on_full_buffer=False)

    @property
    def _parts(self) -> list[Part]:
        return [self._core] if self._shell is None else [self._core, self._shell]

    def run(self) -> int:
        """Serve until the core is done; return the exit code. Raise `StartError` if the server cannot start at all."""
        try:
            for part in self._parts:
                self._start(part)
            while True:
                self._wait()
                code = self._reap()
                if code is not None:
                    return code
                self._announce()
                self._again()
        finally:
            self._end_parts()
            signal.set_wakeup_fd(-1)
            self._wake.close()
            self._wake_out.close()

    # ------------------------------------------------------------ starting

    def _start(self, part: Part) -> None:
        part.start({"config": self._config.to_json(), "started_at": self._started_at, "generation": 1,
                    "keeper_pid": os.getpid(), "nofile": self._nofile, "parts": [p.pid for p in self._parts if p.pid],
                    "again": self._was_ready,
                    **{k: v for k, v in part.ready.items() if k.endswith("endpoint")}})
        if part is self._core and self._stopping:
            part.stop()
            self._stopping = time.monotonic() + self._config.shutdown_timeout_secs + PART_STOP_SECS

    def _again(self) -> None:
        for part in self._parts:
            if not part.pid and time.monotonic() >= part.again_at:
                try:
                    self._start(part)
                except OSError as e:  # no memory, or Python itself is being replaced: nothing to end the others for
                    part.dead()
                    self._say(f"the {part.name} cannot be started: {e}; trying again")
                    if self._stopping and part is self._core:
                        raise StartError(f"the {part.name} cannot be started to end what a dead one left: {e}") from e

    def _announce(self) -> None:
        """Say once where the server listens."""
        if self._was_ready or not all(part.ready for part in self._parts):
            return
        self._was_ready = True
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
        channels = {part.channel.fileno(): part for part in self._parts if part.channel is not None}
        due = [part.again_at for part in self._parts if not part.pid] + ([self._stopping] if self._stopping else [])
        timeout = max(0.0, min(due) - time.monotonic()) if due else None
        ready, _, _ = select.select([self._wake.fileno(), *channels], [], [], timeout)
        for fd in ready:
            if fd == self._wake.fileno():
                self._on_signals(self._wake.recv(4096))
            else:
                self._listen_to(channels[fd])
        if self._stopping and time.monotonic() >= self._stopping and self._core.pid:
            self._say("the core did not end in time and is killed")
            process.send(self._core.pid, signal.SIGKILL)
            self._stopping = time.monotonic() + PART_STOP_SECS

    def _listen_to(self, part: Part) -> None:
        assert part.channel is not None
        for word in part.channel.receive():
            if word is None:  # it is dying; its end comes as SIGCHLD
                part.channel.close()
                part.channel = None
                return
            part.hear(word)

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            if not self._stopping:
                self._stopping = time.monotonic() + self._config.shutdown_timeout_secs + PART_STOP_SECS
                self._core.again_at = 0.0
            self._core.stop()

    # ------------------------------------------------------------ ends

    def _reap(self) -> int | None:
        """Collect who ended, adopted strangers too; return the exit code when the server is done."""
        for pid, code in process.collect():
            for part in self._parts:
                if part.pid == pid:
                    part.dead()
                    if part is self._core and (code == 0 or self._last_core):
                        return int(code != 0)
                    self._last_core = part is self._core and self._stopping > 0
                    self._died(part, code)
        return None

    def _died(self, part: Part, code: int) -> None:
        why = part.failed or f"the {part.name} ended with {code}; see {part.name}.log"
        if not self._was_ready:
            raise StartError(why)
        if not (self._stopping and part is not self._core):
            self._say(f"{why}; starting it again")

    def _end_parts(self) -> None:
        """Let the parts that still run leave, core first; kill what does not."""
        for part in self._parts:
            part.stop()
        until = time.monotonic() + PART_STOP_SECS
        while any(part.pid for part in self._parts) and time.monotonic() < until:
            select.select([self._wake], [], [], max(0.0, until - time.monotonic()))
            try:
                self._wake.recv(4096)
            except BlockingIOError:
                pass
            for pid, _code in process.collect():
                for part in self._parts:
                    if part.pid == pid:
                        part.dead()
        for part in self._parts:
            if part.pid:
                process.send(part.pid, signal.SIGKILL)


def program() -> list[str]:
    """Return the argv that starts this very package: its directory's `__main__.py`, or the single file it is in."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    main = os.path.join(package, "__main__.py")
    return [sys.executable, main if os.path.exists(main) else os.path.dirname(package)]


# ---------------------------------------------------------------- ways in

def serve(config: ServerConfig) -> int:
    """Run a server in the foreground until it is done; return its exit code. Raises `StartError` or `ConfigError`."""
    if config.backends:  # wrong ones are told before anything is made
        from .backends import all_backends
        all_backends(config.backends)
    with_shell = _has_zmq()
    if not with_shell:
        _print("pyzmq is not installed, so only this machine is served; for the network: pip install pyzmq")
    return _keep(config.resolved(os.getcwd()), with_shell, _print, Log(None, config.log_bytes))


def _print(sentence: str) -> None:
    try:
        print(sentence, flush=True)
    except OSError:  # nobody reads us any more; that is no reason to end
        pass


def _has_zmq() -> bool:
    import importlib.util
    return importlib.util.find_spec("zmq") is not None


def _keep(config: ServerConfig, with_shell: bool, on_ready: Callable[[str], None], say: Callable[[str], None]) -> int:
    make_state_dir(config.state_dir)
    with held(os.path.join(config.state_dir, "keeper.lock")):
        if held_by_another(os.path.join(config.state_dir, "core.lock")):
            raise StartError(f"{config.state_dir} is still served by a core whose keeper died; end it with: "
                             f"agentserver --server unix:{config.state_dir} shutdown")
        _check_descriptors(config.max_agents)
        tree.become_subreaper()
        return Keeper(config, with_shell, on_ready, say).run()


def make_state_dir(path: str) -> None:
    """Make the state directory, ours alone, and see that it can be written."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        facts = os.stat(path)
        if facts.st_uid != os.getuid():
            raise StartError(f"the state directory {path} belongs to another user (uid {facts.st_uid})")
        os.chmod(path, 0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")
    except OSError as e:
        raise StartError(f"the state directory {path} cannot be used: {os.strerror(e.errno or 0)}; "
                         "name another with --state-dir") from None


def _check_descriptors(max_agents: int) -> None:
    needed = max_agents * FDS_PER_AGENT + FDS_RESERVE
    most = process.hard_descriptor_limit()
    if needed > most:
        fit = (most - FDS_RESERVE) // FDS_PER_AGENT
        raise StartError(f"max_agents = {max_agents} needs {needed} descriptors and the hard limit is {most}; "
                         "raise the limit (ulimit -Hn)" + (f", or set max_agents to at most {fit}" if fit > 0 else ""))


def start_detached(config: ServerConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Start a keeper without a shell, in a session of its own; return when its core answers. Raises `StartError`."""
    ours, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = process.start([*program(), "_keeper"], {0: theirs.fileno(), 1: null, 2: null})
    finally:
        theirs.close()
        os.close(null)
    os.waitpid(pid, 0)  # it forks at once, so that no zombie of it stays with whoever called us
    channel = Channel(ours)
    channel.send({"config": config.resolved(os.getcwd()).to_json()})
    try:
        word = channel.first()
    except EOFError:
        word = {"failed": f"the keeper ended at once; see keeper.log in {config.state_dir}"}
    finally:
        channel.close()
    if "failed" in word:
        raise StartError(str(word["failed"]))


def main(sock: socket.socket) -> int:
    """Run a detached keeper for whoever is at the other end of `sock` until the core is ready."""
    if os.fork():
        os._exit(0)
    channel = Channel(sock)
    config = ServerConfig.from_json(channel.first()["config"])
    log = os.path.join(config.state_dir, "keeper.log")
    try:
        make_state_dir(config.state_dir)
        redirect(log)
        return _keep(config, False, lambda where: channel.finish({"ready": where}), Log(log, config.log_bytes))
    except AgentServerError as e:
        channel.send({"failed": str(e)})
        return 1
