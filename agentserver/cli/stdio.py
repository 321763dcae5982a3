"""`stdio`: the protocol on stdin and stdout, for the server of this machine.

Owns:    which state directory is meant, and that nothing but protocol is written to stdout.
Runs in: the main thread of a process that ssh or a client has started.
Unaware: of how lines are passed on, and of a core that goes away meanwhile (core/relay.py).
"""
from __future__ import annotations

import os
from argparse import Namespace
from typing import Callable

from . import exits
from .exits import UsageError


def stdio(given: Namespace) -> int:
    """Pass lines on until stdin ends and all is answered."""
    if given.server is not None or given.timeout is not None:
        raise UsageError("`agentserver stdio` is a way to the server of this machine: it has no --server or --timeout; "
                         "which server is chosen with --state-dir")
    from ..config import default_state_dir
    from ..core.relay import Relay
    state_dir = given.state_dir or os.environ.get("AGENTSERVER_STATE_DIR") or default_state_dir(os.environ)
    Relay(os.path.expanduser(state_dir), 0, 1).run()
    return exits.OK


COMMANDS: dict[str, Callable[[Namespace], int]] = {"stdio": stdio}
