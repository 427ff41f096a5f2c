"""When the id of a node that starts is free."""

from catga_bus.cluster.claim import Claim


def test_nobody_there_is_free_at_once() -> None:
    claim = Claim(1.0)
    claim.asked(5.0, "shop", 0)
    assert not claim.is_free(5.1)
    claim.nobody(0)
    assert (claim.is_free(5.1), claim.is_doubted) == (True, False)


def test_silence_is_waited_for_from_the_first_question_on() -> None:
    claim = Claim(1.0)
    claim.asked(5.0, "shop", 0)
    claim.asked(5.9, "shop", 0)
    assert not claim.is_free(5.95)
    assert (claim.is_free(6.0), claim.is_doubted) == (True, True)


def test_each_service_that_may_have_the_id_is_waited_for() -> None:
    claim = Claim(1.0)
    claim.asked(5.0, "shop", 0)
    claim.asked(5.5, "desk", 7)
    claim.nobody(0)
    claim.nobody(0)
    claim.nobody(3)
    assert not claim.is_free(6.4)
    assert claim.is_free(6.5)
