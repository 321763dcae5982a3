"""The other end of the core's Unix socket: how local clients and the shell talk to a core.

Owns:    finding and dialling `core.sock`, one line link for clients, one frame link for the shell.
Runs in: a client or the shell; each link belongs to one thread.
Unaware: of what a message means, and of whether asking again is safe (it is: the core knows request ids).
"""
from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from typing import Any, Deque, Dict, List, Optional, Protocol, Sequence, Tuple

from ..errors import LinkError, RequestError, RequestTimeout
from ..wire import MAX_WIRE, encode, new_id
from .framing import PREFACE, FrameDecoder, FramingError, LineDecoder, frame

Json = Dict[str, Any]
Frame = Tuple[int, bytes, bytes]

_PIECE = 128 * 1024        # bytes per recv
_QUICK_MS = 50             # nearly every reply is there by then; a wake-up may be noticed this much later
_AGAIN_MS = 20             # between two tries to reach a core that is being started again
_LONGEST_PATH = 107 if sys.platform.startswith("linux") else 103  # unix(7)
_TIMEVAL = struct.Struct("@ll")


class NotThere(LinkError):
    """Nothing is there that could come back by itself: no socket file, no such host."""


class Link(Protocol):
    """What a client needs of a way to a server; used by one thread."""

    #: after so many seconds without a reply the request is better sent again; `inf` where a dead peer is noticed
    attempt_secs: float
    #: how often a follower looks at the truth without having been told to
    recheck_secs: float

    def request(self, raw: bytes, timeout: float) -> bytes:
        """Return the reply; raise `RequestTimeout`, or `LinkError` when the server is not reached."""

    def subscribe(self, topics: Sequence[str], since: Optional[int] = None, timeout: float = 10.0) -> Json:
        """Listen to these topic prefixes from now on, instead of those before."""

    def next_event(self, timeout: Optional[float]) -> Optional[Json]:
        """Return the next event or `None` after `timeout` seconds (`None`: wait for ever); `LinkError` if cut off."""

    @property
    def event_fd(self) -> int:
        """Readable when an event may be there; only meaningful after `next_event(0)` returned `None`."""

    def close(self) -> None:
        """Let go of every descriptor."""


def socket_path(state_dir: str) -> str:
    """Return where the core of this state directory listens."""
    return os.path.join(state_dir, "core.sock")


