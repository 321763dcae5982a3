"""One loop: descriptors, deadlines and signals all end in one `select`.

Owns:    the selector, the timers, the signal wake-up descriptor.
Runs in: the main thread of the core (`signal.set_wakeup_fd` works nowhere else).
Unaware: of what is watched and what a deadline is for.

Each turn: requests and signals first, then deadlines, then what was asked for with `soon` (a slice of
large work: scheduler.py), then bulk (output of agents) for a bounded time, then `end_of_turn`. So a
flood of output delays a request by at most one slice of bulk.

A mistake of ours in one of the calls costs that call and nothing else: it is logged once, and the loop goes on.
"""
from __future__ import annotations

import heapq
import selectors
import signal
import socket
import time
import traceback
from typing import Callable

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
BULK_SLICE = 0.0005  # seconds
PAUSE_SECS = 1.0     # before a descriptor's handler that failed is called again
TOLD_MOST = 100      # mistakes that are remembered, so that none is logged twice


class Watch:
    """A descriptor and whom to call; `bulk` ones wait until everything urgent is done."""

    __slots__ = ("active", "bulk", "call", "events", "fd", "later")

    def __init__(self, fd: int, events: int, call: Callable[[int], object], bulk: bool) -> None:
        self.fd, self.events, self.call, self.bulk, self.active = fd, events, call, bulk, True
        self.later: int | None = None  # its handler has failed; what is waited for after a pause


class Timer:
    """A deadline; `cancel` is final and cheap."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Forget the call; the entry itself goes when its time comes."""
        self.call = None


class Reactor:
    """See the module. `clock` is monotonic seconds and an argument, so that policy is testable without waiting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.turns = 0
        self.end_of_turn: Callable[[], None] = lambda: None
        self.say: Callable[[str], None] = lambda sentence: None
        self._told: set[tuple[str, str]] = set()
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._soon: list[Callable[[], None]] = []
        self._bulk: dict[int, Watch] = {}
        self._stopped = False
        self._signals: dict[int, Callable[[], None]] = {}
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self.watch(self._wake_in.fileno(), READ, self._on_wake)

    # ------------------------------------------------------------ descriptors

    def watch(self, fd: int, events: int, call: Callable[[int], object], bulk: bool = False) -> Watch:
        """Call `call(mask)` whenever `fd` is ready for `events`."""
        watch = Watch(fd, events, call, bulk)
        self._selector.register(fd, events, watch)
        return watch

    def change(self, watch: Watch, events: int) -> None:
        """Wait for other events on a watched descriptor; for none at all with 0."""
        if watch.later is not None:
            watch.later = events
            return
        if not watch.active or watch.events == events:
            return
        if not events:
            self._selector.unregister(watch.fd)
        elif not watch.events:
            self._selector.register(watch.fd, events, watch)
        else:
            self._selector.modify(watch.fd, events, watch)
        watch.events = events

    def unwatch(self, watch: Watch | None) -> None:
        """Forget a descriptor; call it before the descriptor is closed."""
        if watch is not None and watch.active:
            watch.active = False
            self._bulk.pop(watch.fd, None)
            if watch.events:
                self._selector.unregister(watch.fd)

    # ------------------------------------------------------------ deadlines

    def at(self, when: float, call: Callable[[], None]) -> Timer:
        """Call `call()` once, when `clock()` reaches `when`."""
        timer = Timer(when, call)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, timer))
        return timer

    def after(self, secs: float, call: Callable[[], None]) -> Timer:
        """Call `call()` once, `secs` from now."""
        return self.at(self.clock() + secs, call)

    def _until_next(self) -> float | None:
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - self.clock()) if self._timers else None

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.clock():
            timer = heapq.heappop(self._timers)[2]
            call, timer.call = timer.call, None
            if call is not None:
                self.guard("a deadline", call)

    def soon(self, call: Callable[[], None]) -> None:
        """Call `call()` once in this turn, or in the next one if this turn has come further; the loop does not sleep
        before that."""
        self._soon.append(call)

    def _run_soon(self) -> None:
        calls, self._soon = self._soon, []
        for call in calls:
            self.guard("a call that was due in this turn", call)

    # ------------------------------------------------------------ signals

    def on_signal(self, number: int, call: Callable[[], None]) -> None:
        """Call `call()` in the loop, never inside the signal handler (signal-safety(7))."""
        self._signals[number] = call
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
        signal.set_wakeup_fd(self._wake_out.fileno(), warn_on_full_buffer=False)

    def _on_wake(self, _mask: int) -> None:
        for number in dict.fromkeys(self._wake_in.recv(4096)):
            call = self._signals.get(number)
            if call is not None:
                self.guard("the handler of a signal", call)

    # ------------------------------------------------------------ mistakes

    def guard(self, what: str, call: Callable[..., object], *args: object) -> bool:
        """Call; if that fails, log it and go on. Return whether it went well."""
        try:
            call(*args)
        except Exception as e:
            self.mistake(what, e)
            return False
        return True

    def mistake(self, what: str, error: Exception) -> None:
        """Log that something failed, if it has not been logged before: what fails once may fail in every turn."""
        try:
            last = traceback.extract_tb(error.__traceback__)[-1:]
            key = what, f"{type(error).__name__} {[(place.filename, place.lineno) for place in last]}"
            if key not in self._told:
                if len(self._told) >= TOLD_MOST:
                    self._told.clear()
                self._told.add(key)
                said = "".join(traceback.format_exception(type(error), error, error.__traceback__))
                self.say(f"{what} failed, and the server goes on without; the same is not told again: {said}")
        except Exception:  # no memory even for that
            pass

    # ------------------------------------------------------------ the loop

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopped:
            self.turn()

    def turn(self, wait: bool = True) -> None:
        """Do what is ready, after waiting for it until the next deadline."""
        self.turns += 1
        timeout = 0.0 if self._bulk or self._soon or not wait else self._until_next()
        for key, mask in self._selector.select(timeout):
            watch: Watch = key.data
            if watch.bulk:
                self._bulk[watch.fd] = watch
            elif watch.active:
                self._call(watch, mask)
        if self._timers:
            self._run_timers()
        if self._soon:
            self._run_soon()
        if self._bulk:
            self._run_bulk()
        self.guard("the end of a turn", self.end_of_turn)

    def _run_bulk(self) -> None:
        """One chunk per descriptor, in order of arrival, for at most one slice; the rest keeps its place."""
        until = self.clock() + BULK_SLICE
        for fd in list(self._bulk):
            watch = self._bulk.pop(fd, None)
            if watch is not None and watch.active:
                self._call(watch, READ)
                if self.clock() >= until:
                    return

    def _call(self, watch: Watch, mask: int) -> None:
        """Call whom a descriptor belongs to. If that fails, it is called again after a pause: what failed for lack of
        memory or descriptors then goes on, and what always fails costs a call a second."""
        try:
            watch.call(mask)
        except Exception as e:
            self.mistake("the handler of a descriptor", e)
            if watch.active and watch.later is None:
                events = watch.events
                self.change(watch, 0)
                watch.later = events
                self.after(PAUSE_SECS, lambda: self._resume(watch))

    def _resume(self, watch: Watch) -> None:
        events, watch.later = watch.later or 0, None
        self.change(watch, events)

    def stop(self) -> None:
        """Leave `run` after this turn."""
        self._stopped = True

    def close(self) -> None:
        """Close what the reactor itself opened."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
