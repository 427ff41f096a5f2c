"""Lookup: asks the inbox which messages are done already, as many at a time as have come meanwhile."""

from collections.abc import Callable

from catga_bus.dispatch.failures import describe
from catga_bus.durability.inbox.base import Inbox, Recorded
from catga_bus.durability.working.jobs import Job
from catga_bus.durability.working.shop import Shop


class Lookup:
    """Questions to the inbox, one at a time.

    Args:
        shop: What all partitions share.
        inbox: Who is asked.
        found: Told of each job, with its result if it is done.
        failed: Told of each job that could not be looked up, and why.
    """

    def __init__(
        self,
        shop: Shop,
        inbox: Inbox,
        found: Callable[[Job, Recorded | None], None],
        failed: Callable[[Job, str], None],
    ) -> None:
        self._shop = shop
        self._inbox = inbox
        self._found = found
        self._failed = failed
        self._jobs: list[Job] = []  # bounded by what the benches let out
        self._is_asking = False

    def add(self, job: Job) -> None:
        """Look a job up, together with what else comes in this turn or while the inbox is being asked."""
        self._jobs.append(job)
        if not self._is_asking:
            self._is_asking = True
            self._shop.spawn(self._ask())

    async def _ask(self) -> None:
        try:
            while self._jobs:
                jobs, self._jobs = self._jobs, []
                await self._look_up(jobs)
                self._shop.dispatcher.wake()
        finally:
            self._is_asking = False

    async def _look_up(self, jobs: list[Job]) -> None:
        try:
            done = await self._inbox.find_many(self._shop.service, [job.message.id for job in jobs])
        except Exception as error:
            text = f"the inbox cannot be read: {describe(error)}"
            self._shop.rare_log.warn("lookup", "%s", text)
            for job in jobs:
                self._failed(job, text)
            return
        for job in jobs:
            self._found(job, done.get(job.message.id))
