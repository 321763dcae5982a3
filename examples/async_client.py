"""Run several programs at once and answer each as soon as it asks: with asyncio, in one client.

    python examples/async_client.py [--server ADDRESS] NAME...
"""
from __future__ import annotations

import argparse
import asyncio
import sys

from agentserver import AgentServerError, AsyncAgentClient

ASKS = "print('who are you?'); name = input(); print('good day,', name)"


async def attend(client: AsyncAgentClient, name: str) -> int:
    """Start one agent, show what it says, answer what it asks, and return how it ended."""
    agent = await client.spawn([sys.executable, "-u", "-c", ASKS], name=name)
    async for line in agent.lines():
        print(f"{name:>8} | {line}", flush=True)
        if line.endswith("?"):
            await agent.write(name + "\n")
    return (await agent.wait()).returncode


async def main() -> int:
    """Attend to one agent for each name, all at the same time."""
    options = argparse.ArgumentParser()
    options.add_argument("--server", help="where the server listens (default: the local one)")
    options.add_argument("names", nargs="+")
    given = options.parse_args()
    async with AsyncAgentClient(given.server) as client:
        codes = await asyncio.gather(*(attend(client, name) for name in given.names))
    print(f"{codes.count(0)} of {len(codes)} ended well")
    return max(codes)


if __name__ == "__main__":
    try:
        raise SystemExit(asyncio.run(main()))
    except AgentServerError as error:
        raise SystemExit(f"{error} ({error.code})") from None
