"""`catga send`, `publish` and `broadcast`: one message from the shell."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import click

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
from catga_bus.codec import Body, Gate, GateError, explain
from catga_bus.errors import CallError, ConfigurationError


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


_PUBLISH_EXAMPLES = """\b
Examples:
  catga publish PriceTick '{"sku": "sku-9", "cents": 120}'
  catga publish PriceTick - -m shop.messages < tick.json
"""


@click.command(short_help="Tell: publish an event to every service.", epilog=_PUBLISH_EXAMPLES)
@_message_arguments
def publish(
    *,
    type_name: str,
    json_text: str,
    url: str | None,
    module: str | None,
    namespace: str,
    as_json: bool,
) -> int:
    """Publish the event TYPE with the fields of JSON to every service that handles it.

    JSON is an object with the fields of the event, `-` to read it from stdin, or nothing for an
    event without fields. Without --module it travels as JSON to the services that are up, at most
    once, whatever the class says; nobody confirms that it was handled.
    """
    body = read_payload(json_text)

    async def call() -> Any:
        if module is None:
            async with open_door(url, namespace) as door:
                return await door.tick(type_name, body)
        message = _typed(module, type_name, body)
        async with command_bus("publish", url, namespace) as bus:
            return await bus.publish(message)

    return _finish(call(), _show_told("published", type_name, as_json=as_json), as_json=as_json)


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


def _show_told(verb: str, type_name: str, *, as_json: bool) -> Callable[[Any], None]:
    def show(subject: str | None) -> None:
        if as_json:
            print_json({"ok": True, "type": type_name, "subject": subject})
        else:
            where = f" on {subject}" if subject else ""
            click.echo(f"{verb} {type_name}{where}; nobody confirms that it was handled")

    return show
