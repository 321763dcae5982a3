"""Questions about output that processes of their own answer, a few at once; the others wait their turn.

Owns:    those processes, from their start to their end, and the line of questions that wait.
Runs in: the core's thread; nothing here waits for a process, and each is ended when its time is over.
Unaware: of requests and replies, and of what the answer says. The other side is query.py.

Round-robin: a client with many queued searches waits behind clients with few. When too many are queued, the client with
the most of them loses its last one, so that another client always gets in.
"""
from __future__ import annotations

import json
import signal
import socket
from collections import deque
from typing import Callable, Deque, Iterable, Sequence, Union

from ..config import ServerConfig
from ..errors import RequestError
from ..wire import Json, encode
from . import process, tree
from .output import OutputLog
from .process import Ended
from .reactor import READ, Reactor, Timer, Watch

PIECE = 256 * 1024   # bytes of an answer read at once
WAITING_MOST = 100   # questions
LIFE_SECS = 10.0     # of a process, beside the time for its pattern: for a disk that is slow
FOUND = b"+"         # see query.py

#: gets the answer, a JSON object, or what went wrong
Answered = Callable[[Union[bytes, RequestError]], None]


class _Query:
    """One question, and the process that works on it once there is one."""

    __slots__ = ("answered", "by", "parts", "pid", "question", "sock", "timer", "until", "watch")

    def __init__(self, question: bytes, by: str, answered: Answered) -> None:
        self.question, self.by, self.answered = question, by, answered
        self.parts: list[bytes] = []   # of the answer
        self.pid, self.until = 0, 0.0
        self.sock: socket.socket | None = None
        self.watch: Watch | None = None
        self.timer: Timer | None = None


