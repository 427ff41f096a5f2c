import dataclasses
import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Generic, Literal, Never, NewType, NoReturn, Protocol, TypedDict, TypeVar
from uuid import UUID

import msgspec
import pytest

from catga_bus.context import BlockingContext, Context
from catga_bus.errors import ConfigurationError, RegistrationError
from catga_bus.handlers.dependencies import Depends
from catga_bus.handlers.registry import Handler, HandlerOptions, Registry, inspect_handler
from catga_bus.messages import Command, Event, Message, Request
from catga_bus.result import Err, Ok

T = TypeVar("T")


class Price(msgspec.Struct):
    cents: int


class SalePrice(Price):
    was: int


class Quote(Request[Price]):
    sku: str


class Names(Request[list[str]]):
    pass


class Debit(Command[None], partition_by="account"):
    account: str


class Ticked(Event, durable=False):
    n: int


class Debited(Event):
    account: str


class Credited(Event):
    account: str


def inspected(function: Any, **options: Any) -> Handler:
    return inspect_handler(function, HandlerOptions(**options), frame_locals=None)


def refused(function: Any, **options: Any) -> str:
    with pytest.raises(RegistrationError) as caught:
        inspected(function, **options)
    return str(caught.value)


async def quote(request: Quote) -> Price:
    return Price(1)


async def quote_with_context(request: Quote, ctx: Context) -> Price | Err:
    return Err("NO", ctx.message_id)


def quote_in_thread(request: Quote, ctx: BlockingContext) -> Price:
    return Price(2)


