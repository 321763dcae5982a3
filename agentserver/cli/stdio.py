"""`stdio`: the protocol on stdin and stdout, for the server of this machine.

Owns:    which state directory is meant, and that nothing but protocol is written to stdout.
Runs in: the main thread of a process that ssh or a client has started.
Unaware: of how lines are passed on, and of a core that goes away meanwhile (core/relay.py).
"""
from __future__ import annotations

import os
from argparse import Namespace
from typing import Callable

from . import exits, streams
from .exits import UsageError


def stdio(given: Namespace) -> int:
    """Pass lines on until stdin ends and all is answered."""
    if given.server is not None or given.timeout is not None:
        raise UsageError("`agentserver stdio` is a way to the server of this machine: it has no --server or --timeout; "
                         "which server is chosen with --state-dir")
    for fd in (0, 1):
        streams.need(fd)
    from ..core.relay import Relay
    from ..paths import state_dir
    Relay(state_dir(os.environ, given.state_dir or ""), 0, 1).run()
    return exits.OK


COMMANDS: dict[str, Callable[[Namespace], int]] = {"stdio": stdio}
