"""The command line: `agentserver COMMAND`.

Owns:    `main`, which parses, calls the one file that knows the command, and turns whatever happens
         into an exit code and at most one line on stderr.
Runs in: the process of a person or script; `serve` becomes the keeper.
Unaware: of what a command does.

In reading order: streams (descriptors 0 to 2) · exits (codes and error lines) · options (the parser) · show (text for
people) · out (bytes and JSON for stdout) · connect (the client, whose agents, until when) · then one file per group:
serve, stdio, spawn (spawn), run with its stdin, attach with session, screen, redraw, escapes, typist,
terminal and detach, agents (ps, info, why), watch (ps --watch), reasons (the sentences of why), logs with
pieces and tail, record and replay with recording, send, control, wait, server (health, stats, events,
reload, shutdown), doctor. Each of them has `COMMANDS`, from a command's name to its function, and imports what
it needs when it is called, because a command line is judged by how soon it answers.
"""
from __future__ import annotations

import sys
from typing import Optional, Sequence, Tuple

from . import exits, streams

#: the module in this package that has the function of each command
HOMES = {
    "serve": "serve", "stdio": "stdio", "run": "run", "attach": "attach", "spawn": "spawn", "ps": "agents",
    "info": "agents", "why": "agents", "logs": "logs", "record": "record", "replay": "replay", "send": "send",
    "pause": "control", "resume": "control", "stop": "control", "kill": "control", "restart": "control",
    "rm": "control", "signal": "control", "wait": "wait", "events": "server", "health": "server", "stats": "server",
    "reload": "server", "shutdown": "server", "doctor": "doctor",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code; never raise, never show a traceback.

    Without `argv` this is the whole process: a command that a signal has ended lets that signal end it, as programs do
    that do not catch it. A shell that runs us in a loop ends the loop then, which it would not for exit code 130.
    """
    code, number = _outcome(list(sys.argv[1:] if argv is None else argv))
    if argv is None:
        exits.leave(number)
    return code


def _outcome(argv: list[str]) -> Tuple[int, int]:
    """Return the exit code of a command, and the signal that has ended it, if one has."""
    try:
        streams.prepare()
        code = _command(argv)
        streams.flush()
        return code, 0
    except BrokenPipeError:
        streams.forget(1)
        return exits.PIPE, 0
    except KeyboardInterrupt:
        return exits.INTERRUPTED, exits.SIGINT
    except exits.Signalled as e:
        return 128 + e.number, e.number
    except Exception as e:
        if isinstance(e.__cause__, KeyboardInterrupt):  # what it interrupted, an import, made another error of it
            return exits.INTERRUPTED, exits.SIGINT
        return exits.explain(e), 0


def _command(argv: list[str]) -> int:
    from importlib import import_module

    from . import options
    try:
        given = options.parse(argv)
    except SystemExit:  # argparse has shown what --help and --version ask for
        return exits.OK
    home = import_module("." + HOMES[given.subcommand], __package__)
    command = home.COMMANDS[given.subcommand]
    if given.timeout is None:
        return int(command(given))
    from . import connect
    with connect.bounded(given):
        return int(command(given))