class TestWhatAHandlerIs:
    def test_a_plain_handler_is_called_as_it_is(self) -> None:
        handler = inspected(quote)

        assert handler.function is quote
        assert handler.call is quote
        assert not handler.takes_context
        assert handler.is_async
        assert handler.message_types == (Quote,)
        assert handler.name == f"{__name__}.quote"
        assert handler.options == HandlerOptions(concurrency=64, timeout=None, max_attempts=5)
        assert handler.injection is None

    def test_a_handler_with_context_is_called_as_it_is(self) -> None:
        handler = inspected(quote_with_context)

        assert handler.call is quote_with_context
        assert handler.takes_context

    def test_a_function_without_async_runs_in_a_thread(self) -> None:
        handler = inspected(quote_in_thread)

        assert handler.call is quote_in_thread
        assert handler.takes_context
        assert not handler.is_async

    def test_it_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            inspected(quote).name = "other"  # type: ignore[misc]

    def test_a_union_handles_each_of_its_members(self) -> None:
        async def both(message: Quote | Debited) -> Price | None: ...

        assert inspected(both).message_types == (Quote, Debited)

    def test_annotated_messages_and_repeated_members_count_once(self) -> None:
        async def both(message: Annotated[Quote, "doc"] | Quote | Debit) -> Price | None: ...

        assert inspected(both).message_types == (Quote, Debit)

    async def test_a_context_passed_by_name_is_filled(self) -> None:
        async def handle(request: Quote, *, ctx: Context) -> Price:
            assert ctx is marker
            return Price(3)

        marker: Any = object()
        handler = inspected(handle)

        assert handler.takes_context
        assert await handler.call(Quote("a"), marker) == Price(3)

    async def test_parameters_with_defaults_are_left_alone(self) -> None:
        async def handle(request: Quote, retries: int = 3, ctx: Context | None = None) -> Price:
            assert ctx is not None
            return Price(retries)

        assert await inspected(handle).call(Quote("a"), object()) == Price(3)

    def test_a_default_alone_needs_no_wrapping(self) -> None:
        async def handle(request: Quote, retries: int = 3) -> Price: ...

        assert inspected(handle).call is handle

    async def test_a_bound_method_is_a_handler(self) -> None:
        class Desk:
            async def quote(self, request: Quote) -> Price:
                return Price(4)

        handler = inspected(Desk().quote)

        assert await handler.call(Quote("a")) == Price(4)
        assert handler.name.endswith("Desk.quote")

    async def test_a_partial_is_a_handler(self) -> None:
        async def handle(cents: int, request: Quote) -> Price:
            return Price(cents)

        handler = inspected(functools.partial(handle, 5))

        assert handler.is_async
        assert handler.name.endswith("handle")
        assert await handler.call(Quote("a")) == Price(5)

    async def test_an_object_with_call_is_a_handler(self) -> None:
        class Desk:
            async def __call__(self, request: Quote) -> Price:
                return Price(6)

        desk = Desk()
        handler = inspected(desk)

        assert handler.function is desk
        assert handler.is_async
        assert await handler.call(Quote("a")) == Price(6)

    def test_a_wrapper_that_keeps_the_signature_is_a_handler(self) -> None:
        def logged(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                return await function(*args, **kwargs)

            return wrapper

        handler = inspected(logged(quote_with_context))

        assert handler.message_types == (Quote,)
        assert handler.takes_context


class TestReturnAnnotations:
    @pytest.mark.parametrize(
        "annotation",
        [
            Price,
            SalePrice,
            Ok[Price],
            Ok,
            Err,
            Ok[SalePrice] | Err,
            Price | Err,
            Any,
            Never,
            NoReturn,
            T,
            "unknown.Name",
        ],
    )
    def test_what_may_be_returned_for_a_price(self, annotation: Any) -> None:
        async def handle(request: Quote) -> Any: ...

        handle.__annotations__["return"] = annotation

        assert inspected(handle).message_types == (Quote,)

    @pytest.mark.parametrize("annotation", [int, None, Price | None, Ok[int], list[Price], Debit, Literal["a"], float])
    def test_what_may_not_be_returned_for_a_price(self, annotation: Any) -> None:
        async def handle(request: Quote) -> Any: ...

        handle.__annotations__["return"] = annotation
        text = refused(handle)

        assert "handle (" in text
        assert "Quote is answered with Price" in text

    def test_the_error_names_the_member_that_does_not_fit(self) -> None:
        async def handle(request: Quote) -> Price | Err | None: ...

        assert "says that it returns None, but" in refused(handle)

    def test_a_missing_return_annotation_promises_nothing(self) -> None:
        async def handle(request: Quote): ...  # type: ignore[no-untyped-def]

        assert inspected(handle).message_types == (Quote,)

    @pytest.mark.parametrize(
        ("reply", "fits", "does_not"),
        [
            (list[str], list[str], list[int]),
            (list[Price], list[SalePrice], tuple[Price, ...]),
            (list[str], list, dict[str, str]),
            (float, int, str),
            (int, bool, float),
            (NewType("Sku", str), str, bytes),
            (str, NewType("Sku", str), int),
            (Literal["a", "b"], Literal["a"], int),
            (str, Literal["a"], Literal[1]),
            (Price | None, None, int),
            (int | str, str, bytes),
            (dict[str, int], dict[str, bool], dict[str, str]),
            (Annotated[int, msgspec.Meta(gt=0)], int, str),
            (None, None, int),
            (UUID, UUID, str),
        ],
    )
    def test_replies_of_every_shape(self, reply: Any, fits: Any, does_not: Any) -> None:
        class Ask(Request[reply]):  # type: ignore[valid-type]
            pass

        async def handle(request: Ask) -> Any: ...

        handle.__annotations__.update(request=Ask, **{"return": fits})
        assert inspected(handle).message_types == (Ask,)
        handle.__annotations__["return"] = does_not
        assert "Ask is answered with" in refused(handle)

    def test_a_reply_that_cannot_be_judged_is_left_to_the_type_checker(self) -> None:
        class Row(TypedDict):
            cents: int

        class Ask(Request[Row]):
            pass

        async def handle(request: Ask) -> dict[str, int]: ...

        handle.__annotations__["request"] = Ask
        assert inspected(handle).message_types == (Ask,)

    def test_events_and_commands_without_reply_return_none(self) -> None:
        async def on_tick(event: Ticked) -> None: ...

        async def on_debit(command: Debit) -> Err | None: ...

        async def wrong(event: Ticked) -> int: ...

        assert inspected(on_tick).message_types == (Ticked,)
        assert inspected(on_debit).message_types == (Debit,)
        assert "Ticked is answered with None" in refused(wrong)

    def test_a_def_that_returns_an_awaitable_is_told_from_async_def(self) -> None:
        from collections.abc import Awaitable

        def handle(request: Quote) -> Awaitable[Price]: ...

        assert "Quote is answered with Price" in refused(handle)


class TestWhatCannotBeAHandler:
    def test_no_parameters(self) -> None:
        async def handle() -> None: ...

        text = refused(handle)
        assert "handle (" in text
        assert "test_handlers.py:" in text
        assert "takes no parameters" in text

    def test_no_annotation(self) -> None:
        async def handle(request): ...  # type: ignore[no-untyped-def]

        assert "'request' has no annotation; write request: Quote" in refused(handle)

    def test_a_method_that_is_not_bound(self) -> None:
        class Desk:
            async def quote(self, request: Quote) -> Price: ...

        assert "bus.handler(instance.method)" in refused(Desk.quote)

    def test_a_lambda(self) -> None:
        assert "a lambda cannot have one; write a function" in refused(lambda request: None)

    @pytest.mark.parametrize("annotation", [int, Price, Context, "str | Quote", None, T, Any])
    def test_a_first_parameter_that_is_no_message(self, annotation: Any) -> None:
        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = annotation

        assert "is not a message class; derive one from Request[Reply]" in refused(handle)

    @pytest.mark.parametrize("annotation", [Request, Command, Event, Request[Price], Command[None], Message])
    def test_the_bases_themselves(self, annotation: Any) -> None:
        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = annotation

        assert "a handler takes exact types; derive a class from it" in refused(handle)

    def test_a_generic_message_with_arguments_has_no_name(self) -> None:
        class Page(Request[list[T]], Generic[T]):
            number: int

        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = Page[int]

        assert "has no name on the wire; derive a class from it" in refused(handle)

    def test_a_message_that_does_not_say_what_it_is_answered_with(self) -> None:
        class Ask(Request):  # type: ignore[type-arg]
            pass

        async def handle(request: Any): ...  # type: ignore[no-untyped-def]

        handle.__annotations__["request"] = Ask
        text = refused(handle)

        assert "handle (" in text
        assert "class Ask does not say what it is answered with; write Request[Reply]" in text

    def test_a_first_annotation_that_cannot_be_resolved(self) -> None:
        async def handle(request: "Missing") -> None: ...  # type: ignore[name-defined]  # noqa: F821

        text = refused(handle)
        assert "the annotation of 'request' 'Missing' cannot be resolved (NameError" in text
        assert "not under `if TYPE_CHECKING:`" in text

    def test_a_first_annotation_that_is_no_expression(self) -> None:
        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = "a quote"

        assert "'a quote' cannot be resolved (SyntaxError" in refused(handle)

    def test_a_message_by_keyword_only(self) -> None:
        async def handle(*, request: Quote) -> Price: ...

        assert "passed by position, but 'request' is keyword-only" in refused(handle)

    def test_star_arguments(self) -> None:
        async def stars(request: Quote, *args: Any) -> Price: ...

        async def more(request: Quote, **options: Any) -> Price: ...

        assert "has *args, which nobody can fill" in refused(stars)
        assert "has **options, which nobody can fill" in refused(more)

    def test_a_parameter_that_nobody_can_fill(self) -> None:
        async def handle(request: Quote, limit: int) -> Price: ...

        async def bare(request: Quote, ctx) -> Price: ...  # type: ignore[no-untyped-def]

        text = refused(handle)
        assert "'limit' is int, and nobody can fill it" in text
        assert "give any other parameter a default" in text
        assert "'ctx' has no annotation, and nobody can fill it" in refused(bare)

    def test_the_wrong_context(self) -> None:
        async def handle(request: Quote, ctx: BlockingContext) -> Price: ...

        def thread(request: Quote, ctx: Context) -> Price: ...

        assert "is BlockingContext, but the handler is `async def` and is given a Context" in refused(handle)
        assert "is Context, but the handler is `def` and is given a BlockingContext" in refused(thread)

    def test_an_unresolvable_context_is_not_left_at_its_default(self) -> None:
        async def handle(request: Quote, ctx: "Context | Nope | None" = None) -> Price: ...  # type: ignore[name-defined]  # noqa: F821

        assert "'ctx': its annotation 'Context | Nope | None' cannot be resolved" in refused(handle)

    def test_an_unresolvable_annotation_with_a_default_is_no_error(self) -> None:
        async def handle(request: Quote, limit: "Nope" = None) -> Price: ...  # type: ignore[name-defined]  # noqa: F821

        assert inspected(handle).call is handle

    def test_generators(self) -> None:
        def handle(request: Quote) -> Iterator[Price]:
            yield Price(1)

        async def also(request: Quote) -> AsyncIterator[Price]:
            yield Price(1)

        assert "return it instead of yielding" in refused(handle)
        assert "return it instead of yielding" in refused(also)

    def test_static_and_class_methods_say_how(self) -> None:
        @staticmethod
        async def handle(request: Quote) -> Price: ...

        @classmethod
        async def other(cls: Any, request: Quote) -> Price: ...

        assert "register it after the class: bus.handler(TheClass.handle)" in refused(handle)
        assert "is a classmethod" in refused(other)

    def test_a_class(self) -> None:
        class Desk:
            pass

        assert "is a class; register a function, or a bound method" in refused(Desk)

    @pytest.mark.parametrize("value", ["quote", 5, {}])
    def test_what_is_not_callable(self, value: Any) -> None:
        assert f"must be a function, got {value!r}" in refused(value)

    def test_a_builtin_without_signature(self) -> None:
        assert "builtins.max: its signature cannot be read" in refused(max)

    def test_a_plain_wrapper_around_an_async_function(self) -> None:
        @functools.wraps(quote)
        def wrapper(*args: Any) -> Any:
            return quote(*args)

        assert "make the wrapper an async def" in refused(wrapper)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"concurrency": 0}, "concurrency must be an integer from 1 to 100,000, got 0"),
            ({"concurrency": 100_001}, "concurrency must be an integer from 1 to 100,000, got 100001"),
            ({"concurrency": True}, "got True"),
            ({"concurrency": "8"}, "got '8'"),
            ({"max_attempts": 0}, "max_attempts must be an integer from 1 to 1,000, got 0"),
            ({"max_attempts": 1.0}, "got 1.0"),
            ({"retry": 3}, "retry must be RetryOptions, such as RetryOptions(first=1.0), got 3"),
            ({"timeout": 0}, "timeout must be seconds above 0, or None, got 0"),
            ({"timeout": -1.0}, "got -1.0"),
            ({"timeout": float("nan")}, "got nan"),
            ({"timeout": float("inf")}, "got inf"),
            ({"timeout": "1"}, "got '1'"),
            ({"timeout": True}, "got True"),
        ],
    )
    def test_options_out_of_bounds(self, options: dict[str, Any], text: str) -> None:
        problem = refused(quote, **options)

        assert text in problem
        assert ".quote (" in problem

    def test_options_at_their_bounds(self) -> None:
        assert inspected(quote, concurrency=1, max_attempts=1, timeout=1e-3)
        assert inspected(quote, concurrency=100_000, max_attempts=1_000, timeout=3)


