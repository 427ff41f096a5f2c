import io
import re

import pytest

from catga_bus.cli.payload import read_payload
from catga_bus.errors import ConfigurationError


@pytest.mark.parametrize("text", ["{}", '{"sku": "sku-9"}', "[1, 2]", '"å"', "null", "1e300"])
def test_json_is_taken_as_it_is(text: str) -> None:
    assert read_payload(text) == text.encode()


def test_blanks_around_the_json_are_left_out() -> None:
    assert read_payload(" {}\n") == b"{}"


def test_a_byte_order_mark_is_left_out() -> None:
    assert read_payload("-", io.BytesIO(b"\xef\xbb\xbf{}")) == b"{}"


def test_a_dash_reads_stdin() -> None:
    assert read_payload("-", io.BytesIO(b'{"a": 1}\n')) == b'{"a": 1}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the JSON is empty; an empty message is {}"),
        ("  \n", "the JSON is empty"),
        ('{"a": 1,}', "bad JSON at line 1, column 9"),
        ('{"a": 1,\n "b": }', "bad JSON at line 2, column 7: Expecting value: ' \"b\": }'"),
        ("{'a': 1}", "bad JSON at line 1, column 2"),
        ("{} {}", "bad JSON at line 1, column 4: Extra data"),
        ('{"a": NaN}', "NaN is no number in JSON"),
        ('{"a": -Infinity}', "-Infinity is no number in JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 10_000, "bad JSON: Exceeds the limit"),
        ("\udcff", "is not UTF-8 (byte 0)"),
    ],
)
def test_bad_json_says_what_is_wrong_and_where(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)) as caught:
        read_payload(text)
    assert len(str(caught.value)) < 300


def test_the_end_of_the_text_has_a_place_too() -> None:
    with pytest.raises(ConfigurationError, match="line 3, column 1"):
        read_payload('{"a":\n1,\n')


def test_a_long_line_is_shown_around_the_place() -> None:
    text = '{"list": [' + "1, " * 1_000 + "oops" + ", 1" * 1_000 + "]}"
    with pytest.raises(ConfigurationError, match=r"column 3011: .*oops") as caught:
        read_payload(text)
    assert len(str(caught.value)) < 300
