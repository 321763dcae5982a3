"""What to run for a request: from AgentConfig to argv, environment and stdin.

Owns:    the command lines of known agent CLIs, tool levels, the base environment, `[backend NAME]` sections.
Runs in: the core (and `serve`, which reads the sections before it starts anything); it is pure.
Unaware: of processes, of whether a program exists, and of the agent's id and directory.

A command line is a template, one argument per item. `{field}` stands for what the request gives; `{field:json}` for
the same as a JSON string; `{field?text}` for `text` if the field was given. An argument whose field was not given is
left out, and with it a flag directly before it (an argument that begins with `-`, is not `--` and has no `=`).
Environment values and files are templates too. A field that no template takes up is refused, never ignored.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from .. import messages, wire
from ..config import check_backend_keys
from ..errors import ConfigError, RequestError
from ..paths import expanded

BASE_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TERM", "TMPDIR",
                    "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS")
STDIN = ("null", "pipe", "pty")
ROWS, COLS = 24, 80     # of a terminal whose size nobody gave
TERM = "xterm-256color"  # what most terminals of today understand
FINISH = ("", "close_stdin", "sigint")

#: what a template may take up; `tools` is the tool level as the backend spells it, `title` a short name for the run
FIELDS = ("task", "context", "system_prompt", "model", "agents", "tools", "title")
_PLACEHOLDER = re.compile(r"\{(%s)(?::(json)|\?([^{}]*))?\}" % "|".join(FIELDS))
_MISSPELT = re.compile(r"\{[a-z_]+(?:[:?][^{}]*)?\}")

_LEVELS = {"minimal": "minimal", "orchestrator": "orchestrator", "full": "orchestrator", "readonly": "readonly",
           "read": "readonly", "researcher": "researcher", "research": "researcher", "planner": "planner",
           "plan": "planner", "lispdeveloper": "lispdeveloper", "lisp": "lispdeveloper"}


# ---------------------------------------------------------------- backends

@dataclass(frozen=True)
class Backend:
    """How one agent CLI is run. `tools` maps the levels that it can enforce to its words for them."""

    name: str
    argv: Tuple[str, ...]
    argv_pipe: Tuple[str, ...] = ()   # with stdin=pipe; empty: as `argv`
    stdin: str = "null"
    finish: str = ""
    tools: Mapping[str, str] = field(default_factory=lambda: {"orchestrator": ""})
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)   # variable -> what its file holds

    def line(self, stdin: str) -> Tuple[str, ...]:
        """Return the template that runs with this kind of stdin."""
        return self.argv_pipe if stdin == "pipe" and self.argv_pipe else self.argv


_CLAUDE = ("claude", "-p", "--model", "{model}", "--output-format", "stream-json", "--verbose",
           "--include-partial-messages", "--append-system-prompt", "{system_prompt}",
           "--tools", "{tools}", "--allowedTools", "{tools}", "--agents", "{agents}")

BUILTIN: Dict[str, Backend] = {backend.name: backend for backend in (
    Backend(
        "claude", (*_CLAUDE, "--", "{task}"), (*_CLAUDE, "--input-format", "stream-json"), finish="sigint",
        tools={"minimal": "Read,Write,Edit,Bash,Glob,Grep",
               "orchestrator": "Read,Write,Edit,Bash,Glob,Grep,Task,WebFetch,WebSearch",
               "readonly": "Read,Glob,Grep",
               "researcher": "Read,Glob,Grep,WebFetch,WebSearch",
               "planner": "Read,Write,Glob,Grep"}),
    Backend(
        "codex", ("codex", "exec", "--json", "--skip-git-repo-check", "-s", "{tools}", "-m", "{model}",
                  "-c", "developer_instructions={system_prompt:json}", "--", "{task}"),
        tools={"minimal": "workspace-write", "orchestrator": "danger-full-access", "readonly": "read-only",
               "planner": "workspace-write"}),
    Backend(
        "opencode", ("opencode", "run", "--format", "json", "-m", "{model}", "--title", "{title}",
                     "--agent", "{system_prompt?agentserver}", "--", "{task}"),
        environment={"OPENCODE_CONFIG_CONTENT":
                     '{"agent":{"agentserver":{"mode":"primary","prompt":{system_prompt:json}}}}'}),
    Backend(
        "gemini", ("gemini", "-m", "{model}", "-o", "stream-json", "--skip-trust", "--approval-mode", "{tools}",
                   "-p", "{task}"),
        tools={"orchestrator": "yolo"}, environment={"GEMINI_CLI_NO_RELAUNCH": "true"},
        files={"GEMINI_SYSTEM_MD": "{system_prompt}"}),
    Backend(
        "aider", ("aider", "--model", "{model}", "--yes-always", "--no-check-update", "--analytics-disable",
                  "--no-pretty", "--message", "{task}")),
)}

#: what `command` and `<program>-cli` are, besides an argv that is used as it stands
_COMMAND = Backend("command", (), stdin="pipe")


# ---------------------------------------------------------------- [backend NAME] sections

def all_backends(sections: Mapping[str, Mapping[str, Any]]) -> Dict[str, Backend]:
    """Return the built-in backends and those of `ServerConfig.backends`, which win; raise `ConfigError`."""
    return {**BUILTIN, **{name: from_section(name, section) for name, section in sections.items()}}


def from_section(name: str, mapping: Mapping[str, Any]) -> Backend:
    """Return the backend that a section describes, or raise `ConfigError` naming file and line where known."""
    check_backend_keys(name, mapping)
    reader = _Section(name, mapping)
    backend = reader.start()
    backend = replace(
        backend, stdin=reader.word("stdin", STDIN, backend.stdin), finish=reader.word("finish", FINISH, backend.finish),
        argv=reader.argv("argv", backend.argv), argv_pipe=reader.argv("argv_pipe", backend.argv_pipe),
        environment={**backend.environment, **reader.environment(), **reader.group("environment.")},
        files={**backend.files, **reader.group("file.")}, tools={**backend.tools, **reader.levels()})
    if not backend.argv:
        raise reader.wrong("", "needs argv = PROGRAM …, or like = NAME of a built-in backend")
    return reader.with_program(backend)


class _Section:
    """Reads the values of one section. No sentence shows a value of the environment."""

    def __init__(self, name: str, mapping: Mapping[str, Any]) -> None:
        self.name, self.mapping = name, mapping

    def wrong(self, key: str, sentence: str) -> ConfigError:
        place = self.mapping.get("where", {}).get(key)
        return ConfigError(f"{place + ': ' if place else ''}[backend {self.name}] {sentence}")

    def start(self) -> Backend:
        """Return what the section starts from: `like`, or the built-in that it mends, or nothing."""
        like = self.mapping.get("like", self.name if self.name in BUILTIN else None)
        if like is None:
            return Backend(self.name, ())
        if like not in BUILTIN:
            raise self.wrong("like", f"is like {like!r}, which is not built in; built in are {', '.join(BUILTIN)}")
        return replace(BUILTIN[like], name=self.name)

    def word(self, key: str, words: Sequence[str], default: str) -> str:
        value = self.mapping.get(key, default)
        if value not in words:
            known = ", ".join(word or "nothing" for word in words)
            raise self.wrong(key, f"has {key} = {value!r}; it may be {known}")
        return str(value)

    def argv(self, key: str, default: Tuple[str, ...]) -> Tuple[str, ...]:
        if key not in self.mapping:
            return default
        arguments = self._split(key, self.mapping[key])
        if not arguments or not arguments[0]:
            raise self.wrong(key, f"{key} is empty; it begins with the program")
        for argument in arguments:
            unknown = _MISSPELT.search(_PLACEHOLDER.sub("", argument))
            if unknown:
                raise self.wrong(key, f"{key} has {unknown.group()}; what can stand in braces is "
                                      f"{', '.join(FIELDS)} (as {{task}}, {{task:json}} or {{task?TEXT}})")
        return arguments

    def _split(self, key: str, value: Any) -> Tuple[str, ...]:
        import shlex
        try:
            arguments = shlex.split(value) if isinstance(value, str) else list(value)
            return tuple(wire.list_of(wire.os_text())(arguments, key))
        except (TypeError, ValueError, RequestError) as e:
            raise self.wrong(key, f"{key} cannot be split into arguments: {e}") from None

    def with_program(self, backend: Backend) -> Backend:
        program = self.mapping.get("program", backend.argv[0])
        if not isinstance(program, str) or not program or "{" in program:
            raise self.wrong("program", "program must be a name or a path, without braces")
        program = expanded(program)
        pipe = (program, *backend.argv_pipe[1:]) if backend.argv_pipe else ()
        return replace(backend, argv=(program, *backend.argv[1:]), argv_pipe=pipe)

    def environment(self) -> Dict[str, str]:
        """Return what stands under `environment`: NAME=VALUE lines, or a mapping where Python gave one."""
        value = self.mapping.get("environment", {})
        if not isinstance(value, str):
            return self._variables("environment", value)
        pairs = [line.partition("=") for line in value.split("\n") if line.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise self.wrong("environment", "environment takes one NAME=VALUE a line, and one line has no =")
        return self._variables("environment", {name.strip(): text.strip() for name, _, text in pairs})

    def group(self, prefix: str) -> Dict[str, str]:
        """Return the `environment.NAME` or `file.NAME` keys as NAME -> value."""
        found = {}
        for key, value in self.mapping.items():
            if key.startswith(prefix):
                found.update(self._variables(key, {key[len(prefix):]: value}))
        return found

    def _variables(self, key: str, values: Mapping[str, str]) -> Dict[str, str]:
        for name in values:
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", str(name)):  # it also becomes the name of a file
                raise self.wrong(key, f"{key} has {str(name).partition('=')[0]!r}, which is no name of a variable")
        try:
            return wire.environment(dict(values), key.partition(".")[0])
        except RequestError as e:
            raise self.wrong(key, str(e)) from None

    def levels(self) -> Dict[str, str]:
        found = {}
        for key, value in self.mapping.items():
            if key.startswith("tools."):
                level = _level(key[len("tools."):])
                if not level:
                    raise self.wrong(key, f"{key} is for no tool level; there are {', '.join(_LEVELS)}")
                found[level] = str(value)
        return found


# ---------------------------------------------------------------- from a request to a launch

@dataclass(frozen=True)
class Launch:
    """What to start. Values of `environment` and `files` are secrets: `repr` does not show them.

    Each of `files` (variable -> text) is to be written, mode 0600, as `<agent's directory>/<variable>` before the
    start; `environment_in` adds the paths.
    """

    argv: List[str]
    stdin: str
    pty: Optional[Dict[str, int]]   # rows and cols, if it is to have a terminal
    finish: str
    environment: Dict[str, str] = field(repr=False)
    files: Dict[str, str] = field(default_factory=dict, repr=False)

    def environment_in(self, directory: str) -> Dict[str, str]:
        """Return the environment with the paths of `files`, which the caller has written to `directory`."""
        return {**self.environment, **{variable: f"{directory}/{variable}" for variable in self.files}}


def plan(config: messages.AgentConfig, backends: Mapping[str, Backend], environ: Mapping[str, str],
         pass_environment: Sequence[str]) -> Launch:
    """Return what `config` asks for, or raise `RequestError` (`unknown_backend`, `bad_request`)."""
    if config.pty is not None and config.stdin not in (None, "pty"):
        raise RequestError(f"config.pty gives the size of a terminal, and config.stdin={config.stdin} says that there "
                           "is none; leave one of them out")
    if bool(config.command) == bool(config.model_backend):
        raise RequestError("give either command (an argv) or model_backend (a name); "
                           + ("both were given" if config.command else "neither was given"))
    base = base_environment(environ, pass_environment)
    if config.command:
        return _literal_launch(config, list(config.command), "command", base)
    backend = backends.get(config.model_backend)
    if backend is not None:
        return _backend_launch(config, backend, base)
    return _literal_launch(config, [_cli_program(config.model_backend, backends)] + [config.task] * bool(config.task),
                           f"backend {config.model_backend}", base)


def base_environment(environ: Mapping[str, str], pass_environment: Iterable[str] = ()) -> Dict[str, str]:
    """Return what of `environ` every agent gets: the allow-list and `pass_environment` (`*` at the end: any rest)."""
    allowed = (*BASE_ENVIRONMENT, *pass_environment)
    exact = {name for name in allowed if not name.endswith("*")}
    beginnings = tuple(name[:-1] for name in allowed if name.endswith("*"))
    return {name: value for name, value in environ.items()
            if (name in exact or name.startswith(beginnings)) and name != "AGENTSERVER_AGENT_ID"}


def _stdin(config: messages.AgentConfig, backend: Backend) -> str:
    return "pty" if config.pty is not None else config.stdin or backend.stdin


def _size(config: messages.AgentConfig, stdin: str) -> Optional[Dict[str, int]]:
    if stdin != "pty":
        return None
    return {"rows": config.pty.rows, "cols": config.pty.cols} if config.pty else {"rows": ROWS, "cols": COLS}


def _cli_program(name: str, backends: Mapping[str, Backend]) -> str:
    program = name[:-len("-cli")] if name.endswith("-cli") else ""
    if not program:
        raise RequestError(f"model_backend {name!r} is unknown; there are {', '.join(sorted(backends))} and "
                           "PROGRAM-cli, and a [backend NAME] section in the server's configuration adds one",
                           "unknown_backend")
    return str(wire.os_text()(program, "model_backend"))


def _literal_launch(config: messages.AgentConfig, argv: List[str], what: str, base: Dict[str, str]) -> Launch:
    if not argv[0]:
        raise RequestError("command[0] is empty; it names the program")
    _refuse_unused(config, {"task"}, _COMMAND, what, "")
    stdin = _stdin(config, _COMMAND)
    return Launch(argv, stdin, _size(config, stdin), _COMMAND.finish, _environment(config, base, {}, stdin))


def _backend_launch(config: messages.AgentConfig, backend: Backend, base: Dict[str, str]) -> Launch:
    stdin = _stdin(config, backend)
    line = backend.line(stdin)
    taken = _mentioned((*line, *backend.environment.values(), *backend.files.values()))
    if "task" in taken and not config.task and stdin == "null":
        raise RequestError(f"backend {backend.name} needs a task; give one, or use stdin=pipe "
                           "and write it to its stdin")
    way_out = "leave it out" if stdin == "null" else "write it to its stdin"
    tools = _refuse_unused(config, taken, backend, f"backend {backend.name}", way_out)
    values = _values(config, tools)
    files = {name: text for name, text in _filled(backend.files, values).items() if name not in config.environment}
    return Launch(_arguments(line, values), stdin, _size(config, stdin), backend.finish,
                  _environment(config, base, _filled(backend.environment, values), stdin), files)


def _refuse_unused(config: messages.AgentConfig, taken: Set[str], backend: Backend, what: str, way_out: str) -> str:
    """Refuse fields that would have no effect; return the backend's word for the tool level."""
    for name in ("task", "system_prompt", "model", "agents"):
        if getattr(config, name) and name not in taken:
            advice = way_out if name == "task" else "leave it out"
            stdin = "pty" if config.pty is not None else config.stdin
            raise RequestError(f"{what} takes no {name}" + (f" with stdin={stdin}" if stdin else "")
                               + f"; {advice}")
    if not config.tool_level:
        return ""
    level = _level(config.tool_level)
    if not level:
        raise RequestError(f"tool_level {config.tool_level!r} is unknown; there are {', '.join(_LEVELS)}")
    word = backend.tools.get(level)
    if word is None or (word and "tools" not in taken):
        able = ", ".join(sorted(backend.tools)) if not word else "none with this command line"
        raise RequestError(f"{what} cannot enforce the tool level {config.tool_level} (it can: {able}), and a level "
                           "that is not enforced is not accepted; choose another one or leave it out")
    return word


