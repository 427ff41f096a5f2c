"""What must hold, looked at whenever something happens that could break it."""

from collections import defaultdict
from typing import Protocol

from catga_bus.durability.inbox.base import FencedError
from catga_bus.partition.keeper import Keeper
from catga_bus.partition.protocol import Claimed
from catga_bus.partition.records import Domain, Held, consumer_of, read_record
from catga_bus.transport.consumer_model import ConsumerModel
from tests.ownership.network import Watcher
from tests.ownership.node import Node
from tests.ownership.working import Job, Work, frames_of


class ViolationError(AssertionError):
    """Something that must hold does not.

    Attributes:
        law: Its name.
    """

    def __init__(self, law: str, text: str) -> None:
        super().__init__(f"{law}: {text}")
        self.law = law


LAWS = {
    "keys_are_in_order": "of each key the effects come in the order in which the messages were stored",
    "effects_are_never_doubled": "no message has two effects",
    "nothing_accepted_is_lost": "what is acknowledged, or what a new consumer of the log begins behind, is done",
    "epochs_never_fall": "in the order of effects, and of claims, epochs do not fall",
    "an_epoch_has_one_owner": "an epoch is granted once, and only its owner's effects are accepted under it",
    "a_consumer_has_one_epoch": "no two claims have a consumer of the same name",
    "grants_are_the_last_word": "who begins was the last to claim when its consumer was made",
    "a_tenure_runs_nothing_twice": "what is delivered again in one tenure is not run again",
    "pauses_are_noticed": "who was overtaken in a pause of its process starts nothing after it",
    "executions_are_excused": "without a fault nothing is run twice",
    "dead_letters_are_exact": "what kills its process becomes a dead letter, and nothing else does",
    "everything_comes_to_rest": "after the last fault each partition has one living owner, and nothing waits",
    "nothing_fails": "no task of a node ends with an error",
}
"""Every law by its name."""


class Scene(Protocol):
    """What is looked at."""

    now: float
    domains: tuple[Domain, ...]
    killers: set[str]
    reads_are_stale: bool
    is_calm: bool
    """Whether nothing happens that excuses a repetition."""


