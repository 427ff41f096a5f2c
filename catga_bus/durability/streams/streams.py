"""The streams of a service: created or compared at the start, and changed only when somebody asks for it.

A stream that is there is never changed silently: whatever differs from the configuration is an error that names the
stream, the field, what is there, what is configured and what to do. `plan_changes` and `apply`, behind
`catga streams apply`, do what can be done; the number of partitions can never be changed, because almost every key
would be elsewhere.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Final, Literal

import msgspec

from catga_bus.clock import Clock, utc_now
from catga_bus.config import BusConfig
from catga_bus.durability.routes.routes import partitions_in
from catga_bus.durability.sending.schedule import SCHEDULES_LEVEL
from catga_bus.durability.streams.patience import Patience
from catga_bus.durability.streams.plans import Change, Difference, differences, wanted_streams, with_metadata
from catga_bus.errors import ConfigurationError
from catga_bus.transport.jetstream import (
    ApiError,
    JetStream,
    JetStreamRefusedError,
    StreamConfig,
    StreamInfo,
)
from catga_bus.transport.key_value import KeyValue
from catga_bus.wire import Names

log = logging.getLogger("catga_bus.durability")

_MOST_REPLICAS: Final = 3
_PAUSE_SECONDS: Final = 0.25
_GATHERING_SECONDS: Final = 5.0
# A cluster that is being started does not have all its servers at once, and a stream keeps the replicas that it was
# created with.

_TOO_FEW_SERVERS: Final = (ApiError.NO_SUITABLE_PEERS, 10074)  # 10074: replicas > 1 without a cluster


class Streams:
    """The streams of one service and the log of events.

    Args:
        jetstream: The server's side.
        names: Their names.
        service: The service.
        config: The options of the bus.
        clock: Monotonic seconds.
        utc: Seconds since 1970: where the revisions of a new bucket of owners begin.
        denied: Returns the subjects that the server has refused to this user.

    Attributes:
        log_partitions: Partitions of the log of events; known after `ensure` or `plan_changes`.
        replicas: Of the streams that are there; for buckets that have to be made again. Known after `ensure`.
        has_schedules: Whether the server has delayed messages; known after `ensure` or `plan_changes`.
    """

    def __init__(
        self,
        jetstream: JetStream,
        names: Names,
        service: str,
        config: BusConfig,
        clock: Clock,
        *,
        utc: Clock = lambda: utc_now().timestamp(),
        denied: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._jetstream = jetstream
        self._names = names
        self._service = service
        self._config = config
        self._clock = clock
        self._utc = utc
        self._denied = denied
        self.log_partitions = config.partitions
        self.has_schedules = False
        self.replicas = config.stream_replicas or 1

    async def ensure(self, *, commands: bool, events: bool, timeout: float | None = None) -> None:
        """Create what is missing, or say so where `manage_streams` is "verify", and compare the rest.

        Args:
            commands: Whether the service handles commands.
            events: Whether it handles durable events.
            timeout: Seconds until a server that does not answer is given up; `store_timeout` when None.

        Raises:
            ConfigurationError: JetStream is off, a stream is missing, or one is not as it is configured.
            PermissionDeniedError: This user may not look at streams, or not create them.
            DisconnectedError: There was no answer until the end.
        """
        patience = self._patience(timeout)
        found: list[Difference] = []
        for wanted in await self._wanted(patience, commands=commands, events=events):
            info = await self._info(wanted.name, patience)
            if info is not None:
                self.replicas = info.config.replicas
                found += self.differences(info.config, wanted)
            elif self._config.manage_streams == "verify":
                raise ConfigurationError(
                    f"stream {wanted.name} is not there, and manage_streams is 'verify': run `catga streams apply` as "
                    f"a user who may create it"
                )
            else:
                found += self.differences(await self._create(wanted, patience), wanted)
        if found:
            raise ConfigurationError("\n".join(str(one) for one in found))

    async def plan_changes(self, *, commands: bool = True, events: bool = True) -> list[Change]:
        """Return what `apply` would do about each stream; raises as `ensure` does."""
        patience = self._patience()
        changes: list[Change] = []
        for wanted in await self._wanted(patience, commands=commands, events=events):
            info = await self._info(wanted.name, patience)
            if info is None:
                changes.append(Change(wanted.name, "create"))
                continue
            found = tuple(self.differences(info.config, wanted))
            kind: Literal["update", "refuse", "keep"] = "keep"
            if found:
                kind = "update" if all(one.can_change for one in found) else "refuse"
            changes.append(Change(wanted.name, kind, found))
        return changes

    async def apply(self, *, commands: bool = True, events: bool = True) -> list[Change]:
        """Create what is missing and change what may be changed; return what was done.

        Raises:
            ConfigurationError: Something cannot be changed; then nothing has been.
        """
        changes = await self.plan_changes(commands=commands, events=events)
        refused = [str(one) for change in changes if change.kind == "refuse" for one in change.differences]
        if refused:
            raise ConfigurationError("\n".join(refused))
        patience = self._patience()
        wanted = {one.name: one for one in await self._wanted(patience, commands=commands, events=events)}
        for change in changes:
            config = wanted[change.stream]
            if change.kind == "create":
                await self._create(config, patience)
            elif change.kind == "update":
                await self._update(config, patience)
        return changes

    async def info(self, name: str) -> StreamInfo | None:
        """Return a stream, None if there is none; asked again while its servers do not answer. Raises as `ensure`."""
        return await self._info(name, self._patience())

    def _patience(self, timeout: float | None = None) -> Patience:
        return Patience(self._clock, self._config.store_timeout if timeout is None else timeout, self._denied)

    async def _info(self, name: str, patience: Patience) -> StreamInfo | None:
        return await patience.call(partial(self._jetstream.stream, name), f"STREAM.INFO.{name}")

    async def _wanted(self, patience: Patience, *, commands: bool, events: bool) -> list[StreamConfig]:
        account = await patience.call(self._jetstream.account, "INFO")
        level = account.get("api", {}).get("level", 0)
        self.has_schedules = isinstance(level, int) and level >= SCHEDULES_LEVEL
        self.log_partitions = self._config.partitions
        if events:
            info = await self._info(self._names.event_stream(), patience)
            if info is not None:
                self.log_partitions = partitions_in(info.config)
        streams = wanted_streams(
            self._names,
            self._service,
            self._config,
            commands=commands,
            events=events,
            schedules=self.has_schedules,
            log_partitions=self.log_partitions,
        )
        return [*streams, *self._buckets()] if streams else []

    def _buckets(self) -> list[StreamConfig]:
        replicas = self._config.stream_replicas or 1
        owners = KeyValue(self._jetstream, self._names.owners_bucket(), replicas=replicas)
        routes = KeyValue(self._jetstream, self._names.routes_bucket(), replicas=replicas)
        # The revisions of a bucket that was lost go on rising.
        return [owners.config(first_sequence=int(self._utc() * 1_000)), routes.config()]

    def differences(self, there: StreamConfig, wanted: StreamConfig) -> list[Difference]:
        """Return what is not as it is configured; replicas count only where they are configured."""
        found = differences(there, wanted)
        if self._config.stream_replicas is None:
            found = [one for one in found if one.field != "replicas"]
        return found

    async def _create(self, wanted: StreamConfig, patience: Patience) -> StreamConfig:
        most = self._config.stream_replicas or _MOST_REPLICAS
        least = self._config.stream_replicas or 1
        began = self._clock()
        replicas = most
        while True:
            config = with_metadata(msgspec.structs.replace(wanted, replicas=replicas))
            try:
                info = await patience.call(
                    partial(self._jetstream.create_stream, config), f"STREAM.CREATE.{config.name}"
                )
            except JetStreamRefusedError as error:
                if _is_for_space(error) and replicas > least and wanted.max_bytes > 0:
                    possible = await self._possible_replicas(patience)
                    if possible >= replicas:  # nobody gets fewer replicas because a disk is small
                        return await self._after_refusal(config, error, patience)
                    replicas = max(possible, least)
                    continue
                if error.code not in _TOO_FEW_SERVERS or replicas == least:
                    return await self._after_refusal(config, error, patience)
                if error.code == ApiError.NO_SUITABLE_PEERS and self._clock() < began + _GATHERING_SECONDS:
                    await asyncio.sleep(_PAUSE_SECONDS)
                else:
                    replicas -= 1
                continue
            log.info("created the stream %s with %d replicas", config.name, replicas)
            self.replicas = replicas
            return info.config

    async def _possible_replicas(self, patience: Patience) -> int:
        """Return how many replicas a stream can have that reserves no space.

        A server looks at the space for all replicas before it looks for the servers to hold them, so one that stands
        alone speaks of space as well.
        """
        bucket = self._buckets()[0]
        info = await self._info(bucket.name, patience)
        return info.config.replicas if info is not None else (await self._create(bucket, patience)).replicas

    async def _after_refusal(
        self, config: StreamConfig, error: JetStreamRefusedError, patience: Patience
    ) -> StreamConfig:
        """Another node may have been faster; otherwise say why it cannot be created."""
        if error.code == ApiError.STREAM_NAME_IN_USE:
            info = await self._info(config.name, patience)
            if info is not None:
                return info.config
        why = f"the server refuses to create the stream {config.name}: {error.text}"
        raise ConfigurationError(f"{why}; {_advice(error, config)}") from error

    async def _update(self, wanted: StreamConfig, patience: Patience) -> None:
        info = await self._info(wanted.name, patience)
        replicas = self._config.stream_replicas or (1 if info is None else info.config.replicas)
        config = with_metadata(msgspec.structs.replace(wanted, replicas=replicas))
        try:
            await patience.call(lambda: self._jetstream.update_stream(config), f"STREAM.UPDATE.{config.name}")
        except JetStreamRefusedError as error:
            why = f"the server refuses to change the stream {config.name}: {error.text}"
            raise ConfigurationError(f"{why}; {_advice(error, config)}") from error


def _is_for_space(error: JetStreamRefusedError) -> bool:
    """Whether a server has no room for what a stream reserves, or too few servers of a cluster have."""
    return error.code == ApiError.INSUFFICIENT_STORAGE or (
        error.code == ApiError.NO_SUITABLE_PEERS and "insufficient storage" in error.text
    )


def _advice(error: JetStreamRefusedError, config: StreamConfig) -> str:
    if error.code in _TOO_FEW_SERVERS and not _is_for_space(error):
        return f"stream_replicas={config.replicas} needs as many servers with JetStream"
    if error.code == ApiError.SUBJECTS_OVERLAP:
        return f"another stream stores {', '.join(config.subjects)}: take it out there, or take another namespace"
    if _is_for_space(error) or error.code in (10028, ApiError.INSUFFICIENT_RESOURCES, 10002, 10027):
        return "raise the limits of the account or the server, or configure less (command_max_bytes=, event_max_bytes=)"
    return "see the server's log"
