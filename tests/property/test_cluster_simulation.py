"""What the views of a cluster come to under faults, in virtual time."""

import pytest

from catga_bus.cluster.records import ChangeKind, NodeStatus
from tests.cluster_simulation import Simulation

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_dies_of_stalls_and_pauses_up_to_400_ms(seed: int) -> None:
    cluster = Simulation(seed, 8)
    cluster.run(3.0)
    for _ in range(300):
        rested = [node for node in cluster.nodes.values() if node.blocked_until + 0.01 < cluster.now]
        node = cluster.rng.choice(rested)  # two pauses without a beat between them would be one of 800 ms
        fault = cluster.rng.choice((cluster.stall, cluster.freeze))
        fault(node, cluster.rng.uniform(0.0, 0.4))
        cluster.run(cluster.rng.uniform(0.0, 0.5))
    assert cluster.deaths() == []
    cluster.run(2.0)
    cluster.assert_converged()


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_dies_of_a_loop_that_is_blocked_for_five_seconds(seed: int) -> None:
    cluster = Simulation(seed, 5)
    cluster.run(3.0)
    cluster.stall(cluster.nodes["n0"], 5.0)
    cluster.run(10.0)
    assert cluster.deaths() == []
    cluster.assert_converged()


@pytest.mark.parametrize("size", [2, 3, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_dies_of_a_server_that_restarts(seed: int, size: int) -> None:
    cluster = Simulation(seed, size)
    cluster.run(3.0)
    for node in cluster.nodes.values():
        cluster.cut(node)
    cluster.run(cluster.rng.uniform(0.05, 10.0))
    for node in cluster.nodes.values():
        cluster.mend(node, within=2.0)  # the longest delay between two attempts
    cluster.run(4.0)
    assert cluster.deaths() == []
    cluster.assert_converged()
    cluster.run(10.0)
    assert cluster.deaths() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_who_is_cut_off_finds_nobody_dead_and_views_converge_after_the_heal(seed: int) -> None:
    cluster = Simulation(seed, 6)
    cluster.run(3.0)
    observer = cluster.nodes["n0"]
    cluster.cut(observer)
    cluster.run(cluster.rng.uniform(0.1, 20.0))
    cluster.mend(observer, within=0.1)
    cluster.run(2.1)
    cluster.assert_converged()
    cluster.run(5.0)
    assert observer.told(ChangeKind.FAULTED) == []
    cluster.assert_converged()


@pytest.mark.parametrize("seed", SEEDS)
def test_views_converge_within_two_seconds_after_half_of_the_nodes_come_back(seed: int) -> None:
    cluster = Simulation(seed, 8)
    cluster.run(3.0)
    away = [cluster.nodes[f"n{number}"] for number in range(4)]
    for node in away:
        cluster.cut(node)
    cluster.run(cluster.rng.uniform(0.1, 20.0))
    for node in away:
        cluster.mend(node, within=0.1)
    cluster.run(2.1)
    cluster.assert_converged()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_node_is_out_of_every_view_within_a_second(seed: int) -> None:
    cluster = Simulation(seed, 5)
    cluster.run(3.0 + cluster.rng.uniform(0.0, 0.25))
    killed = cluster.now
    cluster.kill(cluster.nodes["n1"])
    cluster.run(2.0)
    deaths = cluster.deaths()
    assert {node_id for _, node_id in deaths} == {"n1"}
    assert len(deaths) == 4
    assert max(at for at, _ in deaths) - killed < 0.7
    for node in cluster.nodes.values():
        avoided = [at for at, change in node.changes if change.node is not None and change.node.evicted]
        assert node.id == "n1" or min(avoided) - killed < 0.45


@pytest.mark.parametrize("seed", SEEDS)
def test_half_of_the_nodes_killed_at_once_are_found_all_the_same(seed: int) -> None:
    cluster = Simulation(seed, 9)
    cluster.run(3.0)
    for number in range(5):
        cluster.kill(cluster.nodes[f"n{number}"])
    cluster.run(1.0)
    cluster.assert_converged()
    assert len(cluster.deaths()) == 5 * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_frozen_node_is_dead_and_then_recovers_as_the_same_incarnation(seed: int) -> None:
    cluster = Simulation(seed, 4)
    cluster.run(3.0)
    frozen = cluster.nodes["n2"]
    began = cluster.now
    cluster.freeze(frozen, 3.0)
    cluster.run(2.9)
    deaths = cluster.deaths()
    assert {node_id for _, node_id in deaths} == {"n2"}
    assert len(deaths) == 3
    assert all(0.7 < at - began < 1.4 for at, _ in deaths)
    assert all(
        not node.detector.peers["n2"].info.evicted for node in cluster.nodes.values() if node is not frozen
    )  # the server still holds its connections: its types are troubled
    cluster.run(1.1)
    cluster.assert_converged()
    for node in cluster.nodes.values():
        if node is not frozen:
            assert [node_id for _, node_id in node.told(ChangeKind.RECOVERED)] == ["n2"]
            assert node.detector.peers["n2"].info.incarnation == frozen.incarnation
    assert frozen.told(ChangeKind.FAULTED) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_three_of_four_frozen_are_dead_only_after_a_question_that_failed(seed: int) -> None:
    cluster = Simulation(seed, 4)
    cluster.run(3.0)
    began = cluster.now
    for number in range(3):
        cluster.freeze(cluster.nodes[f"n{number}"], 4.0)
    cluster.run(3.9)
    deaths = cluster.nodes["n3"].told(ChangeKind.FAULTED)
    assert sorted(node_id for _, node_id in deaths) == ["n0", "n1", "n2"]
    assert min(at for at, _ in deaths) - began > 1.0
    cluster.run(2.1)
    cluster.assert_converged()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clean_leave_is_seen_at_once_and_is_no_death(seed: int) -> None:
    cluster = Simulation(seed, 5)
    cluster.run(3.0)
    left = cluster.now
    cluster.leave(cluster.nodes["n1"])
    cluster.run(2.0)
    for node in cluster.nodes.values():
        if node.is_alive:
            [(at, node_id)] = node.told(ChangeKind.LEFT)
            assert (node_id, at - left < 0.05) == ("n1", True)
    assert cluster.deaths() == []
    cluster.assert_converged()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_dead_incarnation_returns_however_its_beats_are_replayed(seed: int) -> None:
    cluster = Simulation(seed, 5)
    cluster.run(3.0)
    old = cluster.nodes["n1"]
    if seed % 2:
        cluster.kill(old)
    else:
        cluster.leave(old)
    cluster.run(1.5)
    replaced = None
    if seed % 3:
        replaced = cluster.add("n1", (2, cluster.rng.getrandbits(40)))
        cluster.run(2.0)
    cluster.run(1.0)
    replays = [beat for beat in cluster.recorded if beat[0].incarnation == old.incarnation]
    for _ in range(200):
        beat, seq = cluster.rng.choice(replays)
        cluster.publish((beat, seq + cluster.rng.choice((0, 1, 1_000_000))))
        cluster.run(cluster.rng.uniform(0.0, 0.3))
        for node in cluster.nodes.values():
            peer = node.detector.peers.get("n1")
            if node.is_alive and node.id != "n1" and peer is not None:
                assert peer.info.incarnation != old.incarnation or peer.info.status is NodeStatus.FAULTED
    cluster.run(2.0)
    cluster.assert_converged()
    assert (replaced is None) or all(
        node.detector.peers["n1"].info.incarnation == replaced.incarnation
        for node in cluster.nodes.values()
        if node.id != "n1"
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_leave_views_that_converge_within_two_seconds(seed: int) -> None:
    cluster = Simulation(seed, 7)
    cluster.run(3.0)
    rng = cluster.rng
    for _ in range(40):
        node = rng.choice(list(cluster.nodes.values()))
        if not node.is_alive:
            cluster.add(node.id)
        else:
            match rng.randrange(4):
                case 0:
                    cluster.kill(node)
                case 1:
                    cluster.cut(node)
                    cluster.mend(node, within=rng.uniform(0.1, 2.0))
                case 2:
                    cluster.freeze(node, rng.uniform(0.1, 4.0))
                case _:
                    cluster.stall(node, rng.uniform(0.1, 4.0))
        cluster.run(rng.uniform(0.0, 2.0))
    cluster.run(4.0)  # the last fault ends
    cluster.run(2.0)
    cluster.assert_converged()