def _level(word: str) -> str:
    return _LEVELS.get(word.lower().replace("-", "").replace("_", ""), "")


def _values(config: messages.AgentConfig, tools: str) -> Dict[str, str]:
    return {"task": config.task, "context": config.context, "system_prompt": config.system_prompt,
            "model": config.model, "agents": _agents(config.agents), "tools": tools, "title": _title(config)}


def _agents(agents: Any) -> str:
    if agents and not isinstance(agents, dict):
        raise RequestError("agents must be an object: name -> description, prompt, …")
    return wire.encode_text(agents) if agents else ""


def _title(config: messages.AgentConfig) -> str:
    words = (config.name or config.task).split()
    return " ".join(words)[:50].lstrip("- ").rstrip() or "agentserver"


def _environment(config: messages.AgentConfig, base: Dict[str, str], own: Mapping[str, str],
                 stdin: str) -> Dict[str, str]:
    context = {"AGENT_CONTEXT": config.context} if config.context else {}
    terminal = {"TERM": TERM} if stdin == "pty" else {}  # not the one that the server was started from
    environment = {**base, **terminal, **own, **context, **config.environment}
    environment.pop("AGENTSERVER_AGENT_ID", None)
    return environment


# ---------------------------------------------------------------- templates

def _mentioned(templates: Iterable[str]) -> Set[str]:
    return {match.group(1) for template in templates for match in _PLACEHOLDER.finditer(template)}


