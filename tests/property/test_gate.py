"""The gate against bytes that nobody should send: more than 40,000 of them in every run.

Each example draws a starting point and a seed; the seed makes a series of inputs, so that thousands of them
cost no more of Hypothesis than a few hundred. Derandomized: a run that fails fails again.
"""

import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catga_bus.codec import Body, Gate, GateError, Limits, explain
from catga_bus.wire import MAX_COUNT, PREFIX, Fault, Kind, join_batch

PER_EXAMPLE = 32
EXAMPLES = 320
SERIES = 4
assert PER_EXAMPLE * EXAMPLES * SERIES >= 40_000

KNOWN = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, MemoryError)
"""All that msgspec was seen to raise for bytes."""

pack = msgspec.msgpack.encode
hostile = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
seeds = st.integers(0, 2**64 - 1)


class Tree(msgspec.Struct):
    name: str
    count: int = 0
    children: "list[Tree]" = []
    extra: dict[str, Any] = {}


class Pair(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    left: Any
    right: float | None = None


GATES = (Gate(), Gate(Limits(max_openers=1, max_depth=4, max_containers=20)))
BODIES: tuple[Body[Any], ...] = tuple(
    Body(type_) for type_ in (Any, Tree, Pair, Fault, dict[str, int], int | str | None)
)


def survive(payload: bytes) -> int:
    """Hand a payload to everything that reads bytes; return how many frames and JSON bodies were read."""
    read = 0
    for gate in GATES:
        gate.is_json(payload)
        for call in (gate.kind, gate.messages, gate.answers, gate.json):
            for frame in getattr(passed(call, payload), "frames", ()):
                read += 1
                assert 1 <= len(frame.id) <= 256
                assert getattr(frame, "attempt", 1) >= 1
                assert (getattr(frame, "remaining_ms", None) or 0) in range(MAX_COUNT + 1)
                for body in BODIES:
                    decodes(body.decode, frame.body)
    for body in BODIES:
        decodes(body.decode, payload)
        read += decodes(body.decode_json, payload)
    return read


def passed(call: Any, payload: bytes) -> Any:
    """What the gate returns, or None if it refuses the payload in a few words."""
    try:
        return call(payload)
    except GateError as error:
        text = str(error)
    assert 0 < len(text) < 400
    return None


def decodes(decode: Any, data: bytes | msgspec.Raw) -> bool:
    """Whether a body decodes; if it does not, then for a reason that is known and can be explained."""
    try:
        decode(data)
    except KNOWN as error:
        explanation = explain(error)
    else:
        return True
    assert 0 < len(explanation) <= 200
    assert explanation.isprintable()
    return False


# -- where inputs come from ---------------------------------------------------------------------------------


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that MessagePack and JSON can carry."""
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return rng.choice((None, True, False, "", b"".hex(), 0, -1, 1.5, [], {}))
    if kind == 1:
        return rng.randrange(-(2**63), 2**64) >> rng.randrange(64)
    if kind == 2:
        return rng.uniform(-1e9, 1e9)
    if kind in (3, 4, 5):
        return "".join(chr(rng.choice((97, 0x7F, 0xE9, 0x4E2D, 0x1F600))) for _ in range(rng.randrange(40)))
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(("name", "count", "children", "extra", "x")): random_value(rng, depth + 1) for _ in range(3)}


def valid_batch(rng: random.Random) -> bytes:
    """A payload as a good client sends it."""
    frames = []
    kind = rng.choice((Kind.MESSAGES, Kind.ANSWERS))
    for number in range(rng.randrange(1, 6)):
        body = random_value(rng)
        if kind == Kind.MESSAGES:
            frames.append(
                pack((f"id{number}", "Quote", rng.choice((None, "k")), rng.choice((None, 5_000)), 1, None, body))
            )
        else:
            frames.append(pack((f"id{number}", rng.randrange(7), body, "node")))
    return join_batch(kind, ("sender", "_INBOX.x.1", number), frames)


def mutations(rng: random.Random, good: bytes) -> Iterator[bytes]:
    """What becomes of a good payload on a bad day: cut off, flipped, stretched, repeated."""
    for _ in range(PER_EXAMPLE):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
            at = rng.randrange(len(data)) if data else 0
            match rng.randrange(7):
                case 0:
                    del data[at:]
                case 1 if data:
                    data[at] ^= 1 << rng.randrange(8)
                case 2 if data:
                    data[at] = rng.choice(
                        b'\x80\x8f\x90\x9f\xc0\xc1\xc6\xc9\xd9\xdb\xdc\xdd\xde\xdf\xff\x00\x7f[{"\\]}'
                    )
                case 3:
                    del data[at : at + rng.randrange(1, 9)]
                case 4:
                    data[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 5:
                    data[at:at] = data[at : at + 40] * rng.randrange(1, 4)
                case _:
                    data[at:at] = rng.choice(
                        (b"\x91", b"\x81", b"[", b'{"a":', b"\xdd\xff\xff\xff\xff")
                    ) * rng.randrange(60)
        yield bytes(data)


@hostile
@given(st.binary(max_size=200), seeds)
def test_random_bytes_are_survived(start: bytes, seed: int) -> None:
    rng = random.Random(seed)
    survive(start)
    for _ in range(PER_EXAMPLE):
        noise = rng.randbytes(rng.randrange(300))
        survive(
            rng.choice((b"", PREFIX, PREFIX + b"\x93\x00", PREFIX + b"\x93\x01\x91\xa1s\x91", b"[", b'{"name":'))
            + noise
        )


@hostile
@given(seeds)
def test_broken_batches_are_survived(seed: int) -> None:
    rng = random.Random(seed)
    good = valid_batch(rng)
    assert survive(good) > 0
    for bad in mutations(rng, good):
        survive(bad)


@hostile
@given(seeds)
def test_broken_json_is_survived(seed: int) -> None:
    rng = random.Random(seed)
    good = json.dumps(random_value(rng), ensure_ascii=rng.random() < 0.5).encode()
    assert survive(good) > 0
    for bad in mutations(rng, good):
        survive(bad)


OPENERS = (
    b"\x91", b"\x92\xc0", b"\x81\x01", b"\x81\xa1a", b"\x81", b"\x81\xa8children\x91", b"\xdc\x00\x01",
    b"\xdd\xff\xff\xff\xff", b"\xdf\x00\x00\x00\x01", b"\xd9\x01", b"\xc7\x01\x05", b"[", b'{"a":', b'{"children":[',
)  # fmt: skip


@hostile
@given(seeds)
def test_nests_of_everything_are_survived(seed: int) -> None:
    rng = random.Random(seed)
    batch = PREFIX + b"\x93\x00\x91\xa1s\x91\x97\xa1i\xa1T\xc0\xc0\x01\xc0"
    for number in range(PER_EXAMPLE):
        # A few are long enough to be walked, and deep enough to end a process that recursed with them.
        length = rng.randrange(2_000 if number else 60_000)
        units = rng.choices(OPENERS, k=rng.choice((1, 1, 8)))
        start = rng.choice((b"", batch, PREFIX + b"\x93\x6f\x90", PREFIX + b"\x93\x01"))
        survive(start + b"".join(units) * (length // len(units)) + b"\xc0" * rng.randrange(20))


# -- exactness ----------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=70) | st.sampled_from(["\u0710" * 40, '"[[{{', "\\", '\\"[', "x" * 300]),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=60,
)  # fmt: skip


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def containers_in(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(containers_in, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(containers_in, value))
    return 0


def stretched(value: Any, rng: random.Random) -> bytes:
    """The value in MessagePack, each part in any of the encodings that the format allows for it."""
    if isinstance(value, dict):
        pairs = b"".join(stretched(key, rng) + stretched(item, rng) for key, item in value.items())
        return headed(len(value), rng, 0x80, 16, ((0xDE, 2), (0xDF, 4))) + pairs
    if isinstance(value, list):
        items = b"".join(stretched(item, rng) for item in value)
        return headed(len(value), rng, 0x90, 16, ((0xDC, 2), (0xDD, 4))) + items
    if isinstance(value, str):
        raw = value.encode()
        return headed(len(raw), rng, 0xA0, 32, ((0xD9, 1), (0xDA, 2), (0xDB, 4))) + raw
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 128:
        size = rng.choice((0, 1, 2, 4, 8))
        return (
            value.to_bytes(1, "big") if not size else bytes((0xCB + size.bit_length(),)) + value.to_bytes(size, "big")
        )
    return pack(value)


def headed(length: int, rng: random.Random, fix: int, fits: int, wider: tuple[tuple[int, int], ...]) -> bytes:
    heads = [bytes((lead,)) + length.to_bytes(size, "big") for lead, size in wider if length < 256**size]
    return rng.choice(heads + ([bytes((fix | length,))] if length < fits else []))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(values, st.integers(1, 6), st.integers(1, 20), seeds)
def test_messagepack_is_refused_exactly_where_the_limits_are(
    value: Any, depth: int, containers: int, seed: int
) -> None:
    gate = Gate(Limits(max_openers=1, max_depth=depth, max_containers=containers))
    body = stretched(value, random.Random(seed))
    assert msgspec.msgpack.decode(body) == value
    openers = sum(0x80 <= byte < 0xA0 or 0xDC <= byte < 0xE0 for byte in body)
    payload = join_batch(Kind.MESSAGES, ("s",), [b"\x97\xa1i\xa1T\xc0\xc0\x01\xc0" + body])

    [frame] = gate.messages(payload).frames

    fits = depth_of(value) <= depth and containers_in(value) <= containers
    assert (bytes(frame.body) == body) == (fits or openers <= 1)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(values, st.integers(1, 6), st.integers(1, 20), st.booleans())
def test_json_is_refused_exactly_where_the_limits_are(
    value: Any, depth: int, containers: int, ascii_only: bool
) -> None:
    gate = Gate(Limits(max_openers=1, max_depth=depth, max_containers=containers))
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    fits = depth_of(value) <= depth and containers_in(value) <= containers

    try:
        gate.json(text)
        let_in = True
    except GateError:
        let_in = False

    assert let_in == (fits or text.count(b"[") + text.count(b"{") <= 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seeds)
def test_what_the_decoder_can_hold_is_bounded_by_what_is_let_in(seed: int) -> None:
    """No walked body that passes decodes to more containers than the limit says."""
    rng = random.Random(seed)
    gate = Gate(Limits(max_openers=1, max_depth=4, max_containers=20))
    for payload in mutations(rng, valid_batch(rng)):
        try:
            batch = gate.messages(payload)
        except GateError:
            continue
        for frame in batch.frames:
            try:
                value = msgspec.msgpack.decode(frame.body)
            except KNOWN:
                continue
            openers = sum(0x80 <= byte < 0xA0 or 0xDC <= byte < 0xE0 for byte in bytes(frame.body))
            assert containers_in(value) <= max(20, openers if openers <= 1 else 0)


# -- large ----------------------------------------------------------------------------------------------------


UNITS = (
    b"\x91", b"\x90", b"\x80", b"\x81", b"\xc0", b"\x00", b"\xa1b", b"\xcd\x90\x90", b"\xd9\x02ab",
    b"\xc9\x00\x00\x00\x02\x05zz", b"[", b"]", b'"', b"{", b"\\", b",", b"1e308",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_a_mib_of_anything_is_judged_in_no_time_and_little_memory(seed: int) -> None:
    rng = random.Random(seed)
    unit = b"".join(rng.choices(UNITS, k=rng.randrange(1, 12)))
    start = rng.choice(
        (PREFIX + b"\x93\x00\x91\xa1s\x91\x97\xa1i\xa1T\xc0\xc0\x01\xc0", PREFIX + b"\x93\x07\x90", b"[")
    )
    count = b"\xdd" + (900_000).to_bytes(4, "big") + b"\xa1\x90" * 10_001
    payload = (start + (b"" if start == b"[" else count) + unit * (1_048_576 // len(unit) + 1))[:1_048_576]
    gate = GATES[0]

    began = time.perf_counter()
    for call in (gate.is_json, gate.kind, gate.messages, gate.answers, gate.json):
        try:
            call(payload)
        except GateError:
            continue
    assert time.perf_counter() - began < 2.0  # five calls; about 50 ms measured

    tracemalloc.start()
    try:
        for call in (gate.kind, gate.messages, gate.answers, gate.json):
            try:
                call(payload)
            except GateError:
                continue
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1_048_576
