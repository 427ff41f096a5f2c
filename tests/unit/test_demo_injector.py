"""The plan carried out on processes that only take notes."""

import asyncio
from collections.abc import Callable

import pytest

from catga_bus.demo import faults
from catga_bus.demo.faults import Chronicle, FaultPlan, FaultRecord, What
from catga_bus.demo.injector import FaultInjector

PLAN = FaultPlan(killed="desk-2", replacement="desk-4", frozen="desk-3", rolled="desk-1", successor="desk-5", spares=1)


class NotedProcess:
    """A process that does at once what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.exit_code: int | None = None
        self.is_stopped = False

    def start(self) -> None:
        self.calls.append("start")

    def kill(self) -> None:
        self.calls.append("kill")
        self.exit_code = -9

    def freeze(self) -> None:
        self.calls.append("freeze")
        self.is_stopped = True

    def thaw(self) -> None:
        self.calls.append("thaw")
        self.is_stopped = False

    def terminate(self) -> None:
        self.calls.append("terminate")
        self.exit_code = 0


@pytest.fixture
def processes() -> dict[str, NotedProcess]:
    return {f"desk-{number}": NotedProcess() for number in range(1, 6)}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "REPLACE_AFTER", 0.0)
    monkeypatch.setattr(faults, "FREEZE_SECONDS", 0.0)


async def injected(
    processes: dict[str, NotedProcess],
    part: Callable[[Chronicle], float],
    wait_ready: Callable[[str], object] = lambda _: None,
) -> FaultRecord:
    async def ready(node: str) -> None:
        wait_ready(node)

    chronicle = Chronicle()
    injector = FaultInjector(PLAN, processes, chronicle, ready)
    return await asyncio.wait_for(injector.run(lambda: part(chronicle)), 10)


def until_all_happened(chronicle: Chronicle) -> float:
    """A replay that stands near its end until the last act has been done."""
    return 1.0 if any(moment.node == "desk-5" for moment in chronicle.moments) else 0.9


async def test_one_node_is_killed_one_frozen_and_one_rolled_and_others_take_their_places(processes):
    record = await injected(processes, until_all_happened)
    assert {node: process.calls for node, process in processes.items()} == {
        "desk-1": ["terminate"],
        "desk-2": ["kill"],
        "desk-3": ["freeze", "thaw"],
        "desk-4": ["start"],
        "desk-5": ["start"],
    }
    assert sorted((moment.node, moment.what) for moment in record.moments) == [
        ("desk-1", What.ENDED),
        ("desk-1", What.ROLLED),
        ("desk-2", What.KILLED),
        ("desk-3", What.FROZEN),
        ("desk-3", What.THAWED),
        ("desk-4", What.READY),
        ("desk-4", What.STARTED),
        ("desk-5", What.READY),
        ("desk-5", What.STARTED),
    ]
    assert (record.exit_code, record.was_stopped, record.rolled_exit_code) == (-9, True, 0)


async def test_what_has_begun_is_mended_after_the_replay(processes):
    def part(chronicle: Chronicle) -> float:
        return 1.0 if chronicle.moments else 0.5

    await injected(processes, part)
    assert processes["desk-3"].calls == ["freeze", "thaw"]
    assert processes["desk-4"].calls == ["start"]


async def test_a_replay_that_has_ended_suffers_no_faults(processes):
    record = await injected(processes, lambda _: 1.0)
    assert record.moments == ()
    assert record.exit_code is None


async def test_a_process_that_did_not_stand_still_is_told(processes):
    processes["desk-3"].freeze = lambda: None
    record = await injected(processes, until_all_happened)
    assert not record.was_stopped


async def test_a_rolled_node_is_followed_when_it_has_ended_not_before(processes):
    looks = 0

    class Slow(NotedProcess):
        def terminate(self) -> None:
            self.calls.append("terminate")

    slow = processes["desk-1"] = Slow()

    def part(chronicle: Chronicle) -> float:
        nonlocal looks
        if "terminate" in slow.calls:
            looks += 1
            assert (slow.exit_code is None) <= (processes["desk-5"].calls == [])
            if looks == 20:
                slow.exit_code = 0
        return until_all_happened(chronicle)

    record = await injected(processes, part)
    assert looks >= 20
    assert record.rolled_exit_code == 0


async def test_a_rolled_node_that_does_not_end_is_waited_for_no_longer(processes, monkeypatch):
    monkeypatch.setattr(faults, "ROLL_PATIENCE", 0.0)
    processes["desk-1"].terminate = lambda: None
    record = await injected(processes, until_all_happened)
    assert processes["desk-5"].calls == ["start"]
    assert record.rolled_exit_code is None


async def test_a_replacement_that_does_not_answer_ends_the_run(processes):
    def wait_ready(node: str) -> None:
        raise LookupError(node)

    def part(chronicle: Chronicle) -> float:
        return 1.0 if any(moment.what is What.THAWED for moment in chronicle.moments) else 0.5

    with pytest.raises(LookupError, match="desk-4"):
        await injected(processes, part, wait_ready)
