"""The ways in: how a server comes to run, in the foreground, detached, or as its own newer version.

Owns:    what is checked before anything is started: the descriptors, the backends, and that nobody else serves.
Runs in: the process that becomes the keeper; `start_detached` in the one that wants a keeper beside it.
Unaware: of what a keeper does.
"""
from __future__ import annotations

import os
import socket
from typing import Callable

from ..config import ServerConfig
from ..errors import AgentServerError, StartError
from . import process, state_dir, tree
from .channel import Channel
from .keeper import Keeper
from .lock import lock
from .log import redirect
from .notify import forget
from .process import FDS_PER_AGENT, FDS_RESERVE
from .renew import restore


def serve(config: ServerConfig) -> int:
    """Run a server in the foreground until it is done; return its exit code. Raises `StartError` or `ConfigError`."""
    if config.backends:  # wrong ones are told before anything is made
        from .backends import all_backends
        all_backends(config.backends)
    with_shell = _has_zmq()
    if not with_shell:
        _print("pyzmq is not installed, so only this machine is served; for the network: pip install pyzmq")
    return _keep(config.resolved(), with_shell, _print, "")


def _print(sentence: str) -> None:
    try:
        print(sentence, flush=True)
    except OSError:  # nobody reads us any more; that is no reason to end
        pass


def _has_zmq() -> bool:
    import importlib.util
    return importlib.util.find_spec("zmq") is not None


def _keep(config: ServerConfig, with_shell: bool, on_ready: Callable[[str], None], log: str) -> int:
    state_dir.prepare(config.state_dir)
    held = lock(os.path.join(config.state_dir, "keeper.lock"))
    try:
        _check_descriptors(config.max_agents)
        state_dir.make(os.path.join(config.state_dir, state_dir.AGENTS))
        tree.become_subreaper()
        return Keeper(config, with_shell, on_ready, held, log).run()
    finally:
        os.close(held)


def renewed(fd: int) -> int:
    """Go on as the keeper that executed us in its place."""
    state = restore(fd)
    config = ServerConfig.from_json(state["config"])
    os.set_inheritable(state["lock"], False)
    keeper = Keeper(config, state["shell"] is not None, lambda where: None, state["lock"], state["log"])
    keeper.restore(state)
    return keeper.run()


def _check_descriptors(max_agents: int) -> None:
    needed = max_agents * FDS_PER_AGENT + FDS_RESERVE
    most = process.hard_descriptor_limit()
    if needed > most:
        fit = (most - FDS_RESERVE) // FDS_PER_AGENT
        raise StartError(f"max_agents = {max_agents} needs {needed} descriptors and the hard limit is {most}; "
                         "raise the limit (ulimit -Hn)" + (f", or set max_agents to at most {fit}" if fit > 0 else ""))


def start_detached(config: ServerConfig) -> None:
    """Start a keeper without a shell, in a session of its own; return when its core answers. Raises `StartError`."""
    ours, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = process.start([*process.program(), "_keeper"], {0: theirs.fileno(), 1: null, 2: null})
    finally:
        theirs.close()
        os.close(null)
    os.waitpid(pid, 0)  # it forks at once, so that no zombie of it stays with whoever called us
    channel = Channel(ours)
    channel.send({"config": config.resolved().to_json()})
    try:
        word = channel.next()
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
    config = ServerConfig.from_json(channel.next()["config"])
    forget(os.environ)  # a manager that started the program which embeds us is not ours to talk to
    log = os.path.join(config.state_dir, "keeper.log")
    try:
        state_dir.prepare(config.state_dir)
        redirect(log)
        return _keep(config, False, lambda where: channel.finish({"ready": where}), log)
    except AgentServerError as e:
        channel.send({"failed": str(e)})
        return 1
