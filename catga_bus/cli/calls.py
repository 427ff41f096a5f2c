"""`catga send`, `enqueue`, `publish` and `broadcast`: one message from the shell."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import click
import msgspec

from catga_bus.cli.connection import command_bus, open_door
from catga_bus.cli.exits import ExitCode, exit_code_of, facts_of
from catga_bus.cli.loading import find_message_class
from catga_bus.cli.options import (
    ClickCommand,
    debug_option,
    json_option,
    keep_quiet,
    namespace_option,
    url_option,
)
from catga_bus.cli.output import print_json, print_value
from catga_bus.cli.payload import read_payload
from catga_bus.cli.stored import open_jetstream
from catga_bus.cli.storing import Storing, body_of, durable_route
from catga_bus.cli.storing import enqueue as store_command
from catga_bus.cli.storing import publish as store_event
from catga_bus.codec import Body, Gate, GateError, explain
from catga_bus.errors import CallError, ConfigurationError
from catga_bus.ids import MessageIds
from catga_bus.messages import options_of
from catga_bus.result import Stored


def _message_arguments(command: ClickCommand) -> ClickCommand:
    for decorate in (
        debug_option,
        json_option,
        namespace_option,
        click.option(
            "--module",
            "-m",
            metavar="MODULE",
            help="Take the message's class from this module, and check the JSON against it.",
        ),
        url_option,
        click.argument("json_text", metavar="[JSON]", default="{}"),
        click.argument("type_name", metavar="TYPE"),
    ):
        command = decorate(command)
    return command


_SEND_EXAMPLES = """\b
Examples:
  catga send Quote '{"sku": "sku-9"}'
  catga send Quote '{"sku": "sku-9"}' -m shop.messages --timeout 1
  echo '{"sku": "sku-9"}' | catga send Quote - --json | jq .value.cents
"""


@click.command(short_help="Ask: send a request and print its answer.", epilog=_SEND_EXAMPLES)
@_message_arguments
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, max=3_600, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the answer.",
)
def send(
    *,
    type_name: str,
    json_text: str,
    url: str | None,
    module: str | None,
    timeout: float,
    namespace: str,
    as_json: bool,
) -> int:
    """Send the request TYPE with the fields of JSON to a service, and print the answer as JSON.

    JSON is an object with the fields of the message, `-` to read it from stdin, or nothing for a
    message without fields. With --module the message is checked before it leaves, and failed nodes
    are retried as `bus.send` does; without, it travels as JSON, as any NATS client could send it.
    """
    body = read_payload(json_text)

    async def call() -> Any:
        if module is None:
            async with open_door(url, namespace) as door:
                return await door.request(type_name, body, timeout)
        message = _typed(module, type_name, body)
        async with command_bus("send", url, namespace) as bus:
            result = await bus.send(message, timeout=timeout)
        return result.unwrap()

    def show(value: Any) -> None:
        if as_json:
            print_json({"ok": True, "value": value})
        else:
            print_value(value)

    return _finish(call(), show, as_json=as_json)


def _stored_options(command: ClickCommand) -> ClickCommand:
    for decorate in (
        click.option("--key", help="Of the message, in place of the field that its type is partitioned by."),
        click.option("--id", "message_id", help="Of the message: within two minutes it is stored once. [default: new]"),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, max=3_600, min_open=True),
            default=15.0,
            show_default=True,
            help="Seconds for which it is tried to store it.",
        ),
    ):
        command = decorate(command)
    return command


_ENQUEUE_EXAMPLES = """\b
Examples:
  catga enqueue Debit '{"account": "a-1", "cents": 500}'
  catga enqueue Debit - -m shop.messages < debit.json
"""


@click.command(short_help="Change: store a command for its service.", epilog=_ENQUEUE_EXAMPLES)
@_message_arguments
@_stored_options
def enqueue(
    *,
    type_name: str,
    json_text: str,
    url: str | None,
    module: str | None,
    key: str | None,
    message_id: str | None,
    timeout: float,
    namespace: str,
    as_json: bool,
) -> int:
    """Store the command TYPE with the fields of JSON; the service that handles it will handle it.

    JSON is an object with the fields of the command, `-` to read it from stdin, or nothing for a
    command without fields. With --module it is checked before it leaves. It returns when the command is
    stored, without waiting for its result.
    """
    body = read_payload(json_text)
    command = None if module is None else _typed(module, type_name, body)
    storing = _storing(type_name, body, command, key, message_id, timeout)

    async def call() -> Stored:
        async with open_jetstream(url, namespace, "catga/cli") as (jetstream, names, *_):
            return await store_command(jetstream, names, storing)

    return _finish(call(), _show_stored("stored", storing, as_json=as_json), as_json=as_json)


_PUBLISH_EXAMPLES = """\b
Examples:
  catga publish PriceTick '{"sku": "sku-9", "cents": 120}'
  catga publish PriceTick - -m shop.messages < tick.json
  catga publish Debited '{"account": "a-1", "cents": 500}'
