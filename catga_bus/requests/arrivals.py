"""Arrivals: the requests that a node has taken in and not answered, and telling callers of those that take longer."""

import asyncio
from collections.abc import Callable

from catga_bus.dispatch.deliveries import Delivery

NOTICE_SECONDS = 0.01
"""How long a request is here, at least, before its caller is told so; twice as long at most. Most answers are faster,
also those of a node at its limit with a thousand requests in hand (5 to 10 ms, measured), and a caller waits many times
as long before it asks another node."""


class Arrivals:
    """Requests by id, in three generations: since the last look, since the one before, and those that were told of.

    Who is answered between two looks costs one dictionary entry, and nothing else.

    Args:
        tell: Told of an inbox, and of the ids that are to be told to it.

    Attributes:
        young: What came since the last look. Add to it directly, because every request passes through it; it is another
            dictionary after each look.
        middle: What came between the last two looks; read and popped from directly, for the same reason.
        told: What is here longer, and its caller was told.
        is_watched: Whether there will be a look.
    """

    def __init__(self, tell: Callable[[str, list[str]], None]) -> None:
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self.young: dict[str, Delivery] = {}
        self.middle: dict[str, Delivery] = {}
        self.told: dict[str, Delivery] = {}
        self.is_watched = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self.young) + len(self.middle) + len(self.told)

    def watch(self) -> None:
        """Look again soon; call it after adding to `young`, unless `is_watched`."""
        self.is_watched = True
        self._timer = self._loop.call_later(NOTICE_SECONDS, self._look)

    def get(self, message_id: str) -> Delivery | None:
        """Return the delivery with an id, or None if it is not here."""
        return self.young.get(message_id) or self.middle.get(message_id) or self.told.get(message_id)

    def leave(self, message_id: str) -> bool:
        """Forget a request; return whether its caller was told that it is here."""
        return (
            self.young.pop(message_id, None) is None
            and self.middle.pop(message_id, None) is None
            and self.told.pop(message_id, None) is not None
        )

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        late, self.middle, self.young = self.middle, self.young, {}
        self.is_watched = False
        if self.middle:
            self.watch()
        if not late:
            return
        self.told.update(late)
        ids_of: dict[str, list[str]] = {}
        for message_id, delivery in late.items():
            ids_of.setdefault(delivery.target.subject, []).append(message_id)
        for inbox, ids in ids_of.items():
            self._tell(inbox, ids)
