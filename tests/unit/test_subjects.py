"""How subjects with wildcards meet subjects, and each other."""

import re

from hypothesis import given
from hypothesis import strategies as st

from catga_bus.transport.subjects import collide, covers

PATTERNS = st.builds(
    lambda tokens, has_rest: ".".join([*tokens, ">"] if has_rest else tokens),
    st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=3),
    st.booleans(),
)


@given(
    pattern=st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=4),
    has_rest=st.booleans(),
    subject=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5),
)
def test_matching_equals_the_regular_expression_of_the_pattern(
    pattern: list[str], has_rest: bool, subject: list[str]
) -> None:
    expression = r"\.".join("[^.]+" if token == "*" else token for token in pattern)
    if has_rest:
        pattern = [*pattern, ">"]
        expression += r"\..+"
    expected = re.fullmatch(expression, ".".join(subject)) is not None
    assert covers(pattern, subject) is expected


SUBJECTS = [
    list(tokens)
    for tokens in (
        *((one,) for one in "abc"),
        *((one, two) for one in "abc" for two in "abc"),
        *((one, two, three) for one in "abc" for two in "abc" for three in "abc"),
        *((one, two, three, four) for one in "abc" for two in "abc" for three in "abc" for four in "abc"),
    )
]
"""Enough to tell: no pattern below has more tokens than these."""


@given(one=PATTERNS, other=PATTERNS)
def test_patterns_collide_when_one_subject_matches_both(one: str, other: str) -> None:
    both = any(covers(one.split("."), subject) and covers(other.split("."), subject) for subject in SUBJECTS)
    assert collide(one, other) is both
    assert collide(other, one) is both
