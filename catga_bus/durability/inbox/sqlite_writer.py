"""The thread that writes to an inbox in SQLite: who has the transaction, and when it is committed.

SQLite has one writer, so units that write rows of their own take turns, each in a savepoint of one transaction; units
that only leave a mark are written many at a time between two turns. The transaction is committed when nobody waits for
a turn, or after `MAX_UNITS` or `MAX_SECONDS`; only then does anybody hear that his unit is done. So a lone unit is
committed at once, and under load one commit serves many.
"""

import asyncio
import sqlite3
import threading
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from catga_bus.clock import Clock
from catga_bus.durability.inbox.base import InboxError, SlowTransactionError
from catga_bus.durability.inbox.sqlite_jobs import Answer, Job, Kind, Turn, new_answer, tell
from catga_bus.durability.inbox.sqlite_store import SqliteStore

MAX_UNITS = 256
"""Units of one transaction: at 256 a commit costs 0.1 microseconds for each (measured, `synchronous=NORMAL`)."""

MAX_SECONDS = 0.01
"""Seconds until a transaction that takes turn after turn is committed: they are added to what the first waits."""

_TAKEN_AT_ONCE = 256
_STEPS_BETWEEN_LOOKS = 20_000
# Steps of SQLite's machine between two looks at the clock, a millisecond or less: what a look costs is not seen.


class Door(Protocol):
    """Lets the thread into the store: who may write, whether the store is still there, what its errors mean."""

    def open(self) -> SqliteStore:
        """Open the store; the thread that calls is the one that uses it."""
        ...

    def begin(self, store: SqliteStore) -> None:
        """Begin a transaction, waiting for other processes.

        Raises:
            InboxError: The store is gone, or somebody else had it for too long.
        """

    def end(self, store: SqliteStore) -> None:
        """Let others write: the transaction has ended. Raises nothing."""

    def close(self, store: SqliteStore) -> None:
        """Close the store."""

    def explained(self, error: sqlite3.Error) -> InboxError | None:
        """Say what a failure of the store means; None for one that the statement itself is to blame for."""
        ...


