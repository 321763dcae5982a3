"""The command line without a server: parsing, exit codes, error lines, doctor.

Owns:    the checks of cli/ that need no agent and show no text; the texts are in test_cli_text.py.
Runs in: the test process, some in a child that runs the command line.
Unaware: of servers.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

import agentserver
from agentserver import cli, errors
from agentserver.cli import control, doctor, exits, options, server, values, wait
from agentserver.cli.spawn import described
from agentserver.config import SETTINGS
from agentserver.results import AgentInfo

ROOT = Path(agentserver.__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "cli.md"


def run_cli(*argv: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run the command line in a child that finds no server."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("AGENTSERVER_")}
    environ.update(PYTHONPATH=str(ROOT), AGENTSERVER_STATE_DIR="/nonexistent/state", NO_COLOR="1",
                   AGENTSERVER_SERVER="unix:/nonexistent/core.sock", **options.pop("environ", {}))
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run([sys.executable, "-m", "agentserver", *argv], env=environ, timeout=60, **options)


# ---------------------------------------------------------------- parsing

def test_every_command_has_a_home_a_function_and_a_help() -> None:
    from importlib import import_module
    assert options.command_names() == list(cli.HOMES)
    for name, home in cli.HOMES.items():
        assert callable(import_module(f"agentserver.cli.{home}").COMMANDS[name])


def test_the_documentation_has_every_command_and_no_other() -> None:
    text = DOCS.read_text("utf-8")
    for name in options.command_names():
        assert f"agentserver {name}" in text or f"| `{name}` |" in text or f"`{name}`" in text, name
    shown = set(re.findall(r"agentserver ([a-z]+)", text))
    assert shown <= set(options.command_names()), shown - set(options.command_names())


def test_the_documentation_has_every_flag() -> None:
    text = DOCS.read_text("utf-8")
    settings = {setting.flag for setting in SETTINGS}
    for action in options.build()._actions:
        if not hasattr(action.choices, "items"):
            continue
        for name, parser in action.choices.items():  # type: ignore[union-attr]
            flags = {flag for a in parser._actions for flag in a.option_strings if flag.startswith("--")}
            for flag in flags - settings - {"--help"}:
                assert flag in text, f"{name} {flag}"


def test_the_documentation_has_every_exit_code() -> None:
    text = DOCS.read_text("utf-8")
    for code in (exits.OK, exits.FAILED, exits.USAGE, exits.UNREACHABLE, exits.NOT_FOUND, exits.TIMEOUT,
                 exits.INTERRUPTED, exits.PIPE):
        assert f"| {code} |" in text


@pytest.mark.parametrize("later", ["attach", "top", "keys", "nonsense"])
def test_a_command_of_later_is_unknown(later: str) -> None:
    with pytest.raises(exits.UsageError, match=later):
        options.parse([later])


@pytest.mark.parametrize("argv", [
    ["--json", "--server", "unix:/x", "--timeout", "5", "ps"],
    ["ps", "--json", "--server", "unix:/x", "--timeout", "5"],
    ["--server", "unix:/x", "ps", "--timeout=5s", "--json"],
])
def test_shared_flags_stand_before_or_after_the_command(argv: list[str]) -> None:
    given = options.parse(argv)
    assert (given.json, given.server, given.timeout) == (True, "unix:/x", 5.0)


def test_shared_flags_have_their_defaults() -> None:
    given = options.parse(["ps"])
    assert (given.json, given.server, given.timeout) == (False, None, None)


def test_what_follows_the_dashes_is_the_command() -> None:
    given = options.parse(["run", "--name", "n", "--", "prog", "--json", "--", "-x"])
    assert given.argv == ["prog", "--json", "--", "-x"] and given.json is False


def test_a_command_without_dashes_is_told_how() -> None:
    with pytest.raises(exits.UsageError, match="put -- before"):
        options.parse(["run", "echo", "hello"])


@pytest.mark.parametrize("argv, agents_, text", [
    (["send", "a", "x", "y"], ["a"], ["x", "y"]),
    (["send", "--eof", "a", "x"], ["a"], ["x"]),
    (["send", "a", "--eof", "x"], ["a"], ["x"]),
    (["send", "a", "-"], ["a"], ["-"]),
    (["send", "a", "-5"], ["a"], ["-5"]),
    (["send", "a", "-v is said"], ["a"], ["-v is said"]),
    (["send", "a", "--", "--eof", "--"], ["a"], ["--eof", "--"]),
])
def test_words_of_send(argv: list[str], agents_: list[str], text: list[str]) -> None:
    given = options.parse(argv)
    assert (given.agents, given.text) == (agents_, text)


def test_words_and_flags_may_be_mixed() -> None:
    given = options.parse(["logs", "a", "-f", "b", "-n5", "--stream", "stderr", "c", "--", "-d"])
    assert given.agents == ["a", "b", "c", "-d"]
    assert (given.follow, given.lines, given.stream) == (True, 5, "stderr")


def test_signal_takes_its_signal_first() -> None:
    given = options.parse(["signal", "SIGUSR1", "a", "b"])
    assert (given.signal, given.agents) == ("SIGUSR1", ["a", "b"])


@pytest.mark.parametrize("argv", [
    [], ["--bogus"], ["ps", "--bogus"], ["ps", "word"], ["ps", "--stat", "running"], ["ps", "--status", "happy"],
    ["info"], ["info", "a", "b"], ["logs"], ["logs", "a", "-n", "x"], ["logs", "a", "--since", "soon"],
    ["wait"], ["wait", "a", "--for", "ever"], ["send"], ["signal"], ["events", "--since", "-1"],
    ["ps", "--timeout", "soon"], ["ps", "--label", "novalue"], ["run", "--metadata", "[1]", "--", "x"],
    ["run", "--env", "=x", "--", "x"], ["run", "--env", "SURELY_NOT_SET_HERE", "--", "x"], ["health", "--", "x"],
])
def test_a_wrong_command_line_is_one_line_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == exits.USAGE
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("agentserver: error (usage): ") and shown.err.count("\n") == 1


@pytest.mark.parametrize("argv", [["run"], ["spawn"], ["run", "--backend", "b", "--", "x"], ["send", "a"], ["stop"],
                                  ["stop", "a", "--all"], ["rm", "--all", "--label", "a=b"], ["serve", "--json"]])
def test_what_does_not_fit_together_is_usage_too(argv: list[str]) -> None:
    result = run_cli(*argv)
    assert (result.returncode, result.stdout) == (exits.USAGE, b"")
    assert result.stderr.startswith(b"agentserver: error (usage): ") and result.stderr.count(b"\n") == 1


def test_every_setting_is_a_flag_of_serve() -> None:
    for setting in SETTINGS:
        given = options.parse(["serve", setting.flag, "value"])
        assert getattr(given, f"setting_{setting.name}") == "value"


@pytest.mark.parametrize("command", [[], *([name] for name in cli.HOMES)])
def test_help_is_there(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: agentserver")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"agentserver {agentserver.__version__}\n"


@pytest.mark.parametrize("text, secs", [("5", 5), ("0.5", 0.5), (".5", 0.5), ("30s", 30), ("10m", 600), ("2h", 7200),
                                        ("1d", 86400), ("1.5H", 5400)])
def test_durations(text: str, secs: float) -> None:
    assert values.seconds(text) == secs


@pytest.mark.parametrize("text", ["", "s", "nan", "inf", "-1", "1e3", "1_0", "1.2.3", "5x", "٣", "1 s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(Exception, match="is not a duration"):
        values.seconds(text)


def test_terminal_sizes() -> None:
    assert values.terminal_size("24x80") == values.terminal_size("24X80") == {"rows": 24, "cols": 80}
    for text in ("", "24", "x80", "24x", "24x80x2", "-1x80", "24 x 80", "٣x80"):
        with pytest.raises(Exception, match="is not ROWSxCOLS"):
            values.terminal_size(text)


def test_a_moment_is_a_time_or_an_age() -> None:
    assert values.moment("2026-01-31T12:00:00Z") == "2026-01-31T12:00:00.000000Z"
    assert values.moment("2026-01-31T13:00:00+01:00") == "2026-01-31T12:00:00.000000Z"
    from agentserver.wire import from_rfc3339
    assert 3599 < time.time() - from_rfc3339(values.moment("1h")) < 3660


def test_an_environment_value_is_never_in_an_error() -> None:
    with pytest.raises(Exception) as caught:
        values.variable("=secret")
    assert "secret" not in str(caught.value)


def test_flags_become_a_config() -> None:
    given = options.parse(["spawn", "--name", "n", "--env", "A=1", "--env", "B=x=y", "--label", "l=v", "--stdin",
                           "null", "--runtime-secs", "1m", "--grace-secs", "2", "--cwd", "sub", "--", "x"])
    assert described(given, local=True) == {
        "name": "n", "environment": {"A": "1", "B": "x=y"}, "labels": {"l": "v"}, "stdin": "null",
        "limits": {"runtime_secs": 60.0}, "grace_secs": 2.0, "cwd": os.path.abspath("sub")}
    assert described(given, local=False)["cwd"] == "sub"
    sized = options.parse(["run", "--pty", "5x7", "--", "x"])
    assert described(sized, local=False) == {"pty": {"rows": 5, "cols": 7}}
    bare = options.parse(["spawn", "--", "x"])
    assert described(bare, local=True) == {"cwd": os.getcwd()}
    assert described(bare, local=False) == {}


# ---------------------------------------------------------------- exit codes and error lines

@pytest.mark.parametrize("error, code", [
    (errors.RequestError("x", "agent_not_found"), 4), (errors.RequestError("x", "ambiguous_agent"), 1),
    (errors.RequestError("x", "invalid_state"), 1), (errors.RequestError("x", "unavailable"), 3),
    (errors.RequestError("x", "timeout"), 124), (errors.RequestTimeout("x"), 124), (errors.LinkError("x"), 3),
    (errors.ConfigError("x"), 1), (errors.StartError("x"), 1), (exits.UsageError("x"), 2), (ValueError("x"), 1),
    (OSError(28, "No space left on device"), 1),
])
def test_exit_codes(error: Exception, code: int) -> None:
    assert exits.of(error) == code


def test_every_error_code_has_an_exit_code() -> None:
    assert {exits.of_code(code) for code in errors.ERROR_CODES} == {1, 3, 4, 124}


def test_an_error_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.explain(errors.RequestError("no agent 'a\nb\x1b[2J'", "agent_not_found")) == 4
    assert capsys.readouterr().err == "agentserver: error (agent_not_found): no agent 'a\\nb\\x1b[2J'\n"


def test_a_sentence_is_not_as_long_as_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["x" * 100_000]) == exits.USAGE
    assert len(capsys.readouterr().err) < exits.LONGEST_SENTENCE + 100


@pytest.mark.parametrize("text", ["99999999999999d", "3651d", "1" * 400])
def test_no_time_is_longer_than_the_system_can_count(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--timeout", text, "health"]) == exits.USAGE
    assert "3650 days" in capsys.readouterr().err


def test_a_mistake_of_ours_is_a_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(_given: Any) -> int:
        raise ZeroDivisionError("never mind")
    monkeypatch.setitem(server.COMMANDS, "health", wrong)
    assert cli.main(["health"]) == exits.FAILED
    shown = capsys.readouterr().err
    assert shown.startswith("agentserver: error (internal): ZeroDivisionError: never mind") and shown.count("\n") == 1


def test_ctrl_c_is_130_without_a_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_given: Any) -> int:
        raise KeyboardInterrupt
    monkeypatch.setitem(server.COMMANDS, "health", interrupted)
    assert cli.main(["health"]) == exits.INTERRUPTED
    assert capsys.readouterr().err == ""


def test_ctrl_c_in_an_import_is_no_mistake_of_ours(monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Before Python 3.12 what is raised while a class is made becomes the cause of a RuntimeError."""
    def interrupted(_given: Any) -> int:
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()
    monkeypatch.setitem(server.COMMANDS, "health", interrupted)
    assert cli.main(["health"]) == exits.INTERRUPTED
    assert capsys.readouterr().err == ""


