"""The hand: SIGKILL, SIGSTOP, cut wires, a full disk, reload, a dead keeper, at random moments.

Owns:    the server under test, finding its parts, every fault, and putting right what a fault has left.
Runs in: a thread of the chaos process.
Unaware: of clients and of what they expect.

It signals only parts of its own server: by pidfd, after the process behind it was seen to be a part (by its
last argument) of this very state directory (by the mark in its environment).
"""
from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

from accounting import Ledger, alive_with
from cables import Cables
from support import MARK, Server, parts_of

#: fault -> how often it comes, against the others
FAULTS = {"kill core": 10, "kill shell": 6, "kill both": 3, "kill core in take-over": 5, "stop core": 4,
          "stop shell": 2, "stop core, then kill it": 2, "stop keeper, kill core": 2, "cut connections": 6,
          "fill disk": 2, "reload": 4, "kill keeper": 3, "hang core": 0.7, "hang shell": 0.7, "suspend": 0.7,
          "delete registry": 1}
HANG_SECS = 60.0  # a part that stands still is replaced well within this; one that was still starting takes longest
PART_OF = {"keeper": b"serve", "core": b"_core", "shell": b"_shell"}


class Part:
    """A process of the server, held by pidfd so that it cannot become another."""

    def __init__(self, pid: int, fd: int, name: str, state_dir: Path) -> None:
        self.pid, self._fd, self._name, self._state_dir = pid, fd, name, state_dir

    def send(self, number: int) -> bool:
        """Signal it, if it is still there and still what it was."""
        try:
            if not _is(self.pid, self._name, self._state_dir):
                return False
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return False
        return True

    def lives(self) -> bool:
        """Whether it is still there and still what it was."""
        return _is(self.pid, self._name, self._state_dir)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def find(name: str, state_dir: Path, keeper: int) -> Optional[Part]:
    """Return a part of the server that lives in `state_dir`, or None if there is none now."""
    for pid in [keeper] if name == "keeper" else _children(keeper) or alive_with(MARK, str(state_dir)):
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue
        if not _unborn(pid) and _is(pid, name, state_dir):
            return Part(pid, fd, name, state_dir)
        os.close(fd)
    if name != "keeper":  # of a keeper that died
        for pid in alive_with(MARK, str(state_dir)):
            if not _unborn(pid) and _is(pid, name, state_dir):
                return Part(pid, os.pidfd_open(pid), name, state_dir)
    return None


