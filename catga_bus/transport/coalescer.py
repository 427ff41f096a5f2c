"""Packs frames for one subject into batches: one message on the wire per subject and turn of the event loop.

There is no timer: what was added in a turn leaves at its end, so a lone message is not held back and a crowd travels
together. A flush stops as soon as the transport is behind, so that the socket's buffer stays near its limit. What is
left then, or without a connection, is held here, or given back to the owner of its lane if that wants it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from catga_bus.errors import CatgaError
from catga_bus.transport.base import Transport

log = logging.getLogger("catga_bus.transport")


class CoalescerStatistics(msgspec.Struct, frozen=True):
    """What a coalescer has done; counts since start."""

    batches: int
    frames: int
    held_frames: int
    """Frames that wait for the connection now."""

    lost_frames: int
    """Frames given up because the connection was lost or over the bound."""

    @property
    def frames_per_batch(self) -> float:
        """Mean number of frames per message on the wire; 0 before the first."""
        return self.frames / self.batches if self.batches else 0.0


class Lane:
    """The open batch of one subject. Made by `Coalescer.lane`; frames keep the order in which they were added.

    Attributes:
        subject: Where its batches go.
        limit: The most frames of a batch; may be changed at any time.
        returnable: Whether frames that cannot leave are given back instead of held.
        frames: The frames of the open batch.
        size: Their bytes.
        number: The number of the open batch, unique in the coalescer.
        sums: Whatever the owner adds up per batch for `seal`; 0 at the beginning of each batch.
    """

    __slots__ = ("_coalescer", "frames", "limit", "number", "returnable", "seal", "size", "subject", "sums")

    def __init__(self, coalescer: "Coalescer", subject: str, limit: int, seal: "Seal", *, returnable: bool) -> None:
        self._coalescer = coalescer
        self.subject = subject
        self.limit = limit
        self.seal = seal
        self.returnable = returnable
        self.frames: list[bytes] = []
        self.size = 0
        self.number = 0
        self.sums = 0.0

    def add(self, frame: bytes) -> int:
        """Add one frame and return the number of its batch."""
        frames = self.frames
        coalescer = self._coalescer
        size = self.size + len(frame)
        if frames:
            if len(frames) < self.limit and size <= coalescer.max_bytes:
                frames.append(frame)
                self.size = size
                return self.number
            coalescer.close_batch(self)
        self.frames = [frame]
        self.size = len(frame)
        self.sums = 0.0
        self.number = coalescer.open_batch(self)
        return self.number


Seal = Callable[[int, Sequence[bytes], float], tuple[bytes, str]]
"""Makes a payload and a reply subject out of a batch's number, frames and sums."""


class _Batch(msgspec.Struct, frozen=True):
    lane: Lane
    number: int
    frames: list[bytes]
    sums: float
    size: int


class Owner(Protocol):
    """Who is told of the batches of returnable lanes."""

    def on_held(self, numbers: set[int]) -> None:
        """These batches did not leave, and are forgotten here; `on_room` will come."""

    def on_refused(self, number: int, error: CatgaError) -> None:
        """The transport refused this batch."""

    def on_room(self) -> None:
        """The connection takes messages again."""


