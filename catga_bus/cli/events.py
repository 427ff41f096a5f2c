"""`catga events`: the log of durable events, replayed to one service."""

import asyncio
import contextlib
import secrets
import shlex
from datetime import UTC, datetime

import click
import msgspec

from catga_bus.bus import Bus
from catga_bus.cli.connection import command_bus
from catga_bus.cli.dlq_view import utc_text
from catga_bus.cli.exits import ExitCode
from catga_bus.cli.nodes import look
from catga_bus.cli.options import debug_option, json_option, keep_quiet, namespace_option, url_option
from catga_bus.cli.output import print_json
from catga_bus.cli.stored import open_jetstream, showing_progress, work_queue_of
from catga_bus.clock import utc_now
from catga_bus.durability.letters.replay import MAX_NAME, ReplayPlan, ReplayProgress, replay
from catga_bus.errors import CatgaError, ConfigurationError

_EXAMPLES = """\b
Examples:
  catga events replay --service shop --from 2026-03-01T00:00 --to 2026-03-02T00:00
"""


@click.group(short_help="Replay stored events to a service.", epilog=_EXAMPLES)
def events() -> None:
    """The log of durable events, which every service reads at its own pace."""


def _instant(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Return seconds since 1970: of ISO 8601, in UTC unless it says otherwise, or of such seconds."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return float(value)
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no time; write 2026-03-01T09:30, 2026-03-01T09:30+01:00 or 1772357400"
        ) from None
    return (instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)).timestamp()


def _name(_: click.Context, __: click.Parameter, value: str | None) -> str:
    if value is None:
        return secrets.token_hex(4)
    if not 0 < len(value) <= MAX_NAME or not value.isprintable() or any(one.isspace() for one in value):
        raise click.BadParameter(f"1 to {MAX_NAME} printable characters without blanks, got {value!r}")
    return value


_REPLAY_EXAMPLES = """\b
Examples:
  catga events replay --service shop --from 2026-03-01T00:00 --to 2026-03-02T00:00
  catga events replay --service shop --from 2026-03-01T00:00 --type Debited --type Credited
  catga events replay --service shop --from 2026-03-01T00:00 --again
"""


