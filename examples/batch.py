"""Run the same command for many inputs at once, pause and resume them all, and collect how each ended.

    python examples/batch.py [--server ADDRESS] FILE...
"""
from __future__ import annotations

import argparse
import sys
import uuid

from agentserver import AgentClient, AgentServerError

COUNT_WORDS = "import sys; print(len(sys.stdin.read().split()))"


def main() -> int:
    """Let one agent per file count its words; the files travel over stdin."""
    options = argparse.ArgumentParser()
    options.add_argument("--server", help="where the server listens (default: the local one)")
    options.add_argument("files", nargs="+")
    given = options.parse_args()
    labels = {"batch": str(uuid.uuid4())}
    with AgentClient(given.server) as client:
        agents = {name: client.spawn([sys.executable, "-c", COUNT_WORDS], name=name, labels=labels)
                  for name in given.files}
        print("paused: ", client.batch("pause", labels=labels).successful)
        print("resumed:", client.batch("resume", labels=labels).successful)
        for name, agent in agents.items():
            with open(name, "rb") as text:
                agent.write(text.read(), eof=True)
        for info in client.wait([agent.id for agent in agents.values()]):
            print(f"{info.name}: {info.status}, {client.agent(info.id).read().data.decode().strip()} words")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except AgentServerError as error:
        raise SystemExit(f"{error} ({error.code})") from None
