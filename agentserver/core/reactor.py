"""One loop: descriptors, deadlines and signals all end in one `select`.

Owns:    the selector, the timers, the signal wake-up descriptor.
Runs in: the main thread of the core (`signal.set_wakeup_fd` works nowhere else).
Unaware: of what is watched and what a deadline is for.

Each turn: requests and signals first, then deadlines, then what was asked for with `soon` (a slice of
large work: scheduler.py), then bulk (output of agents) for a bounded time, then `end_of_turn`. So a
flood of output delays a request by at most one slice of bulk.
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


class Watch:
    """A descriptor and whom to call; `bulk` ones wait until everything urgent is done."""

    __slots__ = ("active", "bulk", "call", "events", "fd")

    def __init__(self, fd: int, events: int, call: Callable[[int], object], bulk: bool) -> None:
        self.fd, self.events, self.call, self.bulk, self.active = fd, events, call, bulk, True


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
        self.end_of_turn: Callable[[], None] = lambda: None
        self.say: Callable[[str], None] = lambda sentence: None
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
                try:
                    call()
                except Exception:
                    self.say("a deadline failed and is dropped: " + traceback.format_exc())

    def soon(self, call: Callable[[], None]) -> None:
        """Call `call()` once in this turn, or in the next one if this turn has come further; the loop does not sleep
        before that."""
        self._soon.append(call)

    def _run_soon(self) -> None:
        calls, self._soon = self._soon, []
        for call in calls:
            try:
                call()
            except Exception:
                self.say("a call that was due in this turn failed and is dropped: " + traceback.format_exc())

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
                try:
                    call()
                except Exception:
                    self.say("a deadline failed and is dropped: " + traceback.format_exc())

    # ------------------------------------------------------------ the loop

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopped:
            self.turn()

    def turn(self, wait: bool = True) -> None:
        """Do what is ready, after waiting for it until the next deadline."""
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
        self.end_of_turn()

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
        """Call whom a descriptor belongs to. A mistake of ours there costs that descriptor, never the loop."""
        try:
            watch.call(mask)
        except Exception:
            self.say("a descriptor's handler failed and is not called again: " + traceback.format_exc())
            self.unwatch(watch)

    def stop(self) -> None:
        """Leave `run` after this turn."""
        self._stopped = True

    def close(self) -> None:
        """Close what the reactor itself opened."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
