"""Charts show every measurement, and those that are kept are of the results that are kept."""

from pathlib import Path

import pytest

from benchmarks.charts import CHARTS, Axis, Row, draw, failover, newest, strips
from benchmarks.errors import UsageError

AXIS = Axis("s", (0.0, 1.0), target=0.5)


def test_every_value_is_a_dot_and_its_place_is_the_value() -> None:
    text = strips("t", AXIS, [Row("a", [0.0, 0.5, 1.0]), Row("b", [0.25], is_ours=False)])
    places = [float(line.split('"')[1]) for line in text.splitlines() if line.startswith("<circle")]
    assert places == [190.0, 435.0, 680.0, 312.5]


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios() -> None:
    axis = Axis("n", (1.0, 10.0, 100.0), is_logarithmic=True)
    assert [axis.share(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_value_beyond_the_axis_is_an_error_and_not_left_out(value: float) -> None:
    with pytest.raises(ValueError, match="beyond the axis"):
        strips("t", AXIS, [Row("a", [value])])


def test_labels_are_escaped() -> None:
    assert "a &lt;b&gt;" in strips("t", AXIS, [Row("a <b>", [0.5])])


def test_a_fault_is_a_dot() -> None:
    raw = newest("failover")
    assert failover(raw).count("<circle") == sum(len(faults) for faults in raw["outages"].values())


def test_without_results_it_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="python -m benchmarks failover"):
        newest("failover", tmp_path)


def test_the_charts_that_are_kept_are_those_of_the_newest_results() -> None:
    """If it fails: `python -m benchmarks.charts`."""
    assert {name: (CHARTS / name).read_text() for name in draw()} == draw()
