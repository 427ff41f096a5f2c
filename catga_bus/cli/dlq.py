"""`catga dlq`: the messages that services have given up, to be looked at, tried again or dropped."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TypeVar

import click
import msgspec

from catga_bus.cli.dlq_view import Deposit, Wanted, deposit_of, deposits_table, letter_object, letters_table
from catga_bus.cli.exits import ExitCode
from catga_bus.cli.options import (
    ClickCommand,
    debug_option,
    json_option,
    namespace_option,
    url_option,
)
from catga_bus.cli.output import print_json, print_value, table_console
from catga_bus.cli.stored import showing_progress, with_jetstream, work_queue_of
from catga_bus.durability.letters.dead_letters import Buried, DeadLetters
from catga_bus.durability.letters.letters import Reason
from catga_bus.durability.letters.retrying import Tally, drop_many, queued_of, retry_many, retry_one
from catga_bus.durability.letters.work_queue import WorkQueue
from catga_bus.errors import CatgaError, ConfigurationError
from catga_bus.transport.jetstream import JetStream
from catga_bus.wire import Names, token

T = TypeVar("T")

_MAX_WAITING = 5  # letters that are named, of those that have to be retried first
_MAX_DIGITS = 18  # of a number; what is longer is an id

_EXAMPLES = """\b
Examples:
  catga dlq ls                           which services have given messages up
  catga dlq ls shop --type Debit         the newest of one service and type
  catga dlq show shop 17                 one letter, its body included
  catga dlq retry shop 17 18             give these another try
  catga dlq retry shop --reason attempts
  catga dlq drop shop --type Debit
"""


@click.group(short_help="Look at dead letters, retry or drop them.", epilog=_EXAMPLES)
def dlq() -> None:
    """Messages that a service has given up, with the reason and all that is needed to try again.

    Letters are called by their number, or by the id of the message.
    """


def _common(command: ClickCommand) -> ClickCommand:
    for decorate in (debug_option, json_option, namespace_option, url_option):
        command = decorate(command)
    return command


def _filters(command: ClickCommand) -> ClickCommand:
    for decorate in (
        click.option("--key", metavar="KEY", help="Only letters with this key."),
        click.option("--reason", type=click.Choice([str(one) for one in Reason]), help="Only letters of this reason."),
        click.option("--type", "type_name", metavar="TYPE", help="Only letters of this message type."),
    ):
        command = decorate(command)
    return command


def _wanted(type_name: str | None, reason: str | None, key: str | None) -> Wanted:
    return Wanted(type_name, None if reason is None else Reason(reason), key)


_LS_EXAMPLES = """\b
Examples:
  catga dlq ls
  catga dlq ls shop
  catga dlq ls shop --reason attempts --limit 1000 --json | jq '.letters[].error'
"""


@dlq.command(name="ls", short_help="List dead letters.", epilog=_LS_EXAMPLES)
@click.argument("service", required=False)
@_filters
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Letters at most.")
@click.option("--oldest", is_flag=True, help="Begin with the oldest instead of the newest.")
@_common
def list_letters(
    *,
    service: str | None,
    type_name: str | None,
    reason: str | None,
    key: str | None,
    limit: int,
    oldest: bool,
    url: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """List the letters of SERVICE, the newest first; without SERVICE, the services that have any."""
    wanted = _wanted(type_name, reason, key)

    async def look(jetstream: JetStream, names: Names) -> int:
        if service is None:
            if not wanted.is_all:
                raise click.UsageError("--type, --reason and --key choose among the letters of one SERVICE; name it")
            show_deposits(await deposits_of(jetstream, names), namespace, as_json=as_json)
        else:
            letters = await letters_of(jetstream, names, service)
            found, has_more = await choose(letters, wanted, limit, oldest=oldest)
            show_letters(found, service, has_more=has_more, as_json=as_json)
        return ExitCode.OK

    return _ask(look, url, namespace)


async def deposits_of(jetstream: JetStream, names: Names) -> list[Deposit]:
    """Return what each service has given up; those that have given up nothing are left out."""
    prefix = names.dead_letter_stream("")[: -len(token(""))]
    deposits = []
    for stream in await jetstream.stream_names():
        info = await jetstream.stream(stream) if stream.startswith(prefix) else None
        if info is None or not info.messages:
            continue
        first = await jetstream.message(stream, info.first_sequence)
        last = await jetstream.message(stream, info.last_sequence)
        deposits.append(deposit_of(stream.removeprefix(prefix), info, first, last))
    return deposits


def show_deposits(deposits: list[Deposit], namespace: str, *, as_json: bool) -> None:
    """Print which services have dead letters."""
    if as_json:
        print_json({"services": deposits})
    elif deposits:
        table_console().print(deposits_table(deposits))
    else:
        click.echo(f"no service of namespace {namespace} has dead letters")


async def letters_of(jetstream: JetStream, names: Names, service: str) -> DeadLetters:
    """Return the dead letters of a service.

    Raises:
        ConfigurationError: There is no such service, or it never ran.
    """
    letters = DeadLetters(jetstream, names, service)
    if await letters.info() is None:
        known = ", ".join(deposit.service for deposit in await deposits_of(jetstream, names)) or "none"
        raise ConfigurationError(
            f"service {service!r} is not known: there is no stream {letters.stream}; "
            f"services with dead letters: {known}"
        )
    return letters


async def choose(letters: DeadLetters, wanted: Wanted, limit: int, *, oldest: bool) -> tuple[list[Buried], bool]:
    """Return the first letters that are wanted, and whether there are more."""
    found: list[Buried] = []
    async with aclosing(letters.oldest_first() if oldest else letters.newest_first()) as reading:
        async for buried in reading:
            if wanted.is_all or (buried.letter is not None and wanted.fits(buried.letter)):
                if len(found) == limit:
                    return found, True
                found.append(buried)
    return found, False


def show_letters(found: list[Buried], service: str, *, has_more: bool, as_json: bool) -> None:
    """Print letters."""
    if as_json:
        objects = [letter_object(buried, with_body=False) for buried in found]
        print_json({"service": service, "letters": objects, "has_more": has_more})
    elif found:
        table_console().print(letters_table(found))
        if has_more:
            click.echo("there are more: --limit")
    else:
        click.echo(f"no such dead letters of {service}")


_SHOW_EXAMPLES = """\b
Examples:
  catga dlq show shop 17
  catga dlq show shop AAECAwQFBgcICQoL6 --json | jq .letters[0].body
