"""Both inboxes keep the promises of `catga_bus.durability.inbox.base`."""

from pathlib import Path

import pytest

from catga_bus.durability.inbox.memory_inbox import MemoryInbox
from catga_bus.durability.inbox.sqlite_inbox import SqliteInbox
from catga_bus.testing.inbox_contract import InboxContract, Make

TIMEOUT = 0.3


class TestMemoryInbox(InboxContract):
    @pytest.fixture
    def make(self, utc: list[float]) -> Make:
        stores: dict[str, MemoryInbox] = {}

        def make(name: str) -> MemoryInbox:
            if name not in stores:
                stores[name] = MemoryInbox(transaction_timeout=TIMEOUT, utc=lambda: utc[0])
            return stores[name]

        return make


class TestSqliteInbox(InboxContract):
    @pytest.fixture
    def make(self, tmp_path: Path, utc: list[float]) -> Make:
        return lambda name: SqliteInbox(tmp_path / f"{name}.db", transaction_timeout=TIMEOUT, utc=lambda: utc[0])


class TestSqliteInboxThatFlushes(InboxContract):
    @pytest.fixture
    def make(self, tmp_path: Path, utc: list[float]) -> Make:
        return lambda name: SqliteInbox(
            tmp_path / f"{name}.db", synchronous="full", transaction_timeout=TIMEOUT, utc=lambda: utc[0]
        )
