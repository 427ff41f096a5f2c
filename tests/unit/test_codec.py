"""The gate's verdicts one by one, what they cost, and the codecs of bodies."""

import ast
import dataclasses
import enum
import math
import pathlib
import pickle
import subprocess
import sys
import textwrap
import time
import tracemalloc
from typing import Any

import msgspec
import pytest

import catga_bus
from catga_bus.codec import DECODE_ERRORS, Body, Gate, GateError, Limits, explain
from catga_bus.errors import ConfigurationError
from catga_bus.wire import PREFIX, Kind, join_batch

MIB = 1_048_576
pack = msgspec.msgpack.encode


def batch_of(*bodies: bytes, kind: Kind = Kind.MESSAGES) -> bytes:
    """A valid payload whose frames have these bodies."""
    if kind == Kind.ANSWERS:
        frames = [b"\x94" + pack(f"i{n}") + b"\x00" + body + pack("node") for n, body in enumerate(bodies)]
    else:
        frames = [b"\x97" + pack(f"i{n}") + b"\xa1T\xc0\xc0\x01\xc0" + body for n, body in enumerate(bodies)]
    return join_batch(kind, ("sender", None, 1), frames)


def array(count: int) -> bytes:
    """The head of an array of `count` values."""
    return b"\xdd" + count.to_bytes(4, "big")


def verdicts(payload: bytes, gate: Gate | None = None) -> list[bool]:
    """For each body of a batch of messages, whether it was let in."""
    return [bytes(frame.body) != b"\xc1" for frame in (gate or Gate()).messages(payload).frames]


# -- kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1, 2, 5, 6, 127])
def test_the_kind_is_told_whether_it_is_known_or_not(kind: int) -> None:
    assert Gate().kind(PREFIX + b"\x93" + bytes((kind,)) + b"\x90\x90") == kind


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", b"\xc1\x01", b"\xc1\x01\x93", b"\xc1\x01\x92\x00\x90", b"\xc1\x01\x80\x00", b"\xc1\x01\x93\x80",
        b"\xc1\x01\x93\xcc\x00\x90\x90", b"\xc1\x01\xdc\x00\x03\x00", b"\x93\x00\x90\x90", b"hello", b"\x00" * 100,
    ],
)  # fmt: skip
def test_what_is_not_shaped_like_a_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(GateError):
        Gate().kind(payload)


def test_another_version_is_refused_and_the_one_that_is_read_is_named() -> None:
    with pytest.raises(GateError, match=r"wire version 7; this node reads version 1"):
        Gate().kind(b"\xc1\x07\x93\x00\x90\x90")


def test_size_is_judged_first_and_named() -> None:
    gate = Gate(Limits(max_bytes=100))

    gate.json(b" " * 100)
    with pytest.raises(GateError, match=r"101 bytes; the limit is 100"):
        gate.kind(b"\x00" * 101)
    with pytest.raises(GateError, match=r"101 bytes; the limit is 100"):
        gate.json(b"[" * 101)


def test_refusals_do_not_repeat_what_was_sent() -> None:
    secret = b"s3cr3t-s3cr3t-s3cr3t-s3cr3t-s3cr3t-s3cr3t-s3cr3t"
    for payload in (secret, PREFIX + secret, b"\xc1\x07" + secret, batch_of(b"\xa0")[:-1] + secret):
        with pytest.raises(GateError) as caught:
            Gate().messages(payload) if payload[3:4] == b"\x00" else Gate().kind(payload)
        assert "s3cr3t-s3cr3t" not in str(caught.value)
        assert secret[:9].hex(" ") not in str(caught.value)


@pytest.mark.parametrize(
    "payload",
    [b"{}", b"[1]", b'"x"', b"-1", b"0", b"9", b"true", b"false", b"null", b" \t\r\n{}", b" " * 5_000 + b"1"],
)
def test_what_starts_like_json_is_taken_for_json(payload: bytes) -> None:
    assert Gate().is_json(payload)


@pytest.mark.parametrize("payload", [b"", b" ", b"\xc1\x01\x93", b"\x00", b"hello", b"+1", b"\xef\xbb\xbf{}", b"\x0b1"])
def test_what_does_not_start_like_json_is_not(payload: bytes) -> None:
    assert not Gate().is_json(payload)


