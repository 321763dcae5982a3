"""What may be typed: every command, its arguments and its flags.

Owns:    the argparse tree and the rules for what is not a flag.
Runs in: the main thread, before anything else of a command.
Unaware: of what a command does with its options.

argparse knows the flags only. Its ideas of how flags and words may be mixed, and of `--`, differ
between Python versions, so the words are what it leaves over: `_settle` gives them to the command
by its shape. What follows the first `--` is never looked at as a flag.
"""
from __future__ import annotations

import argparse
import re
import sys
import time
from typing import Any, NoReturn, Sequence

from . import values
from .exits import UsageError

DESCRIPTION = """\
Run command-line agents on this machine: spawn them, talk to them, watch, pause and stop them.
AGENT is an id, a name, or a prefix of an id (at least 4 characters) that fits one agent."""
EPILOG = """\
exit codes: 0 fine, 1 the request failed, 2 usage, 3 server not reachable, 4 agent not found, 124 timeout;
`run` and `wait` exit with the agent's own code, or 128+N when signal N ended it"""

# The shapes that a command's words can have, as its usage line shows them.
NOTHING = ""
COMMAND = "(-- CMD [ARG …] | --backend B --task T)"
ONE = "AGENT"
MANY = "AGENT [AGENT …]"
CHOSEN = "(AGENT … | --label K=V | --all)"
SIGNALLED = "SIG (AGENT … | --label K=V | --all)"
SENT = "AGENT [TEXT … | -]"
FILE = "(FILE | -)"

#: what is given to this system as it is, not sent to a server
_PATHS = frozenset(("state_dir", "config", "output", "file", "server", "cwd", "text", "shape"))
_LIKE_A_FLAG = re.compile(r"-(?![0-9]+$|[0-9]*\.[0-9]+$)[^ ]+$")


