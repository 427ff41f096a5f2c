"""What users send: `Request`, `Command` and `Event`, and the options in their class heads.

A message is a msgspec struct. Its options are class keywords, checked when the class is made, so that a
typo fails at import and not in production:

    class Debit(Command[Receipt], partition_by="account"):
        account: str
        cents: int
"""

import sys
from enum import Enum
from types import SimpleNamespace
from typing import (
    Any,
    Generic,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import UUID

import msgspec

from catga_bus.errors import ConfigurationError
from catga_bus.wire import MAX_TYPE

R_co = TypeVar("R_co", covariant=True)

_KEY_TYPES = (str, int, UUID, Enum)
_STRUCT_OPTIONS = frozenset(
    {"tag", "tag_field", "rename", "omit_defaults", "forbid_unknown_fields", "frozen", "eq", "order",
     "kw_only", "repr_omit_defaults", "array_like", "gc", "weakref", "dict", "cache_hash"}
)  # fmt: skip
# Which options each kind of message takes; a name that only another kind takes is refused with that in the text.
_OPTIONS_BY_KIND = {
    "Request": ("partition_by", "idempotent", "type_name"),
    "Command": ("partition_by", "type_name"),
    "Event": ("partition_by", "durable", "type_name"),
}


class MessageOptions(msgspec.Struct, frozen=True):
    """What the head of a message class says."""

    kind: str
    """`Request`, `Command` or `Event`."""

    type_name: str
    """The name that travels; the class's own unless `type_name=` says otherwise."""

    partition_by: str | None = None
    """The field that holds the key."""

    durable: bool = True
    """Events only: stored (the default), or carried by core NATS to whoever is up."""

    idempotent: bool = True
    """Requests only: whether the bus may run it a second time when an answer is lost."""


@dataclass_transform(field_specifiers=(msgspec.field,))
class MessageMeta(msgspec.StructMeta):
    """Makes message classes: takes the options out of the class head and checks them."""

    __catga__: MessageOptions

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        **keywords: Any,
    ) -> "MessageMeta":
        """Make a message class."""
        options = {key: keywords.pop(key) for key in list(keywords) if key not in _STRUCT_OPTIONS}
        cls = super().__new__(mcls, name, bases, namespace, **keywords)
        inherited = next((base.__catga__ for base in bases if isinstance(base, MessageMeta)), None)
        cls.__catga__ = _checked_options(cls, name, inherited, options)
        return cls


def _checked_options(cls: type, name: str, inherited: MessageOptions | None, options: dict[str, Any]) -> MessageOptions:
    kind = inherited.kind if inherited else name
    allowed = _OPTIONS_BY_KIND[kind]
    for key in options:
        if key not in allowed:
            others = [other for other, names in _OPTIONS_BY_KIND.items() if key in names]
            hint = f"it is an option of {' and '.join(others)}" if others else "no message has it"
            raise ConfigurationError(
                f"class {name}: unknown option {key!r} ({hint}); {kind} takes {', '.join(allowed)} "
                f"and the options of msgspec.Struct"
            )
    type_name = options.get("type_name", name)
    if not (isinstance(type_name, str) and 0 < len(type_name) <= MAX_TYPE):
        raise ConfigurationError(
            f"class {name}: type_name must be 1 to {MAX_TYPE:,} characters, got {repr(type_name)[:60]}"
        )
    for flag in ("durable", "idempotent"):
        if not isinstance(options.get(flag, True), bool):
            raise ConfigurationError(f"class {name}: {flag} must be True or False, got {options[flag]!r}")
    partition_by = options.get("partition_by", inherited.partition_by if inherited else None)
    if "partition_by" in options:
        _check_key_field(cls, name, partition_by)
    return MessageOptions(
        kind=kind,
        type_name=type_name,
        partition_by=partition_by,
        durable=options.get("durable", inherited.durable if inherited else True),
        idempotent=options.get("idempotent", inherited.idempotent if inherited else True),
    )