class Queries:
    """See the module. `children` is where the end of a child that is no agent's is looked up."""

    def __init__(self, reactor: Reactor, children: dict[int, Callable[[Ended], None]], config: ServerConfig) -> None:
        self._reactor, self._children = reactor, children
        self._most, self._pattern_secs, self._bytes = config.queries, config.pattern_timeout_secs, config.message_bytes
        self._argv = [process.program()[0], "-S", *process.program()[1:], "_query"]  # it needs nobody's packages
        self._running: set[_Query] = set()
        self._waiting: dict[str, Deque[_Query]] = {}  # by asker; whose turn comes first is first

    # ------------------------------------------------------------ asking

    def ask(self, output: OutputLog, streams: Sequence[str], what: Json, by: str,
            answered: Answered) -> Callable[[], None]:
        """Begin to answer a question about the output so far; `answered` is called later, once.

        Return what to call when nobody wants the answer any more. Raises `RequestError` when there are too many."""
        question = {"directory": output.directory, "streams": streams, "most": self._bytes,
                    "pattern_secs": self._pattern_secs, "life_secs": self._pattern_secs + LIFE_SECS + 1.0, **what}
        query = _Query(encode(question) + b"\n", by, answered)
        if len(self._running) < self._most:
            self._start(query)
        else:
            self._line_up(query)
        return lambda: self._drop(query)

    def _line_up(self, query: _Query) -> None:
        """Let a question wait for its turn; one is refused if there are too many: of the client that has the most."""
        line = self._waiting.setdefault(query.by, deque())
        line.append(query)
        if sum(map(len, self._waiting.values())) <= WAITING_MOST:
            return
        longest = max(self._waiting.values(), key=len)
        refusal = RequestError(f"{WAITING_MOST} searches in output are waiting already; ask again when some of them "
                               "are answered", "rate_limited")
        if len(longest) > len(line):
            longest.pop().answered(refusal)
            return
        self._leave(query)
        raise refusal

    def _start(self, query: _Query) -> None:
        ours, theirs = socket.socketpair()
        try:
            query.pid = process.start(self._argv, {0: theirs.fileno()}, session=False)
        except OSError as e:
            ours.close()
            raise RequestError(f"no process can be started to search the output: {e.strerror}; ask again later",
                               "unavailable") from None
        finally:
            theirs.close()
        ours.setblocking(False)
        query.sock = ours
        query.watch = self._reactor.watch(ours.fileno(), READ, lambda _mask: self._read(query), bulk=True)
        query.until = self._reactor.clock() + self._pattern_secs + LIFE_SECS
        query.timer = self._reactor.at(query.until, lambda: self._kill(query))
        tree.unshield(query.pid)
        self._children[query.pid] = lambda ended: self._ended(query, ended)
        self._running.add(query)
        self._tell(query)

    def _kill(self, query: _Query) -> None:
        process.send(query.pid, signal.SIGKILL)  # not reaped yet, or it would not be among those that run

    def _tell(self, query: _Query) -> None:
        assert query.sock is not None
        try:
            query.sock.send(query.question)  # it fits: a pattern and a path are bounded, and the socket is empty
        except OSError:  # it has ended already, and that is noticed
            pass

    # ------------------------------------------------------------ answers

    def _read(self, query: _Query) -> bool:
        """Take a piece of the answer; return whether there may be more."""
        assert query.sock is not None
        try:
            data = query.sock.recv(PIECE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._reactor.unwatch(query.watch)
        query.parts.append(data)
        return bool(data)

    def _ended(self, query: _Query, ended: Ended) -> None:
        """The process was reaped: what it said is in the socket, to the end."""
        while self._read(query):
            pass
        self._forget(query)
        self._running.discard(query)
        try:
            query.answered(self._outcome(query, ended))
        finally:
            self._next()

    def _outcome(self, query: _Query, ended: Ended) -> bytes | RequestError:
        said = b"".join(query.parts)
        if ended.code == 0:
            return said[len(FOUND):] if said.startswith(FOUND) else _refusal(said[len(FOUND):])
        if self._reactor.clock() >= query.until:  # ended by our timer, or if we stood still by its own
            return RequestError(f"the output could not be read within {LIFE_SECS:g} s; ask again, or read it in parts "
                                "with read_stdout or read_stderr", "timeout")
        if ended.signal == signal.SIGALRM:
            return RequestError(
                f"the pattern was still at work after {self._pattern_secs:g} s (pattern_timeout_secs); narrow it: give "
                "it a plain word to look for, and no repeats within repeats such as (a+)+; or ask for one stream only; "
                "or read the output with read_stdout or read_stderr and search it yourself",
                "pattern_too_slow")
        how = f"by {process.signal_name(ended.signal)}" if ended.signal else f"with exit code {ended.code}"
        return RequestError(f"the process that searched the output ended {how} before it was done; ask again",
                            "unavailable")

    def _forget(self, query: _Query) -> None:
        """Let go of the socket; a process that still runs is ended by that."""
        if query.timer is not None:
            query.timer.cancel()
        self._reactor.unwatch(query.watch)
        if query.sock is not None:
            query.sock.close()

    # ------------------------------------------------------------ turns

    def _next(self) -> None:
        while self._waiting and len(self._running) < self._most:
            by = next(iter(self._waiting))
            line = self._waiting.pop(by)
            query = line.popleft()
            if line:
                self._waiting[by] = line  # behind all others
            try:
                self._start(query)
            except RequestError as e:
                query.answered(e)

    def _drop(self, query: _Query) -> None:
        """Nobody wants this answer any more."""
        query.answered = lambda result: None
        if query in self._running:
            self._kill(query)
        else:
            self._leave(query)

    def _leave(self, query: _Query) -> None:
        line = self._waiting.get(query.by)
        if line is not None and query in line:
            line.remove(query)
            if not line:
                del self._waiting[query.by]

    def close(self, refusal: RequestError | None) -> None:
        """End all processes, at our own end; who waits is told `refusal`, or nothing where it will ask again."""
        for query in [*self._running, *_all(self._waiting.values())]:
            if query.pid:
                process.send(query.pid, signal.SIGKILL)
                del self._children[query.pid]
            self._forget(query)
            if refusal is not None:
                query.answered(refusal)
        self._running.clear()
        self._waiting.clear()


def _refusal(said: bytes) -> RequestError:
    try:
        why = json.loads(said)
        return RequestError(str(why["error"]), str(why["error_code"]))
    except (ValueError, TypeError, KeyError):  # of a program that was replaced on disk meanwhile by who knows what
        return RequestError("the process that searched the output gave no answer; reload the server, and ask again",
                            "unavailable")


def _all(lines: Iterable[Iterable[_Query]]) -> list[_Query]:
    return [query for line in lines for query in line]
