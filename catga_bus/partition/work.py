"""The seam between who keeps a partition and what is done with its records.

The keeper decides *whether*: it owns the partition, pulls, checks that nothing was lost on the way, and acknowledges.
The work decides *what*: it takes records apart, runs their frames in lanes, and says when a record is done.
"""

from typing import Protocol

from catga_bus.effects import Fence as Fence  # where keepers look for it
from catga_bus.transport.jetstream import DeliveredMessage


class Keeping(Protocol):
    """What the work needs from the keeper of its partition."""

    @property
    def fence(self) -> Fence:
        """Partition and present epoch."""
        ...

    @property
    def is_careful(self) -> bool:
        """Whether processes have died here: then one frame at a time, each marked before it starts."""
        ...

    def done(self, sequence: int) -> None:
        """A record is done: acknowledge it."""

    def lost(self, epoch: int = 0) -> None:
        """The store's fence refused an effect: it has seen this higher epoch, 0 if it does not say."""

    async def mark(self, sequence: int, index: int) -> None:
        """Write down which frame is about to start, so that whoever claims after a crash knows; careful mode only.

        Raises:
            StaleError: The partition is somebody else's.
        """

    async def unmark(self) -> None:
        """Write down that the marked frame has ended without killing the process."""


class Work(Protocol):
    """What is done with the records of one partition. All but `finish` return at once."""

    @property
    def wanted(self) -> int:
        """For how many more records there is room in the window, beside those in hand; 0 when it is full."""
        ...

    @property
    def highest(self) -> int:
        """The highest sequence of a record that was begun or done in this process; 0 if none was."""
        ...

    def holds(self, sequence: int) -> bool:
        """Whether a record is in hand: taken and not done."""
        ...

    def take(self, record: DeliveredMessage, *, killer: int | None = None) -> None:
        """Take a record that is neither in hand nor done; nothing of it starts while the work is paused.

        Args:
            record: The record.
            killer: Index of the frame that has killed its process: it becomes a dead letter without being run.
        """

    def pause(self) -> None:
        """Start nothing more; what runs goes on. So it begins."""

    def resume(self) -> None:
        """Go on."""

    async def finish(self, *, below: bool) -> None:
        """Forget what has not begun, and return when all that has is done.

        A record has begun when one of its frames has; what it waits for in its lanes is finished, too.

        Args:
            below: Whether everything below the highest record begun or done is finished as well (event log).
        """

    def drop(self) -> None:
        """Forget everything: another node owns the partition. What runs ends unacknowledged and unanswered."""