class Opaque:
    pass


@dataclasses.dataclass
class Address:
    street: str


class Box(msgspec.Struct):
    inside: "Box | None" = None
    label: str = ""


class TestWhatCannotBeDecoded:
    @pytest.mark.parametrize(
        ("hint", "text"),
        [
            (Opaque, "Ask.field is Opaque"),
            (list[Opaque], "Ask.field is Opaque"),
            (dict[str, tuple[int, Opaque]], "Ask.field is Opaque"),
            (Opaque | None, "Ask.field is Opaque"),
            (complex, "Ask.field is complex"),
            (Callable[[int], int], "Ask.field is Callable"),
            (Price | Box, "Ask.field: If a type union contains multiple Struct types"),
        ],
    )
    def test_the_error_names_class_and_field(self, hint: Any, text: str) -> None:
        class Ask(Request[None]):
            other: int
            field: hint  # type: ignore[valid-type]

        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = Ask
        problem = refused(handle)

        assert text in problem
        assert "handle (" in problem

    def test_a_nested_field_is_named_with_its_path(self) -> None:
        class Inner(msgspec.Struct):
            secret: Opaque

        class Ask(Request[None]):
            inner: Inner

        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = Ask

        assert "Ask.inner.secret is Opaque" in refused(handle)

    def test_a_field_whose_type_is_not_defined(self) -> None:
        class Ask(Request[None]):
            other: int
            item: "Missing"  # type: ignore[name-defined]  # noqa: F821

        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = Ask

        assert "Ask.item names 'Missing', which is not defined in the module of the class" in refused(handle)

    def test_a_reply_that_cannot_be_decoded(self) -> None:
        class Ask(Request[Opaque]):
            pass

        async def handle(request: Any): ...  # type: ignore[no-untyped-def]

        handle.__annotations__["request"] = Ask

        assert "the reply of Ask is Opaque" in refused(handle)

    def test_structs_dataclasses_and_recursive_types_are_fine(self) -> None:
        class Ask(Request[Box]):
            box: Box
            address: Address
            any: Any
            ids: set[UUID]

        async def handle(request: Any) -> Box: ...

        handle.__annotations__["request"] = Ask

        assert inspected(handle).message_types == (Ask,)

    def test_protocols_cannot_be_decoded(self) -> None:
        class Named(Protocol):
            name: str

        class Ask(Request[None]):
            who: Named

        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = Ask

        assert "Ask.who is" in refused(handle)


