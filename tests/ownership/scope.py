"""The small scope: two nodes, one partition, three messages, and one fault at every point that they come to."""

from collections.abc import Iterator

from catga_bus.partition.records import Domain
from tests.ownership.process import Process
from tests.ownership.world import Habits, World

FAULTS: dict[str, float] = {"kill": 0.0, "pause": 0.4, "long pause": 1.7, "very long pause": 4.0}
"""What may happen, and for how many seconds: less than it takes to be found dead; more; and more than any call waits
for its answer."""

_CALM = 1.5


def run(domain: Domain, *, point: int = -1, fault: str = "") -> World:
    """Run it: both nodes claim, three messages are handled, one node leaves and comes back.

    Args:
        domain: Of the partition.
        point: At which point the fault happens, counted over both nodes; -1: nowhere.
        fault: Which.

    Raises:
        ViolationError: A law does not hold.
    """
    world = World(1, domains=(domain,), habits=Habits(longest=0.01), is_calm=point < 0)

    def strike(process: Process, _: str) -> None:
        if world.points - 1 != point:
            return
        if fault == "kill":
            process.kill()
            node_id = process.name.partition(".")[0]
            world.at(world.now + 2.0, lambda: world.add(node_id) and None)
        else:
            process.freeze(FAULTS[fault])

    world.on_point = strike
    with world:
        for node_id in ("n0", "n1"):
            world.add(node_id)
        for at, keys in ((0.0, ["a"]), (0.02, ["a", "b"])):
            world.at(at, lambda keys=keys: world.send(domain.kind, 0, keys) and None)
        world.run(0.6)
        owner = next((node for node in world.live() if node.owns(domain.kind)), None)
        if owner is not None and not owner.process.is_frozen:
            world.roll(owner)
        world.run(0.6)
        world.settle(_CALM)
    return world


def all_faults(domain: Domain) -> Iterator[tuple[int, str]]:
    """Each fault at each point of the run without faults, as it is until then."""
    for point in range(run(domain).points):
        for fault in FAULTS:
            yield point, fault