def _arguments(line: Sequence[str], values: Mapping[str, str]) -> List[str]:
    """Fill a command line in; leave out what has no value, and the flag before it."""
    argv: List[str] = []
    flag = False   # whether the argument before is a flag that takes this one
    for template in line:
        argument = _fill(template, values)
        literal = _PLACEHOLDER.search(template) is None
        if argument is None:
            argv = argv[:-1] if flag else argv
        else:
            # a text such as "- mend it" after `-p` would be taken for a flag by most parsers, and by none with a blank
            argv.append(" " + argument if flag and not literal and argument.startswith("-") else argument)
        flag = literal and template.startswith("-") and template != "--" and "=" not in template
    return argv


def _filled(templates: Mapping[str, str], values: Mapping[str, str]) -> Dict[str, str]:
    texts = {name: _fill(template, values) for name, template in templates.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _fill(template: str, values: Mapping[str, str]) -> Optional[str]:
    """Return a template with its fields filled in, or `None` if one of them was not given."""
    if any(not values[name] for name in _mentioned((template,))):
        return None

    def text(match: re.Match[str]) -> str:
        value = values[match.group(1)]
        if match.group(2):
            return _json_string(value)
        return value if match.group(3) is None else match.group(3)

    return _PLACEHOLDER.sub(text, template)


def _json_string(text: str) -> str:
    """Return a JSON string that is a TOML string as well: no surrogate pairs, and DEL escaped (TOML 1.0)."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
