"""Dependency injection: what a handler asks for with `Annotated[Repo, Depends(get_repo)]`.

A dependency is a function, an async function, a generator or an async generator (its code after
`yield` cleans up when the handler has ended, raised or been cancelled, in reverse order, and sees
the exception), or a class. It may ask for the message, for the context and for other dependencies,
each by annotation. The graph is resolved once, at registration, into a list of steps; a call runs
the list. A dependency that several ask for runs once per call.

Plain functions run where the handler runs: on the event loop for `async def`, so they must not
block there.

Decided: a resolver of our own, because fast-depends 3.0 does not fit. It runs every plain
dependency of an async handler in a worker thread (97 microseconds a call, 8 for an async one; 0.6
for either here, 3 for a generator), fills parameters by name instead of by annotation, needs every
annotation to resolve, keeps overrides in a provider that a handler is bound to for ever, and its
import brings anyio and pydantic (74 ms).
"""

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from typing import Annotated, Any, Final, get_args, get_origin

import msgspec

from catga_bus.context import BlockingContext, Context
from catga_bus.errors import RegistrationError
from catga_bus.handlers.shapes import union_members
from catga_bus.handlers.signatures import (
    EMPTY,
    Function,
    Kind,
    Parameter,
    Signature,
    Unresolved,
    kind_of,
    name_of,
    place_of,
    shown,
    signature_of,
)
from catga_bus.messages import MessageMeta

Overrides = Mapping[Function, Function]
"""What to run instead of which dependency; read at every call."""

# The values of one call lie in a list: the message, the context, then one per step.
_MESSAGE: Final = 0
_CONTEXT: Final = 1


class Depends:
    """Marks a parameter that is filled by calling a function.

    Args:
        dependency: The function, class or generator function to call.
        use_cache: Whether one call of the handler runs it at most once, however many ask for it.

    Raises:
        RegistrationError: `dependency` cannot be called.

    Example:
        >>> def get_limit() -> int:
        ...     return 3
        >>> async def quote(request: Quote, limit: Annotated[int, Depends(get_limit)]) -> Price: ...
    """

    __slots__ = ("dependency", "use_cache")

    def __init__(self, dependency: Callable[..., Any], *, use_cache: bool = True) -> None:
        if not callable(dependency):
            raise RegistrationError(
                f"Depends takes the function to call, got {dependency!r}; write Depends(get_repo), "
                "not Depends(get_repo())"
            )
        self.dependency = dependency
        self.use_cache = use_cache

    def __repr__(self) -> str:
        return f"Depends({getattr(self.dependency, '__qualname__', self.dependency)})"


class _Step(msgspec.Struct, frozen=True):
    """One call: of a dependency, or at the end of the handler."""

    function: Function
    kind: Kind
    positions: tuple[int, ...]
    """Where the positional arguments lie among the values."""

    names: tuple[tuple[str, int], ...]
    """The keyword arguments and where they lie."""

    def start(self, values: list[Any]) -> Any:
        positional = [values[index] for index in self.positions]
        if not self.names:
            return self.function(*positional)
        return self.function(*positional, **{name: values[index] for name, index in self.names})


class _Plan(msgspec.Struct, frozen=True):
    overrides: dict[Function, Function]
    """What was replaced when this plan was made."""

    steps: tuple[_Step, ...]
    handler: _Step
    cleans_up: bool