def dial(path: str) -> socket.socket:
    """Return a blocking socket connected to `path`; raise `NotThere` or `LinkError`. Never waits."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
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


# ---------------------------------------------------------------- local clients: lines

class _Lines:
    """One connection that speaks lines. Timeouts are the kernel's, so that a request is two system calls."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.sock = dial(path)
        self._decoder = LineDecoder(MAX_WIRE)
        self._lines: Deque[Optional[bytes]] = deque()
        self._limits: Dict[int, float] = {}

    def _limit(self, option: int, secs: Optional[float]) -> None:
        secs = 0.0 if secs is None else max(secs, 0.001)  # to the kernel 0 means for ever
        if self._limits.get(option) != secs:
            self.sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(secs), int(secs % 1 * 1_000_000)))
            self._limits[option] = secs

    def send(self, raw: bytes, timeout: float) -> None:
        self._limit(socket.SO_SNDTIMEO, timeout)
        try:
            self.sock.sendall(raw + b"\n")
        except BlockingIOError:
            raise RequestTimeout(f"the server at {self._path} took no request for {timeout:g} s") from None
        except OSError as e:
            raise self._cut(e.strerror or str(e)) from None

    def receive(self, timeout: Optional[float]) -> Optional[bytes]:
        """Return the next line, or `None` when none is complete after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._lines:
            if not self._fill(timeout) or (not self._lines and deadline is not None
                                           and time.monotonic() > deadline):
                return None
        line = self._lines.popleft()
        if line is None:
            raise LinkError(f"the server at {self._path} sent a line of more than {MAX_WIRE} bytes")
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
        self._lines += self._decoder.feed(data)
        return True

    def _cut(self, why: str) -> LinkError:
        return LinkError(f"the link to the server at {self._path} broke: {why}")


class LineLink:
    """A local client's way to a core: one connection for requests, a second one for events."""

    attempt_secs = float("inf")
    recheck_secs = 10.0

    def __init__(self, path: str) -> None:
        self._path = path
        self._requests: Optional[_Lines] = None
        self._events: Optional[_Lines] = None
        self._waiting: Deque[Json] = deque()  # events that came before the reply to their subscription

    def request(self, raw: bytes, timeout: float) -> bytes:
        """Send one line and return the line that answers it. After any failure the next call connects anew."""
        if b"\n" in raw:
            raise RequestError("a message for a local server is one line; send it without line breaks")
        lines = self._requests
        if lines is None:
            lines = self._requests = _Lines(self._path)
        try:
            lines.send(raw, timeout)
            reply = lines.receive(timeout)
        except BaseException:  # Ctrl-C too: what comes later would be taken for the next reply
            self._drop_requests()
            raise
        if reply is None:
            self._drop_requests()
            raise RequestTimeout(f"the server at {self._path} did not answer within {timeout:g} s")
        return reply

    def subscribe(self, topics: Sequence[str], since: Optional[int] = None, timeout: float = 10.0) -> Json:
        """Listen to these topic prefixes; return the `subscribe_response`."""
        message: Json = {"type": "subscribe_request", "request_id": new_id(), "topics": list(topics)}
        if since is not None:
            message["since"] = since
        try:
            if self._events is None:
                self._waiting.clear()
                self._events = _Lines(self._path)
            self._events.send(encode(message), timeout)
            return self._subscribed(message["request_id"], time.monotonic() + timeout)
        except BaseException:
            self._drop_events()
            raise

    def _subscribed(self, request_id: str, deadline: float) -> Json:
        while True:
            got = self._line(deadline - time.monotonic())
            if got is None:
                raise RequestTimeout(f"the server at {self._path} did not confirm a subscription in time")
            if "topic" in got:
                self._waiting.append(got)
            elif got.get("request_id") == request_id:
                if not got.get("success"):
                    raise RequestError(str(got.get("error")), str(got.get("error_code") or ""), got)
                return got

    def next_event(self, timeout: Optional[float]) -> Optional[Json]:
        """Return the next event, `None` after `timeout` seconds; raise `LinkError` when the connection was lost."""
        if self._waiting:
            return self._waiting.popleft()
        try:
            return self._line(timeout)
        except BaseException:
            self._drop_events()
            raise

    def _line(self, timeout: Optional[float]) -> Optional[Json]:
        if self._events is None:
            raise LinkError("nothing is subscribed on this link; call subscribe first")
        line = self._events.receive(timeout)
        if line is None:
            return None
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise LinkError(f"the server at {self._path} sent an event that is not a JSON object")
        return value

    @property
    def event_fd(self) -> int:
        """The descriptor of the event connection; -1 while there is none."""
        return self._events.sock.fileno() if self._events else -1

    def _drop_requests(self) -> None:
        if self._requests is not None:
            self._requests.sock.close()
            self._requests = None

    def _drop_events(self) -> None:
        if self._events is not None:
            self._events.sock.close()
            self._events = None

    def close(self) -> None:
        """Close both connections."""
        self._drop_requests()
        self._drop_events()


# ---------------------------------------------------------------- the shell: frames

