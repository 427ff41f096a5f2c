"""The health server's requests, responses, addresses and pages, as values."""

import json
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catga_bus import BusState, ConfigurationError, Health
from catga_bus.health import Facts, HealthLimits, assess
from catga_bus.http.address import parse_address, show_address
from catga_bus.http.messages import HttpError, HttpRequest, Response, parse_request, write_response
from catga_bus.http.pages import Pages

GOOD = assess(Facts(state=BusState.STARTED, is_connected=True, is_subscribed=True), HealthLimits())
DRAINING = assess(Facts(state=BusState.DRAINING, is_connected=True), HealthLimits())
CLOSED = assess(Facts(state=BusState.CLOSED), HealthLimits())
TOKEN = "a-token-of-24-characters"


def head(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


# -- requests ----------------------------------------------------------------------------------------------


def test_a_request_is_taken_apart() -> None:
    request = parse_request(head("GET /livez?verbose=1 HTTP/1.1", "Host: a:1", "X-Empty:", "Accept:  */* "))
    assert request == HttpRequest("GET", "/livez", {"host": "a:1", "x-empty": "", "accept": "*/*"})


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("",), 400),
        (("GET /livez",), 400),
        (("get /livez HTTP/1.1", "Host: a"), 400),
        (("GET  /livez HTTP/1.1", "Host: a"), 400),
        (("GET livez HTTP/1.1", "Host: a"), 400),
        (("GET http://a/livez HTTP/1.1", "Host: a"), 400),
        (("GET /livez HTTP/2.0", "Host: a"), 400),
        (("GET /li\tvez HTTP/1.1", "Host: a"), 400),
        (("PRI * HTTP/2.0",), 400),
        (("GET /livez HTTP/1.1",), 400),
        (("GET /livez HTTP/1.1", "Host: a", "Host: b"), 400),
        (("GET /livez HTTP/1.1", "Host: a", "no colon"), 400),
        (("GET /livez HTTP/1.1", "Host: a", "Name : b"), 400),
        (("GET /livez HTTP/1.1", "Host: a", " folded"), 400),
        (("GET /livez HTTP/1.1", "Host: a\nX: b"), 400),
        (("GET /livez HTTP/1.1", "Host: a\0"), 400),
        (("GET /livez HTTP/1.1", "Host: a", *(f"X-{n}: 1" for n in range(64))), 431),
        (("GET /livez HTTP/1.1", "Host: a", "Content-Length: 5"), 413),
        (("GET /livez HTTP/1.1", "Host: a", "Content-Length: -0"), 413),
        (("GET /livez HTTP/1.1", "Host: a", "Transfer-Encoding: chunked"), 413),
    ],
)
def test_what_is_no_request_is_refused(lines: tuple[str, ...], status: int) -> None:
    with pytest.raises(HttpError) as caught:
        parse_request(head(*lines))
    assert caught.value.status == status


def test_an_old_prober_may_leave_out_the_host() -> None:
    assert parse_request(head("HEAD /readyz HTTP/1.0")) == HttpRequest("HEAD", "/readyz", {})


def parsed(data: bytes) -> HttpRequest | None:
    """The request, or None where it is refused; any other error fails the test."""
    try:
        return parse_request(data)
    except HttpError:
        return None


@given(st.binary(max_size=300))
def test_no_bytes_are_more_than_refused(data: bytes) -> None:
    request = parsed(data + b"\r\n\r\n")
    assert request is None or request.path.startswith("/")


@given(st.binary(max_size=200) | st.text("ab:\t \r\n\0\xff", max_size=20).map(lambda text: text.encode("latin-1")))
def test_no_header_is_more_than_refused(data: bytes) -> None:
    request = parsed(b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + data + b"\r\n\r\n")
    assert request is None or not any(char in value for value in request.headers.values() for char in "\r\n\0")


def test_a_response_ends_the_connection_and_is_kept_by_nobody() -> None:
    response = Response(HTTPStatus.OK, b"live\n", headers=(("Allow", "GET"),))
    expected = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 5\r\n"
        b"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\nAllow: GET\r\n\r\n"
    )
    assert write_response(response, has_body=True) == expected + b"live\n"
    assert write_response(response, has_body=False) == expected


# -- pages -------------------------------------------------------------------------------------------------


def ask(health: Health, path: str, peer: str = "127.0.0.1", *, token: str | None = None, **headers: str) -> Response:
    request = HttpRequest("GET", path, {name.replace("_", "-"): value for name, value in headers.items()})
    return Pages(lambda: health, token).answer(request, peer)


