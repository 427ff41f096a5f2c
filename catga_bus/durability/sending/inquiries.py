"""Inquiries: asks what became of commands whose answer does not come.

An answer is lost if the connection of the node or of this process breaks while it is on its way, or the server that has
it dies. So whoever waits asks the owner of the partition: at once when the connection is back, and every second. It
costs the others nothing but a few bytes: what is waiting or under way gets no word.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Final, TypeAlias

from catga_bus.durability.sending.postings import Posting
from catga_bus.errors import CatgaError
from catga_bus.transport.base import Transport
from catga_bus.wire import Kind, Names, join_ids

log = logging.getLogger("catga_bus.durability")

Address: TypeAlias = tuple[str, str]
"""Service and id of a node."""

Holders: TypeAlias = Callable[[str], Sequence[Address]]
"""Returns whom to ask about a subject of commands: the owner of its partition, then the other nodes of the service."""

ROUND_SECONDS: Final = 1.0
"""Between two rounds of questions."""

ASKED_AT_ONCE: Final = 2_000
"""Commands that one round asks for, at most: about 60 KB. If more wait, they take turns."""

OWNER_ROUNDS: Final = 2
"""Rounds in which only the owner is asked; then all nodes of the service are, one of which may have owned it."""

_MAX_IDS = 1_000  # in one payload: about 30 KB


class Inquiries:
    """Asks about the commands of one sender.

    Args:
        transport: The connection.
        names: The subjects.
        pending: The commands that wait for their result, in the order in which they were sent.
        holders: Whom to ask.
        sender: Id of this node.
        inbox: Where answers come.

    Attributes:
        asked: Ids that were asked for.
    """

    def __init__(
        self,
        transport: Transport,
        names: Names,
        pending: Collection[Posting],
        holders: Holders,
        *,
        sender: str,
        inbox: str,
    ) -> None:
        self._transport = transport
        self._names = names
        self._pending = pending
        self._holders = holders
        self._head = (sender, inbox)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._offset = 0
        self._is_denied = False  # since the connection came up
        self.is_on = False
        self.asked = 0

    def begin(self) -> None:
        """Something waits: ask about it, unless it has its answer soon. For those who look at `is_on` first."""
        self.is_on = True
        self._timer = self._loop.call_later(ROUND_SECONDS, self._round)

    def reconnected(self) -> None:
        """The connection is back: what was answered meanwhile is lost."""
        self._is_denied = False
        self._ask([posting for posting in self._pending if posting.is_written])

    def denied(self, subject: str) -> None:
        """The server refuses a subject."""
        if self._names.is_results(subject):
            self._is_denied = True

    def close(self) -> None:
        """Ask no more."""
        self.is_on = True
        if self._timer is not None:
            self._timer.cancel()

    def _round(self) -> None:
        count = len(self._pending)
        if not count:
            self.is_on, self._timer, self._offset = False, None, 0
            return
        self._timer = self._loop.call_later(ROUND_SECONDS, self._round)
        if not self._transport.is_connected or self._transport.is_behind or self._is_denied:
            return
        start = self._offset if self._offset < count else 0
        some = list(islice(self._pending, start, start + ASKED_AT_ONCE))
        self._offset = start + len(some)
        late = [posting for posting in some if posting.rounds and posting.is_written]
        for posting in some:
            posting.rounds += 1
        self._ask(late)

    def _ask(self, postings: Sequence[Posting]) -> None:
        holders: dict[str, Sequence[Address]] = {}
        ids: dict[Address, list[str]] = {}
        for posting in postings:
            found = holders.get(posting.subject)
            if found is None:
                found = holders[posting.subject] = self._holders(posting.subject)
            for address in found if posting.rounds - 1 > OWNER_ROUNDS else found[:1]:
                ids.setdefault(address, []).append(posting.id)
        for address, some in ids.items():
            self._write(self._names.node_results(*address), some)

    def _write(self, subject: str, ids: Sequence[str]) -> None:
        rest = iter(ids)
        while some := list(islice(rest, _MAX_IDS)):
            try:
                self._transport.publish(subject, join_ids(Kind.STATUS, self._head, some))
            except CatgaError as error:  # the next round comes in a second
                log.debug("%d ids for %s were not written: %s", len(some), subject, error)
                return
            self.asked += len(some)