class Injection:
    """A handler together with what fills its parameters.

    Args:
        function: The handler; its first parameter takes the message.
        signature: What it asks for.
        message_types: The classes that it handles.
        is_async: Whether it is `async def`.
        frame_locals: The locals of the frame that registers it, or None.
        overrides: Dependencies to replace, by the function replaced; looked at in every call, and
            free while empty.

    Raises:
        RegistrationError: Something that nobody can fill, an async dependency of a `def` handler,
            the wrong kind of context, or dependencies that need each other.
    """

    __slots__ = ("_function", "_is_async", "_message_types", "_overrides", "_plan", "_signatures")

    def __init__(
        self,
        function: Function,
        signature: Signature,
        message_types: tuple[type, ...],
        *,
        is_async: bool,
        frame_locals: Mapping[str, Any] | None,
        overrides: Overrides,
    ) -> None:
        self._function = function
        self._message_types = message_types
        self._is_async = is_async
        self._overrides = overrides
        # Kept, so that a new plan needs no frame locals: they would keep alive whatever the frame held.
        self._signatures: dict[Function, Signature] = {function: signature}
        self._plan = self._planned({}, frame_locals)

    def bound_to(self, overrides: Overrides) -> "Injection":
        """Return the same injection obeying the overrides of another bus or router."""
        other = copy.copy(self)
        other._overrides = overrides  # noqa: SLF001 - the same class
        return other

    @property
    def is_needed(self) -> bool:
        """Whether the handler cannot be called with its message, or message and context, alone."""
        positions = self._plan.handler.positions
        return bool(self._plan.steps or self._plan.handler.names) or positions not in ((0,), (0, 1))

    @property
    def takes_context(self) -> bool:
        """Whether the handler itself asks for the context."""
        handler = self._plan.handler
        return _CONTEXT in handler.positions or any(index == _CONTEXT for _, index in handler.names)

    @property
    def call(self) -> Callable[[Any, Any], Any]:
        """What runs dependencies, handler and clean-up, given the message and the context."""
        return self._call_async if self._is_async else self._call_blocking

    async def _call_async(self, message: Any, context: Any) -> Any:
        plan = self._current_plan()
        values = [message, context]
        if not plan.cleans_up:
            for step in plan.steps:
                value = step.start(values)
                values.append(await value if step.kind is Kind.ASYNC else value)
            return await plan.handler.start(values)
        async with AsyncExitStack() as stack:
            for step in plan.steps:
                match step.kind:
                    case Kind.PLAIN:
                        values.append(step.start(values))
                    case Kind.ASYNC:
                        values.append(await step.start(values))
                    case Kind.GENERATOR:
                        values.append(_enter(stack, step.start(values)))
                    case Kind.ASYNC_GENERATOR:
                        values.append(await _enter_async(stack, step.start(values)))
            return await plan.handler.start(values)

    def _call_blocking(self, message: Any, context: Any) -> Any:
        plan = self._current_plan()
        values = [message, context]
        with ExitStack() as stack:
            for step in plan.steps:
                value = step.start(values)
                values.append(_enter(stack, value) if step.kind is Kind.GENERATOR else value)
            return plan.handler.start(values)

    def _current_plan(self) -> _Plan:
        # A thread may make the same plan at the same time: both are right, and the last one stays.
        if self._plan.overrides != self._overrides:
            self._plan = self._planned(dict(self._overrides), None)
        return self._plan

    def _planned(self, overrides: dict[Function, Function], frame_locals: Mapping[str, Any] | None) -> _Plan:
        planner = _Planner(
            self._message_types,
            self._signatures,
            is_async=self._is_async,
            overrides=overrides,
            frame_locals=frame_locals,
        )
        handler = planner.step(self._function, Kind.ASYNC if self._is_async else Kind.PLAIN, ())
        steps = tuple(planner.steps)
        cleans_up = any(step.kind in (Kind.GENERATOR, Kind.ASYNC_GENERATOR) for step in steps)
        return _Plan(overrides=overrides, steps=steps, handler=handler, cleans_up=cleans_up)


