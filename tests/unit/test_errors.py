import copy
import inspect
import pickle
import re
from typing import Any

import pytest

import catga_bus.errors as errors
from catga_bus.errors import (
    CALL_ERRORS,
    RESERVED_CODES,
    AuthenticationError,
    CallError,
    CatgaError,
    Code,
    DeadlineExceededError,
    DisconnectedError,
    HandlerError,
    Outcome,
    PermissionDeniedError,
    Refused,
)


def drawn_tree() -> list[tuple[int, str, str | None]]:
    """Depth, class and second base of every line of the tree in the module's docstring."""
    lines = (errors.__doc__ or "").split("CatgaError\n", 1)[1].splitlines()
    found = []
    for line in lines:
        match = re.match(r"^ {4}((?:\|  )*|(?:   )*)[|`]- (\w+)(?: +\((?:also a )?(\w+)\))?(.*)$", line)
        if match:
            also = match[3] or (re.search(r"also an? (\w+)", match[4]) or [None, None])[1]
            found.append((len(match[1]) // 3 + 1, match[2], also))
    return found


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    parents = ["CatgaError"]
    for depth, name, also in drawn_tree():
        cls = getattr(errors, name)
        bases = [base.__name__ for base in cls.__bases__]
        assert bases == [parents[depth - 1], *([also] if also else [])], name
        parents[depth:] = [name]

    drawn = {name for _, name, _ in drawn_tree()}
    defined = {name for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, CatgaError)}
    assert drawn | {"CatgaError"} == defined


def test_the_docstring_names_the_code_of_each_class() -> None:
    for code, cls in CALL_ERRORS.items():
        assert re.search(rf"- {cls.__name__} +{code}\b", errors.__doc__ or ""), code


def test_every_reserved_code_has_one_class() -> None:
    assert set(CALL_ERRORS) == set(RESERVED_CODES) == {str(code) for code in Code}
    assert len(set(CALL_ERRORS.values())) == len(CALL_ERRORS)
    assert {cls.default_code for cls in CALL_ERRORS.values()} == set(Code)


def test_outcomes_are_the_four_words_that_travel() -> None:
    assert [str(outcome) for outcome in Outcome] == ["not_run", "refused", "failed", "unknown"]


@pytest.mark.parametrize("cls", CALL_ERRORS.values())
def test_a_call_error_carries_its_facts(cls: type[CallError]) -> None:
    error = cls("text", details={"a": 1}, outcome=Outcome.NOT_RUN, retryable=True, attempts=2, node="n-1")

    assert error.code == cls.default_code
    assert (error.message, error.details, error.outcome) == ("text", {"a": 1}, Outcome.NOT_RUN)
    assert (error.retryable, error.attempts, error.node) == (True, 2, "n-1")
    assert str(error) == f"{error.code}: text (not_run, node n-1)"


def test_a_call_error_knows_nothing_unless_told() -> None:
    error = HandlerError("text")

    assert (error.details, error.outcome, error.retryable) == (None, Outcome.UNKNOWN, False)
    assert (error.attempts, error.node) == (0, None)
    assert str(error) == "HANDLER_ERROR: text (unknown)"


def test_a_code_may_be_given() -> None:
    assert CallError("text", code="OWN").code == "OWN"
    assert CallError("text").code == "HANDLER_ERROR"


def test_refused_reads_as_a_sentence() -> None:
    error = Refused("OUT_OF_STOCK", "none left", {"sku": "a"}, retryable=True)

    assert (error.code, error.message, error.details) == ("OUT_OF_STOCK", "none left", {"sku": "a"})
    assert (error.outcome, error.retryable) == (Outcome.REFUSED, True)
    assert str(error) == "OUT_OF_STOCK: none left (refused)"
    assert str(Refused("NO")) == "NO:  (refused)"


def test_time_outs_and_lost_connections_are_what_python_calls_them() -> None:
    assert issubclass(DeadlineExceededError, TimeoutError)
    assert issubclass(DisconnectedError, ConnectionError)


def test_permission_errors_name_the_subject() -> None:
    assert PermissionDeniedError("no", "catga.rpc.Quote").subject == "catga.rpc.Quote"
    assert PermissionDeniedError("no").subject == ""
    assert str(AuthenticationError("who are you")) == "who are you"


@pytest.mark.parametrize(
    "error",
    [
        Refused("NO", "text", {"a": 1}, retryable=True, node="n-1", attempts=3),
        DeadlineExceededError("text", outcome=Outcome.NOT_RUN, node="n-1"),
        DisconnectedError("text", outcome=Outcome.NOT_RUN),
        HandlerError("text", details=[1]),
        CallError("text", code="OWN"),
        PermissionDeniedError("no", "subject"),
    ],
)
@pytest.mark.parametrize("copied", [copy.copy, lambda it: pickle.loads(pickle.dumps(it))])
def test_errors_survive_copies_and_process_pools(error: Any, copied: Any) -> None:
    other = copied(error)

    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_no_field_of_a_call_error_hides_one_of_python() -> None:
    error = DisconnectedError("text", details="d")

    assert error.args == ("text",)
    assert error.errno is None
