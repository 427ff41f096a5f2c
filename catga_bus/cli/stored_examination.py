"""Gathers what `catga doctor` judges of JetStream. Reads only."""

from typing import Final

from catga_bus.cli.examination import Refusals
from catga_bus.cli.stored_checks import StoreFacts
from catga_bus.cli.streams_view import kind_of
from catga_bus.clock import monotonic
from catga_bus.transport.asking import ask
from catga_bus.transport.carriers import make_jetstream
from catga_bus.transport.jetstream import JetStream, JetStreamRefusedError, JetStreamUnknownError
from catga_bus.transport.nats_core import NatsTransport
from catga_bus.wire import Names

_INFO: Final = "$JS.API.INFO"
_ASK_SECONDS: Final = 0.5  # a server answers in milliseconds; one whose user may not ask does not answer at all
_STREAMS: Final = "$JS.API.STREAM."
_MAX_STREAMS: Final = 1_000


async def store_facts(transport: NatsTransport, refusals: Refusals, names: Names) -> StoreFacts:
    """Return what is known of JetStream and of the streams of a namespace."""
    if await ask(transport, _INFO, b"", _ASK_SECONDS) is None:
        return StoreFacts(state="refused" if _INFO in refusals.subjects else "silent")
    jetstream = make_jetstream(transport, monotonic)
    try:
        return await _facts(jetstream, refusals, names)
    finally:
        await jetstream.close()


async def _facts(jetstream: JetStream, refusals: Refusals, names: Names) -> StoreFacts:
    try:
        account = await jetstream.account()
    except JetStreamRefusedError as error:
        return StoreFacts(state="off", text=error.text)
    except JetStreamUnknownError:
        return StoreFacts(state="silent")
    level = account.get("api", {}).get("level", 0)
    level = level if isinstance(level, int) else 0
    streams, unheard = [], False
    try:
        known = [name for name in await jetstream.stream_names() if kind_of(name, names) is not None]
        for name in known[:_MAX_STREAMS]:
            info = await jetstream.stream(name)
            if info is not None:
                streams.append(info)
    except (JetStreamUnknownError, JetStreamRefusedError):
        unheard = True
    may_list = not any(subject.startswith(_STREAMS) for subject in refusals.subjects)
    return StoreFacts(state="on", level=level, streams=tuple(streams), may_list=may_list, unheard=unheard)
