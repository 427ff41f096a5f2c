"""From a key to its partition: golden values, and keys that are none.

Sources of the vectors: the verification value of SMHasher (A. Appleby, main.cpp: MurmurHash3_x86_32, 0xB0F57EE3), and
I. Boyd's table of MurmurHash3 vectors (Stack Overflow, "MurmurHash3 test vectors", question 14747343), seed 0.
"""

from typing import Any

import mmh3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catga_bus.errors import ConfigurationError, InvalidMessageError, Outcome
from catga_bus.partition.hashing import MAX_KEY_BYTES, MAX_PARTITIONS, murmur3, partition_of

VECTORS = {
    b"": 0,
    b"\xff\xff\xff\xff": 0x76293B50,
    b"\x21\x43\x65\x87": 0xF55B516B,
    b"\x21\x43\x65": 0x7E4A8634,
    b"\x21\x43": 0xA0F7B07A,
    b"\x21": 0x72661CF4,
    b"\0\0\0\0": 0x2362F9DE,
    b"\0\0\0": 0x85F0B427,
    b"\0\0": 0x30F4C306,
    b"\0": 0x514E28B7,
    b"abc": 0xB3DD93FA,
    b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": 0xEE925B90,
}

# Ours, by mmh3 5.3: they pin that keys are hashed as UTF-8, as they are. (key, P=16, P=64, P=1,000)
GOLDEN = [
    ("a-1", 11, 59, 795),
    ("N14228", 4, 52, 4),
    ("sku-9", 13, 29, 885),
    ("caf\xe9", 8, 8, 632),
    ("cafe\u0301", 9, 9, 529),
    ("\u65e5\u672c\u8a9e", 7, 23, 879),
    ("\u0395\u03bb\u03bb\u03ac\u03b4\u03b1", 5, 5, 365),
    ("\U0001f6eb", 6, 6, 158),
    ("\x00", 7, 55, 727),
    ("line\nfeed", 14, 46, 478),
    ("0", 15, 63, 207),
    ("550e8400-e29b-41d4-a716-446655440000", 12, 28, 92),
]


@pytest.mark.parametrize(("data", "expected"), VECTORS.items())
def test_the_hash_is_that_of_the_published_vectors(data: bytes, expected: int) -> None:
    assert murmur3(data) == expected


def test_the_hash_has_the_verification_value_of_its_author() -> None:
    keys = [bytes(range(length)) for length in range(256)]
    digests = b"".join(
        mmh3.hash(key, 256 - length, signed=False).to_bytes(4, "little") for length, key in enumerate(keys)
    )
    assert murmur3(digests) == 0xB0F57EE3


@pytest.mark.parametrize(("key", "of_16", "of_64", "of_1000"), GOLDEN)
def test_keys_stay_where_they_are(key: str, of_16: int, of_64: int, of_1000: int) -> None:
    assert [partition_of(key, count) for count in (16, 64, 1_000)] == [of_16, of_64, of_1000]


def test_the_hash_is_unsigned() -> None:
    assert partition_of("abc", 1_000) == 0xB3DD93FA % 1_000  # as a signed number it is negative


def test_keys_that_look_alike_are_different_keys() -> None:
    assert partition_of("caf\u00e9", 1_024) != partition_of("cafe\u0301", 1_024)
    assert partition_of("A-1", 1_024) != partition_of("a-1", 1_024)
    assert partition_of("a-1", 1_024) != partition_of("a-1 ", 1_024)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256), st.integers(1, MAX_PARTITIONS))
def test_every_text_has_a_partition(key: str, count: int) -> None:
    partition = partition_of(key, count)
    assert 0 <= partition < count
    assert partition == murmur3(key.encode()) % count


def test_keys_spread_evenly() -> None:
    counts = [0] * 64
    for number in range(64_000):
        counts[partition_of(f"N{number}", 64)] += 1
    assert 850 < min(counts) <= max(counts) < 1_150  # 1,000 each, give or take 5 standard deviations


@pytest.mark.parametrize("key", ["x", "*", ">", "a.b.*", "line\nfeed", "\0", " ", "x" * MAX_KEY_BYTES, "é" * 512])
def test_any_character_may_be_in_a_key(key: str) -> None:
    assert 0 <= partition_of(key, 16) < 16


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "the key '' must not be empty"),
        (None, "the key None must be a str, not NoneType"),
        (7, "the key 7 must be a str, not int"),
        (b"a-1", "the key b'a-1' must be a str, not bytes"),
        ("a\ud800b", r"the key 'a\\ud800b' has a lone surrogate at character 1"),
        ("x" * 1_025, r"the key 'x{59}\.\.\. is 1,025 bytes long and may have 1,024"),
        ("é" * 513, r"is 1,026 bytes long"),
    ],
)
def test_a_bad_key_is_refused_and_shown(key: Any, text: str) -> None:
    with pytest.raises(InvalidMessageError, match=text) as caught:
        partition_of(key, 16)
    assert caught.value.outcome is Outcome.NOT_RUN
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("count", [0, -1, MAX_PARTITIONS + 1])
def test_an_impossible_number_of_partitions_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"partitions must be 1 to 1,024, got {count}"):
        partition_of("a-1", count)
