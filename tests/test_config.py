"""The settings: where they come from, what is refused, and that the documentation says the same."""
from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from agentserver import sources, wire
from agentserver.config import SETTINGS, ServerConfig, Setting, check_endpoint, settings_table
from agentserver.core.backends import all_backends
from agentserver.errors import ConfigError
from agentserver.paths import default_state_dir
from agentserver.sources import load

ROOT = Path(__file__).resolve().parent.parent
HOME = {"HOME": "/home/u"}
BY_NAME = {setting.name: setting for setting in SETTINGS}


@pytest.fixture
def ini(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "a.ini"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


def refusal(*args: Any) -> str:
    with pytest.raises(ConfigError) as e:
        load(*args)
    return str(e.value)


# ---------------------------------------------------------------- where values come from

def test_the_issue_s_defaults() -> None:
    c = ServerConfig()
    assert (c.endpoint, c.pub_endpoint) == ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556")
    assert (c.max_agents, c.status_update_interval_secs, c.request_timeout_secs) == (100, 10.0, 30.0)
    assert (c.shutdown_timeout_secs, c.grace_secs, c.finish_secs, c.drain_secs) == (20.0, 10.0, 2.0, 0.2)
    assert (c.message_bytes, c.output_cap_bytes, c.stdin_buffer_bytes) == (10 << 20, 64 << 20, 1 << 20)
    assert (c.history_agents, c.history_secs) == (1000, 7 * 86400.0)
    assert c.message_bytes == wire.MAX_MESSAGE == BY_NAME["message_bytes"].most


def test_each_layer_wins_over_the_one_below(ini: Any) -> None:
    path = ini("[server]\nmax_agents = 2\nhistory_agents = 2\ngrace_secs = 2\n")
    c = load({"max_agents": "4"}, {**HOME, "AGENTSERVER_MAX_AGENTS": "3", "AGENTSERVER_HISTORY_AGENTS": "3"}, path)
    assert (c.max_agents, c.history_agents, c.grace_secs, c.finish_secs) == (4, 3, 2.0, 2.0)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_every_setting_can_be_given_everywhere(setting: Setting, ini: Any) -> None:
    text = {"endpoint": "ipc:///run/a", "pub_endpoint": "none", "orphans": "leave"}.get(setting.name) or {
        int: str(int(setting.least or 0) + 1), float: "1.5", str: "/x", tuple: "A, B_*"}[setting.type]
    wanted = {int: int, float: float, str: str, tuple: lambda t: tuple(t.split(", "))}[setting.type](text)  # type: ignore
    places: list[Any] = [
        ({setting.name: text}, HOME, None), ({}, {**HOME, setting.variable: text}, None),
        ({}, HOME, ini(f"[server]\n{setting.name} = {text}\n"))]
    for args in places:
        assert getattr(load(*args), setting.name) == wanted != setting.default
    assert re.fullmatch(r"--[a-z-]+", setting.flag)


def test_state_dir_follows_the_environment_that_was_given() -> None:
    assert load({}, HOME, None).state_dir == "/home/u/.local/state/agentserver"
    assert default_state_dir({**HOME, "XDG_STATE_HOME": "/s"}) == "/s/agentserver"
    assert default_state_dir({**HOME, "XDG_STATE_HOME": "relative"}) == "/home/u/.local/state/agentserver"


@pytest.mark.parametrize("variable", [
    "AGENTSERVER_SERVER", "AGENTSERVER_AGENT_ID",
    # what Kubernetes sets for a service called agentserver
    "AGENTSERVER_PORT", "AGENTSERVER_SERVICE_HOST", "AGENTSERVER_SERVICE_PORT", "AGENTSERVER_PORT_5555_TCP_ADDR"])
def test_variables_that_are_no_settings_are_left_alone(variable: str) -> None:
    assert load({}, {**HOME, variable: "tcp://10.0.0.1:5555"}, None) == load({}, HOME, None)


def test_an_empty_variable_is_absent() -> None:
    assert load({}, {**HOME, "AGENTSERVER_MAX_AGENTS": ""}, None).max_agents == 100


# ---------------------------------------------------------------- what is refused, and what the sentence names

def bad_values() -> list[tuple[str, str]]:
    found = []
    for s in SETTINGS:
        if s.type in (int, float):
            found += [(s.name, text) for text in ("", "x", "1 # no", "nan", "inf", "1_0", "9" * 30, "-1")]
            found += [(s.name, str(s.most + 1))] if s.most else []
            found += [(s.name, str(s.least / 2))] if s.least else []
        if s.type is int:
            found += [(s.name, "5.0"), (s.name, "1e3")]
    return found + [("endpoint", "none"), ("server_id", "a\x07"), ("server_id", "x" * 129),
                    ("pass_environment", "A B-C"), ("pass_environment", "*"), ("pass_environment", "A=1")]


@pytest.mark.parametrize("name,text", bad_values())
def test_a_wrong_value_names_its_place(name: str, text: str, ini: Any) -> None:
    path, s = ini(f"\n# comment\n[server]\n\n{name} = {text}\n"), BY_NAME[name]
    assert refusal({}, HOME, path).startswith(f"{path}, line 5: {name} ")
    assert refusal({name: text}, HOME, None).startswith(f"{s.flag}: {name} ")
    if text:
        assert refusal({}, {**HOME, s.variable: text}, None).startswith(f"{s.variable}: {name} ")


@pytest.mark.parametrize("text,line,says", [
    ("[server]\nmax_agent = 1", 2, "did you mean max_agents?"),
    ("[server]\nMax_Agents = 1", 2, "is no setting"),
    ("[server]\nmax_agents = 1\n\nmax_agents = 1", 4, "first in"),
    ("[server]\n[backend x]\nargv = x\n[server]", 4, "is there twice"),
    ("[server]\nx", 2, "neither"),
    ("[server]\nmax_agents: 1", 2, "neither"),
    ("[server]\n= 1", 2, "neither"),
    ("max_agents = 1", 1, "[server]"),
    ("[sever]", 1, "there is no section [sever]"),
    ("[backend]", 1, "there is no section"),
    ("[backend a b]", 1, "there is no section"),
    ("[server", 1, "closing ]"),
    ("[backend x]\nargv = x\narg = y", 3, "did you mean argv?"),
    ("[backend x]\nargv = x\nenvironment. = y", 3, "has no key"),
    ("[server]\n;\xe4\nmax_agents = \0", 3, "not UTF-8 text"),
    (b"[server]\n\n# \xff\n", 3, "not UTF-8"),
    ("[server]\nendpoint = tcp://127.0.0.1:7\npub_endpoint = tcp://127.0.0.1:7", 3, "both tcp://127.0.0.1:7"),
])
def test_a_wrong_file_names_the_line(text: str | bytes, line: int, says: str, ini: Any) -> None:
    path = ini(text)
    sentence = refusal({}, HOME, path)
    assert sentence.startswith(f"{path}, line {line}: ") and says in sentence


def test_no_sentence_about_a_backend_shows_a_value(ini: Any) -> None:
    for text in ("environment.K = s3cret\nenvironment.K = s3cret", "environment.K = s3cret\nenvironmen.K = s3cret",
                 "environment =\n  K=s3cret\ns3cret"):
        assert "s3cret" not in refusal({}, HOME, ini("[backend x]\nargv = x\n" + text))


@pytest.mark.parametrize("make", [lambda p: p / "none.ini", lambda p: p, lambda p: f"{p}/a\0b"])
def test_a_named_file_that_cannot_be_read_is_refused(make: Any, tmp_path: Path) -> None:
    assert "cannot be read" in refusal({}, HOME, str(make(tmp_path)))


def test_a_file_without_end_is_refused(ini: Any) -> None:
    assert "larger than" in refusal({}, HOME, ini("#" * (sources.MAX_FILE + 1)))


def test_misspelt_variables_and_flags_are_told() -> None:
    assert "did you mean AGENTSERVER_MAX_AGENTS?" in refusal({}, {**HOME, "AGENTSERVER_MAX_AGENT": "1"}, None)
    assert "AGENTSERVER_max_agents is no setting" in refusal({}, {**HOME, "AGENTSERVER_max_agents": "1"}, None)
    assert "--max-agent is no setting; did you mean max_agents?" in refusal({"max_agent": "1"}, HOME, None)


@pytest.mark.parametrize("values", [
    {"max_agents": True}, {"max_agents": 1.0}, {"max_agents": "1"}, {"max_agents": None}, {"grace_secs": "1"},
    {"grace_secs": float("nan")}, {"grace_secs": True}, {"state_dir": 1}, {"state_dir": "a\0"}, {"agent_dir": "\ud800"},
    {"pass_environment": "A"}, {"pass_environment": [1]}, {"endpoint": "tcp://0.0.0.0:1"}, {"max_agents": 0},
    {"endpoint": "ipc:///a", "pub_endpoint": "ipc:///a"}, {"backends": {"x": {"arg": "x"}}},
    {"backends": {"a b": {"argv": "x"}}}, {"backends": {"": {"argv": "x"}}}])
def test_the_constructor_checks_too(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**values)


def test_the_constructor_takes_plain_python() -> None:
    c = ServerConfig(grace_secs=3, pass_environment=["A"])  # type: ignore[arg-type]
    assert (c.grace_secs, type(c.grace_secs), c.pass_environment) == (3.0, float, ("A",))


# ---------------------------------------------------------------- endpoints

@pytest.mark.parametrize("endpoint", [
    "tcp://127.0.0.1:0", "tcp://127.0.0.1:65535", "tcp://127.255.0.9:1", "tcp://[::1]:5555", "ipc:///tmp/a",
    "ipc://relative", "ipc:///" + "x" * 106])
def test_loopback_and_ipc_are_accepted(endpoint: str) -> None:
    assert check_endpoint(endpoint) == endpoint


def test_localhost_is_never_looked_up() -> None:
    assert ServerConfig(endpoint="tcp://localhost:7").endpoint == "tcp://127.0.0.1:7"


@pytest.mark.parametrize("endpoint,says", [
    ("tcp://0.0.0.0:5555", "no keys"), ("tcp://*:5555", "no keys"), ("tcp://[::]:5555", "no keys"),
    ("tcp://192.168.1.2:5555", "no keys"), ("tcp://eth0:5555", "no keys"), ("tcp://::1:5555", "no keys"),
    ("tcp://127.0.0.1.evil.example:1", "no keys"), ("tcp://127.1:1", "no keys"), ("tcp://127.0.0.256:1", "no keys"),
    ("tcp://127.0.0.01:1", "no keys"), ("tcp://localhost.example:1", "no keys"), ("tcp://:1", "no keys"),
    ("tcp://127.0.0.1", "PORT"), ("tcp://127.0.0.1:", "PORT"), ("tcp://127.0.0.1:65536", "PORT"),
    ("tcp://127.0.0.1:-1", "PORT"), ("tcp://127.0.0.1:*", "PORT"), ("tcp://127.0.0.1:٣", "PORT"),
    ("tcp://127.0.0.1:5;127.0.0.1:6", "no keys"), ("ipc://", "socket file"), ("ipc://*", "socket file"),
    ("ipc://@abstract", "socket file"), ("ipc:///" + "x" * 107, "108 bytes"), ("ipc:///" + "ä" * 54, "109 bytes"),
    ("127.0.0.1:5555", "must be tcp://"), ("inproc://a", "must be tcp://"), ("", "must be tcp://"),
    ("TCP://127.0.0.1:1", "must be tcp://"), (" tcp://127.0.0.1:1", "must be tcp://")])
def test_other_endpoints_are_refused_with_a_reason(endpoint: str, says: str) -> None:
    for name in ("endpoint", "pub_endpoint"):
        with pytest.raises(ConfigError, match=f"^{name} ") as e:
            replace(ServerConfig(), **{name: endpoint})  # type: ignore[arg-type]
        assert says in str(e.value)


def test_two_free_ports_are_not_the_same_port() -> None:
    ServerConfig(endpoint="tcp://127.0.0.1:0", pub_endpoint="tcp://127.0.0.1:0")


# ---------------------------------------------------------------- resolved, JSON, repr

def test_resolved_depends_on_nothing_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    c = ServerConfig(endpoint="ipc://a.sock", pub_endpoint="ipc://~/b.sock").resolved("/w")
    assert (c.state_dir, c.agent_dir) == ("/home/u/.local/state/agentserver", "/w")
    assert (c.endpoint, c.pub_endpoint, c.server_id) == ("ipc:///w/a.sock", "ipc:///home/u/b.sock", os.uname().nodename)
    assert c.resolved("/elsewhere") == c
    c = ServerConfig(state_dir="~/s", agent_dir="../d", server_id="me", pub_endpoint="none").resolved("/w/x")
    assert (c.state_dir, c.agent_dir, c.server_id, c.pub_endpoint) == ("/home/u/s", "/w/d", "me", "none")


def test_a_path_that_gets_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 107"):
        ServerConfig(endpoint="ipc://a.sock").resolved("/" + "x" * 107)


def test_json_round_trip(ini: Any) -> None:
    path = ini("[server]\ngrace_secs = 3\npass_environment = A B\n[backend x]\nargv = x\nenvironment.K = v\n")
    c = load({}, HOME, path)
    obj = wire.decode(wire.encode(c.to_json()))
    assert obj == c.to_json() and ServerConfig.from_json(obj) == c and c.backends["x"]["environment.K"] == "v"
    assert set(obj) == {f.name for f in fields(ServerConfig)}
    assert ServerConfig.from_json({**obj, "from_a_later_version": 1}) == c


def test_repr_hides_what_backends_hold() -> None:
    assert "s3cret" not in repr(ServerConfig(backends={"x": {"argv": "x", "environment.K": "s3cret"}}))


# ---------------------------------------------------------------- the INI reader

INI = """\
; comment
# comment
[server]
  server_id = 100% = a; # b %(x)s ${y}
  endpoint =tcp://127.0.0.1:1
[backend x]
argv = one
   two = 2
   # not part of it

   [three]
environment.Key=
    A=1
    B==2
\tC=%d
  \t
stdin= null
[backend  y]
argv =
"""


def test_it_reads_what_configparser_reads(ini: Any) -> None:
    for newline in ("\n", "\r\n"):
        theirs = configparser.RawConfigParser(delimiters=("=",), default_section="")
        theirs.optionxform = str  # type: ignore[assignment, method-assign]
        theirs.read_string(INI)
        ours = {title: {key: value for key, (value, _) in entries.items()}
                for title, _, entries in sources._sections(ini("\ufeff" + INI.replace("\n", newline)))}
        wanted = {" ".join(name.split()): dict(section) for name, section in theirs.items() if name}
        assert ours == wanted and ours["backend x"]["argv"] == "one\ntwo = 2\n\n[three]"


def test_the_example_is_valid() -> None:
    path = str(ROOT / "examples" / "agentserver.ini")
    c = load({}, HOME, path)
    assert c.max_agents == 20 and c.pass_environment[-1] == "NO_PROXY"
    own = all_backends(c.backends)
    assert own["claude"].argv[0] == own["claude"].argv_pipe[0] == "/opt/claude/bin/claude"
    assert own["summarise"].environment == {"PYTHONUNBUFFERED": "1", "SUMMARISE_RATIO": "20%"}
    assert own["reviewer"].tools["minimal"] == "Read,Grep"


# ---------------------------------------------------------------- documentation, imports

def test_the_page_lists_every_setting_as_it_is() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    wanted = "<!-- settings_table() begins -->\n" + settings_table() + "<!-- settings_table() ends -->"
    assert wanted in page, "paste the output of agentserver.config.settings_table() between the marks:\n" + wanted


def test_every_setting_is_documented_and_bounded() -> None:
    assert [s.name for s in SETTINGS] == [f.name for f in fields(ServerConfig) if f.name != "backends"]
    for s in SETTINGS:
        assert s.help and (s.type in (str, tuple) or (s.unit and s.least is not None and s.most is not None))


def test_import_is_light() -> None:
    code = ("import sys; import agentserver.config; "
            "print([m for m in ('configparser', 'argparse', 'logging', 'json', 'difflib', 'zmq') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