class TestRegistry:
    def test_handlers_are_found_by_the_name_on_the_wire(self) -> None:
        async def on_tick(event: Ticked) -> None: ...

        registry = Registry()
        handler, ticking = inspected(quote), inspected(on_tick)
        registry.add(handler, ticking)

        assert registry.handlers_of("Quote") == (handler,)
        assert registry.handlers_of("Nothing") == ()
        assert registry.find("Nothing") is None
        assert registry.find("Quote") == registry.requests()[0]
        assert [entry.type_name for entry in registry] == ["Quote", "Ticked"]
        assert len(registry) == 2

    def test_each_kind_is_listed_with_its_class_and_handlers(self) -> None:
        async def handle(message: Quote | Debit | Ticked | Debited) -> Price | None: ...

        registry = Registry()
        handler = inspected(handle)
        registry.add(handler)

        assert [(each.type_name, each.message_type, each.handlers) for each in registry.requests()] == [
            ("Quote", Quote, (handler,))
        ]
        assert [each.message_type for each in registry.commands()] == [Debit]
        assert [each.message_type for each in registry.events()] == [Ticked, Debited]
        assert [each.options.durable for each in registry.events()] == [False, True]
        assert registry.handlers() == (handler,)

    def test_two_handlers_of_one_request_are_both_named(self) -> None:
        async def again(request: Quote) -> Price: ...

        registry = Registry()
        registry.add(inspected(quote))
        with pytest.raises(RegistrationError) as caught:
            registry.add(inspected(again))

        assert "again (" in str(caught.value)
        assert ".quote (" in str(caught.value)
        assert "a request has one handler in a service" in str(caught.value)

    def test_two_handlers_of_one_command_are_refused(self) -> None:
        async def one(command: Debit) -> None: ...

        async def two(command: Debit) -> None: ...

        registry = Registry()
        registry.add(inspected(one))
        with pytest.raises(RegistrationError, match="a command has one handler in a service"):
            registry.add(inspected(two))

    def test_a_service_begins_in_the_log_where_all_of_its_handlers_say(self) -> None:
        async def one(event: Debited) -> None: ...

        async def command(command: Debit) -> None: ...

        async def tick(event: Ticked) -> None: ...

        registry = Registry()
        assert registry.event_start() == "new"
        registry.add(inspected(one, start="all"), inspected(command), inspected(tick))
        assert registry.event_start() == "all"

    def test_handlers_that_begin_in_the_log_at_different_places_are_both_named(self) -> None:
        async def one(event: Debited) -> None: ...

        async def two(event: Credited) -> None: ...

        registry = Registry()
        registry.add(inspected(one, start="all"), inspected(two))
        with pytest.raises(ConfigurationError) as caught:
            registry.event_start()

        text = str(caught.value)
        assert re.search(r"one \(.*\) has start='all' and .*two \(.*\) has start='new'", text)
        assert "one position in the log of events" in text

    def test_two_handlers_of_a_durable_event_are_refused(self) -> None:
        async def one(event: Debited) -> None: ...

        async def two(event: Debited) -> None: ...

        registry = Registry()
        registry.add(inspected(one))
        with pytest.raises(RegistrationError, match=r"class Debited\(Event, durable=False\)"):
            registry.add(inspected(two))

    def test_several_handlers_of_an_event_that_is_not_stored_are_fine(self) -> None:
        async def one(event: Ticked) -> None: ...

        async def two(event: Ticked) -> None: ...

        registry = Registry()
        first, second = inspected(one), inspected(two)
        registry.add(first, second)

        assert registry.handlers_of("Ticked") == (first, second)
        with pytest.raises(RegistrationError, match="registered already for Ticked"):
            registry.add(inspected(two))

    def test_two_classes_with_one_name_are_both_named(self) -> None:
        class Other(Request[None], type_name="Quote"):
            pass

        async def handle(request: Any) -> None: ...

        handle.__annotations__["request"] = Other
        registry = Registry()
        registry.add(inspected(quote))
        with pytest.raises(RegistrationError) as caught:
            registry.add(inspected(handle))

        assert f"{__name__}.Quote are both called 'Quote' on the wire" in str(caught.value)
        assert "Other" in str(caught.value)
        assert "type_name=" in str(caught.value)

    def test_nothing_is_added_when_one_type_of_a_union_is_taken(self) -> None:
        async def handle(message: Debited | Quote) -> Price | None: ...

        registry = Registry()
        registry.add(inspected(quote))
        with pytest.raises(RegistrationError):
            registry.add(inspected(handle))

        assert [entry.type_name for entry in registry] == ["Quote"]


def make_repo() -> int:
    return 1


async def test_a_handler_keeps_its_function_when_it_is_included() -> None:
    async def handle(request: Quote, n: Annotated[int, Depends(make_repo)]) -> Price:
        return Price(n)

    async def outer(message: Any, ctx: Any, call_next: Any) -> Any: ...

    handler = inspected(handle)
    included = handler.included_in({make_repo: lambda: 2}, (outer,))

    assert included.function is handler.function
    assert included.middleware == (outer,)
    assert await included.call(Quote("a"), None) == Price(2)
    assert await handler.call(Quote("a"), None) == Price(1)
