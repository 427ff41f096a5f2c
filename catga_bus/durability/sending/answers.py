"""Results of stored commands: who waits for one, and the inbox that they come to."""

import logging
import math
from collections.abc import Callable, Mapping

from catga_bus.clock import Clock
from catga_bus.codec import Gate, GateError
from catga_bus.durability.sending import endings
from catga_bus.durability.sending.deadlines import Deadlines
from catga_bus.durability.sending.inquiries import Holders, Inquiries
from catga_bus.durability.sending.postings import Posting
from catga_bus.errors import Code, Outcome
from catga_bus.rarely import RareLog
from catga_bus.transport.base import Subscription, Transport
from catga_bus.wire import Kind, Names

_SWEEP_SECONDS_PER_CALL = 2e-6


class Answers:
    """Matches answers with the commands that wait for them.

    An answer may come before the acknowledgement that the command is stored, twice, or never.

    Args:
        transport: The connection.
        gate: Lets answers in.
        drop: Has a command not written, if it was not, because it has its end.
        names: The subjects.
        holders: Whom to ask for a result that does not come.
        sender: Id of this node.
        clock: Monotonic seconds.

    Attributes:
        inbox: Where answers come.
        late: Answers to commands that nobody waits for any more.
        rejected: What came and was no answer.
        inquiries: Ask for results that do not come.
    """

    def __init__(
        self,
        transport: Transport,
        gate: Gate,
        drop: Callable[[Posting], None],
        names: Names,
        holders: Holders,
        *,
        sender: str,
        clock: Clock,
    ) -> None:
        self._transport = transport
        self._gate = gate
        self._drop = drop
        self._log = RareLog(logging.getLogger("catga_bus.durability"), clock)
        self._pending: dict[str, Posting] = {}
        self._deadlines = Deadlines(self._end_late, clock)
        self._subscription: Subscription | None = None
        self.inbox = transport.new_inbox()
        self.late = self.rejected = 0
        self.inquiries = Inquiries(transport, names, self._pending.values(), holders, sender=sender, inbox=self.inbox)

    def __len__(self) -> int:
        """Commands that wait for their result."""
        return len(self._pending)

    async def start(self) -> None:
        """Listen."""
        self._subscription = await self._transport.subscribe(self.inbox, self._on_message)

    def expect(self, posting: Posting) -> None:
        """Wait for a result, until the posting's deadline; who waited for one with this id does no more.

        Two have one id if the second execution of a handler sends what the first one did.
        """
        before = self._pending.get(posting.id)
        self._pending[posting.id] = posting
        if before is not None:
            self._drop(before)
            endings.fail(before, Code.DISCONNECTED, Outcome.UNKNOWN, "it was sent again under the same id")
        if posting.deadline < self._deadlines.due:
            self._deadlines.watch(posting.deadline)
        if not self.inquiries.is_on:
            self.inquiries.begin()

    def forget(self, posting: Posting) -> None:
        """Wait no more; what comes is late."""
        if self._pending.get(posting.id) is posting:
            del self._pending[posting.id]

    async def close(self) -> None:
        """End what still waits, and be deaf."""
        self._deadlines.close()
        self.inquiries.close()
        for posting in list(self._pending.values()):
            endings.fail(posting, Code.DISCONNECTED, Outcome.UNKNOWN, "the bus was closed before a result came")
        self._pending.clear()
        if self._subscription is not None:
            await self._subscription.close()

    def _on_message(self, _: str, payload: bytes, __: str, ___: Mapping[str, str] | None) -> None:
        try:
            if self._gate.kind(payload) != Kind.ANSWERS:
                self.rejected += 1
                return
            batch = self._gate.answers(payload)
        except GateError as error:
            self.rejected += 1
            self._log.warn("gate", "an answer was not let in: %s", error)
            return
        for frame in batch.frames:
            posting = self._pending.pop(frame.id, None)
            if posting is None:
                self.late += 1
            elif not posting.future.done():
                if not posting.is_written:  # the answer is to an earlier sending under this id
                    self._drop(posting)
                posting.is_over = True
                posting.future.set_result(endings.of_answer(posting, frame))

    def _end_late(self, now: float) -> float:
        due = math.inf
        for posting in [posting for posting in self._pending.values() if posting.deadline <= now]:
            if posting.is_written or posting.is_over:  # else its line says why it was not written
                del self._pending[posting.id]
                endings.late(posting, is_connected=self._transport.is_connected)
        due = min((posting.deadline for posting in self._pending.values()), default=math.inf)
        return max(due, now + len(self._pending) * _SWEEP_SECONDS_PER_CALL)
