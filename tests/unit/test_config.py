"""What a bus refuses when it is made, naming the value, instead of failing later or not at all."""

from typing import Any

import pytest

from catga_bus import Bus, ConfigurationError


@pytest.mark.parametrize("option", ["inbox_prefix", "reply_roots"])
@pytest.mark.parametrize(
    ("root", "text"),
    [
        ("$JS", r"'\$JS' begins with \$"),
        ("catga", "'catga' lies in the namespace 'catga'"),
        ("catga.inbox", "'catga.inbox' lies in the namespace 'catga'"),
        ("a b", "'a b' cannot be the root of inboxes"),
        ("a..b", "'a..b' cannot be the root of inboxes"),
        ("a.*", r"'a\.\*' cannot be the root of inboxes"),
        ("", "'' cannot be the root of inboxes"),
    ],
)
def test_an_inbox_lies_where_answers_may_go(option: str, root: str, text: str) -> None:
    value: Any = root if option == "inbox_prefix" else ("_INBOX", root)
    with pytest.raises(ConfigurationError, match=f"{option}: {text}"):
        Bus("shop", url="memory://a", **{option: value})


def test_a_namespace_must_not_hold_the_inboxes() -> None:
    with pytest.raises(ConfigurationError, match="'_INBOX' lies in the namespace '_INBOX'"):
        Bus("shop", url="memory://a", namespace="_INBOX")
    Bus("shop", url="memory://a", inbox_prefix="catgas.inbox", reply_roots=("_INBOX", "other"))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (5, "url must be text, .* got 5"),
        ("http://x", "'http://x': the scheme must be nats:// or tls://"),
        ("nats://a:99999", "'nats://a:99999': the port is not 1 to 65535"),
        ("nats://a,nats://", "'nats://' has no host"),
        ("memory://a,nats://b", "'memory://a' stands by itself"),
        ("nats://b,memory://a", "'memory://a' stands by itself"),
        ("memory://a,memory://b", "'memory://a' stands by itself"),
        ("embedded://,nats://b", "'embedded://' stands by itself"),
        ("memory://", "names no broker"),
        ("embedded://host/path", "names the host 'host'"),
        ("embedded:///", "names the root directory"),
    ],
)
def test_an_address_that_cannot_be_used_is_named(url: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Bus("shop", url=url)
    bus = Bus("shop", url="memory://a")
    with pytest.raises(ConfigurationError, match=text):
        bus.override(url=url)


def test_an_address_from_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATGA_URL", "http://x")
    with pytest.raises(ConfigurationError, match="http://x"):
        Bus("shop")


def test_an_address_that_cannot_be_used_shows_no_credentials() -> None:
    for url in ("nats://ann:hunter2@a,memory://b", "http://ann:hunter2@a", "nats://ann:hunter2@a:99999"):
        with pytest.raises(ConfigurationError) as caught:
            Bus("shop", url=url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"metadata": {"a": 1}}, "metadata must be a dictionary of text, got 1 for 'a'"),
        ({"metadata": {1: "a"}}, "metadata must be a dictionary of text, got 'a' for 1"),
        ({"metadata": ["a"]}, r"metadata must be a dictionary of text, got \['a'\]"),
        ({"metadata": {"a": "\ud800"}}, "metadata must be a dictionary of text"),
        ({"zone": 5}, "zone must be text, got 5"),
        ({"region": b"eu"}, "region must be text, got b'eu'"),
        ({"version": 1.0}, "version must be text, got 1.0"),
        ({"version": None}, "version must be text, got None"),
        ({"version": "\ud800"}, "version must be text"),
    ],
)
def test_what_others_are_told_of_a_node_is_text(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Bus("shop", url="memory://a", **options)


@pytest.mark.parametrize("timeout", ["5", b"5", [5], True, object()])
async def test_a_timeout_that_is_no_number_is_named(timeout: Any) -> None:
    async with Bus("client", url="memory://timeouts") as bus:
        with pytest.raises(ConfigurationError, match="timeout must be seconds above 0"):
            await bus.send(object(), timeout=timeout)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"partitions": 0}, "partitions must be 1 to 1,024, got 0"),
        ({"partitions": 1_025}, "partitions must be 1 to 1,024, got 1025"),
        ({"partitions": 1.5}, r"an option has the wrong type: .*partitions"),
        ({"stream_replicas": 0}, "stream_replicas must be 1 to 5, got 0"),
        ({"stream_replicas": 6}, "stream_replicas must be 1 to 5, got 6"),
        ({"stream_storage": "disk"}, r"an option has the wrong type: .*disk.*stream_storage"),
        ({"manage_streams": "never"}, r"an option has the wrong type: .*never.*manage_streams"),
        ({"command_max_bytes": 1_000}, "command_max_bytes must be 65,536 to"),
        ({"event_max_bytes": 1_000}, "event_max_bytes must be 65,536 to"),
        ({"event_max_age": 1.0}, "event_max_age must be 300 to"),
        ({"dead_letter_max_bytes": -1}, "dead_letter_max_bytes must be 65,536 to"),
        ({"dead_letter_max_age": 0}, "dead_letter_max_age must be 300 to"),
        ({"store_timeout": 0}, "store_timeout must be 0.001 to"),
        ({"unroutable_after": 0.5}, "unroutable_after must be 1 to"),
    ],
)
def test_what_streams_cannot_be_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Bus("shop", url="memory://a", **options)


def test_replicas_may_be_left_open() -> None:
    assert Bus("shop", url="memory://a").config.stream_replicas is None
    assert Bus("shop", url="memory://a", stream_replicas=5).config.stream_replicas == 5
