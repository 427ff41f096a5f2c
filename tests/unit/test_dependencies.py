import asyncio
import functools
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn

import msgspec
import pytest

from catga_bus.context import BlockingContext, Context
from catga_bus.errors import RegistrationError
from catga_bus.handlers.dependencies import Depends
from catga_bus.handlers.registry import Handler
from catga_bus.handlers.router import Router
from catga_bus.messages import Command, Request


class Price(msgspec.Struct):
    cents: int


class Quote(Request[Price]):
    sku: str


class Debit(Command[Price]):
    account: str


CONTEXT: Any = object()


def handler_of(function: Any, router: Router | None = None) -> Handler:
    router = router or Router()
    router.handler(function)
    return router._collected.registry.handlers()[-1]


async def called(function: Any, message: Any = None) -> Any:
    return await handler_of(function).call(message or Quote("abc"), CONTEXT)


def refused(function: Any) -> str:
    with pytest.raises(RegistrationError) as caught:
        Router().handler(function)
    return str(caught.value)


def get_three() -> int:
    return 3


async def get_four() -> int:
    await asyncio.sleep(0)
    return 4


class TestKindsOfDependencies:
    async def test_a_plain_function(self) -> None:
        async def handle(request: Quote, n: Annotated[int, Depends(get_three)]) -> Price:
            return Price(n)

        assert await called(handle) == Price(3)

    async def test_an_async_function(self) -> None:
        async def handle(request: Quote, n: Annotated[int, Depends(get_four)]) -> Price:
            return Price(n)

        assert await called(handle) == Price(4)

    async def test_generators_clean_up_in_reverse_after_the_handler(self) -> None:
        seen: list[str] = []

        def first() -> Iterator[str]:
            seen.append("first opens")
            yield "first"
            seen.append("first closes")

        async def second(before: Annotated[str, Depends(first)]) -> AsyncIterator[str]:
            seen.append("second opens")
            yield before + " second"
            seen.append("second closes")

        async def handle(request: Quote, both: Annotated[str, Depends(second)]) -> Price:
            seen.append(both)
            return Price(1)

        assert await called(handle) == Price(1)
        assert seen == ["first opens", "second opens", "first second", "second closes", "first closes"]

    async def test_classes_methods_partials_and_objects(self) -> None:
        class Repo:
            def __init__(self, n: Annotated[int, Depends(get_three)]) -> None:
                self.n = n

            def twice(self) -> int:
                return 2

            async def __call__(self) -> int:
                return 5

        repo = Repo(1)

        async def handle(
            request: Quote,
            made: Annotated[Repo, Depends(Repo)],
            two: Annotated[int, Depends(repo.twice)],
            five: Annotated[int, Depends(repo)],
            seven: Annotated[int, Depends(functools.partial(len, "seventh"))],
        ) -> Price:
            return Price(made.n * 1000 + two * 100 + five * 10 + seven)

        assert await called(handle) == Price(3257)

    async def test_defaults_of_a_dependency_are_left_alone(self) -> None:
        def get(dsn: str = "x", *, n: Annotated[int, Depends(get_three)], **more: Any) -> str:
            return f"{dsn}{n}{more}"

        async def handle(request: Quote, text: Annotated[str, Depends(get)]) -> Price:
            assert text == "x3{}"
            return Price(0)

        assert await called(handle) == Price(0)

    async def test_keyword_only_dependencies_of_a_handler(self) -> None:
        async def handle(request: Quote, *, n: Annotated[int, Depends(get_three)], ctx: Context) -> Price:
            assert ctx is CONTEXT
            return Price(n)

        assert await called(handle) == Price(3)

    async def test_a_dependency_may_give_none(self) -> None:
        calls: list[int] = []

        def nothing() -> None:
            calls.append(1)

        async def handle(
            request: Quote, a: Annotated[None, Depends(nothing)], b: Annotated[None, Depends(nothing)]
        ) -> Price:
            return Price(len(calls))

        assert await called(handle) == Price(1)

    async def test_arguments_are_handed_over_as_they_are(self) -> None:
        async def handle(request: Quote, n: Annotated[int, Depends(lambda: "no integer")]) -> Price:
            assert n == "no integer"  # type: ignore[comparison-overlap]
            return Price(0)

        assert await called(handle) == Price(0)


