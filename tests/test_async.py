"""What only an asynchronous client has: cancellation at any await, many coroutines at once; and that it is a twin.

Owns:    the tests of agentserver/aclient.py, core/alink.py and shell/alink.py beyond what both clients do.
Runs in: the test process, in an event loop per test, against a core that is a thread or real servers.
Unaware: of what is said; test_client.py and test_clients.py run the suites of AgentClient for its twin too.
"""
from __future__ import annotations

import asyncio
import inspect
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Coroutine, Dict, Iterator, List, Optional

import pytest
from fakecore import Connection, FakeCore, echo
from support import Server, agent, wait_until

from agentserver import Agent, AgentClient, AsyncAgent, AsyncAgentClient, LinkError, RequestTimeout
from agentserver.aclient import AT_ONCE, _Turns
from agentserver.core.alink import AsyncLineLink
from agentserver.core.link import socket_path

Json = Dict[str, Any]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end; nothing that it started may be left, and nothing be complained of."""
    complaints: List[Json] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: complaints.append(what))
        try:
            return await asyncio.wait_for(work, 60)
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left
    result = asyncio.run(watched())
    assert not complaints, complaints
    return result


@pytest.fixture
def address(link: str, shared_server: Server) -> str:
    """A real server over each link."""
    return shared_server.address(link)


# ---------------------------------------------------------------- a twin

def public(cls: type) -> Dict[str, Any]:
    """Return the public names of a class, `__aenter__` as `__enter__`."""
    found = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    return {**found, "__init__": cls.__init__}  # type: ignore[misc]


@pytest.mark.parametrize("one, other", [(AgentClient, AsyncAgentClient), (Agent, AsyncAgent)])
def test_the_twins_have_the_same_methods_and_parameters(one: type, other: type) -> None:
    ones, others = public(one), public(other)
    assert ones.keys() == others.keys()
    for name, method in ones.items():
        twin = others[name]
        assert inspect.getdoc(method) and inspect.getdoc(twin) or name == "__init__", name
        if isinstance(method, property):
            assert isinstance(twin, property)
            continue
        mine, theirs = inspect.signature(method), inspect.signature(twin)
        assert [(p.name, p.kind, p.default) for p in mine.parameters.values() if p.name != "client"] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values() if p.name != "client"], name
        iterates = "Iterator" in str(mine.return_annotation)
        assert ("AsyncIterator" in str(theirs.return_annotation)) == iterates, name
        plain = iterates or name in ("__init__", "open_link")
        assert inspect.iscoroutinefunction(twin) != plain, name


def test_each_method_of_both_is_one_conversation() -> None:
    """No logic is copied: what is said and decided is in calls.py and follow.py."""
    for cls in (AgentClient, AsyncAgentClient, Agent, AsyncAgent):
        for name, method in public(cls).items():
            if inspect.isfunction(method) and name not in ("__init__", "close"):
                source = inspect.getsource(method).split('"""')[-1]
                assert not {"if", "for", "while", "try"} & set(source.replace(":", " ").split()), f"{cls}.{name}"


# ---------------------------------------------------------------- many at once

def test_many_coroutines_share_a_client(address: str) -> None:
    async def work() -> None:
        async with AsyncAgentClient(address) as client:
            agents = await asyncio.gather(*(client.spawn(agent("echo"), name=f"n{n}") for n in range(12)))

            async def talk(each: AsyncAgent, words: str) -> str:
                lines = each.lines()
                assert await lines.__anext__() == "ready"
                await each.write(words + "\n")
                heard = await lines.__anext__()
                await each.close_stdin()
                assert [line async for line in lines] == []
                assert (await each.wait(30)).code == 0
                return heard
            said = [f"word {n}" for n in range(12)]
            assert await asyncio.gather(*map(talk, agents, said)) == said
            everyone = await asyncio.gather(*(client.agent(f"n{n}") for n in range(12)))
            assert [each.id for each in everyone] == [each.id for each in agents]
    run(work())


@pytest.fixture
def path(state_dir: Path) -> str:
    return socket_path(str(state_dir))


def test_replies_may_come_in_any_order(path: str) -> None:
    held: List[bytes] = []

    def backwards(raw: bytes, connection: Connection) -> Optional[bytes]:
        held.append(raw)
        if len(held) == AT_ONCE:
            while held:
                connection.reply(echo(held.pop(), connection) or b"")
        return None

    async def work() -> None:
        async with AsyncAgentClient(f"unix:{path}") as client:
            replies = await asyncio.gather(*(client.request({"type": "x", "n": n}) for n in range(2 * AT_ONCE)))
            assert [reply["was"]["n"] for reply in replies] == list(range(2 * AT_ONCE))
    with FakeCore(path, backwards) as core:
        run(work())
        assert len(core.connections) == 1


