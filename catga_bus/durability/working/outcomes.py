"""Outcomes: what becomes of a stored message when an attempt at it has ended.

    OK, REFUSED          committed in the inbox, then answered, then its record may be acknowledged
    FAILED               tried again after a pause, its key being held; after `max_attempts` a dead letter
    INVALID              a dead letter
    BUSY, EXPIRED        it was not started: put off

A dead letter is noted in the inbox before its key goes on. Else the next owner, to whom its record comes once more if
this node dies now, would run it behind what came after it.

A message whose thread runs on past its deadline has not ended: what becomes of it is decided when the thread has.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import msgspec

from catga_bus.dispatch.deliveries import Delivery
from catga_bus.dispatch.failures import describe
from catga_bus.durability.inbox.base import FencedError, Recorded
from catga_bus.durability.letters.letters import DeadLetter, Reason
from catga_bus.durability.working.jobs import Doom, Job
from catga_bus.durability.working.shop import Shop
from catga_bus.errors import Code
from catga_bus.partition.work import Fence, Keeping
from catga_bus.resilience.retry import RetryOptions, pause_before
from catga_bus.wire import BATCH_OVERHEAD, Fault, Status

PUT_OFF = RetryOptions(first=0.02, longest=1.0)
"""The pauses of what could not be started: a limit was reached, or the inbox or the log of dead letters failed."""

MIN_KILLS = 2
"""How many processes a message has killed, at least, when it is given up for that."""

T = TypeVar("T")

_encode = msgspec.msgpack.Encoder().encode
_decode_fault = msgspec.msgpack.Decoder(Fault).decode


class Outcomes:
    """The outcomes in one partition.

    Args:
        shop: What all partitions share.
        keeping: The keeper of this one.
        stream: Where its records lie.
    """

    def __init__(self, shop: Shop, keeping: Keeping, stream: str) -> None:
        self._shop = shop
        self._counts = shop.counts
        self._keeping = keeping
        self._stream = stream

    def settle(self, delivery: Delivery, status: Status, value: Any, seconds: float) -> None:
        """Take what a delivery has come to; see `catga_bus.dispatch.deliveries.Settle`."""
        job: Job = delivery.target
        assert job.place is not None
        bench = job.place.bench
        bench.out -= 1
        if delivery.stuck:
            self._counts.stuck += 1
            delivery.freed = partial(self._freed, status, value, seconds)
        else:
            self._ended(job, status, value, seconds)
        if bench.waiting:
            bench.refill()

    def _freed(self, status: Status, value: Any, seconds: float, delivery: Delivery) -> None:
        """The thread that ran on has ended."""
        self._counts.stuck -= 1
        self._ended(delivery.target, status, value, seconds)
        self._shop.dispatcher.wake()

    def _ended(self, job: Job, status: Status, value: Any, seconds: float) -> None:
        delivery, job.delivery = job.delivery, None
        is_recalled = delivery is not None and delivery.deadline == -math.inf
        job.hands.attempt_ended(job)
        if job.record.lost:
            self._abandon(job)
        elif status is Status.OK or status is Status.REFUSED:
            if job.unit is not None:
                self._shop.spawn(self._commit(job, status, value, seconds))
            else:
                self._conclude(job, status, value, seconds)
        elif status is Status.FAILED:
            self._failed(job, value)
        elif job.fault:
            fault, job.fault = job.fault, ""
            self.put_off(job, fault)
        elif status is Status.INVALID:
            self.bury(job, Doom(Reason.INVALID, value.message))
        elif is_recalled:
            job.hands.recalled(job)
        else:
            self.put_off(job, value.message)

    # -- done ------------------------------------------------------------------------------------------------

    def _conclude(self, job: Job, status: int, value: Any, seconds: float) -> None:
        """Answer, if somebody waits, and be done."""
        record = job.record
        if record.reply is not None and job.message.remaining_ms is not None:
            try:
                frame = _encode((job.message.id, status, value, self._shop.node_id))
            except Exception as error:
                self._failed(job, _not_encodable(job, error))
                return
            self._answer(job, record.reply, frame, seconds)
        if status == Status.OK:
            self._counts.handled += 1
        else:
            self._counts.refused += 1
        job.hands.done(job)

    def _answer(self, job: Job, inbox: str, frame: bytes, seconds: float) -> None:
        shop, message = self._shop, job.message
        most = shop.max_payload()
        if len(frame) + BATCH_OVERHEAD > most:
            text = f"the answer to {message.type} is {len(frame):,} bytes; the server takes {most:,}"
            fault = Fault(Code.TOO_LARGE, text)
            frame = shop.answers.fault(message.id, Status.FAILED, fault)
        lane = shop.answers.lane(inbox, message.type)
        lane.add(frame)
        lane.sums += seconds

    async def _commit(self, job: Job, status: Status, value: Any, seconds: float) -> None:
        """Commit the effects with the result; what another execution has recorded meanwhile counts instead."""
        unit = job.unit
        assert unit is not None
        try:
            result = Recorded(int(status), _encode(value))
        except Exception as error:
            self._failed(job, _not_encodable(job, error))
            return
        try:
            recorded = await unit.commit(result)
        except FencedError as error:
            job.unit = None
            self._fenced(job, error)
        except Exception as error:
            text = f"its effects could not be committed: {describe(error)}"
            self._shop.rare_log.warn("commit", "%s %.80r: %s", job.message.type, job.message.id, text)
            self._failed(job, Fault(Code.HANDLER_ERROR, text))
        else:
            job.unit = None
            if self._shop.relay is not None and job.fence is not None:
                self._shop.relay.send(job.fence, unit.outbound)
            if job.record.lost:
                job.hands.done(job)
            elif recorded == result:
                self._conclude(job, recorded.status, msgspec.Raw(recorded.body), seconds)
            else:
                self.repeat(job, recorded)
        self._shop.dispatcher.wake()

    def repeat(self, job: Job, recorded: Recorded) -> None:
        """The message was done before: give the same answer."""
        self._counts.duplicates += 1
        record, message = job.record, job.message
        if record.reply is not None and message.remaining_ms is not None:
            body = msgspec.Raw(recorded.body)
            self._answer(job, record.reply, _encode((message.id, recorded.status, body, self._shop.node_id)), 0.0)
        job.hands.done(job)

    def is_done(self, job: Job, recorded: Recorded) -> bool:
        """Return whether what the inbox knows of a message is of this record of it.

        A dead letter that is retried comes in a new record, and is run.
        """
        if recorded.status != Status.FAILED:
            return True
        details: object = _decode_fault(recorded.body).details
        return details == self._place_of(job)

    def _place_of(self, job: Job) -> dict[str, Any]:
        return {"stream": self._stream, "sequence": job.record.sequence}

    def _fenced(self, job: Job, error: FencedError) -> None:
        """The store has seen a higher epoch than that of the job."""
        self._check_fence(job, job.fence, error)
        if job.record.lost:
            job.hands.done(job)
        else:
            self.put_off(job, f"{error}")

    def _check_fence(self, job: Job, used: Fence | None, error: FencedError) -> None:
        """Find out whose the higher epoch is: of this node, which has claimed anew meanwhile, or of another one."""
        fence = self._keeping.fence
        if not job.record.lost and (used is None or fence.epoch <= used.epoch):
            self._counts.fenced += 1
            self._shop.rare_log.warn(
                "fenced", "%s %.80r was refused by the inbox, epoch %d: %s", job.message.type, job.message.id,
                fence.epoch, error,
            )  # fmt: skip
            self._keeping.lost(error.highest)

    # -- not done --------------------------------------------------------------------------------------------

    def _failed(self, job: Job, fault: Fault) -> None:
        """An attempt failed: forget its effects, then try again or give up."""
        if job.unit is None:
            self._try_again(job, fault)
        else:
            self._shop.spawn(self._roll_back(job, fault))

    async def _roll_back(self, job: Job, fault: Fault | None) -> None:
        """Forget the effects of an attempt; then go on, or if there is no fault let the key go."""
        unit, job.unit = job.unit, None
        assert unit is not None
        try:
            await unit.rollback()
        except Exception as error:  # the store forgets what was not committed by itself
            self._shop.rare_log.warn(
                "rollback", "%s: an attempt could not be rolled back: %s", self._stream, describe(error)
            )
        if fault is None or job.record.lost:
            job.hands.done(job)
        elif unit.failure is not None:
            self.put_off(job, f"{unit.failure}")  # the store is to blame, not the handler
        else:
            self._try_again(job, fault)
        self._shop.dispatcher.wake()

    def _try_again(self, job: Job, fault: Fault) -> None:
        assert job.place is not None
        options = job.place.bench.options
        error = f"{fault.code}: {fault.message}"
        attempt = job.attempt
        if attempt >= options.max_attempts:
            self.bury(job, Doom(Reason.ATTEMPTS, error))
            return
        self._counts.retries += 1
        job.hands.again(job, error, pause_before(attempt, options.retry, self._shop.rng.random()))
        assert job.trouble is not None
        job.trouble.failures += 1

    def put_off(self, job: Job, error: str) -> None:
        """Start a job later, without counting an attempt: it was not started, or may not count."""
        self._counts.delayed += 1
        delays = 1 if job.trouble is None else job.trouble.delays + 1
        job.hands.again(job, error, pause_before(delays, PUT_OFF, self._shop.rng.random()))
        assert job.trouble is not None
        job.trouble.delays = delays

    def _abandon(self, job: Job) -> None:
        """The record was forgotten: nothing of it is committed or answered."""
        if job.unit is None:
            job.hands.done(job)
        else:
            self._shop.spawn(self._roll_back(job, None))

    # -- given up --------------------------------------------------------------------------------------------

    def bury(self, job: Job, doom: Doom) -> None:
        """Give a message up: it is done when its dead letter is stored."""
        self._shop.spawn(self._bury(job, doom))

    async def _bury(self, job: Job, doom: Doom) -> None:
        shop, record, message = self._shop, job.record, job.message
        if job.unit is not None:
            unit, job.unit = job.unit, None
            with contextlib.suppress(Exception):  # the store forgets what was not committed by itself
                await unit.rollback()
        fault = Fault(Code.DEAD_LETTERED, f"{doom.reason}: {doom.error}", self._place_of(job))
        recorded = await self._find(job)
        if recorded is None and not record.lost:
            letter = letter_of(job, doom, service=shop.service, node=shop.node_id, stream=self._stream, utc=shop.utc())
            await self._insist(job, "a dead letter of %s cannot be stored: %s", partial(shop.letters.bury, letter))
            result = Recorded(int(Status.FAILED), _encode(fault))
            noted = await self._insist(job, "a dead letter of %s cannot be noted: %s", partial(self._note, job, result))
            recorded = noted if noted != result else None
        if record.lost:
            job.hands.done(job)
        elif recorded is not None:
            self.repeat(job, recorded)
        else:
            self._counts.dead_letters[doom.reason] += 1
            shop.rare_log.warn("dead", "%s %.80r is a dead letter (%s): %s", message.type, message.id, *doom)
            if record.reply is not None and message.remaining_ms is not None:
                self._answer(job, record.reply, shop.answers.fault(message.id, Status.FAILED, fault), 0.0)
            job.hands.done(job)
        shop.dispatcher.wake()

    async def _find(self, job: Job) -> Recorded | None:
        """Look up what was not looked up: its process may have died after the commit; others may know its type."""
        inbox = self._shop.inbox
        if inbox is None or job.is_known_new:
            return None
        look = partial(inbox.find, self._shop.service, job.message.id)
        recorded = await self._insist(job, "a message of %s cannot be looked up: %s", look)
        return recorded if recorded is not None and self.is_done(job, recorded) else None

    async def _note(self, job: Job, result: Recorded) -> Recorded:
        """Have the inbox know of a dead letter; return what it knows then."""
        inbox, fence = self._shop.inbox, self._keeping.fence
        if inbox is None:
            return result
        try:
            return await inbox.unit(self._shop.service, job.message.id, fence).commit(result)
        except FencedError as error:
            self._check_fence(job, fence, error)
            raise

    async def _insist(self, job: Job, text: str, call: Callable[[], Awaitable[T]]) -> T | None:
        """Call until it succeeds, or the record is forgotten: then return None."""
        shop, tries = self._shop, 0
        while not job.record.lost:
            try:
                return await call()
            except Exception as error:
                shop.rare_log.warn("bury", text, self._stream, describe(error))
            tries += 1
            await asyncio.sleep(pause_before(tries, PUT_OFF, shop.rng.random()))
        return None


def letter_of(job: Job, doom: Doom, *, service: str, node: str, stream: str, utc: float) -> DeadLetter:
    """Return the dead letter of a job.

    Args:
        job: Whose.
        doom: Why.
        service: Gives it up.
        node: The node that does.
        stream: Where its record lies.
        utc: Now: seconds since 1970.
    """
    message, stored = job.message, job.record.message
    attempts = 0 if job.trouble is None else job.trouble.failures
    if doom.reason is Reason.ATTEMPTS:
        attempts += 1  # the last one is not counted as a failure that is followed by another attempt
    elif doom.reason is Reason.KILLER:
        attempts = MIN_KILLS
    return DeadLetter(
        id=message.id,
        type=message.type,
        key=message.key,
        service=service,
        reason=doom.reason,
        error=doom.error,
        attempts=attempts,
        first_utc=stored.time,
        last_utc=utc,
        node=node,
        subject=stored.subject,
        stream=stream,
        sequence=stored.sequence,
        index=job.index,
        sender=job.record.sender,
        trace=message.trace,
        body=bytes(message.body),
    )


def _not_encodable(job: Job, error: Exception) -> Fault:
    name = job.place.station.name if job.place is not None else job.message.type
    return Fault(Code.HANDLER_ERROR, f"the answer of {name} cannot be encoded: {describe(error)}")
