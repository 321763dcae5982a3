"""One child: its pipes or its terminal, its session, its signals, its end.

Owns:    every call that starts, signals or reaps a process.
Runs in: the core's thread; keeper and clients only start and reap processes of our own. `spawn` changes
         the working directory and some limits (inherited.py) for a moment, which is only safe because
         the core has one thread.
Unaware: of agents, policy and what output means.

`posix_spawn` (a vfork underneath) is used because it starts a child without a copy of us and
without Python code between fork and exec: no lock, no signal mask, no descriptor of ours can leak,
and an error of exec comes back as an errno. All our descriptors are close-on-exec (PEP 446).
"""
from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence, TypeVar

from ..errors import RequestError
from . import refusal, terminal
from .inherited import Inherited, around_start

T = TypeVar("T")
#: three pipes, what waits for stdin, two segments, one index; or a terminal: the master twice, the slave, both ends of
#: the relay, what waits for stdin, one segment, one index
FDS_PER_AGENT = 8
FDS_RESERVE = 100   # half for sockets, registry and logs, half for clients, who may have what is left over too
_REAP_AGAIN_SECS = 0.005
_DEFAULT_SIGNALS = sorted(set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP})
_WORDS = {"interrupt": "INT", "terminate": "TERM", "hangup": "HUP", "continue": "CONT", "abort": "ABRT"}


class Ended(NamedTuple):
    """How a process ended: exit code or signal number, and what it used (getrusage(2)); None: nobody knows.
    `with_core`: in the moment in which a core ended."""

    code: int | None
    signal: int | None
    cpu_secs: float | None
    max_rss_bytes: int | None
    with_core: bool = False


def home() -> str:
    """Return where this very package is: its directory, or the single file that holds it."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return package if os.path.isdir(package) else os.path.dirname(package)


def program() -> list[str]:
    """Return the argv that starts this very package. Whatever the locale is, its processes take text from the protocol
    to the system as UTF-8."""
    where = home()
    return [sys.executable, "-X", "utf8", os.path.join(where, "__main__.py") if os.path.isdir(where) else where]


def start(argv: Sequence[str], descriptors: Mapping[int, int], session: bool = True,
          blocked: Iterable[int] = ()) -> int:
    """Start a process of our own with our environment and just these descriptors, and with some signals `blocked`; in
    a session of its own, or in ours, where it must never be taken for the leader of an agent's. Raises `OSError`."""
    actions = [(os.POSIX_SPAWN_DUP2, ours, number) for number, ours in descriptors.items()]
    return os.posix_spawnp(argv[0], list(argv), os.environ, file_actions=actions, setsid=session,
                           setsigmask=blocked, setsigdef=_DEFAULT_SIGNALS)


def reap_within(pid: int, secs: float) -> int | None:
    """Return the exit code of a process of our own, -N for signal N, or `None` if it has not ended after `secs`."""
    until = time.monotonic() + secs
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # the program that we are a part of reaps all that ends
            return 0
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(_REAP_AGAIN_SECS)


def confine(memory_bytes: int) -> None:
    """Bound the address space of this very process, and let it leave no core dump."""
    for limit, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(limit, (most, most))
        except (ValueError, OSError):  # a lower one holds already; macOS has no RLIMIT_AS
            pass


def bound(pid: int, memory_bytes: int) -> None:
    """Bound the memory that a process of ours may have of its own (RLIMIT_DATA, see prlimit(2)), and let it leave no
    core dump, where the system lets us."""
    if not hasattr(resource, "prlimit"):  # macOS
        return
    for limit, most in ((resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_CORE, 0)):
        try:
            resource.prlimit(pid, limit, (most, most))
        except (ValueError, OSError):  # a lower one holds already, or it has just died
            pass


def collect(look: Callable[[int], T]) -> Iterator[tuple[int, Ended, T]]:
    """Reap every child that has ended, whoever it is; yield its pid, its end, and what `look` saw of it before."""
    for pid, _code, _signal in ended(()):
        seen = look(pid)
        yield pid, reap(pid), seen


def descriptor_limit() -> int:
    """Return our soft RLIMIT_NOFILE."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def hard_descriptor_limit() -> int:
    """Return how many descriptors a process of ours may have at most."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 2 ** 31