class TestWhatADependencyMayAskFor:
    async def test_the_context_and_the_message(self) -> None:
        def get(ctx: Context, request: Quote) -> str:
            assert ctx is CONTEXT
            return request.sku

        async def handle(message: Quote, text: Annotated[str, Depends(get)]) -> Price:
            return Price(len(text))

        assert await called(handle) == Price(3)

    async def test_any_of_the_messages_of_a_union(self) -> None:
        def get(message: Quote | Debit, base: Request[Any] | Command[Any]) -> str:
            assert message is base
            return type(message).__name__

        async def handle(message: Quote | Debit, name: Annotated[str, Depends(get)]) -> Price:
            return Price(len(name))

        assert await called(handle, Debit("a")) == Price(5)

    def test_one_message_of_a_union_is_not_enough(self) -> None:
        def get(message: Quote) -> int: ...

        async def handle(message: Quote | Debit, n: Annotated[int, Depends(get)]) -> Price: ...

        assert "'message' is Quote, and nobody can fill it" in refused(handle)

    async def test_either_context_for_both_kinds_of_handlers(self) -> None:
        def get(ctx: Context | BlockingContext) -> bool:
            return ctx is CONTEXT

        async def handle(message: Quote, right: Annotated[bool, Depends(get)]) -> Price:
            return Price(int(right))

        def thread(message: Quote, right: Annotated[bool, Depends(get)]) -> Price:
            return Price(int(right))

        assert await called(handle) == Price(1)
        assert handler_of(thread).call(Quote("a"), CONTEXT) == Price(1)

    def test_the_wrong_context(self) -> None:
        def get(ctx: Context) -> int: ...

        def handle(message: Quote, n: Annotated[int, Depends(get)]) -> Price: ...

        text = refused(handle)
        assert ".get (" in text
        assert "is Context, but the handler is `def` and is given a BlockingContext" in text

    def test_what_nobody_can_fill(self) -> None:
        def get(limit: int) -> int: ...

        async def handle(message: Quote, n: Annotated[int, Depends(get)]) -> Price: ...

        text = refused(handle)
        assert ".get (" in text
        assert "'limit' is int, and nobody can fill it" in text

    def test_a_builtin_without_signature(self) -> None:
        async def handle(message: Quote, n: Annotated[int, Depends(max)]) -> Price: ...

        assert "builtins.max: its signature cannot be read" in refused(handle)


class TestSharing:
    async def test_a_dependency_runs_once_per_call(self) -> None:
        calls: list[int] = []

        def get() -> int:
            calls.append(1)
            return len(calls)

        def left(n: Annotated[int, Depends(get)]) -> int:
            return n

        async def right(n: Annotated[int, Depends(get)]) -> int:
            return n

        async def handle(
            request: Quote,
            a: Annotated[int, Depends(left)],
            b: Annotated[int, Depends(right)],
            c: Annotated[int, Depends(get)],
        ) -> Price:
            return Price(a * 100 + b * 10 + c)

        handler = handler_of(handle)
        assert await handler.call(Quote("a"), CONTEXT) == Price(111)
        assert await handler.call(Quote("a"), CONTEXT) == Price(222)

    async def test_without_cache_everybody_gets_their_own(self) -> None:
        calls: list[int] = []

        def get() -> int:
            calls.append(1)
            return len(calls)

        async def handle(
            request: Quote,
            a: Annotated[int, Depends(get, use_cache=False)],
            b: Annotated[int, Depends(get, use_cache=False)],
            c: Annotated[int, Depends(get)],
            d: Annotated[int, Depends(get)],
        ) -> Price:
            return Price(a * 1000 + b * 100 + c * 10 + d)

        assert await called(handle) == Price(1233)


