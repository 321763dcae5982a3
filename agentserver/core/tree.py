"""Who descends from whom, as far as `/proc` tells (proc(5)).

Owns:    reading `/proc`, the identity of a process, and signals to processes that are not our children.
Runs in: the core's thread; a scan costs about 9 µs for each process that is not a kernel thread.
Unaware: of agents' records and of policy.

A process group is not a tree: today's agent CLIs start each tool in a session of its own. So
descendants are found by parent links, and those whose parent died come back to us, because we are
the child subreaper (PR_SET_CHILD_SUBREAPER, prctl(2)); they are then told apart by the mark in
their environment, their session, or an earlier sight of them.

Without `/proc`, or with that of another pid namespace, whose numbers mean others, every function here finds nothing,
and only groups are handled.
"""
from __future__ import annotations

import os
import signal
import time
from typing import Callable, Collection, Iterable, NamedTuple

from .inherited import tag_in

GONE = "ZX"         # states of what is dead; see `look`
SENT, MISSING, NOT_PERMITTED = "sent", "missing", "not_permitted"  # what became of a signal
MARK = "AGENTSERVER_AGENT_ID"
_MARK = MARK.encode() + b"="
TICKS = os.sysconf("SC_CLK_TCK")
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h


def _proc() -> str:
    """Return where our own pid namespace is shown."""
    try:
        ours = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        ours = False
    return "/proc" if ours else "/nonexistent"


_PROC = _proc()
_own_score: list[int] = []  # read once: our own oom_score_adj


class Proc(NamedTuple):
    """One line of /proc/PID/stat. (pid, start) is its identity until the next boot."""

    pid: int
    parent: int
    session: int
    start: int  # clock ticks since boot
    state: str  # R, S, D, T, Z, …; of a process whose main thread has ended that of a thread that lives

    @property
    def lives(self) -> bool:
        """Whether something of it runs or can run."""
        return self.state not in GONE


