"""One partition in the hands of one node, from the claim to the end: what follows from each thing that happens. Pure.

    claiming -> active <-> doubt        (any) -> gone
                active  -> draining  -> gone

Nothing starts unless the partition is active or draining, and the process was not paused since the record was read.
"""

from collections import deque
from enum import Enum, auto

import msgspec

from catga_bus.partition.protocol import Claimed
from catga_bus.partition.records import MAX_EPOCH, Held, Mark, Standing
from catga_bus.transport.jetstream import DeliveredMessage

NEWBORN = 1.0
"""Seconds after a consumer's creation for which "nobody there" only means that the server to which this node is
connected does not know of it yet; asked again it does (within 10 ms in a cluster of three on one machine)."""


class Do(Enum):
    """What is to be done about an event."""

    NOTHING = auto()
    TAKE = auto()
    """Give the record to the work."""

    KEEP = auto()
    """The record was delivered again; the work has it."""

    ACKNOWLEDGE = auto()
    """The record was done before: acknowledge it again."""

    PULL = auto()
    """Ask for records again."""

    PAUSE = auto()
    RESUME = auto()
    RECLAIM = auto()
    """Start nothing, stop pulling, read the record; still mine: a new epoch."""

    FINISH = auto()
    """Stop pulling, finish what has begun, confirm the acknowledgements, release."""

    DROP = auto()
    """It is another's: stop everything, acknowledge nothing."""


class _InHand(msgspec.Struct):
    reply: str
    time: float


