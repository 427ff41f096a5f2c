"""The progress: what a line of it says, and which display a stream gets."""

import io
import logging
import re
import sys

import msgspec

from catga_bus.demo import app
from catga_bus.demo.display import PlainDisplay, SilentDisplay, display_for, summary
from catga_bus.demo.faults import Moment, What
from catga_bus.demo.progress import Progress, effect_rates

PROGRESS = Progress(
    total=27_004,
    stored=3_017,
    failed=4,
    in_flight=9,
    effects=3_000,
    seconds=1.5,
    p50_ms=0.5,
    p99_ms=2.25,
    per_node={"desk-2": 2_000, "desk-1": 1_000},
    owners=("desk-1", "desk-2", "desk-2", None, "desk-1"),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_holds_all_figures():
    assert summary(PROGRESS) == (
        "3,000 of 27,004  2,000/s  17 waiting  stored in p50 0.50 ms p99 2.25 ms  [122· 1]  desk-1 33%  desk-2 67%  "
        "4 failed"
    )


def test_a_line_tells_what_befell_a_node_even_one_that_has_no_effect():
    moments = (
        Moment(0.4, "desk-2", What.KILLED),
        Moment(0.9, "desk-2", What.FAULTED),
        Moment(1.4, "desk-3", What.STARTED),
    )
    assert summary(msgspec.structs.replace(PROGRESS, failed=0, moments=moments)).endswith(
        "desk-1 33%  desk-2 67% (killed at 0.4 s, seen as faulted)  desk-3 0% (started at 1.4 s)"
    )


def test_rates_are_those_between_two_looks():
    later = msgspec.structs.replace(PROGRESS, seconds=2.0, per_node={"desk-1": 1_100, "desk-2": 2_000, "desk-3": 7})
    assert effect_rates(PROGRESS, later) == {"desk-1": 200.0, "desk-2": 0.0, "desk-3": 14.0}
    assert effect_rates(PROGRESS, PROGRESS) == {"desk-1": 0.0, "desk-2": 0.0}


def test_a_picture_shows_who_is_killed_and_how_fast_the_others_are():
    stream = Terminal()
    killed = Moment(1.6, "desk-2", What.KILLED)
    with display_for(stream) as display:
        display.update(PROGRESS)
        display.update(
            msgspec.structs.replace(
                PROGRESS, seconds=1.75, effects=3_050, per_node={"desk-1": 1_050, "desk-2": 2_000}, moments=(killed,)
            )
        )
    last = stream.getvalue().rpartition("desk-1")[2]
    assert "200/s" in last
    assert "0/s" in last
    assert "killed at 1.6 s" in last


def test_a_line_before_the_first_effect_holds_dashes():
    start = Progress(
        total=5, stored=0, failed=0, in_flight=1, effects=0, seconds=0.0, p50_ms=None, p99_ms=None,
        per_node={}, owners=(None, None),
    )  # fmt: skip
    assert summary(start) == "0 of 5  0/s  0 waiting  stored in p50 - p99 -  [··]"


def test_a_stream_that_is_no_terminal_gets_lines():
    stream = io.StringIO()
    with display_for(stream) as display:
        display.say("three nodes")
        display.update(PROGRESS)
    assert isinstance(display, PlainDisplay)
    assert stream.getvalue().splitlines() == ["three nodes", summary(PROGRESS)]


def test_lines_come_every_other_second_and_when_the_map_changes_and_at_the_end():
    stream = io.StringIO()
    replace = msgspec.structs.replace
    looks = [
        PROGRESS,
        replace(PROGRESS, seconds=1.75),
        replace(PROGRESS, seconds=2.0, owners=("desk-1",) * 5),
        replace(PROGRESS, seconds=3.75, owners=("desk-1",) * 5),
        replace(PROGRESS, seconds=4.0, owners=("desk-1",) * 5),
        replace(PROGRESS, seconds=4.25, owners=("desk-1",) * 5, effects=27_004),
    ]
    with display_for(stream) as display:
        for look in looks:
            display.update(look)
    assert stream.getvalue().splitlines() == [summary(looks[place]) for place in (0, 2, 4, 5)]


def test_a_picture_shows_the_owner_of_each_partition():
    stream = Terminal()
    with display_for(stream) as display:
        display.update(PROGRESS)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.search(r"partitions  1   2   2   ·   1", text)


def test_a_terminal_gets_a_picture_with_all_figures():
    stream = Terminal()
    with display_for(stream) as display:
        display.say("three [nodes]")
        display.update(PROGRESS)
    assert not isinstance(display, PlainDisplay)
    for part in ("three [nodes]", "3000/27004", "17", "0.50 ms", "2.25 ms", "desk-2", "67%"):
        assert part in stream.getvalue()


def test_a_line_that_is_said_above_the_picture_leaves_it_as_it_is():
    stream = Terminal()
    with display_for(stream) as display:
        display.update(PROGRESS)
        display.say("[bold]three nodes[/]")
    assert "[bold]three nodes[/]" in stream.getvalue()
    assert stream.getvalue().count("[bold]") == 1


def test_a_terminal_without_rich_gets_lines(monkeypatch):
    monkeypatch.delitem(sys.modules, "catga_bus.demo.rich_display", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert isinstance(display_for(Terminal()), PlainDisplay)


def test_the_silent_display_shows_nothing(capsys):
    with SilentDisplay() as display:
        display.say("three nodes")
        display.update(PROGRESS)
    assert capsys.readouterr() == ("", "")


def test_what_the_bus_warns_of_is_a_line_of_the_display(capsys):
    stream = io.StringIO()
    logger = logging.getLogger("catga_bus.cluster")
    with app._warnings_in(display_for(stream)):
        logger.warning("node %s is dead", "desk-2")
        logger.info("not worth a line")
    logger.info("nor is this")
    assert stream.getvalue() == "the bus: node desk-2 is dead\n"
    assert capsys.readouterr().err == ""
