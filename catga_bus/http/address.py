"""Where to listen: `HOST:PORT` as people write it."""

import os
import socket

from catga_bus.errors import ConfigurationError

MAX_PORT = 65_535


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `127.0.0.1:8080`, `localhost:8080` or `[::1]:8080`.

    Raises:
        ConfigurationError: It is none; the text says what to write.
    """
    host, colon, digits = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    is_port = digits.isascii() and digits.isdecimal() and len(digits) <= len(str(MAX_PORT)) and int(digits) <= MAX_PORT
    if not colon or not host or not is_port or (":" in host) != is_bracketed:
        raise ConfigurationError(
            f"{text!r} is no address to listen on; write 127.0.0.1:8080, [::1]:8080 or 0.0.0.0:8080 (port 0 to "
            f"{MAX_PORT}; with 0 the system chooses one)"
        )
    return host, int(digits)


def show_address(host: str, port: int) -> str:
    """Return host and port as they stand in an URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigurationError: The port is in use or may not be had, or there is no such address here.
    """
    shown = show_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, where = found[0]
        return socket.create_server(where[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # a name that is no host name fails as text
        raise ConfigurationError(
            f"cannot listen on {shown}: {_reason(error).lower()}; choose another one, or port 0 for any"
        ) from error


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)  # its own text goes on to name the address again
    return getattr(error, "strerror", None) or str(error)


BACKLOG = 64
