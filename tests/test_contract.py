"""One contract, every link: what protocol.md says of each request, over Unix socket, tcp and ipc.

Owns:    the shape of every reply, the life of an agent from spawn to removal, names, lists, batches, events, counters.
Runs in: the test process; the server is real and shared.
Unaware: of our client library; wire.py speaks by hand.
"""
from __future__ import annotations

import hashlib
import re
import signal

import pytest
from support import Server, agent, wait_until
from wire import Wire, alive, child_environ, data_of, new_id

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


# ---------------------------------------------------------------- health, stats, events

def test_health_says_who_answers_and_where(wire: Wire, shared_server: Server) -> None:
    health = wire.ok("health_check_request")
    assert health["healthy"] is True and health["protocol_version"] == "1.0.0"
    assert health["active_agents"] == 0 and health["uptime_secs"] > 0
    metadata = health["metadata"]
    assert {"server_id", "endpoint", "pub_endpoint", "max_agents", "version", "hostname", "pid", "shell_pid",
            "core_pid",
            "generation"} <= set(metadata)
    assert all(isinstance(value, str) for value in metadata.values()), metadata
    assert int(metadata["pid"]) == shared_server.process.pid
    assert len({metadata["pid"], metadata["core_pid"], metadata["shell_pid"]}) == 3
    assert not metadata["endpoint"].endswith(":0") and not metadata["pub_endpoint"].endswith(":0")
    assert metadata["max_agents"] == "100" and int(metadata["generation"]) >= 1
    wire.spawn("sleeper")
    assert wire.ok("health_check_request")["active_agents"] == 1


def test_stats_count_what_was_asked(wire: Wire) -> None:
    before = wire.ok("stats_request")["stats"]
    quiet = wire.spawn("exit_with", 0)
    wire.ended(quiet)
    wire.refused("spawn_failed", "spawn_request", config={"command": ["/nonexistent/program"]})
    wire.ok("health_check_request")
    wire.ok("list_agents_request")
    wire.refused("unknown_type", "no_such_request")
    after = wire.ok("stats_request")["stats"]
    grown = {k: after[k] - before[k] for k in after if isinstance(after[k], int) and not isinstance(after[k], bool)}
    assert grown["requests"] >= 7 and grown["spawn_requests"] == 2 and grown["health_checks"] == 1
    assert grown["successful_spawns"] == 1 and grown["failed_spawns"] == 1 and grown["list_requests"] == 1
    assert grown["control_commands"] >= 2 and grown["errors"] >= 2 and grown["bytes_captured"] == 6
    assert after["active_agents"] == 0 and sum(after["agents_by_status"].values()) >= 1
    assert STAMP.fullmatch(after["started_at"]) and after["uptime_secs"] > 0
    for part in ("core", "shell", "keeper"):
        assert after[part]["pid"] > 1 and after[part]["rss_bytes"] > 0 and after[part]["fds"] > 0, after[part]
        assert after[part]["cpu_secs"] >= 0


def test_events_tell_the_life_in_one_sequence(wire: Wire) -> None:
    last = wire.ok("events_request", since=0, limit=10_000)
    while last["more"]:
        last = wire.ok("events_request", since=last["next"], limit=10_000)
    one = wire.spawn("exit_with", 3)
    wire.ended(one)
    two = wire.spawn("sleeper")
    page = wire.ok("events_request", since=last["next"])
    sequences = [event["sequence"] for event in page["events"]]
    assert sequences == list(range(last["next"] + 1, last["next"] + 1 + len(sequences)))
    assert page["next"] == sequences[-1] and page["more"] is False and page["first_kept"] >= 1
    mine = [e for e in page["events"] if e["agent_id"] == one]
    assert [e["status"] for e in mine][-1] == "failed" and "running" in [e["status"] for e in mine]
    assert all(e["type"] == "status_update" and STAMP.fullmatch(e["timestamp"]) for e in mine)
    assert {e["update_type"] for e in mine} <= {"status_changed", "error", "completed", "terminated"}
    only = wire.ok("events_request", since=last["next"], agent_id=two)["events"]
    assert only and {e["agent_id"] for e in only} == {two}
    first = wire.ok("events_request", since=last["next"], limit=1)
    assert len(first["events"]) == 1 and first["more"] is True and first["next"] == sequences[0]
    beyond = wire.ok("events_request", since=sequences[-1] + 1000)
    assert beyond["events"] == [] and beyond["more"] is False
    wire.refused("bad_request", "events_request", since=-1)
    wire.refused("bad_request", "events_request", limit=0)
    wire.refused("agent_not_found", "events_request", agent_id="nobody at all")


