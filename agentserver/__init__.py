"""agentserver: run command-line agents on this machine and reach them from anywhere over ZeroMQ.

Owns:    the public names. Each is imported when it is first asked for, so that the processes of a
         server start quickly, and `import agentserver` needs neither pyzmq nor a server.
Runs in: any thread.
Unaware: of everything else.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aclient import AsyncAgent, AsyncAgentClient
    from .client import Agent, AgentClient
    from .config import ServerConfig
    from .errors import AgentServerError, ConfigError, LinkError, RequestError, RequestTimeout, StartError
    from .results import AgentInfo, EventsDropped, ExitRecord, Health, OutputDropped, ServerStats
    from .shell.server import AgentServer

__version__ = "0.1.0"

_HOMES = {
    "Agent": "client", "AgentClient": "client", "AsyncAgent": "aclient", "AsyncAgentClient": "aclient",
    "AgentServer": "shell.server", "ServerConfig": "config",
    "AgentServerError": "errors", "ConfigError": "errors", "LinkError": "errors", "RequestError": "errors",
    "RequestTimeout": "errors", "StartError": "errors",
    "AgentInfo": "results", "EventsDropped": "results", "ExitRecord": "results", "Health": "results",
    "OutputDropped": "results", "ServerStats": "results",
}
__all__ = ["Agent", "AgentClient", "AgentInfo", "AgentServer", "AgentServerError", "AsyncAgent", "AsyncAgentClient",
           "ConfigError", "EventsDropped", "ExitRecord", "Health", "LinkError", "OutputDropped", "RequestError",
           "RequestTimeout", "ServerConfig", "ServerStats", "StartError", "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    try:
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as e:
        if e.name != "zmq":
            raise
        raise ImportError(f"{name} needs pyzmq, which is not installed; for it: pip install pyzmq") from None