class Checker(Watcher):
    """Looks.

    Args:
        scene: At what.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.records: dict[tuple[str, int], list[str]] = {}
        """By stream and sequence: the messages of a record."""

        self.places: dict[str, tuple[str, int]] = {}
        """By message: stream and partition."""

        self.violation: ViolationError | None = None
        self.bucket_was_lost = False
        self.done: set[str] = set()
        self.letters: set[str] = set()
        self.effects: set[str] = set()
        self.fenced = 0
        self.takeovers = 0
        self.executions: defaultdict[str, int] = defaultdict(int)
        self._lines: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)  # by stream and partition
        self._last: dict[str, int] = {}  # of each key: number of its last effect
        self._committed: dict[tuple[str, int], int] = {}
        self._owners: dict[tuple[str, int, int], str] = {}
        self._written: dict[str, tuple[int, str, float]] = {}  # by key: epoch, claim's nonce and when
        self._latest: dict[str, tuple[str, float]] = {}  # by key: the consumer of the last claim
        self._names: dict[str, str] = {}
        self._first_words: set[str] = set()
        self._grants: dict[tuple[str, int], str] = {}
        self._marked: set[tuple[str, int, int]] = set()  # stream, sequence and index of frames
        self._jobs: dict[tuple[int, str], Job] = {}

    def _violated(self, law: str, text: str) -> None:
        assert law in LAWS
        # What is raised inside of a task is noticed late or never: the world looks here.
        self.violation = self.violation or ViolationError(law, f"at {self._scene.now:.3f} s: {text}")
        raise self.violation

    # -- the stream ------------------------------------------------------------------------------------------

    def stored(self, subject: str, payload: bytes, sequence: int) -> None:
        """A record was stored."""
        _, kind, _, place = subject.split(".")
        stream = next(domain.stream for domain in self._scene.domains if domain.kind == kind)
        ids = [message_id for _, message_id in frames_of(payload)]
        self.records[stream, sequence] = ids
        for message_id in ids:
            self.places[message_id] = stream, int(place)
            self._lines[stream, int(place)].append((sequence, message_id))

    def acknowledged(self, reply: str) -> None:
        """An acknowledgement was taken."""
        _, _, stream, consumer, _, sequence, *_ = reply.split(".")
        undone = [each for each in self.records.get((stream, int(sequence)), ()) if each not in self.done]
        if undone:
            self._violated("nothing_accepted_is_lost", f"{undone} acknowledged and not done, by {consumer}")

    # -- claims ----------------------------------------------------------------------------------------------

    def wrote(self, key: str, value: bytes, revision: int) -> None:
        """A record of an owner was written."""
        record = read_record(value)
        if record is None:
            return
        held = Held(record, revision)
        _, service_kind, partition = key.split(".")
        domain = next(domain for domain in self._scene.domains if domain.kind == service_kind)
        if record.mark is not None:
            self._marked.add((domain.stream, record.mark.sequence, record.mark.index))
        epoch, _, _ = self._written.get(key, (0, "", 0.0))
        if record.last:
            if record.epoch < epoch and not self.bucket_was_lost:  # then who writes first goes on
                self._violated("epochs_never_fall", f"{key}: epoch {record.epoch} is amended after {epoch} was granted")
            return
        if held.epoch <= epoch:
            self._violated("epochs_never_fall", f"{key}: {record.node} claims with epoch {held.epoch} after {epoch}")
        name = consumer_of(domain.service, int(partition), held)
        assert name is not None
        if name in self._names:
            self._violated("a_consumer_has_one_epoch", f"{name} of {self._names[name]} and {record.nonce}")
        self._names[name] = record.nonce
        self._written[key] = held.epoch, record.nonce, self._scene.now
        self._latest[key] = name, self._scene.now

    def made(self, stream: str, consumer: ConsumerModel) -> None:
        """A consumer was made."""
        name = consumer.config.name
        if any(name == latest for latest, _ in self._latest.values()):
            self._first_words.add(name)
        if consumer.config.deliver != "by_start_sequence":
            return
        place = int(consumer.config.filters[0].rpartition(".")[2])
        start = consumer.config.start_sequence
        for sequence, message_id in self._lines[stream, place]:
            if sequence < start and message_id not in self.done:
                self._violated("nothing_accepted_is_lost", f"{name} begins at {start}, behind {message_id}")

    def granted(self, node: Node, keeper: Keeper, claimed: Claimed) -> None:
        """A keeper has been granted an epoch."""
        assert isinstance(keeper, Keeper)
        kind = keeper.fence.domain
        whose = self._grants.setdefault((f"{kind}.{keeper.partition}", claimed.epoch), claimed.record.nonce)
        if whose != claimed.record.nonce:
            self._violated("an_epoch_has_one_owner", f"{kind}.{keeper.partition}: {claimed.epoch} granted twice")
        if not claimed.continues and claimed.held.record is not None:
            self.takeovers += 1
        if not self._scene.reads_are_stale and claimed.consumer not in self._first_words:
            self._violated("grants_are_the_last_word", f"{node.name} begins with {claimed.consumer}, overtaken before")

    # -- work ------------------------------------------------------------------------------------------------

    def begun(self, work: Work, job: Job) -> None:
        """A handler starts."""
        message_id = job.message.id
        before = self._jobs.setdefault((id(work), message_id), job)
        if before is not job:
            self._violated("a_tenure_runs_nothing_twice", f"{message_id} in {work.process.name}")
        self._look_for_pause(work, job)
        self.executions[message_id] += 1
        if self._scene.is_calm and self.executions[message_id] > 1:
            self._violated("executions_are_excused", f"{message_id} is run again by {work.process.name}")

    def _look_for_pause(self, work: Work, job: Job) -> None:
        fence, thawed_at = work.keeping.fence, work.process.thawed_at
        key = f"shop.{fence.domain}.{fence.partition}"
        _, nonce, at = self._written[key]
        if self._scene.reads_are_stale or thawed_at > self._scene.now:
            return
        if not nonce.startswith(f"{work.process.name}-") and at < thawed_at:
            text = (
                f"{work.process.name} starts {job.message.id}, overtaken at {at:.3f} in a pause until {thawed_at:.3f}"
            )
            self._violated("pauses_are_noticed", text)

    def effected(self, work: Work, job: Job) -> None:
        """An effect was accepted."""
        message_id, fence = job.message.id, job.fence
        assert fence is not None
        place = fence.domain, fence.partition
        highest = self._committed.get(place, 0)
        if fence.epoch < highest:
            self._violated("epochs_never_fall", f"{message_id} under {fence.epoch} after {highest} in {place}")
        self._committed[place] = fence.epoch
        owner = self._owners.setdefault((*place, fence.epoch), work.process.name)
        if owner != work.process.name:
            self._violated("an_epoch_has_one_owner", f"{place} {fence.epoch}: {owner} and {work.process.name}")
        if message_id in self.effects:
            self._violated("effects_are_never_doubled", message_id)
        self.effects.add(message_id)
        if message_id not in self.letters:
            self._next(message_id)

    def buried(self, work: Work, job: Job) -> None:
        """A dead letter was stored."""
        message_id = job.message.id
        # Who is overtaken or killed while a frame is marked is taken to have died of it: only without other faults is
        # it known that it has.
        stream, sequence, index = job.record.message.reply.split(".")[2], job.record.sequence, job.index
        is_excused = not self._scene.is_calm and (stream, sequence, index) in self._marked
        if message_id not in self._scene.killers and not is_excused:
            self._violated("dead_letters_are_exact", f"{message_id} has not killed anybody")
        self.letters.add(message_id)
        if message_id not in self.done:
            self._next(message_id)

    def refused(self, error: FencedError) -> None:
        """An effect was refused."""
        self.fenced += 1

    def _next(self, message_id: str) -> None:
        key, _, number = message_id.rpartition("-")
        expected = self._last.get(key, 0) + 1
        if int(number) != expected:
            self._violated("keys_are_in_order", f"{message_id} comes when {key}-{expected} is due")
        self._last[key] = int(number)
        self.done.add(message_id)

    # -- the end ---------------------------------------------------------------------------------------------

    def left(self) -> list[str]:
        """Return the messages that were accepted and are not done."""
        return [message_id for message_id in self.places if message_id not in self.done]
