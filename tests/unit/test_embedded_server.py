import os
import re
from pathlib import Path
from typing import Any

import pytest

from catga_bus.embedded import EmbeddedServer
from catga_bus.embedded.settings import server_settings
from catga_bus.embedded.store import Store
from catga_bus.errors import BusStateError, ConfigurationError


def test_a_url_without_a_path_means_a_temporary_store() -> None:
    assert EmbeddedServer.parse("embedded://").store is None


def test_a_url_with_a_path_means_that_store() -> None:
    server = EmbeddedServer.parse("embedded:///var/lib/my%20store")
    assert server.store == Path("/var/lib/my store")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nats://127.0.0.1:4222", "does not start with embedded://"),
        ("embedded://data/store", "after three slashes: embedded:///data/store"),
        ("embedded:///", "names the root directory"),
        ("embedded:////", "names the root directory"),
        ("embedded:///data?port=4222", "takes no options"),
        ("embedded:///data#1", "takes no options"),
    ],
)
def test_another_url_is_refused_with_its_reason(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)) as caught:
        EmbeddedServer.parse(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"port": 0}, "port must be 1 to 65535"),
        ({"port": 65_536}, "got 65536"),
        ({"max_payload_bytes": 100}, "got 100"),
        ({"max_payload_bytes": 67_108_865}, "1,024 to 67,108,864"),
        ({"start_timeout": 0.0}, "got 0.0"),
        ({"host": ""}, "got ''"),
        ({"host": "--jetstream"}, "got '--jetstream'"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)):
        EmbeddedServer(**options)


def test_a_server_that_was_not_started_has_no_url() -> None:
    with pytest.raises(BusStateError, match="has not been started"):
        _ = EmbeddedServer().url


async def test_only_the_owner_waits_for_the_end() -> None:
    with pytest.raises(BusStateError, match="only the owner"):
        await EmbeddedServer().wait()


async def test_stopping_what_was_never_started_is_fine() -> None:
    await EmbeddedServer().stop()


def test_only_a_store_that_stays_is_synced_at_every_write() -> None:
    assert "sync_interval: always" in server_settings(max_payload_bytes=2_048, durable=True)
    temporary = server_settings(max_payload_bytes=2_048, durable=False)
    assert "sync_interval" not in temporary
    assert "max_payload: 2048\n" in temporary


def test_the_lock_of_a_store_is_held_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lock = store.try_lock()
    assert lock is not None
    assert store.try_lock() is None
    os.close(lock)
    again = store.try_lock()
    assert again is not None
    os.close(again)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', "\x00"])
def test_a_damaged_record_counts_as_none(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.record_file.write_text(text)
    assert store.record() is None
    assert store.live_record() is None


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(ConfigurationError, match="cannot be made"):
            Store(path)


def test_a_path_with_a_null_byte_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="null byte"):
        Store(Path("/tmp/a\0b"))