"""


@dlq.command(short_help="Show dead letters with their bodies.", epilog=_SHOW_EXAMPLES)
@click.argument("service")
@click.argument("which", nargs=-1, required=True)
@_common
def show(*, service: str, which: tuple[str, ...], url: str | None, namespace: str, as_json: bool) -> int:
    """Show letters of SERVICE with all that is known of them: WHICH is a number or the id of a message.

    Bodies are shown as JSON; as base64 if they are no MessagePack, or were refused because of what is in them.
    """

    async def look(jetstream: JetStream, names: Names) -> int:
        found = await find(await letters_of(jetstream, names, service), which)
        objects = [letter_object(buried, with_body=True) for buried in found]
        if as_json:
            print_json({"service": service, "letters": objects})
        else:
            for one in objects:
                print_value(one)
        return ExitCode.OK

    return _ask(look, url, namespace)


async def find(letters: DeadLetters, which: Sequence[str]) -> list[Buried]:
    """Return the letters that are named, each once, the oldest first.

    Raises:
        CatgaError: One is not there.
    """
    found: dict[int, Buried] = {}
    for name in which:
        number = int(name) if name.isascii() and name.isdigit() and len(name) <= _MAX_DIGITS else 0
        at = await letters.at(number) if number else None
        here = [at] if at is not None else await letters.of(name)
        if not here:
            raise CatgaError(f"{letters.service} has no dead letter {name!r}: it may have been retried or dropped")
        found |= {buried.number: buried for buried in here}
    return [found[number] for number in sorted(found)]


_RETRY_EXAMPLES = """\b
Examples:
  catga dlq retry shop 17
  catga dlq retry shop --type Debit
  catga dlq retry shop --key a-1
  catga dlq retry shop --all
"""


@dlq.command(short_help="Give dead letters another try.", epilog=_RETRY_EXAMPLES)
@click.argument("service")
@click.argument("which", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All letters of the service.")
@click.option("--out-of-order", is_flag=True, help="Also those that have earlier ones with their key, which stay.")
@_common
def retry(
    *,
    service: str,
    which: tuple[str, ...],
    type_name: str | None,
    reason: str | None,
    key: str | None,
    everything: bool,
    out_of_order: bool,
    url: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """Put letters back on the work queue of SERVICE: those that are named, or those that fit the options.

    Letters of one key are put back in the order in which they were given up; one that has an earlier
    one with its key stays as long as that stays. A message keeps its id: with an inbox, one that was
    done after all is not done again. An event goes to this service alone. What fails again comes back
    as a new letter.
    """
    wanted = _chosen(which, _wanted(type_name, reason, key), everything=everything)

    async def put_back(jetstream: JetStream, names: Names) -> int:
        letters = await letters_of(jetstream, names, service)
        queue = await work_queue_of(jetstream, names, service)
        if which:
            tally = await retry_named(letters, queue, await find(letters, which), in_order=not out_of_order)
        else:
            told = showing_progress("letters are retried")
            tally = await retry_many(letters, queue, wanted.fits, told, in_order=not out_of_order)
        show_tally(tally, service, as_json=as_json)
        return ExitCode.FAILED if tally.left or tally.behind else ExitCode.OK

    return _ask(put_back, url, namespace)


def show_tally(tally: Tally, service: str, *, as_json: bool) -> None:
    """Print what became of letters that were to be retried."""
    if as_json:
        is_ok = not (tally.left or tally.behind)
        print_json({"ok": is_ok, "service": service, "retried": tally.done, "left": tally.left, "behind": tally.behind})
        return
    click.echo(f"retried {tally.done:,} dead {_letters(tally.done)} of {service}")
    if tally.left:
        click.echo(f"{tally.left:,} cannot be retried, because they are not whole or have a bad key", err=True)
    if tally.behind:
        click.echo(f"{tally.behind:,} stay behind an earlier one with their key, which stays: --out-of-order", err=True)


async def retry_named(letters: DeadLetters, queue: WorkQueue, found: Sequence[Buried], *, in_order: bool) -> Tally:
    """Retry letters in their order.

    Raises:
        CatgaError: One cannot be put back, or others of its key come before it; then none is.
    """
    numbers = {buried.number for buried in found}
    for buried in found:
        queued_of(buried, letters.stream, queue)
        if not in_order:
            continue
        before = [
            one for one in await letters.earlier_of_lane(buried, len(numbers) + _MAX_WAITING) if one not in numbers
        ]
        if before and buried.letter is not None:
            shown = ", ".join(map(str, before[:_MAX_WAITING]))
            raise ConfigurationError(
                f"letter {buried.number} comes after {shown} with the same key {buried.letter.key!r}: retry these as "
                f"well, or all with --key, or say --out-of-order"
            )
    for buried in found:
        await retry_one(letters, queue, buried)
    return Tally(len(found))


_DROP_EXAMPLES = """\b
Examples:
  catga dlq drop shop 17 18
  catga dlq drop shop --reason invalid
  catga dlq drop shop --all --yes
