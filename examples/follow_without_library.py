"""Follow an agent with pyzmq and json alone: exact copies of both its streams, and of all events. See docs/streams.md.

    python examples/follow_without_library.py ENDPOINT AGENT DIRECTORY

DIRECTORY/<id>.stdout and <id>.stderr grow to exact copies, which are shown too; DIRECTORY/events gets a line for each.
Kill it at any moment and start it again: the files themselves say how far it came, so nothing is missing or doubled.
"""
from __future__ import annotations

import base64
import json
import os
import sys
import time
import uuid
from typing import Any, Dict, List, Union

Json = Dict[str, Any]
ENDED = ("completed", "failed", "terminated")
ANSWER_SECS = 2.0               # without an answer for so long: ask again
PATIENCE_SECS = 5.0             # without any answer for so long: say so, and go on asking
SILENCE_SECS = 35.0             # without any hint, not even a heartbeat (they come every 10 s): listen anew


class Link:
    """REQ for requests, SUB for hints; each is thrown away and made anew when in doubt."""

    req: Any = None
    sub: Any = None
    doubts: Any = (OSError, ValueError)

    def __init__(self, address: str) -> None:
        import zmq  # here, because follow_without_zeromq.py uses the rest
        self.address, self.zmq, self.context = address, zmq, zmq.Context()
        self.doubts += (zmq.ZMQError,)

    def connect(self, kind: int, secs: float, address: str) -> Any:
        socket = self.context.socket(kind)
        socket.setsockopt(self.zmq.LINGER, 0)
        socket.setsockopt(self.zmq.IPV6, int("[" in address))  # tcp://[::1]:PORT
        socket.setsockopt(self.zmq.RCVTIMEO, int(secs * 1000))
        if kind == self.zmq.REQ:
            socket.setsockopt(self.zmq.REQ_RELAXED, 1)    # both: a reply that comes late
            socket.setsockopt(self.zmq.REQ_CORRELATE, 1)  # is not taken for the next one
        socket.connect(address)
        return socket

    def attempt(self, raw: bytes) -> bytes:
        self.req = self.req or self.connect(self.zmq.REQ, ANSWER_SECS, self.address)
        self.req.send(raw)
        return bytes(self.req.recv())

    def listen(self, topics: List[str]) -> None:
        endpoint = self.ask("health_check_request")["metadata"]["pub_endpoint"]
        if not endpoint:
            raise SystemExit("this server publishes nothing; follow it over its Unix socket")
        self.sub = self.connect(self.zmq.SUB, SILENCE_SECS, endpoint)
        for topic in topics:
            self.sub.setsockopt(self.zmq.SUBSCRIBE, topic.encode())

    def hear(self) -> bytes:
        return bytes(self.sub.recv_multipart()[1])

    def ask(self, type: str, **fields: Any) -> Json:
        """Send the same bytes, with the same request_id, until there is an answer: what is asked twice is done once."""
        raw = json.dumps({"type": type, "request_id": str(uuid.uuid4()), **fields}).encode()
        patience = time.monotonic() + PATIENCE_SECS
        while True:
            try:
                reply: Json = json.loads(self.attempt(raw))
                if reply["success"]:
                    return reply
                if reply["error_code"] != "unavailable":  # else a part of the server is being started again
                    raise SystemExit(f"{reply['error']} ({reply['error_code']})")
            except self.doubts as e:
                self.req = self.req and self.req.close()  # None, so that the next attempt makes a fresh one
                if time.monotonic() > patience:
                    patience = float("inf")
                    print(f"[no answer from {self.address} ({e}); asking again and again]", file=sys.stderr)
                time.sleep(0.1)

    def hint(self, topics: List[str]) -> Json:
        """Return the next hint; an empty one where listening had to begin anew, so that some may be missing."""
        while True:
            try:
                if self.sub is not None:
                    return dict(json.loads(self.hear()))
                self.listen(topics)
                return {}
            except self.doubts:
                self.sub = self.sub and self.sub.close()
                time.sleep(0.1)


