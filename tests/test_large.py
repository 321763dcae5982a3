"""Large work is done in steps: thousands of ends, a large tree, a directory with everything in it; others are served.

Owns:    that the steps come to the right end, that a mistake with one agent costs no other, and that what is deleted
         little by little is gone in the end, also after a death. How long others wait is measured in bench/.
Runs in: the test process; some with a real server.
Unaware: of how the steps are cut.
"""
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from support import Server, wait_until
from test_faults import back
from wire import LineWire, alive

from agentserver.core.reactor import Reactor
from agentserver.core.rounds import each
from agentserver.core.scheduler import Scheduler
from agentserver.core.trash import Trash

# ---------------------------------------------------------------- what fails for one


def test_what_fails_for_one_agent_costs_no_other(reactor: Reactor) -> None:
    done, said = [], []
    reactor.say = said.append

    def deed(agent: Any) -> None:
        done.append(agent)
        if agent == "b":
            raise KeyError("a mistake")
    agents: list[Any] = ["a", "b", "c"]
    list(each(agents, deed, reactor, "the end of an agent"))
    assert done == agents
    assert len(said) == 1 and "the end of an agent failed" in said[0] and "a mistake" in said[0]


def test_steps_are_as_long_as_a_slice(reactor: Reactor) -> None:
    clock, seen = iter(range(1000)), []
    reactor.clock = lambda: float(next(clock))
    agents: list[Any] = list(range(10))
    assert len(list(each(agents, seen.append, reactor, ""))) == 10, "each took a second, longer than a step"
    assert seen == agents


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """A loop without anything."""
    made = Reactor()
    yield made
    made.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a core is told from other parts by /proc")
@pytest.mark.parametrize("victim", ["drain", "finish"])
def test_the_ends_of_the_others_are_recorded(start_server: Callable[..., Server], tmp_path: Path, victim: str) -> None:
    """A core in which the end of the first agent fails: all other ends of the same moment are recorded."""
    mistake = {"drain": "from agentserver.core import run\nreal = run.Run.drain\n"
                        "def drain(self):\n    if self.output.directory.endswith(open(where).read().strip() or '-'):\n"
                        "        raise KeyError('a mistake')\n    return real(self)\nrun.Run.drain = drain\n",
               "finish": "from agentserver.core import ending\nreal = ending.verdict\n"
                         "def verdict(agent, run, clock):\n    if agent.id == open(where).read().strip():\n"
                         "        raise KeyError('a mistake')\n    return real(agent, run, clock)\n"
                         "ending.verdict = verdict\n"}[victim]
    who = tmp_path / "who"
    who.write_text("")
    package = Path(sys.modules["agentserver"].__file__ or "").parent
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nif open('/proc/self/cmdline').read().endswith('\\0_core\\0'):\n    where = {str(who)!r}\n"
        + "".join(f"    {line}\n" for line in mistake.splitlines()))
    server = start_server("--shutdown-timeout-secs", "2", environ={"PYTHONPATH": f"{tmp_path}:{package.parent}"})
    with LineWire(server.socket_path) as wire:
        agents = [wire.spawn("sleeper") for _ in range(5)]
        who.write_text(agents[0])
        wire.ok("batch_control_command", agent_ids=agents, command_type="kill")
        for agent in agents[1:]:
            assert wire.exit(agent)["reason"] == "kill"
        if victim == "drain":
            assert wire.exit(agents[0])["reason"] == "kill", "what it wrote last may be lost, its end is not"
    assert "a mistake" in (server.state_dir / "core.log").read_text()


# ---------------------------------------------------------------- many, and large

def test_a_crowd_ends_in_steps(start_server: Callable[..., Server]) -> None:
    server = start_server("--max-agents", "300", "--history-agents", "100")
    with LineWire(server.socket_path) as wire:
        agents = [wire.ok("spawn_request", config={"command": ["sleep", "1000"]})["agent_info"]["id"]
                  for _ in range(200)]
        pids = {wire.info(agent)["pid"] for agent in agents[:20]}
        for command in ("pause", "resume"):
            assert wire.ok("batch_control_command", agent_ids=agents, command_type=command)["successful"] == 200
        wire.ok("batch_control_command", agent_ids=agents, command_type="stop")
        wait_until(lambda: wire.ok("health_check_request")["active_agents"] == 0)
        wait_until(lambda: len(wire.agents(all=True, limit=1000)) == 100, what="the oldest to be forgotten")
        assert {each["exit"]["reason"] for each in wire.agents(all=True, limit=1000)} == {"stop"}
        assert not any(map(alive, pids))


