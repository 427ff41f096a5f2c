"""How to convince a server: user, token, nkey, `.creds` file, and the TLS around them.

Files are read again for every connection, so a renewed certificate or `.creds` file is taken up by
the next one.
"""

import base64
import binascii
import os
import ssl
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

from catga_bus.errors import ConfigurationError
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_servers import Server

_JWT_LINE: Final = "BEGIN NATS USER JWT"
_SEED_LINE: Final = "BEGIN USER NKEY SEED"

_SEED_STARTS: Final = ("SU", "SA", "SO", "SN", "SC", "SX")
# How seeds look: "S" and the kind of key. What starts otherwise is the path of a file.

_SEED_LENGTH: Final = 58
# 32 bytes, a prefix of two and a check sum of two, in base32.


def wants_tls(options: ConnectionOptions) -> bool:
    """Whether any of the TLS options is given."""
    return any((options.tls_ca, options.tls_cert, options.tls_key, options.tls_hostname))


def tls_context(options: ConnectionOptions) -> ssl.SSLContext:
    """Return a context that trusts `tls_ca`, or the system's authorities if there is none.

    Raises:
        ConfigurationError: A file cannot be read or does not hold what it should.
    """
    if options.tls_key and not options.tls_cert:
        raise ConfigurationError("tls_key is given without tls_cert; a client certificate needs both")
    try:
        context = ssl.create_default_context(cafile=options.tls_ca)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"tls_ca={options.tls_ca!r} cannot be used: {error}") from error
    if options.tls_cert:
        try:
            context.load_cert_chain(options.tls_cert, options.tls_key, password=_no_password)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"tls_cert={options.tls_cert!r} with tls_key={options.tls_key!r} cannot be used: {error}"
            ) from error
    return context


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal, in the middle of an event loop.
    raise ValueError("the key is encrypted; give one without a passphrase")


def connect_fields(options: ConnectionOptions, server: Server, nonce: str | None) -> dict[str, Any]:
    """Return the fields of CONNECT that prove who we are.

    The options win over what the server's URL holds.

    Args:
        options: Where the credentials are.
        server: The server that asks.
        nonce: What the server wants signed; None if it wants nothing signed.

    Raises:
        ConfigurationError: A file or a seed cannot be used, or the `nkeys` package is missing.
    """
    fields: dict[str, Any] = {}
    user, password, token = options.user, options.password, options.token
    if user is None and token is None and server.user is not None:
        if server.password is None:
            token = server.user
        else:
            user, password = server.user, server.password
    if user is not None:
        fields["user"] = user
        fields["pass"] = password or ""
    if token is not None:
        fields["auth_token"] = token
    if options.credentials is not None:
        jwt, seed = _read_credentials(options.credentials)
        signature, _ = _sign(seed, nonce or "", f"credentials={options.credentials!r}")
        fields["jwt"] = jwt
        if nonce is not None:
            fields["sig"] = signature
    elif options.nkey_seed is not None:
        seed, origin = _read_seed(options.nkey_seed)
        signature, public_key = _sign(seed, nonce or "", origin)
        if nonce is not None:
            fields["nkey"] = public_key
            fields["sig"] = signature
    return fields


def _read_credentials(path: str) -> tuple[str, str]:
    lines = _read(path, f"credentials={path!r}").splitlines()
    found: dict[str, str] = {}
    for line, following in pairwise(lines):
        for mark in (_JWT_LINE, _SEED_LINE):
            if mark in line:
                found[mark] = following.strip()
    if not found.get(_JWT_LINE) or not found.get(_SEED_LINE):
        raise ConfigurationError(
            f"credentials={path!r} is not a .creds file: it needs the blocks {_JWT_LINE!r} and {_SEED_LINE!r}"
        )
    return found[_JWT_LINE], found[_SEED_LINE]


def _read_seed(value: str) -> tuple[str, str]:
    """Return the seed and how to speak of it without showing it."""
    text = value.strip()
    if len(text) == _SEED_LENGTH and text.startswith(_SEED_STARTS) and text.isalnum():
        return text, "nkey_seed"
    if not os.path.isfile(value) and not set(value) & set("./\\"):
        # Not shown: a seed with a typing error looks like this too.
        raise ConfigurationError("nkey_seed is neither a seed (SU and 56 more characters) nor a file")
    for line in _read(value, f"nkey_seed={value!r}").splitlines():
        if line.strip().startswith(_SEED_STARTS):
            return line.strip(), f"nkey_seed={value!r}"
    raise ConfigurationError(f"nkey_seed={value!r}: the file holds no seed (a line like SU...)")


def _read(path: str, what: str) -> str:
    if "\n" in path:
        raise ConfigurationError(f"{what.partition('=')[0]} must be the path of a file, not what is in it")
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{what} cannot be read: {error}") from error


def _check_sum(seed: str) -> None:
    # The library does not look at it, so a seed with a typing error is another key, which the server does not know.
    raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
    if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise ValueError("the check sum is wrong")


def _sign(seed: str, nonce: str, what: str) -> tuple[str, str]:
    """Return the signature of the nonce and the public key."""
    try:
        import nkeys
    except ImportError as error:
        raise ConfigurationError(
            f"{what.partition('=')[0]} needs the package nkeys: pip install 'catga-bus[nkeys]'"
        ) from error
    try:
        _check_sum(seed)
        pair = nkeys.from_seed(bytearray(seed.encode()))
        signature = base64.urlsafe_b64encode(pair.sign(nonce.encode())).rstrip(b"=").decode()
        public_key = cast("bytes", pair.public_key)  # annotated as a key object, but it is the encoded one
        return signature, public_key.decode()
    except Exception as error:
        # The library raises its own errors, binascii's and the crypto library's; neither their text nor they
        # themselves are shown, since they may quote the seed.
        raise ConfigurationError(f"{what} does not hold a usable seed ({type(error).__name__})") from None
