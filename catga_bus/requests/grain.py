"""How many requests may travel together: the grain of load balancing. Pure.

A batch goes to one node. With fast handlers a large batch is free speed; with slow handlers it is a queue in front of
one node while others idle.
"""

BATCH_SECONDS = 0.001
# One node is given at most this much handler time at once: about three round trips on a local network, so waiting
# behind batch mates stays in the order of the network's own latency.

FINEST_SHARE = 256
# Batches are never finer than this share of what is in flight: with many in flight the law of large numbers evens the
# nodes out (256 batches over 3 nodes differ by about 5 %), and finer batches would only cost.

_SMOOTHING = 0.2
# Weight of the newest answer in the moving mean: five answers make up two thirds of it.


def grain(handler_seconds: float, in_flight: int, largest: int) -> int:
    """Return how many messages of one type may share a batch.

    Args:
        handler_seconds: Mean time that the handler takes, waiting included; 0 when unknown.
        in_flight: Requests of this type that wait for an answer.
        largest: The most frames that a batch may have.

    Returns:
        1 to `largest`.

    Example:
        >>> grain(0.000_005, 1024, 64), grain(0.005, 192, 64), grain(0.005, 1024, 64)
        (64, 1, 4)
    """
    if handler_seconds * largest <= BATCH_SECONDS:
        return largest
    by_time = int(BATCH_SECONDS / handler_seconds)
    by_share = in_flight // FINEST_SHARE
    return max(1, min(largest, max(by_time, by_share)))


def smoothed(mean: float, newest: float) -> float:
    """Return the exponential moving mean of handler seconds after one more answer; the first stands for itself."""
    if mean == 0.0:
        return newest
    return mean + _SMOOTHING * (newest - mean)
