"""Reaching and convincing a server: what works, and how each thing that cannot work is said."""

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catga_bus.errors import AuthenticationError, BusStateError, ConfigurationError, DisconnectedError
from catga_bus.testing import RecordedEvents
from catga_bus.transport.nats_core import NatsTransport
from tests.credentials import Operator, make_seed, public_key
from tests.fake_nats import FakeNats
from tests.servers import Certificates, NatsServer, free_port, make_certificates

pytestmark = pytest.mark.nats

Make = Callable[..., tuple[NatsTransport, RecordedEvents]]
Start = Callable[..., NatsServer]


async def proves_itself(transport: NatsTransport) -> None:
    """Connect, and see one message come back."""
    await transport.connect()
    came = asyncio.get_running_loop().create_future()
    inbox = transport.new_inbox()
    await transport.subscribe(inbox, lambda *message: came.set_result(message[1]))
    transport.publish(inbox, b"hello")
    await transport.flush()
    assert await asyncio.wait_for(came, 5) == b"hello"


@pytest.fixture
def nkey_seed() -> str:
    return make_seed()


@pytest.fixture
def guarded(start_server: Start, nkey_seed: str) -> NatsServer:
    """A server that knows a user with a password and a user with a key."""
    return start_server(
        'authorization { users = [ { user: "ada", password: "s3cret/@:" }, '
        f'{{ nkey: "{public_key(nkey_seed)}" }} ] }}'
    )


async def test_a_user_with_a_password_is_let_in(make_transport: Make, guarded: NatsServer) -> None:
    transport, _ = make_transport(guarded.url, user="ada", password="s3cret/@:")
    await proves_itself(transport)


async def test_a_user_in_the_url_is_let_in_and_never_shown(
    make_transport: Make, guarded: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "catga_bus.transport")
    transport, _ = make_transport(f"nats://ada:s3cret%2F%40%3A@{guarded.address}", name="reader")
    assert transport.url == guarded.url
    await proves_itself(transport)
    assert transport.url == guarded.url
    (line,) = (record.getMessage() for record in caplog.records if "connected to" in record.getMessage())
    assert guarded.url in line
    assert line.startswith("reader: ")
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("where", ["option", "url"])
async def test_a_token_is_let_in(make_transport: Make, start_server: Start, where: str) -> None:
    server = start_server('authorization { token: "t0ken" }')
    if where == "option":
        transport, _ = make_transport(server.url, token="t0ken")
    else:
        transport, _ = make_transport(f"nats://t0ken@{server.address}")
    await proves_itself(transport)


@pytest.mark.parametrize("where", ["seed", "file"])
async def test_a_key_is_let_in(
    make_transport: Make, guarded: NatsServer, nkey_seed: str, tmp_path: Path, where: str
) -> None:
    file = tmp_path / "user.nk"
    file.write_text(f"# the key of a user\n{nkey_seed}\n")
    transport, _ = make_transport(guarded.url, nkey_seed=nkey_seed if where == "seed" else str(file))
    await proves_itself(transport)


async def test_a_credentials_file_is_let_in(make_transport: Make, start_server: Start, tmp_path: Path) -> None:
    operator = Operator.make()
    server = start_server(operator.config)
    operator.write_credentials(tmp_path / "user.creds")
    transport, _ = make_transport(server.url, credentials=str(tmp_path / "user.creds"))
    await proves_itself(transport)


@pytest.mark.parametrize(
    "options",
    [{}, {"user": "ada", "password": "wrong"}, {"token": "wrong"}, {"user": "bob"}],
    ids=["nothing", "wrong password", "wrong token", "unknown user"],
)
async def test_wrong_credentials_are_refused_at_once_and_not_shown(
    make_transport: Make, guarded: NatsServer, options: dict[str, str]
) -> None:
    transport, _ = make_transport(guarded.url, connect_timeout=60, **options)
    with pytest.raises(AuthenticationError) as caught:
        await transport.connect()
    assert guarded.url in str(caught.value)
    assert "wrong" not in str(caught.value)
    assert not transport.is_connected


async def test_a_key_that_the_server_does_not_know_is_refused(make_transport: Make, guarded: NatsServer) -> None:
    transport, _ = make_transport(guarded.url, nkey_seed=make_seed(), connect_timeout=60)
    with pytest.raises(AuthenticationError):
        await transport.connect()


async def test_a_refused_transport_may_try_again(make_transport: Make, start_server: Start) -> None:
    server = start_server('authorization { token: "other" }')
    transport, _ = make_transport(server.url, token="t0ken")
    with pytest.raises(AuthenticationError):
        await transport.connect()
    server.restart('authorization { token: "t0ken" }')
    await proves_itself(transport)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("credentials", "not a credentials file"),
        ("credentials", None),
        ("nkey_seed", "no seed here"),
        ("nkey_seed", None),
        ("tls_ca", "not a certificate"),
        ("tls_ca", None),
        ("tls_cert", "not a certificate"),
        ("tls_cert", None),
    ],
)
async def test_a_file_that_cannot_be_used_is_named_at_once(
    make_transport: Make, nats_server: NatsServer, tmp_path: Path, option: str, text: str | None
) -> None:
    file = tmp_path / "file.pem"
    if text is not None:
        file.write_text(text)
    transport, _ = make_transport(nats_server.url, connect_timeout=60, **{option: str(file)})
    with pytest.raises(ConfigurationError, match=option) as caught:
        await transport.connect()
    assert str(file) in str(caught.value)


