"""What commands need of JetStream: a connection to it, and what its streams say of a service."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, TypeVar

import click

from catga_bus.cli.connection import open_transport
from catga_bus.cli.options import keep_quiet
from catga_bus.clock import Clock, monotonic
from catga_bus.durability.letters.work_queue import WorkQueue
from catga_bus.durability.routes.routes import partitions_in
from catga_bus.errors import ConfigurationError
from catga_bus.transport.jetstream import ApiError, JetStream, JetStreamRefusedError, JetStreamUnknownError
from catga_bus.wire import Names

T = TypeVar("T")

_PROGRESS_SECONDS: Final = 0.2


class Opened(NamedTuple):
    """JetStream, open."""

    jetstream: JetStream
    names: Names
    denied: Callable[[], Collection[str]]
    """Returns what the server has refused last."""

    refused: asyncio.Event
    """Set when the server refuses a subject."""


@asynccontextmanager
async def open_jetstream(url: str | None, namespace: str, name: str) -> AsyncIterator[Opened]:
    """Connect to JetStream, and close in the end.

    Args:
        url: As `Bus` takes it, but for `memory://`, where nobody outside this process could be.
        namespace: First token of all names.
        name: Of the connection, as the server shows it.

    Raises:
        DisconnectedError: No server answers.
        AuthenticationError: The server refuses the credentials.
        ConfigurationError: The address or the namespace cannot be used, or JetStream is off.
        PermissionDeniedError: This user may not do what was done with it.
    """
    names = Names(namespace)
    async with open_transport(url, name) as (transport, events):
        from catga_bus.transport.carriers import make_jetstream  # here: other commands need not wait for it

        jetstream = make_jetstream(transport, monotonic)
        events.lost = jetstream.disconnected
        try:
            denied = lambda: () if events.denied is None else (events.denied.subject,)  # noqa: E731
            yield Opened(jetstream, names, denied, events.refused)
        except JetStreamUnknownError as error:
            if events.denied is not None:  # nobody answers who was not asked
                raise events.denied from error
            await _check_on(jetstream)
            raise
        finally:
            await jetstream.close()


async def _check_on(jetstream: JetStream) -> None:
    """Say if JetStream is off: then nobody answers its other questions.

    Raises:
        ConfigurationError: It is.
    """
    with contextlib.suppress(JetStreamUnknownError):
        try:
            await jetstream.account()
        except JetStreamRefusedError as error:
            if error.code in (ApiError.NOT_ENABLED, ApiError.NOT_ENABLED_FOR_ACCOUNT):
                raise ConfigurationError(f"nothing is stored there: JetStream is off ({error.text})") from error


def with_jetstream(work: Callable[[JetStream, Names], Awaitable[T]], url: str | None, namespace: str, name: str) -> T:
    """Connect to JetStream, do something, and return what that returns; the arguments are those of `open_jetstream`."""
    keep_quiet()

    async def run() -> T:
        async with open_jetstream(url, namespace, name) as opened:
            return await _unless_refused(work(opened.jetstream, opened.names), opened.refused)

    return asyncio.run(run())


async def _unless_refused(work: Awaitable[T], refused: asyncio.Event) -> T:
    """Return what some work returns, and end it where the server refuses a subject: it would wait for its answer.

    Raises:
        JetStreamUnknownError: A subject was refused.
    """
    task = asyncio.ensure_future(work)
    refusal = asyncio.create_task(refused.wait())
    await asyncio.wait({task, refusal}, return_when=asyncio.FIRST_COMPLETED)
    refusal.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if task.cancelled():
        raise JetStreamUnknownError("the server refuses a subject")
    return task.result()


async def work_queue_of(jetstream: JetStream, names: Names, service: str) -> WorkQueue:
    """Return the work queue of a service.

    Raises:
        ConfigurationError: It has none.
    """
    stream = names.command_stream(service)
    info = await jetstream.stream(stream)
    if info is None:
        raise ConfigurationError(
            f"service {service!r} has no work queue: there is no stream {stream}; it is made when a node "
            f"of the service starts that handles commands or durable events"
        )
    return WorkQueue(jetstream, names, service, partitions_in(info.config))


def showing_progress(text: str, clock: Clock = monotonic) -> Callable[[int], None]:
    """Return what takes counts and shows them on stderr, if somebody sits there.

    Args:
        text: What is counted, after the number.
        clock: Monotonic seconds.
    """
    due = clock() + _PROGRESS_SECONDS

    def show(count: int) -> None:
        nonlocal due
        if sys.stderr.isatty() and clock() >= due:
            due = clock() + _PROGRESS_SECONDS
            click.echo(f"\r{count:,} {text} ", nl=False, err=True)

    return show
