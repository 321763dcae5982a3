"""From a request to argv, environment and stdin."""
from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from agentserver import messages, wire
from agentserver.core.backends import BUILTIN, Backend, Launch, all_backends, base_environment, from_section, plan
from agentserver.errors import ConfigError, RequestError

ROOT = Path(__file__).resolve().parent.parent
MINIMAL = "Read,Write,Edit,Bash,Glob,Grep"


def launch(backends: dict[str, dict[str, Any]] | None = None, environ: dict[str, str] | None = None,
           pass_environment: tuple[str, ...] = (), **config: Any) -> Launch:
    return plan(wire.read(messages.AgentConfig, config), all_backends(backends or {}), environ or {},
                pass_environment)


def run(name: str, /, **config: Any) -> Launch:
    return launch(model_backend=name, **config)


def refusal(code: str = "bad_request", **config: Any) -> str:
    with pytest.raises(RequestError) as e:
        launch(**config)
    assert e.value.code == code
    return str(e.value)


# ---------------------------------------------------------------- the command lines

FULL = {"task": "do it", "model": "M", "system_prompt": "Be \"kind\"", "name": "N"}
CLAUDE = "claude -p --model M --output-format stream-json --verbose --include-partial-messages --append-system-prompt"


@pytest.mark.parametrize("name,config,line", [
    ("claude", {"task": "t"}, "claude -p --output-format stream-json --verbose --include-partial-messages -- t"),
    ("claude", {**FULL, "tool_level": "read"},
     CLAUDE + " 'Be \"kind\"' --tools Read,Glob,Grep --allowedTools Read,Glob,Grep -- 'do it'"),
    ("claude", {**FULL, "agents": {"r": {"prompt": "p"}}},
     CLAUDE + """ 'Be "kind"' --agents '{"r":{"prompt":"p"}}' -- 'do it'"""),
    ("claude", {"model": "M", "system_prompt": "s", "stdin": "pipe"}, CLAUDE + " s --input-format stream-json"),
    ("codex", {"task": "t"}, "codex exec --json --skip-git-repo-check -- t"),
    ("codex", {**FULL, "tool_level": "full"},
     "codex exec --json --skip-git-repo-check -s danger-full-access -m M "
     "-c 'developer_instructions=\"Be \\\"kind\\\"\"' -- 'do it'"),
    ("opencode", {"task": "t"}, "opencode run --format json --title t -- t"),
    ("opencode", FULL, "opencode run --format json -m M --title N --agent agentserver -- 'do it'"),
    ("gemini", {"task": "t"}, "gemini -o stream-json --skip-trust -p t"),
    ("gemini", {**FULL, "tool_level": "orchestrator"},
     "gemini -m M -o stream-json --skip-trust --approval-mode yolo -p 'do it'"),
    ("aider", {"task": "t", "model": "M"},
     "aider --model M --yes-always --no-check-update --analytics-disable --no-pretty --message t"),
    ("echo-cli", {"task": "one two"}, "echo 'one two'"),
    ("a{task}-cli", {"task": "-x {model}"}, "'a{task}' '-x {model}'"),
    ("cat-cli", {}, "cat"),
    ("claude-cli", {"task": "t"}, "claude t"),
])
def test_command_lines(name: str, config: dict[str, Any], line: str) -> None:
    assert run(name, **config).argv == shlex.split(line)


def test_a_command_is_run_as_it_is() -> None:
    argv = ["sh", "-c", "{task}", "--model", "{model}", ""]
    assert launch(command=argv, task="t").argv == argv


def test_stdin_and_finish() -> None:
    assert {name: run(name, task="t").stdin for name in BUILTIN} == dict.fromkeys(BUILTIN, "null")
    assert {name for name in BUILTIN if run(name, task="t").finish} == {"claude"}
    assert run("claude", task="t").finish == "sigint"
    for one in launch(command=["x"]), run("x-cli", task="t"):
        assert (one.stdin, one.finish) == ("pipe", "")
    assert launch(command=["x"], stdin="null").stdin == "null"
    assert run("claude", stdin="pipe").stdin == "pipe"


