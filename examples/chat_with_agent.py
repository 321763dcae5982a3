"""Talk to an agent over its stdin: ask, read the answer, ask again, close.

    python examples/chat_with_agent.py [--server ADDRESS] QUESTION...
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agentserver import AgentClient, AgentServerError

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Put each question to examples/agents/answerer.py and print what it says."""
    options = argparse.ArgumentParser()
    options.add_argument("--server", help="where the server listens (default: the local one)")
    options.add_argument("questions", nargs="+")
    given = options.parse_args()
    command = [sys.executable, str(HERE / "agents" / "answerer.py"), str(HERE.parent / "agentserver")]
    with AgentClient(given.server) as client:
        agent = client.spawn(command)
        answers = agent.lines()
        print("agent:", next(answers))
        for question in given.questions:
            agent.write(question + "\n")
            print("you:  ", question)
            print("agent:", next(answers))
        agent.close_stdin()
        print("agent:", next(answers))
        return agent.wait().returncode


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except AgentServerError as error:
        raise SystemExit(f"{error} ({error.code})") from None
