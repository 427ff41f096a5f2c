"""Names and batches, whatever they are made from."""

import re
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from catga_bus import wire
from catga_bus.codec import Gate
from catga_bus.wire import Kind, Names, join_batch, token

TOKEN = re.compile(r"([A-Za-z0-9_-]|=[0-9A-F]{2}){1,64}|=|=h[0-9a-f]{32}")

# Lone surrogates included: a name comes from a program, and a token must exist for it all the same.
names = st.text(st.characters(codec=None, categories=None), max_size=200) | st.text(alphabet="ab=.2E h*>", max_size=70)
texts = st.text(max_size=40)
counts = st.integers(0, wire.MAX_COUNT)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
bodies = st.recursive(
    scalars | texts | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip
heads = st.tuples(texts, st.none() | texts, counts, counts).flatmap(
    lambda head: st.integers(1, 4).map(lambda length: head[:length])
)
messages = st.tuples(
    st.text(min_size=1, max_size=256), st.text(min_size=1, max_size=100), st.none() | texts, st.none() | counts,
    st.integers(1, wire.MAX_COUNT), st.none() | texts, bodies,
)  # fmt: skip
answers = st.tuples(st.text(min_size=1, max_size=256), counts, bodies, texts)
relaxed = settings(max_examples=300, deadline=None, derandomize=True)


@relaxed
@given(names)
def test_every_name_has_a_token_that_any_subject_can_hold(name: str) -> None:
    assert TOKEN.fullmatch(token(name))
    assert len(token(name)) <= wire.MAX_TOKEN
    assert len(Names("n").node_request(name, name, name)) < 1_024


@settings(relaxed, max_examples=500)
@given(names, names)
def test_different_names_have_different_tokens(one: str, other: str) -> None:
    assert (token(one) == token(other)) == (one == other)


@relaxed
@given(names)
def test_the_token_of_a_token_is_another_one_unless_it_is_plain(name: str) -> None:
    once = token(name)

    assert (token(once) == once) == ("=" not in once)


@relaxed
@given(heads, st.lists(messages, max_size=20))
def test_batches_of_messages_come_back_as_they_were(head: tuple[Any, ...], frames: list[tuple[Any, ...]]) -> None:
    payload = join_batch(Kind.MESSAGES, head, [msgspec.msgpack.encode(frame) for frame in frames])
    gate = Gate()

    assert gate.kind(payload) == Kind.MESSAGES
    batch = gate.messages(payload)

    assert msgspec.structs.astuple(batch.head)[: len(head)] == head
    assert [
        (f.id, f.type, f.key, f.remaining_ms, f.attempt, f.trace, msgspec.msgpack.decode(f.body)) for f in batch.frames
    ] == frames


@relaxed
@given(heads, st.lists(answers, max_size=20))
def test_batches_of_answers_come_back_as_they_were(head: tuple[Any, ...], frames: list[tuple[Any, ...]]) -> None:
    payload = join_batch(Kind.ANSWERS, head, [msgspec.msgpack.encode(frame) for frame in frames])
    gate = Gate()

    assert gate.kind(payload) == Kind.ANSWERS
    batch = gate.answers(payload)

    assert [(f.id, f.status, msgspec.msgpack.decode(f.body), f.node) for f in batch.frames] == frames


@relaxed
@given(st.lists(messages, min_size=1, max_size=5), st.lists(bodies, max_size=3))
def test_additions_at_the_ends_change_nothing(frames: list[tuple[Any, ...]], extra: list[Any]) -> None:
    plain = join_batch(Kind.MESSAGES, ("s", None, 1, 2), [msgspec.msgpack.encode(frame) for frame in frames])
    outer = [Kind.MESSAGES, ("s", None, 1, 2, *extra), [(*frame, *extra) for frame in frames], *extra]

    grown = Gate().messages(wire.PREFIX + msgspec.msgpack.encode(outer))

    assert [bytes(frame.body) for frame in grown.frames] == [
        bytes(frame.body) for frame in Gate().messages(plain).frames
    ]