class Parser(argparse.ArgumentParser):
    """A parser that does not print or exit when something is wrong, but raises."""

    def error(self, message: str) -> NoReturn:
        """Raise, so that a wrong command line is told in one line like everything else."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse, let it be known when that cannot be done."""
        from .show import say
        say(self.format_help().rstrip("\n"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, `subcommand`, the words by the command's shape, and when it `begun`; raise `UsageError` with
    a sentence."""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = build()
    given, left = parser.parse_known_args(list(argv[:at]))
    flags = [word for word in left if _LIKE_A_FLAG.match(word)]
    if flags:
        parser.prog += f" {given.subcommand}" if given.subcommand else ""
        parser.error(f"there is no flag {flags[0]}")
    if given.subcommand is None:
        parser.error("a command is missing")
    _settle(given, left, list(argv[at + 1:]))
    given.begun = time.monotonic()
    if sys.getfilesystemencoding() != "utf-8":
        for name in set(vars(given)) - _PATHS if given.subcommand != "serve" else ():
            setattr(given, name, values.as_utf8(getattr(given, name)))
    return given


def _settle(given: argparse.Namespace, words: list[str], rest: list[str]) -> None:
    """Give the command its words, and check how many there are."""
    shape, me = given.shape, f"`agentserver {given.subcommand}`"
    if shape == COMMAND:
        if words:
            raise UsageError(f"{me}: put -- before what is to be run, as in -- {' '.join(words + rest)}")
        given.argv = rest
        return
    words += rest
    if shape == FILE:
        if len(words) != 1:
            raise UsageError(f"{me}: name one recording, or - for stdin")
        given.file = words[0]
    if shape == NOTHING and words:
        raise UsageError(f"{me} takes only flags, not {words[0]!r}")
    if shape == SIGNALLED:
        if not words:
            raise UsageError(f"{me}: name a signal, then the agents")
        given.signal = words.pop(0)
    if shape in (ONE, MANY, SENT) and not words:
        raise UsageError(f"{me}: name an agent; `agentserver ps` lists them")
    if shape == ONE and len(words) > 1:
        raise UsageError(f"{me} takes one agent, not {len(words)}")
    given.agents = words[:1] if shape == SENT else words
    given.text = words[1:]


# ---------------------------------------------------------------- the tree

def build() -> Parser:
    """Return the whole parser."""
    parser = Parser(prog="agentserver", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    _shared(parser, None, False)
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND", parser_class=Parser)
    for add in (_serving, _starting, _looking, _reading, _recording, _talking, _controlling, _waiting, _asking):
        add(commands)
    return parser


def command_names() -> list[str]:
    """Return the names of all commands, in the order of the help."""
    for action in build()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices)
    return []


class _Version(argparse.Action):
    """Print the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__
        from .show import say
        say(f"agentserver {__version__}")
        parser.exit()


def _shared(parser: argparse.ArgumentParser, default: Any, json_default: Any) -> None:
    """Add the flags that every command takes, on both sides of the command's name."""
    group = parser.add_argument_group("flags of every command")
    group.add_argument("--json", action="store_true", default=json_default,
                       help="print one JSON document, or one per line for streams, and nothing else")
    group.add_argument("--server", metavar="ENDPOINT", default=default,
                       help="tcp://…, ipc://…, ssh://HOST or unix:PATH (default: AGENTSERVER_SERVER, else the local "
                            "server's socket, else tcp://127.0.0.1:5555)")
    group.add_argument("--timeout", metavar="SECS", type=values.seconds, default=default,
                       help="give up after so long (default: 30 for one answer; no limit for what waits or follows)")


def _add(commands: Any, name: str, shape: str, text: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                         usage=f"agentserver {name} [flags] {shape}".rstrip(), allow_abbrev=False)
    parser.set_defaults(shape=shape)
    _shared(parser, argparse.SUPPRESS, argparse.SUPPRESS)
    return parser


def _flag(parser: Parser, *names: str, help: str) -> None:
    parser.add_argument(*names, action="store_true", help=help)


def _labels(parser: Parser, text: str) -> None:
    parser.add_argument("--label", metavar="K=V", type=values.pair, action="append", default=[], help=text)


def _serving(commands: Any) -> None:
    parser = _add(commands, "serve", NOTHING,
                  "run the server in the foreground; it prints where it listens once it is ready")
    parser.add_argument("--config", metavar="FILE", help="an INI file with [server] and [backend NAME] sections")
    values.add_settings(parser)
    parser = _add(commands, "stdio", NOTHING,
                  "speak the protocol on stdin and stdout for this machine's server; what ssh:// addresses run")
    parser.add_argument("--state-dir", metavar="DIR",
                        help="the server's state directory (default: AGENTSERVER_STATE_DIR, else the usual one)")


def _starting(commands: Any) -> None:
    run = _add(commands, "run", COMMAND, "spawn an agent, show its output, pass my stdin, exit with its code")
    _flag(run, "-d", "--detach", help="print the id and leave the agent alone")
    _describing(run)
    _detaching(run)
    attach = _add(commands, "attach", ONE, "show the terminal of an agent on mine, and type on it")
    _detaching(attach)
    _flag(attach, "--read-only", help="only watch: send no keys (Ctrl-C leaves, too) and no size")
    _describing(_add(commands, "spawn", COMMAND, "spawn an agent and print its id"))


def _detaching(parser: Parser) -> None:
    parser.add_argument("--detach-keys", metavar="KEYS",
                        help="which keys leave the agent's terminal, as in ctrl-a,d, or none (default: "
                             "AGENTSERVER_DETACH_KEYS, else ctrl-p,ctrl-q)")


def _describing(parser: Parser) -> None:
    """Add what describes an agent. What is left out is left to the server's defaults."""
    add = parser.add_argument
    add("--name", help="a name, for people")
    add("--backend", metavar="B", help="claude, opencode, codex, gemini, aider, PROGRAM-cli, or one of the config file")
    for name, text in (("task", "what the agent is to do"), ("context", "more to know, also as AGENT_CONTEXT"),
                       ("system-prompt", "the agent's system prompt"), ("model", "the model the backend is to use"),
                       ("tool-level", "which tools it may use: minimal, full, readonly, researcher, planner")):
        add(f"--{name}", metavar="T", help=text)
    add("--env", metavar="K[=V]", type=values.variable, action="append", default=[],
        help="set a variable, or with K alone pass mine; as often as needed")
    add("--cwd", metavar="DIR", help="where it runs (default: here, if the server is local)")
    add("--stdin", choices=("null", "pipe", "pty"), help="whether it can be written to; pty: it runs on a terminal")
    add("--pty", metavar="ROWSxCOLS", type=values.terminal_size, help="it runs on a terminal of this size, as 24x80")
    _flag(parser, "-t", "--terminal", help="it runs on a terminal like mine, of its size; `attach` shows it")
    _labels(parser, "a label to select by; as often as needed")
    add("--grace-secs", metavar="SECS", type=values.seconds, help="time between SIGTERM and SIGKILL when it is stopped")
    add("--runtime-secs", metavar="SECS", type=values.seconds, help="end it after so long")
    add("--metadata", metavar="JSON", type=values.json_object, help="an object that is kept and given back")


def _looking(commands: Any) -> None:
    ps = _add(commands, "ps", NOTHING, "list the agents")
    _flag(ps, "-a", "--all", help="the finished ones too")
    ps.add_argument("--status", choices=values.STATUSES, help="only these")
    _labels(ps, "only agents with this label; as often as needed")
    _flag(ps, "--watch", help="show it again whenever something changes")
    _add(commands, "info", ONE, "show everything about one agent")
    _add(commands, "why", ONE, "tell in sentences how an agent ended, or what it does now")


def _reading(commands: Any) -> None:
    logs = _add(commands, "logs", MANY, "print what agents wrote")
    _flag(logs, "-f", "--follow", help="go on until the agents end")
    logs.add_argument("-n", "--lines", metavar="N", type=values.count, help="only the last N lines of each agent")
    logs.add_argument("--grep", metavar="PATTERN", help="only lines in which a regular expression (syntax of Python's "
                      "re) matches, both streams on stdout; exit code 1 when there is none")
    logs.add_argument("--since", metavar="T", type=values.moment,
                      help="only what was written since a time (2026-01-31T12:00:00Z) or in the last 30s, 10m, 2h, 1d")
    logs.add_argument("--stream", choices=("stdout", "stderr", "both"), default="both", help="default: both")
    _flag(logs, "-t", "--timestamps", help="put the time before each line")


def _recording(commands: Any) -> None:
    record = _add(commands, "record", ONE, "write what an agent wrote, with the times, as a recording")
    _flag(record, "-f", "--follow", help="go on until the agent ends")
    record.add_argument("-o", "--output", metavar="FILE", help="where to write it (default: stdout)")
    replay = _add(commands, "replay", FILE, "show a recording at its own pace; Ctrl-C ends it, the space bar holds it")
    replay.add_argument("--speed", metavar="X", type=values.factor, default=1.0, help="X times as fast: 2, 0.5")
    replay.add_argument("--max-idle", metavar="SECS", type=values.seconds, help="make longer pauses this short")


def _talking(commands: Any) -> None:
    send = _add(commands, "send", SENT, "write TEXT as one line to an agent's stdin, or with - my own stdin as it is")
    _flag(send, "--eof", help="close its stdin afterwards; at a terminal, type the end of file")


def _controlling(commands: Any) -> None:
    for name, text, over in (("pause", "pause agents with their whole trees", "running"),
                             ("resume", "let paused agents go on", "paused"),
                             ("stop", "ask agents to end, and end them when they do not", "live"),
                             ("kill", "end agents at once", "live"),
                             ("restart", "start agents again", "live"),
                             ("rm", "forget finished agents and their output", "finished"),
                             ("signal", "send a signal (int, SIGUSR1, 10) to agents", "live")):
        parser = _add(commands, name, SIGNALLED if name == "signal" else CHOSEN, text)
        _labels(parser, f"all {over} agents with this label; as often as needed")
        parser.add_argument("--all", dest="every", action="store_true", help=f"all {over} agents")
        if name == "pause":
            _flag(parser, "--force", help="also where the backend has a way of its own to pause")
        if name in ("stop", "restart"):
            parser.add_argument("--grace-secs", metavar="SECS", type=values.seconds, help="between SIGTERM and SIGKILL")
        if name in ("stop", "kill", "rm"):
            _flag(parser, "--wait", help="wait until they have ended" + ", then forget them" * (name == "rm"))


def _waiting(commands: Any) -> None:
    wait = _add(commands, "wait", MANY, "block until agents end, and exit with their code")
    wait.add_argument("--for", dest="status", metavar="STATUS", choices=values.STATUSES,
                      help="until they have this status: " + ", ".join(values.STATUSES))
    _flag(wait, "--any", help="until the first of them does")
    events = _add(commands, "events", NOTHING, "print what happened, oldest first")
    _flag(events, "-f", "--follow", help="print what happens from now on (with --since: and what happened since then)")
    events.add_argument("--since", metavar="SEQ", type=values.count, help="only events after this sequence number")


def _asking(commands: Any) -> None:
    _add(commands, "health", NOTHING, "ask the server how it is")
    _add(commands, "stats", NOTHING, "print the server's counters")
    _add(commands, "reload", NOTHING, "renew the server's processes, with the code installed now; agents go on")
    down = _add(commands, "shutdown", NOTHING, "end the server and all its agents, and wait until it is gone")
    _flag(down, "--drain", help="let the agents end by themselves first; nothing new is started meanwhile")
    doctor = _add(commands, "doctor", NOTHING, "check the installation and say what to mend")
    doctor.add_argument("--state-dir", metavar="DIR", help="the state directory to check")
    doctor.add_argument("--config", metavar="FILE", help="the INI file to check")
