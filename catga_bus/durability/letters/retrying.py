"""Gives dead letters another try: each goes back on the work queue of its service, and is removed once it is stored.

A message keeps its id. Handlers that failed have left no mark in the inbox, so it is run; one that was done after all,
by an attempt that ended late, is answered from the mark and does nothing twice. What it sends keeps its derived ids.

An event goes to the service that gave it up and to no other: it comes by the work queue, on the partition of its key.
There it stands in line with the commands and the retried events of its key, but not with the events of that key that
come from the log meanwhile.

A retry that is cut off between storing and removing leaves the letter, and the message in the queue as well: trying
again within two minutes stores nothing, later it stores the message a second time, under the same id.
"""

from collections.abc import Awaitable, Callable
from hashlib import blake2b

import msgspec

from catga_bus.durability.letters.dead_letters import Buried, DeadLetters
from catga_bus.durability.letters.letters import DeadLetter, Reason
from catga_bus.durability.letters.work_queue import BATCH_BYTES, BATCH_RECORDS, Queued, WorkQueue, record_of
from catga_bus.errors import CatgaError
from catga_bus.partition.hashing import partition_of
from catga_bus.wire import MessageFrame


class CannotRetryError(CatgaError):
    """A dead letter cannot be put back."""


MAX_LANES = 500_000
"""Keys that are remembered because a letter of theirs stays, about 100 bytes each."""


class Tally(msgspec.Struct, frozen=True):
    """What became of several letters."""

    done: int
    """Retried, or dropped."""

    left: int = 0
    """Asked for and left, because they cannot be put back."""

    behind: int = 0
    """Asked for and left, because an earlier letter with their key stays."""


def queued_of(buried: Buried, stream: str, queue: WorkQueue) -> Queued:
    """Return what is put on the work queue for a letter.

    Args:
        buried: The letter.
        stream: The stream of dead letters that it lies in.
        queue: The work queue; nothing is done with it.

    Raises:
        CannotRetryError: It is not whole, or no letter at all.
        CatgaError: Its key cannot be hashed.
    """
    letter = buried.letter
    if letter is None:
        raise CannotRetryError(f"number {buried.number} is no dead letter: {buried.fault}")
    if letter.missing:
        raise CannotRetryError(
            f"letter {buried.number} lacks {letter.missing:,} bytes, which the server would not take; send it anew"
        )
    message_id = f"{stream}.{buried.number}.{letter.mark}"
    partition = _partition_of(letter, queue)
    if letter.reason is Reason.UNDECODABLE:  # a record that could not be read, as it is: a newer node may be able to
        return Queued(partition, letter.body, message_id)
    frame = MessageFrame(letter.id, letter.type, letter.key, None, 1, letter.trace, msgspec.Raw(letter.body))
    return Queued(partition, record_of(letter.sender, [frame]), message_id)


def _partition_of(letter: DeadLetter, queue: WorkQueue) -> int:
    """Return where a letter goes: a command where it lay, even if it was sent to the wrong place; an event by its key.

    The log of events may have another number of partitions. Of a record that cannot be read its own says most.
    """
    last = letter.subject.rpartition(".")[2]
    lay_in = int(last) if last.isascii() and last.isdigit() else 0
    if letter.stream == queue.stream or letter.reason is Reason.UNDECODABLE:
        return lay_in % queue.partitions
    return partition_of(letter.lane, queue.partitions)


async def retry_one(letters: DeadLetters, queue: WorkQueue, buried: Buried) -> None:
    """Put one letter back and remove it.

    Raises:
        CannotRetryError: It cannot be put back.
        CatgaError: It could not be stored; it is still a dead letter.
    """
    record = queued_of(buried, letters.stream, queue)
    await queue.put(record.partition, record.payload, record.message_id)
    await letters.remove(buried.number)


async def retry_many(
    letters: DeadLetters,
    queue: WorkQueue,
    is_wanted: Callable[[DeadLetter], bool],
    on_progress: Callable[[int], None] = lambda _: None,
    *,
    in_order: bool = True,
) -> Tally:
    """Put letters back and remove them: those of one key in the order in which they were buried.

    Those that are buried meanwhile are not looked at: a message that fails again would come by for ever.

    Args:
        letters: The dead letters.
        queue: The work queue of the same service.
        is_wanted: Which.
        on_progress: Told how many are done.
        in_order: Whether those stay that have an earlier one with their key, which stays.

    Raises:
        CatgaError: One could not be stored; it and those behind it are still dead letters.
    """
    done = left = behind = size = 0
    batch: list[Queued] = []
    staying = _Lanes() if in_order else None

    async def flush() -> None:
        nonlocal done, size
        await queue.put_all(batch)
        done += len(batch)
        size = 0
        batch.clear()
        on_progress(done)

    async for buried in letters.oldest_first():
        letter = buried.letter
        if letter is None:
            continue
        if not is_wanted(letter):
            if staying is not None:
                staying.add(letter)
            continue
        if staying is not None and letter in staying:
            behind += 1
            continue
        try:
            record = queued_of(buried, letters.stream, queue)
        except CatgaError:
            left += 1
            if staying is not None:
                staying.add(letter)
            continue
        batch.append(msgspec.structs.replace(record, then=_removal(letters, buried.number)))
        size += buried.size_bytes
        if len(batch) >= BATCH_RECORDS or size >= BATCH_BYTES:
            await flush()
    await flush()
    return Tally(done, left, behind)


class _Lanes:
    """The keys of letters that stay."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def add(self, letter: DeadLetter) -> None:
        if letter.key is not None:
            self._hashes.add(self._hash(letter.key))
            if len(self._hashes) > MAX_LANES:
                raise CannotRetryError(
                    f"more than {MAX_LANES:,} keys have letters that are to stay; retry all, or out of order"
                )

    def __contains__(self, letter: DeadLetter) -> bool:
        return letter.key is not None and self._hash(letter.key) in self._hashes

    def _hash(self, key: str) -> bytes:
        return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _removal(letters: DeadLetters, number: int) -> Callable[[], Awaitable[bool]]:
    return lambda: letters.remove(number)


async def drop_many(
    letters: DeadLetters,
    is_wanted: Callable[[Buried], bool],
    on_progress: Callable[[int], None] = lambda _: None,
    *,
    through: int | None = None,
) -> Tally:
    """Remove letters for good.

    Args:
        letters: The dead letters.
        is_wanted: Which; also asked about what is no letter.
        on_progress: Told how many are done.
        through: The last number. None: the last one there is now.
    """
    done = 0
    async for buried in letters.oldest_first(through=through):
        if is_wanted(buried):
            await letters.remove(buried.number)
            done += 1
            on_progress(done)
    return Tally(done)
