"""What was promised, and whether it was kept.

Owns:    the ledger of every spawn, write and command, and the check of each agent against it.
Runs in: the chaos process; clients write the ledger, each its own entries, under one lock.
Unaware: of how the server is asked.

A loss is something that was acknowledged and is not there, or is there twice, or is not what it was.
"""
from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from agents import TRUTH, unseal

Json = Dict[str, Any]
MISSING = ("missing", "doubled", "wrong", "lost status", "left running", "no answer")
#: that a limit may be late while the server is there: grace, repetition of SIGKILL, a pidfd that does not tell, slack
LATE_SECS = 5.0 + 1.0 + 5.0 + 4.0
ENDS = ("completed", "failed", "terminated")


@dataclass
class Entry:
    """One agent as its client knows it."""

    key: str
    request_id: str
    code: int
    lines: int
    mode: str                   # reader, free
    owner: str
    limit: float = 0.0          # seconds it may run
    id: str = ""
    asked: float = field(default_factory=time.monotonic)
    attempts: int = 1
    accepted: Dict[str, List[int]] = field(default_factory=dict)  # writer -> numbers of lines that were acknowledged
    unsure: Dict[str, List[int]] = field(default_factory=dict)    # that were never answered
    numbers: Dict[str, int] = field(default_factory=dict)
    ends: Dict[str, bool] = field(default_factory=dict)  # stop, kill, signal: whether it was acknowledged
    pauses: int = 0
    resumes: int = 0
    pty: bool = False           # on a terminal
    raw: bool = False           # and known to have it in raw mode, so that one can type
    sizes: List[int] = field(default_factory=list)  # rows that its terminal was given, as acknowledged
    closing: bool = False       # its input is being ended: nobody may begin to write
    closed: bool = False
    checking: bool = False      # nobody may write any more
    writers: int = 0            # who are writing now
    checked: bool = False
    removed: bool = False
    excused: bool = False       # the disk was full in its life: output may have gaps, told ones
    following: Optional[threading.Thread] = None
    followed: Dict[str, Tuple[int, str]] = field(default_factory=dict)  # stream -> length, SHA-256
    exits: List[Json] = field(default_factory=list)


