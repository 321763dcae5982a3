"""The wire vocabulary: what is JSON and what is not, which values pass, and what comes back as it was."""
from __future__ import annotations

import json
import random
import re
import uuid
from dataclasses import FrozenInstanceError, fields
from datetime import datetime, timezone
from typing import Any

import pytest

from agentserver import messages
from agentserver.errors import ERROR_CODES, RequestError
from agentserver.messages import AgentConfig, ControlCommand, SpawnRequest
from agentserver.results import AgentInfo, Chunk, ExitRecord
from agentserver.wire import (
    MAX_DEPTH,
    MAX_MESSAGE,
    canonical,
    decode,
    encode,
    from_rfc3339,
    new_id,
    read,
    rfc3339,
    to_wire,
    wire_bytes,
    wire_text,
)


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    """An object that is `depth` levels deep, its own level included."""
    return ('{"a":' + opening * (depth - 1) + closing * (depth - 1) + "}").encode()


# ---------------------------------------------------------------- strict JSON

@pytest.mark.parametrize("raw", [
    b"", b" \n\t\r", b"\0", b"[]", b'["a"]', b'"text"', b"1", b"null", b"true", b"{", b"}", b"{}{}", b"{} x", b"{}\0",
    b"{'a':1}", b'{"a":1,}', b'{"a"}', b"{a:1}", b'{"a":01}', b'{"a":+1}', b'{"a":.5}', b'{"a":1.}', b'{"a":0x1}',
    b'{"a":"\n"}', b'{"a":"\\x"}', b'{"a":"\\u12"}', b"// {}", b'{"a":undefined}', b'{"a":-}', b'{"a":tru}',
    b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":-1e999}', b'{"a":[1e400]}',
    b'{"a":' + b"9" * 100_000 + b"}", b'{"a":-' + b"9" * 5000 + b"}",
    b"\xff\xfe{\0}\0", b"\xfe\xff\0{\0}", "{}".encode("utf-16"), "{}".encode("utf-32"), b"\xef\xbb\xbf{}",
    b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xc0\x80"}', b'{"a":"\xf8\x88\x80\x80\x80"}', b"\x80",
    b"\xc2\xa0{}", b"\x0b{}", b"\x0c{}",
    nested(MAX_DEPTH + 1), nested(MAX_DEPTH + 1, '{"a":[', "]}"), nested(100_000), nested(100_000, '{"a":', "}"),
    b"[" * 100_000, b'{"a":' * 100_000, b'{"a":"', b'{"a":[1,2',
], ids=lambda raw: repr(raw[:24]))
def test_what_is_not_one_json_object_is_a_bad_request(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode(raw)
    assert caught.value.code == "bad_request"
    sentence = str(caught.value)
    assert sentence.startswith(("the message", "NaN")) and len(sentence) < 300 and "\n" not in sentence


@pytest.mark.parametrize("raw,value", [
    (b"{}", {}),
    (b" \r\n\t{ } \n", {}),
    (b'{"a":null,"b":[true,false],"c":{"d":-0.5e-3}}', {"a": None, "b": [True, False], "c": {"d": -0.0005}}),
    (b'{"a":9223372036854775807,"b":-9223372036854775808}', {"a": 2 ** 63 - 1, "b": -2 ** 63}),
    (b'{"a":1,"a":2}', {"a": 2}),
    (b'{"":{"":""}}', {"": {"": ""}}),
    (b'{"a":"\\u0000\\u001f\\u2028"}', {"a": "\0\x1f\u2028"}),
    (b'{"a":"\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    (b'{"a":"NaN"}', {"a": "NaN"}),
    (b'{"a":"[[[[[' + b"[{" * 100 + b'"}', {"a": "[[[[[" + "[{" * 100}),
    (b'{"a":1e308}', {"a": 1e308}),
    (b'{"a":1e-999}', {"a": 0.0}),
])
def test_what_is_json_is_read(raw: bytes, value: dict[str, Any]) -> None:
    assert decode(raw) == value


def test_depth_is_counted_not_guessed() -> None:
    assert decode(nested(MAX_DEPTH))
    assert decode(nested(MAX_DEPTH, '{"a":', "}").replace(b"{}", b"1").replace(b":}", b":1}"))
    wide = {"a": [{"b": [i]} for i in range(1000)]}
    assert decode(encode(wide)) == wide


def test_size_is_checked_before_anything_else() -> None:
    at_limit = b'{"a":"' + b"x" * (MAX_MESSAGE - 8) + b'"}'
    assert len(decode(at_limit)["a"]) == MAX_MESSAGE - 8
    with pytest.raises(RequestError) as caught:
        decode(b"\xff" * (MAX_MESSAGE + 1))
    assert caught.value.code == "message_too_large"
    with pytest.raises(RequestError, match="has 3 bytes and at most 2"):
        decode(b"{ }", limit=2)


@pytest.mark.parametrize("text", ["\ud800", "\udfff", "a\udc80b", "\ude00\ud83d", "\0", "é\u2028\U0001f600",
                                  "\x7f\\\"/"])
def test_any_text_comes_back_as_it_was(text: str) -> None:
    for message in ({"a": text}, {text: [text]}):
        raw = encode(message)
        assert raw.isascii() and b"\n" not in raw
        assert decode(raw) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_json_is_not_sent(value: float) -> None:
    with pytest.raises(ValueError):
        encode({"a": value})


def test_mutated_messages_are_read_or_refused() -> None:
    rng = random.Random(7)
    seed = encode({"type": "spawn_request", "request_id": "x", "config": {"command": ["a", "\u00e9"], "environment":
                                                                          {"A": "b"}, "limits": {"runtime_secs": 1.5}}})
    for _ in range(3000):
        raw = bytearray(seed)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw) + 1)
            raw[at:at + rng.randint(0, 3)] = bytes(rng.getrandbits(8) for _ in range(rng.randint(0, 3)))
        try:
            read(SpawnRequest, decode(bytes(raw)))
        except RequestError as e:
            assert e.code == "bad_request" and str(e)


