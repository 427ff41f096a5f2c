"""The server: a thread with an event loop of its own, which answers while that of the bus is blocked.

A handler that holds the interpreter's lock (an extension in C that does not let it go) blocks this thread as well; then
nothing is answered, which a prober takes for dead, as it should.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Self

from catga_bus.clock import monotonic
from catga_bus.health import Health
from catga_bus.http.address import BACKLOG, listen, parse_address, show_address
from catga_bus.http.messages import HttpError, HttpRequest, Response, parse_request, write_response
from catga_bus.http.pages import Pages
from catga_bus.rarely import RareLog

MAX_HEAD_BYTES = 8_192
"""Of a request; a prober sends 100 to 300."""

PATIENCE = 5.0
"""Seconds in which a connection must have asked, taken its answer and gone; a prober waits one second, most of them."""

MAX_CONNECTIONS = 64
"""At a time. Who comes then is served, and who has been here for longest is sent away: connections that say nothing
must not keep a prober out."""

_LINGER = 0.5
_LINGER_BYTES = 65_536
# What a client still sends when it is refused is read for a while: closing over it would reset the connection, and the
# refusal with it (RFC 9112, section 9.6).

_log = logging.getLogger("catga_bus.http")


class HealthServer:
    """Serves the health of a bus over HTTP, as a context.

    Entering it takes the port, before anything else is begun; leaving it ends the thread.

        with HealthServer("127.0.0.1:8080", bus.health) as server:
            print(server.url)

    Args:
        address: `HOST:PORT`; port 0 takes one that is free.
        read: Returns the present health; called in the thread of the server.
        token: What `/health` asks for, if anything; see `Pages`.

    Raises:
        ConfigurationError: The address or the token cannot be used; on entering, the port is in use.

    Attributes:
        url: Where it listens, once entered.
    """

    def __init__(self, address: str, read: Callable[[], Health], token: str | None = None) -> None:
        self._host, self._port = parse_address(address)
        self._pages = Pages(read, token)
        self._connections: dict[asyncio.Task[None], None] = {}  # oldest first
        self._rare_log = RareLog(_log, monotonic)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.url = ""

    def __enter__(self) -> Self:
        """Listen, and answer from now on."""
        self._socket = listen(self._host, self._port)
        host, port, *_ = self._socket.getsockname()
        self.url = f"http://{show_address(host, port)}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="catga-health", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Answer no more."""
        if self._thread is not None:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    # -- in the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:
            _log.exception("the health server ended; nobody will hear whether this process lives")
        finally:
            self._socket.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=MAX_HEAD_BYTES, backlog=BACKLOG)
        await self._stop.wait()
        server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._attend(reader, writer))
        self._connections[task] = None
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._exchange(reader, writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            return  # it was too slow, or has gone
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        has_body = True
        try:
            request = parse_request(await reader.readuntil(b"\r\n\r\n"))
            has_body = request.method != "HEAD"
            response = self._answer(request, writer)
        except asyncio.LimitOverrunError:
            response = _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except HttpError as error:
            response = _refusal(error.status)
        writer.write(write_response(response, has_body=has_body))
        writer.write_eof()
        await _linger(reader)
        writer.close()
        await writer.wait_closed()

    def _answer(self, request: HttpRequest, writer: asyncio.StreamWriter) -> Response:
        host = writer.get_extra_info("peername", ("",))[0]
        try:
            return self._pages.answer(request, str(host))
        except Exception as error:
            self._rare_log.write(logging.ERROR, "page", "%s could not be answered", request.path, error=error)
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR)


async def _linger(reader: asyncio.StreamReader) -> None:
    """Read on until the client has closed, or for as long as is decent."""
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while left > 0 and (data := await reader.read(left)):
                left -= len(data)


def _refusal(status: HTTPStatus) -> Response:
    return Response(status, f"{status.phrase.lower()}\n".encode())
