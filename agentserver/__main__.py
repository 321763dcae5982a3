"""The one door for every process of ours: `python -m agentserver`, a path to this file, or the .pyz.

Owns:    the choice between core, shell, keeper, query and command line, made from the first argument.
Runs in: the main thread of each process, before anything of ours is imported.
Unaware: of what they do. `_core`, `_shell`, `_keeper` and `_query` are for our own processes, not for people.
"""
from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket


def _mend_path() -> None:
    """Let `import agentserver` work, and nothing of ours shadow a stranger, when this file is run by its path.

    Python then puts this directory first in `sys.path`, and our `client.py` would answer for anybody's
    `import client` (or, with -P, puts nothing there at all); what belongs there is its parent.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(package):
        del sys.path[0]
    if not __package__:
        sys.path.insert(0, os.path.dirname(package))


def _channel() -> socket.socket:
    """Return the socket to the keeper, which is our descriptor 0, and put /dev/null in its place."""
    import socket
    high = os.dup(0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return socket.socket(fileno=high)


def main() -> int:
    """Run the part that the first argument names, and return the exit code."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part == "_core":
        from agentserver.core import service
        return service.main(_channel())
    if part == "_shell":
        from agentserver.shell import child
        return child.main(_channel())
    if part == "_keeper":
        from agentserver.core import serving
        return serving.main(_channel())
    if part == "_query":
        from agentserver.core import query
        return query.main()
    if part == "_renewed":
        from agentserver.core import serving
        fd = int(sys.argv[2])
        del sys.argv[1:3]  # what is left is what the first of us was started with
        return serving.renewed(fd)
    if part == "_check":
        from agentserver.core import service, serving  # noqa: F401
        return 0
    return _command_line()


def _command_line() -> int:
    try:
        from agentserver import cli
    except KeyboardInterrupt:  # so early that nothing of ours could be asked what to do about it
        import signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return cli.main()


if __name__ == "__main__":
    _mend_path()
    raise SystemExit(main())
