"""When a node takes its own connection for dead."""

from catga_bus.cluster.hearing import DEAF_AFTER, Hearing

INTERVAL = 0.25
PAUSE = 0.05


def deaf_after(hearing: Hearing, seconds: float, sent: int, *, elapsed: float = PAUSE) -> bool:
    """Let ticks pass in which `sent` beats have been sent in all."""
    for _ in range(round(seconds / elapsed)):
        hearing.tick(elapsed, PAUSE, sent)
    return hearing.is_deaf(INTERVAL)


def test_a_node_whose_beats_do_not_come_back_is_deaf_until_one_does() -> None:
    hearing = Hearing()
    hearing.heard(1)
    assert not deaf_after(hearing, INTERVAL + DEAF_AFTER - PAUSE, 2)
    assert deaf_after(hearing, 2 * PAUSE, 5)
    hearing.heard(6)
    assert not hearing.is_deaf(INTERVAL)


def test_who_never_heard_itself_is_not_deaf() -> None:
    assert not deaf_after(Hearing(), 600.0, 1_000)


def test_who_sends_nothing_misses_nothing() -> None:
    hearing = Hearing()
    hearing.heard(3)
    assert not deaf_after(hearing, 600.0, 3)
    assert not deaf_after(hearing, INTERVAL, 4)  # its heart has come back


def test_a_new_connection_is_given_time() -> None:
    hearing = Hearing()
    hearing.heard(3)
    assert deaf_after(hearing, 2.0, 10)
    hearing.start_over(10)
    assert not deaf_after(hearing, INTERVAL, 11)


def test_a_loop_that_stood_still_has_heard_nothing_meanwhile_and_is_not_deaf() -> None:
    hearing = Hearing()
    hearing.heard(1)
    hearing.tick(60.0, PAUSE, 200)
    assert not hearing.is_deaf(INTERVAL)