def test_canonical_ignores_order_and_id_only() -> None:
    one = {"request_id": "1", "type": "t", "payload": {"b": 1, "a": [1, 2]}}
    assert canonical(one) == canonical({"payload": {"a": [1, 2], "b": 1}, "type": "t", "request_id": "2"})
    assert canonical(one) == canonical({k: v for k, v in one.items() if k != "request_id"})
    assert canonical(one) != canonical({**one, "payload": {"b": 1, "a": [2, 1]}})
    assert canonical(one) != canonical({**one, "payload": {"b": 1, "a": [1, 2], "request_id": "1"}})
    assert canonical({"a": "\ud800"}) == b'{"a":"\\ud800"}'
    assert "request_id" in one      # the caller's own object


# ---------------------------------------------------------------- checks and reading

@pytest.mark.parametrize("config,sentence", [
    ({"command": []}, "config.command must have at least 1 item"),
    ({"command": "ls"}, 'config.command must be a list, not "ls"'),
    ({"command": ["a", 1]}, "config.command[1] must be text, not 1"),
    ({"command": ["a\0b"]}, "config.command[0] contains a NUL"),
    ({"command": ["\ud800"]}, "config.command[0] contains a lone surrogate"),
    ({"name": "x" * 257}, "config.name must have 0 to 256 characters and has 257"),
    ({"name": True}, "config.name must be text, not true"),
    ({"cwd": ""}, "config.cwd must have 1 to 4096"),
    ({"stdin": "tty"}, "config.stdin must be one of null, pipe, pty"),
    ({"grace_secs": -1}, "config.grace_secs must be at least 0"),
    ({"grace_secs": True}, "config.grace_secs must be a number of seconds, not true"),
    ({"grace_secs": "1"}, "config.grace_secs must be a number of seconds"),
    ({"limits": {"runtime_secs": 0}}, "config.limits.runtime_secs must be more than 0"),
    ({"limits": {"memory_bytes": 1}}, "config.limits.memory_bytes is not known to this version"),
    ({"limits": {"runtime_sec": 1}}, "config.limits.runtime_sec is not known to this version"),
    ({"pty": {"rows": 1, "cols": 1, "xpixel": 1}}, "config.pty.xpixel is not known to this version"),
    ({"name": "8D0F6C1E-3b67-4a55-9e3f-1c2b7a9d0e11"}, "config.name has the form of an agent's id"),
    ({"limits": []}, "config.limits must be an object"),
    ({"labels": {"a": 1}}, "config.labels.a must be text"),
    ({"environment": {"": "x"}}, "config.environment has the name ''"),
    ({"environment": {"A=B": "x"}}, "config.environment has a name with '=' in it, after 'A'"),
    ({"environment": {"A": 1}}, "config.environment.A must be text"),
    ({"environment": {"A": "secret\0"}}, "config.environment.A contains a NUL"),
    ({"environment": ["A=b"]}, "config.environment must be an object"),
    ({"pty": {"rows": 1}}, "config.pty.cols is missing"),
    ({"pty": {"rows": 1, "cols": 65536}}, "config.pty.cols must be"),
    ({"pty": True}, "config.pty must be an object"),
    ({"queue": True}, "config.queue: this version has no queue"),
    ({"restart": {"policy": "always"}}, "config.restart: this version has no restart policy"),
    ({"restart": {"policy": "never", "most": 1}}, "config.restart: this version has no restart policy"),
])
def test_a_wrong_field_is_named(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(SpawnRequest, {"config": config})
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value) and caught.value.code == "bad_request"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match=r"^config is missing$"):
        read(SpawnRequest, {"config": None})
    with pytest.raises(RequestError, match="agent_id is missing"):
        read(ControlCommand, {"command_type": "stop"})