def raise_descriptor_limit() -> tuple[int, int]:
    """Raise our soft RLIMIT_NOFILE to the hard one; return what it was, for agents to get back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # macOS reports an infinite hard limit that cannot be set
        pass
    return soft, hard


class Ends(NamedTuple):
    """What connects us with a child that is to be started: our ends, non-blocking, by the names that a keeper holds
    them by; the child's, by the number they have there. On a terminal the child's is the slave, and `tty` its path."""

    ours: dict[str, int]
    theirs: dict[int, int]
    tty: str

    def close(self) -> None:
        """Close our ends, of a child that was not started."""
        _close(self.ours.values())


def ends(stdin: str, size: Mapping[str, int] | None) -> Ends:
    """Make what connects us with one child, whose stdin is `null`, `pipe` or `pty` (of this size: rows, cols); raise
    `RequestError(spawn_failed)` when there are no descriptors or no terminals left."""
    opened: list[int] = []
    try:
        return _terminal(opened, **size) if size is not None else _pipes(stdin == "pipe", opened)
    except OSError as e:
        _close(opened)
        what = "no terminal is to be had (see sysctl kernel.pty and /dev/pts): " if size is not None else ""
        raise RequestError(f"the agent could not be started: {what}{os.strerror(e.errno or 0)}",
                           "spawn_failed") from None


def spawn(argv: Sequence[str], environment: Mapping[str, str], cwd: str, ends: Ends, inherited: Inherited,
          first: tuple[Any, ...]) -> int:
    """Start `argv` in a session of its own, the child doing `first` before all else, and return its pid; raise
    `RequestError(spawn_failed)` with a sentence if it cannot be.

    The child's ends are closed in any case, ours stay open."""
    try:
        with nullcontext(_on_terminal(ends.tty)) if ends.tty else _low(ends.theirs) as actions:
            return _in_directory(cwd, argv, environment, [first, *actions], inherited)
    except OSError as e:
        raise RequestError(f"the agent could not be started: {os.strerror(e.errno or 0)}", "spawn_failed") from None
    finally:
        _close(ends.theirs.values())


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _pipes(stdin: bool, opened: list[int]) -> Ends:
    ours, theirs = {}, {}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number or stdin:
            read, write = os.pipe()
            opened += (read, write)
            ours[name], theirs[number] = (write, read) if number == 0 else (read, write)
            os.set_blocking(ours[name], False)
    return Ends(ours, theirs, "")


def _terminal(opened: list[int], rows: int, cols: int) -> Ends:
    ours, slave = terminal.make(rows, cols)
    opened += (slave, *ours.values())
    return Ends(ours, {0: slave}, os.ttyname(slave))


def _on_terminal(path: str) -> list[tuple[Any, ...]]:
    """Return what a child does to have a terminal. It leads a session by then, so that the first one that it opens
    becomes its controlling terminal; the slave that we hold keeps the terminal open until it has."""
    return [(os.POSIX_SPAWN_OPEN, 0, path, os.O_RDWR, 0), *((os.POSIX_SPAWN_DUP2, 0, number) for number in (1, 2))]


_reserved: list[int] = []  # three low descriptors on /dev/null


def reserve() -> None:
    """Take three low descriptors while there are some. posix_spawn refuses to hand over a descriptor beyond the
    soft limit, which is the agents' low one at that moment, so that the child's ends are lent a low number."""
    while len(_reserved) < 3:
        _reserved.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))


@contextmanager
def _low(theirs: Mapping[int, int]) -> Iterator[list[tuple[Any, ...]]]:
    """Lend low numbers to the child's ends; yield what the child does to have them as 0, 1 and 2."""
    reserve()
    actions: list[tuple[Any, ...]] = []
    if 0 not in theirs:
        actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
    null = os.dup(_reserved[0])
    try:
        for low, (number, fd) in zip(_reserved, theirs.items()):
            os.dup2(fd, low, inheritable=False)
            actions.append((os.POSIX_SPAWN_DUP2, low, number))
        yield actions
    finally:
        for low in _reserved:  # a copy of a pipe's end anywhere delays EOF
            os.dup2(null, low, inheritable=False)
        os.close(null)


