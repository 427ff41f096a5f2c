"""Packs frames for one subject into batches: one message on the wire per subject and turn of the event loop.

There is no timer: what was added in a turn leaves at its end, so a lone message is not held back and a crowd travels
together. While the transport is behind, or has no connection, nothing is handed to it and frames wait here.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

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
        frames: The frames of the open batch.
        number: The number of the open batch, unique in the coalescer.
        sums: Whatever the owner adds up per batch for `seal`; 0 at the beginning of each batch.
    """

    __slots__ = ("_coalescer", "frames", "limit", "number", "seal", "size", "subject", "sums")

    def __init__(self, coalescer: "Coalescer", subject: str, limit: int, seal: "Seal") -> None:
        self._coalescer = coalescer
        self.subject = subject
        self.limit = limit
        self.seal = seal
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


class Coalescer:
    """The lanes of one connection.

    Args:
        transport: Where batches go.
        max_frames: The most frames of a batch, unless a lane says less.
        max_bytes: A batch is closed before its frames would exceed this; a single larger frame travels alone.
        max_held_bytes: Bound of what waits while the connection is behind or gone; see `is_full`.

    Attributes:
        is_blocked: Whether frames are held because the connection is behind or gone: who can wait should, with
            `wait_room`. A plain attribute, because every call looks at it.
    """

    def __init__(self, transport: Transport, *, max_frames: int, max_bytes: int, max_held_bytes: int) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self.max_frames = max_frames
        self.max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._numbers = 0
        self._open: list[Lane] = []  # lanes with an open batch, in the order of their first frame
        self._closed: list[tuple[Lane, int, list[bytes], float]] = []  # full batches of this turn
        self._scheduled = False
        self._held_bytes = 0
        self.is_blocked = False
        self._waiter: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._watchers: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self._batches = 0
        self._frames = 0
        self._lost = 0

    @property
    def is_full(self) -> bool:
        """Whether the bound of held bytes is reached: who cannot wait must drop."""
        return self.is_blocked and self._held_bytes > self._max_held_bytes

    def statistics(self) -> CoalescerStatistics:
        """Return the counts so far."""
        held = sum(len(frames) for _, _, frames, _ in self._closed) + sum(len(lane.frames) for lane in self._open)
        return CoalescerStatistics(self._batches, self._frames, held, self._lost)

    def lane(self, subject: str, seal: Seal, *, limit: int | None = None) -> Lane:
        """Return a new lane to a subject; the caller keeps it and lets it go when it likes."""
        return Lane(self, subject, self.max_frames if limit is None else limit, seal)

    def watch(self, blocked: Callable[[], None], free: Callable[[], None]) -> None:
        """Have `blocked` called whenever holding begins, and `free` whenever it ends."""
        self._watchers.append((blocked, free))

    async def wait_room(self) -> None:
        """Wait until frames are no longer held."""
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
        """Set a lane's full batch aside, in order (for `Lane`)."""
        self._open.remove(lane)
        self._closed.append((lane, lane.number, lane.frames, lane.sums))
        if self.is_blocked:
            self._held_bytes += lane.size

    def _flush(self) -> None:
        self._scheduled = False
        if self.is_blocked:
            return
        if self._transport.is_behind or not self._transport.is_connected:
            self._block()
            return
        self.flush()

    def flush(self) -> None:
        """Hand everything to the transport now, without looking whether it is behind."""
        closed, opened = self._closed, self._open
        self._closed, self._open = [], []
        publish = self._transport.publish
        for lane, number, frames, sums in closed:
            self._send(publish, lane, number, frames, sums)
        for lane in opened:
            frames = lane.frames
            lane.frames = []
            self._send(publish, lane, lane.number, frames, lane.sums)
        self._transport.push()

    def _send(self, publish: Any, lane: Lane, number: int, frames: list[bytes], sums: float) -> None:
        payload, reply = lane.seal(number, frames, sums)
        try:
            publish(lane.subject, payload, reply=reply)
        except CatgaError as error:
            self._lost += len(frames)
            log.warning("%d frames for %s were lost: %s", len(frames), lane.subject, error)
            return
        self._batches += 1
        self._frames += len(frames)

    def _block(self) -> None:
        self.is_blocked = True
        self._room.clear()
        self._held_bytes = sum(lane.size for lane in self._open)
        for blocked, _ in self._watchers:
            blocked()
        self._waiter = self._loop.create_task(self._wait_writable())

    async def _wait_writable(self) -> None:
        if self._transport.is_connected:
            await self._transport.wait_writable()
        if self._transport.is_connected:
            self._unblock()

    def _unblock(self) -> None:
        self.is_blocked = False
        self._held_bytes = 0
        if self._closed or self._open:
            self.flush()
        self._room.set()
        for _, free in self._watchers:
            free()

    def reconnected(self) -> None:
        """The connection is back: send what is held."""
        if self.is_blocked and (self._waiter is None or self._waiter.done()):  # else the waiter will see it
            self._unblock()

    def drop(self) -> None:
        """Forget what is held and let go who waits for room: callers see themselves that there is no connection."""
        for _, _, frames, _ in self._closed:
            self._lost += len(frames)
        for lane in self._open:
            self._lost += len(lane.frames)
            lane.frames = []
        self._closed, self._open = [], []
        if self.is_blocked:
            self._unblock()

    async def close(self) -> None:
        """Send what can be sent and stop waiting for the rest."""
        if self._waiter is not None:
            self._waiter.cancel()
            await asyncio.gather(self._waiter, return_exceptions=True)
        if self._transport.is_connected:
            self.flush()
        else:
            self.drop()
        self._room.set()