def _check_key_field(cls: type, name: str, field: Any) -> None:
    fields: tuple[str, ...] = getattr(cls, "__struct_fields__", ())
    if field not in fields:
        raise ConfigurationError(
            f"class {name}: partition_by={field!r} is not a field; its fields are {', '.join(fields) or 'none'}"
        )
    try:
        hint = get_type_hints(cls)[field]
    except NameError:
        return  # a forward reference: the key's own type is checked when the first message is sent
    origin = get_origin(hint)
    members = get_args(hint) if origin is Union or str(origin) == "<class 'types.UnionType'>" else (hint,)
    for member in members:
        plain = member
        while hasattr(plain, "__supertype__"):  # what NewType stands for
            plain = plain.__supertype__
        if not (isinstance(plain, type) and issubclass(plain, _KEY_TYPES)):
            raise ConfigurationError(
                f"class {name}: the key field {field!r} is {hint!r}; a key must be str, int, UUID or Enum"
            )


class Request(msgspec.Struct, Generic[R_co], metaclass=MessageMeta):
    """Ask: answered by one node with an `R`, may run twice, survives the death of nodes.

    Class keywords:
        partition_by: The field whose value is the key.
        idempotent: False if it must never run twice; the bus then does not retry what may have run.
        type_name: The name on the wire; defaults to the class's name.
    """


class Command(msgspec.Struct, Generic[R_co], metaclass=MessageMeta):
    """Change: stored, handled in order per key by the owner of its partition, answered with an `R`.

    Class keywords:
        partition_by: The field whose value is the key; without it every command is its own key.
        type_name: The name on the wire; defaults to the class's name.
    """


class Event(msgspec.Struct, metaclass=MessageMeta):
    """Tell: nobody answers. `publish` it to every service, or `broadcast` it to every live node.

    Class keywords:
        durable: False for ticks and gauges, which `publish` carries to the services that are up and does not store.
        partition_by: The field whose value is the key.
        type_name: The name on the wire; defaults to the class's name.
    """


Message = Request[Any] | Command[Any] | Event
"""Anything that the bus carries."""


def options_of(cls: Any) -> MessageOptions:
    """Return what the head of a message class says.

    Raises:
        ConfigurationError: `cls` is not a message class.
    """
    if not isinstance(cls, MessageMeta) or cls in (Request, Command, Event):
        raise ConfigurationError(f"{cls!r} is not a message class; derive one from Request[R], Command[R] or Event")
    return cls.__catga__


def reply_type(cls: type) -> Any:
    """Return the `R` of a request or command class, looked up through generic classes in between.

    Example:
        >>> class Pong(msgspec.Struct): ...
        >>> class Ping(Request[Pong]): ...
        >>> reply_type(Ping).__name__
        'Pong'

    Raises:
        ConfigurationError: The class does not say what it is answered with, or names a type that cannot be found.
    """
    kind = options_of(cls).kind
    if kind == "Event":
        raise ConfigurationError(f"class {cls.__name__} is an event, and nobody answers events")
    reply, declared_in = _argument_of_root(cls, {})
    if reply is None or isinstance(reply, TypeVar):
        raise ConfigurationError(
            f"class {cls.__name__} does not say what it is answered with; "
            f"write {kind}[Reply], or {kind}[None] if there is nothing to answer"
        )
    return _resolved(cls, declared_in, reply)


def _argument_of_root(cls: type, known: dict[Any, Any]) -> tuple[Any, type]:
    """Follow `__orig_bases__` down to Request[...] or Command[...], filling in type variables on the way.

    Returns:
        The argument, None if there is none, and the class in whose head it stands.
    """
    for base in cls.__dict__.get("__orig_bases__", cls.__bases__):
        origin = get_origin(base) or base
        arguments = tuple(_substituted(argument, known) for argument in get_args(base))
        if origin in (Request, Command):
            return (arguments[0] if arguments else None), cls
        if isinstance(origin, MessageMeta):
            parameters = getattr(origin, "__parameters__", ())
            return _argument_of_root(origin, dict(zip(parameters, arguments, strict=False)))
    return None, cls


def _substituted(hint: Any, known: dict[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return known.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if parameters:
        return hint[tuple(known.get(parameter, parameter) for parameter in parameters)]
    return hint


def _resolved(cls: type, declared_in: type, reply: Any) -> Any:
    """Resolve the forward references in a reply type, in the module that wrote them or that of the leaf class."""
    holder = SimpleNamespace(__annotations__={"reply": reply})
    here, there = (dict(vars(sys.modules.get(each.__module__, object))) for each in (cls, declared_in))
    try:
        return get_type_hints(holder, globalns=here, localns=there, include_extras=True)["reply"]
    except Exception as error:  # a reference is an expression: its evaluation can raise anything
        raise ConfigurationError(f"class {cls.__name__}: its reply type {reply!r} cannot be found: {error}") from error