"""


@dlq.command(short_help="Drop dead letters for good.", epilog=_DROP_EXAMPLES)
@click.argument("service")
@click.argument("which", nargs=-1)
@_filters
@click.option("--all", "everything", is_flag=True, help="All letters of the service.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_common
def drop(
    *,
    service: str,
    which: tuple[str, ...],
    type_name: str | None,
    reason: str | None,
    key: str | None,
    everything: bool,
    yes: bool,
    url: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """Drop letters of SERVICE for good: those that are named, or those that fit the options. It asks first."""
    wanted = _chosen(which, _wanted(type_name, reason, key), everything=everything)

    def is_wanted(buried: Buried) -> bool:
        return wanted.is_all or (buried.letter is not None and wanted.fits(buried.letter))

    async def count(jetstream: JetStream, names: Names) -> Drop:
        letters = await letters_of(jetstream, names, service)
        if which:
            return drop_of(found.number for found in await find(letters, which))
        return await count_letters(letters, is_wanted)

    async def remove(jetstream: JetStream, names: Names) -> int:
        letters = DeadLetters(jetstream, names, service)
        told = showing_progress("letters are dropped")
        return (await drop_many(letters, lambda one: planned.fits(one, is_wanted), told, through=planned.through)).done

    planned = _ask(count, url, namespace)
    if planned.count and not yes:  # nobody is connected while somebody thinks about it
        click.confirm(
            f"drop {planned.count:,} dead {_letters(planned.count)} of {service} for good?", abort=True, err=True
        )
    done = _ask(remove, url, namespace) if planned.count else 0
    if as_json:
        print_json({"ok": True, "service": service, "dropped": done})
    else:
        click.echo(f"dropped {done:,} dead {_letters(done)} of {service}")
    return ExitCode.OK


class Drop(msgspec.Struct, frozen=True):
    """What is to be dropped; those that are buried later are not."""

    count: int
    through: int
    """The last number."""

    numbers: frozenset[int] | None = None
    """If they were named."""

    def fits(self, buried: Buried, is_wanted: Callable[[Buried], bool]) -> bool:
        """Whether a letter is to be dropped."""
        return is_wanted(buried) if self.numbers is None else buried.number in self.numbers


def drop_of(numbers: Iterable[int]) -> Drop:
    """Return the plan to drop letters that were named."""
    named = frozenset(numbers)
    return Drop(len(named), max(named), named)


async def count_letters(letters: DeadLetters, is_wanted: Callable[[Buried], bool]) -> Drop:
    """Return the plan to drop all that are wanted and lie there now."""
    count = through = 0
    async for buried in letters.oldest_first():
        count, through = count + is_wanted(buried), buried.number
    return Drop(count, through)


def _chosen(which: Sequence[str], wanted: Wanted, *, everything: bool) -> Wanted:
    """Refuse a command that could mean more than was meant."""
    if which and (everything or not wanted.is_all):
        raise click.UsageError("either name letters, or choose them by --all, --type, --reason and --key")
    if not which and not everything and wanted.is_all:
        raise click.UsageError("which ones? Name numbers or ids, or say --type, --reason, --key or --all")
    if everything and not wanted.is_all:
        raise click.UsageError("--all is all; leave it out to choose by --type, --reason and --key")
    return wanted


def _letters(count: int) -> str:
    return "letter" if count == 1 else "letters"


def _ask(work: Callable[[JetStream, Names], Awaitable[T]], url: str | None, namespace: str) -> T:
    return with_jetstream(work, url, namespace, "catga/dlq")
