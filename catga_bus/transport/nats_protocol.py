"""The client protocol of NATS as bytes: what a client writes, and a parser of what a server writes.

Pure: no socket and no event loop. The parser hands a message to its sink from where it stands, so
a chunk read from the socket becomes calls of sinks with nothing in between.

Decided: a parser of our own rather than the client library's, because that one matches two regular
expressions per message, copies its buffer for each, is a coroutine although it never waits, and
turns any surprise into a connection that looks alive and reads nothing.
"""

import asyncio
from collections.abc import Mapping
from typing import Final, Protocol

import msgspec

from catga_bus.errors import CatgaError, ConfigurationError
from catga_bus.transport.base import Sink
from catga_bus.transport.validation import check_header, checked_subject, is_plain
from catga_bus.wire import NO_RESPONDERS, STATUS_HEADER

PING: Final = b"PING\r\n"
PONG: Final = b"PONG\r\n"
CRLF: Final = b"\r\n"

DESCRIPTION_HEADER: Final = "Description"
"""Where the words behind an inline status go; the client library's name for it."""

MAX_LINE_BYTES: Final = 1_048_576
"""Longest line taken from a server. INFO lists the cluster's addresses, so it knows no small bound."""

MAX_MESSAGE_BYTES: Final = 68_157_440
"""Longest message taken from a server, with its line: 64 MiB, the largest `max_payload` that nats-server takes, and
1 MiB for the line."""

_HEADER_LINE: Final = b"NATS/1.0"
_NO_RESPONDERS_BLOCK: Final = b"NATS/1.0 503\r\n\r\n"

_MAX_PREFIXES: Final = 4_096
# Subjects whose checked, encoded form is remembered. Answers go to subjects without end, so the
# memory is thrown away when full; a miss costs about 3 microseconds.


class ProtocolError(CatgaError):
    """The peer wrote something that is not the NATS protocol."""


class ServerInfo(msgspec.Struct, frozen=True):
    """What a server says of itself, as far as a client has a use for it."""

    server_name: str = "?"
    version: str = "?"
    max_payload: int = 1_048_576
    """Bytes, headers included."""

    headers: bool = False
    tls_required: bool = False
    tls_available: bool = False
    nonce: str | None = None
    """To be signed by who comes with a key."""

    connect_urls: tuple[str, ...] = ()
    """`host:port` of the servers of its cluster."""

    ldm: bool = False
    """Lame duck mode: it will close its connections and end."""


class Receiver(Protocol):
    """What a parser tells; every method returns at once. What one raises ends the parsing."""

    def on_info(self, info: ServerInfo) -> None:
        """The server described itself."""

    def on_ping(self) -> None:
        """The server wants a PONG."""

    def on_pong(self) -> None:
        """The server answered a PING."""

    def on_err(self, text: str) -> None:
        """The server refused something; the text is without its quotes, in the server's case."""

    def on_unrouted(self, sid: bytes) -> None:
        """A message came that no sink is registered for."""

    def on_sink_error(self, subject: str, error: BaseException) -> None:
        """A sink raised; the message is gone and the next one is on its way."""