class Tenure:
    """One partition in the hands of one node.

    Records are known by their sequence, across the epochs of one tenure: what is still in hand is not begun twice, what
    is done is acknowledged again and not repeated. A server that lost its last writes may give a sequence twice; the
    time at which a record was stored tells.

    Args:
        window: Records that may be in hand.
    """

    def __init__(self, window: int) -> None:
        self.standing = Standing.CLAIMING
        self.claimed: Claimed | None = None
        self.held: Held | None = None
        """The record as it was last written."""

        self.above = 0
        """The highest epoch of which this node has heard."""

        self.reason = ""
        """Why it is in doubt or gone; what is before a colon is the same for all of a kind."""

        self.pauses = 0
        """How often this process was found to have stood still; what was read before one says nothing about it."""

        self.returning = 0
        """Records in hand that the consumer of the present epoch has yet to deliver again, at most."""

        self._window = window
        self._fence = 0
        self._is_fenced = False
        self._killer: Mark | None = None
        self._careful = 0  # records that are still to be done one frame at a time
        self._is_suspended = False
        self._later = ""  # doubt that arose while claiming
        self._next = 1  # consumer sequence of the next delivery
        self._in_hand: dict[int, _InHand] = {}  # bounded by the window: the server delivers no more
        self._bottom = self._top = 0  # lowest and highest sequence taken
        self._top_time = 0.0
        self._acks: deque[str] = deque(maxlen=window)
        # The server delivers no more than `window` beyond what it has seen acknowledged, and sees acknowledgements in
        # order: only the last `window` of them may be lost.
        self._may_have_lost_acks = False

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The present epoch; 0 before the first."""
        return self.claimed.epoch if self.claimed is not None else 0

    @property
    def fence(self) -> int:
        """The epoch that effects carry: the first of those that followed each other without another owner in between.

        So what was begun before a new epoch of one's own may be finished after it, whatever the store has seen by then.
        """
        return self._fence

    @property
    def may_start(self) -> bool:
        """Whether frames may be begun."""
        return self.standing in (Standing.ACTIVE, Standing.DRAINING) and not self._is_suspended

    @property
    def is_careful(self) -> bool:
        """Whether frames are run one at a time, each marked before: until all that was in hand at a death is done."""
        return self._careful > 0

    @property
    def floor(self) -> int:
        """Everything up to this sequence that was delivered is done; 0 if nothing is known."""
        return min(self._in_hand) - 1 if self._in_hand else self._top

    def killer(self, sequence: int) -> int | None:
        """Return the index of the frame in a record that has killed its process."""
        killer = self._killer
        return killer.index if killer is not None and killer.sequence == sequence else None

    # -- claims ----------------------------------------------------------------------------------------------

    def pulling(self, killer: Mark | None) -> None:
        """A consumer of a new epoch begins to deliver.

        Args:
            killer: The frame that the owner before had begun when it was lost, if it is known.
        """
        self._killer = killer or self._killer
        self._next = 1
        self._later = ""
        self.returning = len(self._in_hand)

    def granted(self, claimed: Claimed) -> Do:
        """The claim is confirmed."""
        if self.standing is Standing.GONE:
            return Do.DROP
        self.claimed, self.held = claimed, claimed.held
        if self._is_fenced or not self._fence or not claimed.continues:
            self._fence, self._is_fenced = claimed.epoch, False
        if not claimed.is_careful:
            self._careful = 0
        elif not self.is_careful:
            self._careful = self._window
        self._acks.clear()
        self._may_have_lost_acks = False
        self.standing = Standing.ACTIVE
        if self._later:
            return self.doubt(self._later)
        if self.above > self.epoch:
            return self.doubt("a higher epoch was heard")
        self.reason = ""
        return Do.NOTHING if self._is_suspended else Do.RESUME

    def ended(self, reason: str) -> Do:
        """It is another's, or has been released."""
        self.standing, self.reason = Standing.GONE, reason
        self._in_hand.clear()
        return Do.DROP

    # -- records ---------------------------------------------------------------------------------------------

    def delivered(self, record: DeliveredMessage) -> Do:
        """A record has come."""
        if self.standing in (Standing.DRAINING, Standing.GONE) or self._later:
            return Do.NOTHING
        if record.consumer_sequence != self._next:
            return self.doubt("deliveries were lost")
        self._next += 1
        sequence, time = record.sequence, record.time
        known = self._in_hand.get(sequence)
        if known is None:
            if self._bottom <= sequence <= self._top and time <= self._top_time:
                self.returning = max(0, self.returning - 1)
                return Do.ACKNOWLEDGE
            self._bottom = min(self._bottom or sequence, sequence)
            if sequence > self._top:
                self._top, self._top_time = sequence, time
            self._in_hand[sequence] = _InHand(record.reply, time)
            return Do.TAKE
        if known.time != time:
            return self.ended("the stream has lost records and given their sequences again")
        known.reply = record.reply
        self.returning = max(0, self.returning - 1)
        return Do.KEEP

    def finished(self, sequence: int) -> str:
        """A record is done; return where it is to be acknowledged, or nothing if it is not."""
        known = self._in_hand.pop(sequence, None)
        if known is None:
            return ""
        if self._careful:
            self._careful -= 1
        self._acks.append(known.reply)
        return known.reply

    def unconfirmed(self) -> list[str]:
        """Return the acknowledgements to send before a release, in order; the last of them is to be confirmed."""
        if self._may_have_lost_acks:
            self._may_have_lost_acks = False
            return list(self._acks)
        return list(self._acks)[-1:]

    # -- doubt -----------------------------------------------------------------------------------------------

    def doubt(self, reason: str) -> Do:
        """Records may have been lost on the way, or the partition."""
        if self.standing is Standing.ACTIVE:
            self.standing, self.reason = Standing.DOUBT, reason
            return Do.RECLAIM
        if self.standing in (Standing.CLAIMING, Standing.DOUBT):
            self._later = reason
        return Do.NOTHING

    def status(self, code: int, text: str, age: float) -> Do:
        """The server says something about a pull.

        Args:
            code: 100, 404, 408, 409, 503.
            text: Its words.
            age: Seconds since the consumer was made.
        """
        if code in (100, 404, 408):
            return Do.NOTHING
        if code == 503 and age < NEWBORN:
            return Do.PULL
        return self.doubt(f"status {code}: {text}")

    def heard(self, epoch: int) -> Do:
        """Another node says that it owns the partition, with this epoch."""
        if not self.above < epoch <= MAX_EPOCH:
            return Do.NOTHING
        self.above = epoch
        return (
            self.doubt("a higher epoch was heard")
            if self.standing is Standing.ACTIVE and epoch > self.epoch
            else Do.NOTHING
        )

    def fenced(self, epoch: int) -> Do:
        """The store has refused an effect because it has seen a higher epoch: this one, or 0 if it does not say."""
        self.above = max(self.above, min(epoch, MAX_EPOCH))
        self._is_fenced = True
        if self.standing is Standing.DRAINING:  # what has begun will never be done here
            return self.ended("the store refused an effect")
        return self.doubt("the store refused an effect")

    def reconnected(self) -> Do:
        """The connection was lost and is back: deliveries and acknowledgements may have been lost with it."""
        self._may_have_lost_acks = True
        return self.doubt("the connection was lost")

    # -- pauses ----------------------------------------------------------------------------------------------

    def suspend(self) -> Do:
        """The process was paused: it may have lost the partition long ago."""
        if self.standing is Standing.GONE:
            return Do.NOTHING
        self._is_suspended = True
        self.pauses += 1
        return Do.PAUSE

    def reread(self, found: Held, pauses: int) -> Do:
        """The record was read after a pause.

        Args:
            found: What was found.
            pauses: How many there had been when it was asked for.
        """
        if pauses != self.pauses:
            return Do.NOTHING  # the answer lay in the socket during another one, after which it is read again
        self._is_suspended = False
        if self.standing not in (Standing.ACTIVE, Standing.DRAINING):
            return Do.NOTHING
        if found.record is None and self.standing is Standing.ACTIVE:
            return self.doubt("the record is gone")
        written = self.held.record if self.held is not None else None
        if found.record is not None and (written is None or found.record.nonce != written.nonce):
            return self.ended("another node has claimed it during a pause")
        return Do.RESUME

    # -- the end ---------------------------------------------------------------------------------------------

    def hand_over(self) -> Do:
        """It is to be given away."""
        if self.standing is not Standing.ACTIVE:
            return Do.NOTHING
        self.standing = Standing.DRAINING
        return Do.FINISH