def _children(pid: int) -> List[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _unborn(pid: int) -> bool:
    """Whether it may be a child of the core that has not become an agent yet, and so has the core's words and mark:
    such a one blocks all signals (glibc's posix_spawn), and so does the core for that moment."""
    try:
        return int(Path(f"/proc/{pid}/status").read_text().partition("\nSigBlk:")[2].split()[0], 16) != 0
    except (OSError, IndexError):
        return True


def _is(pid: int, name: str, state_dir: Path) -> bool:
    """Whether a process is that part, by its words and its mark."""
    word = PART_OF[name]
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return word in argv[-2:-1] + argv[2:3] and f"{MARK}={state_dir}".encode() in Path(
            f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except PermissionError:  # only root may read what a part was given
        return pid in parts_of(state_dir)
    except OSError:
        return False


class Hand(threading.Thread):
    """See the module. `faults` are the ones to use."""

    def __init__(self, state_dir: Path, flags: List[str], seed: int, faults: List[str], ledger: Ledger,
                 pace: float, say: Callable[[str], None]) -> None:
        super().__init__(name="hand", daemon=True)
        self._dice, self._pace, self._say = random.Random(f"{seed} hand"), pace, say
        self._flags, self._ledger = flags, ledger
        self.state_dir, self.faults = state_dir, faults
        self.server = Server(state_dir, *flags)
        self.endpoint, self.pub_endpoint = self.server.endpoint, self.server.pub_endpoint
        self.cables: Optional[Cables] = None
        self.done: Dict[str, int] = {}
        self._over = threading.Event()
        self.failed = ""
        self._fostered = 0  # the core that a new keeper found

    # ------------------------------------------------------------ the parts

    def part(self, name: str) -> Optional[Part]:
        """Return a part of the server, waiting a moment for one that is being started."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            found = find(name, self.state_dir, self.server.process.pid)
            if found is not None:
                return found
            time.sleep(0.002)
        return None

    def signal(self, name: str, *numbers: int, pause: float = 0.0) -> bool:
        """Signal a part, with a pause between two signals."""
        part = self.part(name)
        if part is None:
            return False
        for n, number in enumerate(numbers):
            time.sleep(pause if n else 0)
            sent = part.send(number)
        part.close()
        return sent

    # ------------------------------------------------------------ the faults

    def run(self) -> None:
        """Do harm until told to end."""
        weights = [FAULTS[fault] for fault in self.faults]
        try:
            while not self._over.wait(self._dice.expovariate(1 / self._pace)):
                self.do(self._dice.choices(self.faults, weights)[0])
        except Exception:
            import traceback
            self.failed = traceback.format_exc()
            self._ledger.loss("no answer", f"the hand failed: {self.failed}\n{self.server.logs()}")

    def end(self) -> None:
        """Do no more harm."""
        self._over.set()
        self.join(120)

    def do(self, fault: str) -> None:
        """One fault."""
        self._say(f"  {fault}")
        begun = time.monotonic()
        if getattr(self, "_" + fault.replace(",", "").replace("-", "").replace(" ", "_"))():
            self.done[fault] = self.done.get(fault, 0) + 1
        if "keeper" in fault or "suspend" in fault:  # it tells the core of ends, and stood still or was not there
            self._ledger.away.append([begun, time.monotonic()])
        if self._ledger.fostered and self._ledger.fostered[-1][1] == float("inf"):
            self._note_next_core()

    def _note_next_core(self) -> None:
        """A core that the keeper started itself is its child, and so are then the agents that such a core leaves."""
        core = self.part("core")
        if core is not None and core.pid != self._fostered:
            self._ledger.fostered[-1][1] = time.monotonic() + 0.5
        if core is not None:
            core.close()

    def _kill_core(self) -> bool:
        return self.signal("core", signal.SIGKILL)

    def _kill_shell(self) -> bool:
        return self.signal("shell", signal.SIGKILL)

    def _kill_both(self) -> bool:
        both = self._dice.sample(["core", "shell"], 2)
        return all([self.signal(name, signal.SIGKILL) for name in both])

    def _kill_core_in_takeover(self) -> bool:
        """Kill the core, and each of its next successors some moment after it was started."""
        self.signal("core", signal.SIGKILL)
        for _ in range(self._dice.choice((1, 1, 2))):
            part = self.part("core")
            if part is None:
                return False
            time.sleep(self._dice.random() * 0.25)
            part.send(signal.SIGKILL)
            part.close()
        return True

    def _stop_core(self) -> bool:
        return self.signal("core", signal.SIGSTOP, signal.SIGCONT, pause=self._dice.random() * 1.5)

    def _stop_shell(self) -> bool:
        return self.signal("shell", signal.SIGSTOP, signal.SIGCONT, pause=self._dice.random() * 1.5)

    def _hang_core(self) -> bool:
        return self._hang("core")

    def _hang_shell(self) -> bool:
        return self._hang("shell")

    def _hang(self, name: str) -> bool:
        """Stop a part and never continue it: the keeper has to see that, and to replace it."""
        part = self.part(name)
        if part is None or not part.send(signal.SIGSTOP):
            return False
        until = time.monotonic() + HANG_SECS
        while part.lives() and time.monotonic() < until:
            time.sleep(0.01)
        if part.send(signal.SIGCONT):
            self._ledger.loss("no answer", f"a {name} that was stopped for {HANG_SECS:g} s was not replaced")
        part.close()
        return True

    def _suspend(self) -> bool:
        """Stop all parts, as Ctrl-Z does; afterwards each goes on, however long it was: none of them has hung."""
        parts = [part for part in map(self.part, PART_OF) if part is not None]
        for part in parts:
            part.send(signal.SIGSTOP)
        time.sleep(self._dice.choice((1.0, 13.0)))
        for part in parts:
            part.send(signal.SIGCONT)
        time.sleep(1.0)  # for a keeper that draws the wrong conclusion
        for part in parts:
            if not part.lives():
                self._ledger.loss("wrong", f"pid {part.pid}, one of {list(PART_OF)}, was replaced after all parts were "
                                           "suspended together")
            part.close()
        return len(parts) == len(PART_OF)

    def _delete_registry(self) -> bool:
        """Take the registry's files away under a core that lives: it has to notice, and to write them anew."""
        try:
            self.server.ask({"type": "health_check_request"})
        except (OSError, ValueError):
            return False  # without a core nobody has them open: what was in them only is lost
        path = self.state_dir / "registry.db"
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        until = time.monotonic() + HANG_SECS
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        if not path.exists():
            self._ledger.loss("missing", "the registry was deleted and not written anew")
        return True

    def _stop_core_then_kill_it(self) -> bool:
        return self.signal("core", signal.SIGSTOP, signal.SIGKILL, pause=self._dice.random())

    def _stop_keeper_kill_core(self) -> bool:
        keeper = self.part("keeper")
        if keeper is None:
            return False
        keeper.send(signal.SIGSTOP)
        try:
            time.sleep(self._dice.random() * 0.5)
            done = self.signal("core", signal.SIGKILL)
            time.sleep(self._dice.random() * 0.5)
        finally:
            keeper.send(signal.SIGCONT)
            keeper.close()
        return done

    def _cut_connections(self) -> bool:
        assert self.cables is not None
        self.cables.cut(self._dice.choice((0.3, 1.0)))
        return True

    def _fill_disk(self) -> bool:
        """Take all space of the small disk that the state directory is on, for a moment."""
        ballast = self.state_dir.parent / "ballast"
        window = [time.monotonic(), float("inf")]
        self._ledger.disk.append(window)
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        size = 1 << 20
        while size >= 4096:
            try:
                os.posix_fallocate(fd, os.fstat(fd).st_size, size)
            except OSError:
                size //= 4
        time.sleep(self._dice.random() * 1.5)
        os.close(fd)
        ballast.unlink()
        until = time.monotonic() + 30
        while not self._can_write() and time.monotonic() < until:
            time.sleep(0.05)
        window[1] = time.monotonic() + 0.5
        return True

    def _can_write(self) -> bool:
        """Whether the core remembers again; a refusal for want of disk has the code `unavailable`."""
        try:
            reply = self.server.ask({"type": "spawn_request", "config": {"command": ["/no/such/program"]}})
        except (OSError, ValueError):
            return False
        return bool(reply["error_code"] == "spawn_failed")

    def _reload(self) -> bool:
        return self.signal("keeper", signal.SIGHUP)

    def _kill_keeper(self) -> bool:
        """Kill the keeper while there is a core that has everything; perhaps more happens before a new serve comes."""
        try:
            self.server.ask({"type": "health_check_request"})
        except (OSError, ValueError):
            return False  # all of us dead at once is another promise
        if not self.signal("keeper", signal.SIGKILL):
            return False
        core = self.part("core")
        self._fostered = core.pid if core else 0
        if core:
            core.close()
        self._ledger.fostered.append([time.monotonic(), float("inf")])
        self.server.process.wait()
        if self.server.process.stdout:
            self.server.process.stdout.close()
        time.sleep(self._dice.random() * 0.5)
        self.server = Server(self.state_dir, *self._flags, endpoint=self.endpoint, pub_endpoint=self.pub_endpoint)
        return True
