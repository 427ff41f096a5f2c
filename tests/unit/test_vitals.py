"""The vital signs: what the kernel writes, read as values, and the share of garbage collection."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from catga_bus.vitals import MemoryUse, Vitals
from catga_bus.vitals.memory import (
    GroupDirectory,
    MemoryFiles,
    droppable_bytes,
    group_directories,
    group_number,
    machine_memory,
    memory_stall,
    resident_bytes,
)
from catga_bus.vitals.signs import GC_WINDOW, SAMPLE

MIB = 1_048_576
MEMINFO = """MemTotal:       24684084 kB
MemFree:        24376068 kB
MemAvailable:   12342042 kB
Buffers:            3068 kB
"""
PRESSURE = """some avg10=12.50 avg60=3.00 avg300=0.00 total=123456
full avg10=5.00 avg60=1.00 avg300=0.00 total=3456
"""
HYBRID = """9:name=systemd:/
4:cpu,memory:/pods/a1
3:cpuset:/
0::/elsewhere
"""


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(root: Path, **files: str) -> Path:
    write(root, **{"proc/meminfo": MEMINFO, "proc/self/statm": "765 438 410 5 0 123 0\n", **files})
    return root


# -- texts -------------------------------------------------------------------------------------------------


def test_statm_tells_pages_in_ram() -> None:
    assert resident_bytes("765 438 410 5 0 123 0\n", 4_096) == 438 * 4_096


def test_meminfo_tells_what_is_not_available() -> None:
    use = machine_memory(MEMINFO)
    assert use == MemoryUse(12_342_042 * 1_024, 24_684_084 * 1_024, is_group=False)
    assert use.share == 0.5


def test_pressure_tells_the_share_of_the_last_ten_seconds() -> None:
    assert memory_stall(PRESSURE) == 0.125


def test_a_limit_is_a_number_or_none() -> None:
    assert group_number("104857600\n") == 104_857_600
    assert group_number("max\n") is None


def test_pages_of_files_are_counted_with_the_groups_below() -> None:
    assert droppable_bytes("anon 5\nfile 9\ninactive_file 7\nactive_file 2\n") == 7
    assert droppable_bytes("inactive_file 7\ntotal_inactive_file 11\n") == 11
    assert droppable_bytes("anon 5\n") == 0


@pytest.mark.parametrize("text", [None, "", "\n", "junk", "some", "some avg10=", "1 x", "MemTotal: x kB", "\0\n:::\n"])
def test_what_cannot_be_read_is_none(text: str | None) -> None:
    assert resident_bytes(text, 4_096) is None
    assert machine_memory(text) is None
    assert memory_stall(text) is None
    assert group_number(text) is None
    assert droppable_bytes(text) == 0
    assert group_directories(text, Path("/g")) == []


def test_the_groups_go_from_ones_own_to_the_root() -> None:
    assert group_directories("0::/pods/a1\n", Path("/g")) == [
        GroupDirectory("/g/pods/a1", is_v2=True),
        GroupDirectory("/g/pods", is_v2=True),
        GroupDirectory("/g", is_v2=True),
    ]


def test_memory_is_governed_by_version_1_where_it_has_the_controller() -> None:
    assert group_directories(HYBRID, Path("/g"))[0] == GroupDirectory("/g/memory/pods/a1", is_v2=False)


def test_a_group_outside_of_the_namespace_is_read_at_the_root() -> None:
    assert group_directories("0::/../other\n", Path("/g")) == [GroupDirectory("/g", is_v2=True)]


# -- files -------------------------------------------------------------------------------------------------


def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pods"
    machine(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/pods/a1\n",
            f"{group}/a1/memory.max": "max\n",
            f"{group}/memory.max": f"{100 * MIB}\n",
            f"{group}/memory.current": f"{90 * MIB}\n",
            f"{group}/memory.stat": f"anon 1\ninactive_file {15 * MIB}\n",
        },
    )
    files = MemoryFiles(tmp_path)
    use, stall = files.read()
    assert use == MemoryUse(75 * MIB, 100 * MIB, is_group=True)
    assert use.share == 0.75
    assert stall is None
    write(tmp_path, **{f"{group}/memory.max": f"{150 * MIB}\n"})
    assert files.read()[0] == MemoryUse(75 * MIB, 150 * MIB, is_group=True), "raised while the process runs"


def test_a_limit_of_version_1_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    machine(
        tmp_path,
        **{
            "proc/self/cgroup": HYBRID,  # the path of the host, as in a container without a namespace for groups
            f"{group}/memory.limit_in_bytes": f"{100 * MIB}\n",
            f"{group}/memory.usage_in_bytes": f"{50 * MIB}\n",
            f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n",
        },
    )
    assert MemoryFiles(tmp_path).read()[0] == MemoryUse(40 * MIB, 100 * MIB, is_group=True)


@pytest.mark.parametrize("limit", ["9223372036854771712", "max", str(24_684_084 * 1_024)])
def test_a_limit_that_the_machine_does_not_have_is_none(tmp_path: Path, limit: str) -> None:
    group = "sys/fs/cgroup/memory"
    machine(tmp_path, **{"proc/self/cgroup": HYBRID, f"{group}/memory.limit_in_bytes": limit})
    assert MemoryFiles(tmp_path).read()[0] == machine_memory(MEMINFO)


def test_a_limit_that_is_lifted_leaves_the_machine(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    machine(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/\n",
            f"{group}/memory.max": f"{100 * MIB}",
            f"{group}/memory.current": f"{50 * MIB}",
        },
    )
    files = MemoryFiles(tmp_path)
    assert files.read()[0] == MemoryUse(50 * MIB, 100 * MIB, is_group=True)
    write(tmp_path, **{f"{group}/memory.max": "max"})
    assert files.read()[0] == machine_memory(MEMINFO)


def test_pressure_is_the_groups_own_where_it_has_one(tmp_path: Path) -> None:
    root = machine(tmp_path, **{"proc/self/cgroup": "0::/a\n", "proc/pressure/memory": PRESSURE})
    assert MemoryFiles(root).read()[1] == 0.125
    write(root, **{"sys/fs/cgroup/a/memory.pressure": PRESSURE.replace("12.50", "50.00")})
    assert MemoryFiles(root).read()[1] == 0.5


# -- signs -------------------------------------------------------------------------------------------------


def test_a_system_without_the_files_is_told_honestly(tmp_path: Path, clock: _Clock) -> None:
    signs = Vitals(clock, clock, root=tmp_path).read()
    assert (signs.resident_bytes, signs.memory, signs.memory_stall) == (None, None, None)


def test_this_system_is_read() -> None:
    signs = Vitals().read()
    assert signs.resident_bytes is None or signs.resident_bytes > MIB
    assert signs.memory is None or 0.0 < signs.memory.share < 2.0


def test_the_cpu_share_is_that_since_the_reading_before(tmp_path: Path, clock: _Clock) -> None:
    cpu = _Clock()
    vitals = Vitals(clock, cpu, root=tmp_path)
    clock.now += 2.0
    cpu.now += 1.0
    assert vitals.read().cpu == 0.5
    clock.now += 1.0
    cpu.now += 1.5
    assert vitals.read().cpu == 1.5


def test_whoever_asks_in_between_shares_the_reading(tmp_path: Path, clock: _Clock) -> None:
    vitals = Vitals(clock, clock, root=tmp_path)
    clock.now += 1.0
    first = vitals.read()
    clock.now += SAMPLE * 0.9
    assert vitals.read() is first
    clock.now += SAMPLE * 0.2
    assert vitals.read() is not first


def test_memory_is_looked_at_once_a_second(tmp_path: Path, clock: _Clock) -> None:
    vitals = Vitals(clock, clock, root=machine(tmp_path))
    assert vitals.read().memory == machine_memory(MEMINFO)
    write(tmp_path, **{"proc/meminfo": MEMINFO.replace("12342042", "24684084")})
    clock.now += 0.9
    assert vitals.read().memory == machine_memory(MEMINFO)
    clock.now += 0.2
    use = vitals.read().memory
    assert use is not None
    assert use.used_bytes == 0


def collect(vitals: Vitals, clock: _Clock, seconds: float, generation: int = 2) -> None:
    vitals._on_gc("start", {"generation": generation})
    clock.now += seconds
    vitals._on_gc("stop", {"generation": generation})


def test_the_share_of_collections_is_that_of_the_window(tmp_path: Path, clock: _Clock) -> None:
    vitals = Vitals(clock, clock, root=tmp_path)
    collect(vitals, clock, 2.0)
    collect(vitals, clock, 0.5, generation=0)
    clock.now += 2.5
    signs = vitals.read()
    assert signs.gc == pytest.approx(0.5)
    assert signs.gc_full == 1
    for _ in range(12):
        clock.now += GC_WINDOW / 10
        signs = vitals.read()
    assert signs.gc == 0.0
    assert signs.gc_full == 1


def test_readings_are_kept_for_the_window_only(tmp_path: Path, clock: _Clock) -> None:
    vitals = Vitals(clock, clock, root=tmp_path)
    for _ in range(1_000):
        clock.now += SAMPLE
        vitals.read()
    assert len(vitals._gc_readings) <= GC_WINDOW / SAMPLE + 2


def test_the_end_of_a_collection_that_began_before_is_no_time(tmp_path: Path, clock: _Clock) -> None:
    vitals = Vitals(clock, clock, root=tmp_path)
    vitals._on_gc("stop", {"generation": 2})
    clock.now += 1.0
    assert vitals.read().gc == 0.0


@pytest.fixture
def only_asked_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("only_asked_collections")
def test_two_of_a_process_share_nothing_and_leave_nothing_behind() -> None:
    before = list(gc.callbacks)
    one, other = Vitals(), Vitals()
    one.start()
    one.start()
    assert len(gc.callbacks) == len(before) + 1
    other.start()
    gc.collect()
    one.stop()
    gc.collect()
    other.stop()
    other.stop()
    assert gc.callbacks == before
    assert (one._gc_full, other._gc_full) == (1, 2)
    assert other._gc_seconds > 0.0