def test_null_is_absent_and_the_unknown_is_ignored() -> None:
    nulls = {name: None for name in AgentConfig.__dataclass_fields__}
    assert read(AgentConfig, {**nulls, "from the future": [1]}) == read(AgentConfig, {}) == AgentConfig()


#: objects whose names are the caller's own, and those whose names belong to the message itself
FREE = {"metadata", "labels", "environment", "agents", "params", "config", "payload"}


@pytest.mark.parametrize("cls", [*messages.REQUESTS.values(), *messages.COMMANDS.values(), AgentConfig])
def test_an_unknown_name_inside_a_field_is_refused(cls: Any) -> None:
    """Of whatever may be an object: who sets a limit that is not known would rely on it in vain."""
    for each in fields(cls):
        if "check" in each.metadata and each.name not in FREE:
            with pytest.raises(RequestError, match=each.name):
                each.metadata["check"]({"no such name": 1}, each.name)


def test_a_null_inside_a_field_is_absent() -> None:
    assert read(SpawnRequest, {"config": {"limits": {"memory_bytes": None}}}).config.limits == messages.Limits()


@pytest.mark.parametrize("cls", [*messages.REQUESTS.values(), *messages.COMMANDS.values(), AgentConfig,
                                 messages.Limits])
def test_no_value_of_any_field_raises_anything_but_a_request_error(cls: Any) -> None:
    values: list[Any] = [None, True, False, 0, -1, 2 ** 63, 2 ** 70, 1.5, -0.0, 1e308, "", "x", "\0", "\ud800",
                         "x" * 5000, [], [None], [[]], [1, 256], ["x"], [{}], {}, {"": ""}, {"a": None}, {"a": []},
                         {"runtime_secs": "x"}]
    for name in cls.__dataclass_fields__:
        for value in values:
            try:
                read(cls, {name: value})
            except RequestError as e:
                assert str(e)


@pytest.mark.parametrize("value,good", [(0, True), (2 ** 63 - 1, True), (-1, False), (2 ** 63, False), (1.0, False),
                                        (True, False), ("1", False)])
def test_counts_are_whole_and_fit_64_bits(value: Any, good: bool) -> None:
    if good:
        assert read(messages.ListAgentsRequest, {"offset": value}).offset == value
    else:
        with pytest.raises(RequestError, match="offset must be"):
            read(messages.ListAgentsRequest, {"offset": value})


@pytest.mark.parametrize("data,value", [("text", "text"), ("", ""), ([0, 255], b"\0\xff"), ([], b"")])
def test_stdin_data(data: Any, value: str | bytes) -> None:
    assert read(messages.WriteStdinPayload, {"data": data}).data == value


@pytest.mark.parametrize("data", [[256], [-1], [True], ["a"], [1.0], {"a": 1}, 5, [[1]], [2 ** 70]])
def test_what_is_no_stdin_data(data: Any) -> None:
    with pytest.raises(RequestError, match="data must be text or an array"):
        read(messages.WriteStdinPayload, {"data": data})


@pytest.mark.parametrize("obj,sentence", [({}, "request_id is missing"),
                                          ({"request_id": None}, "request_id is missing"),
                                          ({"request_id": ""}, "1 to 128"), ({"request_id": "x" * 129}, "1 to 128"),
                                          ({"request_id": 5}, "must be text")])
