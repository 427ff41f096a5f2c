"""Starts a private nats-server, or finds the one that another process runs on the same store."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from catga_bus.embedded.binary import find_server_binary
from catga_bus.embedded.launcher import POLL, Launcher, Wanted
from catga_bus.embedded.settings import DEFAULT_MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES
from catga_bus.embedded.store import ServerRecord, Store
from catga_bus.errors import BusStateError, ConfigurationError

SCHEME = "embedded"


class EmbeddedServer:
    """A private nats-server with JetStream, for development, tests, demos and services on one host.

    - It listens on 127.0.0.1 and a port of its own, and asks for no credentials: whoever is logged
      in on this machine can connect.
    - It ends with this process, however that ends (`kill -9` included): at once, or within a second
      where a forked child of this process lives on.
    - One server per store. If a live server holds the store already, `start` finds that one and
      `is_owner` is False; it ends with its owner, not with us. When its owner is gone, calls fail
      as without a server until somebody starts one on the store again; it then gets the same port
      if that is still free, so that clients find back by themselves.
    - Without a store it keeps its data in a temporary directory, which is removed at the end.

    Writes to a store that outlives the server are synced to disk before they are acknowledged.

    Args:
        store: The directory for data and log; None for a temporary one.
        host: The address to listen on.
        port: The port to listen on, 1 to 65535; None for any free one.
        max_payload_bytes: Largest message, headers included; 1,024 to 67,108,864.
        start_timeout: How long a start may take, in seconds; 0.1 to 300. Takes under 0.2 s with an
            empty store.

    Raises:
        ConfigurationError: An argument is out of its bounds.

    Example:
        async with EmbeddedServer() as server:
            await connect(server.url)
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        start_timeout: float = 10.0,
    ) -> None:
        if port is not None and not 1 <= port <= 65_535:
            raise ConfigurationError(f"port must be 1 to 65535, or None for any free one, got {port!r}")
        if not 1_024 <= max_payload_bytes <= MAX_PAYLOAD_BYTES:
            raise ConfigurationError(
                f"max_payload_bytes must be 1,024 to {MAX_PAYLOAD_BYTES:,}, got {max_payload_bytes!r}"
            )
        if not 0.1 <= start_timeout <= 300:
            raise ConfigurationError(f"start_timeout must be 0.1 to 300 seconds, got {start_timeout!r}")
        if not host or host.startswith("-"):
            raise ConfigurationError(f"host must be an address or a name, got {host!r}")
        self._path = None if store is None else Path(store).absolute()
        self._host = host
        self._port = port
        self._max_payload_bytes = max_payload_bytes
        self._start_timeout = start_timeout
        self._launcher: Launcher | None = None
        self._record: ServerRecord | None = None

    @classmethod
    def parse(cls, url: str) -> "EmbeddedServer":
        """Return the server that a URL means.

        Args:
            url: `embedded://` for a temporary store, or `embedded:///path/of/store`.

        Raises:
            ConfigurationError: The URL is neither of the two; the text says what is wrong with it.
        """
        parts = urlsplit(url)
        if parts.scheme != SCHEME:
            raise ConfigurationError(f"{url!r} does not start with {SCHEME}://")
        if parts.netloc:
            raise ConfigurationError(
                f"{url!r} names the host {parts.netloc!r}, but an embedded server is always here; "
                f"a store is an absolute path after three slashes: {SCHEME}:///{parts.netloc}{parts.path}"
            )
        if parts.query or parts.fragment:
            raise ConfigurationError(f"{url!r}: {SCHEME}:// takes no options; write ? as %3F and # as %23")
        path = unquote(parts.path)
        if path.strip("/") == "" and path:
            raise ConfigurationError(f"{url!r} names the root directory; write {SCHEME}:// for a temporary store")
        return cls(path or None)

    @property
    def url(self) -> str:
        """Where to connect.

        Raises:
            BusStateError: The server has not been started.
        """
        return self._started().url

    @property
    def pid(self) -> int:
        """The process id of the server, which may belong to another owner.

        Raises:
            BusStateError: The server has not been started.
        """
        return self._started().pid

    @property
    def is_owner(self) -> bool:
        """Whether this object started the server, and will end it."""
        return self._launcher is not None and self._launcher.is_owner

    @property
    def store(self) -> Path | None:
        """The directory of the store; None before the start of one with a temporary store."""
        return self._path

    async def start(self) -> str:
        """Start the server, or find the live one of the store, and return its URL.

        Everything that blocks runs in a thread. A cancelled start leaves nothing behind.

        Raises:
            ConfigurationError: No nats-server can be executed, the store cannot be used, or the
                port is taken.
            DisconnectedError: The server did not come up in time, or another owner holds the store
                and its server does not answer.
            BusStateError: The server was started before: it starts once.
        """
        if self._launcher is not None:
            raise BusStateError("an EmbeddedServer starts once; make another one")
        temporary = self._path is None
        wanted = Wanted(
            find_server_binary(),
            self._host,
            self._port,
            self._max_payload_bytes,
            temporary,
            self._start_timeout,
        )
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="catga-"))
        self._launcher = launcher = Launcher(Store(self._path), wanted)
        work = asyncio.ensure_future(asyncio.to_thread(launcher.launch))
        try:
            self._record = await asyncio.shield(work)
        except asyncio.CancelledError:
            launcher.give_up()
            await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # nobody is left to tell
            await self.stop()
            raise
        finally:
            if temporary and self._record is None:
                shutil.rmtree(self._path, ignore_errors=True)
        return self.url

    async def wait(self) -> None:
        """Wait until the server that this object started has ended.

        Raises:
            BusStateError: This object did not start a server.
        """
        if self._launcher is None or not self._launcher.is_owner:
            raise BusStateError("only the owner of a server can wait for its end")
        while not self._launcher.has_ended:  # noqa: ASYNC110 - a process that ends sets no event
            await asyncio.sleep(POLL * 5)

    async def stop(self) -> None:
        """End the server if this object started it, and remove a temporary store.

        Stopping twice is fine, and so is stopping what was never started.
        """
        if self._launcher is not None:
            await asyncio.to_thread(self._launcher.stop)

    async def __aenter__(self) -> "EmbeddedServer":
        """Start the server."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        await self.stop()

    def _started(self) -> ServerRecord:
        if self._record is None:
            raise BusStateError("the embedded server has not been started")
        return self._record
