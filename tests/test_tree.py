"""An agent is a tree: all of it is paused, signalled and ended, and what was left over is named.

Owns:    daemons, sessions, orphans, holders of pipes; the state of every member, read from /proc.
Runs in: the test process; servers and agents are real.
Unaware: of how descendants are found.
"""
from __future__ import annotations

import json
import os
import signal
from typing import Callable

import pytest
from support import Server, wait_until
from wire import LineWire, alive, process_state, states

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


def grown(wire: LineWire, levels: int, width: int, *more: str, **config: object) -> tuple[str, list[int]]:
    """Spawn a tree and return the agent and every pid of it, the leader's first."""
    started = wire.spawn("tree", levels, width, *more, **config)
    pids: list[int] = json.loads(wire.lines(started, 2)[1])
    assert all(map(alive, pids)) and len(pids) == sum(width ** n for n in range(levels + 1))
    return started, pids


def gone(pids: list[int]) -> None:
    """Wait until the kernel knows none of them, not even as a zombie."""
    wait_until(lambda: states(pids) == {""}, what=f"{pids} to be gone, states {[process_state(p) for p in pids]}")


def stopped(pids: list[int]) -> None:
    """Wait until all of them are stopped: a signal that is sent still has to land."""
    wait_until(lambda: states(pids) == {"T"}, what=f"all of {pids} to stop, also those in sessions of their own")


def leaked_pids(record: dict) -> set[int]:  # type: ignore[type-arg]
    """Return the pids named in `leaked`; each has its command."""
    assert all(item["pid"] > 1 and item["command"] for item in record["leaked"]), record
    return {item["pid"] for item in record["leaked"]}


def test_pause_and_resume_reach_every_member(unix: LineWire) -> None:
    tree, pids = grown(unix, 3, 2)
    unix.control(tree, "pause")
    stopped(pids)
    assert unix.status(tree) == "paused"
    unix.control(tree, "resume")
    wait_until(lambda: states(pids) == {"S"}, what="every member to go on")


def test_resumed_and_paused_in_one_breath(unix: LineWire) -> None:
    """What we stopped ourselves is not taken for what stood still before, nor for what still does."""
    tree, pids = grown(unix, 2, 2)
    for _ in range(5):
        unix.control(tree, "pause")
        unix.send(b"\n".join(json.dumps({"type": "control_command", "request_id": f"{tree}{n}{os.urandom(4).hex()}",
                                         "agent_id": tree, "command_type": command}).encode()
                             for n, command in enumerate(("resume", "pause", "resume", "pause"))))
        assert all(json.loads(unix.receive())["success"] for _ in range(4))
        assert states(pids) == {"T"}
        unix.control(tree, "resume")
        wait_until(lambda: states(pids) == {"S"}, what="every member to go on")


def test_pause_reaches_a_daemon(unix: LineWire) -> None:
    daemoniser = unix.spawn("daemoniser", "wait", "keep")
    daemon = int(unix.lines(daemoniser, 2)[1])
    unix.control(daemoniser, "pause")
    stopped([daemon])
    unix.control(daemoniser, "resume")
    wait_until(lambda: process_state(daemon) == "S")


def test_a_batch_pauses_many_trees(unix: LineWire) -> None:
    trees = [grown(unix, 2, 2, labels={"paused": "together"}) for _ in range(3)]
    unix.ok("batch_control_command", labels={"paused": "together"}, command_type="pause")
    stopped([pid for _, pids in trees for pid in pids])
    unix.ok("batch_control_command", labels={"paused": "together"}, command_type="stop")
    for each, pids in trees:
        assert unix.ended(each)["status"] == "terminated"
        gone(pids)


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("manner", ["polite", "ignore"])
def test_the_whole_tree_ends(unix: LineWire, how: str, manner: str) -> None:
    tree, pids = grown(unix, 3, 2, *([manner] if manner == "ignore" else []), grace_secs=0.5)
    unix.control(tree, how)
    record = unix.exit(tree)
    gone(pids)
    assert leaked_pids(record) <= set(pids[1:])
    if manner == "ignore" and how == "stop":
        assert record["code"] == 0 and leaked_pids(record) == set(pids[1:]), "the leader left, the others did not"


def test_members_that_end_on_sigterm_are_not_leaked(unix: LineWire) -> None:
    tree, pids = grown(unix, 1, 3, grace_secs=1000)
    unix.control(tree, "stop")
    record = unix.exit(tree)
    gone(pids)
    assert record["reason"] == "stop"


