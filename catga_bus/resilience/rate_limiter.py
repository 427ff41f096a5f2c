"""Rate limit: a token bucket, and the middleware that asks it.

    @bus.handler(middleware=[RateLimiter(rate=100.0)])          # this handler, in this node
    bus.middleware(RateLimiter(rate=50.0), side="outbound")     # all calls of this bus

It counts in this process: three nodes with a limit of 100 per second take 300.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec

from catga_bus.clock import Clock, monotonic
from catga_bus.context import Context, Outgoing
from catga_bus.pipeline import CallNext, Result
from catga_bus.resilience.bounds import check_count, check_number
from catga_bus.resilience.limits import checked_types, over_limit

_ALMOST_ONE = 1.0 - 1e-9  # a token less what adding up loses: who waits until it is due must not come too early


class TokenBucket:
    """Tokens that come at a steady rate and are kept up to a bound. Pure.

    In any stretch of `t` seconds at most `burst + rate * t` are taken.

    Args:
        rate: Tokens per second, above 0.
        burst: The most that are kept; the bucket begins full.
        now: The present instant, of a monotonic clock.
    """

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._at = now

    def take(self, now: float) -> bool:
        """Take a token; False if there is none."""
        self._fill(now)
        if self._tokens < _ALMOST_ONE:
            return False
        self._tokens -= 1.0
        return True

    def give_back(self) -> None:
        """Put back a token that was not used."""
        self._tokens = min(self._burst, self._tokens + 1.0)

    def seconds_until(self, count: int, now: float) -> float:
        """Return how long it is until `count` tokens have come that nobody has taken; 0 if they are there."""
        self._fill(now)
        return max(0.0, (count - self._tokens) / self._rate)

    def _fill(self, now: float) -> None:
        if now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
            self._at = now


class RateLimiterStatistics(msgspec.Struct, frozen=True):
    """What a rate limiter has done; counts since it was made."""

    passed: int
    """Messages let through, those that waited included."""

    refused: int
    waiting: int
    """Messages that wait for a token now."""


class RateLimiter:
    """Middleware that lets at most `burst + rate * t` messages through in any `t` seconds.

    What comes over the limit waits if a token will be there within `max_wait` and the message's own deadline, behind
    those that wait already. Else it is answered at once, without running: `OVERLOADED`, outcome `not_run`, with
    `retry_after_ms` in the details. A request that a node refuses in this way is tried at another one by its caller.

    One limiter may be used in several places, which then share its rate, on one event loop. Around a handler a message
    that waits has one of the handler's places (`concurrency`).

    Args:
        rate: Messages per second; 0.001 to 1,000,000.
        burst: The most at once after a quiet time; 1 to 1,000,000. None: as many as `rate` gives in a second, at least
            one.
        max_wait: Seconds that a message may wait; 0 to 3,600.
        max_waiting: Messages that may wait at a time; 1 to 1,000,000.
        only: The message classes that it is for; None means all. Others pass and are not counted.
        clock: Monotonic seconds; that of the event loop.

    Raises:
        ConfigurationError: An option is out of its bounds; the text names it.
    """

    def __init__(
        self,
        *,
        rate: float,
        burst: int | None = None,
        max_wait: float = 0.0,
        max_waiting: int = 1_024,
        only: Iterable[type] | None = None,
        clock: Clock = monotonic,
    ) -> None:
        check_number("rate", rate, 0.001, 1_000_000)
        self.burst = max(1, int(rate)) if burst is None else burst
        check_count("burst", self.burst, 1, 1_000_000)
        check_number("max_wait", max_wait, 0, 3_600)
        check_count("max_waiting", max_waiting, 1, 1_000_000)
        self.rate = rate
        self.max_wait = max_wait
        self.max_waiting = max_waiting
        self._only = checked_types("RateLimiter", only)
        self._clock = clock
        self._bucket = TokenBucket(rate, self.burst, clock())
        # Who waits, the first in front; while somebody does, a timer is set for the next token.
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._passed = self._refused = 0

    def __repr__(self) -> str:
        return f"RateLimiter(rate={self.rate:g}, burst={self.burst}, max_wait={self.max_wait:g})"

    async def __call__(self, message: Any, ctx: Context | Outgoing, call_next: CallNext) -> Result:
        """Let a message through, now or when its turn comes, or answer that it is over the limit."""
        if self._only is not None and type(message) not in self._only:
            return await call_next(message)
        now = self._clock()
        if self._waiting or not self._bucket.take(now):
            wait = self._bucket.seconds_until(len(self._waiting) + 1, now)
            if wait > min(self.max_wait, ctx.remaining) or len(self._waiting) >= self.max_waiting:
                self._refused += 1
                return over_limit(f"the limit of {self.rate:g} per second (burst {self.burst}) is reached", wait)
            await self._turn()
        self._passed += 1
        return await call_next(message)

    def statistics(self) -> RateLimiterStatistics:
        """Return the counts so far."""
        return RateLimiterStatistics(self._passed, self._refused, len(self._waiting))

    async def _turn(self) -> None:
        """Wait for a token, behind those that wait already; who is cancelled leaves none behind."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        if self._timer is None:
            self._serve()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._bucket.give_back()  # cancelled in the moment in which the token came
            else:
                self._waiting.pop(turn, None)
            self._serve()
            raise

    def _serve(self) -> None:
        """Hand tokens to those in front, and set the timer for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        while self._waiting:
            turn = next(iter(self._waiting))
            if turn.done():
                del self._waiting[turn]  # cancelled, and not yet aware of it
            elif self._bucket.take(now):
                del self._waiting[turn]
                turn.set_result(None)
            else:
                delay = self._bucket.seconds_until(1, now)
                self._timer = asyncio.get_running_loop().call_later(delay, self._serve)
                return
