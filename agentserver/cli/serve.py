"""`serve`: become the server's keeper.

Owns:    handing flags, environment and file to config, and starting the keeper in this process.
Runs in: the main thread of what becomes the keeper.
Unaware: of what a server does.
"""
from __future__ import annotations

import os
from argparse import Namespace
from typing import Callable

from . import streams
from .exits import UsageError


def serve(given: Namespace) -> int:
    """Run the server until it is ended; return its exit code."""
    if given.server is not None or given.timeout is not None or given.json:
        raise UsageError("`agentserver serve` is the server itself: it has no --server, --timeout or --json; "
                         "where it listens is set with --endpoint")
    for fd in streams.closed:
        streams.forget(fd)  # who closes them wants to hear nothing, and a server goes on without
    from .. import sources
    prefix = "setting_"
    flags = {name[len(prefix):]: text for name, text in vars(given).items()
             if name.startswith(prefix) and text is not None}
    settings = sources.load(flags, os.environ, given.config)
    from ..core import serving
    return int(serving.serve(settings))


COMMANDS: dict[str, Callable[[Namespace], int]] = {"serve": serve}