@pytest.mark.parametrize(
    "options",
    [{"max_bytes": 3}, {"max_openers": 0}, {"max_openers": 16_001}, {"max_depth": 0}, {"max_containers": 0}],
)
def test_limits_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ConfigurationError, match=rf"{name} must be at (least|most) \d+, got {value}"):
        Limits(**options)


# -- bodies -----------------------------------------------------------------------------------------------

DEEP = b"\x91" * 20_000 + b"\xc0"
RICH = array(10_000) + b"\x90" * 10_000  # 10,001 containers
AT_THE_LIMIT = array(9_999) + b"\x90" * 9_999
# Openers inside texts, bytes and numbers: none of them is a container.
HARMLESS = {
    "text": pack("视野无限广" * 5_000),
    "bytes": pack(bytes(range(256)) * 400),
    "floats": pack([math.pi * n for n in range(50_000)]),
    "integers": array(100_000) + b"\xcd\x90\x90" * 100_000,
    "small integers": array(20_000) + b"\xa2\x90\x90" * 6_000 + b"\x01" * 14_000,
    "exts": array(12_000) + (b"\xc7\x02\x05\x90\x90" + b"\xd6\xff\x01\x02\x03\x04") * 6_000,
    "rows": pack([{"name": "中文名字", "n": n, "x": n / 7} for n in range(9_000)]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_large_harmless_bodies_are_let_in(name: str) -> None:
    body = HARMLESS[name]

    assert sum(byte in range(0x80, 0xA0) or byte in range(0xDC, 0xE0) for byte in body) > 10_000
    assert verdicts(batch_of(body)) == [True]


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    gate = Gate(Limits(max_openers=1))

    assert verdicts(batch_of(b"\x91" * 32 + b"\xc0"), gate) == [True]
    assert verdicts(batch_of(b"\x91" * 33 + b"\xc0"), gate) == [False]
    assert verdicts(batch_of(b"\x81\x01" * 33 + b"\xc0"), gate) == [False]
    assert verdicts(batch_of(b"\x81" * 33 + b"\xc0" * 34), gate) == [False]


def test_a_body_with_too_many_containers_is_refused() -> None:
    assert verdicts(batch_of(AT_THE_LIMIT)) == [True]
    assert verdicts(batch_of(RICH)) == [False]


def test_a_body_of_very_many_small_mixed_values_is_refused() -> None:
    def of(pairs: int) -> bytes:
        return array(10_001 + 2 * pairs) + b"\xa1\x90" * 10_001 + b"\x00\xa1b" * pairs

    assert verdicts(batch_of(of(90_000))) == [True]
    assert verdicts(batch_of(of(110_000))) == [False]


def test_rich_bodies_share_the_time_that_judging_them_may_take() -> None:
    body = array(10_001 + 60_000) + b"\xa1\x90" * 10_001 + b"\x00\xa1b" * 30_000

    assert verdicts(batch_of(body, body, body, body, b"\x01")) == [True, True, True, False, True]


def test_a_bad_body_does_not_spoil_its_batch_mates() -> None:
    good = pack({"n": 1})
    broken = b"\xa3\xff\xff\xff"  # a text that is not UTF-8

    batch = Gate().messages(batch_of(good, RICH, good, broken, good))

    results: list[Any] = []
    decode = Body(dict[str, int]).decode
    for frame in batch.frames:
        try:
            results.append(decode(frame.body))
        except DECODE_ERRORS as error:
            results.append(explain(error))
    refused = "malformed, or nested deeper or richer than this node takes"
    assert results == [{"n": 1}, refused, {"n": 1}, "expected `object`, got `str`", {"n": 1}]


def test_many_bodies_are_judged_one_by_one() -> None:
    points = pack([[1, 2]] * 1_000)

    assert verdicts(batch_of(*[points] * 64)) == [True] * 64  # 64,000 containers, none of them in a rich body


def test_answers_are_judged_like_messages() -> None:
    payload = batch_of(pack(1), RICH, pack(2), kind=Kind.ANSWERS)

    assert [bytes(frame.body) for frame in Gate().answers(payload).frames] == [pack(1), b"\xc1", pack(2)]


def test_no_type_decodes_a_refused_body() -> None:
    [frame] = Gate().messages(batch_of(RICH)).frames
    for type_ in (Any, None, int, bytes, list, dict, list[int] | None, msgspec.Raw, msgspec.msgpack.Ext):
        with pytest.raises(msgspec.DecodeError):
            Body(type_).decode(frame.body)


@pytest.mark.parametrize("body", [DEEP, b"\x81" * 20_000, b"\x91" * 5_000 + b"\xc0"])
def test_nesting_beyond_the_decoder_refuses_the_payload(body: bytes) -> None:
    with pytest.raises(GateError, match="nested too deeply"):
        Gate().messages(batch_of(body))


@pytest.mark.parametrize("body", [DEEP, RICH, b"\x81" * 20_000], ids=["deep", "rich", "maps"])
def test_payloads_of_unknown_kinds_are_judged_whole(body: bytes) -> None:
    with pytest.raises(GateError):
        Gate().kind(PREFIX + b"\x93\x6f\x90" + body)


@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\x90",
        b"\x91\xa1",
        b"\x91\xa1s\x91",
        b"\x91\xa1s\xdd\xff\xff\xff\xff",
        b"\x91\xa1s\xc0",
        b"\x91\xa1s\x90\x00",
    ],
    ids=bytes.hex,
)
def test_truncated_and_overlong_payloads_are_refused(rest: bytes) -> None:
    with pytest.raises(GateError):
        Gate().messages(PREFIX + b"\x93\x00" + rest)