def test_with_a_pipe_the_task_may_come_from_stdin() -> None:
    assert run("codex", stdin="pipe").argv == ["codex", "exec", "--json", "--skip-git-repo-check", "--"]
    assert run("gemini", stdin="pipe").argv == ["gemini", "-o", "stream-json", "--skip-trust"]
    assert run("codex", stdin="pipe", task="t").argv[-1] == "t"
    sentence = refusal(model_backend="claude", stdin="pipe", task="t")
    assert "takes no task with stdin=pipe" in sentence and "write it to its stdin" in sentence


def test_a_text_that_looks_like_a_flag_is_not_one() -> None:
    assert run("gemini", task="--yolo").argv[-2:] == ["-p", " --yolo"]
    assert run("aider", task="t", model="-m").argv[1:3] == ["--model", " -m"]
    assert run("claude", task="-p").argv[-2:] == ["--", "-p"]
    assert run("opencode", task="-- mend\nthis " + "x" * 99).argv[5][:12] == "mend this xx"
    assert len(run("opencode", task="t " * 99).argv[5]) <= 50 and run("opencode", task="- ").argv[5] == "agentserver"


def test_codex_is_given_a_toml_string() -> None:
    prompt = "a\"b\\\n\t\x7f\u00e4\U0001f600"
    [value] = [a for a in run("codex", task="t", system_prompt=prompt).argv if a.startswith("developer_instructions=")]
    text = value.partition("=")[2]
    assert json.loads(text) == prompt and "\\ud83d" not in text and "\x7f" not in text


def test_opencode_is_given_its_prompt_by_environment() -> None:
    content = run("opencode", task="t", system_prompt='{task} "x"').environment["OPENCODE_CONFIG_CONTENT"]
    assert json.loads(content) == {"agent": {"agentserver": {"mode": "primary", "prompt": '{task} "x"'}}}
    assert "OPENCODE_CONFIG_CONTENT" not in run("opencode", task="t").environment


def test_gemini_is_given_its_prompt_by_file() -> None:
    one = run("gemini", task="t", system_prompt="Be kind")
    assert one.files == {"GEMINI_SYSTEM_MD": "Be kind"} and one.environment == {"GEMINI_CLI_NO_RELAUNCH": "true"}
    assert one.environment_in("/d") == {"GEMINI_CLI_NO_RELAUNCH": "true", "GEMINI_SYSTEM_MD": "/d/GEMINI_SYSTEM_MD"}
    assert run("gemini", task="t").files == {}
    mine = run("gemini", task="t", system_prompt="x", environment={"GEMINI_SYSTEM_MD": "/mine"})
    assert mine.environment_in("/d")["GEMINI_SYSTEM_MD"] == "/mine" and mine.files == {}


# ---------------------------------------------------------------- terminals

def test_a_terminal_by_its_size_or_by_its_name() -> None:
    given = launch(command=["x"], pty={"rows": 5, "cols": 7})
    assert (given.stdin, given.pty) == ("pty", {"rows": 5, "cols": 7})
    assert launch(command=["x"], stdin="pty").pty == {"rows": 24, "cols": 80}
    assert launch(command=["x"]).pty is None and launch(command=["x"], stdin="null").pty is None
    assert run("claude", task="t", stdin="pty").argv == run("claude", task="t").argv
    own = {"tui": {"argv": "tui -- {task}", "stdin": "pty"}}
    assert launch(own, model_backend="tui").pty == {"rows": 24, "cols": 80}, "a backend may want one, and no task"
    assert launch(own, model_backend="tui", task="t", stdin="null").pty is None


