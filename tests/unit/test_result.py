import copy
import pickle
from typing import Any

import msgspec
import pytest

from catga_bus.errors import CALL_ERRORS, RESERVED_CODES, CallError, Code, Outcome, Refused
from catga_bus.result import Err, Ok


class TestOk:
    def test_it_holds_its_value(self) -> None:
        result = Ok(3)

        assert result.is_ok
        assert result.value == result.unwrap() == 3
        assert result == Ok(3) != Ok(4)
        assert repr(result) == "Ok(value=3)"

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            Ok(3).value = 4  # type: ignore[misc]

    def test_it_matches_by_position(self) -> None:
        match Ok(3):
            case Ok(value):
                assert value == 3

    def test_none_is_a_value(self) -> None:
        assert Ok(None).unwrap() is None


class TestErr:
    def test_a_code_is_enough(self) -> None:
        assert Err("NO") == Err("NO", "", None, Outcome.REFUSED, retryable=False, attempts=0, node=None)
        assert not Err("NO").is_ok

    def test_it_matches_by_position_and_name(self) -> None:
        match Err("NO", "none left", {"sku": "a"}, node="n-1"):
            case Err(code, message, details, node=node):
                assert (code, message, details, node) == ("NO", "none left", {"sku": "a"}, "n-1")

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            Err("NO").code = "YES"  # type: ignore[misc]

    def test_unwrap_of_a_handlers_own_code_raises_refused(self) -> None:
        with pytest.raises(Refused) as caught:
            Err("OUT_OF_STOCK", "none left", {"sku": "a"}, retryable=True, attempts=2, node="n-1").unwrap()

        error = caught.value
        assert (error.code, error.message, error.details) == ("OUT_OF_STOCK", "none left", {"sku": "a"})
        assert (error.outcome, error.retryable, error.attempts, error.node) == (Outcome.REFUSED, True, 2, "n-1")

    @pytest.mark.parametrize("code", sorted(RESERVED_CODES))
    def test_unwrap_of_a_reserved_code_raises_its_class_with_all_facts(self, code: str) -> None:
        result = Err(code, "text", [1], Outcome.UNKNOWN, retryable=True, attempts=3, node="n-1")

        error = result.error()

        assert type(error) is CALL_ERRORS[code]
        assert (error.code, error.message, error.details, error.outcome) == (code, "text", [1], Outcome.UNKNOWN)
        assert (error.retryable, error.attempts, error.node) == (True, 3, "n-1")
        with pytest.raises(CALL_ERRORS[code]):
            result.unwrap()

    def test_error_does_not_raise(self) -> None:
        assert isinstance(Err(Code.TIMEOUT).error(), TimeoutError)

    def test_a_reserved_code_compares_as_text(self) -> None:
        assert Err(Code.TIMEOUT) == Err("TIMEOUT")
        assert Err("TIMEOUT").code == Code.TIMEOUT


@pytest.mark.parametrize("result", [Ok({"a": [1]}), Err("NO", "text", {"a": 1}, Outcome.FAILED)])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_results_survive_copies(result: Any, copied: Any) -> None:
    assert copied(result) == result


def test_results_can_be_encoded() -> None:
    result = Err("NO", "text", {"a": 1}, Outcome.FAILED)

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=Err) == result


def test_ok_and_err_are_told_apart_without_match() -> None:
    results: list[Ok[int] | Err] = [Ok(1), Err("NO")]

    assert [result.value if result.is_ok else result.code for result in results] == [1, "NO"]


def test_err_is_no_exception() -> None:
    assert not isinstance(Err("NO"), Exception)
    assert isinstance(Err("NO").error(), CallError)
