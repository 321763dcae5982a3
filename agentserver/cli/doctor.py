"""`doctor`: is everything there that a server needs here, what does a lack cost, how is it mended.

Owns:    the checks. Each is a function of its own that looks at one thing and changes nothing.
Runs in: the main thread of a command.
Unaware: of how a server uses what is checked.
"""
from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Callable, NamedTuple

from ..config import ServerConfig
from . import connect, exits, out, show

GOOD, LACKING, BROKEN, UNKNOWN = "good", "lacking", "broken", "unknown"
_STYLE = {GOOD: "green", LACKING: "yellow", BROKEN: "red", UNKNOWN: "yellow"}
_OLDEST_PYTHON = (3, 9)
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "fuse.sshfs", "afs", "lustre")
_SOCKET_PATH_BYTES = 107     # sun_path of unix(7) less its final NUL


class Finding(NamedTuple):
    """What one check found. `broken` keeps the server from working; `lacking` only costs something, `unknown` may."""

    name: str
    state: str
    found: str
    cost: str = ""
    mend: str = ""


def doctor(given: Namespace) -> int:
    """Check the installation; return 1 if something keeps a server from working here."""
    findings = list(_all(given))
    broken = any(finding.state == BROKEN for finding in findings)
    if given.json:
        out.document({"ok": not broken, "checks": [finding._asdict() for finding in findings]})
    else:
        _print(findings)
    return exits.FAILED if broken else exits.OK


def _all(given: Namespace) -> list[Finding]:
    from .. import sources
    from ..errors import ConfigError
    findings = [python_version(), pyzmq()]
    try:
        flags = {"state_dir": given.state_dir} if given.state_dir else {}
        settings = sources.load(flags, os.environ, given.config).resolved()
    except (ConfigError, OSError) as e:
        return [*findings, Finding("settings", BROKEN, str(e), "no server starts with them", "correct what is named")]
    from . import supervised
    directory = settings.state_dir
    server, keeper = reachable(given)
    return [*findings, state_dir(directory), file_system(directory), socket_length(directory), descriptors(settings),
            proc(), subreaper(), tags(), splice(), sendfile(), pidfd(), exit_codes(),
            *supervised.checks(keeper, settings.max_agents), server]


def _print(findings: list[Finding]) -> None:
    rooms = max(len(finding.name) for finding in findings)
    for finding in findings:
        state = show.paint(finding.state.ljust(7), _STYLE[finding.state])
        show.say(f"{state}  {finding.name.ljust(rooms)}  {show.clean(finding.found)}")
        for head, text in (("costs", finding.cost), ("mend ", finding.mend)):
            if text and finding.state != GOOD:
                show.say(f"{'':9}{'':{rooms}}  {head}: {show.clean(text)}")


def _judge(name: str, good: bool, found: str, lack: str, cost: str, mend: str, grave: str = LACKING) -> Finding:
    return Finding(name, GOOD, found) if good else Finding(name, grave, lack, cost, mend)


# ---------------------------------------------------------------- the checks

def python_version() -> Finding:
    """Check the version of Python."""
    shown = ".".join(map(str, sys.version_info[:3]))
    return _judge("Python", sys.version_info >= _OLDEST_PYTHON, shown, f"{shown} is too old", "nothing works",
                  "use Python 3.9 or newer", BROKEN)


def pyzmq() -> Finding:
    """Check whether pyzmq is there, and how old it is."""
    cost = "no server for the network: it serves and controls only this machine, over its Unix socket"
    try:
        import zmq
        return Finding("pyzmq", GOOD, f"{zmq.pyzmq_version()} with libzmq {zmq.zmq_version()}")
    except Exception as e:  # a broken build raises more than ImportError
        return Finding("pyzmq", LACKING, f"cannot be imported ({e})", cost, f"{sys.executable} -m pip install pyzmq")


