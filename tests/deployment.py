"""The servers of `deploy/nats`, with the very files that operators get; only ports and stores are a test's own."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from catga_bus.testing import RecordedEvents
from catga_bus.transport.base import ConnectionOptions
from catga_bus.transport.nats_core import NatsTransport
from tests.servers import NatsServer, free_port

FILES = Path(__file__).parents[1] / "deploy" / "nats"


def sample_environment() -> dict[str, str]:
    """Return the variables of `sample.env`."""
    lines = (FILES / "sample.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


class Deployment:
    """A copy of the files in a directory of its own, to start servers from.

    Args:
        directory: For the copy, the stores and the logs.
        environment: More variables than `sample.env` has.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.files = directory / "conf"
        self.environment = sample_environment() | {"CATGA_NATS_STORE": str(directory / "store")} | (environment or {})
        self.monitors: dict[str, str] = {}
        """The monitoring endpoint of each server started, by the name of its file."""

        shutil.copytree(FILES, self.files)

    def edit(self, file: str, *changes: tuple[str, str]) -> None:
        """Replace text of a file; each must be there."""
        path = self.files / file
        text = path.read_text()
        for old, new in changes:
            assert old in text, f"{old!r} is not in {file}"
            text = text.replace(old, new)
        path.write_text(text)

    def add_user(self, name: str, like: str) -> None:
        """Add a user as README.md says: copy a file, replace the name, and list it in `accounts.conf`."""
        text = (self.files / "users" / f"{like}.conf").read_text()
        text = text.replace(like, name).replace(like.upper(), name.upper())
        (self.files / "users" / f"{name}.conf").write_text(text)
        self.environment[f"CATGA_{name.upper()}_PASSWORD"] = f"p{name}"
        include, listed = f'include "users/{like}.conf"', f"$USER_{like.upper()}"
        self.edit(
            "accounts.conf",
            (include, f'{include}\ninclude "users/{name}.conf"'),
            (listed, f"{listed}, $USER_{name.upper()}"),
        )

    def server(self, file: str = "single.conf") -> NatsServer:
        """Return a server that is not started yet."""
        number = "".join(filter(str.isdigit, file)) or "1"
        monitor = free_port()
        self.edit(file, (f'http: "127.0.0.1:{8221 + int(number)}"', f'http: "127.0.0.1:{monitor}"'))
        self.edit(file, ("store_dir: $CATGA_NATS_STORE", f'store_dir: "{self.directory}/store-{number}"'))
        self.monitors[file] = f"http://127.0.0.1:{monitor}"
        return NatsServer(self.directory / f"server-{number}", f'include "../conf/{file}"')

    def client(self, server: NatsServer, user: str, name: str = "catga/test") -> "Client":
        """Return a client that is this user, not connected yet."""
        return Client(server.url, self.account(user), name)

    def cluster(self) -> list[NatsServer]:
        """Return the three servers, not started yet, on ports of their own."""
        routes = self.environment["CATGA_NATS_ROUTES"]
        servers = []
        for number in (1, 2, 3):
            port = free_port()
            self.edit(f"cluster/n{number}.conf", (f"127.0.0.1:{6221 + number}", f"127.0.0.1:{port}"))
            routes = routes.replace(f":{6221 + number}", f":{port}")
            servers.append(self.server(f"cluster/n{number}.conf"))
        self.environment["CATGA_NATS_ROUTES"] = routes
        return servers

    def password(self, user: str) -> str:
        """Return the password of a user."""
        return self.environment[f"CATGA_{user.upper()}_PASSWORD"]

    def account(self, user: str) -> dict[str, str]:
        """Return the options of a bus that is this user."""
        return {"user": user, "password": self.password(user), "inbox_prefix": f"_INBOX.{user}"}

    @contextmanager
    def started(self, *servers: NatsServer) -> Iterator[None]:
        """Start servers with the environment of the deployment; killed at the end."""
        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            for name, value in self.environment.items():
                patch.setitem(os.environ, name, value)
            for server in servers:
                stack.callback(server.kill)
                server.start()
            yield


class Client:
    """A client without a bus, that does what it should not. An asynchronous context manager.

    Attributes:
        transport: Its connection.
        events: What the server told it.
    """

    def __init__(self, url: str, account: Mapping[str, str], name: str) -> None:
        self.events = RecordedEvents()
        self.transport = NatsTransport(ConnectionOptions(urls=(url,), name=name, **account), self.events)

    async def __aenter__(self) -> "Client":
        await self.transport.connect()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.transport.close()

    async def denied(self) -> list[str]:
        """Return the subjects refused so far."""
        await self.transport.flush()
        return [subject for subject, _ in self.events.denied]
