"""What a function asks for: its parameters, their annotations resolved, and its name for errors.

Annotations are resolved one by one, so that only those that matter have to be importable. Names are
looked up in the function's globals, its closure, and the locals of the frame that registers it.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from types import NoneType, SimpleNamespace
from typing import Any, Final, get_args, get_type_hints

import msgspec

from catga_bus.errors import RegistrationError

EMPTY: Final = inspect.Parameter.empty
"""Stands for a missing annotation or default."""


class Kind(Enum):
    """What calling a function gives."""

    PLAIN = "def"
    ASYNC = "async def"
    GENERATOR = "generator"
    ASYNC_GENERATOR = "async generator"


class Unresolved(msgspec.Struct, frozen=True):
    """An annotation that could not be turned into a type."""

    text: str
    """As it stands in the source."""

    reason: str
    """What went wrong."""

    def __str__(self) -> str:
        return (
            f"{self.text!r} cannot be resolved ({self.reason}); import it where the function is "
            "defined, and not under `if TYPE_CHECKING:`"
        )


class Parameter(msgspec.Struct, frozen=True):
    """One parameter of a function."""

    name: str
    annotation: Any
    """The resolved type, `Unresolved`, or `EMPTY`."""

    default: Any
    """The default, or `EMPTY`."""

    keyword_only: bool
    positional_only: bool


class Signature(msgspec.Struct, frozen=True):
    """What a function asks for and says that it returns."""

    parameters: tuple[Parameter, ...]
    returns: Any
    """The resolved return annotation, `Unresolved`, or `EMPTY`."""

    variadic: str | None
    """The first of `*args` and `**kwargs`, as it stands in the source, or None."""


def innermost(function: Any) -> Any:
    """Return the function or class behind partials, methods, wrappers and callable objects."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = inspect.unwrap(function)
        elif callable(function) and not (inspect.isroutine(function) or isinstance(function, type)):
            function = type(function).__call__
        else:
            return function


def name_of(function: Any) -> str:
    """Return `module.qualname`, for logs and errors."""
    behind = innermost(function)
    module = getattr(behind, "__module__", None) or "?"
    return f"{module}.{getattr(behind, '__qualname__', None) or repr(behind)}"


def place_of(function: Any) -> str:
    """Return `module.qualname (file:line)`, the head of every error about a function."""
    code = getattr(innermost(function), "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return name_of(function) + where


def kind_of(function: Any) -> Kind:
    """Return what calling the function gives.

    Raises:
        RegistrationError: It is a plain wrapper around an async or generator function, which would
            hand on a coroutine or generator that nobody runs.
    """
    if not (inspect.isroutine(function) or isinstance(function, type | functools.partial)):
        function = function.__call__
    kind = _kind_of_routine(function)
    wrapped = _kind_of_routine(innermost(function))
    if kind is Kind.PLAIN and wrapped is not Kind.PLAIN:
        raise RegistrationError(
            f"{place_of(function)}: an undecorated {wrapped.value} function is needed here, but "
            "its decorator made a plain `def` of it; give the function without the decorator, or "
            f"make the wrapper {_article(wrapped)}"
        )
    return kind


def _kind_of_routine(function: Any) -> Kind:
    if inspect.isasyncgenfunction(function):
        return Kind.ASYNC_GENERATOR
    if inspect.isgeneratorfunction(function):
        return Kind.GENERATOR
    return Kind.ASYNC if inspect.iscoroutinefunction(function) else Kind.PLAIN


def _article(kind: Kind) -> str:
    return f"an {kind.value}" if kind is not Kind.GENERATOR else f"a {kind.value}"


def signature_of(function: Any, frame_locals: Mapping[str, Any] | None) -> Signature:
    """Read a function's signature and resolve its annotations, each on its own.

    Args:
        function: Anything callable that has a signature.
        frame_locals: The locals of the frame that registers it, or None.

    Raises:
        RegistrationError: The function has no signature that can be read.
    """
    try:
        raw = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RegistrationError(
            f"{name_of(function)}: its signature cannot be read ({error}); wrap it in a function with annotations"
        ) from error
    namespace, scope = _scopes(function, frame_locals)
    parameters = []
    variadic = None
    for parameter in raw.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            variadic = variadic or f"{stars}{parameter.name}"
            continue
        parameters.append(
            Parameter(
                name=parameter.name,
                annotation=_resolved(parameter.annotation, namespace, scope),
                default=parameter.default,
                keyword_only=parameter.kind is parameter.KEYWORD_ONLY,
                positional_only=parameter.kind is parameter.POSITIONAL_ONLY,
            )
        )
    returns = _resolved(raw.return_annotation, namespace, scope)
    return Signature(parameters=tuple(parameters), returns=returns, variadic=variadic)


def _scopes(function: Any, frame_locals: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    behind = innermost(function)
    if isinstance(behind, type):
        module = sys.modules.get(behind.__module__)
        constructor = getattr(vars(behind).get("__init__"), "__globals__", None)
        return dict(constructor or vars(module or object)), dict(frame_locals or {})
    scope = dict(frame_locals or {})
    code = getattr(behind, "__code__", None)
    for name, cell in zip(code.co_freevars if code else (), getattr(behind, "__closure__", None) or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:
            continue  # not assigned yet; the frame's locals may still know it
    return getattr(behind, "__globals__", {}), scope


def _resolved(annotation: Any, namespace: dict[str, Any], scope: dict[str, Any]) -> Any:
    if annotation is EMPTY:
        return EMPTY
    holder = SimpleNamespace(__annotations__={"it": annotation})
    try:
        return get_type_hints(holder, namespace, scope, include_extras=True)["it"]
    except Exception as error:  # an annotation is any expression: its evaluation can raise anything
        text = annotation if isinstance(annotation, str) else repr(annotation)
        return Unresolved(text=text, reason=f"{type(error).__name__}: {error}")


def shown(annotation: Any) -> str:
    """Return an annotation as a reader would write it."""
    if annotation is NoneType:
        return "None"
    return annotation.__qualname__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


Function = Callable[..., Any]
"""Any callable; what it takes and gives is checked when it is registered."""