class TestCleanUp:
    async def test_the_dependency_sees_what_the_handler_raised(self) -> None:
        seen: list[BaseException] = []

        def plain() -> Iterator[int]:
            try:
                yield 1
            except ValueError as error:
                seen.append(error)
                raise

        async def later() -> AsyncIterator[int]:
            try:
                yield 2
            except ValueError as error:
                seen.append(error)
                raise

        async def handle(request: Quote, a: Annotated[int, Depends(plain)], b: Annotated[int, Depends(later)]) -> Price:
            raise problem

        problem = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            await called(handle)
        assert seen == [problem, problem]

    async def test_a_dependency_cannot_swallow_what_the_handler_raised(self) -> None:
        def plain() -> Iterator[int]:
            with suppress(ValueError):
                yield 1

        async def later() -> AsyncIterator[int]:
            with suppress(ValueError):
                yield 2

        async def handle(request: Quote, a: Annotated[int, Depends(plain)], b: Annotated[int, Depends(later)]) -> Price:
            raise ValueError("no")

        def thread(request: Quote, a: Annotated[int, Depends(plain)]) -> Price:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await called(handle)
        with pytest.raises(ValueError, match="no"):
            handler_of(thread).call(Quote("a"), CONTEXT)

    async def test_a_dependency_may_raise_something_else(self) -> None:
        def plain() -> Iterator[int]:
            try:
                yield 1
            except ValueError as error:
                raise KeyError("mapped") from error

        async def handle(request: Quote, a: Annotated[int, Depends(plain)]) -> Price:
            raise ValueError("no")

        with pytest.raises(KeyError, match="mapped"):
            await called(handle)

    async def test_it_cleans_up_when_the_handler_is_cancelled(self) -> None:
        seen: list[str] = []
        started = asyncio.Event()

        async def later() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0)
                seen.append("closed")

        async def handle(request: Quote, a: Annotated[int, Depends(later)]) -> Price:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError("never reached")

        task = asyncio.ensure_future(called(handle))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["closed"]

    async def test_what_was_opened_is_closed_when_a_later_dependency_fails(self) -> None:
        seen: list[str] = []

        def first() -> Iterator[int]:
            try:
                yield 1
            finally:
                seen.append("closed")

        def second() -> NoReturn:
            raise LookupError("second")

        async def handle(
            request: Quote, a: Annotated[int, Depends(first)], b: Annotated[int, Depends(second)]
        ) -> Price:
            raise AssertionError("never reached")

        with pytest.raises(LookupError, match="second"):
            await called(handle)
        assert seen == ["closed"]

    def test_it_cleans_up_in_threads_too(self) -> None:
        seen: list[str] = []

        def first() -> Iterator[int]:
            yield 1
            seen.append("closed")

        def handle(request: Quote, a: Annotated[int, Depends(first)], ctx: BlockingContext) -> Price:
            return Price(a)

        handler = handler_of(handle)

        assert not handler.is_async
        assert handler.call(Quote("a"), CONTEXT) == Price(1)
        assert seen == ["closed"]