async def test_a_broken_seed_is_refused_without_showing_it(make_transport: Make, nats_server: NatsServer) -> None:
    seed = make_seed()
    for broken in (seed[:-1], seed.lower(), "SU" + "!" * 56, "SU" + "1" * 56):
        transport, _ = make_transport(nats_server.url, nkey_seed=broken)
        with pytest.raises(ConfigurationError, match="nkey_seed") as caught:
            await transport.connect()
        assert broken not in str(caught.value)


async def test_a_key_without_its_certificate_is_refused(make_transport: Make, certificates: Certificates) -> None:
    transport, _ = make_transport("nats://127.0.0.1", tls_key=certificates.client_key)
    with pytest.raises(ConfigurationError, match="tls_cert"):
        await transport.connect()


async def test_keys_without_the_package_say_what_to_install(
    make_transport: Make, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", None)
    transport, _ = make_transport(nats_server.url, nkey_seed=make_seed())
    with pytest.raises(ConfigurationError, match=r"pip install 'catga-bus\[nkeys\]'"):
        await transport.connect()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://somewhere:80", "nats:// or tls://"),
        ("nats://:4222", "no host"),
        ("nats://host:port", "port"),
        ("nats://host:99999", "port"),
        ("nats://a:1,nats://b:2", "each server by itself|comma"),
        ("nats://host/path", "after the port"),
        ("nats://[::1", "cannot be read"),
    ],
)
async def test_an_address_that_cannot_be_used_is_named(make_transport: Make, url: str, why: str) -> None:
    transport, _ = make_transport(url)
    with pytest.raises(ConfigurationError, match=why):
        await transport.connect()


async def test_a_broken_address_is_shown_without_its_password(make_transport: Make) -> None:
    transport, _ = make_transport("nats://ada:s3cret@host:port")
    with pytest.raises(ConfigurationError) as caught:
        await transport.connect()
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in transport.url


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("connect_timeout", 0.0),
        ("reconnect_delay", 61.0),
        ("ping_interval", float("nan")),
        ("write_limit_bytes", 1),
        ("inbox_prefix", "a..b"),
    ],
)
async def test_an_option_out_of_bounds_is_named(make_transport: Make, option: str, value: Any) -> None:
    transport, _ = make_transport("nats://127.0.0.1", **{option: value})
    with pytest.raises(ConfigurationError, match="inbox|a..b" if option == "inbox_prefix" else option):
        await transport.connect()


async def test_no_address_at_all_is_refused(make_transport: Make) -> None:
    transport, _ = make_transport()
    with pytest.raises(ConfigurationError, match="urls"):
        await transport.connect()


async def test_dead_addresses_are_all_named_with_their_reasons(make_transport: Make) -> None:
    dead = f"nats://ada:s3cret@127.0.0.1:{free_port()}"
    async with FakeNats(is_mute=True) as mute:
        transport, events = make_transport(dead, mute.url, "nats://no-such-host.invalid", connect_timeout=0.6)
        with pytest.raises(DisconnectedError) as caught:
            await asyncio.wait_for(transport.connect(), 5)
        assert mute.connections, "every seed is tried, whatever the others do"
        silent = mute.url
    text = str(caught.value)
    assert "0.6 s" in text
    assert dead.replace("ada:s3cret@", "") in text
    assert f"{silent} (no answer in time)" in text
    assert "no-such-host.invalid" in text
    assert "s3cret" not in text
    assert not transport.is_connected
    assert (events.disconnected, events.reconnected) == ([], [])


async def test_a_server_that_says_nothing_does_not_keep_us_from_the_next(
    make_transport: Make, nats_server: NatsServer
) -> None:
    async with FakeNats(is_mute=True) as mute:
        for _ in range(4):  # the seeds are tried in random order
            transport, _ = make_transport(mute.url, nats_server.url, connect_timeout=1.0)
            await proves_itself(transport)
            assert transport.url == nats_server.url


async def test_a_server_that_comes_up_late_is_found(make_transport: Make, start_server: Start) -> None:
    server = start_server()
    server.kill()
    transport, _ = make_transport(server.url, connect_timeout=30)
    connecting = asyncio.ensure_future(proves_itself(transport))
    await asyncio.sleep(0)
    server.start()
    await connecting


async def test_closing_ends_a_connect_that_goes_on(make_transport: Make) -> None:
    transport, _ = make_transport(f"nats://127.0.0.1:{free_port()}", connect_timeout=60)
    connecting = asyncio.ensure_future(transport.connect())
    await asyncio.sleep(0)
    await transport.close()
    with pytest.raises(BusStateError):
        await asyncio.wait_for(connecting, 5)


