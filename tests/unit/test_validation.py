"""What may stand in a subject."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catga_bus.errors import ConfigurationError
from catga_bus.transport.validation import MAX_SUBJECT_BYTES, checked_subject

GOOD = ["a", "a.b.c", "$SRV.PING", "_INBOX.x-Y_9", "a=2Eb", "größe.世界", "a:b/c", "$", "-"]
WITH_WILDCARDS = ["*", ">", "a.*", "*.b", "a.*.c", "a.>", "*.>", "*.*.>"]
MISPLACED_WILDCARDS = ["a*", "*a", "a>", "**", ">>", "*>", ">.a", "a.>.b", "a.b*.c"]
EMPTY_TOKENS = [".", "..", ".a", "a.", "a..b"]


@pytest.mark.parametrize("subject", GOOD)
@pytest.mark.parametrize("wildcards", [False, True])
def test_a_plain_subject_is_returned_as_it_is(subject: str, wildcards: bool) -> None:
    assert checked_subject(subject, wildcards=wildcards) == subject


@pytest.mark.parametrize("subject", WITH_WILDCARDS)
def test_wildcards_are_for_subscriptions_only(subject: str) -> None:
    assert checked_subject(subject, wildcards=True) == subject
    with pytest.raises(ConfigurationError, match="wildcard"):
        checked_subject(subject)
    assert checked_subject(subject, wildcards=True) == subject


@pytest.mark.parametrize("subject", MISPLACED_WILDCARDS)
@pytest.mark.parametrize("wildcards", [False, True])
def test_a_wildcard_is_a_whole_token_and_the_rest_comes_last(subject: str, wildcards: bool) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(repr(subject))):
        checked_subject(subject, wildcards=wildcards)


@pytest.mark.parametrize("subject", EMPTY_TOKENS)
def test_a_token_is_never_empty(subject: str) -> None:
    with pytest.raises(ConfigurationError, match="empty token"):
        checked_subject(subject, wildcards=True)


def test_a_subject_is_never_empty() -> None:
    with pytest.raises(ConfigurationError, match="must not be empty"):
        checked_subject("", wildcards=True)


@pytest.mark.parametrize(
    "character", [" ", "\t", "\r", "\n", "\x00", "\x1f", "\x7f", "\x85", "\xa0", "\u2028", "\u2029", "\ud800"]
)
@pytest.mark.parametrize("place", ["{}a", "a{}b", "a.b{}"])
def test_spaces_and_control_characters_are_refused(character: str, place: str) -> None:
    subject = place.format(character)
    with pytest.raises(ConfigurationError, match="a control character or half a surrogate pair") as caught:
        checked_subject(subject, wildcards=True)
    assert repr(subject) in str(caught.value)


@pytest.mark.parametrize(
    "longest",
    ["x" * MAX_SUBJECT_BYTES, "é" * (MAX_SUBJECT_BYTES // 2), "世" * (MAX_SUBJECT_BYTES // 3)],
)
def test_the_bound_counts_bytes_and_the_error_stays_short(longest: str) -> None:
    assert checked_subject(longest) == longest
    with pytest.raises(ConfigurationError, match=f"longer than {MAX_SUBJECT_BYTES} bytes") as caught:
        checked_subject(longest + "éé")
    assert len(str(caught.value)) < 200


@given(st.text(max_size=40))
def test_what_passes_cannot_end_a_line_or_a_field_of_the_protocol(subject: str) -> None:
    try:
        checked_subject(subject, wildcards=True)
    except ConfigurationError:
        return
    assert len(subject.split()) == 1 or not subject.isascii()
    assert not set(subject) & set(" \t\r\n\x00")
    assert all(subject.split("."))
