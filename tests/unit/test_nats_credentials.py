"""What proves who we are, and that none of it is shown when it cannot be used."""

import base64
import traceback
from pathlib import Path
from typing import Any

import nkeys
import pytest

from catga_bus.errors import ConfigurationError
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_credentials import connect_fields, tls_context, wants_tls
from catga_bus.transport.nats_servers import Server, parse_server
from tests.credentials import Operator, make_seed, public_key

SERVER = Server("host", 4222)


def fields(server: Server = SERVER, nonce: str | None = "nonce", **options: Any) -> dict[str, Any]:
    return connect_fields(ConnectionOptions(**options), server, nonce)


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("host", {}, {}),
        ("host", {"user": "a", "password": "b"}, {"user": "a", "pass": "b"}),
        ("host", {"user": "a"}, {"user": "a", "pass": ""}),
        ("host", {"token": "t"}, {"auth_token": "t"}),
        ("a:b@host", {}, {"user": "a", "pass": "b"}),
        ("t@host", {}, {"auth_token": "t"}),
        ("a:b@host", {"user": "c", "password": "d"}, {"user": "c", "pass": "d"}),
        ("a:b@host", {"token": "t"}, {"auth_token": "t"}),
    ],
)
def test_options_win_over_the_url(url: str, options: dict[str, str], expected: dict[str, str]) -> None:
    assert fields(parse_server(url), **options) == expected


def test_a_seed_signs_what_the_server_asks_for() -> None:
    seed = make_seed()
    given = fields(nkey_seed=seed)
    assert given["nkey"] == public_key(seed)
    pair = nkeys.from_seed(bytearray(seed.encode()))
    assert pair.verify(b"nonce", base64.urlsafe_b64decode(given["sig"] + "=="))
    assert fields(nkey_seed=seed, nonce=None) == {}, "nothing is signed that was not asked for"


def test_a_credentials_file_gives_the_token_and_signs(tmp_path: Path) -> None:
    file = tmp_path / "user.creds"
    Operator.make().write_credentials(file)
    given = fields(credentials=str(file))
    lines = file.read_text().splitlines()
    assert given["jwt"] == lines[1]
    pair = nkeys.from_seed(bytearray(lines[5].encode()))
    assert pair.verify(b"nonce", base64.urlsafe_b64decode(given["sig"] + "=="))


def test_a_file_with_the_line_ends_of_windows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "user.creds"
    Operator.make().write_credentials(file)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert fields(credentials=str(file))["jwt"]


def creds_text(tmp_path: Path) -> str:
    Operator.make().write_credentials(tmp_path / "text.creds")
    return (tmp_path / "text.creds").read_text()


def test_no_part_of_an_error_shows_a_seed(tmp_path: Path) -> None:
    seed = make_seed()
    changed = seed[:20] + ("A" if seed[20] != "A" else "B") + seed[21:]
    (tmp_path / "broken.nk").write_text(changed)
    text = creds_text(tmp_path)
    (tmp_path / "broken.creds").write_text(text.replace(text.splitlines()[5], changed))
    broken: list[tuple[dict[str, str], str]] = [
        ({"nkey_seed": changed}, changed),  # a typing error
        ({"nkey_seed": seed[:-1]}, seed[:-1]),
        ({"nkey_seed": seed * 10}, seed),
        ({"nkey_seed": text}, text.splitlines()[5]),
        ({"nkey_seed": str(tmp_path / "broken.nk")}, changed),
        ({"credentials": text}, text.splitlines()[5]),
        ({"credentials": str(tmp_path / "broken.creds")}, changed),
    ]
    for options, secret in broken:
        (name,) = options
        with pytest.raises(ConfigurationError, match=name) as caught:
            fields(**options)
        shown = "".join(traceback.format_exception(caught.value))
        assert secret not in shown, name


def test_a_directory_or_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary"):
        for name in ("credentials", "nkey_seed"):
            with pytest.raises(ConfigurationError, match=name) as caught:
                fields(**{name: str(path)})
            assert str(path) in str(caught.value)


def test_tls_is_wanted_with_any_of_its_options() -> None:
    assert not wants_tls(ConnectionOptions())
    for name in ("tls_ca", "tls_cert", "tls_key", "tls_hostname"):
        assert wants_tls(ConnectionOptions(**{name: "x"}))


def test_an_encrypted_key_is_refused_and_asks_nobody(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    from tests.servers import make_certificates

    certificates = make_certificates(tmp_path)
    key = serialization.load_pem_private_key(Path(certificates.client_key).read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"canary"),
        )
    )
    with pytest.raises(ConfigurationError, match="passphrase"):
        tls_context(ConnectionOptions(tls_cert=certificates.client_cert, tls_key=str(locked)))
