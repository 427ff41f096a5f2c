"""Circuit breaker: calls to what keeps failing are held back for a while, then tried with a few. Pure.

    closed -- too many failures --> open -- its time is over --> half-open -- enough probes succeed --> closed
                                     ^                               |
                                     +------- one probe fails -------+

It decides about calls that have not been made. Those in flight when it trips go on, and their results are taken: they
count in the window, but never as probes.

What counts as a failure is for the caller to say: silence, or the death of what was asked; never an answer, whatever it
says, which shows that all is well.

Source:
    M. Nygard, "Release It!" (2007), for the pattern. Window, share of failures and least number of calls are the
    defaults of Netflix Hystrix (10 s in 10 buckets, 50 %, 20 calls); resilience4j has the same share. Time that grows
    with each trip, up to a bound: the outlier detection of Envoy (`base_ejection_time`, `max_ejection_time`).
"""

import math
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

from catga_bus.resilience.bounds import check_count, check_number

BreakerKey: TypeAlias = tuple[str | None, str | None]
"""What a breaker guards: a request type by its name on the wire, a node by its id, or one type at one node."""

Probes: TypeAlias = tuple[tuple[BreakerKey, int], ...]
"""The half-open breakers that one call is a probe of, each with the number that `allow` returned."""

ORDINARY: Final = 0
"""What `allow` returns for a call that is no probe."""

_MAX_DOUBLINGS = 60  # of any time of at least a millisecond give more than the longest allowed; more overflow a float


class BreakerState(StrEnum):
    """Where a breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """When a breaker trips and how it recovers. Times are seconds.

    Raises:
        ConfigurationError: An option is out of its bounds; the text names it.
    """

    failure_rate: float = 0.5
    """The share of failures in the window from which it trips; 0.01 to 1."""

    min_calls: int = 20
    """Results in the window below which it does not trip, however many of them are failures; 1 to 1,000,000."""

    window: float = 10.0
    """How far back results count; 0.1 to 3,600."""

    buckets: int = 10
    """The parts in which the window moves on: results are forgotten a bucket at a time; 1 to 100."""

    open_seconds: float = 1.0
    """How long it stays open after the first trip; each further trip before a whole window has passed closed doubles
    it. Chosen: Hystrix and Polly stay open 5 s, always the same; with doubling a short trouble costs one. 0.01 to
    3,600."""

    max_open_seconds: float = 30.0
    """The longest that it stays open; `open_seconds` to 86,400."""

    probes: int = 3
    """Calls that may be in flight while it is half-open; 1 to 1,000."""

    successes: int = 3
    """Probes that must succeed for it to close; 1 to 1,000."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        check_number("failure_rate", self.failure_rate, 0.01, 1)
        check_count("min_calls", self.min_calls, 1, 1_000_000)
        check_number("window", self.window, 0.1, 3_600)
        check_count("buckets", self.buckets, 1, 100)
        check_number("open_seconds", self.open_seconds, 0.01, 3_600)
        check_number("max_open_seconds", self.max_open_seconds, self.open_seconds, 86_400)
        check_count("probes", self.probes, 1, 1_000)
        check_count("successes", self.successes, 1, 1_000)


class BreakerChange(msgspec.Struct, frozen=True):
    """A breaker has changed its state."""

    type_name: str | None
    """The request type that it guards, or None if it guards a node as a whole."""

    node: str | None
    """The node that it guards, or None if it guards a type wherever it runs. Both are None only if `missed` is not
    0."""

    before: BreakerState
    after: BreakerState
    at: float
    """Instant of the monotonic clock."""

    successes: int
    """In the window, when it happened."""

    failures: int
    """In the window, when it happened."""

    open_seconds: float
    """How long it stays open now; 0 unless it does."""

    missed: int = 0
    """How many changes were left out because the watcher was too slow. Unless it is 0, this says nothing of any
    breaker, and the last change of each one that is not closed by then follows."""


class BreakerStatistics(msgspec.Struct, frozen=True):
    """A snapshot of one breaker."""

    type_name: str | None
    node: str | None
    state: BreakerState
    successes: int
    """In the window."""

    failures: int
    """In the window."""

    trips: int
    """How often it has opened since it was made."""

    since: float
    """Seconds since its state last changed."""

    next_probe_in: float | None
    """Seconds until it lets a probe through; 0 when the next call would be one, None when it is closed."""