def test_the_rest_ends_when_the_leader_ends_by_itself(unix: LineWire) -> None:
    tree, pids = grown(unix, 2, 2, "ignore")
    os.kill(pids[0], signal.SIGTERM)  # its own way to leave, with code 0
    info = unix.ended(tree)
    assert info["status"] == "completed" and info["exit"]["code"] == 0 and info["exit"]["reason"] == "exited"
    gone(pids)
    assert leaked_pids(info["exit"]) == set(pids[1:])


@pytest.mark.parametrize("environment", ["keep", "clear"])
@pytest.mark.parametrize("end", ["stop", "kill", "exit", "limit"])
def test_a_daemon_is_ended_and_named(unix: LineWire, end: str, environment: str) -> None:
    """Double-forked, its own session, SIGTERM ignored, stdio closed, even its environment cleared."""
    limits = {"runtime_secs": 1.0} if end == "limit" else None
    daemoniser = unix.spawn("daemoniser", "exit" if end == "exit" else "wait", environment, grace_secs=0.3,
                            limits=limits)
    daemon = int(unix.lines(daemoniser, 2)[1])
    if end in ("stop", "kill"):
        unix.control(daemoniser, end)
    record = unix.exit(daemoniser)
    gone([daemon])
    assert leaked_pids(record) == {daemon}, record
    assert "python" in record["leaked"][0]["command"]


def test_orphans_of_two_agents_are_told_apart(unix: LineWire) -> None:
    one, two = unix.spawn("daemoniser", "wait", "clear"), unix.spawn("daemoniser", "wait", "clear")
    first, second = (int(unix.lines(each, 2)[1]) for each in (one, two))
    unix.control(one, "kill")
    assert leaked_pids(unix.exit(one)) == {first}
    gone([first])
    assert alive(second) and unix.status(two) == "running", "the other agent's daemon is none of its business"
    unix.control(two, "kill")
    assert leaked_pids(unix.exit(two)) == {second}
    gone([second])


def test_signals_reach_the_whole_tree(unix: LineWire) -> None:
    tree, pids = grown(unix, 2, 2)
    unix.control(tree, "signal", signal="SIGSTOP")
    stopped(pids)
    unix.control(tree, "signal", signal="SIGCONT")
    wait_until(lambda: states(pids) == {"S"})
    unix.control(tree, "signal", signal="SIGKILL")
    record = unix.exit(tree)
    assert record["reason"] == "signaled" and record["by"] and record["signal"] == "SIGKILL"
    gone(pids)


def test_a_paused_tree_can_be_stopped(unix: LineWire) -> None:
    tree, pids = grown(unix, 2, 2, grace_secs=1000)
    unix.control(tree, "pause")
    unix.control(tree, "stop")
    assert unix.exit(tree)["reason"] == "stop"
    gone(pids)


def test_inspect_shows_the_tree(unix: LineWire) -> None:
    tree, pids = grown(unix, 2, 2)
    shown = json.dumps(unix.control(tree, "inspect")["tree"])
    assert all(str(pid) in shown for pid in pids), shown


@pytest.mark.parametrize("kind", ["plain", "daemon"])
def test_a_holder_of_the_pipe_delays_nothing(unix: LineWire, kind: str) -> None:
    """The end of an agent is its leader's end, not the end of its pipe."""
    holder = unix.spawn("holder", 5, kind)
    held = int(unix.lines(holder, 2)[1])
    info = unix.ended(holder)
    assert info["status"] == "failed" and info["exit"]["code"] == 5 and info["exit"]["duration"] < 10
    assert leaked_pids(info["exit"]) == {held}
    gone([held])
    assert unix.output(holder).endswith(b"last words\n") and unix.read(holder, offset=0)["eof"]


def test_no_zombie_is_kept(start_server: Callable[..., Server]) -> None:
    server = start_server()
    with LineWire(server.socket_path) as wire:
        for end in ("keep", "clear"):
            daemoniser = wire.spawn("daemoniser", "exit", end)
            wire.ended(daemoniser)
        holder = wire.spawn("holder", 0, "daemon", ready=False)
        wire.ended(holder)
        tree, pids = grown(wire, 3, 2)
        wire.control(tree, "kill")
        wire.ended(tree)
        gone(pids)
        ours = server.pids()

        def zombies() -> list[str]:
            found = []
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open(f"/proc/{pid}/stat") as f:
                        state, parent = f.read().rpartition(")")[2].split()[:2]
                except OSError:
                    continue
                if state == "Z" and int(parent) in ours.values():
                    found.append(pid)
            return found
        wait_until(lambda: not zombies(), what="zombies to be reaped")
        assert server.pids() == ours


def test_a_wide_tree_is_ended_completely(unix: LineWire) -> None:
    tree, pids = grown(unix, 1, 60, "ignore", grace_secs=0.2)
    unix.control(tree, "stop")
    record = unix.exit(tree)
    gone(pids)
    assert leaked_pids(record) == set(pids[1:])
