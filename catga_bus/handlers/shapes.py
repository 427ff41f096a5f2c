"""Judges types at registration: which can be decoded, and which return annotation fits a reply."""

from types import UnionType
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Literal,
    Never,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
import msgspec.inspect

from catga_bus.result import Err, Ok


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, flattened and without `Annotated`; else the hint alone."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(inner for member in get_args(annotation) for inner in union_members(member))
    return (annotation,)


def fits_reply(returned: Any, reply: Any) -> bool:
    """Whether one member of a return annotation is allowed where the answer is a `reply`.

    Allowed are the reply itself and its subtypes, `Ok` of them, `Err`, and what never returns. A
    type that cannot be judged at run time (a protocol, a type variable) is allowed: the type
    checker knows better.
    """
    if returned in (Err, Ok, Never, NoReturn):
        return True
    if get_origin(returned) is Ok:
        return _is_subtype(get_args(returned)[0], reply)
    return _is_subtype(returned, reply)


def _is_subtype(given: Any, wanted: Any) -> bool:
    return all(any(_is_one(one, other) for other in union_members(wanted)) for one in union_members(given))


def _is_one(given: Any, wanted: Any) -> bool:
    given, wanted = _plain(given), _plain(wanted)
    if Any in (given, wanted) or given == wanted:
        return True
    if get_origin(given) is Literal:
        return all(_is_one(type(value), wanted) for value in get_args(given))
    if get_origin(wanted) is Literal:
        return any(_is_one(given, type(value)) for value in get_args(wanted))
    given_class, wanted_class = get_origin(given) or given, get_origin(wanted) or wanted
    if not (isinstance(given_class, type) and isinstance(wanted_class, type)):
        return True
    try:
        related = issubclass(given_class, wanted_class)
    except TypeError:
        return True  # a protocol or a typed dictionary
    if not related:
        return wanted_class is float and given_class is int  # as type checkers have it
    pairs = zip(get_args(given), get_args(wanted), strict=False)
    return all(_is_subtype(inner, outer) for inner, outer in pairs)


def _plain(hint: Any) -> Any:
    """Return what stands behind `NewType`; a type variable could be anything."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    return Any if isinstance(hint, TypeVar) else hint


def why_not_decodable(hint: Any, name: str) -> str | None:
    """Return why a value of this type cannot be decoded, naming the field, or None if it can.

    Args:
        hint: The type.
        name: What to call it in the text, such as the name of the class.
    """
    try:
        found = _custom_type(msgspec.inspect.type_info(hint), name, set())
    except Exception as error:  # annotations are expressions: their evaluation can raise anything
        return _blamed(hint, name, error)
    if found is None:
        return None
    path, custom = found
    return (
        f"{path} is {custom.__qualname__}, which has no fields that could be decoded; use plain "
        "types, msgspec structs, dataclasses or attrs classes"
    )


def _custom_type(node: Any, path: str, seen: set[int]) -> tuple[str, type] | None:
    """Find the first type that msgspec would leave to a hook."""
    if isinstance(node, msgspec.inspect.CustomType):
        return path, node.cls
    if id(node) in seen:
        return None
    seen.add(id(node))
    children = [(f"{path}.{field.name}", field.type) for field in getattr(node, "fields", ())]
    children += [(path, getattr(node, part)) for part in ("item_type", "key_type", "value_type") if hasattr(node, part)]
    children += [(path, child) for part in ("item_types", "types") for child in getattr(node, part, ())]
    return next((found for at, child in children if (found := _custom_type(child, at, seen))), None)


def _blamed(hint: Any, name: str, error: Exception) -> str:
    if isinstance(error, NameError):
        where = _field_that_names(hint, name, error.name)
        return (
            f"{where} names {error.name!r}, which is not defined in the module of the class; "
            "define or import it there, at module level and not under `if TYPE_CHECKING:`"
        )
    for field in getattr(hint, "__struct_fields__", ()):
        try:
            msgspec.inspect.type_info(get_type_hints(hint, include_extras=True)[field])
        except Exception as reason:
            return f"{name}.{field}: {reason}"
    return f"{name}: {error}"


def _field_that_names(hint: Any, name: str, missing: str | None) -> str:
    for base in getattr(hint, "__mro__", ()):
        for field, annotation in getattr(base, "__annotations__", {}).items():
            text = annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation
            if missing and missing in str(text):
                return f"{name}.{field}"
    return name
