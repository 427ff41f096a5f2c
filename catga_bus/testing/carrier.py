"""What the contract of a carrier works with: the carrier under test, its owner and its listeners."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from catga_bus.testing.waiting import eventually
from catga_bus.transport.base import Transport, TransportEvents


class RecordedEvents(TransportEvents):
    """What a transport told its owner, in order."""

    def __init__(self) -> None:
        self.disconnected: list[str] = []
        """The reasons of `on_disconnected`."""

        self.reconnected: list[str] = []
        """The addresses of `on_reconnected`."""

        self.denied: list[tuple[str, str]] = []
        """The subjects and texts of `on_denied`."""

        self.errors: list[str] = []
        """The texts of `on_error`."""

        self.threads: set[int] = set()
        """The threads that the calls came from."""

    def on_disconnected(self, reason: str) -> None:
        """Record the reason."""
        self.threads.add(threading.get_ident())
        self.disconnected.append(reason)

    def on_reconnected(self, url: str) -> None:
        """Record the address."""
        self.threads.add(threading.get_ident())
        self.reconnected.append(url)

    def on_denied(self, subject: str, text: str) -> None:
        """Record the subject and the text."""
        self.threads.add(threading.get_ident())
        self.denied.append((subject, text))

    def on_error(self, text: str) -> None:
        """Record the text."""
        self.threads.add(threading.get_ident())
        self.errors.append(text)


class Carrier(ABC):
    """How the contract reaches the carrier under test: transports of one server that can fail.

    It is an asynchronous context manager that closes, at its end, every transport it has built.
    """

    can_stall: ClassVar[bool] = False
    """Whether `stall` and `resume` work; the promises about being behind are skipped without."""

    def __init__(self) -> None:
        self._built: list[Transport] = []

    @abstractmethod
    def make(self, events: TransportEvents, **options: Any) -> Transport:
        """Return a new transport to the server, not yet connected.

        Args:
            events: Whom it tells.
            options: Fields of `ConnectionOptions` that the test needs to have a certain value.
        """

    @abstractmethod
    async def cut(self) -> None:
        """Break the connection of all transports, as a killed server does; new ones fail."""

    @abstractmethod
    async def heal(self) -> None:
        """Let the connections come back. Return when a new transport could connect."""

    async def stall(self) -> None:
        """Let the server read nothing more while the connections stay, as a frozen process."""
        raise NotImplementedError

    async def resume(self) -> None:
        """End `stall`."""
        raise NotImplementedError

    def build(self, **options: Any) -> tuple[Transport, RecordedEvents]:
        """Return a new transport, not yet connected, and what it will tell."""
        events = RecordedEvents()
        transport = self.make(events, **options)
        self._built.append(transport)
        return transport, events

    async def connect(self, **options: Any) -> tuple[Transport, RecordedEvents]:
        """Return a new, connected transport and what it will tell."""
        transport, events = self.build(**options)
        await transport.connect()
        return transport, events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.gather(*(transport.close() for transport in self._built))


class Received:
    """A sink that keeps what it gets: subject, payload, reply subject and headers of each."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes, str, Mapping[str, str] | None]] = []
        self.threads: set[int] = set()

    def __call__(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        """Keep one message."""
        self.threads.add(threading.get_ident())
        self.messages.append((subject, payload, reply, headers))

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def payloads(self) -> list[bytes]:
        """The payloads, in the order of arrival."""
        return [payload for _, payload, _, _ in self.messages]

    async def wait(self, count: int) -> None:
        """Wait until `count` messages have come."""
        await eventually(lambda: len(self) >= count, what=f"{count} messages")