@events.command(name="replay", short_help="Give a service a range of events once more.", epilog=_REPLAY_EXAMPLES)
@click.option("--service", metavar="NAME", required=True, help="The service that gets them; no other does.")
@click.option(
    "--from", "start", metavar="TIME", callback=_instant, required=True, help="Events stored from this time on, UTC."
)
@click.option("--to", "end", metavar="TIME", callback=_instant, help="Events stored up to this time. [default: now]")
@click.option(
    "--type",
    "types",
    metavar="TYPE",
    multiple=True,
    help="Only this event type; may be repeated. [default: all that the live nodes of the service handle]",
)
@click.option("--again", is_flag=True, help="Run also what the inbox of the service says is done, under new ids.")
@click.option("--name", callback=_name, help="Of this replay: the same name goes on with it. [default: drawn]")
@click.option("--sequence", type=click.IntRange(min=1), default=None, help="Go on at this place in the log.")
@url_option
@namespace_option
@json_option
@debug_option
def replay_events(
    *,
    service: str,
    start: float,
    end: float | None,
    types: tuple[str, ...],
    again: bool,
    name: str,
    sequence: int | None,
    url: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """Put the events of a time range on the work queue of one service, in the order of the log.

    Events keep their ids: a service with an inbox skips those that it has done, so this fills in what
    it has missed. --again gives them new ids, and what they do is done again. Within the queue each key
    keeps its order; events of the key that come from the log meanwhile may be handled at the same time.

    It ends with the last event that there is when it begins, and waits while the queue is half full.
    When it is interrupted it says how to go on.
    """
    keep_quiet()
    until = utc_now().timestamp() if end is None else end
    if until < start:
        raise click.UsageError(f"--to {utc_text(until)} is before --from {utc_text(start)}")
    plan = ReplayPlan(
        name=name, types=types, start_utc=start, until_utc=until, start_sequence=sequence or 0, again=again
    )
    run = Replay(plan, service, url, namespace)
    try:
        is_done = asyncio.run(run.all())
    except CatgaError:
        run.tell_how_to_go_on()
        raise
    if not is_done:
        run.tell_how_to_go_on()
        raise click.Abort
    run.show(as_json=as_json)
    return ExitCode.OK


class Replay:
    """One run of `catga events replay`.

    Args:
        plan: What is replayed; without types, those that the service handles.
        service: To whom.
        url: Of the server.
        namespace: First token of all names.
    """

    def __init__(self, plan: ReplayPlan, service: str, url: str | None, namespace: str) -> None:
        self._plan = plan
        self._service = service
        self._url = url
        self._namespace = namespace
        self._progress: ReplayProgress | None = None
        self._count = showing_progress(f"events for {service}")

    async def all(self) -> bool:
        """Replay; return whether that came to its end before SIGTERM or Ctrl-C did."""
        bus = command_bus("events", self._url, self._namespace)
        return await look(bus, lambda: self._replay(bus))

    async def _replay(self, bus: Bus) -> None:
        self._plan = msgspec.structs.replace(self._plan, types=types_of(bus, self._service, self._plan.types))
        async with open_jetstream(self._url, self._namespace, "catga/events") as (jetstream, names, *_):
            queue = await work_queue_of(jetstream, names, self._service)
            self._progress = await replay(jetstream, names, queue, self._plan, self._on_progress)

    def _on_progress(self, progress: ReplayProgress) -> None:
        self._progress = progress
        self._count(progress.events)

    def tell_how_to_go_on(self) -> None:
        """Say on stderr which command goes on where this one was interrupted."""
        progress = self._progress
        if progress is None or not progress.sequence:
            return
        click.echo(f"{progress.events:,} events are on the queue; this goes on:", err=True)
        click.echo(f"  {shlex.join(self.command_to_go_on(progress))}", err=True)

    def command_to_go_on(self, progress: ReplayProgress) -> list[str]:
        """Return the command that goes on."""
        plan = self._plan
        words = ["catga", "events", "replay", "--service", self._service]
        words += ["--from", f"{plan.start_utc!r}", "--to", f"{plan.until_utc!r}"]
        for one in plan.types:
            words += ["--type", one]
        if plan.again:
            words.append("--again")
        words += ["--name", plan.name, "--sequence", str(progress.sequence + 1)]
        if self._namespace != "catga":
            words += ["--namespace", self._namespace]
        return words  # without the address, which may hold a password

    def show(self, *, as_json: bool) -> None:
        """Print what was replayed."""
        progress = self._progress
        assert progress is not None
        if as_json:
            print_json({"ok": True, "service": self._service, "name": self._plan.name} | msgspec.to_builtins(progress))
            return
        last = f"; the last one was stored at {utc_text(progress.utc)} UTC" if progress.sequence else ""
        click.echo(f"replayed {progress.events:,} events to {self._service}{last}")
        if progress.unreadable:
            click.echo(f"{progress.unreadable:,} could not be read, and were left out", err=True)


def types_of(bus: Bus, service: str, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Return the event types that are replayed to a service.

    Args:
        bus: Sees the nodes.
        service: The service.
        asked: Types that were asked for; all that it handles if empty.

    Raises:
        ConfigurationError: No live node of the service handles one of them: it would become a dead letter.
    """
    handled = {name for node in bus.nodes() if node.service == service for name in node.events}
    if not handled:
        raise ConfigurationError(
            f"no live node of service {service!r} handles durable events; start one, so that they do not wait"
        )
    unknown = [name for name in asked if name not in handled]
    if unknown:
        raise ConfigurationError(
            f"service {service!r} handles no {', '.join(unknown)}: its nodes handle {', '.join(sorted(handled))}"
        )
    return asked or tuple(sorted(handled))
