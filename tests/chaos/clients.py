"""Clients that spawn, write, follow, stop, and ask everything again at random.

Owns:    asking with retries (`Asker`), what each client does, following output and events.
Runs in: threads of the chaos process; each has links of its own.
Unaware: of the hand. Whatever it does, a client asks again with the same bytes until there is an answer.
"""
from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from accounting import ENDS, Entry, Json, Ledger
from agents import seal

from agentserver import AgentClient
from agentserver.errors import AgentServerError, LinkError, RequestError, RequestTimeout

PATIENCE = 90.0  # seconds for one answer, over all tries
AGENT = Path(__file__).with_name("agents.py")
AGAIN = ("unavailable",)
TERMINALS = 0.35  # the share of agents that run on one


class NoAnswer(Exception):
    """Nothing in `PATIENCE` seconds."""


class Asker:
    """Asks over one of several addresses, at random in different manners."""

    def __init__(self, addresses: List[str], dice: random.Random, ledger: Ledger) -> None:
        self._dice, self._ledger = dice, ledger
        self._clients = [AgentClient(address, timeout=10.0) for address in addresses]

    def close(self) -> None:
        """Close all links."""
        for client in self._clients:
            client.close()

    def ask(self, type_: str, **fields: Any) -> Json:
        """Return the reply; raise `RequestError` for a refusal, `NoAnswer` when there is none."""
        message = {"type": type_, "request_id": os.urandom(12).hex(), **fields}
        manner = self._dice.random()
        if manner < 0.15:  # ask and turn away before there can be an answer
            self._once(message, self._dice.choice((0.001, 0.01, 0.05)))
        reply = self._until(message)
        if manner > 0.85 and type_ in ("spawn_request", "control_command"):
            self._twice(message, reply)
        return reply

    def _once(self, message: Json, timeout: float) -> None:
        try:
            self._dice.choice(self._clients).request(message, timeout)
        except AgentServerError:
            self._ledger.add("requests given up and asked again")

    def _until(self, message: Json) -> Json:
        client = self._dice.choice(self._clients)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                reply = client.request(message)
                self._ledger.add("requests answered")
                return reply
            except RequestError as e:
                if e.code == "shutting_down":  # nobody shuts it down
                    self._ledger.loss("wrong", f"{message['type']} was refused: {e}")
                elif e.code not in AGAIN:
                    if e.code in ("internal", "request_id_conflict", "bad_request", "unknown_type"):
                        self._ledger.loss("wrong", f"{message['type']} was answered with {e.code}: {e}")
                    self._ledger.add("requests answered")
                    raise
            except (LinkError, RequestTimeout) as e:
                if "something else" in str(e):
                    self._ledger.loss("wrong", f"{message}: {e}")
            self._ledger.add("requests asked again")
            client = self._dice.choice(self._clients)
            time.sleep(0.05)
        self._ledger.loss("no answer", f"{message['type']} {message.get('command_type', '')}: {PATIENCE:g} s")
        raise NoAnswer

    def _twice(self, message: Json, reply: Json) -> None:
        """Ask the very same once more; it must not be done once more."""
        self._ledger.add("requests sent twice")
        try:
            again = self._until(message)
        except RequestError as e:
            if message.get("command_type", "spawn") in ("spawn", "stop", "kill", "pause", "resume", "write_stdin",
                                                        "close_stdin", "restart", "remove", "signal"):
                self._ledger.loss("wrong", f"{message} was done and then refused: {e.code} {e}")
            return
        same = (again["agent_info"]["id"] == reply["agent_info"]["id"] if message["type"] == "spawn_request"
                else message["command_type"] in ("get_status", "inspect") or again.get("agent_id") == reply["agent_id"])
        if not same:
            self._ledger.loss("doubled", f"{message} was answered with {reply} and {again}")


