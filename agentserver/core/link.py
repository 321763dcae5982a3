"""The other end of the core's Unix socket: how clients talk to a core.

Owns:    finding and dialling `core.sock`, and the line link for clients, over any route. The shell's is framelink.py.
Runs in: a client; each link belongs to one thread.
Unaware: of what a message means, and of whether asking again is safe (it is: the core knows request ids).
"""
from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Protocol, Sequence, Tuple
from weakref import WeakSet

from ..errors import LinkError, RequestError, RequestTimeout
from ..wire import MAX_WIRE
from .audience import Audience, Listener, parsed
from .framing import LineDecoder

Json = Dict[str, Any]
Frame = Tuple[int, bytes, bytes]

_PIECE = 128 * 1024        # bytes per recv
_QUICK_MS = 50             # nearly every reply is there by then; a wake-up may be noticed this much later
_LONGEST_SECS = 1e9        # what may be given as the time of a client has no bound
_AT_ONCE_SECS = 0.01       # a request that left so soon has taken nothing of the time for its reply
_AGAIN_MS = 20             # between two tries to reach a core that is being started again
_LONGEST_PATH = 107 if sys.platform.startswith("linux") else 103  # unix(7)
_TIMEVAL = struct.Struct("@ll")


class NotThere(LinkError):
    """Nothing is there that could come back by itself: no socket file, no such host."""


class Link(Protocol):
    """What a client needs of a way to a server; used by one thread."""

    #: after so many seconds without a reply the request is better sent again; `inf` where a dead peer is noticed
    attempt_secs: float

    def request(self, raw: bytes, timeout: float) -> bytes:
        """Return the reply; raise `RequestTimeout`, or `LinkError` when the server is not reached."""

    def subscribe(self, topics: Sequence[str], since: Optional[int] = None, timeout: float = 10.0,
                  endpoint: str = "") -> Json:
        """Listen to these topic prefixes from now on, instead of those before; `endpoint` is where they are told.

        Returns what confirms it, or nothing where nothing does."""

    def next_event(self, timeout: Optional[float]) -> Optional[Json]:
        """Return the next event or `None` after `timeout` seconds (`None`: wait for ever); `LinkError` if cut off."""

    @property
    def event_fd(self) -> int:
        """Readable when an event may be there; only meaningful after `next_event(0)` returned `None`."""

    def listener(self) -> Link:
        """Return another link to the same server, for who wants to listen in the same thread; the caller closes it."""

    def close(self) -> None:
        """Let go of every descriptor; of those that are shared, when the last one closes."""


def socket_path(state_dir: str) -> str:
    """Return where the core of this state directory listens."""
    return os.path.join(state_dir, "core.sock")


def dial(path: str) -> socket.socket:
    """Return a blocking socket connected to `path`; raise `NotThere` or `LinkError`. Never waits."""
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as e:  # out of descriptors or memory, maybe for a moment
        raise LinkError(f"no socket can be made to reach the server at {path} ({e.strerror}); try again") from None
    try:
        sock.setblocking(False)
        _connect(sock, path)
        sock.setblocking(True)
    except (FileNotFoundError, NotADirectoryError):
        sock.close()
        raise NotThere(f"no server runs at {path} (there is no such socket); "
                       "start one with: agentserver serve") from None
    except PermissionError:
        sock.close()
        raise NotThere(f"the server at {path} belongs to another user, and you may not connect to it") from None
    except BlockingIOError:
        sock.close()
        raise LinkError(f"the server at {path} has too many callers waiting; try again") from None
    except OSError as e:
        sock.close()
        raise LinkError(f"the server at {path} does not answer ({e.strerror or e}); "
                        "if it does not come back, start one with: agentserver serve") from None
    return sock