class Window:
    """Successes and failures of the last seconds, in a ring of buckets: memory is constant.

    The sums of all time go on, and the ring keeps what they were when each bucket began; what lies between is the
    window. So a result costs an addition.

    Args:
        seconds: Its length; the bucket that is being filled is part of it.
        buckets: How many.
        now: The present instant, at which the first bucket begins.

    Attributes:
        ends: When the present bucket is over; from then on `advance` is due before anything is added.
        total_successes: Since the beginning of time; to be added to.
        total_failures: Since the beginning of time; to be added to.
    """

    __slots__ = ("_began", "_index", "_ring", "_width", "ends", "total_failures", "total_successes")

    def __init__(self, seconds: float, buckets: int, now: float) -> None:
        self._width = seconds / buckets
        self._ring: deque[tuple[int, int]] = deque([(0, 0)] * buckets, maxlen=buckets)
        self._began = now
        self._index = 0
        self.ends = now + self._width
        self.total_successes = self.total_failures = 0

    def advance(self, now: float) -> None:
        """Begin the bucket of this instant and forget what has left the window."""
        index = int((now - self._began) / self._width)
        passed = min(index - self._index, self._ring.maxlen or 0)
        if passed > 0:
            self._ring.extend([(self.total_successes, self.total_failures)] * passed)
            self._index = index
        self.ends = self._began + (self._index + 1) * self._width

    def clear(self) -> None:
        """Forget everything."""
        self._ring.extend([(self.total_successes, self.total_failures)] * (self._ring.maxlen or 0))

    @property
    def successes(self) -> int:
        """Successes in the window, as of the last `advance`."""
        return self.total_successes - self._ring[0][0]

    @property
    def failures(self) -> int:
        """Failures in the window, as of the last `advance`."""
        return self.total_failures - self._ring[0][1]