# -- json -------------------------------------------------------------------------------------------------


def json_verdict(text: bytes, gate: Gate | None = None) -> str:
    try:
        (gate or Gate()).json(text)
    except GateError as error:
        return str(error)
    return ""


def test_json_is_judged_by_depth_containers_and_exponents() -> None:
    assert json_verdict(b"[" + b"[]," * 9_998 + b"{}]") == ""
    assert "more" in json_verdict(b"[" + b"1e308," * 2_000 + b"1e308]")
    assert json_verdict(b"[" + b"1e308," * 1_999 + b"1e308]") == ""
    assert json_verdict(b"[" + b"1.5e10," * 50_000 + b"1]") == ""
    assert json_verdict(b"[" * 10_001) == "10001 arrays and objects; the limit is 10000"
    gate = Gate(Limits(max_openers=10, max_depth=4))
    assert json_verdict(b'[[[{"a":1}]],' + b"[]," * 10 + b"1]", gate) == ""
    assert json_verdict(b'[[[{"a":[]}]],' + b"[]," * 10 + b"1]", gate) == "nested deeper than 4 levels"


@pytest.mark.parametrize(
    "text",
    [
        b'["' + b"[" * 20_000 + b'"]',
        b'["\\"' + b"[" * 20_000 + b'"]',
        b'["\\\\","' + b"[" * 20_000 + b'"]',
        b'["\\\\\\"' + b"{" * 20_000 + b'"]',
        b'["","' + b"[" * 20_000 + b'"]',
        b'["' + b"5e123," * 10_000 + b'"]',
    ],
)
def test_what_stands_in_json_strings_does_not_count(text: bytes) -> None:
    assert json_verdict(text) == ""
    msgspec.json.decode(text)


def test_brackets_are_seen_again_after_a_string_that_ends_in_a_backslash() -> None:
    assert "arrays" in json_verdict(b'["\\\\",' + b"[" * 20_000)


# -- worst cases ------------------------------------------------------------------------------------------


