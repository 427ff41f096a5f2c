"""What is said where JetStream is off."""

from typing import Final

from catga_bus.errors import ConfigurationError
from catga_bus.transport.jetstream import ApiError, JetStreamRefusedError

_ON: Final = "switch it on (`jetstream {}` in nats-server's configuration, or its flag -js)"


def says_off(error: JetStreamRefusedError) -> bool:
    """Whether the server refuses because JetStream is off, for itself or for the account."""
    return error.code in (ApiError.NOT_ENABLED, ApiError.NOT_ENABLED_FOR_ACCOUNT)


def jetstream_is_off(error: JetStreamRefusedError) -> ConfigurationError:
    """Return the error that says so, and what to do."""
    where = "on the server" if error.code == ApiError.NOT_ENABLED else "for this account"
    return ConfigurationError(
        f"commands and durable events need JetStream, which is off {where}: {_ON}, or use requests and events with "
        f"durable=False"
    )