def _in_directory(cwd: str, argv: Sequence[str], environment: Mapping[str, str],
                  actions: list[tuple[Any, ...]], inherited: Inherited) -> int:
    home = os.open(".", os.O_RDONLY)
    try:
        try:
            os.chdir(cwd)
        except OSError as e:
            raise RequestError(refusal.no_directory(cwd, e), "spawn_failed") from None
        program = _find(argv[0], environment)
        try:
            with around_start(inherited):
                return os.posix_spawn(program, list(argv), environment, file_actions=actions, setsid=True,
                                      setsigmask=(), setsigdef=_DEFAULT_SIGNALS)
        except OSError as e:
            raise RequestError(refusal.why_not(e, program, argv, environment), "spawn_failed") from None
        except UnicodeEncodeError as e:
            raise RequestError(f"the server's locale cannot express an argument or a variable ({e.encoding}); start "
                               "it with a UTF-8 locale", "spawn_failed") from None
    finally:
        os.fchdir(home)
        os.close(home)


def _find(program: str, environment: Mapping[str, str]) -> str:
    """Return the file to execute, as execvp(3) would find it in the agent's own PATH."""
    if not program:
        raise RequestError("the name of the program is empty", "spawn_failed")
    if "/" in program:
        return program
    path = environment.get("PATH", os.defpath)
    blocked = ""
    for directory in path.split(os.pathsep):
        candidate = os.path.join(directory or ".", program)
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            blocked = blocked or candidate
    if not blocked:
        raise RequestError(refusal.no_program(program), "spawn_failed")
    return blocked


# ---------------------------------------------------------------- signals

def signal_number(spec: str | int) -> int:
    """Return the number of `SIGINT`, `int`, `interrupt`, 2 …; `RequestError` if there is none such here."""
    if isinstance(spec, str) and re.fullmatch(r"\s*-?[0-9]{1,8}\s*", spec):
        spec = int(spec)
    if isinstance(spec, str):
        word = _WORDS.get(spec.strip().lower(), spec.strip().upper())
        found = getattr(signal, word if word.startswith("SIG") else "SIG" + word, None)
        if isinstance(found, signal.Signals):
            return int(found)
    elif spec in signal.valid_signals():
        return int(spec)
    raise RequestError(f"there is no signal {str(spec)[:40]!r}; give a name such as SIGINT or a number from kill -l")


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15, and `SIG40` for those without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def send(pid: int, number: int) -> bool:
    """Signal a child of ours that was not reaped yet; return whether it could be."""
    if pid <= 1:
        raise ValueError(f"refusing to signal pid {pid}")
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def send_group(leader: int, number: int) -> bool:
    """Signal the group of a leader that was not reaped yet, so that its number cannot mean another group."""
    if leader <= 1:
        raise ValueError(f"refusing to signal group {leader}")
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def leads_session(pid: int) -> bool:
    """Whether a process exists that leads a session; for where there is no /proc to tell more."""
    try:
        return os.getsid(pid) == pid
    except OSError:
        return False


# ---------------------------------------------------------------- ends

if hasattr(os, "waitid"):
    def ended(known: Iterable[int]) -> Iterator[tuple[int, int | None, int | None]]:
        """Yield (pid, code, signal) of children that ended and were not reaped. Reap each before asking for the
        next: waitid(2) with WNOWAIT would name the same one again and again."""
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            exited = info.si_code == os.CLD_EXITED
            yield info.si_pid, info.si_status if exited else None, None if exited else info.si_status

    def reap(pid: int) -> Ended:
        """Collect a child that has ended (wait4(2))."""
        _, status, usage = os.wait4(pid, 0)
        return _ended(status, usage)
else:  # macOS before Python 3.13: reaped as they are found
    _found: dict[int, Ended] = {}

    def ended(known: Iterable[int]) -> Iterator[tuple[int, int | None, int | None]]:
        """Yield (pid, code, signal) of children that ended."""
        for pid in list(known):
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                _found[pid] = _ended(status, usage)
                yield pid, _found[pid].code, _found[pid].signal

    def reap(pid: int) -> Ended:
        """Return how a child that was yielded has ended."""
        return _found.pop(pid)


def _ended(status: int, usage: Any) -> Ended:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB here
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Ended(code, number, round(usage.ru_utime + usage.ru_stime, 6), usage.ru_maxrss * unit)


def own_peak_bytes() -> int:
    """Return the most memory that we have had. Until its exec a child shares ours, and the kernel counts that as the
    child's: of one that is said to have had no more than we, nothing is known."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