class Writer:
    """The thread, and the queue before it. Its queue is bounded by the units that the node has admitted.

    Args:
        door: How it comes to its store.
        clock: Measures how long a transaction is open.
        transaction_timeout: Seconds for which a unit may have its turn; then it is undone.
        max_units: Units of one transaction. With 1, all that a look sees is committed.
        name: Of the thread.
    """

    def __init__(
        self,
        door: Door,
        clock: Clock,
        *,
        transaction_timeout: float,
        max_units: int = MAX_UNITS,
        name: str = "catga-inbox",
    ) -> None:
        self._door = door
        self._clock = clock
        self._transaction_timeout = transaction_timeout
        self._max_units = max_units
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        # All below belongs to the thread. `_done` are answers that wait for the commit; they are empty exactly when no
        # transaction is open and no turn is taken.
        self._store: SqliteStore
        self._is_open = False
        self._opened_at = 0.0
        self._units = 0
        self._done: list[tuple[Answer, Any]] = []
        self._marks: list[Job] = []
        self._running: Job | None = None
        self._waiting: dict[Turn, None] = {}
        self._current: Turn | None = None
        self._current_since = 0.0
        self._is_ending = False
        self._is_shut = False

    async def start(self) -> None:
        """Start the thread and open the store; raises what opening raises."""
        answer = new_answer()
        self._opened = answer
        self._thread.start()
        try:
            await answer.future
        except asyncio.CancelledError:
            self._queue.put(Job(Kind.END, Turn(""), answer))
            self._is_shut = True
            raise

    def put(self, kind: Kind, turn: Turn, **rest: Any) -> "asyncio.Future[Any]":
        """Hand a job to the thread; return where its result will be.

        Raises:
            InboxError: The thread has been told to end.
        """
        if self._is_shut:
            raise InboxError("the inbox is closed")
        answer = new_answer()
        self._queue.put(Job(kind, turn, answer, **rest))
        return answer.future

    async def end(self) -> None:
        """Commit what was put before this, refuse what waits for a turn that cannot come, and stop the thread."""
        ended = self.put(Kind.END, Turn(""))
        self._is_shut = True
        await ended
        self._thread.join()

    def _run(self) -> None:
        try:
            self._store = self._door.open()
        except BaseException as error:
            tell([(self._opened, error)])
            return
        self._store.watch(self._is_late, _STEPS_BETWEEN_LOOKS)
        tell([(self._opened, None)])
        while not self._is_ending:
            self._take()
            self._advance()
        self._stop()

    def _take(self) -> None:
        """Wait for jobs, as long as the present turn may still take; sort in what has come."""
        try:
            job = self._queue.get(timeout=self._patience())
        except Empty:
            self._expire()
            return
        for _ in range(_TAKEN_AT_ONCE):
            self._sort(job)
            try:
                job = self._queue.get_nowait()
            except Empty:
                return
        self._sort(job)

    def _patience(self) -> float | None:
        if self._current is None:
            return 0.0 if self._waiting else None
        return max(0.0, self._current_since + self._transaction_timeout - self._clock())

    def _sort(self, job: Job) -> None:
        turn = job.turn
        if job.kind is Kind.END:
            self._is_ending = True
            self._ended = job.answer
        elif job.kind is Kind.LOOK:
            self._look(job)
        elif turn is self._current:
            turn.jobs.append(job)
        elif job.kind is Kind.FORGET:
            self._forget_waiting(job)
        elif turn.error is not None:
            tell([(job.answer, turn.error)])
        elif job.kind is Kind.FINISH and turn not in self._waiting:
            self._marks.append(job)
        else:
            turn.jobs.append(job)
            self._waiting[turn] = None

    def _look(self, job: Job) -> None:
        assert job.call is not None
        try:
            value = job.call(self._store)
        except Exception as error:
            value = self._explained(error) or error
        tell([(job.answer, value)])

    def _forget_waiting(self, job: Job) -> None:
        self._waiting.pop(job.turn, None)
        tell([(waiting.answer, InboxError("the unit was rolled back")) for waiting in job.turn.jobs])
        job.turn.jobs.clear()
        tell([(job.answer, None)])

    def _advance(self) -> None:
        """Run what can be run now, and commit when it is time."""
        try:
            self._run_turns()
            if self._current is None:
                self._settle()
        except InboxError as error:
            self._fail(error)
        except Exception as error:
            self._fail(self._explained(error) or InboxError(f"the store failed: {error!r}"))

    def _explained(self, error: Exception) -> InboxError | None:
        return self._door.explained(error) if isinstance(error, sqlite3.Error) else None

    def _run_turns(self) -> None:
        while True:
            if self._current is None:
                if not self._waiting:
                    return
                if self._is_due():
                    self._settle()
                self._give_turn()
            self._run_current()
            if self._current is not None:
                return

    def _is_due(self) -> bool:
        return self._is_open and (self._units >= self._max_units or self._clock() - self._opened_at >= MAX_SECONDS)

    def _give_turn(self) -> None:
        self._begin()
        turn = next(iter(self._waiting))
        del self._waiting[turn]
        self._store.enter()
        self._current, self._current_since = turn, self._clock()
        self._units += 1

    def _run_current(self) -> None:
        """Run the jobs of the unit that has the turn, until it ends or has no more."""
        turn = self._current
        while turn is not None and turn.jobs and self._current is turn:
            job = self._running = turn.jobs.popleft()
            if job.kind is Kind.STATEMENT:
                self._state(job)
            elif job.kind is Kind.FORGET:
                self._store.undo()
                self._current = None
                tell([(job.answer, None)])
            elif job.kind is Kind.CALL:
                self._call(job)
            else:
                assert job.unit is not None
                outcome = self._store.finish(job.unit)
                self._current = None
                self._done.append((job.answer, outcome))
            self._running = None

    def _state(self, job: Job) -> None:
        assert job.call is not None
        try:
            value = job.call(self._store)
        except Exception as error:
            self._refuse(job, error)
        else:
            tell([(job.answer, value)])

    def _refuse(self, job: Job, error: Exception) -> None:
        """A statement failed: tell the handler; if the store is at fault, or the transaction is gone, all of it."""
        explained = self._late(job.turn) if self._is_late() else self._explained(error)
        tell([(job.answer, explained or error)])
        is_lost = not self._store.in_transaction
        if explained is not None or is_lost:
            if not is_lost:
                self._store.undo()
            self._end_turn(job.turn, explained or InboxError(f"its statement rolled back the transaction: {error}"))
            self._current = None
        if is_lost:
            raise InboxError(f"the store rolled back what was not committed yet, with a statement that failed: {error}")

    def _call(self, job: Job) -> None:
        assert job.call is not None
        try:
            value = job.call(self._store)
        except Exception as error:
            if not self._store.in_transaction:
                raise
            self._store.undo()
            tell([(job.answer, self._explained(error) or error)])
        else:
            self._store.leave()
            self._done.append((job.answer, value))
        self._current = None

    def _is_late(self) -> bool:
        return self._current is not None and self._clock() - self._current_since >= self._transaction_timeout

    def _late(self, turn: Turn) -> SlowTransactionError:
        return SlowTransactionError(
            f"the transaction of message {turn.message_id} was open for more than {self._transaction_timeout} s and "
            f"was rolled back: all others wait for it; await nothing slow in it, or raise transaction_timeout"
        )

    def _expire(self) -> None:
        """Undo a unit that has had its turn for too long."""
        if (turn := self._current) is not None and self._is_late():
            self._store.undo()
            self._end_turn(turn, self._late(turn))
            self._current = None

    def _end_turn(self, turn: Turn, error: InboxError) -> None:
        """Remember why a unit has ended, and say so to whatever of it waits; forgetting it is what it wants anyway."""
        turn.error = error
        tell([(job.answer, None if job.kind is Kind.FORGET else error) for job in turn.jobs])
        turn.jobs.clear()

    def _begin(self) -> None:
        if not self._is_open:
            self._door.begin(self._store)
            self._is_open, self._opened_at = True, self._clock()

    def _settle(self) -> None:
        """Write the marks that have gathered, commit, and tell everybody."""
        if self._marks:
            self._begin()
            outcomes = self._store.record([job.unit for job in self._marks if job.unit is not None])
            self._done += [(job.answer, outcome) for job, outcome in zip(self._marks, outcomes, strict=True)]
            self._marks = []
        if not self._is_open:
            return
        self._store.commit()
        done, self._done = self._done, []
        tell(done)
        self._close_transaction()

    def _close_transaction(self) -> None:
        self._is_open, self._units = False, 0
        self._door.end(self._store)

    def _fail(self, error: InboxError) -> None:
        """Nothing of the open transaction holds: roll back, and tell everybody who is in it."""
        lost = [(answer, error) for answer, _ in self._done] + [(job.answer, error) for job in self._marks]
        lost += [(self._running.answer, error)] if self._running is not None else []
        self._done, self._marks, self._running = [], [], None
        try:
            self._store.abort()
        except sqlite3.Error as second:
            error.add_note(f"rolling back failed as well: {second}")
        if (turn := self._current) is not None:
            self._end_turn(turn, error)
            self._current = None
        elif not self._is_open:
            # It could not even begin: those who wait would only wait for the same failure, each for as long.
            for waiting in self._waiting:
                self._end_turn(waiting, error)
            self._waiting.clear()
        if self._is_open:
            self._close_transaction()
        tell(lost)

    def _stop(self) -> None:
        closed = InboxError("the inbox is closed")
        if (turn := self._current) is not None:
            self._store.undo()
            self._current = None
            self._end_turn(turn, closed)
        for turn in self._waiting:
            self._end_turn(turn, closed)
        self._waiting.clear()
        self._advance()
        try:
            self._door.close(self._store)
        except sqlite3.Error as error:
            tell([(self._ended, self._door.explained(error) or error)])
        else:
            tell([(self._ended, None)])
