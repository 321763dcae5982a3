"""What is said to a service manager, and the descriptors that it keeps for us: sd_notify(3).

Owns:    the socket that `NOTIFY_SOCKET` names, the order in which things are said over it, the watchdog's pace, and
         taking back what was stored (`LISTEN_FDS`, sd_listen_fds(3)).
Runs in: the keeper. Nothing here waits: what the manager does not take now is queued, with copies of its descriptors.
Unaware: of agents: a descriptor has a name, that is all.

The store is what makes a death of all our processes at once bearable: the manager holds a copy of every pipe and gives
it back to the next keeper. `FDPOLL=0`, because it would drop a pipe whose agent has ended, with what is still in it.

Without `NOTIFY_SOCKET` every call here returns at once. What a manager put into the environment is for us alone: it is
taken out, so that no part of the server and no agent speaks in our name.
"""
from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import contextmanager
from typing import Deque, Iterator, MutableMapping, Sequence

from .channel import rights

STATUS_SECS = 1.0   # between two sentences about how we are: the manager tells each one on
AGAIN_SECS = (0.01, 1.0)  # first and longest pause before the next try, when the manager takes nothing more
QUEUE_MOST = 1000   # messages that wait for such a one; beyond, only what lets go of descriptors is still noted
NAME_MOST = 255     # characters in FDNAME
FIRST_FD = 3        # SD_LISTEN_FDS_START
OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE")
STORED = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Notify:
    """One keeper's word to its manager; `environ` loses what the manager put there."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self.environ = {name: environ.pop(name) for name in OURS if name in environ}  # for a keeper that re-executes
        self._address = _address(self.environ.get("NOTIFY_SOCKET", ""))
        self._sock = _connected(self._address)
        self._queue: Deque[tuple[str, list[int]]] = deque()
        self._again_at, self._pause = 0.0, AGAIN_SECS[0]
        self._beat_secs = _beat_secs(self.environ) if self._sock else 0.0
        self._beat_at = time.monotonic() + self._beat_secs
        self._status = self._said = ""
        self._status_at = 0.0
        self._main = environ.get("SYSTEMD_EXEC_PID", str(os.getpid()))

    # ------------------------------------------------------------ what may be said

    def ready(self) -> None:
        """The server can be used (for the first time, or again after a reload)."""
        ours = str(os.getpid())
        self._say("READY=1" + ("" if self._main == ours else f"\nMAINPID={ours}"))  # started through a script, say

    def reloading(self) -> None:
        """A reload has begun; `ready` says that it is over, whichever way it went."""
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, within_secs: float = 0.0) -> None:
        """The server ends, and needs at most so long for it."""
        more = f"\nEXTEND_TIMEOUT_USEC={int(within_secs * 1e6)}" if within_secs > 0 else ""
        self._say("STOPPING=1" + more)

    def status(self, sentence: str) -> None:
        """Say in a line how things are; not more often than every `STATUS_SECS`."""
        if self._sock is not None:
            self._status = " ".join(sentence.split())
            self._tell_status()

    def store(self, name: str, fd: int) -> None:
        """Give the manager a copy of a descriptor."""
        if self._sock is not None:
            self._say(_store_words(name), fds=[fd])

    def remove(self, name: str) -> None:
        """Let the manager close its copy."""
        if self._sock is None:
            return
        waiting = next((each for each in self._queue if each[0] == _store_words(name)), None)
        if waiting is not None:  # it never got there
            self._queue.remove(waiting)
            _close(waiting[1])
        else:
            self._say(f"FDSTOREREMOVE=1\nFDNAME={fd_name(name)}", always=True)

    # ------------------------------------------------------------ our place in the keeper's loop

    @property
    def quiet(self) -> bool:
        """Whether everything was said; a keeper that executes another program forgets what was not."""
        return not self._queue

    @contextmanager
    def carried(self, environ: MutableMapping[str, str]) -> Iterator[None]:
        """Lend `environ` what the manager had put there, for a newer version of us that is executed in our place."""
        environ.update(self.environ)
        try:
            yield
        finally:  # it was not
            forget(environ)

    @property
    def due(self) -> list[float]:
        """When `work` has to be called next, in monotonic seconds; empty if it need not."""
        times = [self._beat_at] if self._beat_secs else []
        times += [self._status_at] if self._status != self._said else []
        return times + ([self._again_at] if self._queue else [])

    def work(self) -> None:
        """Do what is due; call it in every turn of the loop."""
        if self._sock is None:
            return
        now = time.monotonic()
        if self._beat_secs and now >= self._beat_at:
            self._beat_at = now + self._beat_secs
            self._say("WATCHDOG=1")
        self._tell_status()
        if self._queue and now >= self._again_at:
            self._flush()

    def close(self, within_secs: float = 1.0) -> None:
        """Say what is still to be said, for a moment, and hang up."""
        import select
        until = time.monotonic() + within_secs
        while self._queue and time.monotonic() < until:
            select.select((), (), (), 0.01)  # the end of a process: nothing else is waited for any more
            self._flush()
        while self._queue:
            _close(self._queue.popleft()[1])
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._beat_secs, self._said = 0.0, self._status

    # ------------------------------------------------------------ saying it

    def _tell_status(self) -> None:
        now = time.monotonic()
        if self._status != self._said and now >= self._status_at:
            self._said, self._status_at = self._status, now + STATUS_SECS
            self._say(f"STATUS={self._status}")

    def _say(self, words: str, fds: Sequence[int] = (), always: bool = False) -> None:
        if self._sock is not None and (always or len(self._queue) < QUEUE_MOST):
            try:
                self._queue.append((words, [os.dup(fd) for fd in fds]))
            except OSError:  # no room for another descriptor: the manager goes without this one
                return
            if len(self._queue) == 1:
                self._flush()

    def _flush(self) -> None:
        """Send what waits, in order, as far as it goes."""
        while self._queue and self._sock is not None:
            words, fds = self._queue[0]
            if not self._sent(words, fds):
                self._again_at = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, AGAIN_SECS[1])
                return
            self._pause = AGAIN_SECS[0]
            _close(fds)
            self._queue.popleft()

    def _sent(self, words: str, fds: list[int]) -> bool:
        """Send one message; return False if it has to be tried again later. A manager that is gone hears nothing."""
        import errno
        assert self._sock is not None
        try:
            self._sock.sendmsg([words.encode("utf-8", "replace")], rights(fds), socket.MSG_DONTWAIT)
        except OSError as e:
            # no room in its queue, or too many descriptors under way that nobody has received yet (unix(7))
            return e.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS, errno.EINTR)
        return True


# ---------------------------------------------------------------- the environment

def stored(environ: MutableMapping[str, str]) -> dict[str, int]:
    """Return the descriptors that the manager gave back, by name; close-on-exec from now on, and out of `environ`."""
    given = {name: environ.pop(name, "") for name in STORED}
    if given["LISTEN_PID"] != str(os.getpid()) or not given["LISTEN_FDS"].isdigit():
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(given["LISTEN_FDS"]))
    names = given["LISTEN_FDNAMES"].split(":")
    found: dict[str, int] = {}
    for fd, name in zip(fds, [*names, *[""] * len(fds)]):
        try:
            os.set_inheritable(fd, False)
        except OSError:
            continue
        if name in found:  # of two with one name the later was meant
            os.close(found[name])
        found[name] = fd
    return found


def forget(environ: MutableMapping[str, str]) -> None:
    """Take out of `environ` what a manager said to somebody else."""
    for name in (*OURS, *STORED):
        environ.pop(name, None)


def _store_words(name: str) -> str:
    return f"FDSTORE=1\nFDPOLL=0\nFDNAME={fd_name(name)}"


def fd_name(name: str) -> str:
    """Return `name` if it can be an FDNAME; raise `ValueError` if not: at most 255 of ASCII, no control, no colon."""
    if len(name) > NAME_MOST or ":" in name or not all(" " <= c < "\x7f" for c in name):
        raise ValueError(f"{name[:300]!r} cannot be the name of a stored descriptor")
    return name


def _address(text: str) -> str:
    """Return what `connect` takes: a path, or after `@` an abstract name; "" for what is neither (AF_VSOCK, say)."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else ""


def _connected(address: str) -> socket.socket | None:
    if not address:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.connect(address)
    except OSError:  # nobody is there to be told
        sock.close()
        return None
    return sock


def _beat_secs(environ: MutableMapping[str, str]) -> float:
    """Return how often to say that we live: twice in the time that the manager allows, 0 if it does not ask."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or pid not in ("", str(os.getpid())):
        return 0.0
    return int(usec) / 2e6


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