class Parser:
    """Cuts chunks from a server into messages and control lines, whatever the chunk boundaries.

    Every byte is looked at a bounded number of times: what is incomplete is gathered in a list and joined once, when
    its last byte is in.

    Args:
        receiver: Who is told of everything but messages.

    Attributes:
        routes: The sink of each subscription id; looked up per message, so its owner changes it at any time.
    """

    __slots__ = ("_held", "_held_bytes", "_needed_bytes", "_receiver", "routes")

    def __init__(self, receiver: Receiver) -> None:
        self.routes: Mapping[bytes, Sink] = {}
        self._receiver = receiver
        # Chunks of an unfinished message or line; parsed again only when `_needed_bytes` are there, or the end of
        # the line where that is 0.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._needed_bytes = 0

    @property
    def is_idle(self) -> bool:
        """Whether everything that came has been told."""
        return not self._held

    def feed(self, data: bytes) -> None:
        """Take a chunk.

        Raises:
            ProtocolError: It cannot be read; the parser is of no use afterwards.
        """
        if self._held:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._needed_bytes:
                if self._held_bytes < self._needed_bytes:
                    return
            elif not self._ends_line(data) and self._held_bytes <= MAX_LINE_BYTES:
                return
            data = b"".join(self._held)
            self._held.clear()
        rest = self._parse(data)
        if rest:
            self._held.append(rest)
            self._held_bytes = len(rest)

    def _ends_line(self, data: bytes) -> bool:
        """Whether the line that was begun before this chunk ends in it."""
        return CRLF in data or (data[:1] == b"\n" and self._held[-2][-1:] == b"\r")

    def _parse(self, data: bytes) -> bytes:
        """Handle all that is complete and return the rest, with `_needed_bytes` set for it."""
        # The hot path of the whole receiving side: locals, one `find` and one `split` per message,
        # and no function of ours between here and the sink.
        find = data.find
        starts = data.startswith
        end = len(data)
        at = 0
        while at < end:
            line_end = find(CRLF, at)
            if line_end < 0:
                self._needed_bytes = 0
                return _begun_line(data[at:])
            if not starts(b"MSG ", at):
                if not starts(b"HMSG ", at):
                    self._control(data[at:line_end])
                    at = line_end + 2
                    continue
                after = self._message_with_headers(data, at, line_end)
                if after < 0:
                    return data[at:]
                at = after
                continue
            try:
                words = data[at + 4 : line_end].split()
                if len(words) == 3:
                    subject, sid, size = words
                    reply = b""
                else:
                    subject, sid, reply, size = words
                start = line_end + 2
                stop = start + int(size)
            except ValueError:
                raise _unreadable(data[at:line_end]) from None
            if stop + 2 > end:
                self._needed_bytes = _checked_bytes(stop + 2 - at)
                return data[at:]
            if stop < start or not starts(CRLF, stop):
                raise _unreadable(data[at:line_end])
            at = stop + 2
            sink = self.routes.get(sid)
            if sink is None:
                self._receiver.on_unrouted(sid)
                continue
            try:
                sink(
                    subject.decode("utf-8", "replace"),
                    data[start:stop],
                    reply.decode("utf-8", "replace") if reply else "",
                    None,
                )
            except (Exception, asyncio.CancelledError) as error:
                self._receiver.on_sink_error(subject.decode("utf-8", "replace"), error)
        return b""

    def _message_with_headers(self, data: bytes, at: int, line_end: int) -> int:
        """Handle one HMSG; return where the next one starts, or -1 if this one is not complete."""
        try:
            words = data[at + 5 : line_end].split()
            if len(words) == 4:
                subject, sid, header_size, size = words
                reply = b""
            else:
                subject, sid, reply, header_size, size = words
            start = line_end + 2
            body = start + int(header_size)
            stop = start + int(size)
        except ValueError:
            raise _unreadable(data[at:line_end]) from None
        if not start <= body <= stop:
            raise _unreadable(data[at:line_end])
        if stop + 2 > len(data):
            self._needed_bytes = _checked_bytes(stop + 2 - at)
            return -1
        if not data.startswith(CRLF, stop):
            raise _unreadable(data[at:line_end])
        sink = self.routes.get(sid)
        if sink is None:
            self._receiver.on_unrouted(sid)
            return stop + 2
        name = subject.decode("utf-8", "replace")
        headers = parse_headers(data[start:body])
        try:
            sink(name, data[body:stop], reply.decode("utf-8", "replace"), headers)
        except (Exception, asyncio.CancelledError) as error:
            self._receiver.on_sink_error(name, error)
        return stop + 2

    def _control(self, line: bytes) -> None:
        word, _, rest = line.partition(b" ")
        if word == b"PING":
            self._receiver.on_ping()
        elif word == b"PONG":
            self._receiver.on_pong()
        elif word == b"-ERR":
            self._receiver.on_err(rest.decode("utf-8", "replace").strip().strip("'"))
        elif word == b"INFO":
            try:
                info = _decode_info(rest)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolError(f"an INFO that cannot be read: {error}") from None
            self._receiver.on_info(info)
        elif word != b"+OK":
            raise _unreadable(line)


_decode_info = msgspec.json.Decoder(ServerInfo).decode


def _begun_line(rest: bytes) -> bytes:
    if len(rest) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes")
    return rest


def _checked_bytes(size: int) -> int:
    if size > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {size} bytes; no server sends more than {MAX_MESSAGE_BYTES}")
    return size


