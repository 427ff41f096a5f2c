"""Inboxes by address, and whether one remembers for long enough."""

from pathlib import Path

import pytest

from catga_bus.durability.inbox.addresses import CLOCK_MARGIN, check_retention, is_too_old, make_inbox
from catga_bus.durability.inbox.memory_inbox import MemoryInbox
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.errors import ConfigurationError

DAY = 86_400.0


async def test_an_address_is_an_inbox_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a b#?.db"
    inbox = make_inbox(f"sqlite://{tmp_path}/a%20b%23%3F.db?synchronous=full&create=yes")
    assert isinstance(inbox, SqliteInbox)
    await inbox.open()
    assert path.exists()
    [(level,)] = await inbox.fetch("SELECT 2")
    assert level == 2
    await inbox.close()


async def test_every_memory_address_is_an_inbox_of_its_own() -> None:
    first, second = make_inbox("memory://"), make_inbox("memory://")
    assert isinstance(first, MemoryInbox)
    assert first is not second


async def test_an_inbox_is_returned_as_it_is() -> None:
    inbox = MemoryInbox()
    assert make_inbox(inbox) is inbox


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "no address of an inbox"),
        ("/var/lib/inbox.db", "no address of an inbox"),
        ("postgresql://localhost/inbox", "no address of an inbox"),
        ("sqlite://", "no path from the root"),
        ("sqlite:///", "no path from the root"),
        ("sqlite://inbox.db", "no path from the root"),
        ("sqlite://host/inbox.db", "no path from the root"),
        ("memory://shared", "names nothing that could be shared"),
        ("sqlite:///a.db?synchronous=off", "synchronous=off"),
        ("sqlite:///a.db?retention=5", "retention=5"),
        ("sqlite:///a.db?create", "create="),
    ],
)
def test_what_is_no_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        make_inbox(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"retention": 59.0}, "retention must be at least 60 s, got 59.0"),
        ({"retention": float("nan")}, "retention .* got nan"),
        ({"transaction_timeout": 0.0}, "transaction_timeout must be 0.01 to 3,600 s, got 0.0"),
        ({"busy_timeout": 0.0}, "busy_timeout must be 0.1 to 3,600 s, got 0.0"),
        ({"synchronous": "off"}, "synchronous must be 'normal' or 'full', got 'off'"),
    ],
)
async def test_options_have_bounds(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SqliteInbox("inbox.db", **options)  # type: ignore[arg-type]


def test_an_inbox_that_forgets_too_soon_is_refused() -> None:
    inbox = MemoryInbox(retention=7 * DAY)
    with pytest.raises(ConfigurationError, match=r"results for 7 days .* stream catga-evt keeps messages for 7 days"):
        check_retention(inbox, "catga-evt", 7 * DAY)
    check_retention(inbox, "catga-evt", 7 * DAY - CLOCK_MARGIN)
    with pytest.raises(ConfigurationError, match="retention=4600"):
        check_retention(MemoryInbox(retention=60.0), "catga-evt", 1_000.0)


def test_the_default_remembers_a_day_longer_than_the_event_log_keeps() -> None:
    check_retention(MemoryInbox(), "catga-evt", 7 * DAY)


def test_a_stream_that_keeps_for_ever_is_the_workers_business() -> None:
    inbox = MemoryInbox()
    check_retention(inbox, "catga-cmd-billing", 0.0)
    now = 1_800_000_000.0
    assert not is_too_old(inbox, now, now)
    assert not is_too_old(inbox, now - 7.9 * DAY, now)
    assert is_too_old(inbox, now - 8 * DAY, now)
    brief = MemoryInbox(retention=80.0)
    assert not is_too_old(brief, now - 69.0, now)
    assert is_too_old(brief, now - 71.0, now)