class Stream:
    """One stream of one agent: how far the copy reaches, and whether there may be more to read."""

    def __init__(self, agent: str, name: str, directory: str) -> None:
        self.agent, self.name, self.behind, self.done = agent, name, True, False
        self.file = os.open(f"{directory}/{agent}.{name}", os.O_RDWR | os.O_CREAT, 0o600)
        self.offset = os.fstat(self.file).st_size         # what is kept is the position: the two cannot differ

    def heard(self, hint: Json) -> None:
        topic = hint.get("topic")
        if topic == f"{self.agent}.{self.name}":
            self.behind |= hint["offset"] > self.offset   # a gap: read
            if hint["offset"] <= self.offset <= hint["next_offset"]:
                self.keep(hint)                           # it fits, or its end does; what is older is known
        elif topic == f"status.{self.agent}":             # a heartbeat says where the streams stand
            output = hint["data"].get("output", {}).get(self.name, {})
            self.behind |= hint["status"] in ENDED or output.get("end_offset", 0) > self.offset
        self.behind |= not hint

    def read(self, link: Link) -> None:
        chunk = link.ask("control_command", agent_id=self.agent, command_type=f"read_{self.name}",
                         payload={"offset": self.offset, "max_bytes": 1 << 20})["data"]
        if chunk["dropped"]:                              # past the cap; the copy gets a hole there
            print(f"[{chunk['dropped']} bytes of {self.name} are gone]", file=sys.stderr)
        self.keep(chunk)
        self.behind = chunk["bytes"] > 0                  # until there is nothing more

    def keep(self, chunk: Json) -> None:
        data = chunk["data"] or ""                        # decode first, then cut: offsets count bytes, not characters
        fresh = base64.b64decode(data) if chunk["encoding"] == "base64" else data.encode()
        fresh = fresh[max(self.offset - chunk["offset"], 0):]
        self.offset = max(self.offset, chunk["offset"])
        self.offset += os.pwrite(self.file, fresh, self.offset)
        self.done = chunk["eof"] and self.offset == chunk["next_offset"]
        os.write(1 if self.name == "stdout" else 2, fresh)


class Events:
    """All events of the server: which was the last one kept, and whether there may be more to ask for."""

    def __init__(self, directory: str) -> None:
        self.file = open(f"{directory}/events", "a+b", buffering=0)
        self.file.seek(0)
        *whole, _torn = self.file.read().split(b"\n")     # a line that a kill cut short is asked for again
        self.file.truncate(sum(len(line) + 1 for line in whole))
        self.last, self.behind = json.loads(whole[-1])["sequence"] if whole else 0, True

    def heard(self, hint: Json) -> None:                  # one that fits could be taken as it is; asking is simpler
        self.behind |= not hint or "update_type" in hint and hint["sequence"] > self.last

    def read(self, link: Link) -> None:
        page = link.ask("events_request", since=self.last)
        if page["first_kept"] > self.last + 1:
            print(f"[events {self.last + 1} to {page['first_kept'] - 1} are gone]", file=sys.stderr)
        self.file.write(b"".join(json.dumps(event).encode() + b"\n" for event in page["events"]))
        self.last, self.behind = page["next"], page["more"]


def follow(link: Link, agent: str, directory: str) -> None:
    """Hear what is new, and read where that shows a gap, until the agent has ended."""
    os.makedirs(directory, exist_ok=True)
    status: Json = {"type": "control_command", "agent_id": agent, "command_type": "get_status"}
    agent = status["agent_id"] = link.ask(**status)["agent_id"]  # another agent may have this name one day
    streams, events = [Stream(agent, name, directory) for name in ("stdout", "stderr")], Events(directory)
    everything: List[Union[Stream, Events]] = [*streams, events]
    while not all(stream.done for stream in streams) or link.ask(**status)["status"] not in ENDED:
        hint = link.hint([f"{agent}.stdout", f"{agent}.stderr", f"status.{agent}", "status.", "server"])
        for each in everything:
            each.heard(hint)
        while behind := [each for each in everything if each.behind]:
            for each in behind:
                each.read(link)
    events.read(link)  # the end is among them


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: follow_without_library.py ENDPOINT AGENT DIRECTORY")
    try:
        follow(Link(sys.argv[1]), *sys.argv[2:4])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