"""


@click.command(short_help="Tell: publish an event to every service.", epilog=_PUBLISH_EXAMPLES)
@_message_arguments
@_stored_options
def publish(
    *,
    type_name: str,
    json_text: str,
    url: str | None,
    module: str | None,
    key: str | None,
    message_id: str | None,
    timeout: float,
    namespace: str,
    as_json: bool,
) -> int:
    """Publish the event TYPE with the fields of JSON to every service that handles it.

    JSON is an object with the fields of the event, `-` to read it from stdin, or nothing for an event
    without fields. With --module it is checked before it leaves. If some service handles the type as a
    durable event, it is stored, and every such service will handle it; otherwise it goes to the
    services that are up, at most once, and nobody confirms that it was handled.
    """
    body = read_payload(json_text)
    event = None if module is None else _typed(module, type_name, body)
    storing = _storing(type_name, body, event, key, message_id, timeout)

    async def call() -> Stored | str | None:
        async with open_jetstream(url, namespace, "catga/cli") as (jetstream, names, *_):
            if event is None:
                route = await durable_route(jetstream, names, storing.type, min(timeout, _ROUTE_SECONDS))
                is_durable, key_field = route is not None, route.partition_by if route is not None else None
            else:
                is_durable, key_field = options_of(type(event)).durable, options_of(type(event)).partition_by
            if is_durable:
                return await store_event(jetstream, names, storing, key_field)
        if event is None:
            async with open_door(url, namespace) as door:
                return await door.tick(type_name, body)
        async with command_bus("publish", url, namespace) as bus:
            await bus.publish(event)
            return None

    told = _show_told("published", type_name, as_json=as_json)
    stored = _show_stored("published", storing, as_json=as_json)

    def show(value: Stored | str | None) -> None:
        if isinstance(value, Stored):
            stored(value)
        else:
            told(value)

    return _finish(call(), show, as_json=as_json)


def _storing(
    type_name: str, body: bytes, message: Any, key: str | None, message_id: str | None, timeout: float
) -> Storing:
    """Return what is to be stored.

    Args:
        type_name: As it was given.
        body: The JSON.
        message: What it says, if its class is known.
        key: As it was given.
        message_id: As it was given.
        timeout: In seconds.
    """
    if message is None:
        packed, key_of = body_of(body)
    else:
        type_name = options_of(type(message)).type_name
        packed, key_of = Body(type(message)).encode(message), partial(getattr, message)
    taken = MessageIds().take() if message_id is None else message_id
    return Storing(type=type_name, id=taken, body=packed, key_of=key_of, key=key, timeout=timeout)


_ROUTE_SECONDS = 2.0  # for which it is asked whether an event is stored, where JetStream does not answer


_BROADCAST_EXAMPLES = """\b
Examples:
  catga broadcast PricesChanged
  catga broadcast FlushCache '{"prefix": "sku-"}' -m shop.messages
"""


@click.command(short_help="Shout: broadcast an event to every live node.", epilog=_BROADCAST_EXAMPLES)
@_message_arguments
def broadcast(
    *,
    type_name: str,
    json_text: str,
    url: str | None,
    module: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """Broadcast the event TYPE with the fields of JSON to every live node that handles it.

    JSON is an object with the fields of the event, `-` to read it from stdin, or nothing for an
    event without fields. It is delivered at most once, and nobody confirms that it was handled.
    """
    body = read_payload(json_text)

    async def call() -> Any:
        if module is None:
            async with open_door(url, namespace) as door:
                return await door.broadcast(type_name, body)
        message = _typed(module, type_name, body)
        async with command_bus("broadcast", url, namespace) as bus:
            return await bus.broadcast(message)

    return _finish(call(), _show_told("broadcast", type_name, as_json=as_json), as_json=as_json)


def _typed(module: str, type_name: str, body: bytes) -> Any:
    cls = find_message_class(module, type_name)
    try:
        Gate().json(body)
    except GateError as error:
        raise ConfigurationError(f"no node would take this JSON: {error}") from error
    try:
        return Body(cls).decode_json(body)
    except Exception as error:  # a `__post_init__` of the user's class can raise anything
        raise ConfigurationError(f"the JSON is no {type_name}: {explain(error)}") from error


def _finish(call: Coroutine[Any, Any, Any], show: Callable[[Any], None], *, as_json: bool) -> int:
    keep_quiet()
    try:
        value = asyncio.run(call)
    except CallError as error:
        if not as_json:
            raise
        print_json(facts_of(error))
        return exit_code_of(error)
    show(value)
    return ExitCode.OK


def _show_stored(verb: str, storing: Storing, *, as_json: bool) -> Callable[[Stored], None]:
    def show(stored: Stored) -> None:
        if as_json:
            print_json({"ok": True, "type": storing.type, "id": storing.id} | msgspec.to_builtins(stored))
        else:
            again = " before" if stored.duplicate else ""
            click.echo(f"{verb} {storing.type}{again}: {stored.stream} has it as number {stored.sequence}")

    return show


def _show_told(verb: str, type_name: str, *, as_json: bool) -> Callable[[Any], None]:
    def show(subject: str | None) -> None:
        if as_json:
            print_json({"ok": True, "type": type_name, "subject": subject})
        else:
            where = f" on {subject}" if subject else ""
            click.echo(f"{verb} {type_name}{where}; nobody confirms that it was handled")

    return show