class _Planner:
    """Lays out the steps of one handler: what is asked for comes before who asks."""

    def __init__(
        self,
        message_types: tuple[type, ...],
        signatures: dict[Function, Signature],
        *,
        is_async: bool,
        overrides: Overrides,
        frame_locals: Mapping[str, Any] | None,
    ) -> None:
        self.steps: list[_Step] = []
        self._message_types = message_types
        self._signatures = signatures
        self._is_async = is_async
        self._overrides = overrides
        self._frame_locals = frame_locals
        self._shared: dict[Function, int] = {}

    def step(self, function: Function, kind: Kind, path: tuple[Function, ...]) -> _Step:
        """Lay out what a function asks for, and return the call of the function itself.

        Args:
            function: What to call.
            kind: What calling it gives.
            path: The dependencies that led here; empty for the handler.
        """
        positions: list[int] = []
        names: list[tuple[str, int]] = []
        left_out: str | None = None
        for parameter in self._signature(function).parameters:
            is_message = not path and not positions
            index = _MESSAGE if is_message else self._source(function, parameter, path)
            if index is None:
                left_out = left_out or parameter.name
            elif not (parameter.keyword_only or left_out):
                positions.append(index)
            elif parameter.positional_only:
                raise RegistrationError(
                    f"{place_of(function)}: the positional-only parameter {parameter.name!r} "
                    f"cannot be filled while {left_out!r} before it is left at its default; put "
                    f"{parameter.name!r} first"
                )
            else:
                names.append((parameter.name, index))
        return _Step(
            function=_as_called(function, kind),
            kind=kind,
            positions=tuple(positions),
            names=tuple(names),
        )

    def _signature(self, function: Function) -> Signature:
        found = self._signatures.get(function)
        if found is None:
            found = self._signatures[function] = signature_of(function, self._frame_locals)
        return found

    def _source(self, function: Function, parameter: Parameter, path: tuple[Function, ...]) -> int | None:
        """Return where the parameter's value will lie, or None if it stays at its default."""
        annotation = parameter.annotation
        head = f"{place_of(function)}: the parameter {parameter.name!r}"
        if isinstance(parameter.default, Depends):
            raise RegistrationError(
                f"{head} has {parameter.default!r} as its default; write {parameter.name}: "
                f"Annotated[<its type>, {parameter.default!r}]"
            )
        if isinstance(annotation, Unresolved):
            if parameter.default is EMPTY or _OUR_WORDS.search(annotation.text):
                raise RegistrationError(f"{head}: its annotation {annotation}")
            return None
        marker = _marker_of(annotation)
        if marker is not None:
            return self._dependency(function, parameter, marker, path)
        members = union_members(annotation)
        if Context in members or BlockingContext in members:
            return self._context(head, members)
        if self._is_message(members):
            return _MESSAGE
        if parameter.default is not EMPTY:
            return None
        has = "has no annotation" if annotation is EMPTY else f"is {shown(annotation)}"
        raise RegistrationError(
            f"{head} {has}, and nobody can fill it; what can be filled is the message, "
            f"{'Context' if self._is_async else 'BlockingContext'} and Annotated[..., "
            "Depends(...)]; give any other parameter a default"
        )

    def _context(self, head: str, members: tuple[Any, ...]) -> int:
        given, other = (Context, BlockingContext) if self._is_async else (BlockingContext, Context)
        if given not in members:
            handler = "async def" if self._is_async else "def"
            raise RegistrationError(
                f"{head} is {other.__name__}, but the handler is `{handler}` and is given a "
                f"{given.__name__}; annotate it with {given.__name__}, or make the handler "
                f"`{'def' if self._is_async else 'async def'}`"
            )
        return _CONTEXT

    def _is_message(self, members: tuple[Any, ...]) -> bool:
        classes = tuple(
            plain for plain in (get_origin(member) or member for member in members) if isinstance(plain, MessageMeta)
        )
        return bool(classes) and all(issubclass(handled, classes) for handled in self._message_types)

    def _dependency(self, function: Function, parameter: Parameter, marker: Depends, path: tuple[Function, ...]) -> int:
        asked = marker.dependency
        if marker.use_cache and asked in self._shared:
            return self._shared[asked]
        if asked in path:
            circle = " -> ".join(name_of(each) for each in (*path[path.index(asked) :], asked))
            raise RegistrationError(f"{place_of(asked)}: dependencies that need each other: {circle}; break the circle")
        target = self._overrides.get(asked, asked)
        kind = kind_of(target)
        if not self._is_async and kind in (Kind.ASYNC, Kind.ASYNC_GENERATOR):
            raise RegistrationError(
                f"{place_of(target)} is an {kind.value}, but {name_of(function)} asks for it as "
                f"{parameter.name!r} in a `def` handler, which runs in a thread without an event "
                "loop; make the handler `async def`, or the dependency a `def`"
            )
        self.steps.append(self.step(target, kind, (*path, asked)))
        index = _CONTEXT + len(self.steps)
        if marker.use_cache:
            self._shared[asked] = index
        return index


_OUR_WORDS = re.compile(r"\b(Depends|Context|BlockingContext)\b")


def _as_called(function: Function, kind: Kind) -> Function:
    """Return what to call: of a generator function, the context manager that it stands for."""
    if kind is Kind.GENERATOR:
        return contextmanager(function)
    return asynccontextmanager(function) if kind is Kind.ASYNC_GENERATOR else function


def _marker_of(annotation: Any) -> Depends | None:
    if get_origin(annotation) is not Annotated:
        return None
    return next((note for note in get_args(annotation)[1:] if isinstance(note, Depends)), None)


# A dependency sees the exception of its handler, to roll back, but cannot swallow it: the call
# would end without a reply. So what `__exit__` returns is dropped.


def _enter(stack: ExitStack | AsyncExitStack, manager: AbstractContextManager[Any]) -> Any:
    value = manager.__enter__()

    def leave(*failure: Any) -> None:
        manager.__exit__(*failure)

    stack.push(leave)
    return value


async def _enter_async(stack: AsyncExitStack, manager: AbstractAsyncContextManager[Any]) -> Any:
    value = await manager.__aenter__()

    async def leave(*failure: Any) -> None:
        await manager.__aexit__(*failure)

    stack.push_async_exit(leave)
    return value