class Client(threading.Thread):
    """One client: see the module."""

    def __init__(self, name: str, seed: int, addresses: List[str], ledger: Ledger, live: int,
                 kept: float = 0.3) -> None:
        super().__init__(name=name, daemon=True)
        self._kept = kept           # the share of ended agents that is not removed
        self._dice = random.Random(f"{seed} {name}")
        self._asker = Asker(addresses, self._dice, ledger)
        self._addresses, self._ledger, self._live = addresses, ledger, live
        self._mine: Dict[str, Entry] = {}
        self._count = 0
        self.spawning = True        # until told otherwise
        self.failed = ""

    def run(self) -> None:
        """Act until there is nothing left to do."""
        try:
            while self.spawning or self._unchecked():
                self._act()
                time.sleep(self._dice.random() * 0.08)
        except Exception:
            import traceback
            self.failed = traceback.format_exc()
            self._ledger.loss("no answer", f"{self.name} failed: {self.failed}")
        finally:
            self._asker.close()

    def unfinished(self) -> List[str]:
        """Return whom it has not checked yet."""
        return [f"{entry.key} {entry.id}" for entry in self._unchecked()]

    def _unchecked(self) -> List[Entry]:
        return [entry for entry in self._mine.values() if not entry.checked]

    def _act(self) -> None:
        dice, open_ = self._dice.random(), self._unchecked()
        try:
            if self.spawning and len(open_) < self._live and dice < 0.4:
                self._spawn()
            elif dice < 0.75:
                self._write()
            elif dice < 0.8 and open_:
                self._command(self._dice.choice(open_))
            elif dice < 0.9 or not self.spawning:
                self._close_some(open_)
                self._harvest()
        except NoAnswer:
            pass

    # ------------------------------------------------------------ spawn

    def _spawn(self) -> None:
        dice = self._dice
        self._count += 1
        key = f"{self.name}-{self._count}"
        code = dice.choice((0, 0, 0, 1, 7, 42, 255, -9, -15, -6, dice.randrange(2, 120)))
        entry = Entry(key, f"spawn-{key}-{os.urandom(4).hex()}", code, dice.choice((1, 10, 50, 120, 200)),
                      dice.choice(("reader", "free")), self.name, limit=dice.choice((0.0,) * 12 + (1.5,)))
        tree = dice.choice((0, 0, 0, 1, 2, 4, 7))
        command = [sys.executable, "-S", "-E", str(AGENT), key, str(code), str(entry.lines),
                   str(dice.choice((0, 0.005, 0.02, 0.05))), entry.mode, str(tree), str(self._ledger.truth)]
        config = {"command": command, "labels": {"client": self.name}, "grace_secs": dice.choice((0.5, 5)),
                  "stdin": "pipe", "name": key}
        if dice.random() < TERMINALS:
            entry.pty, config["stdin"], config["pty"] = True, None, {"rows": 1, "cols": 80}
        if entry.limit:
            config["limits"] = {"runtime_secs": entry.limit}
        with self._ledger.lock:
            self._ledger.entries[key] = entry
        self._mine[key] = entry
        try:
            reply = self._asker.ask("spawn_request", request_id=entry.request_id, config=config, metadata={"key": key})
        except RequestError as e:
            entry.checked = True
            self._ledger.loss("wrong", f"spawn of {key} was refused: {e.code} {e}")
            return
        entry.id = reply["agent_info"]["id"]
        self._ledger.add("spawns")
        if dice.random() < 0.2 and not any(e.following and e.following.is_alive() for e in self._mine.values()):
            entry.following = threading.Thread(target=self._follow, args=(entry,), daemon=True)
            entry.following.start()

    # ------------------------------------------------------------ stdin

    def _write(self) -> None:
        """Write a numbered line to somebody, oneself's or another client's."""
        with self._ledger.lock:
            targets = [e for e in self._ledger.entries.values()
                       if e.id and not e.checked and not e.checking and not e.closing and e.attempts == 1]
            if not targets:
                return
            entry = self._dice.choice(targets)
            entry.writers += 1
        try:
            if self._can_be_typed_to(entry):
                self._write_to(entry)
        finally:
            with self._ledger.lock:
                entry.writers -= 1

    def _can_be_typed_to(self, entry: Entry) -> bool:
        """Whether an agent takes what it gets as it is; one on a terminal does when it has written something."""
        try:
            if entry.pty and not entry.raw:
                info = self._ask(entry, "inspect", {})["agent_info"]
                entry.raw = info["output"]["stdout"]["end_offset"] > 0
        except RequestError as e:
            if e.code != "agent_not_found":
                self._ledger.loss("wrong", f"{entry.key} cannot be looked at: {e.code} {e}")
            return False
        return entry.raw or not entry.pty

    def _write_to(self, entry: Entry) -> None:
        number = entry.numbers.get(self.name, 0)
        entry.numbers[self.name] = number + 1
        size = self._dice.choice((10, 10, 10, 100, 500, 5000, 100_000))
        line = seal(f"W {self.name} {number} " + "x" * size).decode()
        try:
            self._ask(entry, "write_stdin", {"data": line})
            entry.accepted.setdefault(self.name, []).append(number)
        except RequestError as e:
            if e.code not in ("stdin_closed", "stdin_full", "agent_not_found"):
                self._ledger.loss("wrong", f"write to {entry.key} was refused: {e.code} {e}")
        except NoAnswer:
            entry.unsure.setdefault(self.name, []).append(number)
            raise

    def _close_some(self, entries: List[Entry]) -> None:
        for entry in entries:
            old = time.monotonic() - entry.asked > self._dice.uniform(1, 8) or not self.spawning
            if entry.mode == "reader" and entry.id and old and not entry.closed:
                with self._ledger.lock:
                    entry.closing = True
                if entry.pty and (entry.writers or not self._can_be_typed_to(entry)):
                    continue  # later: what is typed after the end would not be read
                entry.closed = True
                try:
                    self._ask(entry, "close_stdin", {})
                except RequestError as e:
                    if e.code != "stdin_closed":
                        self._ledger.loss("wrong", f"stdin of {entry.key} could not be closed: {e.code} {e}")

    # ------------------------------------------------------------ commands

    def _ask(self, entry: Entry, command: str, payload: Json) -> Json:
        """Give an agent a command; return the reply's data."""
        reply = self._asker.ask("control_command", agent_id=entry.id, command_type=command, payload=payload)
        return dict(reply["data"] or {})

    def _command(self, entry: Entry) -> None:
        if not entry.id:
            return
        what = self._dice.choice(("stop", "kill", "signal", "pause", "pause", "pause", "look", "resize", "resize"))
        if what == "pause":
            self._pause(entry)
        elif what == "resize":
            self._resize(entry)
        elif what == "look":
            self._ask(entry, "inspect", {})
        elif self._dice.random() < 0.6:
            entry.ends.setdefault(what, False)
            try:
                self._ask(entry, what, {"signal": "SIGTERM"} if what == "signal" else {})
                entry.ends[what] = what != "signal"  # a signal may come when it has done its work
            except RequestError as e:
                if e.code != "invalid_state":
                    self._ledger.loss("wrong", f"{what} of {entry.key} was refused: {e.code} {e}")

    def _pause(self, entry: Entry) -> None:
        try:
            self._ask(entry, "pause", {})
            entry.pauses += 1
            time.sleep(self._dice.random() * 0.3)
            self._ask(entry, "resume", {})
            entry.resumes += 1
        except RequestError as e:
            if e.code != "invalid_state":
                self._ledger.loss("wrong", f"pause of {entry.key} was refused: {e.code} {e}")

    def _resize(self, entry: Entry) -> None:
        rows = len(entry.sizes) + 2
        try:
            self._ask(entry, "resize", {"rows": rows, "cols": 80})
            entry.sizes.append(rows)
        except RequestError as e:
            if e.code != "invalid_state":
                self._ledger.loss("wrong", f"resize of {entry.key} was refused: {e.code} {e}")

    # ------------------------------------------------------------ ends

    def _harvest(self) -> None:
        reply = self._asker.ask("list_agents_request", labels={"client": self.name}, all=True)
        infos = {info["id"]: info for info in reply["agents"]}
        for entry in self._unchecked():
            info = infos.get(entry.id)
            if entry.id and info is None:
                entry.checked = True
                self._ledger.loss("missing", f"agent {entry.key} ({entry.id}) is not listed any more")
            elif info is not None and info["status"] in ENDS and not (entry.following and entry.following.is_alive()):
                with self._ledger.lock:
                    entry.checking = True
                if not entry.writers:  # else later: what is being written is not in the ledger yet
                    self._check(entry)

    def _check(self, entry: Entry) -> None:
        record = self._ask(entry, "inspect", {})
        streams, dropped = {}, 0
        for stream in ("stdout", "stderr"):
            streams[stream], gap = self._read(entry, stream)
            dropped += gap
        self._ledger.check(entry, record["agent_info"], record["attempts"], streams, dropped)
        natural = not entry.ends and not entry.limit and entry.mode == "free" and not entry.numbers
        if natural and self.spawning and not entry.followed and entry.attempts < 3 and self._dice.random() < 0.3:
            self._restart(entry)
        elif self._dice.random() >= self._kept:
            self._ask(entry, "remove", {})
            entry.removed = True
            for file in self._ledger.truth.glob(entry.key + ".*"):
                file.unlink()

    def _restart(self, entry: Entry) -> None:
        entry.attempts += 1
        entry.checked = False
        self._ledger.add("restarts")
        self._ask(entry, "restart", {})

    def _read(self, entry: Entry, stream: str) -> "tuple[bytes, int]":
        data, offset, dropped, until = [], 0, 0, time.monotonic() + 30
        while True:
            piece = self._ask(entry, f"read_{stream}", {"offset": offset, "max_bytes": 4_000_000})
            raw = piece["data"] or ""
            if piece["encoding"] == "base64":
                import base64
                data.append(base64.b64decode(raw))
            else:
                data.append(raw.encode("utf-8", "surrogateescape"))
            offset, dropped = piece["next_offset"], dropped + piece["dropped"]
            if piece["eof"]:
                return b"".join(data), dropped
            if time.monotonic() > until:
                self._ledger.loss("no answer", f"{entry.key} has ended, but {stream} has no eof after 30 s")
                return b"".join(data), dropped

    # ------------------------------------------------------------ following

    def _follow(self, entry: Entry) -> None:
        """Follow both streams to their end, coming back after each failure with the offsets reached."""
        digests = {"stdout": hashlib.sha256(), "stderr": hashlib.sha256()}
        lengths = {"stdout": 0, "stderr": 0}
        client = AgentClient(random.Random(entry.key).choice(self._addresses))
        until = time.monotonic() + 300
        while time.monotonic() < until:
            try:
                for _id, stream, chunk in client.follow(entry.id, offsets=dict(lengths), timeout=300):
                    if chunk.offset != lengths[stream] and not self._ledger.disk_was_full(entry.asked):
                        self._ledger.loss("missing", f"a follower of {entry.key} got {chunk.offset} of {stream} "
                                                     f"where {lengths[stream]} follows, {chunk.dropped} dropped")
                    digests[stream].update(chunk.data)
                    lengths[stream] = chunk.offset + len(chunk.data)
                break
            except RequestError as e:
                if e.code != "unavailable":
                    self._ledger.loss("wrong", f"a follower of {entry.key} was refused: {e.code} {e}")
                    break
            except AgentServerError:
                self._ledger.add("followers that came back")
        else:
            self._ledger.loss("no answer", f"a follower of {entry.key} ({entry.id}) had not seen the end after 300 s")
        client.close()
        entry.followed = {stream: (lengths[stream], digests[stream].hexdigest()) for stream in lengths}


class EventFollower(threading.Thread):
    """Sees every event of the server once, whatever happens to the link."""

    def __init__(self, name: str, address: Callable[[], str], ledger: Ledger) -> None:
        super().__init__(name=name, daemon=True)
        self._address, self._ledger = address, ledger
        self.seen: List[Json] = []

    def run(self) -> None:
        """Follow for ever."""
        while True:
            client = AgentClient(self._address())
            try:
                for event in client.follow_events(self.seen[-1]["sequence"] if self.seen else 0):
                    self.seen.append(event)
            except AgentServerError:
                self._ledger.add("followers that came back")
                time.sleep(0.1)
            finally:
                client.close()
