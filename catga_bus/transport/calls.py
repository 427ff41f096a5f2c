"""Requests over a transport, many in flight at once: one subscription takes all answers."""

import asyncio
import math
from collections.abc import Mapping
from typing import TypeAlias

from catga_bus.clock import Clock
from catga_bus.errors import DisconnectedError
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.jetstream import JetStreamUnknownError, JetStreamUnreachedError
from catga_bus.wire import NO_RESPONDERS, STATUS_HEADER

_Outcome: TypeAlias = bytes | JetStreamUnknownError | None


class _Call:
    """One that waits for its answer."""

    __slots__ = ("answered", "deadline", "subject")

    def __init__(self, subject: str, answered: "asyncio.Future[_Outcome]", deadline: float) -> None:
        self.subject = subject
        self.answered = answered
        self.deadline = deadline

    def fail(self, why: str) -> None:
        if not self.answered.done():
            # Not as an exception of the future: a caller that is cancelled in this very turn would leave it unread.
            self.answered.set_result(JetStreamUnknownError(f"{self.subject}: {why}"))


class Calls:
    """Asks and waits. As many calls are in flight as callers wait; whoever calls bounds them.

    One timer serves all deadlines, and it is moved only when an earlier one comes: under load nothing is armed or
    cancelled per call.

    Args:
        transport: Connected.
        clock: Tells the time.
    """

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._root = transport.new_inbox() + "."
        self._skip = len(self._root)
        self._last = 0
        self._pending: dict[str, _Call] = {}
        self._subscription: Subscription | None = None
        self._opening = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._is_open = False
        self._is_closed = False

    @property
    def in_flight(self) -> int:
        """Calls that wait for their answer."""
        return len(self._pending)

    async def ask(
        self, subject: str, payload: bytes, timeout: float, headers: Mapping[str, str] | None = None
    ) -> bytes | None:
        """Return the payload of the first answer, or None if the server says that nobody listens.

        Raises:
            JetStreamUnreachedError: There is no connection.
            JetStreamUnknownError: It was lost, or `timeout` seconds passed.
            TooLargeError: The server does not take a message of this size.
            ConfigurationError: The subject or a header cannot be sent.
        """
        if not self._is_open:
            await self._open()
        self._last += 1
        token = str(self._last)
        try:
            self._transport.publish(subject, payload, reply=self._root + token, headers=headers)
        except DisconnectedError as error:
            raise JetStreamUnreachedError(f"{subject}: {error.message}") from error
        deadline = self._clock() + timeout
        answered: asyncio.Future[_Outcome] = asyncio.get_running_loop().create_future()
        self._pending[token] = _Call(subject, answered, deadline)
        if deadline < self._timer_at:
            self._arm(deadline)
        try:
            outcome = await answered
        finally:
            self._pending.pop(token, None)
        if isinstance(outcome, JetStreamUnknownError):
            raise outcome
        return outcome

    def fail_all(self, why: str) -> None:
        """Let everything that waits end with an unknown outcome."""
        pending, self._pending = self._pending, {}
        for call in pending.values():
            call.fail(why)

    async def close(self) -> None:
        """End what waits, and take no more. Closing twice is fine."""
        self._is_closed, self._is_open = True, False
        self.fail_all("closed")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._subscription is not None:
            await self._subscription.close()

    async def _open(self) -> None:
        async with self._opening:
            if self._is_closed:
                raise JetStreamUnknownError("closed")
            if self._subscription is None:
                try:
                    self._subscription = await self._transport.subscribe(self._root + "*", self._on_answer)
                except DisconnectedError as error:
                    raise JetStreamUnreachedError(error.message) from error
                self._is_open = True

    def _on_answer(self, subject: str, payload: bytes, _: str, headers: Mapping[str, str] | None) -> None:
        call = self._pending.pop(subject[self._skip :], None)
        if call is None or call.answered.done():
            return
        is_nobody = headers is not None and not payload and headers.get(STATUS_HEADER) == NO_RESPONDERS
        call.answered.set_result(None if is_nobody else payload)

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        delay = max(0.0, deadline - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self._clock()
        late = [token for token, call in self._pending.items() if call.deadline <= now]
        for token in late:
            self._pending.pop(token).fail("no answer in time")
        if self._pending:
            self._arm(min(call.deadline for call in self._pending.values()))
