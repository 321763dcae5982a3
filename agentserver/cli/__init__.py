"""The command line: `agentserver COMMAND`.

Owns:    `main`, which parses, calls the one file that knows the command, and turns whatever happens
         into an exit code and at most one line on stderr.
Runs in: the process of a person or script; `serve` becomes the keeper.
Unaware: of what a command does.

In reading order: exits (codes and error lines) · options (the parser) · show (text for people) ·
out (bytes and JSON for stdout) · connect (the client, whose agents) · then one file per group:
serve, stdio, spawn (spawn), run with its stdin, attach with session, screen, redraw, escapes, typist,
terminal and detach, agents (ps, info, why), watch (ps --watch), reasons (the sentences of why), logs with
pieces and tail, record and replay with recording, send, control, wait, server (health, stats, events,
reload, shutdown), doctor. Each of them has `COMMANDS`, from a command's name to its function, and imports what
it needs when it is called, because a command line is judged by how soon it answers.
"""
from __future__ import annotations

import sys
from typing import Optional, Sequence

from . import exits

#: the module in this package that has the function of each command
HOMES = {
    "serve": "serve", "stdio": "stdio", "run": "run", "attach": "attach", "spawn": "spawn", "ps": "agents",
    "info": "agents", "why": "agents", "logs": "logs", "record": "record", "replay": "replay", "send": "send",
    "pause": "control", "resume": "control", "stop": "control", "kill": "control", "restart": "control",
    "rm": "control", "signal": "control", "wait": "wait", "events": "server", "health": "server", "stats": "server",
    "reload": "server", "shutdown": "server", "doctor": "doctor",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code; never raise, never show a traceback."""
    try:
        _prepare_streams()
        code = _command(list(sys.argv[1:] if argv is None else argv))
        _flush()
        return code
    except BrokenPipeError:
        exits.forget_stdout()
        return exits.PIPE
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except Exception as e:
        return exits.explain(e)


def _command(argv: list[str]) -> int:
    from importlib import import_module

    from . import options
    try:
        given = options.parse(argv)
    except SystemExit:  # argparse has shown what --help and --version ask for
        return exits.OK
    home = import_module("." + HOMES[given.subcommand], __package__)
    return int(home.COMMANDS[given.subcommand](given))


def _prepare_streams() -> None:
    """Fill descriptors 0 to 2 if the caller closed them, and let any text be printed.

    Else a socket of ours would become descriptor 1, and an agent's output would be written into it.
    """
    import os
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write what is buffered now, where a closed pipe or a full disk can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()