class CircuitBreaker:
    """One breaker. Instants are seconds of a monotonic clock, and are passed in.

    While `is_closed`, `allow` need not be asked, and results may be recorded many at a time. While it is not, each call
    needs `allow`: that of a probe ends with `end_probe`, whatever becomes of it.

    Args:
        options: When it trips and how it recovers.
        now: The present instant.
        key: What it guards; for reports.
        on_change: Told of every change of state, after it.
        window: What is known of earlier results; a new one when None.

    Attributes:
        is_closed: Whether all calls may pass: the only thing that a busy caller need look at.
        state: Where it stands. That the time of an open one is over shows when `allow` is next asked.
        key: What it guards.
        trips: How often it has opened.
        changed_at: When the state last changed, or when it was made.
        last_change: What it has last told; None while it has been closed all the time.
        window: The results of late.
    """

    __slots__ = (
        "_closed_at", "_next_probe", "_on_change", "_opens_for", "_options", "_phase_probe", "_probes", "_streak",
        "_succeeded", "changed_at", "is_closed", "key", "last_change", "state", "trips", "window",
    )  # fmt: skip

    def __init__(
        self,
        options: BreakerOptions,
        now: float,
        *,
        key: BreakerKey = (None, None),
        on_change: Callable[[BreakerChange], None] | None = None,
        window: Window | None = None,
    ) -> None:
        self._options = options
        self._on_change = on_change
        self.window = Window(options.window, options.buckets, now) if window is None else window
        self._closed_at = -math.inf  # since when it has been closed again; calls from before are old news
        self._streak = 0  # trips without a whole window closed in between
        self._opens_for = 0.0
        # Half-open only. A probe is known by its number; numbers from `_phase_probe` on belong to this phase.
        self._probes: dict[int, float] = {}  # in flight: number -> when it was let through, the oldest first
        self._next_probe = self._phase_probe = ORDINARY + 1
        self._succeeded = 0
        self.key = key
        self.state = BreakerState.CLOSED
        self.is_closed = True
        self.trips = 0
        self.changed_at = now
        self.last_change: BreakerChange | None = None

    def __repr__(self) -> str:
        window = self.window
        return f"<CircuitBreaker {self.key} {self.state}: {window.failures} failures, {window.successes} successes>"

    # -- results -------------------------------------------------------------------------------------------

    def record(self, now: float, successes: int, failures: int, *, admitted: float = math.inf) -> None:
        """Count results of calls that were no probes; trip if the window says so.

        Only a failure can trip it. Results that come while it is not closed are counted and change nothing.

        Args:
            now: The present instant.
            successes: How many succeeded; a business refusal is a success.
            failures: How many failed.
            admitted: When the calls were made, if it may be long ago: results of calls from before it last closed
                are passed over, because they tell of the trouble that is over.
        """
        if admitted < self._closed_at:
            return
        window = self.window
        if now >= window.ends:
            window.advance(now)
        window.total_successes += successes
        if not failures:
            return
        window.total_failures += failures
        if self.is_closed:
            failed = window.failures
            calls = failed + window.successes
            if calls >= self._options.min_calls and failed >= calls * self._options.failure_rate:
                self._trip(now)

    def end_probe(self, probe: int, now: float, *, succeeded: bool | None) -> None:
        """Say how a probe ended: once for each, whatever became of it.

        One from before the present half-open phase is passed over. One whose slot was given back for its age still
        counts.

        Args:
            probe: What `allow` returned.
            now: The present instant.
            succeeded: None if it ended without a verdict, as when its caller was cancelled.
        """
        if self.state is not BreakerState.HALF_OPEN or probe < self._phase_probe:
            return
        self._probes.pop(probe, None)
        if succeeded is None:
            return
        if not succeeded:
            self._trip(now)
            return
        self._succeeded += 1
        if self._succeeded >= self._options.successes:
            self.window.clear()
            self._closed_at = now
            self._become(BreakerState.CLOSED, now)

    # -- admission -----------------------------------------------------------------------------------------

    def allow(self, now: float) -> int | None:
        """Decide about one call.

        A probe that has not ended after `open_seconds` gives its slot back, so that one which is lost blocks nothing.

        Returns:
            None: hold it back. `ORDINARY`, which is 0: let it pass; its result goes to `record`. Above: let it pass as
            the probe of this number; its end goes to `end_probe`.
        """
        if self.is_closed:
            return ORDINARY
        if self.state is BreakerState.OPEN:
            if now < self.half_open_at:
                return None
            self._phase_probe = self._next_probe
            self._succeeded = 0
            self._become(BreakerState.HALF_OPEN, now)
        if len(self._probes) >= self._options.probes and not self._give_back(now):
            return None
        probe = self._next_probe
        self._next_probe += 1
        self._probes[probe] = now
        return probe

    def _give_back(self, now: float) -> bool:
        oldest = next(iter(self._probes))
        if now < self._probes[oldest] + self._options.open_seconds:
            return False
        del self._probes[oldest]
        return True

    @property
    def half_open_at(self) -> float:
        """When it is, was or will be half-open at the earliest; minus infinity while it is closed."""
        if self.is_closed:
            return -math.inf
        return self.changed_at + (self._opens_for if self.state is BreakerState.OPEN else 0.0)

    def next_probe_in(self, now: float) -> float | None:
        """Return the seconds until a call may pass as a probe: 0 if the next one may, None if it is closed."""
        if self.is_closed:
            return None
        if self.state is BreakerState.OPEN:
            return max(0.0, self.half_open_at - now)
        if len(self._probes) < self._options.probes:
            return 0.0
        return max(0.0, next(iter(self._probes.values())) + self._options.open_seconds - now)

    # -- changes -------------------------------------------------------------------------------------------

    def _trip(self, now: float) -> None:
        options = self._options
        if self.is_closed and now >= self._closed_at + options.window:
            self._streak = 0
        self._opens_for = min(options.max_open_seconds, options.open_seconds * 2 ** min(self._streak, _MAX_DOUBLINGS))
        self._streak += 1
        self.trips += 1
        self._become(BreakerState.OPEN, now)

    def give_up(self, now: float) -> None:
        """Let everything pass, because its place is needed for another one."""
        if not self.is_closed:
            self._become(BreakerState.CLOSED, now)

    def _become(self, state: BreakerState, now: float) -> None:
        before, self.state = self.state, state
        self.is_closed = state is BreakerState.CLOSED
        self.changed_at = now
        self._probes.clear()
        opens_for = self._opens_for if state is BreakerState.OPEN else 0.0
        window = self.window
        change = BreakerChange(*self.key, before, state, now, window.successes, window.failures, opens_for)
        self.last_change = change
        if self._on_change is not None:
            self._on_change(change)

    # -- looking at it -------------------------------------------------------------------------------------

    def is_quiet(self, now: float) -> bool:
        """Whether nothing would be forgotten with it: closed for a whole window, and no failure in that time."""
        if not self.is_closed or now < self._closed_at + self._options.window:
            return False
        if now >= self.window.ends:
            self.window.advance(now)
        return not self.window.failures

    def snapshot(self, now: float) -> BreakerStatistics:
        """Return where it stands; changes nothing that decides."""
        window = self.window
        if now >= window.ends:
            window.advance(now)
        return BreakerStatistics(
            *self.key,
            state=self.state,
            successes=window.successes,
            failures=window.failures,
            trips=self.trips,
            since=max(0.0, now - self.changed_at),
            next_probe_in=self.next_probe_in(now),
        )