def filled(pattern: bytes, size: int = MIB - 100) -> bytes:
    return (pattern * (size // len(pattern) + 1))[:size]


# 10,100 bytes that could open containers, 9,900 that do, then small values of changing sizes.
MIXED = b"\x90" * 9_900 + b"\xa1\x90" * 200 + b"\x00\xa1b" * 295_000
HOSTILE: dict[str, bytes] = {
    "0x91": batch_of(b"\x91" * (MIB - 100)),
    "0x81": batch_of(b"\x81" * (MIB - 100)),
    "empty arrays": batch_of(array(MIB - 105) + b"\x90" * (MIB - 105)),
    "empty maps": batch_of(array(MIB - 105) + b"\x80" * (MIB - 105)),
    "loose containers": PREFIX + b"\x93\x00" + b"\x80" * (MIB - 4),
    "nil": batch_of(array(MIB - 105) + b"\xc0" * (MIB - 105)),
    "nil and openers": batch_of(array(MIB - 20_105) + b"\xa1\x90" * 20_000 + b"\xc0" * (MIB - 40_105)),
    "mixed": batch_of(array(600_100) + MIXED),
    "mixed bodies": batch_of(*[array(24_100) + MIXED[:31_300]] * 30),
    "bodies just walked": batch_of(*[array(10_001) + b"\x90" * 10_001] * 100),
    "short runs": batch_of(array(46_000) + b"\xa1\x90" * 10_001 + (b"\x00\x00\xbf" + b"a" * 31) * 11_999 + b"\x00" * 2),
    "ext bombs": batch_of(filled(b"\xc9\xff\xff\xff\xff\x05")),
    "claimed array": batch_of(b"\xdd\xff\xff\xff\xff" + b"\x90" * 20_000),
    "claimed map": batch_of(b"\xdf\xff\xff\xff\xff" + b"\x90" * 20_000),
    "claimed str": batch_of(b"\xdb\xff\xff\xff\xff" + b"\x90" * 20_000),
    "claimed frames": PREFIX + b"\x93\x00\x91\xa1s\xdd\xff\xff\xff\xff" + b"\x97" * 20_000,
    "frames": PREFIX + b"\x93\x00\x91\xa1s\xdd\x00\x01\xff\xff" + b"\x97\xa1i\xa1T\xc0\xc0\x01\xc0\xc0" * 104_000,
    "unknown fields": batch_of(b"\xc0") [:-1] + b"\x91" * (MIB - 100),
    "unknown kind": PREFIX + b"\x93\x6f\x90" + array(600_100) + MIXED,
    "unknown kind, 0x91": PREFIX + b"\x93\x6f\x90" + b"\x91" * (MIB - 100),
    "wide arrays": batch_of(b"\xdc\x27\x0f" + (b"\xdc\x00\x21" + b"\x00\xa0" * 16 + b"\x00") * 9_998 + b"\xa2\x90\x90"),
    "random": PREFIX + bytes((n * 2_654_435_761 >> 13) & 255 for n in range(200_000)),
    "json brackets": filled(b"["),
    "json pairs": b"[" + filled(b"[],"),
    "json objects": filled(b'{"a":'),
    "json quotes": b"[" * 10_001 + filled(b'"', MIB - 10_001),
    "json short strings": b"[" * 10_001 + filled(b'"ab",', MIB - 10_001),
    "json strings of brackets": b"[" * 10_001 + filled(b'"[",', MIB - 10_001),
    "json backslashes": b"[" * 10_001 + filled(b"\\", MIB - 10_001),
    "json escaped quotes": b"[" * 10_001 + filled(b'\\"', MIB - 10_001),
    "json closers": b"[]" * 5_000 + b"[" + filled(b"]", MIB - 10_001),
    "json slow floats": b"[" + filled(b"1e308,") + b"1]",
    "json slow floats, zeros": b"[" + filled(b"1e00000308,") + b"1]",
    "json exponents in strings": b'["' + filled(b"e123") + b'"]',
    "json digits": b"[" + b"9" * (MIB - 2) + b"]",
    "json blanks": b" " * MIB,
}  # fmt: skip


def judge(payload: bytes) -> None:
    """Everything that the gate does with a payload."""
    gate = Gate()
    try:
        if gate.is_json(payload):
            gate.json(payload)
        elif gate.kind(payload) == Kind.MESSAGES:
            gate.messages(payload)
    except GateError:
        pass


@pytest.mark.parametrize("name", HOSTILE)
def test_the_worst_payloads_are_judged_in_no_time(name: str) -> None:
    payload = HOSTILE[name]
    assert len(payload) <= MIB
    began = time.perf_counter()

    judge(payload)

    # Measured: 20 ms for the slowest. The bound only tells what is linear from what is not.
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize("name", HOSTILE)
def test_the_worst_payloads_take_little_memory(name: str) -> None:
    payload = HOSTILE[name]
    judge(payload)  # patterns are compiled once
    tracemalloc.start()
    try:
        judge(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 40 * MIB


SURVIVOR = """
    import sys, threading
    import msgspec
    from typing import Any
    from catga_bus.codec import Body, Gate, GateError
    sys.setrecursionlimit(1_000_000)  # the worst a program can do to itself

    class Tree(msgspec.Struct):
        a: "Tree | None" = None

    def attack():
        gate, bodies = Gate(), (Body(Any), Body(Tree))
        head = b"\\xc1\\x01\\x93\\x00\\x91\\xa1s\\x91\\x97\\xa1i\\xa1T\\xc0\\xc0\\x01\\xc0"
        for depth in (900, 9_900, 150_000, 1_000_000):
            for opener in (b"\\x91", b"\\x81", b"\\x81\\x01", b"\\x81\\xa1a"):
                for start in (head, b"\\xc1\\x01\\x93\\x01" + head[4:], b"\\xc1\\x01\\x93\\x6f"):
                    payload = (start + opener * depth)[:1_048_500] + b"\\xc0" * 40
                    for judge in (gate.kind, gate.messages, gate.answers):
                        try:
                            judge(payload)
                        except GateError:
                            continue
                if depth < 10_000:
                    for body in bodies:
                        try:
                            body.decode(opener * depth + b"\\xc0" * (depth + 1))
                        except Exception:
                            pass
            for text in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
                try:
                    gate.json(text[:1_048_576])
                except GateError:
                    continue
                for body in bodies:
                    try:
                        body.decode_json(text)
                    except Exception:
                        pass

    threading.stack_size(8 * 1_048_576)
    thread = threading.Thread(target=attack)
    thread.start()
    thread.join()
    attack()
    print("alive")
"""


def test_nesting_never_ends_the_process_on_a_stack_of_8_mib() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SURVIVOR)], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr[-2_000:]


# -- bodies of types --------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Order(msgspec.Struct):
    sku: str
    count: int = 1
    lines: list[Point] = []
    by_name: dict[str, Point] = {}
    color: Color | None = None


class Node(msgspec.Struct):
    children: "list[Node]" = []


class Careless(msgspec.Struct):
    n: int

    def __post_init__(self) -> None:
        if self.n == 0:
            raise KeyError("zero")


@pytest.mark.parametrize(
    "value", [Order("a", 2, [Point(1, 2)], {"k": Point(3)}, Color.RED), Order("b"), Order("\x00\U0001f600")]
)
def test_bodies_survive_both_codecs(value: Order) -> None:
    body: Body[Order] = Body(Order)

    assert body.decode(body.encode(value)) == value
    assert body.decode(msgspec.Raw(body.encode(value))) == value
    assert body.decode_json(body.encode_json(value)) == value


def test_codecs_are_the_functions_of_msgspec_themselves() -> None:
    body: Body[Order] = Body(Order)

    for function in (body.encode, body.decode, body.encode_json, body.decode_json):
        assert type(function).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("type_", [None, Any, int, list[int], dict[str, Any], Order, Point, Node, Order | None])
def test_plain_types_are_taken(type_: Any) -> None:
    Body(type_)


class Lost(msgspec.Struct):
    other: "Nowhere"  # type: ignore[name-defined]  # noqa: F821


class Foreign(msgspec.Struct):
    deep: list[dict[str, pathlib.Path]]


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (pathlib.Path, "Path cannot be sent"),
        (Foreign, "Foreign cannot be sent: it holds Path, which has no encoding"),
        (Lost, "Lost cannot be sent: name 'Nowhere' is not defined"),
        (list[int] | set[int], "more than one array-like"),
        (object, "object cannot be sent"),
    ],
)
def test_types_that_cannot_be_sent_are_refused_by_name(type_: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Body(type_)


@pytest.mark.parametrize(
    ("type_", "value", "text"),
    [
        (Order, {"sku": 9}, "field `sku`: expected `str`, got `int`"),
        (Order, {"sku": "s", "count": "2"}, "field `count`: expected `int`, got `str`"),
        (Order, {}, "object missing required field `sku`"),
        (Order, {"sku": "s", "lines": [{"x": 1}, {"x": "1"}]}, "field `lines[1].x`: expected `int`, got `str`"),
        (Order, {"sku": "s", "by_name": {"k": {"x": None}}}, "field `by_name[...].x`: expected `int`, got `null`"),
        (Order, {"sku": "s", "by_name": {1: {"x": 1}}}, "a key of field `by_name`: expected `str`, got `int`"),
        (dict[str, int], {1: 1}, "a key: expected `str`, got `int`"),
        (Order, {"sku": "s", "color": "blue"}, "field `color`: invalid enum value 'blue'"),
        (Order, [1], "expected `object`, got `array`"),
        (Careless, {"n": 0}, "KeyError: 'zero'"),
    ],
)
def test_explanations_name_the_field_and_what_was_expected(type_: Any, value: Any, text: str) -> None:
    with pytest.raises(DECODE_ERRORS) as caught:
        Body(type_).decode(pack(value))

    assert explain(caught.value) in (text, text.replace("`null`", "`None`"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "too large for the memory there is"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "a text is not UTF-8: bad at its byte 0"),
        (KeyError(), "KeyError"),
        (ValueError("a\nb\x1b[31m\u202e"), "ValueError: a?b?[31m?"),
    ],
)  # fmt: skip
def test_explanations_are_one_printable_line(error: BaseException, text: str) -> None:
    assert explain(error) == text


