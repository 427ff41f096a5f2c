"""A consumer at work: a subscription of its own, and pulls that stand until messages or the server end them."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from catga_bus.clock import Clock
from catga_bus.errors import DisconnectedError
from catga_bus.transport.base import Subscription, Transport
from catga_bus.transport.jetstream import MessageSink, StatusSink
from catga_bus.transport.jetstream_deliveries import ACK_ROOT, PENDING_HEADER, delivered_message, pull_request
from catga_bus.transport.nats_protocol import DESCRIPTION_HEADER
from catga_bus.wire import STATUS_HEADER

NO_MESSAGES: Final = 404
EXPIRED: Final = 408
CONFLICT: Final = 409
NOBODY: Final = 503

_SHORTEST_PULL: Final = 30.0
# Seconds until the server ends a pull: at least twice the heartbeat (its rule), and long enough that asking again costs
# nothing beside the heartbeats.

_SETTLING: Final = 1.0
_SETTLING_PAUSE: Final = 0.05
# A new consumer of a cluster is not known to every server at once: within the first second "nobody there" proves
# nothing, and the pull is sent again after a pause.

_SHARE: Final = 8
# A refill is sent when it is an eighth of what is still to come: so whoever asks for single messages causes few pulls,
# and about 16 wait at the server, which keeps 512 and drops the rest without a word.


class NatsConsumption:
    """A consumer at work; `catga_bus.transport.jetstream.Consumption` is its contract.

    How much of a pull is over is told in three ways: a header says what was left; the reply subject of the pull ends in
    its number and its size, for a pull that reached nobody; and a consumer or leader that is gone has ended all of
    them, which it says once for each: the first word counts, and those about pulls from before it do not.

    Args:
        transport: Connected.
        clock: Tells the time.
        request_subject: Where the consumer is asked for messages.
        on_message: Takes each message.
        on_status: Takes what the server says about a pull.
        idle: Seconds between the server's heartbeats.
        on_closed: Told when it is closed, with itself and None.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Clock,
        request_subject: str,
        on_message: MessageSink,
        on_status: StatusSink,
        idle: float,
        on_closed: "Callable[[NatsConsumption, None], object]",
    ) -> None:
        self._on_closed = on_closed
        self._transport = transport
        self._clock = clock
        self._request_subject = request_subject
        self._on_message = on_message
        self._on_status = on_status
        self._idle = idle
        self._expires = max(_SHORTEST_PULL, 2.0 * idle)
        self._inbox = transport.new_inbox()
        self._subscription: Subscription | None = None
        self._opened_at = self._heard_at = clock()
        self._asked = 0
        self._owed = 0
        # Credit is what was asked of the server and has not come, and what is owed to the next pull.
        self._pulls = 0
        self._over = 0
        # How many pulls there were; and up to which all are known to be over.

        self._again: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def credit(self) -> int:
        """Messages that were asked for and have neither come nor been declared over."""
        return self._asked + self._owed

    @property
    def heard_at(self) -> float:
        """Instant of the last message or status."""
        return self._heard_at

    async def open(self) -> None:
        """Subscribe; nothing comes before the first `pull`."""
        self._subscription = await self._transport.subscribe(f"{self._inbox}.*.*", self._on_delivery)

    def pull(self, batch: int) -> None:
        """Ask for so many more messages; see `catga_bus.transport.jetstream.Consumption.pull`."""
        if batch < 1:
            raise ValueError(f"a pull asks for 1 message or more, got {batch}")
        if self._is_closed or not self._transport.is_connected:
            return
        self._owed += batch
        self._refill()

    async def close(self) -> None:
        """End it; nothing reaches the sinks after this returns. Closing twice is fine."""
        self._is_closed = True
        self.forget_pulls()
        self._on_closed(self, None)
        if self._subscription is not None:
            await self._subscription.close()

    def forget_pulls(self) -> None:
        """The connection is gone, and the pulls with it."""
        self._asked = self._owed = 0
        self._over = self._pulls
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _refill(self) -> None:
        batch = self._owed
        if not batch or self._again is not None or batch * _SHARE < self._asked:
            return
        self._pulls += 1
        body = pull_request(batch, self._expires, self._idle)
        try:
            self._transport.publish(self._request_subject, body, reply=f"{self._inbox}.{self._pulls}.{batch}")
        except DisconnectedError:
            self.forget_pulls()
            return
        self._owed = 0
        self._asked += batch

    def _on_delivery(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        self._heard_at = self._clock()
        if not reply.startswith(ACK_ROOT):
            self._on_control(subject, headers or {})
            return
        message = delivered_message(subject, payload, reply, headers)
        # Never below 0: pulls from before a reconnect may still bring something.
        self._asked = asked = self._asked - 1 if self._asked else 0
        if self._owed and self._owed * _SHARE >= asked:
            self._refill()
        self._on_message(message)

    def _on_control(self, subject: str, headers: Mapping[str, str]) -> None:
        status = headers.get(STATUS_HEADER, "")
        if self._is_closed or not status.isdecimal():
            return
        code = int(status)
        if code >= NO_MESSAGES:
            ended = self._ended(code, subject, headers)
            self._asked -= ended
            if code == EXPIRED and ended:
                self._owed += ended
                self._refill()
            elif code == NOBODY and self._clock() - self._opened_at < _SETTLING:
                self._owed += ended
                self._try_again_soon()
                return
        self._on_status(code, headers.get(DESCRIPTION_HEADER, ""))

    def _ended(self, code: int, subject: str, headers: Mapping[str, str]) -> int:
        """Return how many messages that were asked for will not come."""
        _, number, size = subject.rsplit(".", 2)
        if int(number) <= self._over:
            return 0
        left = headers.get(PENDING_HEADER, "")
        if left.isdecimal():
            return min(self._asked, int(left))
        if code == CONFLICT:
            self._over = self._pulls
            return self._asked
        return min(self._asked, int(size))

    def _try_again_soon(self) -> None:
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(_SETTLING_PAUSE, self._try_again)

    def _try_again(self) -> None:
        self._again = None
        self._refill()
