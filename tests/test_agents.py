"""What an agent is given, how many there may be, and how each kind of end is recorded.

Owns:    environment, descriptors, limits, signals and directory of an agent; backends end to end; runtime limit;
         max_agents; the ladder's steps; events of a life.
Runs in: the test process; servers and agents are real.
Unaware: of trees (test_tree.py) and streams (test_streams.py).
"""
from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Callable

import pytest
from support import MAIN, Server, agent, wait_until
from wire import LineWire, Wire, alive, here

ALLOWED = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
           "NODE_EXTRA_CA_CERTS"}


def reported(wire: Wire, **config: object) -> dict:  # type: ignore[type-arg]
    """Return what a fresh agent says it was given."""
    found: dict = json.loads(wire.lines(wire.spawn("report", **config), 2)[1])  # type: ignore[type-arg]
    return found


# ---------------------------------------------------------------- what it is given

def test_the_environment_is_an_allow_list(start_server: Callable[..., Server]) -> None:
    allowed = {name: f"value of {name}" for name in ALLOWED - {"PATH", "HOME", "TMPDIR"}}
    server = start_server(environ={
        **allowed, "HOME": "/root", "LC_ALL": "C.UTF-8", "LC_TIME": "C", "ANTHROPIC_API_KEY": "secret",
        "SECRET": "secret",
        "PYTHONPATH": str(MAIN.parent.parent), "LD_LIBRARY_PATH": "/tmp", "AGENTSERVER_SERVER_ID": "the-server",
        "AGENTSERVER_REQUEST_TIMEOUT_SECS": "30", "CHOSEN": "1", "ALSO_A": "2", "XLC_ALL": "no", "LCX": "no",
        "AGENTSERVER_PASS_ENVIRONMENT": "TEST_RUN_MARK,CHOSEN,ALSO_*"})
    with LineWire(server.socket_path) as wire:
        got = reported(wire, environment={"MINE": "3", "TERM": "mine"}, context="the context")["environment"]
        assert set(got) == ALLOWED | {"LC_ALL", "LC_TIME", "TEST_RUN_MARK", "CHOSEN", "ALSO_A", "MINE", "AGENT_CONTEXT",
                                      "AGENTSERVER_AGENT_ID"}
        assert got["TERM"] == "mine" and got["AGENT_CONTEXT"] == "the context" and got["USER"] == "value of USER"
        assert "secret" not in str(got)


def test_no_descriptor_of_ours_is_inherited(unix: LineWire) -> None:
    others = [unix.spawn("sleeper") for _ in range(5)]
    for stdin in ("pipe", "null"):
        given = reported(unix, stdin=stdin)
        inherited = {fd: what for fd, what in given["fds"].items() if not what.startswith("/proc/")}
        assert set(inherited) == {"0", "1", "2"}, given["fds"]
        assert inherited["0"].startswith("pipe:" if stdin == "pipe" else "/dev/null")
        assert inherited["1"].startswith("pipe:") and inherited["2"].startswith("pipe:")
        assert inherited["1"] != inherited["2"], "stdout and stderr are kept apart"
    assert len(others) == 5


def test_an_agent_leads_its_own_session(unix: LineWire) -> None:
    given = reported(unix)
    assert given["sid"] == given["pgid"] == given["pid"]


def test_the_descriptor_limit_is_the_original_one(start_server: Callable[..., Server]) -> None:
    server = start_server("--max-agents", "20",
                          program=["/bin/sh", "-c", 'ulimit -Sn 300; exec "$@"', "sh", sys.executable, str(MAIN)])
    with LineWire(server.socket_path) as wire:
        assert reported(wire)["nofile"][0] == 300


