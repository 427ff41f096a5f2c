"""The pages of a node: `/livez` and `/readyz` in one word for everybody, `/health` in full for those who may see it."""

import hmac
import ipaddress
import re
from collections.abc import Callable
from http import HTTPStatus

import msgspec

from catga_bus.errors import ConfigurationError
from catga_bus.health import Health
from catga_bus.http.messages import HttpRequest, Response

MIN_TOKEN = 16
"""Characters of a token at least: it may be guessed at over the network."""

_TOKEN = re.compile(rf"[!-~]{{{MIN_TOKEN},}}")
_LOCAL_HOST = re.compile(r"(localhost|127(?:\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.I)


class Pages:
    """Answers requests.

    Decided: `/health` is for who has the token, and where there is none for who asks from this machine, because load,
    memory and state help an attacker to choose his moment. Local is a request from a loopback address, for a local
    host name, that does not say that it was forwarded: a web page in a browser on this machine asks under a name of its
    own. A proxy on this machine may ask for others without saying so, and then they see all: it takes a token.

    Args:
        read: Returns the present health; called in the thread of the server.
        token: Who shows it, `Authorization: Bearer <token>`, sees `/health`, and nobody else does. None: who asks from
            this machine.

    Raises:
        ConfigurationError: The token is too short, or cannot be sent.
    """

    def __init__(self, read: Callable[[], Health], token: str | None = None) -> None:
        if token is not None and _TOKEN.fullmatch(token) is None:
            raise ConfigurationError(
                f"the health token must be at least {MIN_TOKEN} printable ASCII characters without blanks; the "
                f"{len(token)} given are not"
            )
        self._read = read
        self._token = token.encode() if token is not None else None

    def answer(self, request: HttpRequest, peer: str) -> Response:
        """Return the answer to a request.

        Args:
            request: What is asked.
            peer: Address of who asks, without the port.
        """
        page = {"/livez": self._live, "/readyz": self._ready, "/health": self._details}.get(request.path)
        if page is None:
            return _word(HTTPStatus.NOT_FOUND, "unknown; there are /livez, /readyz and /health")
        if request.method not in ("GET", "HEAD"):
            return _word(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD only", ("Allow", "GET, HEAD"))
        return page(request, peer)

    def _live(self, _: HttpRequest, __: str) -> Response:
        is_live = self._read().live
        return _word(_status(holds=is_live), "live" if is_live else "dead")

    def _ready(self, _: HttpRequest, __: str) -> Response:
        is_ready = self._read().ready
        return _word(_status(holds=is_ready), "ready" if is_ready else "unready")

    def _details(self, request: HttpRequest, peer: str) -> Response:
        may_see = _is_local(request, peer) if self._token is None else self._has_token(request)
        if not may_see:
            return self._hidden()
        health = self._read()
        body = msgspec.json.format(msgspec.json.encode(health), indent=2) + b"\n"
        return Response(_status(holds=health.ready), body, "application/json")

    def _hidden(self) -> Response:
        if self._token is None:
            return _word(HTTPStatus.FORBIDDEN, "details are for who asks from this machine")
        return _word(HTTPStatus.UNAUTHORIZED, "details are for who has the token", ("WWW-Authenticate", "Bearer"))

    def _has_token(self, request: HttpRequest) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self._token is None or scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("latin-1"), self._token)


def _is_local(request: HttpRequest, peer: str) -> bool:
    headers = request.headers
    if any(name in ("forwarded", "via") or name.startswith("x-forwarded") for name in headers):
        return False
    try:
        is_loopback = ipaddress.ip_address(peer.partition("%")[0]).is_loopback
    except ValueError:
        return False
    return is_loopback and _LOCAL_HOST.fullmatch(headers.get("host", "localhost")) is not None


def _status(*, holds: bool) -> HTTPStatus:
    return HTTPStatus.OK if holds else HTTPStatus.SERVICE_UNAVAILABLE


def _word(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> Response:
    return Response(status, f"{text}\n".encode(), headers=headers)