def test_explanations_are_short() -> None:
    with pytest.raises(DECODE_ERRORS) as caught:
        Body(Color).decode(pack("x" * 100_000))

    assert len(explain(caught.value)) == 200
    assert explain(caught.value).endswith("...")


KNOWN = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


@pytest.mark.parametrize(
    "text",
    [
        b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 4_301, b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xed\xa0\x80"',
        b'"\xff"', b'"\x00"', b"[" * 5_000, b"nul", b"01", b"1.", b"--1", b'{"a":1,}', b"{1:2}", b'"\\x"', b"",
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_json_that_python_would_swallow_is_refused(text: bytes) -> None:
    with pytest.raises(KNOWN):
        Body(Any).decode_json(text)


def test_json_oddities_are_what_the_page_says() -> None:
    decode = Body(Any).decode_json

    assert decode(b'{"a":1,"a":2}') == {"a": 2}
    assert decode(b"9" * 4_300) == 10**4_300 - 1
    assert Body(float).encode_json(math.nan) == b"null"
    with pytest.raises(OverflowError):
        Body(int).encode(2**64)


# -- the package ------------------------------------------------------------------------------------------

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "__reduce__", "__reduce_ex__", "__subclasses__"}
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "marshal", "shelve", "dbm", "dill", "cloudpickle", "jsonpickle", "yaml", "runpy", "code",
    "codeop", "imp", "importlib", "pkgutil", "zipimport",
}  # fmt: skip
# `catga run module:bus` is asked to import by name, and `testing` imports its parts when they are used;
# neither does it with what came over the wire.
MAY_IMPORT_BY_NAME = {"cli", "testing"}
HARMLESS_MODULES = {"importlib.resources", "importlib.metadata"}