class FrameStream:
    """A connection to a core that speaks frames and never blocks; `fd` is -1 while there is none."""

    def __init__(self, path: str, hello: Json) -> None:
        self._path = path
        self._hello = hello
        self._sock: Optional[socket.socket] = None
        self._decoder = FrameDecoder(MAX_WIRE)
        self._out = b""           # accepted but not yet taken by the kernel
        self.fd = -1
        self.connections = 0      # grows with each; the shell re-subscribes when it does

    def connect(self) -> None:
        """Dial and say who we are, if not connected; raise `NotThere` or `LinkError`."""
        if self._sock is not None:
            return
        self._sock = dial(self._path)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, _QUICK_MS * 1000))
        self.fd = self._sock.fileno()
        self._decoder = FrameDecoder(MAX_WIRE)
        self.connections += 1
        self._out = PREFACE
        self.send(frame(0, encode(self._hello), b""))

    def send(self, data: bytes) -> None:
        """Queue whole frames behind what is waiting and hand over what the kernel takes; `LinkError` if cut off."""
        self._out = self._out + data if self._out else data
        self.flush()

    def flush(self) -> bool:
        """Hand over what the kernel takes; return whether that was everything."""
        if self._out:
            if self._sock is None:
                raise self._cut("there is no connection")
            try:
                sent = self._sock.send(self._out, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as e:
                raise self._cut(e.strerror or str(e)) from None
            self._out = b"" if sent == len(self._out) else self._out[sent:]
        return not self._out

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._out

    def take(self, flags: int = socket.MSG_DONTWAIT) -> List[Frame]:
        """Return the frames that one read completes, if any; `LinkError` when the core closed the connection."""
        if self._sock is None:
            raise self._cut("there is no connection")
        try:
            data = self._sock.recv(_PIECE, flags)
            frames = self._decoder.feed(data)
        except BlockingIOError:
            return []
        except FramingError as e:
            raise self._cut(str(e)) from None
        except OSError as e:
            raise self._cut(e.strerror or str(e)) from None
        if not data:
            raise self._cut("it closed the connection")
        return frames

    def _cut(self, why: str) -> LinkError:
        self.close()
        return LinkError(f"the link to the core at {self._path} broke: {why}")

    def close(self) -> None:
        """Close the connection; what was not sent is forgotten."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        self._out = b""
        self.fd = -1


class FrameLink(FrameStream):
    """The REP loop's way to the core: one request at a time, held while the core is being started again.

    In the normal case a request is two system calls: send, and a recv that the kernel ends after
    `_QUICK_MS`. What takes longer is awaited together with the wake descriptor, so that a stop is
    never missed. A reply is known by its tag; late ones of an older request are dropped.
    """

    def __init__(self, path: str, hello: Json) -> None:
        super().__init__(path, hello)
        self._tag = 0
        self._asked = b""     # the outstanding request, sent again on every new connection
        self._asked_on = 0    # the connection it was last sent on
        self._poll = select.poll()
        self._polled: Tuple[int, int, int] = (-1, 0, -1)

    def request(self, header: bytes, body: bytes, deadline: float, wake_fd: int) -> Optional[bytes]:
        """Return the reply to `body`, or `None` when `wake_fd` became readable first: then `resume`.

        Raises `LinkError` when `deadline` (monotonic) passes without one.
        """
        self._tag += 1
        self._asked = frame(self._tag, header, body)
        self._asked_on = 0
        reply = self._quick() if self._sock is not None and not self._out else None
        return self.resume(deadline, wake_fd) if reply is None else reply

    def _quick(self) -> Optional[bytes]:
        """Ask on the connection that is there; `None` when the reply is late, long, or the core is gone."""
        try:
            self._asked_on = self.connections
            self.send(self._asked)
            for tag, _header, body in self.take(0):
                if tag == self._tag:
                    return body
        except LinkError:
            pass  # closed: `resume` asks on a new connection
        return None

    def resume(self, deadline: float, wake_fd: int) -> Optional[bytes]:
        """Go on waiting for the reply to the outstanding request; as `request`."""
        while True:
            try:
                self.connect()
                if self._asked_on != self.connections:
                    self._asked_on = self.connections
                    self.send(self._asked)
                return self._await(deadline, wake_fd)
            except _Late:
                if self._out:     # the core has half a frame; only a new connection gets it out of that
                    self.close()
                raise LinkError("the core does not answer; ask again later, the same request_id is safe") from None
            except LinkError:
                if self._pause(deadline, wake_fd):
                    return None

    def post(self, header: bytes, body: bytes) -> None:
        """Send a request whose reply nobody waits for; `LinkError` when there is no connection."""
        self._tag += 1        # an outstanding request keeps its own, smaller tag: see _await
        self.send(frame(self._tag, header, body))

    def _await(self, deadline: float, wake_fd: int) -> Optional[bytes]:
        tag = int.from_bytes(self._asked[8:16], "big")
        while True:
            self._watch(wake_fd)
            ready = self._poll.poll(_millis(deadline))
            if not ready:
                raise _Late
            for fd, _events in ready:
                if fd == self.fd:
                    if self._out:
                        self.flush()
                    for got, _header, body in self.take():
                        if got == tag:
                            return body
            if any(fd == wake_fd for fd, _events in ready):
                return None

    def _watch(self, wake_fd: int) -> None:
        want = (self.fd, select.POLLIN | select.POLLOUT if self._out else select.POLLIN, wake_fd)
        if want != self._polled:
            self._poll = select.poll()
            self._poll.register(want[0], want[1])
            self._poll.register(wake_fd, select.POLLIN)
            self._polled = want

    def _pause(self, deadline: float, wake_fd: int) -> bool:
        """Wait a moment before the next try; return whether we were woken, raise when the time is over."""
        left = _millis(deadline)
        if left <= 0:
            raise LinkError("the core is away and did not come back in time; ask again later, "
                            "the same request_id is safe")
        waiter = select.poll()
        waiter.register(wake_fd, select.POLLIN)
        return bool(waiter.poll(min(_AGAIN_MS, left)))


class _Late(Exception):
    """The deadline passed on a connection that is up."""


def _millis(deadline: float) -> int:
    left = deadline - time.monotonic()
    return int(left * 1000) + 1 if left > 0 else 0