def test_term_is_that_of_the_agents_own_terminal() -> None:
    environ = {"TERM": "dumb", "PATH": "/bin"}
    assert launch(environ=environ, command=["x"]).environment["TERM"] == "dumb"
    assert launch(environ=environ, command=["x"], stdin="pty").environment["TERM"] == "xterm-256color"
    given = launch(environ=environ, command=["x"], stdin="pty", environment={"TERM": "vt100"})
    assert given.environment["TERM"] == "vt100"
    own = {"tui": {"argv": "tui", "environment.TERM": "screen"}}
    assert launch(own, environ=environ, model_backend="tui", stdin="pty").environment["TERM"] == "screen"


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("config,says", [
    ({}, "neither was given"),
    ({"command": ["x"], "model_backend": "claude"}, "both were given"),
    ({"command": ["x"], "stdin": "pipe", "pty": {"rows": 24, "cols": 80}}, "leave one of them out"),
    ({"command": ["x"], "model": "M", "pty": {"rows": 24, "cols": 80}}, "takes no model with stdin=pty"),
    ({"command": [""]}, "names the program"),
    ({"command": ["x"], "model": "M"}, "command takes no model"),
    ({"command": ["x"], "system_prompt": "M"}, "command takes no system_prompt"),
    ({"command": ["x"], "tool_level": "readonly"}, "cannot enforce"),
    ({"model_backend": "x-cli", "agents": {"a": {}}}, "backend x-cli takes no agents"),
    ({"model_backend": "x\0-cli"}, "NUL"),
    ({"model_backend": "codex", "task": "t", "agents": {"a": {}}}, "codex takes no agents"),
    ({"model_backend": "aider", "task": "t", "system_prompt": "s"}, "aider takes no system_prompt"),
    ({"model_backend": "claude", "task": "t", "agents": "x"}, "agents must be an object"),
    *(({"model_backend": name}, f"{name} needs a task") for name in BUILTIN),
])
def test_bad_requests(config: dict[str, Any], says: str) -> None:
    assert says in refusal(**config)


@pytest.mark.parametrize("name", ["claud", "Claude", "cli", "-cli", "claude "])
def test_an_unknown_backend_names_the_known(name: str) -> None:
    assert "aider, claude, codex, gemini, opencode and PROGRAM-cli" in refusal("unknown_backend", model_backend=name)


def test_nothing_counts_as_not_given() -> None:
    nothings: list[Any] = [None, {}, []]
    for nothing in nothings:
        assert run("codex", task="t", agents=nothing, tool_level="").argv[-1] == "t"


# ---------------------------------------------------------------- tool levels

LEVELS = {  # as the protocol spells them: claude, codex; None is refused
    ("minimal",): (MINIMAL, "workspace-write"),
    ("orchestrator", "full"): (MINIMAL + ",Task,WebFetch,WebSearch", "danger-full-access"),
    ("readonly", "read", "read-only", "READ_ONLY"): ("Read,Glob,Grep", "read-only"),
    ("researcher", "research"): ("Read,Glob,Grep,WebFetch,WebSearch", None),
    ("planner", "plan"): ("Read,Write,Glob,Grep", "workspace-write"),
    ("lispdeveloper", "lisp", "Lisp-Developer"): (None, None),
}


@pytest.mark.parametrize("level,claude,codex", [
    (level, *words) for levels, words in LEVELS.items() for level in levels])
def test_tool_levels(level: str, claude: str | None, codex: str | None) -> None:
    for name, flags, word in ("claude", ("--tools", "--allowedTools"), claude), ("codex", ("-s",), codex):
        if word is None:
            assert "cannot enforce" in refusal(model_backend=name, task="t", tool_level=level)
            continue
        argv = run(name, task="t", tool_level=level).argv
        assert [argv[argv.index(flag) + 1] for flag in flags] == [word] * len(flags)
    for name in ("opencode", "gemini", "aider", "x-cli"):
        if level in ("orchestrator", "full"):
            assert run(name, task="t", tool_level=level).argv
        else:
            assert "cannot enforce" in refusal(model_backend=name, task="t", tool_level=level)


@pytest.mark.parametrize("level", ["all", "-", "everything", "read only", "fulll", "\u0131"])
@pytest.mark.parametrize("name", ["claude", "codex", "aider", "x-cli"])
def test_an_unknown_level_never_means_everything(level: str, name: str) -> None:
    assert "is unknown" in refusal(model_backend=name, task="t", tool_level=level)


def test_a_level_that_the_line_does_not_pass_on_is_refused() -> None:
    mended = {"claude": {"argv": "claude -p -- {task}"}}
    assert "cannot enforce" in refusal(backends=mended, model_backend="claude", task="t", tool_level="full")
    assert launch(mended, model_backend="claude", task="t").argv == ["claude", "-p", "--", "t"]
    assert "--tools" in launch(mended, model_backend="claude", stdin="pipe", tool_level="full").argv