# ---------------------------------------------------------------- the life of an agent

def test_a_life(wire: Wire, shared_server: Server) -> None:
    reply = wire.ok("spawn_request", metadata={"ticket": 7, "odd": "\ud800"}, config={
        "name": "a life", "command": agent("echo"), "labels": {"team": "a"}, "environment": {"SECRET": "s3cret"}})
    info = reply["agent_info"]
    started = info["id"]
    assert UUID.fullmatch(started) and reply["server_id"] == shared_server.metadata["server_id"]
    assert info["status"] in ("initializing", "running") and info["name"] == "a life" and info["attempt"] == 1
    wire.until_output(started, b"ready\n")
    info = wire.info(started)
    assert info["status"] == "running" and info["want"] == "up" and alive(info["pid"])
    assert info["command"] == agent("echo") and info["stdin"] == "pipe" and info["cwd"].startswith("/")
    assert info["labels"] == {"team": "a"} and info["metadata"] == {"ticket": 7, "odd": "\ud800"}
    assert STAMP.fullmatch(info["created_at"]) and STAMP.fullmatch(info["started_at"])
    assert info["finished_at"] is None and info["exit"] is None and info["paused_at"] is None
    assert child_environ(info["pid"])[b"AGENTSERVER_AGENT_ID"] == started.encode()
    assert child_environ(info["pid"])[b"SECRET"] == b"s3cret"

    wrote = wire.control(started, "write_stdin", data="grüße\n")
    assert wrote["bytes_written"] == len("grüße\n".encode()) and wrote["buffered"] >= 0
    assert wire.control(started, "write_stdin", data=[0, 255, 10])["bytes_written"] == 3
    assert wire.control(started, "write_stdin", data="AP8K", encoding="base64")["bytes_written"] == 3
    wire.until_output(started, b"\x00\xff\n\x00\xff\n")
    assert wire.control(started, "write_stdin", data="last", eof=True)["bytes_written"] == 4

    info = wire.ended(started)
    assert info["status"] == "completed" and info["pid"] is None and STAMP.fullmatch(info["finished_at"])
    record = info["exit"]
    assert record["code"] == 0 and record["signal"] is None and record["reason"] == "exited"
    assert record["by"] is None and record["leaked"] == [] and record["duration"] > 0 and STAMP.fullmatch(record["at"])
    assert record["rusage"]["cpu_secs"] >= 0 and (record["rusage"]["max_rss_bytes"] or 1) > 0
    sent = "grüße\n".encode() + b"\x00\xff\n" * 2 + b"last"
    assert wire.output(started) == b"ready\n" + sent
    assert wire.output(started, "stderr") == b"eof after %d bytes\n" % len(sent)
    assert info["output"]["stdout"] == {"first_offset": 0, "end_offset": 6 + len(sent)}

    record = wire.control(started, "inspect")
    assert "s3cret" not in str(record) and "SECRET" in str(record)
    assert "s3cret" not in str(wire.agents(all=True)) and "s3cret" not in str(wire.ok("events_request"))
    assert record["agent_info"]["id"] == started and len(record["attempts"]) == 1
    assert record["attempts"][0]["exit"]["code"] == 0 and {"spec", "tree"} <= set(record)

    wire.control(started, "remove")
    wire.cannot("agent_not_found", started, "get_status")
    assert not (shared_server.state_dir / "agents" / started).exists()


@pytest.mark.parametrize("code", [1, 7, 255])
def test_failing_is_failed(wire: Wire, code: int) -> None:
    failing = wire.spawn("exit_with", code, "what went wrong")
    info = wire.ended(failing)
    assert info["status"] == "failed" and info["exit"]["code"] == code and info["exit"]["reason"] == "exited"
    assert wire.output(failing, "stderr") == b"what went wrong\n"