class Coalescer:
    """The lanes of one connection.

    Args:
        transport: Where batches go.
        max_frames: The most frames of a batch, unless a lane says less.
        max_bytes: A batch is closed before its frames would exceed this; a single larger frame travels alone. Never
            more than half of what the server takes.
        max_held_bytes: Bound of what waits while the connection is behind or gone; see `is_full`.

    Attributes:
        is_blocked: Whether nothing leaves because the connection is behind or gone: who can wait should, with
            `wait_room`. A plain attribute, because every call looks at it.
        owner: Of the returnable lanes.
    """

    def __init__(self, transport: Transport, *, max_frames: int, max_bytes: int, max_held_bytes: int) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.max_frames = max_frames
        self._most_bytes = max_bytes
        self.max_bytes = min(max_bytes, transport.max_payload // 2)
        self._max_held_bytes = max_held_bytes
        self.owner: Owner | None = None
        self.is_blocked = False
        self._numbers = 0
        self._open: list[Lane] = []  # lanes with an open batch, in the order of their first frame
        self._closed: deque[_Batch] = deque()  # full batches, in order
        self._closed_bytes = 0
        self._scheduled = False
        self._waiter: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._watchers: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self._batches = 0
        self._frames = 0
        self._lost = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes of frames that have not been handed to the transport."""
        return self._closed_bytes + sum(lane.size for lane in self._open)

    @property
    def is_full(self) -> bool:
        """Whether the bound of held bytes is reached: who cannot wait must drop."""
        return self.is_blocked and self.queued_bytes > self._max_held_bytes

    def statistics(self) -> CoalescerStatistics:
        """Return the counts so far."""
        held = sum(len(batch.frames) for batch in self._closed) + sum(len(lane.frames) for lane in self._open)
        return CoalescerStatistics(self._batches, self._frames, held, self._lost)

    def lane(self, subject: str, seal: Seal, *, limit: int | None = None, returnable: bool = False) -> Lane:
        """Return a new lane to a subject; the caller keeps it and lets it go when it likes."""
        return Lane(self, subject, self.max_frames if limit is None else limit, seal, returnable=returnable)

    def watch(self, blocked: Callable[[], None], free: Callable[[], None]) -> None:
        """Have `blocked` called whenever holding begins, and `free` whenever it ends."""
        self._watchers.append((blocked, free))

    async def wait_room(self) -> None:
        """Wait until the connection takes messages again."""
        while self.is_blocked:
            await self._room.wait()

    def open_batch(self, lane: Lane) -> int:
        """Take note of a lane's first frame (for `Lane`)."""
        self._open.append(lane)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        self._numbers += 1
        return self._numbers

    def close_batch(self, lane: Lane) -> None:
        """Set a lane's batch aside, in order (for `Lane`)."""
        self._open.remove(lane)
        self._set_aside(lane)

    def _set_aside(self, lane: Lane) -> None:
        self._closed.append(_Batch(lane, lane.number, lane.frames, lane.sums, lane.size))
        self._closed_bytes += lane.size
        lane.frames = []
        lane.size = 0

    def check(self) -> None:
        """Block if the transport is behind: for those who publish beside the lanes."""
        if not self.is_blocked and self._transport.is_behind:
            self._block()

    def _flush(self) -> None:
        self._scheduled = False
        if not self.is_blocked:
            self.flush()

    def flush(self) -> None:
        """Hand to the transport what it takes; block with the rest."""
        for lane in self._open:
            self._set_aside(lane)
        self._open = []
        transport, closed = self._transport, self._closed
        unseen = _LOOK_BYTES
        while closed:
            if unseen >= _LOOK_BYTES:
                if not transport.is_connected or transport.is_behind:
                    break
                unseen = 0
            batch = closed.popleft()
            self._closed_bytes -= batch.size
            unseen += batch.size
            self._send(batch)
        transport.push()
        if closed and not self.is_blocked:
            self._block()

    def _send(self, batch: _Batch) -> None:
        lane = batch.lane
        payload, reply = lane.seal(batch.number, batch.frames, batch.sums)
        try:
            self._transport.publish(lane.subject, payload, reply=reply)
        except CatgaError as error:
            self._lost += len(batch.frames)
            if lane.returnable and self.owner is not None:
                self.owner.on_refused(batch.number, error)
            else:
                log.warning("%d frames for %s were lost: %s", len(batch.frames), lane.subject, error)
            return
        self._batches += 1
        self._frames += len(batch.frames)

    def _block(self) -> None:
        self.is_blocked = True
        self._room.clear()
        for blocked, _ in self._watchers:
            blocked()
        self._give_back()
        if self._waiter is None or self._waiter.done():
            self._waiter = self._loop.create_task(self._wait_writable())

    def _give_back(self) -> None:
        if self.owner is None:
            return
        numbers = {batch.number for batch in self._closed if batch.lane.returnable}
        for lane in [lane for lane in self._open if lane.returnable]:
            numbers.add(lane.number)
            lane.frames = []
            lane.size = 0
            self._open.remove(lane)
        self._closed = deque(batch for batch in self._closed if not batch.lane.returnable)
        self._closed_bytes = sum(batch.size for batch in self._closed)
        if numbers:
            self.owner.on_held(numbers)

    async def _wait_writable(self) -> None:
        # What was held may fill the connection again, so one wait may not be enough.
        while self.is_blocked and self._transport.is_connected:
            await self._transport.wait_writable()
            await asyncio.sleep(0)
            if self._transport.is_connected:
                self._unblock()

    def _unblock(self) -> None:
        self.is_blocked = False
        self.flush()
        if self.is_blocked:
            return  # what was held has filled the connection again
        self._room.set()
        for _, free in self._watchers:
            free()
        if self.owner is not None:
            self.owner.on_room()

    def reconnected(self) -> None:
        """The connection is back: send what is held, within what this server takes."""
        self.max_bytes = min(self._most_bytes, self._transport.max_payload // 2)
        if self.is_blocked and (self._waiter is None or self._waiter.done()):  # else the waiter will see it
            self._unblock()

    def drop(self) -> None:
        """Give back or forget everything, and let go who waits for room: the connection is gone, as they will see."""
        self._give_back()
        self._lost += sum(len(batch.frames) for batch in self._closed) + sum(len(lane.frames) for lane in self._open)
        for lane in self._open:
            lane.frames = []
            lane.size = 0
        self._open = []
        self._closed.clear()
        self._closed_bytes = 0
        self.is_blocked = False
        self._room.set()

    async def close(self) -> None:
        """Send what can be sent and forget the rest."""
        if self._waiter is not None:
            self._waiter.cancel()
            await asyncio.gather(self._waiter, return_exceptions=True)
        if self._transport.is_connected:
            self.flush()
        if self._waiter is not None:
            self._waiter.cancel()
            await asyncio.gather(self._waiter, return_exceptions=True)
        self.drop()


_LOOK_BYTES = 262_144
# How many bytes are handed over between two looks at the socket's buffer: a look costs as much as a small batch.
