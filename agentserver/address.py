"""Where a server is: what an address means, and which one is meant when none is given.

Owns:    the forms of an address, and the sentence for what is none.
Runs in: a client, in any thread; it looks at the file system, and connects to nothing.
Unaware: of links and of what is said. What an address does not need is not imported.
"""
from __future__ import annotations

import importlib
import os
from typing import Any, Mapping, Optional

from . import endpoint, paths
from .core.link import LocalRoute, Route, socket_path
from .errors import LinkError

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"


def default_address(environ: Mapping[str, str]) -> str:
    """Return where to look when nobody said: AGENTSERVER_SERVER, the local core, the default port."""
    if environ.get("AGENTSERVER_SERVER"):
        return environ["AGENTSERVER_SERVER"]
    path = socket_path(paths.state_dir(environ))
    return f"unix:{path}" if os.path.exists(path) else DEFAULT_ENDPOINT


def route_of(address: str) -> Optional[Route]:
    """Return the way that lines take to an address, `None` for ZeroMQ; raise `LinkError` for what is no address."""
    if address.startswith("unix:") and len(address) > 5:
        path = paths.expanded(address[5:])
        return LocalRoute(socket_path(path) if os.path.isdir(path) else path)
    if address.startswith("ssh://"):
        from .core.ssh import SshRoute
        return SshRoute(address)
    if address.startswith(("tcp://", "ipc://")):
        return None
    raise LinkError(f"{shown(address)} is not an address; use tcp://HOST:PORT, ipc:///PATH, ssh://HOST, or unix:/PATH "
                    "of a state directory or its core.sock")


def zmq_endpoint(address: str) -> str:
    """Return a `tcp://` or `ipc://` address in its plain form; raise `LinkError` for what cannot be connected to."""
    scheme, _, rest = address.partition("://")
    try:
        return str(endpoint.tcp(rest)) if scheme == "tcp" else "ipc://" + endpoint.ipc(paths.expanded(rest))
    except ValueError as e:
        raise LinkError(f"{shown(address)} is not an address: {e}") from None


def shown(address: str) -> str:
    """Return what was given as an address, as a sentence may show it."""
    text = repr(address)
    return text if len(text) <= 120 else text[:117] + "..."


def with_pyzmq(module: str, address: str) -> Any:
    """Import what needs pyzmq, or say what to do without it."""
    try:
        return importlib.import_module(module, __package__)
    except ImportError:
        raise LinkError(f"{address} needs pyzmq, which is not installed: pip install pyzmq, "
                        "or use the local socket (unix:STATE_DIR)") from None