def test_dying_by_its_own_signal_is_failed_and_signaled(wire: Wire) -> None:
    dying = wire.spawn("die_by", int(signal.SIGSEGV))
    info = wire.ended(dying)
    assert info["status"] == "failed" and info["exit"]["reason"] == "signaled" and not info["exit"]["by"]
    assert info["exit"]["signal"] == "SIGSEGV" and info["exit"]["signal_number"] == 11 and info["exit"]["code"] is None


def test_stop_replies_at_once_and_the_status_follows_the_facts(wire: Wire) -> None:
    stubborn = wire.spawn("stubborn", grace_secs=3600)
    assert wire.control(stubborn, "stop")["stopping"] is True
    info = wire.info(stubborn)
    assert info["status"] == "running" and info["want"] == "down" and alive(info["pid"])
    assert wire.control(stubborn, "kill")["killing"] is True
    info = wire.ended(stubborn)
    assert info["status"] == "terminated" and info["exit"]["signal"] == "SIGKILL"
    assert info["exit"]["reason"] in ("kill", "stop") and info["exit"]["by"]
    wire.cannot("invalid_state", stubborn, "stop")
    wire.cannot("invalid_state", stubborn, "kill")


def test_stop_lets_an_agent_end_by_itself(wire: Wire) -> None:
    polite = wire.spawn("catcher", 1, 0)
    wire.control(polite, "stop")
    info = wire.ended(polite)
    assert info["status"] == "terminated" and info["exit"]["reason"] == "stop" and info["exit"]["by"]
    assert info["exit"]["code"] == 0 and info["exit"]["signal"] is None
    assert wire.output(polite) == b"ready\nSIGTERM\nbye\n"


def test_pause_and_resume(wire: Wire) -> None:
    ticker = wire.spawn("ticker", 0.01)
    paused = wire.control(ticker, "pause")
    assert paused["paused"] is True and paused["mode"] == "forced"
    info = wire.info(ticker)
    assert info["status"] == "paused" and STAMP.fullmatch(info["paused_at"]) and info["pause_mode"] == "forced"
    wire.cannot("invalid_state", ticker, "pause")
    assert wire.control(ticker, "resume")["resumed"] is True
    end = wire.info(ticker)["output"]["stdout"]["end_offset"]
    wait_until(lambda: wire.info(ticker)["output"]["stdout"]["end_offset"] > end, what="output after resume")
    info = wire.info(ticker)
    assert info["status"] == "running" and info["paused_at"] is None
    wire.cannot("invalid_state", ticker, "resume")


def test_signals_by_name_and_number(wire: Wire) -> None:
    catcher = wire.spawn("catcher", 6, 0)
    for count, sent in enumerate(["int", "SIGINT", "interrupt", "term", "SIGUSR1", int(signal.SIGHUP)]):
        assert wire.control(catcher, "signal", signal=sent)["signal_sent"]
        wait_until(lambda: wire.so_far(catcher)[0].count(b"\n") > count + 1, what=f"signal {sent} to land")
    names = [b"SIGINT", b"SIGINT", b"SIGINT", b"SIGTERM", b"SIGUSR1", b"SIGHUP", b"bye"]
    assert wire.output(catcher) == b"\n".join([b"ready", *names, b""])
    info = wire.ended(catcher)
    assert info["exit"]["code"] == 0 and info["exit"]["reason"] == "exited" and info["status"] == "completed"
    assert wire.cannot("invalid_state", catcher, "signal", signal="term")