def _unreadable(line: bytes) -> ProtocolError:
    return ProtocolError(f"a line that is not the NATS protocol: {line[:80]!r}")


def parse_headers(block: bytes) -> dict[str, str] | None:
    r"""Return the headers of a message, or None if there are none.

    Decoded once and cut as text. Values are trimmed; of headers with the same name the last wins; what is
    not UTF-8 becomes U+FFFD. An inline status (`NATS/1.0 503`) becomes the header `Status`, the
    words behind it `Description`.

    Args:
        block: From `NATS/1.0` to the empty line.

    Example:
        >>> parse_headers(b"NATS/1.0 404 No Messages\r\nA: 1\r\n\r\n")
        {'Status': '404', 'Description': 'No Messages', 'A': '1'}
    """
    if block == _NO_RESPONDERS_BLOCK:
        return {STATUS_HEADER: NO_RESPONDERS}
    first, *lines = block.decode("utf-8", "replace").split("\r\n")
    headers: dict[str, str] = {}
    inline = first[len(_HEADER_LINE) :].strip()
    if inline:
        status, _, description = inline.partition(" ")
        headers[STATUS_HEADER] = status
        if description:
            headers[DESCRIPTION_HEADER] = description
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    return headers or None


def encode_headers(headers: Mapping[str, str]) -> bytes:
    r"""Return the header block of a message.

    Args:
        headers: Names of RFC 7230 token characters; values without line breaks and NUL.

    Raises:
        ConfigurationError: A name or a value cannot be sent; the text names it.

    Example:
        >>> encode_headers({"A": "1"})
        b'NATS/1.0\r\nA: 1\r\n\r\n'
    """
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        check_header(name, value)
        lines.append(f"{name}: {value}")
    lines.append("\r\n")
    return "\r\n".join(lines).encode()


def encode_subscribe(subject: str, queue: str, sid: int) -> bytes:
    """Return the SUB line.

    Raises:
        ConfigurationError: The subject or the queue group is not text that can be encoded.
    """
    try:
        return f"SUB {subject} {queue} {sid}\r\n".encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"subject {subject!r}, queue {queue!r}: cannot be sent: {error}") from error


def encode_unsubscribe(sid: int) -> bytes:
    """Return the UNSUB line."""
    return f"UNSUB {sid}\r\n".encode()


class Encoder:
    """Makes the bytes of messages to send; remembers subjects that were checked and encoded."""

    __slots__ = ("_prefixes",)

    def __init__(self) -> None:
        self._prefixes: dict[str, bytes] = {}

    def head(self, subject: str, reply: str, size: int) -> bytes:
        """Return the PUB line of a message without headers.

        Args:
            subject: Where it goes.
            reply: Where answers go, or "".
            size: Bytes of the payload.

        Raises:
            ConfigurationError: The subject or the reply subject cannot be sent.
        """
        prefix = self._prefixes.get(subject) or self._remember(subject)
        if reply:
            # "PUB reply " is remembered for the reply subject too: callers have one inbox each.
            tail = self._prefixes.get(reply) or self._remember(reply)
            return b"%b%b%d\r\n" % (prefix, tail[4:], size)
        return b"%b%d\r\n" % (prefix, size)

    def head_with_headers(self, subject: str, reply: str, block: bytes, size: int) -> bytes:
        """Return the HPUB line of a message and its header block.

        Args:
            subject: Where it goes.
            reply: Where answers go, or "".
            block: What `encode_headers` returned.
            size: Bytes of the payload.

        Raises:
            ConfigurationError: The subject or the reply subject cannot be sent.
        """
        prefix = self._prefixes.get(subject) or self._remember(subject)
        tail = (self._prefixes.get(reply) or self._remember(reply))[4:] if reply else b""
        return b"H%b%b%d %d\r\n%b" % (prefix, tail, len(block), len(block) + size, block)

    def _remember(self, subject: str) -> bytes:
        if not is_plain(subject):
            checked_subject(subject)
        try:
            prefix = b"PUB %b " % subject.encode()
        except UnicodeEncodeError as error:
            raise ConfigurationError(f"subject {subject!r} cannot be sent: {error}") from error
        if len(self._prefixes) >= _MAX_PREFIXES:
            self._prefixes.clear()
        self._prefixes[subject] = prefix
        return prefix