@pytest.mark.parametrize(
    ("health", "path", "status", "body"),
    [
        (GOOD, "/livez", 200, b"live\n"),
        (GOOD, "/readyz", 200, b"ready\n"),
        (DRAINING, "/livez", 200, b"live\n"),
        (DRAINING, "/readyz", 503, b"unready\n"),
        (CLOSED, "/livez", 503, b"dead\n"),
        (CLOSED, "/readyz", 503, b"unready\n"),
    ],
)
@pytest.mark.parametrize("peer", ["127.0.0.1", "203.0.113.7"])
def test_livez_and_readyz_are_one_word_for_everybody(
    health: Health, path: str, status: int, body: bytes, peer: str
) -> None:
    response = ask(health, path, peer)
    assert (response.status, response.body) == (status, body)


def test_health_tells_all_to_who_asks_from_this_machine() -> None:
    for peer, host in (("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("127.9.9.9", "localhost"), ("::1", "")):
        response = ask(DRAINING, "/health", peer, **({"host": host} if host else {}))
        assert response.status == 503
        assert response.content_type == "application/json"
        found = json.loads(response.body)
        assert (found["live"], found["ready"]) == (True, False)
        assert {
            "name": "state",
            "status": "fail",
            "value": "draining",
            "limit": "started",
            "text": "the bus is draining",
        } in found["checks"]
    assert ask(GOOD, "/health").status == 200


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        ("203.0.113.7", {}),
        ("::ffff:203.0.113.7", {}),
        ("fe80::1%eth0", {}),
        ("", {}),
        ("127.0.0.1", {"x_forwarded_for": "203.0.113.7"}),
        ("127.0.0.1", {"forwarded": "for=203.0.113.7"}),
        ("127.0.0.1", {"via": "1.1 proxy"}),
        ("127.0.0.1", {"host": "rebound.example:8080"}),
        ("127.0.0.1", {"host": "localhost.example"}),
    ],
)
def test_health_is_hidden_from_others(peer: str, headers: dict[str, str]) -> None:
    response = ask(GOOD, "/health", peer, **headers)
    assert response.status == 403
    assert b"checks" not in response.body
    response = ask(GOOD, "/health", peer, token=TOKEN, **headers)
    assert response.status == 401
    assert ("WWW-Authenticate", "Bearer") in response.headers
    for wrong in (f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer \xe9", TOKEN):
        assert ask(GOOD, "/health", peer, token=TOKEN, authorization=wrong, **headers).status == 401
    for right in (f"Bearer {TOKEN}", f"bearer  {TOKEN}"):
        assert ask(GOOD, "/health", peer, token=TOKEN, authorization=right, **headers).status == 200


def test_with_a_token_who_asks_from_this_machine_needs_it_too() -> None:
    """A proxy on this machine may ask for others as if for itself: nginx sends the address that it asks as the host."""
    for headers in ({}, {"host": "127.0.0.1:8080"}, {"host": "localhost"}):
        assert ask(GOOD, "/health", "127.0.0.1", token=TOKEN, **headers).status == 401
        right = ask(GOOD, "/health", "127.0.0.1", token=TOKEN, authorization=f"Bearer {TOKEN}", **headers)
        assert right.status == 200
    assert ask(GOOD, "/readyz", "127.0.0.1", token=TOKEN).status == 200


@pytest.mark.parametrize("token", ["", "short", "fifteen-letters", "with blanks in between", "nön-ascii-characters"])
def test_a_token_that_is_none_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigurationError, match="at least 16 printable ASCII") as caught:
        Pages(lambda: GOOD, token)
    assert not token or token not in str(caught.value)


def test_there_is_nothing_else_to_ask() -> None:
    for path in ("/", "/livez/", "/metrics", "/LIVEZ", "/../health"):
        assert ask(GOOD, path).status == 404
    for method in ("POST", "DELETE", "OPTIONS"):
        response = Pages(lambda: GOOD).answer(HttpRequest(method, "/livez", {}), "127.0.0.1")
        assert response.status == 405
        assert ("Allow", "GET, HEAD") in response.headers


# -- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("localhost:65535", "localhost", 65_535),
        ("[::1]:8080", "::1", 8080),
    ],
)
def test_an_address_is_host_and_port(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert show_address(host, port) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "8080", ":8080", "localhost", "::1:8080", "[]:80", "[::1]", "[::1"),
        *("a:b", "a:-1", "a:65536", "a:\u0663", "a:" + "9" * 5_000, "http://a:80"),
    ],
)
def test_what_is_no_address_says_what_to_write(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write 127\.0\.0\.1:8080, \[::1\]:8080"):
        parse_address(text)
