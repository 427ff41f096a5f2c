"""Requests and responses of HTTP/1.1 as values: only as much as a health check needs, and strict about it.

Source:
    RFC 9112, sections 2.2, 3, 5.1 and 9.6; RFC 9110, sections 7.2 and 9.3.2.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus

import msgspec

_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])")
_HEADER = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[!-~\x80-\xff](?:[ \t!-~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*"
)
_MAX_HEADERS = 64


class HttpRequest(msgspec.Struct, frozen=True):
    """A request without a body."""

    method: str
    path: str
    """Without what follows a question mark."""

    headers: Mapping[str, str]
    """By name in lower case."""


class Response(msgspec.Struct, frozen=True):
    """What is answered."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


class HttpError(Exception):
    """The request cannot be answered.

    Attributes:
        status: What is answered instead.
    """

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


def parse_request(head: bytes) -> HttpRequest:
    """Return the request that a head, up to and with its empty line, stands for.

    Raises:
        HttpError: It is none, it has a body, or it leaves out or doubles what it must have once.
    """
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise HttpError(HTTPStatus.BAD_REQUEST)
    if len(lines) > _MAX_HEADERS:
        raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    method, target, minor = line.groups()
    headers = _headers(lines)
    if minor == "1" and "host" not in headers:
        raise HttpError(HTTPStatus.BAD_REQUEST)
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)  # nothing here takes a body
    return HttpRequest(method, target.partition("?")[0], headers)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for text in lines:
        header = _HEADER.fullmatch(text)
        if header is None:
            raise HttpError(HTTPStatus.BAD_REQUEST)
        name = header[1].lower()
        if name in headers and name in _ONCE:
            raise HttpError(HTTPStatus.BAD_REQUEST)
        headers[name] = header[2]
    return headers


_ONCE = ("host", "content-length", "authorization")


def write_response(response: Response, *, has_body: bool) -> bytes:
    """Return the bytes of a response; the connection ends after it.

    Args:
        response: What is answered.
        has_body: False for what answers HEAD, which has the same head and nothing after it.
    """
    status = response.status
    headers = (
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
        *response.headers,
    )
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers)
    return head.encode("latin-1") + b"\r\n" + (response.body if has_body else b"")