# ---------------------------------------------------------------- environment

def test_the_base_environment_is_an_allow_list() -> None:
    passed = dict.fromkeys(["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_TIME", "TZ", "TERM",
                            "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"], "v")
    others = dict.fromkeys(["ANTHROPIC_API_KEY", "LD_PRELOAD", "PYTHONPATH", "PATHS", "LC", "AGENTSERVER_STATE_DIR",
                            "AGENTSERVER_AGENT_ID", "NOTIFY_SOCKET"], "secret")
    assert base_environment({**passed, **others}) == passed
    more = base_environment({**passed, **others}, ["ANTHROPIC_*", "LD_PRELOAD", "AGENTSERVER_*"])
    assert set(more) - set(passed) == {"ANTHROPIC_API_KEY", "LD_PRELOAD", "AGENTSERVER_STATE_DIR"}


def test_who_wins_in_the_environment() -> None:
    own = {"x": {"argv": "x", "environment": "B=backend\nC=backend\nAGENT_CONTEXT=backend"}}
    one = launch(own, {"TZ": "base", "B": "base", "LANG": "base"}, ("B",), model_backend="x", context="ctx",
                 environment={"C": "request", "LANG": "request", "AGENTSERVER_AGENT_ID": "forged"})
    assert one.environment == {"TZ": "base", "B": "backend", "C": "request", "LANG": "request", "AGENT_CONTEXT": "ctx"}


@pytest.mark.parametrize("config", [{"command": ["x"]}, {"model_backend": "x-cli"}, {"model_backend": "codex"}])
def test_context_is_in_the_environment(config: dict[str, Any]) -> None:
    assert launch(**config, task="t", context="c").environment["AGENT_CONTEXT"] == "c"
    assert "AGENT_CONTEXT" not in launch(**config, task="t").environment
    mine = launch(**config, task="t", context="c", environment={"AGENT_CONTEXT": "mine"})
    assert mine.environment["AGENT_CONTEXT"] == "mine"


def test_no_secret_reaches_argv_or_repr() -> None:
    own = {"x": {"argv": "x {task}", "environment.KEY": "s3cret", "file.F": "s3cret"}}
    one = launch(own, model_backend="x", task="t", environment={"K": "s3cret"})
    assert one.environment == {"KEY": "s3cret", "K": "s3cret"} and one.files == {"F": "s3cret"}
    assert "s3cret" not in " ".join(one.argv) + repr(one) + repr(from_section("x", own["x"]))


# ---------------------------------------------------------------- [backend NAME]

def test_a_section_of_its_own() -> None:
    backend = from_section("mine", {
        "argv": "my-agent --quiet --model {model}\n  --style={context?'long one'} -- {task}", "stdin": "pipe",
        "argv_pipe": "my-agent --repl", "finish": "close_stdin", "environment": "A = 1\n\nB=x=y {model}",
        "environment.C": "3", "file.RULES": "{system_prompt}", "tools.READ-only": ""})
    assert backend == Backend(
        "mine", ("my-agent", "--quiet", "--model", "{model}", "--style={context?long one}", "--", "{task}"),
        ("my-agent", "--repl"), "pipe", "close_stdin", {"orchestrator": "", "readonly": ""},
        {"A": "1", "B": "x=y {model}", "C": "3"}, {"RULES": "{system_prompt}"})
    config: dict[str, Any] = {"model_backend": "mine", "stdin": "null", "task": "t"}
    one = plan(messages.AgentConfig(**config), {"mine": backend}, {}, ())
    assert one.argv == ["my-agent", "--quiet", "--", "t"] and one.environment == {"A": "1", "C": "3"}
    one = plan(messages.AgentConfig(**config, model="M", context="c"), {"mine": backend}, {}, ())
    assert one.argv == ["my-agent", "--quiet", "--model", "M", "--style=long one", "--", "t"]
    assert one.environment["B"] == "x=y M"


