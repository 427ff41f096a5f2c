"""Worker: the work of one partition. It takes records apart, starts their frames, and says when a record is done.

    taken -> lanes -> bench -> (looked up in the inbox) -> dispatcher -> outcome -> done

While it is paused nothing starts: what waits at the dispatcher is recalled. What was forgotten (`drop`, `finish`) ends
without a trace, but holds its key until it has ended: a record that comes back is not run beside it.
"""

import asyncio
import math
from collections.abc import Callable

from catga_bus.dispatch.deliveries import Delivery
from catga_bus.dispatch.failures import describe
from catga_bus.durability.inbox.base import Recorded
from catga_bus.durability.letters.letters import Reason
from catga_bus.durability.working.careful import Caution
from catga_bus.durability.working.jobs import Bench, Doom, Job, Queue
from catga_bus.durability.working.lookup import Lookup
from catga_bus.durability.working.opening import open_record
from catga_bus.durability.working.outcomes import Outcomes
from catga_bus.durability.working.share import Share
from catga_bus.durability.working.shop import Shop, WaitingKey
from catga_bus.durability.working.strangers import Strangers
from catga_bus.durability.working.troubles import Troubles
from catga_bus.effects import Stake
from catga_bus.partition.lanes import Lanes, Record, State
from catga_bus.partition.work import Keeping
from catga_bus.transport.jetstream import DeliveredMessage