def dangers_in(source: str) -> list[str]:
    """What in a module could turn bytes into code."""
    used: list[str] = []
    imported: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            used.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            used.append(node.attr)
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "importlib":
            imported += [f"importlib.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.append(node.module)
    dangers = [name for name in used if name in FORBIDDEN_NAMES]
    return dangers + [
        name for name in imported if name.split(".")[0] in FORBIDDEN_MODULES and name not in HARMLESS_MODULES
    ]


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from marshal import loads", "eval('1')", "import importlib", "import yaml as y", "x.__reduce__"],
)
def test_the_audit_finds_what_it_looks_for(source: str) -> None:
    assert dangers_in(source)


def test_nothing_in_the_package_turns_bytes_into_code() -> None:
    root = pathlib.Path(catga_bus.__file__).parent
    modules = sorted(root.rglob("*.py"))
    dangers = {
        str(path.relative_to(root)): dangers
        for path in modules
        if path.relative_to(root).parts[0] not in MAY_IMPORT_BY_NAME and (dangers := dangers_in(path.read_text()))
    }

    assert len(modules) > 5
    assert dangers == {}


WATCHED = """
    import sys
    from typing import Any
    import msgspec
    from catga_bus.codec import Body, Gate, GateError, explain

    gate, body, seen = Gate(), Body(Any), []
    corpus = [bytes.fromhex(text) for text in sys.argv[1:]]
    watching = False

    forbidden = {"exec", "compile", "import", "open", "subprocess", "os", "socket", "pickle"}

    def hook(event, args):
        if watching and event.split(".")[0] in forbidden:
            seen.append(event)

    def attack(payload):
        for call in (gate.kind, gate.messages, gate.answers, gate.json, body.decode, body.decode_json):
            try:
                call(payload)
            except Exception as error:
                explain(error)

    for payload in corpus:  # whatever is imported or compiled once
        attack(payload)
    sys.addaudithook(hook)
    watching = True
    for payload in corpus:
        attack(payload)
    watching = False
    print(seen)
"""


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def test_decoding_imports_opens_and_executes_nothing() -> None:
    pickled = pickle.dumps(Evil())
    by_name = {"__reduce__": ["os.system", ["id"]], "py/object": "os.system", "__class__": "os.system"}
    corpus = [pickled, pack(by_name), batch_of(pack(by_name)), batch_of(pickled), msgspec.json.encode(by_name)]

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED), *(payload.hex() for payload in corpus)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr[-2_000:]
