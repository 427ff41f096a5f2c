"""Keys and signed users for servers that trust an operator, made as `nsc` makes them."""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nkeys


def make_seed(kind: int = nkeys.PREFIX_BYTE_USER) -> str:
    """Return a new seed, by default a user's."""
    return nkeys.encode_seed(os.urandom(32), kind).decode()


def public_key(seed: str) -> str:
    """Return the public key of a seed."""
    return nkeys.from_seed(bytearray(seed.encode())).public_key.decode()


def _token(claims: dict[str, Any], seed: str) -> str:
    def part(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    head = part(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    signed = f"{head}.{part(json.dumps(claims).encode())}"
    return f"{signed}.{part(nkeys.from_seed(bytearray(seed.encode())).sign(signed.encode()))}"


@dataclass(frozen=True)
class Operator:
    """An operator and one account of it."""

    operator_seed: str
    account_seed: str

    @classmethod
    def make(cls) -> "Operator":
        """Make both anew."""
        return cls(make_seed(nkeys.PREFIX_BYTE_OPERATOR), make_seed(nkeys.PREFIX_BYTE_ACCOUNT))

    @property
    def config(self) -> str:
        """The configuration of a server that trusts this operator and knows its account."""
        operator, account = public_key(self.operator_seed), public_key(self.account_seed)
        unlimited = {"subs": -1, "data": -1, "payload": -1, "conn": -1, "imports": -1, "exports": -1}
        return "\n".join(
            (
                f"operator: {self._claim(operator, self.operator_seed, {'type': 'operator'})}",
                "resolver: MEMORY",
                f"resolver_preload: {{ {account}: "
                + self._claim(account, self.operator_seed, {"type": "account", "limits": unlimited})
                + " }",
            )
        )

    def write_credentials(self, file: Path, *, expires_at: int | None = None) -> None:
        """Write the `.creds` file of a new user.

        Args:
            file: Where to; replaced at once if it is there.
            expires_at: Unix time after which the server sends the user away; never by default.
        """
        seed = make_seed()
        more = {} if expires_at is None else {"exp": expires_at}
        claim = self._claim(
            public_key(seed), self.account_seed, {"type": "user", "subs": -1, "data": -1, "payload": -1}, **more
        )
        text = (
            f"-----BEGIN NATS USER JWT-----\n{claim}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
        fresh = file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(file)

    @staticmethod
    def _claim(subject: str, issuer_seed: str, nats: dict[str, Any], **more: int) -> str:
        claims = {
            "jti": os.urandom(8).hex(),
            "iat": 1_700_000_000,
            "iss": public_key(issuer_seed),
            "name": "test",
            "sub": subject,
            "nats": {**nats, "version": 2},
            **more,
        }
        return _token(claims, issuer_seed)