def become_subreaper() -> bool:
    """Make orphaned descendants our children, instead of init's; return whether the kernel agreed."""
    try:
        import ctypes
        return bool(ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def boot_id() -> str:
    """Return what tells this boot from all others, or "" where the kernel does not say."""
    return _read("/proc/sys/kernel/random/boot_id", 64).decode("ascii", "replace").strip()


def ticks_now() -> float:
    """Return the time in which `Proc.start` counts: clock ticks since boot, sleep included (proc(5))."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) * TICKS


def _read(path: str, most: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, most)
    except OSError:
        return b""
    finally:
        os.close(fd)


def look(pid: int) -> Proc | None:
    """Return one process, zombies too, or None where there is none.

    The kernel shows a process as a zombie as soon as its main thread has ended, though other threads of it run."""
    f = _stat(str(pid))
    if not f:
        return None
    state = f[0].decode()
    if state in GONE and int(f[17]) > 1:
        state = _living_thread(pid)[1] or state
    return Proc(pid, int(f[1]), int(f[3]), int(f[19]), state)


def _stat(where: str) -> list[bytes]:
    """Return the fields of a stat file from the state on, for a pid or PID/task/TID; none where there is none."""
    stat = _read(f"{_PROC}/{where}/stat", 1024)
    return stat[stat.rindex(b")") + 2:].split(None, 20) if stat else []


def _living_thread(pid: int) -> tuple[str, str]:
    """Return where /proc shows a thread of a process that lives, and its state: one that moves where there is one."""
    found = ("", "")
    try:
        threads = os.listdir(f"{_PROC}/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        f = _stat(f"{pid}/task/{thread}")
        state = f[0].decode() if f else "X"
        if state not in GONE:
            found = (f"{pid}/task/{thread}", state)
            if state not in "Tt":
                break
    return found


def _of(pid: int, name: str, most: int) -> bytes:
    """Return what /proc/PID/NAME says; where the main thread has ended, what it says of a thread that lives."""
    said = _read(f"{_PROC}/{pid}/{name}", most)
    if not said:
        f = _stat(str(pid))
        thread = _living_thread(pid)[0] if f and int(f[17]) > 1 else ""
        said = _read(f"{_PROC}/{thread}/{name}", most) if thread else b""
    return said


def scan(skip: Collection[int] = ()) -> dict[int, Proc]:
    """Return every user process but those in `skip`. Kernel threads have no session: getsid(2) is 0."""
    found: dict[int, Proc] = {}
    try:
        names = os.listdir(_PROC)
    except OSError:
        return found
    for name in names:
        if not name.isdigit() or (pid := int(name)) in skip:
            continue
        try:
            if os.getsid(pid) == 0:
                continue
        except OSError:  # gone, or another user's where that is hidden
            continue
        proc = look(pid)
        if proc is not None:
            found[pid] = proc
    return found


def own_children() -> list[int] | None:
    """Return the pids of our own children, or None where the kernel does not tell (CONFIG_PROC_CHILDREN)."""
    return children_listed("thread-self")


def children_listed(whose: str) -> list[int] | None:
    """Return the pids of the children of a thread, as `thread-self` or PID/task/TID, as the kernel lists them: that is
    much quicker than a look at all processes."""
    try:
        with open(f"{_PROC}/{whose}/children", "rb", buffering=0) as file:
            return [int(word) for word in file.readall().split()]
    except (OSError, ValueError):
        return None


def children_of(table: dict[int, Proc]) -> dict[int, list[Proc]]:
    """Return the processes of a scan by their parent."""
    by_parent: dict[int, list[Proc]] = {}
    for proc in table.values():
        by_parent.setdefault(proc.parent, []).append(proc)
    return by_parent


def below(by_parent: dict[int, list[Proc]], roots: Iterable[Proc | int],
          stop: Callable[[int], bool] = lambda pid: False) -> list[Proc]:
    """Return all that descend from `roots`, parents first, with the roots that are given as `Proc`.
    Nothing is followed below a pid for which `stop` is true."""
    found: dict[int, Proc] = {}
    waiting = list(roots)
    while waiting:
        root = waiting.pop()
        if isinstance(root, Proc):
            if root.pid in found or stop(root.pid):
                continue
            found[root.pid] = root
            root = root.pid
        waiting += by_parent.get(root, ())
    return list(found.values())


def mark_of(pid: int) -> str:
    """Return the agent id in the environment that a process was started with, or ""."""
    block = _of(pid, "environ", 4 * 1024 * 1024)
    at = 0 if block.startswith(_MARK) else block.find(b"\0" + _MARK) + 1
    if not block.startswith(_MARK, at):
        return ""
    return block[at + len(_MARK):].split(b"\0", 1)[0].decode("ascii", "replace")


def tag_of(pid: int) -> int:
    """Return the tag in the limits of a process, 0 if it has none (inherited.py)."""
    return tag_in(_read(f"{_PROC}/{pid}/limits", 4096))


def held_by(pid: int) -> set[tuple[int, int]]:
    """Return the pipes and the slaves of terminals that a process holds, each as `identity` calls it. (All masters look
    alike: they are /dev/ptmx.) Nothing else is looked at closely: a file may be on a disk that does not answer."""
    found = set()
    f = _stat(str(pid))
    where = f"{_PROC}/{_living_thread(pid)[0] if f and f[0].decode() in GONE else pid}"
    try:
        for fd in os.listdir(f"{where}/fd"):
            path = f"{where}/fd/{fd}"
            if os.readlink(path).startswith(("pipe:", "/dev/pts/")):
                found.add(identity(os.stat(path)))
    except OSError:  # gone, or not ours to look into
        pass
    return found


def identity(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a pipe, or a terminal, from all others; both ends of a pipe have the same."""
    return status.st_dev, status.st_ino


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    mask = _read(f"{_PROC}/{pid}/status", 4096).partition(b"\nSigIgn:")[2].split(None, 1)
    return bool(mask) and bool(int(mask[0], 16) >> (number - 1) & 1)


def unshield(pid: int) -> None:
    """Let a child be killed before us where memory ends. It inherited our oom_score_adj (proc(5)); if somebody has
    protected us by it, the child gets 0."""
    if not _own_score:
        _own_score.append(int(_read(f"{_PROC}/self/oom_score_adj", 16) or 0))
    if _own_score[0] < 0:
        try:
            with open(f"{_PROC}/{pid}/oom_score_adj", "w", encoding="ascii") as file:
                file.write("0")
        except OSError:  # gone already
            pass


def command_of(pid: int) -> str:
    """Return the command line of a process for people, or its name where it has none."""
    line = _of(pid, "cmdline", 4096).replace(b"\0", b" ").strip()
    line = line or _read(f"{_PROC}/{pid}/comm", 64).strip()
    return line[:500].decode("utf-8", "replace")


def arguments_of(pid: int, most: int) -> list[str]:
    """Return the arguments of a process, cut to `most` bytes; none where it has none or has gone."""
    line = _of(pid, "cmdline", most)
    return [word.decode("utf-8", "replace") for word in line.rstrip(b"\0").split(b"\0")] if line else []


def is_part(pid: int, keeper: int) -> bool:
    """Whether a child of the keeper looks like one of our own processes; until its exec such a one looks like the
    keeper."""
    command = _read(f"{_PROC}/{pid}/cmdline", 4096)
    return command.endswith((b"\0_core\0", b"\0_shell\0", b"\0_check\0")) or (
        command != b"" and command == _read(f"{_PROC}/{keeper}/cmdline", 4096))


def hindered(pid: int) -> str:
    """Return what keeps a process from running, as the end of a sentence; "" if nothing does that the kernel tells."""
    proc, tracer = look(pid), _tracer(pid)
    if tracer:
        return f"is held by a tracer (process {tracer})"
    return {"T": "is stopped (SIGSTOP)", "D": "waits in the kernel (state D)"}.get(proc.state if proc else "", "")


def held_up(pid: int) -> bool:
    """Whether a process is held by a tracer, or in a sleep that not even SIGKILL ends."""
    proc = look(pid)
    return proc is not None and (proc.state == "D" or _tracer(pid) > 0)


def _tracer(pid: int) -> int:
    return int((_read(f"{_PROC}/{pid}/status", 4096).partition(b"\nTracerPid:")[2].split(None, 1) or [b"0"])[0])


def send(proc: Proc, number: int) -> str:
    """Signal a process by identity, never one that took over its pid meanwhile; return what became of it."""
    if proc.pid <= 1 or proc.pid == os.getpid():
        raise ValueError(f"refusing to signal pid {proc.pid}")
    try:
        fd = os.pidfd_open(proc.pid)
    except (AttributeError, OSError):  # macOS, or a kernel before 5.3; or gone
        fd = -1
    try:
        now = look(proc.pid)
        if now is None or now.start != proc.start:
            return MISSING
        if fd >= 0:
            signal.pidfd_send_signal(fd, number)
        else:
            os.kill(proc.pid, number)
        return SENT
    except ProcessLookupError:
        return MISSING
    except PermissionError:  # another user's by now: sudo, su, a set-user-ID program
        return NOT_PERMITTED
    finally:
        if fd >= 0:
            os.close(fd)


def send_all(procs: Iterable[Proc], number: int) -> list[int]:
    """Signal some processes; return the pids of those that we may not signal."""
    return [proc.pid for proc in procs if send(proc, number) == NOT_PERMITTED]


def usage(pid: int) -> dict[str, float | int]:
    """Return what a process uses now: resident memory, CPU time, open descriptors."""
    size = _read(f"{_PROC}/{pid}/statm", 256).split()
    stat = _read(f"{_PROC}/{pid}/stat", 1024)
    try:
        fds = len(os.listdir(f"{_PROC}/{pid}/fd"))
    except OSError:
        fds = 0
    if not size or not stat:
        return {}
    times = stat[stat.rindex(b")") + 2:].split(None, 14)[11:13]
    return {"pid": pid, "rss_bytes": int(size[1]) * os.sysconf("SC_PAGE_SIZE"),
            "cpu_secs": sum(int(t) for t in times) / os.sysconf("SC_CLK_TCK"), "fds": fds}


def marked() -> dict[str, list[Proc]]:
    """Return every living process that carries an agent's mark, by agent id."""
    found: dict[str, list[Proc]] = {}
    for proc in scan((os.getpid(),)).values():
        mark = mark_of(proc.pid) if proc.lives else ""
        if mark:
            found.setdefault(mark, []).append(proc)
    return found


def tagged() -> dict[int, list[Proc]]:
    """Return every living process with the tag of an agent in its limits and no mark, by tag (inherited.py)."""
    found: dict[int, list[Proc]] = {}
    for proc in scan((os.getpid(),)).values():
        tag = tag_of(proc.pid) if proc.lives else 0
        if tag and not mark_of(proc.pid):
            found.setdefault(tag, []).append(proc)
    return found


def end(procs: Iterable[Proc], within: float = 2.0) -> list[Proc]:
    """SIGKILL processes that are not our children, and wait until they are gone or dead (only used at start). Return
    those that live on."""
    import select
    until = time.monotonic() + within
    sent = [(proc, send(proc, signal.SIGKILL)) for proc in procs]
    waiting = [proc for proc, what in sent if what == SENT]
    while waiting and time.monotonic() < until:
        select.select((), (), (), 0.005)  # pidfds are missing on some systems; this runs only after a core's death
        waiting = living(waiting)
    return waiting + living(proc for proc, what in sent if what == NOT_PERMITTED)


def living(procs: Iterable[Proc]) -> list[Proc]:
    """Return those of some processes that live now, as they are now."""
    return [now for proc in procs if (now := look(proc.pid)) is not None and now.start == proc.start and now.lives]
