"""Which servers there are, and what is shown of their addresses."""

import random
import traceback

import pytest

from catga_bus.errors import ConfigurationError
from catga_bus.transport.nats_servers import Server, ServerPool, parse_server, redacted

CANARY = "canary"


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("nats://host:1", Server("host", 1)),
        ("host", Server("host", 4222)),
        ("host:1", Server("host", 1)),
        ("nats://host/", Server("host", 4222)),
        ("tls://host:1", Server("host", 1, tls=True)),
        ("NATS://Host:1", Server("host", 1)),
        ("nats://[::1]:1", Server("::1", 1)),
        ("nats://user:pass@host:1", Server("host", 1, user="user", password="pass")),
        ("nats://user:p%40s%3As%2F@host:1", Server("host", 1, user="user", password="p@s:s/")),
        ("user:pass@host:1", Server("host", 1, user="user", password="pass")),
        ("nats://token@host", Server("host", 4222, user="token")),
    ],
)
def test_addresses_are_read(url: str, server: Server) -> None:
    assert parse_server(url) == server


def test_an_address_is_shown_without_credentials_and_reads_the_same() -> None:
    for url in ("nats://user:pass@[::1]:1", "tls://token@host", "nats://host:1"):
        shown = parse_server(url).url
        assert parse_server(shown).url == shown
        assert "@" not in shown


BROKEN = [
    f"nats://user:{CANARY}@host:port",
    f"user:{CANARY}@host:99999",
    f"nats://user:{CANARY}@",
    f"nats://user:{CANARY}@host/path",
    f"nats://user:{CANARY}@[::1",
    f"http://user:{CANARY}@host",
    f"nats://user:{CANARY}@a:1,nats://user:{CANARY}@b:2",
    f"nats://user:{CANARY}@a:1,user:{CANARY}@b:2",
    f"nats://user:{CANARY}/x@host",
    f"nats://user:{CANARY}#x@host",
    f"nats://user:x://{CANARY}@host:port",
    f"nats://user:{CANARY}\u2100@host",
]


@pytest.mark.parametrize("url", BROKEN)
def test_no_part_of_an_error_shows_what_may_be_a_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_server(url)
    assert CANARY not in "".join(traceback.format_exception(caught.value)).replace(repr(url), "")
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://user:pass@host:1", "nats://host:1"),
        ("user:pass@host:1", "host:1"),
        ("nats://a@b@host", "nats://host"),
        ("nats://user:p://w@host", "nats://host"),
        ("user:p://w@host", "host"),
        ("nats://host:1", "nats://host:1"),
        ("", ""),
    ],
)
def test_addresses_are_redacted_however_broken(url: str, shown: str) -> None:
    assert redacted(url) == shown


def pool(*seeds: str) -> ServerPool:
    return ServerPool(seeds, random.Random(7))


def urls(pool: ServerPool, last: Server | None = None) -> list[str]:
    return [server.url for server in pool.round(last)]


def test_a_pool_needs_a_seed() -> None:
    with pytest.raises(ConfigurationError, match="urls"):
        pool()


def test_a_round_holds_every_server_once_and_the_last_one_at_its_end() -> None:
    servers = pool(*(f"host{number}" for number in range(5)))
    (last, *_) = servers.seeds
    orders = {tuple(urls(servers, last)) for _ in range(50)}
    assert len(orders) > 5, "the order is drawn anew"
    assert {order[-1] for order in orders} == {last.url}
    assert {frozenset(order) for order in orders} == {frozenset(seed.url for seed in servers.seeds)}


def test_the_last_server_comes_last_whatever_was_learned_of_it_since() -> None:
    servers = pool("nats://ada:secret@host1")
    servers.learn(["host2:1"], servers.seeds[0])
    for _ in range(10):
        assert urls(servers, Server("host2", 1))[-1] == "nats://host2:1"


def test_learned_servers_are_those_that_were_named_last() -> None:
    servers = pool("seed:1")
    (seed,) = servers.seeds
    servers.learn(["a:1", "seed:1", "a:1", "[::1]:2", "not an address", "b:x"], seed)
    assert sorted(urls(servers)) == ["nats://[::1]:2", "nats://a:1", "nats://seed:1"]
    servers.learn(["c:1"], seed)
    assert sorted(urls(servers)) == ["nats://c:1", "nats://seed:1"]


def learned(seed: str, address: str) -> Server:
    servers = pool(seed)
    servers.learn([address], servers.seeds[0])
    return servers.round(servers.seeds[0])[0]


def test_a_learned_server_is_reached_with_the_credentials_of_its_source() -> None:
    assert learned("tls://ada:secret@seed", "other:1") == Server("other", 1, tls=True, user="ada", password="secret")


@pytest.mark.parametrize(
    ("seed", "address", "name"),
    [
        ("tls://nats.example.org", "10.0.0.2:4222", "nats.example.org"),
        ("tls://nats.example.org", "[::1]:4222", "nats.example.org"),
        ("tls://nats.example.org", "other.example.org:4222", None),
        ("tls://10.0.0.1", "10.0.0.2:4222", None),
    ],
)
def test_the_certificate_of_a_server_named_by_its_ip_address_carries_the_name_of_the_seed(
    seed: str, address: str, name: str | None
) -> None:
    assert learned(seed, address).tls_name == name