def test_no_server_is_3() -> None:
    result = run_cli("ps")
    assert (result.returncode, result.stdout) == (exits.UNREACHABLE, b"")
    assert result.stderr.startswith(b"agentserver: error (unavailable): ") and result.stderr.count(b"\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = run_cli("--help", stdout=writer)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (exits.PIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [["--help"], ["doctor"], ["doctor", "--json"]])
def test_a_full_disk_is_told(argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = run_cli(*argv, stdout=full)
    assert result.returncode == exits.FAILED
    assert result.stderr == b"agentserver: error (output): stdout cannot be written: No space left on device\n"


def test_closed_standard_streams_do_no_harm() -> None:
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        result = subprocess.run(["/bin/sh", "-c", f"exec '{sys.executable}' -m agentserver ps {closed}"],
                                env={"PYTHONPATH": str(ROOT), "AGENTSERVER_SERVER": "unix:/nonexistent/core.sock"},
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        assert result.returncode == exits.UNREACHABLE and b"Traceback" not in result.stderr


def test_the_parser_is_all_that_help_needs() -> None:
    """A command line is judged by how soon it answers, so commands import what they need."""
    code = ("import sys; sys.stdout = open('/dev/null', 'w'); from agentserver import cli; cli.main(['--help']); "
            "print(*sys.modules, file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
                            stderr=subprocess.PIPE, timeout=60)
    loaded = set(result.stderr.decode().split())
    if sys.version_info < (3, 10):  # argparse asks shutil for the width, which brings bz2, which brought threading then
        loaded.discard("threading")
    assert not loaded & {"zmq", "sqlite3", "socket", "threading", "agentserver.client",
                         "agentserver.core.keeper", "agentserver.core.serving"}


# ---------------------------------------------------------------- exit codes of many

def test_the_code_of_many_is_the_first_that_is_not_0() -> None:
    def ended(**record: Any) -> AgentInfo:
        return AgentInfo.of({"status": "failed", "exit": record})

    done, three, killed = ended(code=0), ended(code=3), ended(signal="SIGKILL", signal_number=9)
    assert wait.code_of([done]) == 0
    assert wait.code_of([done, three, killed]) == 3
    assert wait.code_of([killed, three]) == 137
    assert wait.code_of([ended(reason="lost")]) == 1
    assert wait.code_of([AgentInfo.of({"status": "running"})]) == 0


def test_the_exit_code_of_control() -> None:
    good, gone = {"success": True}, {"success": False, "error_code": "agent_not_found"}
    wrong = {"success": False, "error_code": "invalid_state"}
    assert control._exit_code([good, good]) == 0
    assert control._exit_code([good, gone]) == 4
    assert control._exit_code([gone, wrong]) == 1
    assert control._exit_code([wrong]) == 1


# ---------------------------------------------------------------- doctor

def checks(*argv: str) -> Iterator[doctor.Finding]:
    yield from doctor._all(options.parse(["--server", "unix:/nonexistent/core.sock", "doctor", *argv]))


def test_doctor_says_what_is_there(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in checks("--state-dir", str(tmp_path / "new"))}
    assert found["Python"].state == found["state directory"].state == doctor.GOOD
    assert found["server"].state == doctor.LACKING
    assert all(finding.cost and finding.mend for finding in found.values() if finding.state != doctor.GOOD)


def test_doctor_judges_the_state_directory(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    assert doctor.state_dir(str(tmp_path)).mend.startswith(f"chmod 700 {tmp_path}")
    os.chmod(tmp_path, 0o700)
    assert doctor.state_dir(str(tmp_path)).state == doctor.GOOD
    (tmp_path / "file").write_text("")
    assert doctor.state_dir(str(tmp_path / "file" / "x")).state == doctor.BROKEN
    assert doctor.socket_length("/" + "x" * 120).state == doctor.LACKING


def test_doctor_exits_with_1_for_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "bad.ini").write_text("[server]\nnonsense = 1\n")
    result = run_cli("doctor", "--json", "--config", str(tmp_path / "bad.ini"))
    report = json.loads(result.stdout)
    assert result.returncode == exits.FAILED and report["ok"] is False
    assert "bad.ini, line 2" in report["checks"][-1]["found"]


def test_doctor_prints_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._print([doctor.Finding("a", doctor.GOOD, "x"), doctor.Finding("bb", doctor.BROKEN, "y", "much", "this way")])
    assert capsys.readouterr().out.splitlines() == [
        "good     a   x", "broken   bb  y", "             costs: much", "             mend : this way"]


def test_doctor_looks_at_the_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one can see it from within: the rest is said to be unknown, with how to look."""
    from agentserver.cli import supervised
    for name in ("NOTIFY_SOCKET", "FDSTORE", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)

    def found() -> dict[str, doctor.Finding]:
        return {finding.name: finding for finding in supervised.checks(0, 100)}
    alone = found()
    assert list(alone) == ["service manager"] and alone["service manager"].state == doctor.LACKING
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    assert "without a watchdog" in found()["service manager"].found
    assert found()["descriptor store"].state == found()["KillMode"].state == doctor.UNKNOWN
    monkeypatch.setenv("FDSTORE", "100")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert found()["descriptor store"].state == doctor.LACKING and "400" in found()["descriptor store"].found
    monkeypatch.setenv("FDSTORE", "1024")
    assert found()["descriptor store"].state == doctor.GOOD and "30 s" in found()["service manager"].found
    assert all(finding.cost and finding.mend for finding in found().values() if finding.state != doctor.GOOD)


def test_doctor_knows_the_unit_by_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentserver.cli import supervised
    groups = tmp_path / "cgroup"
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real(groups if "cgroup" in str(path) else path, *a, **k))
    groups.write_text("0::/user.slice/user-1000.slice/user@1000.service/app.slice/agentserver.service\n")
    assert supervised.unit_of(1) == "agentserver.service"
    groups.write_text("0::/user.slice/session-1.scope\n")
    assert supervised.unit_of(1) == ""


def test_doctor_tries_what_the_kernel_can() -> None:
    found = {finding.name: finding for finding in checks()}
    assert {"/proc", "subreaper", "os.splice", "sendfile", "pidfd", "exit codes", "descriptors"} <= found.keys()
    if sys.platform == "linux":
        assert found["sendfile"].state == found["/proc"].state == doctor.GOOD
        newer = tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 15)
        assert (found["exit codes"].state == doctor.GOOD) == newer