def test_a_request_id_is_needed(obj: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        messages.read_request_id(obj)


def test_what_is_written_reads_back() -> None:
    request = SpawnRequest(config=AgentConfig(command=["a", "-b"], labels={"x": "y"}, limits=messages.Limits(2.5),
                                              environment={"KEY": "secret"}),
                           timeout_secs=3.0, metadata={"deep": [1, {}]})
    wire = decode(encode(to_wire(request)))
    assert wire["type"] == "spawn_request" and "cwd" not in wire["config"]
    assert read(SpawnRequest, wire) == request
    assert "secret" not in repr(request)
    assert to_wire(messages.WriteStdinPayload(data=b"\0\xff"))["data"] == [0, 255]


def test_messages_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        AgentConfig().name = "x"  # type: ignore[misc]


def test_requests_and_replies_pair_up() -> None:
    for type_, cls in messages.REQUESTS.items():
        assert cls.type == type_ and cls.reply.endswith("_response")
    assert len(ERROR_CODES) == len(set(ERROR_CODES))


# ---------------------------------------------------------------- results

def test_a_result_keeps_what_it_does_not_know() -> None:
    info = AgentInfo.of({"id": "x", "status": "failed", "new": 1, "labels": None,
                         "exit": {"signal": "SIGKILL", "signal_number": 9},
                         "output": {"stdout": {"first_offset": 1, "end_offset": 2}}})
    assert info.finished and info.labels == {} and info.raw["new"] == 1
    assert info.exit is not None and info.exit.returncode == 137
    assert info.output["stdout"].end_offset == 2


@pytest.mark.parametrize("record,code", [({"code": 0}, 0), ({"code": 3}, 3), ({"signal_number": 15}, 143), ({}, 1),
                                         (None, 1)])
def test_the_code_a_shell_would_report(record: dict[str, Any] | None, code: int) -> None:
    assert ExitRecord.of(record).returncode == code


# ---------------------------------------------------------------- bytes, ids, times

@pytest.mark.parametrize("data,encoding", [(b"", "utf-8"), (b"text\n", "utf-8"), ("é\U0001f600".encode(), "utf-8"),
                                           (b"\0\x1b", "utf-8"), (b"\xff", "base64"), (b"\xed\xa0\x80", "base64"),
                                           ("é".encode()[:1], "base64"), (bytes(range(256)), "base64")])
def test_bytes_travel_as_text_or_base64(data: bytes, encoding: str) -> None:
    text, told = wire_text(data)
    assert told == encoding and "\n" not in text[:-1]
    assert wire_bytes(*decode(encode({"d": [text, told]}))["d"]) == data
    assert Chunk.of({"data": text, "encoding": told, "offset": 3, "eof": True}) == Chunk(data=data, offset=3, eof=True)


def test_no_data_is_no_bytes() -> None:
    assert wire_bytes(None, None) == wire_bytes("", "base64") == b""
    assert Chunk.of(None).data == b""


def test_ids_are_version_4_uuids() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    for text in ids:
        parsed = uuid.UUID(text)
        assert str(parsed) == text and parsed.version == 4 and parsed.variant == uuid.RFC_4122


def test_times_round_trip() -> None:
    rng = random.Random(3)
    for unix in [0.0, 0.000001, 1_700_000_000.999999, 1_700_000_000.9999999, 951_782_400.0, 4e9] + \
            [rng.uniform(0, 4e9) for _ in range(200)]:
        stamp = rfc3339(unix)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
        assert abs(from_rfc3339(stamp) - unix) < 1.1e-6
        assert rfc3339(from_rfc3339(stamp)) == stamp
        assert abs(datetime.fromisoformat(stamp[:-1]).replace(tzinfo=timezone.utc).timestamp() - unix) < 1.1e-6


@pytest.mark.parametrize("stamp", ["2026-01-31T12:00:00Z", "2026-01-31T12:00:00z", "2026-01-31T12:00:00.000000Z",
                                   "2026-01-31T13:00:00+01:00", "2026-01-31T12:00:00"])
def test_the_ways_to_write_a_time(stamp: str) -> None:
    assert rfc3339(from_rfc3339(stamp)) == "2026-01-31T12:00:00.000000Z"


@pytest.mark.parametrize("stamp", ["", "Z", "now", "2026-13-01T00:00:00Z", "2026-01-31T25:00:00Z", "1700000000",
                                   "\ud800"])
def test_what_is_no_time_is_a_bad_request(stamp: str) -> None:
    with pytest.raises(RequestError, match="since must be an RFC 3339 time"):
        from_rfc3339(stamp, "since")


def test_error_sentences_can_be_sent() -> None:
    for raw in (b'{"a":"\xff"}', b'{"\\ud800":1} x', b"\x00"):
        with pytest.raises(RequestError) as caught:
            decode(raw)
        json.loads(encode({"error": str(caught.value)}))