class Worker:
    """The work of one partition; see `catga_bus.partition.work.Work`.

    Args:
        shop: What all partitions share.
        keeping: The keeper of this one.
        stream: Where its records lie.
        unknown: Told of a type that nobody here handles (empty: of a wire version that nobody here reads); returns
            whether the partition is about to be handed to a node that does.
        by_type: Whether the subjects of the stream name the type.
    """

    def __init__(
        self, shop: Shop, keeping: Keeping, stream: str, unknown: Callable[[str], bool], *, by_type: bool
    ) -> None:
        self._shop = shop
        self._keeping = keeping
        self._stream = stream
        self._by_type = by_type
        self._lanes: Lanes[Job] = Lanes()
        self._outcomes = Outcomes(shop, keeping, stream)
        self._settle = self._outcomes.settle
        self._lookup = None if shop.inbox is None else Lookup(shop, shop.inbox, self._found, self._not_found_out)
        self._caution = Caution(shop, keeping, self._pick, self._start_marked, self._outcomes.put_off)
        self._strangers = Strangers(shop, unknown, self._serve, self.again, self._lift, lambda: not self._is_finishing)
        self._troubles = Troubles(shop, keeping, stream, self._offer)
        self._share = Share(shop.relay)
        self._queues: dict[Bench, Queue] = {}
        self._aside: list[Job] = []  # what no handler takes, while nothing may start
        self._answered: list[int] = []  # records that are done and not reported yet
        self._behind: list[tuple[DeliveredMessage, int | None]] = []  # a record that nothing passes
        self._is_open = False  # whether anything may start
        self._is_direct = False  # whether jobs may start side by side
        self._is_finishing = False
        self._emptied = asyncio.Event()

    def succeed(self, before: "Worker") -> None:
        """Begin where an earlier tenure of this process has ended, some of whose handlers may still run.

        What they hold is not run beside them.
        """
        before.drop()
        self._caution.succeed(before._caution)  # noqa: SLF001 - the same class
        for job in self._lanes.inherit(before._lanes):  # noqa: SLF001 - the same class
            job.hands = self

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether anything may start."""
        return self._is_open

    @property
    def wanted(self) -> int:
        """For how many more records there is room in the window, beside those in hand; 0 when it is full."""
        return 0 if self._is_finishing or self._strangers.barrier is not None else self._lanes.wanted

    @property
    def highest(self) -> int:
        """The highest sequence of a record that was begun or done in this process; 0 if none was."""
        return self._lanes.highest

    def holds(self, sequence: int) -> bool:
        """Whether a record is in hand: taken and not done."""
        return (
            sequence in self._lanes.records
            or sequence in self._answered
            or any(message.sequence == sequence for message, _ in self._behind)
        )

    @property
    def records(self) -> int:
        """How many records are in hand."""
        return len(self._lanes.records) + len(self._behind)

    @property
    def frames(self) -> int:
        """How many messages are in hand."""
        return len(self._lanes)

    @property
    def waiting_keys(self) -> int:
        """How many keys are held back by a message that did not go through at once."""
        return len(self._troubles)

    def oldest(self) -> WaitingKey | None:
        """Return the key that has waited longest."""
        return self._troubles.oldest()

    # -- records in ------------------------------------------------------------------------------------------

    def take(self, record: DeliveredMessage, *, killer: int | None = None) -> None:
        """Take a record that is neither in hand nor done; nothing of it starts while the work is paused.

        Args:
            record: The record.
            killer: Index of the frame that has killed its process: it becomes a dead letter without being run.
        """
        if self._is_finishing:
            return
        if self._strangers.barrier is not None:
            self._behind.append((record, killer))
            return
        opened = open_record(self._shop, self, record, stream=self._stream, by_type=self._by_type)
        if killer is not None and killer < len(opened.frames):
            opened.frames[killer].doom = Doom(Reason.KILLER, "its process died while it ran, more than once")
        self._take(opened)
        self._shop.dispatcher.wake()

    def _take(self, record: Record) -> None:
        ready = self._lanes.take(record)
        if not record.frames:
            self._lanes.close(record)
            self._acknowledge(record.sequence)
            return
        self._strangers.meet(record)
        for job in ready:
            self._offer(job)
        if self._is_open and self._strangers.held is not None:
            self._strangers.consider()
        if self._lanes.is_full:
            self._troubles.say_full()

    # -- starting --------------------------------------------------------------------------------------------

    def _offer(self, job: Job) -> None:
        """Start a job that may start, now or when there is room."""
        place = job.place
        if place is None or job.doom is not None or self._strangers.held is not None:
            self._set_aside(job)
            return
        bench = place.bench
        if self._is_direct and bench.out < bench.limit and not bench.waiting:
            bench.out += 1
            self._start(job)
        else:
            self._queue(job, bench)

    def _queue(self, job: Job, bench: Bench) -> None:
        queue = self._queues.get(bench)
        if queue is None:
            queue = self._queues[bench] = Queue(self._start)
            queue.is_open = self._is_direct
        queue.jobs.append(job)
        if self._is_direct:
            bench.list(queue)
            bench.refill()
        elif self._is_open:
            self._caution.step()

    def _set_aside(self, job: Job) -> None:
        if self._is_open:
            self._serve(job)
        else:
            self._aside.append(job)

    def _serve(self, job: Job) -> None:
        """Do with a job that may start what there is to do with it."""
        strangers = self._strangers
        if strangers.held is not None and job.record is strangers.barrier:
            strangers.held.append(job)
        elif job.doom is not None:
            self._lanes.begin(job)
            self._outcomes.bury(job, job.doom)
        elif job.place is None:
            strangers.wait(job)
        else:
            self._queue(job, job.place.bench)

    def _start(self, job: Job) -> None:
        """Give a job, for which its bench has made room, to the dispatcher."""
        if self._lookup is None or job.is_known_new:
            self._submit(job)
        else:
            self._lookup.add(job)

    def _submit(self, job: Job) -> None:
        place, message = job.place, job.message
        assert place is not None
        job.delivery = delivery = Delivery(
            place.station,
            message.id,
            message.key,
            job.attempt,
            message.trace,
            job.record.sender,
            job,
            0,  # what is in hand is bounded by the window
            math.inf,
            self._settle,
            job,
        )
        self._shop.dispatcher.submit(delivery)

    def begin(self, job: Job) -> None:
        """The dispatcher starts a job."""
        self._lanes.begin(job)
        inbox, delivery = self._shop.inbox, job.delivery
        assert job.place is not None
        assert delivery is not None
        if inbox is not None:
            job.fence = self._keeping.fence
            job.unit = inbox.unit(self._shop.service, job.message.id, job.fence)
            delivery.stake = Stake(job.fence, job.unit)
        elif job.place.station.takes_context:
            delivery.stake = Stake(self._keeping.fence, None)

    def _found(self, job: Job, recorded: Recorded | None) -> None:
        """The inbox knows whether a job is done."""
        if job.record.lost or not self._is_open:
            self._give_back(job)
        elif recorded is None or not self._outcomes.is_done(job, recorded):
            job.is_known_new = True
            self._submit(job)
        else:
            self._leave_bench(job)
            self._lanes.begin(job)
            self._outcomes.repeat(job, recorded)

    def _not_found_out(self, job: Job, error: str) -> None:
        self._leave_bench(job)
        if not job.record.lost:
            self._outcomes.put_off(job, error)

    def _give_back(self, job: Job) -> None:
        """Take a job back that was not started after all."""
        self._leave_bench(job)
        if not job.record.lost:
            self._offer(job)

    def _leave_bench(self, job: Job) -> None:
        assert job.place is not None
        job.place.bench.out -= 1
        job.place.bench.refill()
        self._caution.ended(job)

    # -- one at a time ---------------------------------------------------------------------------------------

    def _pick(self) -> Job | None:
        """Take out the first job in stream order that may start."""
        if not self._is_open:
            return None
        if not self._keeping.is_careful:
            self.resume()  # what was in hand at a death is done: side by side again
            return None
        waiting = [
            (job.record.sequence, job.index, queue)
            for queue in self._queues.values()
            for job in queue.jobs
            if not job.record.lost
        ]
        if not waiting:
            return None
        sequence, index, queue = min(waiting, key=lambda one: one[:2])
        for place, job in enumerate(queue.jobs):
            if (job.record.sequence, job.index, job.record.lost) == (sequence, index, False):
                del queue.jobs[place]
                return job
        return None

    def _start_marked(self, job: Job) -> None:
        if job.record.lost or not self._is_open:
            self._caution.ended(job)
            if not job.record.lost:
                self._offer(job)
            return
        assert job.place is not None
        job.place.bench.out += 1
        self._start(job)

    # -- endings ---------------------------------------------------------------------------------------------

    def attempt_ended(self, job: Job) -> None:
        """An attempt has ended, or did not begin, whatever comes of it."""
        self._caution.ended(job)

    def recalled(self, job: Job) -> None:
        """The dispatcher has given a job back that was recalled."""
        self._offer(job)

    def again(self, job: Job, error: str, seconds: float) -> None:
        """A job is to be started again after a pause, because of an error; its key is held."""
        self._troubles.put_off(job, error, seconds)
        if self._lanes.is_full:
            self._troubles.say_full()

    def done(self, job: Job) -> None:
        """A job is done, or that of a forgotten record has ended: its key is free."""
        if job.trouble is not None:
            self._troubles.leave(job)
        record = job.record
        following = self._lanes.end(job)
        if following is not None:
            self._offer(following)
        if not record.left and not record.lost:
            self._record_done(record)

    def _record_done(self, record: Record) -> None:
        if record.reply is None:
            self._acknowledge(record.sequence)
            self._note_empty()
        else:
            # Answers leave at the end of this turn of the loop, and the acknowledgement goes behind them.
            if not self._answered:
                self._shop.loop.call_soon(self._report)
            self._answered.append(record.sequence)
        if record is self._strangers.barrier:
            self._strangers.forget()
            self._lift()

    def _report(self) -> None:
        answered, self._answered = self._answered, []
        for sequence in answered:
            self._acknowledge(sequence)
        self._note_empty()

    def _acknowledge(self, sequence: int) -> None:
        try:
            self._keeping.done(sequence)
        except Exception as error:  # it is delivered again
            text = "a record of %s could not be acknowledged: %s"
            self._shop.rare_log.warn("acknowledge", text, self._stream, describe(error))

    def _lift(self) -> None:
        """Take apart what came behind a record that nothing passed."""
        behind, self._behind = self._behind, []
        for message, killer in behind:
            self.take(message, killer=killer)

    # -- the keeper's word -----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Start nothing more; what runs goes on. So it begins."""
        self._is_open = self._is_direct = False
        self._strangers.pause()
        for queue in self._queues.values():
            queue.is_open = False
        for job in self._lanes.undone():
            self._recall(job)

    def resume(self) -> None:
        """Go on."""
        self._share.take_over(self._keeping.fence)
        self._is_open = True
        self._is_direct = not self._keeping.is_careful
        for job in self._lanes.undone():
            if job.delivery is not None and job.state is State.READY:
                job.delivery.deadline = math.inf  # it was recalled, and has not come back yet
        aside, self._aside = self._aside, []
        for job in aside:
            self._serve(job)
        self._strangers.consider()
        for bench, queue in self._queues.items():
            queue.is_open = self._is_direct
            if self._is_direct and queue.jobs:
                bench.list(queue)
                bench.refill()
        if not self._is_direct:
            self._caution.step()
        self._shop.dispatcher.wake()

    async def finish(self, *, below: bool) -> None:
        """Forget what has not begun, and return when all that has is done; then it is as at its beginning.

        A record has begun when one of its frames has; what it waits for in its lanes is finished, too. It returns as
        well when everything is dropped meanwhile. When it is cancelled, nothing more is taken until `drop`.

        Args:
            below: Whether everything below the highest record begun or done is finished as well (event log).
        """
        self._is_finishing = True
        self._let_go(self._lanes.finish(below=below))
        while self._lanes.records or self._answered:
            self._emptied.clear()
            await self._emptied.wait()
        await self._share.hand_over()
        self._is_finishing = False
        self.pause()

    def drop(self) -> None:
        """Forget everything: another node owns the partition. What runs ends unacknowledged and unanswered."""
        self.pause()
        self._share.drop()
        self._let_go(self._lanes.drop())
        self._answered.clear()
        self._is_finishing = False
        self._emptied.set()

    def _let_go(self, jobs: list[Job]) -> None:
        """Forget jobs, and what came behind a record that nothing passed."""
        for job in jobs:
            self._recall(job)
            self._troubles.leave(job)
        self._aside = [job for job in self._aside if not job.record.lost]
        self._behind.clear()
        if self._strangers.barrier is not None and self._strangers.barrier.lost:
            self._strangers.forget()

    def _recall(self, job: Job) -> None:
        """Have a job back that is with the dispatcher and has not started."""
        if job.delivery is not None and job.state is State.READY:
            job.delivery.deadline = -math.inf

    def _note_empty(self) -> None:
        if not self._lanes.records and not self._answered:
            self._emptied.set()