async def test_a_cancelled_connect_leaves_nothing_behind(make_transport: Make) -> None:
    async with FakeNats(is_mute=True) as mute:
        transport, _ = make_transport(mute.url, connect_timeout=60)
        connecting = asyncio.ensure_future(transport.connect())
        while not mute.connections:
            await asyncio.sleep(0.001)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert not transport.is_connected


async def test_a_server_may_describe_itself_again_during_the_hand_shake(make_transport: Make) -> None:
    async with FakeNats(before_first_pong=b'INFO {"max_payload": 1000}\r\n+OK\r\nPING\r\n') as server:
        transport, _ = make_transport(server.url)
        await transport.connect()
        assert transport.is_connected


@pytest.mark.parametrize("url", ["localhost:{port}", "127.0.0.1:{port}", "nats://localhost:{port}/"])
async def test_addresses_may_be_written_in_several_ways(
    make_transport: Make, nats_server: NatsServer, url: str
) -> None:
    transport, _ = make_transport(url.format(port=nats_server.port))
    await proves_itself(transport)


async def test_the_inbox_prefix_is_used(make_transport: Make, start_server: Start) -> None:
    server = start_server(
        'authorization { users = [ { user: a, password: b, permissions: { subscribe: ["_INBOX_a.>"] } } ] }'
    )
    transport, _ = make_transport(server.url, user="a", password="b", inbox_prefix="_INBOX_a")
    assert transport.new_inbox().startswith("_INBOX_a.")
    await proves_itself(transport)


# TLS.


@pytest.fixture
def tls_server(start_server: Start, certificates: Certificates) -> NatsServer:
    return start_server(certificates.config(), scheme="tls")


@pytest.fixture
def strict_server(start_server: Start, certificates: Certificates) -> NatsServer:
    """A server that wants a certificate from its clients."""
    return start_server(certificates.config(verify=True))


async def test_tls_with_a_private_authority(
    make_transport: Make, tls_server: NatsServer, certificates: Certificates
) -> None:
    transport, _ = make_transport(tls_server.url, tls_ca=certificates.ca)
    await proves_itself(transport)
    assert transport.url == tls_server.url


async def test_tls_with_a_client_certificate(
    make_transport: Make, strict_server: NatsServer, certificates: Certificates
) -> None:
    transport, _ = make_transport(
        strict_server.url,
        tls_ca=certificates.ca,
        tls_cert=certificates.client_cert,
        tls_key=certificates.client_key,
    )
    await proves_itself(transport)


async def test_a_missing_client_certificate_fails_in_time(
    make_transport: Make, strict_server: NatsServer, certificates: Certificates
) -> None:
    transport, _ = make_transport(strict_server.url, tls_ca=certificates.ca, connect_timeout=0.5)
    with pytest.raises(DisconnectedError, match=strict_server.address):
        await transport.connect()


async def test_an_unknown_authority_fails_in_time_and_says_so(make_transport: Make, tls_server: NatsServer) -> None:
    transport, _ = make_transport(tls_server.url, connect_timeout=0.5)
    with pytest.raises(DisconnectedError, match=r"(?i)certificate.verify.failed"):
        await transport.connect()


async def test_the_name_in_the_certificate_counts_and_can_be_given(
    make_transport: Make, start_server: Start, tmp_path: Path
) -> None:
    named = make_certificates(tmp_path / "named", "nats.example.org")
    server = start_server(named.config())
    transport, _ = make_transport(server.url, tls_ca=named.ca, connect_timeout=0.5)
    with pytest.raises(DisconnectedError, match=r"(?i)certificate.verify.failed"):
        await transport.connect()
    transport, _ = make_transport(server.url, tls_ca=named.ca, tls_hostname="nats.example.org")
    await proves_itself(transport)


@pytest.mark.parametrize("how", ["option", "scheme"])
async def test_a_server_without_tls_is_refused_where_tls_was_asked_for(
    make_transport: Make, start_server: Start, certificates: Certificates, how: str
) -> None:
    server = start_server(scheme="tls" if how == "scheme" else "nats")
    options = {"tls_ca": certificates.ca} if how == "option" else {}
    transport, _ = make_transport(server.url, connect_timeout=0.3, token="t0ken", **options)
    with pytest.raises(DisconnectedError, match="does not offer TLS"):
        await transport.connect()
    assert "t0ken" not in server.log


async def test_something_else_than_a_nats_server_fails_in_time(make_transport: Make) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await writer.drain()
        writer.transport.abort()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        transport, _ = make_transport(f"nats://127.0.0.1:{port}", connect_timeout=0.3)
        with pytest.raises(DisconnectedError, match="not the NATS protocol"):
            await transport.connect()


async def test_small_messages_are_not_held_back_by_the_kernel(make_transport: Make, nats_server: NatsServer) -> None:
    transport, _ = make_transport(nats_server.url)
    await transport.connect()
    wire = transport._connection._socket._transport
    assert wire.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