def test_so_many_are_under_way_and_no_more(path: str) -> None:
    waiting: List[Any] = []
    most = [0]

    def slow(raw: bytes, connection: Connection) -> Optional[bytes]:
        waiting.append(raw)
        most[0] = max(most[0], len(waiting))
        threading.Timer(0.01, lambda: (waiting.remove(raw), connection.reply(echo(raw, connection) or b""))).start()
        return None

    async def work() -> None:
        async with AsyncAgentClient(f"unix:{path}") as client:
            await asyncio.gather(*(client.request({"type": "x", "n": n}) for n in range(5 * AT_ONCE)))
    with FakeCore(path, slow):
        run(work())
    assert 1 < most[0] <= AT_ONCE


def test_who_waits_for_a_turn_waits_no_longer_than_it_may(path: str) -> None:
    async def work() -> None:
        async with AsyncAgentClient(f"unix:{path}", timeout=20) as client:
            busy = [asyncio.ensure_future(client.health()) for _ in range(AT_ONCE)]
            await asyncio.sleep(0)
            with pytest.raises(RequestTimeout):
                await client.request({"type": "x"}, timeout=0.05)
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
            core.handler = echo
            assert await client.request({"type": "x"})
    with FakeCore(path, lambda raw, connection: None) as core:
        run(work())


def test_a_turn_that_comes_to_who_was_cancelled_is_given_on() -> None:
    async def work() -> None:
        turns = _Turns(1)
        await turns.take(5)
        first, second = (asyncio.ensure_future(turns.take(5)) for _ in range(2))
        await asyncio.sleep(0)
        turns.give()
        first.cancel()      # it has the turn, and does not know it yet
        await asyncio.wait_for(second, 5)
        assert first.cancelled()
    run(work())


# ---------------------------------------------------------------- cancellation