def test_unknown_signals_are_refused_and_change_nothing(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    for wrong in ("SIGNONSENSE", "", "termm", 0, -1, 65, 10_000, 2 ** 63):
        wire.cannot("bad_request", sleeper, "signal", signal=wrong)
    for wrong_type in (True, 1.5, [], {}):
        wire.cannot("bad_request", sleeper, "signal", signal=wrong_type)
    wire.cannot("bad_request", sleeper, "signal")
    assert wire.status(sleeper) == "running"


def test_a_signal_that_ends_it_is_the_clients_doing(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    wire.control(sleeper, "signal", signal="SIGTERM")
    info = wire.ended(sleeper)
    assert info["status"] == "terminated" and info["exit"]["reason"] == "signaled" and info["exit"]["by"]
    assert info["exit"]["signal"] == "SIGTERM"


def test_signal_stop_and_cont_keep_the_status_true(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    wire.control(sleeper, "signal", signal="stop")
    wait_until(lambda: wire.status(sleeper) == "paused", what="paused after SIGSTOP")
    wire.control(sleeper, "signal", signal="cont")
    wait_until(lambda: wire.status(sleeper) == "running", what="running after SIGCONT")


def test_restart_keeps_id_and_output_and_counts_attempts(wire: Wire) -> None:
    twice = wire.spawn("exit_with", 2)
    wire.ended(twice)
    assert wire.output(twice) == b"ready\n"
    assert wire.control(twice, "restart")["attempt"] == 2
    wait_until(lambda: wire.info(twice)["attempt"] == 2 and wire.status(twice) == "failed")
    assert wire.info(twice)["id"] == twice
    assert wire.output(twice) == b"ready\n" * 2, "offsets go on, nothing is reused"
    attempts = wire.control(twice, "inspect")["attempts"]
    assert [a["exit"]["code"] for a in attempts] == [2, 2]


def test_restart_of_a_living_agent_ends_it_first(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    first = wire.info(sleeper)["pid"]
    wire.control(sleeper, "restart")
    wait_until(lambda: wire.info(sleeper)["attempt"] == 2 and wire.status(sleeper) == "running")
    assert wire.info(sleeper)["pid"] != first and not alive(first)
    wire.until_output(sleeper, b"ready\nready\n")


def test_custom_actions(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper", environment={"VERY_SECRET": "value-not-shown"})
    for ask in (lambda action, **params: wire.control(sleeper, "custom_action", action=action, **params),
                lambda action, **params: wire.ok("custom_action_request", agent_id=sleeper, action=action,
                                                 **params)["data"]):
        assert isinstance(ask("ping"), dict)
        assert "héllo" in str(ask("echo", params={"message": "héllo"}))
        names = str(ask("get_env"))
        assert "VERY_SECRET" in names and "value-not-shown" not in names
    reply = wire.ask("custom_action_request", agent_id=sleeper, action="no such action")
    assert not reply["success"] and reply["error_code"] in ("unknown_command", "bad_request"), reply


def test_stream_logs_says_where_to_listen(wire: Wire, shared_server: Server) -> None:
    sleeper = wire.spawn("sleeper")
    data = wire.control(sleeper, "stream_logs")
    assert data["pub_endpoint"] == shared_server.pub_endpoint and data["enabled"] is True
    assert sleeper in str(data["topic"]) and "6" in str(data["offsets"]), data


def test_remove_is_for_finished_agents(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    wire.cannot("invalid_state", sleeper, "remove")
    assert wire.status(sleeper) == "running"


# ---------------------------------------------------------------- output

def test_reads_by_offset(wire: Wire) -> None:
    burst = wire.spawn("burst", 100_000, 10)
    wire.ended(burst)
    whole = b"ready\n" + bytes(i % 251 for i in range(100_000))
    assert wire.output(burst) == whole
    chunk = wire.read(burst)
    assert chunk["offset"] == 0 and chunk["bytes"] == 65536 and chunk["eof"] is False and chunk["first_offset"] == 0
    chunk = wire.read(burst)
    assert chunk["offset"] == 65536 and data_of(chunk) == whole[65536:] and chunk["next_offset"] == len(whole)
    chunk = wire.read(burst)
    assert chunk["data"] is None and chunk["bytes"] == 0 and chunk["message"] and chunk["eof"] is True
    chunk = wire.read(burst, offset=7, max_bytes=3)
    assert data_of(chunk) == whole[7:10] and (chunk["offset"], chunk["next_offset"], chunk["dropped"]) == (7, 10, 0)
    assert wire.read(burst, offset=len(whole))["eof"] is True
    beyond = wire.ask("control_command", agent_id=burst, command_type="read_stdout", payload={"offset": 10 ** 9})
    assert not beyond["success"] or beyond["data"]["bytes"] == 0
    for wrong in ({"offset": -1}, {"offset": "0"}, {"offset": 1.0}, {"max_bytes": 0}, {"offset": True},
                  {"max_bytes": 4 * 1024 * 1024 + 1}):
        wire.cannot("bad_request", burst, "read_stdout", **wrong)
    assert data_of(wire.read(burst, "stderr")) == bytes(range(10))


def test_bytes_that_are_no_text_come_back_as_they_were(wire: Wire) -> None:
    binary = wire.spawn("binary", 3)
    wire.ended(binary)
    assert wire.output(binary) == b"ready\n" + (bytes(range(256)) + b"\xff\xfe\xe2\x82") * 3
    assert wire.output(binary, "stderr") == (bytes(range(255, -1, -1)) + b"\xc3") * 3
    chunk = wire.read(binary, offset=6, max_bytes=200)
    assert chunk["encoding"] == "base64"
    assert wire.read(binary, offset=0, max_bytes=6)["encoding"] == "utf-8"


def test_a_reply_never_exceeds_the_limit(wire: Wire) -> None:
    """4 MiB of NULs are 24 MiB as JSON escapes: whatever the server does, it is one legal reply."""
    zeros = wire.spawn("zeros", 4 * 1024 * 1024, ready=False)
    wire.ended(zeros)
    wire.send(b'{"type":"control_command","request_id":"%b","agent_id":"%b","command_type":"read_stdout",'
              b'"payload":{"offset":0,"max_bytes":4194304}}' % (new_id().encode(), zeros.encode()))
    raw = wire.receive()
    assert len(raw) <= 10 * 1024 * 1024
    assert wire.output(zeros) == bytes(4 * 1024 * 1024)


def test_a_list_too_long_for_one_reply_is_one_error(wire: Wire) -> None:
    heavy = [wire.ok("spawn_request", config={"command": agent("sleeper")}, metadata={"ballast": "x" * 1_000_000})
             ["agent_info"]["id"] for _ in range(11)]
    sentence = wire.refused("message_too_large", "list_agents_request")
    assert "less" in sentence
    assert [a["id"] for a in wire.agents(limit=1)] == heavy[:1]
    assert [a["id"] for a in wire.agents(limit=9, offset=1)] == heavy[1:10]


# ---------------------------------------------------------------- which agent

def test_agents_are_found_by_id_name_and_prefix(wire: Wire) -> None:
    first = wire.spawn("sleeper", name="worker")
    assert wire.info("worker")["id"] == first and wire.info(first[:4])["id"] == first
    assert wire.info(first[:30])["id"] == first
    second = wire.spawn("sleeper", name="worker")
    wire.cannot("ambiguous_agent", "worker", "get_status")
    wire.control(second, "kill")
    wire.ended(second)
    assert wire.info("worker")["id"] == first, "a live agent's name goes before a finished one's"
    wire.control(first, "kill")
    wire.ended(first)
    assert wire.info("worker")["id"] == second, "of finished ones the newest"
    for nobody in (first[:3], "Worker", "workers", new_id(), "*", "%", "' OR 1=1 --", "\ud800", "0000"):
        wire.cannot("agent_not_found", nobody, "get_status")
    for like_an_id in (first, first.upper(), new_id()):
        sentence = wire.refused("bad_request", "spawn_request", config={"command": ["true"], "name": like_an_id})
        assert "config.name has the form of an agent's id" in sentence
    named_like_a_prefix = wire.spawn("sleeper", name=first[:13])
    assert wire.info(first[:13])["id"] == named_like_a_prefix, "a name goes before a prefix"


def test_lists_are_ordered_paged_and_filtered(wire: Wire) -> None:
    ids = [wire.spawn("sleeper", labels={"n": str(n), "odd": str(n % 2)}) for n in range(5)]
    wire.control(ids[1], "pause")
    wire.control(ids[2], "kill")
    wire.ended(ids[2])
    living = [i for i in ids if i != ids[2]]
    reply = wire.ok("list_agents_request")
    assert [a["id"] for a in reply["agents"]] == living and reply["total"] == 4
    assert [a["id"] for a in wire.agents(all=True)] == ids, "oldest first"
    reply = wire.ok("list_agents_request", limit=2, offset=1)
    assert [a["id"] for a in reply["agents"]] == living[1:3] and reply["total"] == 4
    assert wire.agents(limit=0) == [] and wire.agents(offset=100) == []
    assert [a["id"] for a in wire.agents(filter_status="paused")] == [ids[1]]
    assert [a["id"] for a in wire.agents(filter_status="terminated")] == [ids[2]]
    assert [a["id"] for a in wire.agents(labels={"odd": "1"})] == [ids[1], ids[3]]
    assert [a["id"] for a in wire.agents(labels={"odd": "1", "n": "3"})] == [ids[3]]
    assert wire.agents(labels={"odd": "2"}) == []
    for wrong in ({"limit": -1}, {"limit": "1"}, {"offset": 1.5}, {"filter_status": "dead"}, {"labels": []},
                  {"labels": {"a": 1}}, {"all": 1}):
        wire.refused("bad_request", "list_agents_request", **wrong)


# ---------------------------------------------------------------- batches

def test_batches_report_each_agent(wire: Wire) -> None:
    a, b, c = (wire.spawn("sleeper", labels={"batch": "yes"}) for _ in range(3))
    wire.control(b, "kill")
    wire.ended(b)
    reply = wire.ask("batch_control_command", agent_ids=[a, b, "nobody here", c], command_type="pause")
    assert reply["success"] is False and (reply["successful"], reply["failed"]) == (2, 2)
    assert reply["error_code"] == "invalid_state", "that of the first failure"
    assert [r["success"] for r in reply["results"]] == [True, False, False, True]
    assert [r["error_code"] for r in reply["results"]] == [None, "invalid_state", "agent_not_found", None]
    assert [r["agent_id"] for r in reply["results"]] == [a, b, "nobody here", c]
    assert all({"agent_id", "success", "status", "error", "error_code", "data"} <= set(r) for r in reply["results"])
    assert reply["results"][0]["status"] == "paused" and reply["results"][0]["data"]["paused"] is True
    done = wire.ok("batch_control_command", labels={"batch": "yes"}, command_type="resume")
    assert {r["agent_id"] for r in done["results"]} >= {a, c} and done["failed"] == 0 and wire.status(c) == "running"


def test_fail_fast_lists_the_rest_as_not_tried(wire: Wire) -> None:
    a, b, c = (wire.spawn("sleeper") for _ in range(3))
    wire.control(b, "pause")
    reply = wire.ask("batch_control_command", agent_ids=[a, b, c], command_type="pause", fail_fast=True)
    assert [r["success"] for r in reply["results"]] == [True, False, False] and reply["successful"] == 1
    assert reply["error_code"] == "invalid_state" and "not tried" in reply["results"][2]["error"]
    assert wire.status(c) == "running"


def test_batch_edges(wire: Wire) -> None:
    a = wire.spawn("sleeper", labels={"x": "1"})
    wire.refused("bad_request", "batch_control_command", command_type="pause")
    wire.refused("bad_request", "batch_control_command", command_type="pause", agent_ids="all")
    wire.refused("bad_request", "batch_control_command", command_type="pause", agent_ids=[1])
    wire.refused("unknown_command", "batch_control_command", command_type="explode", agent_ids=[a])
    none = wire.ok("batch_control_command", command_type="pause", labels={"x": "2"})
    assert none["results"] == [] and (none["successful"], none["failed"]) == (0, 0)
    wrote = wire.ok("batch_control_command", command_type="write_stdin", agent_ids=[a], payload={"data": "x"})
    assert wrote["results"][0]["data"]["bytes_written"] == 1


# ---------------------------------------------------------------- every error code that a request can cause

def test_unknown_types_and_commands(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    for kind in ("nonsense", "", "spawn_response", "output_query_response", "a" * 1000, "\ud800"):
        reply = wire.ask(kind)
        assert reply["type"] == "error_response" and not reply["success"], reply
        assert reply["error_code"] in ("unknown_type", "bad_request")
    for command in ("explode", "", "PAUSE", "query_input", "__init__"):
        wire.cannot("unknown_command", sleeper, command)
    assert wire.status(sleeper) == "running"


@pytest.mark.parametrize("fields", [
    {"config": {"command": ["/bin/true"], "model_backend": "claude"}}, {"config": {}}, {}, {"config": None},
    {"config": []}, {"config": {"command": []}}, {"config": {"command": "ls"}}, {"config": {"command": [1]}},
    {"config": {"command": [""]}}, {"config": {"command": ["/bin/true", "nul\0byte"]}},
    {"config": {"command": ["/bin/true\0"]}}, {"config": {"command": ["/bin/true", "\ud800"]}},
    {"config": {"command": ["/bin/true"], "cwd": "a\0b"}}, {"config": {"command": ["/bin/true"], "cwd": 1}},
    {"config": {"command": ["/bin/true"], "environment": {"A": "x\0y"}}},
    {"config": {"command": ["/bin/true"], "environment": {"A=B": "x"}}},
    {"config": {"command": ["/bin/true"], "environment": {"": "x"}}},
    {"config": {"command": ["/bin/true"], "environment": {"A": 1}}},
    {"config": {"command": ["/bin/true"], "environment": ["A=1"]}},
    {"config": {"command": ["/bin/true"], "stdin": "file"}}, {"config": {"command": ["/bin/true"], "labels": {"a": 1}}},
    {"config": {"command": ["/bin/true"], "labels": ["a"]}}, {"config": {"command": ["/bin/true"], "grace_secs": -1}},
    {"config": {"command": ["/bin/true"], "grace_secs": "10"}},
    {"config": {"command": ["/bin/true"], "grace_secs": True}},
    {"config": {"command": ["/bin/true"], "name": 5}},
    {"config": {"command": ["/bin/true"], "limits": {"runtime_secs": 0}}},
    {"config": {"command": ["/bin/true"], "limits": {"runtime_secs": "1"}}},
    {"config": {"command": ["/bin/true"]}, "metadata": []}, {"config": {"command": ["/bin/true"]}, "timeout_secs": 0},
    {"config": {"command": ["/bin/true"]}, "timeout_secs": "1"},
    {"config": {"command": ["/bin/true"], "pty": {"rows": 24, "cols": 0}}},
    {"config": {"command": ["/bin/true"], "pty": {"rows": 24}}},
    {"config": {"command": ["/bin/true"], "pty": {"rows": 24, "cols": 80}, "stdin": "pipe"}},
    # what comes later is refused, not ignored, where ignoring it would hurt
    {"config": {"command": ["/bin/true"], "queue": True}},
    {"config": {"command": ["/bin/true"], "restart": {"policy": "always"}}},
    {"config": {"command": ["/bin/true"], "limits": {"memory_bytes": 10}}},
    {"config": {"command": ["/bin/true"], "tool_level": "readonly"}},
], ids=repr)
def test_spawns_that_cannot_be_meant(wire: Wire, fields: dict) -> None:  # type: ignore[type-arg]
    wire.refused("bad_request", "spawn_request", **fields)
    assert wire.agents(all=True) == []


def test_unknown_backend(wire: Wire) -> None:
    for name in ("nonsense", "Claude!", "-cli"):
        wire.refused("unknown_backend", "spawn_request", config={"model_backend": name, "task": "x"})


def test_unknown_and_null_fields_are_harmless(wire: Wire) -> None:
    reply = wire.ok("spawn_request", later="x", timeout_secs=None, metadata=None, config={
        "command": agent("exit_with", "0"), "cwd": None, "environment": None, "stdin": None, "labels": None,
        "limits": None, "from_the_future": {"a": [1]}, "pty": None, "queue": None, "name": None})
    info = wire.ended(reply["agent_info"]["id"])
    assert info["status"] == "completed" and info["labels"] == {} and info["metadata"] == {} and info["name"] == ""


@pytest.mark.parametrize("request_id", [None, "", "x" * 129, 5, [], {}, True])
def test_request_ids_that_are_none(wire: Wire, request_id: object) -> None:
    import json
    reply = wire.raw(json.dumps({"type": "health_check_request", "request_id": request_id}).encode())
    assert reply["success"] is False and reply["error_code"] == "bad_request" and reply["request_id"] is None


def test_odd_request_ids_come_back_as_they_were(wire: Wire) -> None:
    for odd in ("x", "é" * 128, "\ud800", "\0", "a\nb", '"', "\\"):
        assert wire.ok("health_check_request", request_id=odd)["success"]


def test_odd_text_comes_back_as_it_was(wire: Wire) -> None:
    odd = {"lone": "\ud800", "nul": "\0", "emoji": "🦊", "big": 2 ** 63, "deep": [[[{"a": None}]]], "float": 0.1,
           "": ""}
    started = wire.ok("spawn_request",
                      config={"command": agent("sleeper"), "name": "né\ud800", "labels": {"\ud800": "\0"}},
                      metadata=odd)["agent_info"]["id"]
    info = wire.info(started)
    assert info["metadata"] == odd and info["name"] == "né\ud800" and info["labels"] == {"\ud800": "\0"}
    assert wire.info("né\ud800")["id"] == started


def test_shutdown_edges_do_not_end_anything(wire: Wire) -> None:
    wire.refused("bad_request", "shutdown_request", mode="now")
    wire.refused("bad_request", "shutdown_request", grace_secs=-1)
    assert wire.ok("health_check_request")["healthy"]


# ---------------------------------------------------------------- once

def test_the_same_spawn_again_is_the_same_agent(wire: Wire) -> None:
    request_id = new_id()
    fields = {"config": {"command": agent("sleeper"), "name": "once"}, "request_id": request_id}
    first = wire.ok("spawn_request", **fields)
    again = wire.ok("spawn_request", **fields)
    assert again == first and len(wire.agents(all=True)) == 1
    other = {**fields, "config": {**fields["config"], "name": "twice"}}  # type: ignore[dict-item]
    wire.refused("request_id_conflict", "spawn_request", **other)
    assert len(wire.agents(all=True)) == 1


def test_the_same_write_again_is_written_once(wire: Wire) -> None:
    echo = wire.spawn("echo")
    request_id = new_id()
    fields = {"agent_id": echo, "command_type": "write_stdin", "payload": {"data": "once\n"}, "request_id": request_id}
    assert wire.ok("control_command", **fields) == wire.ok("control_command", **fields)
    wire.refused("request_id_conflict", "control_command", **{**fields, "payload": {"data": "twice\n"}})
    wire.refused("request_id_conflict", "batch_control_command", agent_ids=[echo], command_type="kill",
                 request_id=request_id)
    wire.control(echo, "close_stdin")
    assert wire.output(echo) == b"ready\nonce\n"


def test_key_order_and_space_do_not_make_other_content(wire: Wire) -> None:
    sleeper = wire.spawn("sleeper")
    request_id = new_id().encode()
    first = wire.raw(b'{"type":"control_command","request_id":"%b","agent_id":"%b","command_type":"pause"}'
                     % (request_id, sleeper.encode()))
    again = wire.raw(b'{ "command_type":"pause",  "agent_id":"%b", "request_id":"%b", "type":"control_\\u0063ommand"}'
                     % (sleeper.encode(), request_id))
    assert first["success"] and again == first


def test_refusals_are_not_remembered(wire: Wire) -> None:
    request_id = new_id()
    wire.refused("agent_not_found", "control_command", agent_id="later", command_type="pause", request_id=request_id)
    sleeper = wire.spawn("sleeper", name="later")
    wire.ok("control_command", agent_id="later", command_type="pause", request_id=request_id)
    assert wire.status(sleeper) == "paused"
    request_id = new_id()
    wire.refused("bad_request", "spawn_request", config={"command": []}, request_id=request_id)
    wire.ok("spawn_request", config={"command": agent("sleeper")}, request_id=request_id)


def test_reads_simply_run_again(wire: Wire) -> None:
    request_id = new_id()
    assert wire.ok("list_agents_request", request_id=request_id)["total"] == 0
    wire.spawn("sleeper")
    assert wire.ok("list_agents_request", request_id=request_id)["total"] == 1
    assert wire.ok("health_check_request", request_id=request_id)["active_agents"] == 1


def test_a_batch_again_is_done_once(wire: Wire) -> None:
    echo = wire.spawn("echo")
    fields = {"agent_ids": [echo], "command_type": "write_stdin", "payload": {"data": "b\n"}, "request_id": new_id()}
    assert wire.ok("batch_control_command", **fields) == wire.ok("batch_control_command", **fields)
    wire.control(echo, "close_stdin")
    assert wire.output(echo) == b"ready\nb\n"


def test_output_is_the_same_over_every_link(wire: Wire, tmp_path: object) -> None:
    sums = f"{tmp_path}/sums"
    lines = wire.spawn("lines", 20_000, 0, sums)
    wire.ended(lines)
    out, err = wire.output(lines), wire.output(lines, "stderr")
    with open(sums) as f:
        assert f.read().split() == [str(len(out)), hashlib.sha256(out).hexdigest(),
                                    str(len(err)), hashlib.sha256(err).hexdigest()]