class Ledger:
    """See the module. `say` gets each loss at once."""

    def __init__(self, truth: Path, say: Callable[[str], None]) -> None:
        truth.mkdir()  # not on the disk that is filled
        self.truth, self._say = truth, say
        self.lock = threading.RLock()
        self.entries: Dict[str, Entry] = {}
        self.others: Dict[str, Entry] = {}  # agents whose output and ends population.py compares
        self.losses: List[str] = []
        self.counts: Dict[str, int] = {}
        self.disk: List[List[float]] = []  # when the disk was full: from, to
        #: from the death of a keeper to the next core: whoever lived or began then may end without anybody to tell how
        self.fostered: List[List[float]] = []
        self.lateness = 0.0                # the most that a limit came too late
        self.away: List[List[float]] = []  # when the core answered nobody, or another part stood still: from, to

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + count

    def loss(self, kind: str, sentence: str) -> None:
        """Note a broken promise."""
        with self.lock:
            self.losses.append(f"{kind}: {sentence}")
        self._say(f"LOSS {kind}: {sentence}")

    def disk_was_full(self, since: float) -> bool:
        """Whether it was at any moment from `since` on."""
        return any(window[1] >= since for window in self.disk)

    def absent_since(self, since: float) -> float:
        """Return for how many seconds the server could do nothing since then."""
        return sum(end - max(begin, since) for begin, end in list(self.away) if end > since)

    # ------------------------------------------------------------ one agent that has ended

    def check(self, entry: Entry, info: Json, attempts: List[Json], streams: Dict[str, bytes], dropped: int) -> None:
        """Compare everything about an agent that has ended with what is known of it."""
        entry.exits = [attempt["exit"] for attempt in attempts]
        entry.excused = self.disk_was_full(entry.asked)
        if info["attempt"] != entry.attempts or len(attempts) != entry.attempts:
            self.loss("doubled", f"{entry.key}: attempt {info['attempt']}, {len(attempts)} recorded, "
                                 f"{entry.attempts} asked for")
        natural = self._check_exit(entry, info)
        self._check_truth(entry, streams, natural, dropped)
        self._check_lines(entry, streams, natural)
        self._check_followed(entry, streams)
        self._check_tree(entry, streams["stdout"])
        self.add("agents checked")
        entry.checked = True

    def _check_exit(self, entry: Entry, info: Json) -> bool:
        """Return whether it ended by itself, as it was told."""
        record = info["exit"] or {}
        what = f"{entry.key} ({entry.id}): {info['status']} {record}"
        own = (record.get("code"), record.get("signal_number")) == (
            (entry.code, None) if entry.code >= 0 else (None, -entry.code))
        unknown = record.get("code") is None and record.get("signal_number") is None
        if unknown and any(window[1] >= entry.asked for window in self.fostered):
            self.add("ends without a code, of agents that outlived a keeper")
            return False
        if info["status"] == "terminated":
            reason = record.get("reason")
            by_limit = reason == "limit:runtime_secs" and entry.limit > 0
            if not (by_limit or entry.ends and reason in ("stop", "kill", "signaled")):
                self.loss("lost status", f"nobody ended {what}")
            if by_limit:
                late = record["duration"] - entry.limit
                self.lateness = max(self.lateness, late)
                if late < -0.01:
                    self.loss("wrong", f"the limit of {entry.limit} s came too early: {what}")
                if late > (most := LATE_SECS + self.absent_since(entry.asked)):
                    self.loss("wrong", f"the limit of {entry.limit} s came {late:.1f} s late, which is more than the "
                                       f"{most:.1f} s that the server was away, with what is due: {what}")
            ours = record.get("signal_number") in (2, 9, 15)
            if not own and not ours:
                self.loss("wrong", f"exit code: {what}, should be {entry.code}")
            return own and not ours
        if any(entry.ends.values()) and not own:
            self.loss("lost status", f"a client ended {what}")
        if not own and not entry.ends:
            self.loss("missing", f"exit code: {what}, should be {entry.code}")
        elif info["status"] != ("completed" if entry.code == 0 else "failed"):
            self.loss("lost status", what)
        if own and record.get("reason") != ("exited" if entry.code >= 0 else "signaled"):
            self.loss("wrong", f"reason: {what}")
        return own

    def _check_truth(self, entry: Entry, streams: Dict[str, bytes], natural: bool, dropped: int) -> None:
        """Compare lengths with what write(2) has taken, and count the processes that ever had this key."""
        files = sorted(self.truth.glob(entry.key + ".*"))
        early = not natural and len(files) == entry.attempts - 1  # ended before it had opened its file
        if len(files) != entry.attempts and not early:
            self.loss("doubled" if len(files) > entry.attempts else "missing",
                      f"{entry.key}: {len(files)} processes were started, {entry.attempts} asked for")
        taken = [0, 0]
        under_way = 0
        for file in files:
            data = file.read_bytes()
            if len(data) == TRUTH.size:
                out, err, last = TRUTH.unpack(data)
                taken[0], taken[1], under_way = taken[0] + out, taken[1] + err, under_way + last
        if entry.pty:
            taken = [sum(taken), 0]
        for n, stream in enumerate(("stdout", "stderr")):
            have = len(streams[stream])
            self.add("bytes", have)
            self.add("bytes of terminals", have if entry.pty else 0)
            if dropped and entry.excused:
                continue
            if not taken[n] <= have <= taken[n] + under_way or (natural and have != taken[n]):
                self.loss("missing" if have < taken[n] else "doubled",
                          f"bytes: {entry.key} ({entry.id}) wrote {taken[n]}..{taken[n] + under_way} to {stream}, "
                          f"{have} are there, {dropped} dropped, natural={natural}, excused={entry.excused}")
        if dropped and not entry.excused:
            self.loss("missing", f"bytes: {entry.key} ({entry.id}) has a gap of {dropped}")
        self.add("bytes in told gaps", dropped)

    def _check_lines(self, entry: Entry, streams: Dict[str, bytes], natural: bool) -> None:
        echoed: Dict[str, List[int]] = {}
        for stream, letters in (("stdout", "OE"), ("stderr", "")) if entry.pty else (("stdout", "O"), ("stderr", "E")):
            n, whole, ends, begun = dict.fromkeys(letters, 0), 0, 0, 1
            *lines, rest = streams[stream].split(b"\n")
            for line in lines:
                words = unseal(line)
                if words is None:
                    if not entry.excused:
                        self.loss("wrong", f"{entry.key} ({entry.id}) {stream}: a broken line {line[:80]!r} after {n}")
                    continue
                if words[0] in n:
                    number = int(words[2])
                    if entry.excused and number < n[words[0]] and begun < entry.attempts:
                        n, ends, begun = dict.fromkeys(letters, 0), 0, begun + 1  # the end before fell into a gap
                    at = n[words[0]]
                    if words[1] != entry.key or number < at or (number > at and not entry.excused):
                        self.loss("wrong", f"{entry.key} ({entry.id}) {stream}: line {words[1:3]} where {at} belongs")
                    n[words[0]] = number + 1
                elif words[0] == "Z":
                    whole += 1
                    if set(n.values()) != {entry.lines} and not entry.excused:
                        self.loss("missing", f"{entry.key} {stream}: {n} lines of {entry.lines}")
                    ends += 1
                    if ends == len(letters):
                        n, ends, begun = dict.fromkeys(letters, 0), 0, begun + 1
                elif words[0] == "I":
                    inner = unseal(" ".join(words[1:]).encode())
                    if inner is None or inner[0] != "W":
                        self.loss("wrong", f"{entry.key} ({entry.id}): stdin arrived as {line[:80]!r}")
                        continue
                    echoed.setdefault(inner[1], []).append(int(inner[2]))
            self.add("lines", len(lines))
            if natural and not entry.excused and (whole != entry.attempts * len(letters) or rest):
                self.loss("missing", f"{entry.key} ({entry.id}) {stream} ends with {streams[stream][-80:]!r}")
        self._check_stdin(entry, echoed, natural)

    def _check_stdin(self, entry: Entry, echoed: Dict[str, List[int]], natural: bool) -> None:
        """Each writer's acknowledged lines, once and in order; all of them if the agent read to the end."""
        for writer in {*echoed, *entry.accepted}:
            got, unsure = echoed.get(writer, []), entry.unsure.get(writer, [])
            sent = [n for n in entry.accepted.get(writer, []) if n not in unsure]
            self.add("stdin lines accepted", len(sent))
            self.add("stdin lines echoed", len(got))
            sure = [n for n in got if n not in unsure]
            if entry.excused:
                if sorted(set(sure)) != sure or not set(sure) <= set(sent):
                    self.loss("doubled", f"stdin of {entry.key} ({entry.id}) by {writer}: {sure} of {sent}")
            elif sure != sent[:len(sure)] or (natural and entry.mode == "reader" and sure != sent):
                kind = "doubled" if len(set(sure)) < len(sure) else "missing"
                self.loss(kind, f"stdin of {entry.key} ({entry.id}) by {writer}: {sure} of {sent}")

    def _check_followed(self, entry: Entry, streams: Dict[str, bytes]) -> None:
        from hashlib import sha256
        for stream, (length, digest) in entry.followed.items():
            data = streams[stream]
            self.add("bytes followed live", length)
            if length == len(data) and digest == sha256(data).hexdigest():
                continue
            if not entry.excused:
                self.loss("missing", f"{entry.key} ({entry.id}): a follower got {length} bytes of {stream}, "
                                     f"{len(data)} are there")

    def _check_tree(self, entry: Entry, stdout: bytes) -> None:
        """Nothing that an ended agent started may run."""
        for line in stdout.split(b"\n"):
            words = unseal(line) if line.startswith(b"T ") else None
            for pid in filter(None, words[2].split(",")) if words and len(words) > 2 else ():
                self.add("descendants")
                if _marked(pid, entry.id):
                    self.loss("left running", f"{entry.key} ({entry.id}) has ended, its descendant {pid} runs")

    # ------------------------------------------------------------ all of them, at the end

    def check_events(self, events: List[Json], followers: Dict[str, List[Json]]) -> None:
        """The sequence has no gap; each change of each agent is there once; every follower saw just that."""
        self.add("events", len(events))
        numbers = [event["sequence"] for event in events]
        if numbers != list(range(1, len(numbers) + 1)):
            gaps = [(a, b) for a, b in zip(numbers, numbers[1:]) if b != a + 1]
            self.loss("missing", f"events: the sequence has gaps {gaps[:5]}, begins with {numbers[:1]}")
        for name, seen in followers.items():
            self.add("events followed live", len(seen))
            if seen != events[:len(seen)] or len(seen) < len(events):
                at = next((n for n, (a, b) in enumerate(zip(seen, events)) if a != b), min(len(seen), len(events)))
                self.loss("missing", f"events: {name} saw {len(seen)} of {len(events)}; the first difference at {at}: "
                                     f"{seen[at:at + 1]} for {events[at:at + 1]}")
        by_agent: Dict[str, List[Json]] = {}
        for event in events:
            if event.get("agent_id"):
                by_agent.setdefault(event["agent_id"], []).append(event)
        known = {entry.id: entry for entry in (*self.entries.values(), *self.others.values()) if entry.id}
        for agent_id in set(by_agent) - set(known):
            self.loss("doubled", f"spawn: agent {agent_id} was asked for by nobody: {by_agent[agent_id]}")
        for agent_id, entry in known.items():
            self._check_changes(entry, by_agent.get(agent_id, []))

    def _check_changes(self, entry: Entry, events: List[Json]) -> None:
        expected = []
        for number in range(1, entry.attempts + 1):
            expected += [("started", number), ("ended", number)]
        seen, ends = [], 0
        pauses, sizes = [0, 0], []
        for event in events:
            data = event.get("data") or {}
            if "attempt" in data:
                seen.append(("started", data["attempt"]))
            elif "exit" in data:
                ends += 1
                seen.append(("ended", ends))
                if ends <= len(entry.exits) and data["exit"] != entry.exits[ends - 1]:
                    self.loss("wrong", f"the event and the record of {entry.key} ({entry.id}) differ: {event}")
            elif "pty" in data:
                sizes.append(data["pty"]["rows"])
            elif event["message"].startswith("paused"):
                pauses[0] += 1
            elif event["message"].startswith("resumed"):
                pauses[1] += 1
        if seen != expected:
            self.loss("missing" if len(seen) < len(expected) else "doubled",
                      f"events of {entry.key} ({entry.id}): {seen} instead of {expected}")
        self.add("sizes of terminals", len(sizes))
        if sizes != entry.sizes:
            self.loss("wrong", f"events of {entry.key} ({entry.id}): sizes {sizes} were told, {entry.sizes} "
                               "acknowledged")
        if pauses != [entry.pauses, entry.resumes]:
            self.loss("wrong", f"events of {entry.key} ({entry.id}): {pauses} pauses and resumes were told, "
                               f"{[entry.pauses, entry.resumes]} acknowledged")

    def check_list(self, listed: List[Json]) -> None:
        """Each spawn request has made exactly one agent, and each is listed until it is removed."""
        ids: Dict[str, List[str]] = {}
        for info in listed:
            ids.setdefault((info.get("metadata") or {}).get("key", "?"), []).append(info["id"])
            if info["status"] not in ENDS:
                self.loss("lost status", f"{info['id']} is {info['status']} though all have ended")
        for entry in (*self.entries.values(), *self.others.values()):
            expected = [] if entry.removed or not entry.id else [entry.id]
            if ids.pop(entry.key, []) != expected:
                self.loss("missing", f"spawn {entry.request_id} of {entry.key}: listed wrongly, expected {expected}")
            if entry.id and not entry.checked:
                self.loss("no answer", f"{entry.key} ({entry.id}) could not be checked")
        if ids:
            self.loss("doubled", f"agents that nobody asked for: {ids}")



def _marked(pid: str, agent_id: str) -> bool:
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(") ")[2][:1]
        environ = Path("/proc", pid, "environ").read_bytes()
        return state != "Z" and f"AGENTSERVER_AGENT_ID={agent_id}".encode() in environ
    except OSError:
        return False


def alive_with(mark: str, value: str) -> List[int]:
    """Return the processes whose environment says `mark=value`."""
    needle, found = f"{mark}={value}".encode(), []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if needle in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
            except OSError:
                continue
    return found
