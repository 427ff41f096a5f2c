"""Typed requests, commands and events between Python processes, over NATS.

The public names, and nothing else.
"""

from catga_bus.blocking import BlockingBus
from catga_bus.bus import Bus
from catga_bus.cluster.records import ChangeKind, ClusterStatistics, NodeChange, NodeInfo, NodeLoad, NodeStatus
from catga_bus.config import BusConfig
from catga_bus.context import BlockingContext, BlockingTransaction, Context, Outgoing
from catga_bus.effects import Fence, Transaction
from catga_bus.errors import (
    AuthenticationError,
    BusStateError,
    CallError,
    CatgaError,
    CircuitOpenError,
    Code,
    ConfigurationError,
    DeadLetteredError,
    DeadlineExceededError,
    DisconnectedError,
    HandlerError,
    InvalidMessageError,
    NoHandlerError,
    Outcome,
    OverloadedError,
    PermissionDeniedError,
    Refused,
    RegistrationError,
    TooLargeError,
)
from catga_bus.handlers.dependencies import Depends
from catga_bus.handlers.router import Router
from catga_bus.health import BusState, Check, CheckStatus, Health
from catga_bus.messages import Command, Event, Request
from catga_bus.node import BusStatistics
from catga_bus.pipeline import CallNext, Result
from catga_bus.resilience.bulkhead import Bulkhead
from catga_bus.resilience.circuit_breaker import BreakerChange, BreakerOptions, BreakerState
from catga_bus.resilience.rate_limiter import RateLimiter
from catga_bus.resilience.retry import RetryOptions
from catga_bus.result import Err, Ok, Stored
from catga_bus.version import __version__

__all__ = [
    "AuthenticationError",
    "BlockingBus",
    "BlockingContext",
    "BlockingTransaction",
    "BreakerChange",
    "BreakerOptions",
    "BreakerState",
    "Bulkhead",
    "Bus",
    "BusConfig",
    "BusState",
    "BusStateError",
    "BusStatistics",
    "CallError",
    "CallNext",
    "CatgaError",
    "ChangeKind",
    "Check",
    "CheckStatus",
    "CircuitOpenError",
    "ClusterStatistics",
    "Code",
    "Command",
    "ConfigurationError",
    "Context",
    "DeadLetteredError",
    "DeadlineExceededError",
    "Depends",
    "DisconnectedError",
    "Err",
    "Event",
    "Fence",
    "HandlerError",
    "Health",
    "InvalidMessageError",
    "NoHandlerError",
    "NodeChange",
    "NodeInfo",
    "NodeLoad",
    "NodeStatus",
    "Ok",
    "Outcome",
    "Outgoing",
    "OverloadedError",
    "PermissionDeniedError",
    "RateLimiter",
    "Refused",
    "RegistrationError",
    "Request",
    "Result",
    "RetryOptions",
    "Router",
    "Stored",
    "TooLargeError",
    "Transaction",
    "__version__",
]