async def cancelled_after(turns: int, work: Awaitable[Any]) -> bool:
    """Let something run for so many turns of the loop, then cancel it; return whether it was still running."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
        if task.done():
            break
    task.cancel()
    try:
        await task
        return False
    except asyncio.CancelledError:
        return True


async def settle(turns: int = 40) -> None:
    for _ in range(turns):
        await asyncio.sleep(0.0005)


def test_a_request_may_be_cancelled_at_any_await(address: str) -> None:
    async def work() -> None:
        async with AsyncAgentClient(address) as client:
            turns, was_running = 0, True
            while was_running and turns < 200:
                was_running = await cancelled_after(turns, client.health())
                mine = await client.request({"type": "list_agents_request", "request_id": f"turn {turns}"})
                assert mine["request_id"] == f"turn {turns}"
                turns += 1
            assert turns > 2
        for turns in range(12):  # and while it connects
            async with AsyncAgentClient(address) as client:
                await cancelled_after(turns, client.health())
                assert (await client.health()).healthy
    run(work())


def test_a_request_given_up_by_timeout_leaves_the_client_usable(address: str) -> None:
    async def work() -> None:
        async with AsyncAgentClient(address) as client:
            for secs in (0.0, 0.0001, 0.001, 0.003):
                try:
                    await asyncio.wait_for(client.health(), secs)
                except asyncio.TimeoutError:
                    pass
                assert (await client.health()).healthy
    run(work())


def test_a_follower_may_be_cancelled_at_any_await(address: str) -> None:
    async def follow(client: AsyncAgentClient, ref: str, got: List[bytes]) -> None:
        async for _, _, chunk in client.follow(ref, streams=["stdout"]):
            got.append(chunk.data)

    async def work() -> None:
        async with AsyncAgentClient(address) as client:
            ticker = await client.spawn(agent("ticker", "0.001"))
            for turns in range(0, 60, 3):
                assert await cancelled_after(turns, follow(client, ticker.id, []))
            got: List[bytes] = []
            task = asyncio.ensure_future(follow(client, ticker.id, got))
            await settle()
            assert (await client.health()).healthy
            await ticker.kill()
            await task
            whole = b""
            async for _, _, chunk in client.follow(ticker.id, streams=["stdout"]):
                whole += chunk.data
            assert b"".join(got) == whole
    run(work())


def test_waiting_may_be_cancelled(address: str) -> None:
    async def work() -> None:
        async with AsyncAgentClient(address) as client:
            sleeper = await client.spawn(agent("sleeper"))
            for turns in range(0, 40, 3):
                assert await cancelled_after(turns, sleeper.wait())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(sleeper.wait(), 0.05)
            await sleeper.kill()
            assert (await sleeper.wait(30)).signal == "SIGKILL"
    run(work())


def test_leaving_a_loop_early_and_closing_first_is_no_trouble(address: str) -> None:
    async def work() -> None:
        client = AsyncAgentClient(address)
        ticker = await client.spawn(agent("ticker", "0.001"))
        async for line in ticker.lines():
            assert line == "ready"
            break
        lines = ticker.lines()
        assert await lines.__anext__() == "ready"
        await client.close()
        await lines.aclose()  # type: ignore[attr-defined]
        await client.close()
        await ticker.kill()   # a closed client connects again
        await client.close()
    run(work())


# ---------------------------------------------------------------- loss

def test_who_waits_is_told_that_the_connection_broke_and_asks_again(path: str) -> None:
    cuts = [3]

    def fragile(raw: bytes, connection: Connection) -> Optional[bytes]:
        if cuts[0]:
            cuts[0] -= 1
            connection.cut()
            return None
        return echo(raw, connection)

    async def work() -> None:
        async with AsyncAgentClient(f"unix:{path}") as client:
            await asyncio.gather(*(client.request({"type": "x"}) for _ in range(8)))
    with FakeCore(path, fragile) as core:
        run(work())
        ids = [json.loads(raw)["request_id"] for raw in core.heard]
        assert len(set(ids)) == 8, "the same request, with the same id"


class Slow:
    """A route whose end takes its time, as that of an ssh does; it tells in which threads it was waited for."""

    name, shared, preamble = "the server", True, 0

    def __init__(self) -> None:
        self.there: List[socket.socket] = []
        self.waited_in: List[int] = []

    def dial(self) -> socket.socket:
        assert len(self.waited_in) == len(self.there), "nothing is dialled before the last one is gone"
        ours, theirs = socket.socketpair()
        self.there.append(theirs)
        return ours

    def broke(self, why: str, heard: bool) -> LinkError:
        self.hang_up(heard)
        return LinkError("its last words")

    def hang_up(self, heard: bool) -> None:
        time.sleep(0.005)
        self.waited_in.append(threading.get_ident())


@pytest.mark.parametrize("rests", [False, True])
def test_the_loop_never_waits_for_the_end_of_an_ssh(rests: bool) -> None:
    """However that comes: by closing, by breaking, by giving up at any await while it connects."""
    route = Slow()

    async def work() -> None:
        link = AsyncLineLink(route)
        for turns in range(12):
            assert await cancelled_after(turns, link.request(b"{}", "1", 30.0))
            if rests or turns == 11:
                link.close()
                await link.gone()
        asking = asyncio.ensure_future(link.request(b"{}", "2", 30.0))
        while len(route.there) == len(route.waited_in):
            await asyncio.sleep(0)
        route.there[-1].close()
        with pytest.raises(LinkError, match="its last words"):
            await asking
        link.close()
        await link.gone()
        assert len(route.there) == len(route.waited_in) >= (12 if rests else 2)
        assert threading.get_ident() not in route.waited_in
    run(work())
    for sock in route.there:
        sock.close()


def test_nobody_there_is_said(path: str) -> None:
    async def work() -> None:
        async with AsyncAgentClient(f"unix:{path}") as client:
            for each in await asyncio.gather(*(client.health() for _ in range(5)), return_exceptions=True):
                assert isinstance(each, LinkError) and "agentserver serve" in str(each)
    run(work())


def test_one_client_after_the_other_in_loops_of_their_own(address: str) -> None:
    async def work() -> bool:
        async with AsyncAgentClient(address) as client:
            return (await client.health()).healthy
    assert [run(work()) for _ in range(3)] == [True] * 3


@pytest.fixture
def no_leak() -> Iterator[Callable[[], int]]:
    import os
    yield lambda: len(os.listdir("/proc/self/fd"))


def test_descriptors_are_given_back(address: str, no_leak: Callable[[], int]) -> None:
    async def work() -> None:
        async with AsyncAgentClient(address) as client:
            done = await client.spawn(agent("exit_with", "0"))
            await done.wait(30)
            assert [line async for line in done.lines()] == ["ready"]
    run(work())   # what is made once: threads, contexts
    before = no_leak()
    for _ in range(5):
        run(work())
    wait_until(lambda: no_leak() <= before + 2, what="libzmq, too, to have closed what was closed")