def state_dir(path: str) -> Finding:
    """Check that the state directory, or the place where it would be made, can be used and is private."""
    from ..core.state_dir import unfit
    there = path
    while not os.path.exists(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        return Finding("state directory", BROKEN, f"{path}: {there} cannot be written", "no server starts",
                       "choose another with --state-dir or AGENTSERVER_STATE_DIR, or mend its permissions")
    if there != path:
        return Finding("state directory", GOOD, f"{path} will be made when a server starts")
    reason = unfit(path)
    if reason:
        return Finding("state directory", BROKEN, f"{path} {reason}", "no server starts in it",
                       "name another with --state-dir or AGENTSERVER_STATE_DIR")
    mode = os.stat(path).st_mode
    return _judge("state directory", mode & 0o077 == 0, path, f"{path} has mode {mode & 0o777:04o}",
                  "other users may see which agents there are, not what they write", f"chmod 700 {path}")


def file_system(path: str) -> Finding:
    """Check that the state directory is on a local disk, as far as the system tells."""
    kind = _kind_of_file_system(path)
    return _judge("file system", kind not in _REMOTE, kind or "unknown",
                  f"{kind} is a network file system",
                  "the registry may be damaged, and a slow network stops the whole server",
                  "choose a --state-dir on a local disk")


def _kind_of_file_system(path: str) -> str:
    best, kind = "", ""
    real = os.path.realpath(path)
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape", newline="\n") as mounts:
            for line in mounts:
                _, place, fs, *_ = line.split(" ")
                place = place.replace("\\040", " ")
                if (real + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best):
                    best, kind = place, fs
    except OSError:
        pass
    return kind


def socket_length(path: str) -> Finding:
    """Check that the core's socket has a path that any client can connect to."""
    size = len(os.fsencode(os.path.join(path, "core.sock")))
    return _judge("socket path", size <= _SOCKET_PATH_BYTES, f"{size} of {_SOCKET_PATH_BYTES} bytes",
                  f"{size} bytes, and the system takes {_SOCKET_PATH_BYTES}",
                  "our own client still reaches it on Linux, other programs do not", "choose a shorter --state-dir")


def descriptors(settings: ServerConfig) -> Finding:
    """Check that the hard limit of descriptors carries `max_agents`."""
    from ..core import process
    most = process.hard_descriptor_limit()
    needed = settings.max_agents * process.FDS_PER_AGENT + process.FDS_RESERVE
    return _judge("descriptors", most >= needed, f"{most} allowed, {needed} needed for {settings.max_agents} agents",
                  f"{most} allowed, but {needed} needed for {settings.max_agents} agents", "the server does not start",
                  f"raise the hard limit (ulimit -Hn {needed}, LimitNOFILE= in a service), or lower --max-agents",
                  BROKEN)


def proc() -> Finding:
    """Check for /proc, through which trees of processes are found, and that it is the one of our own pid namespace."""
    try:
        there, lack = os.readlink("/proc/self") == str(os.getpid()), "shows the processes of another pid namespace"
    except OSError:
        there, lack = False, "not there"
    return _judge("/proc", there, "there", lack,
                  "only process groups are ended: what an agent started in a session of its own may stay behind, and "
                  "survivors of the death of all our processes at once are not found",
                  "mount it: mount -t proc proc /proc (Linux); elsewhere there is none")


def subreaper() -> Finding:
    """Check that orphans of agents can come back to the server (prctl(2))."""
    cost = "descendants that lost their parent are found less surely when their agent ends"
    try:
        import ctypes
        value = ctypes.c_int()
        good = sys.platform.startswith("linux") and ctypes.CDLL(None).prctl(37, ctypes.byref(value), 0, 0, 0) == 0
    except (ImportError, OSError, AttributeError):
        good = False
    return _judge("subreaper", good, "there", "not there", cost, "needs Linux, and a Python with ctypes")


def tags() -> Finding:
    """Check that agents can be given a limit by which their daemons are known (RLIMIT_RTTIME, getrlimit(2))."""
    from ..core import inherited
    return _judge("tags", inherited.tags_work(), "there", "the hard limit of RLIMIT_RTTIME is lower, or not there",
                  "a daemon that clears its environment and closes all its descriptors may outlive its agent, as long "
                  "as an older agent lives",
                  "needs Linux; lift the limit (ulimit -HR unlimited, LimitRTTIME=infinity in a service)")


def splice() -> Finding:
    """Check for os.splice, which moves output into its file without a copy in our memory."""
    return _judge("os.splice", hasattr(os, "splice"), "there", "not there",
                  "a SIGKILL of the core may cost the chunk of output it was just writing",
                  "needs Linux and Python 3.10 or newer")


def pidfd() -> Finding:
    """Check for descriptors of processes (pidfd_open(2))."""
    good = False
    if hasattr(os, "pidfd_open"):
        try:
            os.close(os.pidfd_open(os.getpid()))
            good = True
        except OSError:
            good = False
    return _judge("pidfd", good, "there", "not there",
                  "the end of an agent that keeper and core have left to init, by dying both, is not noticed",
                  "needs Linux 5.3")


def exit_codes() -> Finding:
    """Check whether a pidfd tells how a process ended that somebody else has reaped (PIDFD_GET_INFO)."""
    from ..core import pidfd as core_pidfd
    return _judge("exit codes", core_pidfd.tells_exit_codes(), "told by pidfd", "not told by pidfd",
                  "how an agent ended that keeper and core have left to init, by dying both, is recorded as unknown",
                  "needs Linux 6.15")


def sendfile() -> Finding:
    """Check for sendfile(2) from a file to a pipe, by which stdin is written once whatever dies meanwhile."""
    import tempfile
    read, write = os.pipe()
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
            file.flush()
            good = os.sendfile(write, file.fileno(), 0, 1) == 1
    except (AttributeError, OSError):
        good = False
    finally:
        os.close(read)
        os.close(write)
    return _judge("sendfile", good, "there", "not there, or not from a file to a pipe",
                  "nothing can be written to the stdin of agents", "needs Linux")


def reachable(given: Namespace) -> tuple[Finding, int]:
    """Check whether a server answers; return the pid of its keeper, too, 0 if it does not or runs elsewhere."""
    import socket

    from ..errors import AgentServerError
    try:
        with connect.connect(given, given.timeout or 3.0) as client:
            found = client.health()
            keeper = found.metadata.get("pid", "") if found.metadata.get("hostname") == socket.gethostname() else ""
            finding = Finding("server", GOOD, f"{client.address} answers, version {found.metadata.get('version', '?')}")
            return finding, int(keeper) if keeper.isdigit() else 0
    except AgentServerError as e:
        told, _, mend = str(e).partition("; start one with: ")
        return Finding("server", LACKING, told, "the other commands have nobody to talk to",
                       f"start one: {mend or 'agentserver serve'}"), 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {"doctor": doctor}
