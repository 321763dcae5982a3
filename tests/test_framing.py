"""Messages do not depend on how their bytes were cut up on the way, and no stream of bytes breaks a decoder."""
from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from agentserver.core.framing import (
    HEAD_BYTES,
    MAX_HEADER,
    PREFACE,
    TOO_LARGE,
    FrameDecoder,
    FramingError,
    LineDecoder,
    frame,
)

LIMIT = 20
SEEDS = range(30)


def lines_of(data: bytes, limit: int) -> list[bytes | None]:
    """Say what a decoder has to yield, the simplest way: all at once, unfinished lines only when too large."""
    *whole, rest = data.split(b"\n")
    found: list[bytes | None] = [line if len(line) <= limit else TOO_LARGE for line in whole]
    return found + [TOO_LARGE] if len(rest) > limit else found


def splits(data: bytes, rng: random.Random, tries: int = 10) -> Iterator[list[bytes]]:
    """Cut `data` into pieces: none, single bytes, at random, with empty pieces too."""
    yield [data]
    yield [data[i:i + 1] for i in range(len(data))]
    for _ in range(tries):
        cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, 12)))
        yield [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


def feed_lines(pieces: list[bytes], limit: int = LIMIT) -> list[bytes | None]:
    decoder = LineDecoder(limit)
    return [message for piece in pieces for message in decoder.feed(piece)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_split_of_any_bytes_gives_the_same_lines(seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(rng.choice((b"\n", b"a", b"\r", b"\xff", b"{}", b"x" * LIMIT, b"y" * (LIMIT + 1), b"z" * 300))
                    for _ in range(rng.randint(0, 60)))
    for pieces in splits(data, rng):
        assert feed_lines(pieces) == lines_of(data, LIMIT)


@pytest.mark.parametrize("data,messages", [
    (b"", []),
    (b"\n", [b""]),
    (b"\n\n", [b"", b""]),
    (b"a\r\n", [b"a\r"]),
    (b"x" * LIMIT + b"\n", [b"x" * LIMIT]),
    (b"x" * LIMIT, []),
    (b"x" * (LIMIT + 1), [TOO_LARGE]),
    (b"x" * (LIMIT + 1) + b"\n", [TOO_LARGE]),
    (b"x" * 1000 + b"\nok\n", [TOO_LARGE, b"ok"]),
    (b"x" * 1000 + b"\n\n" + b"y" * 1000 + b"\n", [TOO_LARGE, b"", TOO_LARGE]),
])
def test_lines(data: bytes, messages: list[bytes | None]) -> None:
    for pieces in splits(data, random.Random(1), 20):
        assert feed_lines(pieces) == messages


def test_a_line_without_end_is_answered_once_and_costs_no_memory() -> None:
    decoder = LineDecoder(LIMIT)
    answers = [message for _ in range(1000) for message in decoder.feed(b"x" * 1000)]
    assert answers == [TOO_LARGE]
    assert decoder.feed(b"still the same line\nnext\n") == [b"next"]


def test_the_preface_is_one_line() -> None:
    assert PREFACE.endswith(b"\n") and PREFACE.count(b"\n") == 1
    assert LineDecoder(LIMIT * 2).feed(PREFACE) == [PREFACE[:-1]]


# ---------------------------------------------------------------- frames

def noise(rng: random.Random, count: int, mask: int = 255) -> bytes:
    return bytes(rng.getrandbits(8) & mask for _ in range(count))


@pytest.mark.parametrize("seed", SEEDS)
def test_any_split_of_any_frames_gives_the_same_frames(seed: int) -> None:
    rng = random.Random(seed)
    sent = [(rng.choice((0, 1, 2 ** 64 - 1, rng.getrandbits(64))), noise(rng, rng.choice((0, 1, 30))),
             noise(rng, rng.choice((0, 1, 16, 200)))) for _ in range(rng.randint(0, 12))]
    data = b"".join(frame(*one) for one in sent)
    for pieces in splits(data + frame(7, b"header", b"unfinished")[:-1], rng):
        decoder = FrameDecoder(200)
        assert [one for piece in pieces for one in decoder.feed(piece)] == sent
        assert decoder.feed(b"d") == [(7, b"header", b"unfinished")]


def test_a_frame_has_the_layout_of_the_docstring() -> None:
    assert frame(3, b"ab", b"cde") == struct.pack("!IIQ", 2, 3, 3) + b"abcde"
    assert HEAD_BYTES == 16


@pytest.mark.parametrize("header,body", [(MAX_HEADER, 100), (0, 0), (MAX_HEADER, 0)])
def test_sizes_up_to_the_limits_pass(header: int, body: int) -> None:
    assert FrameDecoder(100).feed(frame(1, b"h" * header, b"b" * body)) == [(1, b"h" * header, b"b" * body)]


@pytest.mark.parametrize("header,body", [(MAX_HEADER + 1, 0), (0, 101), (2 ** 32 - 1, 2 ** 32 - 1)])
def test_sizes_over_the_limits_end_the_stream_before_the_bytes_come(header: int, body: int) -> None:
    with pytest.raises(FramingError, match="over the limit"):
        FrameDecoder(100).feed(struct.pack("!IIQ", header, body, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_frames_or_an_error(seed: int) -> None:
    rng = random.Random(seed)
    decoder = FrameDecoder(1 << 20)
    try:
        for _ in range(200):
            for tag, header, body in decoder.feed(noise(rng, 40, rng.choice((0, 1, 255)))):
                assert tag >= 0 and len(header) <= MAX_HEADER and len(body) <= 1 << 20
    except FramingError:
        pass
