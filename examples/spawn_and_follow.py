"""Spawn an agent, show its output as it comes, and end as it ended.

    python examples/spawn_and_follow.py [--server ADDRESS] -- COMMAND...
"""
from __future__ import annotations

import argparse
import sys

from agentserver import AgentClient, AgentServerError


def main() -> int:
    """Run one command as an agent."""
    options = argparse.ArgumentParser()
    options.add_argument("--server", help="where the server listens (default: the local one)")
    options.add_argument("command", nargs="+")
    given = options.parse_args()
    with AgentClient(given.server) as client:
        agent = client.spawn(given.command, stdin="null")
        streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
        for _agent_id, stream, chunk in client.follow(agent.id):
            streams[stream].write(chunk.data)
            streams[stream].flush()
        return agent.wait().returncode


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except AgentServerError as error:
        raise SystemExit(f"{error} ({error.code})") from None