class TestOverrides:
    async def test_an_override_replaces_a_dependency_until_it_is_removed(self) -> None:
        router = Router()

        async def handle(request: Quote, n: Annotated[int, Depends(get_three)]) -> Price:
            return Price(n)

        handler = handler_of(handle, router)
        assert await handler.call(Quote("a"), CONTEXT) == Price(3)
        router.dependency_overrides[get_three] = lambda: 30
        assert await handler.call(Quote("a"), CONTEXT) == Price(30)
        router.dependency_overrides[get_three] = get_four
        assert await handler.call(Quote("a"), CONTEXT) == Price(4)
        del router.dependency_overrides[get_three]
        assert await handler.call(Quote("a"), CONTEXT) == Price(3)

    async def test_an_override_may_be_of_another_kind_and_ask_for_other_things(self) -> None:
        router = Router()
        seen: list[str] = []

        async def fake(request: Quote, ctx: Context) -> AsyncIterator[int]:
            yield len(request.sku)
            seen.append("closed")

        def nested(n: Annotated[int, Depends(get_three)]) -> int:
            return n * 10

        async def handle(request: Quote, n: Annotated[int, Depends(nested)]) -> Price:
            return Price(n)

        router.dependency_overrides[get_three] = fake
        handler = handler_of(handle, router)

        assert await handler.call(Quote("ab"), CONTEXT) == Price(20)
        assert seen == ["closed"]

    async def test_two_buses_override_for_themselves(self) -> None:
        router, one, two = Router(), Router(), Router()

        async def handle(request: Quote, n: Annotated[int, Depends(get_three)]) -> Price:
            return Price(n)

        router.handler(handle)
        one.include(router)
        two.include(router)
        one.dependency_overrides[get_three] = lambda: 1
        router.dependency_overrides[get_three] = lambda: 99

        results = [await bus._collected.registry.handlers()[0].call(Quote("a"), CONTEXT) for bus in (one, two)]
        assert results == [Price(1), Price(3)]

    async def test_an_override_that_cannot_be_filled_is_an_error_of_the_call(self) -> None:
        router = Router()

        def fake(limit: int) -> int: ...

        async def handle(request: Quote, n: Annotated[int, Depends(get_three)]) -> Price: ...

        handler = handler_of(handle, router)
        router.dependency_overrides[get_three] = fake
        with pytest.raises(RegistrationError, match="nobody can fill it"):
            await handler.call(Quote("a"), CONTEXT)


class TestWhatIsRefused:
    def test_an_async_dependency_of_a_handler_in_a_thread(self) -> None:
        async def generator() -> AsyncIterator[int]:
            yield 1

        def nested(n: Annotated[int, Depends(get_four)]) -> int: ...

        def one(request: Quote, n: Annotated[int, Depends(get_four)]) -> Price: ...

        def two(request: Quote, n: Annotated[int, Depends(generator)]) -> Price: ...

        def three(request: Quote, n: Annotated[int, Depends(nested)]) -> Price: ...

        assert ".get_four (" in refused(one)
        assert "is an async def, but" in refused(one)
        assert "make the handler `async def`, or the dependency a `def`" in refused(one)
        assert "is an async generator, but" in refused(two)
        assert "nested asks for it as 'n'" in refused(three)

    def test_dependencies_that_need_each_other(self) -> None:
        def one(n: Any) -> int: ...

        def two(n: Annotated[int, Depends(one)]) -> int: ...

        one.__annotations__["n"] = Annotated[int, Depends(two)]

        async def handle(request: Quote, n: Annotated[int, Depends(one)]) -> Price: ...

        text = refused(handle)
        assert "dependencies that need each other" in text
        assert len(re.findall(r"\bone\b", text)) == 3

    def test_depends_as_a_default(self) -> None:
        async def handle(request: Quote, n: int = Depends(get_three)) -> Price: ...  # type: ignore[assignment]

        assert "write n: Annotated[<its type>, Depends(get_three)]" in refused(handle)

    def test_depends_on_what_is_not_callable(self) -> None:
        with pytest.raises(RegistrationError, match=r"got 3; write Depends\(get_repo\), not Depends\(get_repo\(\)\)"):
            Depends(get_three())  # type: ignore[arg-type]

    def test_a_generator_behind_a_decorator(self) -> None:
        @contextmanager
        def session() -> Iterator[int]:
            yield 1

        async def handle(request: Quote, n: Annotated[int, Depends(session)]) -> Price: ...

        assert "give the function without the decorator" in refused(handle)

    def test_a_positional_only_parameter_after_one_left_at_its_default(self) -> None:
        def get(limit: int = 3, request: Quote = None, /) -> int: ...  # type: ignore[assignment]

        async def handle(request: Quote, n: Annotated[int, Depends(get)]) -> Price: ...

        assert "positional-only parameter 'request' cannot be filled while 'limit'" in refused(handle)


def test_a_handler_without_dependencies_pays_nothing() -> None:
    async def handle(request: Quote, ctx: Context) -> Price: ...

    handler = handler_of(handle)

    assert handler.call is handle
    assert handler.injection is None
