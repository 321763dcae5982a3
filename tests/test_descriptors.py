"""A keeper or a core without room for another descriptor: nothing of an agent is mixed up or lost.

Owns:    the limit of a keeper, lowered and raised while it runs; that of this process, which takes over like a core.
Runs in: the test process.
Unaware: of the channel's words (test_channel.py).
"""
from __future__ import annotations

import os
import resource
import socket
import sys

import pytest
from support import Server, wait_until
from test_channel import room_for
from test_survival import kill_core
from wire import LineWire

from agentserver.core.channel import Channel
from agentserver.core.held import KEPT_FREE, Held
from agentserver.core.notify import Notify
from agentserver.core.takeover import inherit
from agentserver.errors import StartError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prlimit(2) and a child subreaper")


def limit(pid: int, most: int) -> int:
    """Let a process have so many descriptors; return how many it might have before."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
    return soft


def open_in(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def speaks(wire: LineWire, each: str, text: str) -> None:
    wire.control(each, "write_stdin", data=f"{text}\n", eof=True)
    assert wire.output(each) == b"ready\n" + text.encode() + b"\n" and wire.exit(each)["code"] == 0


def test_a_keeper_without_room(server: Server) -> None:
    """It says so, and has what it could not take as soon as it can."""
    keeper = server.process.pid
    with LineWire(server.socket_path) as wire:
        first = wire.spawn("echo")
        before = limit(keeper, open_in(keeper) + 1)
        crowd = [wire.spawn("echo") for _ in range(4)]
        wait_until(lambda: "no room for descriptors" in server.logs(), what="the keeper to say so")
        held = open_in(keeper)
        limit(keeper, before)
        wait_until(lambda: open_in(keeper) >= held + 3 * len(crowd) - 1, what="the keeper to hold everything")
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        for number, each in enumerate((first, *crowd)):
            speaks(wire, each, str(number))


def test_a_keeper_that_is_full_starts_a_core_again(server: Server) -> None:
    """Copies of agents' descriptors never take the last ones."""
    keeper = server.process.pid
    with LineWire(server.socket_path) as wire:
        limit(keeper, open_in(keeper) + KEPT_FREE + 4)
        crowd = [wire.spawn("echo") for _ in range(KEPT_FREE)]
        wait_until(lambda: "no room for descriptors" in server.logs(), what="the keeper to say so")
    kill_core(server)
    with LineWire(server.socket_path) as wire:
        speaks(wire, crowd[0], "again")


def test_a_core_without_room() -> None:
    """It cannot take over, and says so; the keeper has everything for one that comes later."""
    ours, theirs = map(Channel, socket.socketpair())
    held = Held(Notify({}), {})
    read, write = os.pipe()
    held.hear({"hold": "one", "names": ["stdin", "stdout"], "fds": [write, read]})
    held.hand_over(ours)
    with room_for(1), pytest.raises(StartError, match="no room"):
        inherit(theirs)
    theirs.close()
    ours.close()
    ours, theirs = map(Channel, socket.socketpair())
    held.hand_over(ours)
    left = inherit(theirs)
    assert set(left.fds["one"]) == {"stdin", "stdout"}
    os.write(left.fds["one"]["stdin"], b"x")
    assert os.read(left.fds["one"]["stdout"], 1) == b"x"
    left.close()
    held.drop()
    theirs.close()
    ours.close()
