"""The line between the keeper and its parts: nothing is lost on it, and nobody waits for the other.

Owns:    more words and descriptors than any buffer holds, in both directions; a receiver without room for descriptors.
Runs in: the test process, which is both ends.
Unaware: of what keeper and core say to each other.
"""
from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import DEADLINE_SECS

from agentserver.core.channel import LOST, Channel, readable, whole


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends; a test in which one of them waits for ever fails."""
    def late(*_: object) -> None:
        raise AssertionError("one end waits for the other")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(DEADLINE_SECS))
    ours, theirs = map(Channel, socket.socketpair())
    try:
        yield ours, theirs
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        ours.close()
        theirs.close()


@contextlib.contextmanager
def room_for(more: int) -> Iterator[None]:
    """Let this process open so many more descriptors only, beside those that it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as taken:
        lowest = taken.enter_context(open(os.devnull)).fileno()  # below it there is no room
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1 + more, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_to_hear_is_no_reason_to_wait(ends: tuple[Channel, Channel]) -> None:
    assert ends[0].receive() == []


@pytest.mark.parametrize("each", ["one by one", "made when there is room"])
def test_both_have_more_to_say_than_fits(ends: tuple[Channel, Channel], tmp_path: Path, each: str) -> None:
    """And every descriptor arrives with its own line."""
    count = 3000
    files = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(3)]
    words = [({"n": n}, [files[n % 3]] * (n % 4)) for n in range(count)]
    heard: list[list[dict[str, Any]]] = [[], []]
    opened = len(os.listdir("/dev/fd"))
    for end in ends:
        if each == "one by one":
            for word, fds in words[:100]:
                end.send(word, fds)
        end.send_each(iter(words[100:] if each == "one by one" else words))
        end.send({"over": True})
    assert ends[0].unsent and len(os.listdir("/dev/fd")) < opened + 400, "what waits is not copied"

    def over() -> bool:
        for end, said in zip(ends, heard):
            end.flush()
            for word in end.receive():
                assert word is not None
                for fd in word.get("fds", ()):
                    assert os.path.sameopenfile(fd, files[word["n"] % 3]) and not os.get_inheritable(fd)
                    os.close(fd)
                said.append(word)
        return all(said and "over" in said[-1] for said in heard)
    assert any(over() for _ in range(1_000_000)), "both ends are ours: there is nothing to wait for"
    for said in heard:
        assert [word["n"] for word in said[:-1]] == list(range(count))
        assert all(len(word.get("fds", ())) == word["n"] % 4 for word in said[:-1])
    for fd in files:
        os.close(fd)


def test_as_many_descriptors_as_one_message_may_have(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    ours.send({"many": True}, [0] * 253)
    word, = theirs.receive()
    assert word is not None and len(word["fds"]) == 253 and LOST not in word["fds"]
    for fd in word["fds"]:
        os.close(fd)
    with pytest.raises(ValueError, match="254"):
        ours.send({"too": "many"}, [0] * 254)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_receiver_without_room_knows_which_descriptors_are_lost(ends: tuple[Channel, Channel], tmp_path: Path,
                                                                  room: int) -> None:
    """Those of other lines are what they should be."""
    ours, theirs = ends
    (tmp_path / "right").touch()
    with open(tmp_path / "right") as right, open(os.devnull) as wrong:
        ours.send({"n": 1}, [wrong.fileno()] * 4)
        ours.send({"n": 2}, [])
        ours.send({"n": 3}, [right.fileno()])
        with room_for(room):
            first, = theirs.receive()
            assert first is not None and first["fds"][room:] == [LOST] * (4 - room)
            assert LOST not in first["fds"][:room] and whole(first["fds"]) == []
        rest = [word for _ in range(2) for word in theirs.receive()]
        assert [word["n"] for word in rest if word] == [2, 3] and rest[-1] is not None
        assert os.path.sameopenfile(rest[-1]["fds"][0], right.fileno())
        os.close(rest[-1]["fds"][0])


def test_descriptors_of_an_unfinished_line_are_closed(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    receiver = Channel(theirs)
    read, write = os.pipe()
    socket.send_fds(ours, [b'{"half": '], [write])
    assert receiver.receive() == []
    os.close(write)
    receiver.close()
    ours.close()
    assert os.read(read, 1) == b"", "nobody holds the other end any more"
    os.close(read)


def test_descriptors_of_any_number_are_waited_for() -> None:
    read, write = os.pipe()
    high = os.dup(read)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("this process may not have so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    try:
        os.dup2(read, 2999)
        assert readable([2999], 0.01) == []
        os.write(write, b"x")
        assert readable([2999, high], 10) == [2999, high]
    finally:
        for fd in (read, write, high, 2999):
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