def test_a_crowd_ends_with_its_server(start_server: Callable[..., Server]) -> None:
    server = start_server("--max-agents", "300")
    with LineWire(server.socket_path) as wire:
        agents = [wire.ok("spawn_request", config={"command": ["sleep", "1000"]})["agent_info"]["id"]
                  for _ in range(100)]
        pids = [wire.info(agent)["pid"] for agent in agents]
    assert server.stop() == 0
    assert not any(map(alive, pids))


def test_a_large_tree_is_killed_and_named_to_the_last(unix: LineWire) -> None:
    count = 260
    code = ("import os, signal\nfor n in range(%d):\n    if os.fork() == 0:\n        signal.pause()\n"
            "os.write(1, b'ready\\n')\nsignal.pause()" % count)
    agent = unix.spawn("", command=[sys.executable, "-c", code])
    tree = [one["pid"] for one in unix.control(agent, "inspect")["tree"]]
    assert len(tree) == count
    unix.control(agent, "kill")
    record = unix.exit(agent)
    assert {one["pid"] for one in record["leaked"]} == set(tree) and record["survivors"] == []
    assert not any(map(alive, tree))


def test_what_forks_while_the_server_ends_is_killed(start_server: Callable[..., Server]) -> None:
    """It leaves its agent, and forks on and on."""
    server = start_server()
    code = ("import os, time\nos.write(1, b'ready\\n')\n"
            "while True:\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(0.05)\n    else:\n"
            "        time.sleep(0.01)\n        os._exit(0) if os.getpid() != %d else os.wait() and time.sleep(0.2)\n")
    with LineWire(server.socket_path) as wire:
        wire.spawn("", command=[sys.executable, "-c", code.replace("%d", "leader").replace(
            "import os, time\n", "import os, time\nleader = os.getpid()\n")])
    assert server.stop() == 0  # and the fixture looks that nothing is left


# ---------------------------------------------------------------- the trash

class Bin:
    """A trash with a loop of its own."""

    def __init__(self, where: Path) -> None:
        self.said: list[str] = []
        self.reactor = Reactor()
        self.path = where / "trash"
        self.trash = Trash(str(self.path), Scheduler(self.reactor), self.reactor.clock, self.said.append)

    def until_empty(self) -> None:
        while self.path.exists() and os.listdir(self.path):
            self.reactor.turn(wait=False)


@pytest.fixture
def bin_(tmp_path: Path) -> Iterator[Bin]:
    """See `Bin`."""
    made = Bin(tmp_path)
    yield made
    made.reactor.close()


def test_a_directory_is_out_of_the_way_at_once_and_gone_later(bin_: Bin, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    place = tmp_path / "agents" / "a"
    deep = place
    for _ in range(1500):  # deeper than Python calls itself, and longer than a path may be
        deep.mkdir(parents=True) if deep is place else os.mkdir("d")
        os.chdir(place if deep is place else "d")
        deep = deep / "d"
    os.chdir("/")
    for n in range(3000):
        (place / f"file{n}").touch()
    (place / "link").symlink_to(elsewhere)
    os.mkfifo(place / "pipe")
    (place / "locked").mkdir(0o000)
    bin_.trash.throw(str(place))
    assert not place.exists() and len(os.listdir(bin_.path)) == 1
    bin_.reactor.turn(wait=False)
    assert os.listdir(bin_.path), "not all in one turn"
    bin_.until_empty()
    assert (elsewhere / "kept").read_text() == "kept" and not bin_.said
    assert bin_.path.stat().st_mode & 0o777 == 0o700


def test_what_is_no_directory_goes_too_and_what_is_nothing_is_nothing(bin_: Bin, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "file").touch()
    for name in ("link", "file", "nothing"):
        bin_.trash.throw(str(tmp_path / name))
    bin_.until_empty()
    assert elsewhere.is_dir() and not (tmp_path / "link").is_symlink() and not (tmp_path / "file").exists()
    assert not bin_.said


def test_a_new_core_goes_on_deleting(start_server: Callable[..., Server]) -> None:
    server = start_server()
    left = server.state_dir / "trash" / "1-1"
    (left / "inner").mkdir(parents=True)
    (left / "file").touch()
    core = server.pids()["core"]
    os.kill(core, signal.SIGKILL)
    back(server, "core", core)
    wait_until(lambda: not left.exists())


def test_a_removed_agent_leaves_nothing(shared: Server, unix: LineWire) -> None:
    agent = unix.ok("spawn_request", config={"command": ["echo", "hello"]})["agent_info"]["id"]
    unix.ended(agent)
    directory = shared.state_dir / "agents" / agent
    assert directory.exists()
    unix.control(agent, "remove")
    assert not directory.exists()
    wait_until(lambda: not os.listdir(shared.state_dir / "trash"))
