"""The bytes of NATS: what is written is what was meant, and nothing that is read can do more than end the reading."""

import asyncio
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catga_bus.errors import ConfigurationError
from catga_bus.transport.nats_protocol import (
    MAX_LINE_BYTES,
    MAX_MESSAGE_BYTES,
    Encoder,
    Parser,
    ProtocolError,
    ServerInfo,
    encode_headers,
    encode_subscribe,
    encode_unsubscribe,
    parse_headers,
)

Call = tuple[Any, ...]


class Heard:
    """Everything that a parser told, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.parser = Parser(self)
        self.parser.routes = {b"1": self.sink, b"2": self.broken_sink}

    def sink(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        self.calls.append(("message", subject, payload, reply, headers))

    def broken_sink(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        raise RuntimeError(subject)

    def on_info(self, info: ServerInfo) -> None:
        self.calls.append(("info", info))

    def on_ping(self) -> None:
        self.calls.append(("ping",))

    def on_pong(self) -> None:
        self.calls.append(("pong",))

    def on_err(self, text: str) -> None:
        self.calls.append(("err", text))

    def on_unrouted(self, sid: bytes) -> None:
        self.calls.append(("unrouted", sid))

    def on_sink_error(self, subject: str, error: BaseException) -> None:
        self.calls.append(("sink error", subject, type(error)))

    def feed(self, *chunks: bytes) -> list[Call]:
        for chunk in chunks:
            self.parser.feed(chunk)
        return self.calls


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """Cut a stream at any places into chunks, none of them empty, as a socket delivers it."""
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:stop] for start, stop in pairwise(edges)]


# Streams.

subjects = st.text(
    st.characters(exclude_characters=" \r\n\t", exclude_categories=["Cs", "Z", "C"]), min_size=1, max_size=20
)
payloads = st.binary(max_size=60) | st.sampled_from([b"\r\n", b"PING\r\n", b"MSG a 1 5\r\nhello\r\n", b"\r", b"\n"])
sids = st.sampled_from([b"1", b"2", b"3"])
header_texts = st.text(st.characters(exclude_characters="\r\n\x00", exclude_categories=["Cs"]), max_size=20).map(
    str.strip
)
header_names = st.text("!#$%&'*+-.^_`|~09AZaz", min_size=1, max_size=8)
header_sets = st.dictionaries(header_names, header_texts, max_size=4)


def told(sid: bytes, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> Call:
    if sid == b"1":
        return ("message", subject, payload, reply, headers)
    return ("sink error", subject, RuntimeError) if sid == b"2" else ("unrouted", sid)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, Call]:
    subject, sid, reply, payload = draw(subjects), draw(sids), draw(subjects | st.just("")), draw(payloads)
    words = [subject.encode(), sid, *([reply.encode()] if reply else [])]
    headers = draw(st.none() | header_sets)
    if headers is None:
        words.append(b"%d" % len(payload))
        return b"MSG %b\r\n%b\r\n" % (b" ".join(words), payload), told(sid, subject, payload, reply, None)
    block = encode_headers(headers)
    words += (b"%d" % len(block), b"%d" % (len(block) + len(payload)))
    line = b"HMSG %b\r\n%b%b\r\n" % (b" ".join(words), block, payload)
    return line, told(sid, subject, payload, reply, headers or None)


@st.composite
def infos(draw: st.DrawFn) -> tuple[bytes, Call]:
    info = ServerInfo(
        server_name=draw(st.text(max_size=5)),
        max_payload=draw(st.integers(0, 2**40)),
        connect_urls=tuple(draw(st.lists(st.text(max_size=5), max_size=3))),
        ldm=draw(st.booleans()),
    )
    return b"INFO " + msgspec.json.encode(info) + b" \r\n", ("info", info)


controls: st.SearchStrategy[tuple[bytes, Call]] = st.sampled_from(
    [
        (b"PING\r\n", ("ping",)),
        (b"PONG\r\n", ("pong",)),
        (b"-ERR 'Some Trouble'\r\n", ("err", "Some Trouble")),
        (b"-ERR\r\n", ("err", "")),
    ]
)
pieces = messages() | infos() | controls
places = st.lists(st.integers(0, 10_000), max_size=30)


@given(st.lists(pieces, max_size=8), places)
def test_the_chunks_of_a_stream_change_nothing(parts: list[tuple[bytes, Call]], where: list[int]) -> None:
    stream = b"".join(part for part, _ in parts)
    heard = Heard()
    assert heard.feed(*cut(stream, where)) == [call for _, call in parts]
    assert heard.parser.is_idle


@given(st.lists(pieces, min_size=1, max_size=4))
@settings(max_examples=30)
def test_a_stream_that_comes_byte_by_byte_is_read_too(parts: list[tuple[bytes, Call]]) -> None:
    stream = b"".join(part for part, _ in parts)
    assert Heard().feed(*(stream[at : at + 1] for at in range(len(stream)))) == [call for _, call in parts]


def read(chunks: list[bytes]) -> tuple[list[Call], bool]:
    """Return what was told and whether it was refused; anything else but `ProtocolError` is raised."""
    heard = Heard()
    try:
        heard.feed(*chunks)
    except ProtocolError:
        return heard.calls, True
    return heard.calls, False


words = st.sampled_from(b"MSG |HMSG |INFO |-ERR |PING|+OK|\r\n|\n| |a |1 |-1|5|{}".split(b"|")) | st.just(b"[" * 3_000)


@given(st.lists(words | st.binary(max_size=20), max_size=20).map(b"".join), places)
@settings(max_examples=400)
@example(b"INFO " + b"[" * 100_000 + b"\r\n", [])
@example(b'INFO {"a":' + b"[" * 100_000 + b"\r\n", [])
@example(b'INFO {"max_payload":1' + b"0" * 5_000 + b"}\r\n", [])
@example(b"MSG a 1 1" + b"0" * 5_000 + b"\r\n", [])
@example(b"MSG a 1 -20\r\n" * 2, [])
@example(b"HMSG a 1 5 -20\r\n" * 2, [])
@example(b"HMSG a 1 -5 0\r\n\r\n", [])
@example(b"HMSG a 1 0 0\r\n\r\n", [])
@example(b"INFO \xff\r\n", [])
@example(b"-ERR \n\r\n", [6])
@example(b"PING\r\n", [5])
def test_any_bytes_are_read_or_refused(stream: bytes, where: list[int]) -> None:
    whole = read([stream] if stream else [])
    assert read(cut(stream, where)) == whole


@given(st.lists(pieces, min_size=1, max_size=5), st.integers(0), st.integers(0, 255), places)
@settings(max_examples=300)
def test_a_stream_with_a_wrong_byte_is_read_or_refused(
    parts: list[tuple[bytes, Call]], where: int, byte: int, cuts: list[int]
) -> None:
    stream = bytearray(b"".join(part for part, _ in parts))
    stream[where % len(stream)] = byte
    read(cut(bytes(stream), cuts))


@pytest.mark.parametrize(
    "stream",
    [
        b"HELO\r\n",
        b"\r\n",
        b"ping\r\n",
        b"PING\n\r\n",
        b"MSG\r\n",
        b"MSG a 1\r\n",
        b"MSG a 1 2 3 4\r\n",
        b"MSG a 1 x\r\n",
        b"MSG a 1 -1\r\n\r\n",
        b"MSG a 1 5\r\nhello!!",
        b"MSGS a 1 5\r\nhello\r\n",
        b"HMSG a 1 5\r\n",
        b"HMSG a 1 6 5\r\n12345\r\n",
        b"HMSG a 1 -1 5\r\n12345\r\n",
        b"HMSG a 1 5 5\r\n12345!!",
        b"INFO\r\n",
        b"INFO []\r\n",
        b"INFO {\r\n",
        b'INFO {"max_payload": "much"}\r\n',
        b'INFO {"connect_urls": 5}\r\n',
        b'INFO {"nonce": 5}\r\n',
    ],
)
def test_what_is_not_nats_is_refused(stream: bytes) -> None:
    assert read([stream])[1]


def test_what_is_told_before_the_fault_was_told() -> None:
    calls, is_refused = read([b"PING\r\nMSG a 1 2\r\nhi\r\nnonsense\r\nPONG\r\n"])
    assert is_refused
    assert calls == [("ping",), ("message", "a", b"hi", "", None)]


def test_unknown_fields_of_a_server_are_skipped() -> None:
    (call,) = Heard().feed(b'INFO {"xkey": [{"a": 1}], "server_name": "s", "client_id": 5, "headers": true}\r\n')
    assert call == ("info", ServerInfo(server_name="s", headers=True))


def test_text_that_is_not_unicode_is_told_with_replacements() -> None:
    calls = Heard().feed(b"MSG a\xff 1 r\xff 1\r\nx\r\n-ERR '\xff'\r\n")
    assert calls == [("message", "a\ufffd", b"x", "r\ufffd", None), ("err", "\ufffd")]


def test_a_sink_that_is_cancelled_is_a_sink_that_raised() -> None:
    heard = Heard()

    def cancelled(*_: object) -> None:
        raise asyncio.CancelledError

    heard.parser.routes = {b"1": cancelled}
    assert heard.feed(b"MSG a 1 0\r\n\r\nHMSG a 1 12 12\r\nNATS/1.0\r\n\r\n\r\nPING\r\n") == [
        ("sink error", "a", asyncio.CancelledError),
        ("sink error", "a", asyncio.CancelledError),
        ("ping",),
    ]


def test_a_sink_may_be_replaced_by_the_message_before() -> None:
    heard = Heard()
    routes: dict[bytes, Callable[..., None]] = {}

    def once(*message: Any) -> None:
        heard.sink(*message)
        del routes[b"1"]

    routes[b"1"] = once
    heard.parser.routes = routes
    assert heard.feed(b"MSG a 1 0\r\n\r\n" * 2) == [("message", "a", b"", "", None), ("unrouted", b"1")]


# Bounds.


def test_a_line_without_end_is_refused() -> None:
    heard = Heard()
    heard.feed(b"INFO ")
    with pytest.raises(ProtocolError, match=f"{MAX_LINE_BYTES}"):
        heard.feed(*[b" " * 65_536] * (MAX_LINE_BYTES // 65_536 + 1))


def test_the_longest_message_is_gathered_and_a_longer_one_refused_before_it_comes() -> None:
    for line in (b"MSG a 1 %d\r\n", b"HMSG a 1 12 %d\r\n"):
        with pytest.raises(ProtocolError, match="no server sends more"):
            Heard().feed(line % MAX_MESSAGE_BYTES)
        heard = Heard()
        heard.feed(line % (MAX_MESSAGE_BYTES - 1_048_576))
        assert not heard.parser.is_idle


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.mark.parametrize("begin", [b"MSG a 1 2000000\r\n", b"INFO "], ids=["message", "line"])
def test_what_comes_in_crumbs_costs_in_proportion(begin: bytes) -> None:
    """Eight times as many crumbs take about eight times as long; joined anew with each they would take 64."""

    def feed(count: int) -> float:
        heard = Heard()
        heard.feed(begin)
        return seconds(lambda: heard.feed(*[b"1234"] * count))

    few = min(feed(25_000) for _ in range(3))
    many = min(feed(200_000) for _ in range(3))
    assert many < 25 * few


# Writing.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a.b", "", 5), b"PUB a.b 5\r\n"),
        (("a.b", "r.s", 0), b"PUB a.b r.s 0\r\n"),
        (("größe", "", 1), "PUB größe 1\r\n".encode()),
    ],
)
def test_heads_of_messages(arguments: tuple[str, str, int], line: bytes) -> None:
    encoder = Encoder()
    assert encoder.head(*arguments) == line
    assert encoder.head(*arguments) == line, "the same when the subject is remembered"


def test_heads_of_messages_with_headers_count_both_sizes() -> None:
    encoder = Encoder()
    block = encode_headers({"A": "1"})
    assert block == b"NATS/1.0\r\nA: 1\r\n\r\n"
    for _ in range(2):
        assert encoder.head_with_headers("a", "", block, 3) == b"HPUB a 18 21\r\n" + block
        assert encoder.head_with_headers("a", "r", block, 3) == b"HPUB a r 18 21\r\n" + block


def test_the_memory_for_subjects_is_bounded() -> None:
    encoder = Encoder()
    for number in range(10_000):
        encoder.head(f"a.{number}", "", 0)
    assert len(encoder._prefixes) <= 4_096
    assert encoder.head("a.1", "", 0) == b"PUB a.1 0\r\n"


@pytest.mark.parametrize("subject", ["", "a b", "a..b", "a.*", ">", "a\r\nPUB b 0", "x" * 1_025, "\ud800"])
def test_subjects_that_cannot_be_sent_are_named(subject: str) -> None:
    encoder = Encoder()
    block = encode_headers({"A": "1"})
    for attempt in (
        lambda: encoder.head(subject, "", 0),
        lambda: encoder.head_with_headers(subject, "", block, 0),
        lambda: encoder.head_with_headers("a", subject or " ", block, 0),
        lambda: encoder.head("a", subject or " ", 0),
    ):
        with pytest.raises(ConfigurationError, match="subject"):
            attempt()


def test_lines_for_interests() -> None:
    assert encode_subscribe("a.*", "", 7) == b"SUB a.*  7\r\n"
    assert encode_subscribe("a.>", "workers", 8) == b"SUB a.> workers 8\r\n"
    assert encode_unsubscribe(8) == b"UNSUB 8\r\n"
    with pytest.raises(ConfigurationError, match="subject"):
        encode_subscribe("\ud800", "", 9)


@given(header_sets)
def test_headers_come_back_as_they_were(headers: dict[str, str]) -> None:
    assert parse_headers(encode_headers(headers)) == (headers or None)


@pytest.mark.parametrize(
    "headers", [{"": "v"}, {"a b": "v"}, {"a:": "v"}, {"a": "b\r\nc"}, {"a": "\x00"}, {"a": "\ud800"}]
)
def test_headers_that_cannot_be_sent_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="header"):
        encode_headers(headers)


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (b"NATS/1.0 503 \r\n\r\n", {"Status": "503"}),
        (b"NATS/1.0 100 Idle Heartbeat\r\nA: 1\r\n\r\n", {"Status": "100", "Description": "Idle Heartbeat", "A": "1"}),
        (b"NATS/1.0\r\n\r\n", None),
        (b"", None),
        (b"NATS/1.0\r\nno colon\r\nA:1\r\nA:  2 \r\n\r\n", {"A": "2"}),
        (b"NATS/1.0\r\nA: \xff\r\n\r\n", {"A": "\ufffd"}),
        (b"NATS/1.0 \xff\r\n\r\n", {"Status": "\ufffd"}),
    ],
)
def test_headers_of_all_kinds_are_read(block: bytes, headers: dict[str, str] | None) -> None:
    assert parse_headers(block) == headers


@given(st.binary(max_size=100))
def test_any_header_block_is_read(block: bytes) -> None:
    headers = parse_headers(block)
    assert headers is None or all(isinstance(text, str) for pair in headers.items() for text in pair)