def test_what_is_left_out_with_a_field() -> None:
    own = {"x": {"argv": "x --format=json {model} -- {context} -v -m {model} {title}"}}
    assert launch(own, model_backend="x", name="n").argv == ["x", "--format=json", "--", "-v", "n"]
    assert launch(own, model_backend="x", name="n", model="-M", context="-c").argv == [
        "x", "--format=json", "-M", "--", "-c", "-v", "-m", " -M", "n"]


def test_python_may_give_lists_and_mappings() -> None:
    backend = from_section("m", {"argv": ["a b", "{task}"], "environment": {"A": " 1 "}})
    assert backend.argv == ("a b", "{task}") and backend.environment == {"A": " 1 "}


def test_a_section_mends_the_built_in_of_its_name() -> None:
    backend = from_section("claude", {"program": "/opt/claude", "environment.A": "1", "tools.minimal": "Read"})
    assert backend.argv == ("/opt/claude", *BUILTIN["claude"].argv[1:])
    assert backend.argv_pipe == ("/opt/claude", *BUILTIN["claude"].argv_pipe[1:])
    assert backend.tools == {**BUILTIN["claude"].tools, "minimal": "Read"} and backend.finish == "sigint"
    assert BUILTIN["claude"].tools["minimal"] == MINIMAL
    other = from_section("fast", {"like": "gemini", "argv": "gemini2 -p {task}", "finish": ""})
    assert (other.name, other.argv, other.files) == ("fast", ("gemini2", "-p", "{task}"), BUILTIN["gemini"].files)
    assert from_section("claude", {"finish": ""}).finish == ""


def test_sections_win_over_built_in_and_cli() -> None:
    both = {"aider": {"argv": "other"}, "echo-cli": {"argv": "mine"}}
    assert launch(both, model_backend="aider").argv == ["other"]
    assert launch(both, model_backend="echo-cli").argv == ["mine"]


@pytest.mark.parametrize("key,value,says", [
    ("argv", "a 'b", "cannot be split"), ("argv", "", "is empty"), ("argv", "'' x", "is empty"),
    ("argv", "a {taks}", "{taks}"), ("argv", "a --x={modell:json}", "{modell:json}"), ("argv", [1], "cannot be split"),
    ("argv_pipe", "a {prompt}", "{prompt}"), ("argv", ["a\0"], "NUL"), ("stdin", "tty", "null, pipe, pty"),
    ("finish", "kill", "nothing, close_stdin, sigint"), ("like", "nothing", "not built in"), ("program", "", "a path"),
    ("program", "{task}", "braces"), ("environment", "A", "has no ="), ("environment", "1A=s3cret", "'1A'"),
    ("environment", {"A": 5}, "must be text"), ("environment.A-B", "s3cret", "'A-B'"),
    ("environment.A", "s3cret\0", "NUL"), ("file.../x", "s3cret", "'../x'"),
    ("tools.everything", "x", "no tool level"), ("arg", "x", "has no key"),
])
def test_a_wrong_section_names_its_place(key: str, value: Any, says: str) -> None:
    section = {"argv": "a", key: value, "where": {key: "a.ini, line 7", "": "a.ini, line 1"}}
    with pytest.raises(ConfigError) as e:
        from_section("x", section)
    sentence = str(e.value)
    assert sentence.startswith("a.ini, line 7: [backend x] ") and says in sentence and "s3cret" not in sentence


def test_a_section_needs_a_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^a.ini, line 1: \[backend x\] needs argv"):
        from_section("x", {"stdin": "null", "where": {"": "a.ini, line 1"}})
    with pytest.raises(ConfigError, match=r"^\[backend x\] needs argv"):
        all_backends({"x": {}})


# ---------------------------------------------------------------- documentation

def test_the_page_shows_the_built_in_command_lines() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    for backend in BUILTIN.values():
        assert " ".join(backend.argv) in " ".join(page.split())
        for word in set(backend.tools.values()):
            assert word in page
    assert " ".join(BUILTIN["claude"].argv_pipe[-2:]) in page


def test_a_program_may_be_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    assert from_section("mine", {"program": "~/bin/tool", "argv": "tool -- {task}"}).argv[0] == "/home/u/bin/tool"
    assert from_section("mine", {"argv": "~/bin/tool -- {task}"}).argv == ("/home/u/bin/tool", "--", "{task}")