def test_signals_are_neither_blocked_nor_ignored(unix: LineWire) -> None:
    """Asked of a program that changes none itself: Python ignores SIGPIPE on its own."""
    status = unix.output(unix.spawn("", command=["/bin/cat", "/proc/self/status"], ready=False)).decode()
    masks = {line.split(":")[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Sig")
             and "/" not in line}
    standard = (1 << 31) - 1  # 32 and 33 are the C library's own
    assert masks["SigBlk"] == 0 and masks["SigIgn"] & standard == 0 and masks["SigCgt"] & standard == 0


def test_a_server_started_with_blocked_signals_passes_none_on(start_server: Callable[..., Server]) -> None:
    code = "import os,signal,sys; signal.pthread_sigmask(signal.SIG_BLOCK,[signal.SIGTERM,signal.SIGUSR1]); " \
           "os.execv(sys.argv[1],sys.argv[1:])"
    server = start_server(program=[sys.executable, "-c", code, sys.executable, str(MAIN)])
    with LineWire(server.socket_path) as wire:
        status = wire.output(wire.spawn("", command=["/bin/cat", "/proc/self/status"], ready=False)).decode()
        assert "SigBlk:\t0000000000000000" in status


def test_the_default_directory(start_server: Callable[..., Server], tmp_path: Path, unix: LineWire) -> None:
    (tmp_path / "agents").mkdir()
    server = start_server("--agent-dir", str(tmp_path / "agents"))
    with LineWire(server.socket_path) as wire:
        assert reported(wire)["cwd"] == str(tmp_path / "agents")
        assert reported(wire, cwd=str(tmp_path))["cwd"] == str(tmp_path)
    started_in = start_server(cwd=tmp_path)
    with LineWire(started_in.socket_path) as wire:
        assert reported(wire)["cwd"] == str(tmp_path), "where `serve` was started"


# ---------------------------------------------------------------- backends, end to end

@pytest.fixture(scope="module")
def backend_server(shared_servers: object, tmp_path_factory: pytest.TempPathFactory,
                   run_dir: Path):  # type: ignore[no-untyped-def]
    """A server on whose PATH stand-ins for the agent CLIs are."""
    bin_dir = tmp_path_factory.mktemp("bin")
    source = Path(here("claude.py")).read_text()
    for name in ("claude", "opencode", "codex", "gemini", "aider", "my-tool"):
        (bin_dir / name).write_text(f"#!{sys.executable} -S\n{source}")
        (bin_dir / name).chmod(stat.S_IRWXU)
    config = bin_dir / "server.ini"
    config.write_text("[server]\nmax_agents = 50\n\n[backend mine]\nargv = my-tool --model {model} --say {task} end\n")
    home = run_dir / "backends"
    home.mkdir()
    server = Server(home, "--config", str(config), environ={"PATH": f"{bin_dir}:{os.environ['PATH']}"})
    yield server
    server.close()


def called(server: Server, **config: object) -> tuple[str, dict]:  # type: ignore[type-arg]
    """Spawn by backend, and return the id and how the stand-in was called."""
    with LineWire(server.socket_path) as wire:
        started = wire.spawn("", command=None, **config)
        line: dict = json.loads(wire.lines(started, 2)[1])  # type: ignore[type-arg]
        assert wire.exit(started)["code"] == 0
        return started, line


def test_claude(backend_server: Server) -> None:
    started, line = called(backend_server, model_backend="claude", task="--fix it", model="opus",
                           system_prompt="be brief",
                           tool_level="read-only", context="ctx")
    assert line["name"] == "claude" and line["stdin"] == "/dev/null" and line["environment"]["AGENT_CONTEXT"] == "ctx"
    argv = line["argv"]
    assert argv[0] == "-p" and argv[-2:] == ["--", "--fix it"]
    assert "--verbose" in argv and argv[argv.index("--output-format") + 1] == "stream-json"
    assert argv[argv.index("--model") + 1] == "opus" and argv[argv.index("--append-system-prompt") + 1] == "be brief"
    assert argv[argv.index("--allowedTools") + 1] == "Read,Glob,Grep"
    with LineWire(backend_server.socket_path) as wire:
        info = wire.info(started)
        assert info["model_backend"] == "claude" and info["task"] == "--fix it" and info["stdin"] == "null"
        assert info["status"] == "completed" and "claude" in info["command"][0]


def test_flags_without_a_value_are_left_out(backend_server: Server) -> None:
    argv = called(backend_server, model_backend="claude", task="x")[1]["argv"]
    assert not {"--model", "--append-system-prompt", "--allowedTools", ""} & set(argv)


@pytest.mark.parametrize("backend, start, ends", [
    ("codex", ["exec", "--json", "--skip-git-repo-check"], ["--", "do it"]),
    ("opencode", ["run", "--format", "json"], ["--", "do it"]),
    ("gemini", ["-m", "some/model"], ["-p", "do it"]),
    ("aider", ["--model", "some/model"], ["--message", "do it"]),
])
def test_the_other_backends(backend_server: Server, backend: str, start: list[str], ends: list[str]) -> None:
    line = called(backend_server, model_backend=backend, task="do it", model="some/model")[1]
    assert line["name"] == backend and line["stdin"] == "/dev/null"
    assert line["argv"][:len(start)] == start and line["argv"][-2:] == ends and "some/model" in line["argv"]


def test_any_program_as_a_backend(backend_server: Server) -> None:
    line = called(backend_server, model_backend="my-tool-cli", task="-x do it")[1]
    assert line["name"] == "my-tool" and line["argv"][-1] == "-x do it" and line["stdin"].startswith("pipe:")


def test_a_backend_of_the_config_file(backend_server: Server) -> None:
    line = called(backend_server, model_backend="mine", task="do it")[1]
    assert line["argv"] == ["--say", "do it", "end"]
    line = called(backend_server, model_backend="mine", task="do it", model="m")[1]
    assert line["argv"] == ["--model", "m", "--say", "do it", "end"]


def test_tool_levels_that_cannot_be_enforced_are_refused(backend_server: Server) -> None:
    with LineWire(backend_server.socket_path) as wire:
        for backend, level in (("claude", "lisp"), ("claude", "nonsense"), ("codex", "researcher"),
                               ("opencode", "minimal"),
                               ("aider", "readonly"), ("gemini", "planner"), ("my-tool-cli", "readonly")):
            wire.refused("bad_request", "spawn_request",
                         config={"model_backend": backend, "task": "x", "tool_level": level})


def test_a_backend_that_is_not_installed(unix: LineWire) -> None:
    sentence = unix.refused("spawn_failed", "spawn_request", config={"model_backend": "no-such-tool-cli", "task": "x"})
    assert "no-such-tool" in sentence


# ---------------------------------------------------------------- ends

def test_the_runtime_limit_ends_an_agent(unix: LineWire) -> None:
    sleeper = unix.spawn("sleeper", limits={"runtime_secs": 0.3})
    info = unix.ended(sleeper)
    assert info["status"] == "terminated" and info["exit"]["reason"].startswith("limit:runtime")
    stubborn = unix.spawn("stubborn", limits={"runtime_secs": 0.3}, grace_secs=0.1)
    info = unix.ended(stubborn)
    assert info["exit"]["reason"].startswith("limit:runtime") and info["exit"]["signal"] == "SIGKILL"
    quick = unix.spawn("exit_with", 0, limits={"runtime_secs": 60})
    assert unix.exit(quick)["reason"] == "exited"


def test_sigterm_first_then_sigkill_after_the_grace(unix: LineWire) -> None:
    stubborn = unix.spawn("stubborn", grace_secs=0.2)
    unix.control(stubborn, "stop")
    record = unix.exit(stubborn)
    assert record["signal"] == "SIGKILL" and record["reason"] == "stop" and record["by"]
    assert record["duration"] >= 0.2
    other = unix.spawn("stubborn")
    unix.control(other, "stop", grace_secs=0.05)
    assert unix.exit(other)["signal"] == "SIGKILL", "the command's own grace goes before the agent's"


def test_grace_zero_kills_at_once(unix: LineWire) -> None:
    stubborn = unix.spawn("stubborn")
    unix.control(stubborn, "stop", grace_secs=0)
    assert unix.exit(stubborn)["signal"] == "SIGKILL"


def test_a_second_stop_is_harmless(unix: LineWire) -> None:
    stubborn = unix.spawn("stubborn", grace_secs=1000)
    unix.control(stubborn, "stop")
    second = unix.ask("control_command", agent_id=stubborn, command_type="stop", payload={"grace_secs": 0.1})
    assert second["success"] or second["error_code"] == "invalid_state"
    unix.control(stubborn, "kill")
    assert unix.exit(stubborn)["signal"] == "SIGKILL"


def test_kill_gives_no_time_to_say_goodbye(unix: LineWire) -> None:
    catcher = unix.spawn("catcher", 1, 0)
    unix.control(catcher, "kill")
    info = unix.ended(catcher)
    assert info["status"] == "terminated" and info["exit"]["reason"] == "kill" and info["exit"]["signal"] == "SIGKILL"
    assert unix.output(catcher) == b"ready\n"


def test_a_stopped_agent_can_be_stopped(unix: LineWire) -> None:
    """SIGTERM does not land in a process that SIGSTOP holds; it needs SIGCONT."""
    for how in ("pause", "signal", "from outside"):
        catcher = unix.spawn("catcher", 1, 0, grace_secs=1000)
        if how == "pause":
            unix.control(catcher, "pause")
        elif how == "signal":
            unix.control(catcher, "signal", signal="SIGSTOP")
        else:
            os.kill(unix.info(catcher)["pid"], signal.SIGSTOP)
        unix.control(catcher, "stop")
        record = unix.exit(catcher)
        assert record["code"] == 0 and record["reason"] == "stop", how
        assert b"SIGTERM\n" in unix.output(catcher)


def test_a_paused_agent_that_is_killed(unix: LineWire) -> None:
    sleeper = unix.spawn("sleeper")
    unix.control(sleeper, "pause")
    unix.control(sleeper, "kill")
    info = unix.ended(sleeper)
    assert info["status"] == "terminated" and info["exit"]["reason"] == "kill"


def test_a_kill_from_outside_is_not_taken_for_ours(unix: LineWire) -> None:
    sleeper = unix.spawn("sleeper")
    os.kill(unix.info(sleeper)["pid"], signal.SIGKILL)
    info = unix.ended(sleeper)
    assert info["status"] == "failed" and info["exit"]["reason"] == "signaled" and info["exit"]["by"] is None


def test_an_end_of_its_own_during_the_ladder_of_another(unix: LineWire) -> None:
    """Twenty ladders at once do not wait for each other."""
    ids = [unix.spawn("stubborn", grace_secs=0.3, ready=False, labels={"many": "1"}) for _ in range(20)]
    for each in ids:
        unix.until_output(each, b"ready\n")
    unix.ok("batch_control_command", labels={"many": "1"}, command_type="stop")
    ends = [unix.ended(each) for each in ids]
    assert all(e["exit"]["signal"] == "SIGKILL" for e in ends)
    stamps = sorted(e["finished_at"] for e in ends)
    assert stamps[0][:16] == stamps[-1][:16] or stamps[-1] > stamps[0]
    secs = [float(s[17:-1]) for s in stamps]
    assert (secs[-1] - secs[0]) % 60 < 0.3 * 10, "in parallel: far less than twenty times the grace"


def test_the_end_of_a_dead_agent_is_written_before_it_is_said(unix: LineWire) -> None:
    quick = unix.spawn("burst", 50_000, 0, ready=False)
    unix.subscribe(f"status.{quick}", "status.")
    wait_until(lambda: unix.status(quick) == "completed")
    info = unix.info(quick)
    assert info["exit"] and info["pid"] is None and info["output"]["stdout"]["end_offset"] == 50_006


# ---------------------------------------------------------------- how many

def test_max_agents(start_server: Callable[..., Server]) -> None:
    server = start_server("--max-agents", "3")
    with LineWire(server.socket_path) as wire:
        ids = [wire.spawn("sleeper") for _ in range(3)]
        sentence = wire.refused("limit_reached", "spawn_request", config={"command": agent("sleeper")})
        assert "3" in sentence
        assert wire.ok("stats_request")["stats"]["failed_spawns"] == 1
        assert wire.ok("health_check_request")["metadata"]["max_agents"] == "3"
        wire.control(ids[0], "kill")
        wire.ended(ids[0])
        wire.spawn("sleeper")
        wire.cannot("limit_reached", ids[0], "restart")
        assert wire.ok("health_check_request")["active_agents"] == 3


def test_history_is_bounded(start_server: Callable[..., Server]) -> None:
    server = start_server("--history-agents", "3")
    with LineWire(server.socket_path) as wire:
        ids = []
        for _ in range(6):
            ids.append(wire.spawn("exit_with", 0))
            wire.ended(ids[-1])
        wait_until(lambda: [a["id"] for a in wire.agents(all=True)] == ids[3:], what="retention")
        wire.cannot("agent_not_found", ids[0], "get_status")
        wait_until(lambda: {p.name for p in (server.state_dir / "agents").iterdir()} == set(ids[3:]),
                   what="the files of forgotten agents to go")
        assert wire.output(ids[5]) == b"ready\n"


def test_an_idle_server_takes_no_time(start_server: Callable[..., Server]) -> None:
    """Woken by descriptors, never by polling: nothing is computed between two questions far apart."""
    server = start_server()
    with LineWire(server.socket_path) as wire:
        for _ in range(5):
            wire.spawn("sleeper")

        def used() -> float:
            stats = wire.ok("stats_request")["stats"]
            return float(sum(stats[part]["cpu_secs"] for part in ("core", "shell", "keeper")))
        used()
        before, asked = used(), 0
        sleeper = wire.spawn("sleeper", limits={"runtime_secs": 2})
        wire.subscribe(f"status.{sleeper}")
        wire.event(lambda e: e.get("status") == "terminated")
        assert used() - before < 0.2 and not asked, "two seconds of waiting"


def test_every_status_seen_is_in_the_table(unix: LineWire) -> None:
    from agentserver.core.lifecycle import TERMINAL, TRANSITIONS
    moves = {(before, after) for (before, _), after in TRANSITIONS.items()}
    one = unix.spawn("sleeper")
    unix.control(one, "pause")
    unix.control(one, "resume")
    unix.control(one, "restart")
    wait_until(lambda: unix.info(one)["attempt"] == 2 and unix.status(one) == "running")
    unix.control(one, "kill")
    unix.ended(one)
    seen = [e["status"] for e in unix.ok("events_request", agent_id=one)["events"]]
    steps = [(a, b) for a, b in zip(seen, seen[1:]) if a != b]
    moves |= {(end, "running") for end in TERMINAL}  # by way of initializing, in one transaction
    assert set(steps) <= moves, seen
    assert seen[-1] == "terminated" and seen.count("paused") >= 1 and alive(os.getpid())


def test_a_later_stop_does_not_put_the_kill_off(unix: LineWire) -> None:
    stubborn = unix.spawn("stubborn")
    unix.control(stubborn, "stop", grace_secs=0.5)
    unix.control(stubborn, "stop", grace_secs=600)
    assert unix.exit(stubborn)["signal"] == "SIGKILL"