def _connect(sock: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        return sock.connect(path)
    if not sys.platform.startswith("linux"):
        raise OSError(f"the path has more than {_LONGEST_PATH} bytes; use a shorter state directory")
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


# ---------------------------------------------------------------- clients: lines

class Route(Protocol):
    """How a client's line link gets a connection, and what there is to say when it breaks."""

    #: what sentences call the other end
    name: str
    #: whether a connection is dear, so that who listens shares that of who asks
    shared: bool
    #: how many lines may come before the protocol begins: what a login shell on the way prints
    preamble: int

    def dial(self) -> socket.socket:
        """Return a blocking stream socket at whose other end the protocol is spoken, or raise `LinkError`."""

    def broke(self, why: str, heard: bool) -> LinkError:
        """Return what to tell of a connection that broke; `heard`: after something had been received."""

    def hang_up(self, heard: bool) -> None:
        """Let go of what belonged to the connection, whose socket is closed."""


class LocalRoute:
    """The core's own Unix socket."""

    shared = False
    preamble = 0

    def __init__(self, path: str) -> None:
        self._path = path
        self.name = f"the server at {path}"

    def dial(self) -> socket.socket:
        """See `Route`."""
        return dial(self._path)

    def broke(self, why: str, heard: bool) -> LinkError:
        """See `Route`."""
        return _broke(self, why)

    def hang_up(self, heard: bool) -> None:
        """See `Route`."""


def _broke(route: Route, why: str) -> LinkError:
    return LinkError(f"the link to {route.name} broke: {why}")


class Incoming:
    """Cuts the lines of one connection, from where the protocol begins; sans-IO."""

    def __init__(self, preamble: int) -> None:
        self._decoder = LineDecoder(MAX_WIRE)
        self._preamble = preamble
        self.heard = False

    def feed(self, data: bytes) -> List[Optional[bytes]]:
        """Return the lines that `data` completes, without what was printed before the protocol began."""
        lines = self._decoder.feed(data)
        while lines and not self.heard:
            self.heard = (lines[0] or b"").startswith(b"{") or not self._preamble
            if not self.heard:
                self._preamble -= 1
                del lines[0]
        return lines


class _Lines:
    """One connection that speaks lines. Timeouts are the kernel's, so that a request is two system calls."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._incoming = Incoming(route.preamble)
        self.sock = route.dial()
        self._lines: Deque[Optional[bytes]] = deque()
        self._limits: Dict[int, float] = {}

    def _limit(self, option: int, secs: Optional[float]) -> None:
        secs = 0.0 if secs is None else min(max(secs, 0.001), _LONGEST_SECS)  # to the kernel 0 means for ever
        if self._limits.get(option) != secs:
            self.sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(secs), int(secs % 1 * 1_000_000)))
            self._limits[option] = secs

    def send(self, raw: bytes, timeout: float) -> None:
        until, left = time.monotonic() + timeout, memoryview(raw + b"\n")
        self._limit(socket.SO_SNDTIMEO, timeout)
        try:
            while left := left[self.sock.send(left):]:
                if time.monotonic() > until:  # it takes a little, again and again
                    raise BlockingIOError
        except BlockingIOError:
            raise RequestTimeout(f"{self._route.name} took no request for {timeout:g} s") from None
        except OSError as e:
            raise self._cut(e.strerror or str(e)) from None

    def receive(self, timeout: Optional[float]) -> Optional[bytes]:
        """Return the next line, or `None` when none is complete after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._lines:
            if not self._fill(timeout):
                return None
            if not self._lines and deadline is not None:  # some of it has come
                timeout = max(deadline - time.monotonic(), 0.0)
        line = self._lines.popleft()
        if line is None:
            raise LinkError(f"{self._route.name} sent a line of more than {MAX_WIRE} bytes")
        return line

    def _fill(self, timeout: Optional[float]) -> bool:
        try:
            if timeout is not None and timeout <= 0:
                data = self.sock.recv(_PIECE, socket.MSG_DONTWAIT)
            else:
                self._limit(socket.SO_RCVTIMEO, timeout)
                data = self.sock.recv(_PIECE)
        except BlockingIOError:
            return False
        except OSError as e:
            raise self._cut(e.strerror or str(e)) from None
        if not data:
            raise self._cut("it closed the connection")
        self._lines += self._incoming.feed(data)
        return True

    @property
    def heard(self) -> bool:
        """Whether the protocol has begun."""
        return self._incoming.heard

    def _cut(self, why: str) -> LinkError:
        return self._route.broke(why, self.heard)


class _Trunk:
    """One connection, made when it is needed; requests go over it, and all who listen share it."""

    def __init__(self, route: Route) -> None:
        self.route = route
        self.audience = Audience()
        self.users: WeakSet[LineLink] = WeakSet()   # one that was forgotten uses nothing
        self._lines: Optional[_Lines] = None
        self._pid = 0

    def ask(self, raw: bytes, timeout: float) -> bytes:
        """Return the line that answers a line. After any failure the next call connects anew."""
        lines = self._mine()
        if lines is None:
            lines, self._pid = _Lines(self.route), os.getpid()
            self._lines = lines
        began = time.monotonic()
        try:
            lines.send(self.audience.fewer() + raw, timeout)
            took = time.monotonic() - began
            if took > _AT_ONCE_SECS:  # else one system call more would be all that it brings
                timeout = max(timeout - took, 0.001)
            reply = lines.receive(timeout) if self.audience.quiet else self._sorted(lines, timeout)
        except BaseException:  # Ctrl-C too: what comes later would be taken for the next reply
            self.drop()
            raise
        if reply is None:
            self.drop()
            raise RequestTimeout(f"{self.route.name} did not answer within {timeout:g} s")
        return reply

    def _mine(self) -> Optional[_Lines]:
        """Return the connection, if there is one. After a fork(2) it is the parent's: what it is told is not for us."""
        if self._lines is not None and self._pid != os.getpid():
            self._lines.sock.close()   # ends only our hold of it
            self._lines, self.audience = None, Audience()
        return self._lines

    def _sorted(self, lines: _Lines, timeout: float) -> Optional[bytes]:
        """Return the next reply, also from among events; `None` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            line = lines.receive(max(deadline - time.monotonic(), 0.001))
            if line is None:
                return None
            reply = self.audience.sort(line)
            if reply is not None:
                return reply

    def listen(self, timeout: Optional[float]) -> bool:
        """Take in one event; return whether one came within `timeout` seconds."""
        lines = self._mine()
        if lines is None:
            raise _broke(self.route, "it was closed meanwhile")
        try:
            line = lines.receive(timeout)
            if line is not None and self.audience.sort(line) is not None:
                raise LinkError(f"{self.route.name} sent what is neither an event nor the reply to a request")
        except BaseException:
            self.drop()
            raise
        return line is not None

    @property
    def fd(self) -> int:
        """The descriptor of the connection; -1 while there is none."""
        return self._lines.sock.fileno() if self._lines else -1

    def drop(self) -> None:
        """Close the connection; who listens has to subscribe again."""
        lines, self._lines = self._lines, None
        self.audience = Audience()
        if lines is not None:
            lines.sock.close()
            self.route.hang_up(lines.heard)


class LineLink:
    """A client's way to a core, by lines. Links that were made by `listener` may share one connection."""

    attempt_secs = float("inf")

    def __init__(self, path: str = "", trunk: Optional[_Trunk] = None) -> None:
        self._trunk = trunk or _Trunk(LocalRoute(path))
        self._listener: Optional[Listener] = None
        self._audience: Optional[Audience] = None   # that the listener belongs to: another one after a new connection

    @classmethod
    def over(cls, route: Route) -> LineLink:
        """Return a link that goes another way than over a local socket."""
        return cls(trunk=_Trunk(route))

    def listener(self) -> LineLink:
        """Return another link to the same server, for the same thread, which the caller closes."""
        return LineLink(trunk=self._trunk) if self._trunk.route.shared else LineLink.over(self._trunk.route)

    def request(self, raw: bytes, timeout: float) -> bytes:
        """Send one line and return the line that answers it. After any failure the next call connects anew."""
        if b"\n" in raw:
            raise RequestError("a message for a server on this link is one line; send it without line breaks")
        self._trunk.users.add(self)
        return self._trunk.ask(raw, timeout)

    def subscribe(self, topics: Sequence[str], since: Optional[int] = None, timeout: float = 10.0,
                  endpoint: str = "") -> Json:
        """Listen to these topic prefixes; return the `subscribe_response`."""
        self._leave()
        listener, audience = Listener(topics, since), self._trunk.audience
        reply = parsed(self.request(audience.join(listener), timeout))
        if not reply.get("success"):
            audience.leave(listener)
            raise RequestError(str(reply.get("error")), str(reply.get("error_code") or ""), reply)
        self._listener, self._audience = listener, audience
        return reply

    def next_event(self, timeout: Optional[float]) -> Optional[Json]:
        """Return the next event, `None` after `timeout` seconds; raise `LinkError` when the connection was lost."""
        listener = self._listener
        if listener is None:
            raise LinkError("nothing is subscribed on this link; call subscribe first")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            event = listener.next()
            if event is not None:
                return event
            if listener.missed or self._audience is not self._trunk.audience:
                raise self._lost(listener)
            try:
                if not self._trunk.listen(timeout):
                    return None
            except BaseException:
                self._leave()
                raise
            timeout = None if deadline is None else max(deadline - time.monotonic(), 0.0)

    def _lost(self, listener: Listener) -> LinkError:
        self._leave()
        if listener.missed:
            return LinkError(f"{self._trunk.route.name} told more than was listened to; subscribe again")
        return _broke(self._trunk.route, "it was closed meanwhile")

    @property
    def event_fd(self) -> int:
        """The descriptor that events come by; -1 while nothing is subscribed."""
        return self._trunk.fd if self._listener else -1

    def _leave(self) -> None:
        if self._listener is not None and self._audience is not None:
            self._audience.leave(self._listener)
        self._listener = self._audience = None

    def close(self) -> None:
        """Close the connection, unless others use it."""
        self._leave()
        self._trunk.users.discard(self)
        if not self._trunk.users:
            self._trunk.drop()
