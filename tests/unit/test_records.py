"""What the bucket of owners says, and what the names of consumers say."""

import pytest

from catga_bus.partition.owners import Holding
from catga_bus.partition.records import (
    Consumers,
    Domain,
    Held,
    Mark,
    OwnerRecord,
    consumer_name,
    consumer_of,
    holding_of,
    read_record,
    write_record,
)
from catga_bus.wire import Names

NAMES = Names("catga")


def record(**fields: object) -> OwnerRecord:
    given = {"node": "a", "incarnation": (1, 2), "nonce": "n", **fields}
    return OwnerRecord(**given)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written() -> None:
    whole = record(
        state="released",
        last="shop-p3-e7-00000000",
        epoch=7,
        floor=4,
        deaths=2,
        first=5,
        mark=Mark(5, 1),
    )
    assert read_record(write_record(whole)) == whole
    assert write_record(record()).startswith(b'{"node":"a","incarnation":[1,2],"nonce":"n"')


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"node":"a"}',
        b'{"node":"a","incarnation":[1],"nonce":"n"}',
        b'{"node":"a","incarnation":[1,-2],"nonce":"n"}',
        b'{"node":"a","incarnation":[1,2],"nonce":"n","state":"stolen"}',
        b'{"node":"a","incarnation":[1,2],"nonce":"n","epoch":-1}',
        b'{"node":"a","incarnation":[1,2],"nonce":"n","mark":[1]}',
        b'{"node":"' + b"a" * 10_000 + b'","incarnation":[1,2],"nonce":"n"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_record_is_nobodys(value: bytes | None) -> None:
    assert read_record(value) is None


def test_a_newer_bus_may_say_more() -> None:
    assert read_record(b'{"node":"a","incarnation":[1,2],"nonce":"n","mood":"good"}') == record()


def test_one_life_of_a_node_wrote_it() -> None:
    one = record()
    assert one.is_by("a", (1, 2))
    assert not one.is_by("a", (1, 3))
    assert not one.is_by("b", (1, 2))


@pytest.mark.parametrize(
    ("held", "epoch"),
    [
        (Held(None, 0), 0),
        (Held(None, 9), 9),  # deleted: it may have been as high
        (Held(record(epoch=3), 9), 9),  # a claim is granted its revision
        (Held(record(epoch=12), 9), 12),  # or what it asks for, in a bucket whose revisions began anew
        (Held(record(epoch=7, last="c"), 9), 7),  # an amendment grants nothing
    ],
)
def test_the_epoch_that_was_granted_last(held: Held, epoch: int) -> None:
    assert held.epoch == epoch


def test_what_a_plan_needs_to_know() -> None:
    assert holding_of(Held(None, 4)) is None
    assert holding_of(Held(record(epoch=3), 9)) == Holding("a", 9, (1, 2))
    assert holding_of(Held(record(epoch=7, last="c"), 9)) == Holding("a", 7, (1, 2))
    assert holding_of(Held(record(epoch=7, last="c", state="released"), 9)) == Holding(None, 9)
    assert holding_of(Held(record(epoch=7, last="c", state="released"), 2)) == Holding(None, 8)  # a new bucket


def test_the_name_of_a_consumer_follows_from_the_claim_and_is_kept_by_an_amendment() -> None:
    name = consumer_name("shop", 3, 9, "n")
    assert name == "shop-p3-e9-" + name[-8:]
    assert consumer_of("shop", 3, Held(None, 9)) is None
    assert consumer_of("shop", 3, Held(record(epoch=3), 9)) == name
    assert consumer_of("shop", 3, Held(record(epoch=9, last=name), 15)) == name
    assert consumer_name("shop", 3, 9, "other") != name


def test_the_consumers_of_a_partition_are_told_from_everybody_elses() -> None:
    mine = [consumer_name("shop", 3, epoch, "n") for epoch in (7, 12)]
    others = [
        consumer_name("shop", 33, 50, "n"), consumer_name("shop-p3", 3, 60, "n"), "somebody", "shop-p3-e7",
        "shop-p3-e7-xyz",
        "shop-p3-e7-00000000-more", "shop-p3-e1234567890123456-00000000", "",
    ]  # fmt: skip
    found = Consumers("shop", [*mine, *others])
    assert found.of(3) == {mine[0]: 7, mine[1]: 12}
    assert found.of(4) == {}
    assert found.highest_epoch == 50
    assert Consumers("shop", []).highest_epoch == 0


def test_a_domain_knows_where_its_records_and_owners_are() -> None:
    queue = Domain(names=NAMES, service="shop")
    log = Domain(names=NAMES, service="shop", types=("Debited", "Credited"))
    assert (queue.is_log, queue.kind, queue.stream) == (False, "cmd", "catga-cmd-shop")
    assert (log.is_log, log.kind, log.stream) == (True, "evt", "catga-evt")
    assert queue.filters(3) == ("catga.cmd.shop.3",)
    assert log.filters(3) == ("catga.evt.Debited.3", "catga.evt.Credited.3")
    assert (queue.key(3), log.key(3)) == ("shop.cmd.3", "shop.evt.3")
