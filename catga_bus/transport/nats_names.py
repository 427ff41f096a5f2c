"""Looking up the names of servers, in threads that keep nobody.

An event loop looks names up in its pool of threads, and its end waits for them: with a name service that does not
answer that is half a minute and more (resolv.conf(5): 5 s a try, 2 tries, each of up to 3 servers), in which a node
that has left would still be there.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading


class NameLookup:
    """Looks up names for one event loop; of each name once at a time, however often it is asked for."""

    def __init__(self) -> None:
        self._pending: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host, in the order in which they are to be tried, at least one.

        Raises:
            OSError: There is no such host, or nobody who would know.
        """
        if _is_address(host):
            return [host]
        key = (host, port)
        found = self._pending.get(key)
        if found is None:
            found = self._pending[key] = asyncio.get_running_loop().create_future()
            threading.Thread(target=_look_up, args=(key, found), name="catga-names", daemon=True).start()
            found.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(found)

    def _forget(self, key: tuple[str, int], found: "asyncio.Future[list[str]]") -> None:
        del self._pending[key]
        if not found.cancelled():
            found.exception()  # whoever has waited has it; perhaps nobody has


def _look_up(key: tuple[str, int], found: "asyncio.Future[list[str]]") -> None:
    addresses: list[str] = []
    error: Exception | None = None
    try:
        entries = socket.getaddrinfo(*key, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(where[0]) for *_, where in entries))
    except (OSError, UnicodeError) as raised:  # a name that is no host name fails as text
        error = raised if isinstance(raised, OSError) else OSError(f"{key[0]!r} is no host name: {raised}")
    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
        found.get_loop().call_soon_threadsafe(_settle, found, addresses, error)


def _settle(found: "asyncio.Future[list[str]]", addresses: list[str], error: Exception | None) -> None:
    if found.done():
        return
    if error is not None:
        found.set_exception(error)
    elif not addresses:
        found.set_exception(OSError("the host has no address"))
    else:
        found.set_result(addresses)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
