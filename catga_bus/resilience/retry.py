"""Retry: how long a message that failed waits for its next attempt. Pure.

@bus.handler(max_attempts=8, retry=RetryOptions(first=1.0, longest=60.0))
async def debit(command: Debit) -> Receipt: ...
"""

import msgspec

from catga_bus.resilience.bounds import check_number

_MAX_SECONDS = 3_600


class RetryOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The pauses between the attempts at one command or durable event. Times are seconds.

    The pause before retry n (the first retry is 1) is `min(longest, first * factor ** (n - 1))`, of which a random part
    of at most `jitter` is taken off, so that what failed together is not tried again together.

    Raises:
        ConfigurationError: An option is out of its bounds; the text names it.
    """

    first: float = 0.1
    """Before the first retry; 0 to 3,600."""

    longest: float = 30.0
    """The longest pause; `first` to 3,600."""

    factor: float = 2.0
    """What each pause is multiplied by to give the next; 1 to 100."""

    jitter: float = 0.5
    """The share of a pause that chance may take off; 0 to 1. Chosen: a crowd that failed at once spreads over half of
    the pause, and no pause is nothing."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        check_number("first", self.first, 0, _MAX_SECONDS)
        check_number("longest", self.longest, self.first, _MAX_SECONDS)
        check_number("factor", self.factor, 1, 100)
        check_number("jitter", self.jitter, 0, 1)


def pause_before(retry: int, options: RetryOptions, chance: float) -> float:
    """Return the seconds to wait before a retry.

    Args:
        retry: Which one; the first, after the first failure, is 1.
        options: The bounds.
        chance: A random number from 0 to 1, such as `random.random()`.

    Example:
        >>> [pause_before(retry, RetryOptions(), 0.0) for retry in (1, 2, 3, 10)]
        [0.1, 0.2, 0.4, 30.0]
        >>> pause_before(1, RetryOptions(), 1.0)
        0.05
    """
    try:
        whole = min(options.longest, options.first * options.factor ** (retry - 1))
    except OverflowError:  # a float ends near retry 1,000
        whole = options.longest if options.first else 0.0
    return whole * (1.0 - options.jitter * chance)
