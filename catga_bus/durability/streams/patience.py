"""Calls of JetStream that are repeated while their outcome is unknown, and what stands in their way in words."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Final, TypeVar

from catga_bus.clock import Clock
from catga_bus.durability.routes.switched_off import jetstream_is_off, says_off
from catga_bus.errors import DisconnectedError, Outcome, PermissionDeniedError
from catga_bus.transport.jetstream import JetStreamRefusedError, JetStreamUnknownError

T = TypeVar("T")

_PAUSE_SECONDS: Final = 0.25


class Patience:
    """Repeats calls that may be done twice, until an instant.

    Args:
        clock: Monotonic seconds.
        timeout: Seconds, for all calls together.
        denied: Returns the subjects that the server has refused to this user.
    """

    def __init__(self, clock: Clock, timeout: float, denied: Callable[[], Collection[str]]) -> None:
        self._clock = clock
        self._until = clock() + timeout
        self._denied = denied

    async def call(self, make: Callable[[], Awaitable[T]], operation: str) -> T:
        """Call until the outcome is known.

        Args:
            make: Makes the call.
            operation: What follows `$JS.API.` in its subject.

        Raises:
            JetStreamRefusedError: The server says no.
            ConfigurationError: JetStream is off.
            PermissionDeniedError: This user may not ask.
            DisconnectedError: There was no answer until the end.
        """
        while True:
            try:
                return await make()
            except JetStreamUnknownError as error:
                self._check(error, f"$JS.API.{operation}")
            except JetStreamRefusedError as error:
                if says_off(error):
                    raise jetstream_is_off(error) from error
                raise
            await asyncio.sleep(_PAUSE_SECONDS)

    def _check(self, error: JetStreamUnknownError, subject: str) -> None:
        if subject in self._denied():
            text = f"the server does not permit this user to publish to {subject!r}"
            raise PermissionDeniedError(text, subject) from error
        if self._clock() >= self._until:
            text = f"JetStream has not done it in time: {error}"
            raise DisconnectedError(text, outcome=Outcome.UNKNOWN) from error
