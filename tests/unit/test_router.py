from typing import Any

import msgspec
import pytest

from catga_bus.context import Context, Outgoing
from catga_bus.errors import RegistrationError
from catga_bus.handlers.registry import HandlerOptions
from catga_bus.handlers.router import Router
from catga_bus.messages import Event, Request
from catga_bus.pipeline import CallNext, Result
from catga_bus.resilience.retry import RetryOptions


class Price(msgspec.Struct):
    cents: int


class Quote(Request[Price]):
    sku: str


class Other(Request[None]):
    pass


class Ticked(Event, durable=False):
    pass


async def quote(request: Quote) -> Price:
    return Price(1)


async def other(request: Other) -> None: ...


async def inner(message: Any, ctx: Context, call_next: CallNext) -> Result:
    return await call_next(message)


async def outer(message: Any, ctx: Context, call_next: CallNext) -> Result:
    return await call_next(message)


async def outgoing(message: Any, ctx: Outgoing, call_next: CallNext) -> Result:
    return await call_next(message)


def names(router: Router) -> list[str]:
    return [entry.type_name for entry in router._collected.registry]


class TestHandlerDecorator:
    def test_bare_it_returns_the_function_itself(self) -> None:
        router = Router()

        assert router.handler(quote) is quote
        assert names(router) == ["Quote"]

    def test_with_options_it_returns_the_function_itself(self) -> None:
        router = Router()

        assert router.handler(max_attempts=2, concurrency=8, timeout=1.5, retry=RetryOptions(first=2.0))(quote) is quote
        (handler,) = router._collected.registry.handlers()
        assert handler.options == HandlerOptions(
            max_attempts=2, concurrency=8, timeout=1.5, retry=RetryOptions(first=2.0)
        )

    def test_empty_brackets_are_fine(self) -> None:
        router = Router()
        router.handler()(quote)

        assert names(router) == ["Quote"]

    def test_an_unknown_option_is_a_type_error(self) -> None:
        with pytest.raises(TypeError, match="concurency"):
            Router().handler(concurency=3)  # type: ignore[call-overload]

    def test_options_are_checked_when_the_function_is_known(self) -> None:
        with pytest.raises(RegistrationError, match=r"\.quote .*concurrency must be an integer .* got 0"):
            Router().handler(concurrency=0)(quote)

    def test_an_option_passed_by_position_is_refused(self) -> None:
        with pytest.raises(RegistrationError, match="must be a function, got 3"):
            Router().handler(3)  # type: ignore[type-var]

    def test_one_function_may_be_registered_with_two_routers(self) -> None:
        one, two = Router(), Router()
        one.handler(quote)
        two.handler(quote)

        assert names(one) == names(two) == ["Quote"]


class TestMiddlewareDecorator:
    def test_sides_are_kept_apart_and_in_order(self) -> None:
        router = Router()

        assert router.middleware(outer) is outer
        assert router.middleware(side="inbound")(inner) is inner
        assert router.middleware(side="outbound")(outgoing) is outgoing
        assert router._collected.inbound == [outer, inner]
        assert router._collected.outbound == [outgoing]

    def test_an_unknown_side_is_refused(self) -> None:
        with pytest.raises(RegistrationError, match="side must be 'inbound' or 'outbound', got 'both'"):
            Router().middleware(side="both")  # type: ignore[call-overload]

    def test_a_function_that_is_not_async_is_refused(self) -> None:
        def plain(message: Any, ctx: Any, call_next: Any) -> Any: ...

        with pytest.raises(RegistrationError, match=r"plain .*is not `async def`"):
            Router().middleware(plain)

    def test_a_wrong_number_of_parameters_is_refused(self) -> None:
        async def short(message: Any, call_next: Any) -> Any: ...

        with pytest.raises(RegistrationError, match=r"short .*cannot be called with three arguments"):
            Router().middleware(short)  # type: ignore[type-var]

    @pytest.mark.parametrize("value", [3, "audit", int])
    def test_what_is_no_function_is_refused(self, value: Any) -> None:
        with pytest.raises(RegistrationError, match="middleware is `async def audit"):
            Router().middleware(value)

    def test_an_object_with_async_call_is_fine(self) -> None:
        class Audit:
            async def __call__(self, message: Any, ctx: Context, call_next: CallNext) -> Result:
                return await call_next(message)

        router = Router()
        audit = Audit()
        router.middleware(audit)

        assert router._collected.inbound == [audit]


class TestInclude:
    def test_handlers_and_outbound_middleware_are_taken_over(self) -> None:
        router, bus = Router(), Router()
        router.handler(quote)
        router.middleware(side="outbound")(outgoing)
        bus.handler(other)
        bus.include(router)

        assert names(bus) == ["Other", "Quote"]
        assert bus._collected.outbound == [outgoing]

    def test_inbound_middleware_stays_with_the_handlers_of_its_router(self) -> None:
        router, bus = Router(), Router()
        router.handler(quote)
        router.middleware(inner)
        bus.handler(other)
        bus.include(router)

        by_name = {handler.name.split(".")[-1]: handler for handler in bus._collected.registry.handlers()}
        assert by_name["quote"].middleware == (inner,)
        assert by_name["other"].middleware == ()
        assert bus._collected.inbound == []

    def test_routers_nest_with_the_outer_middleware_outside(self) -> None:
        deep, router, bus = Router(), Router(), Router()
        deep.handler(quote)
        deep.middleware(inner)
        router.include(deep)
        router.middleware(outer)
        bus.include(router)

        (handler,) = bus._collected.registry.handlers()
        assert handler.middleware == (outer, inner)

    def test_two_buses_may_include_one_router(self) -> None:
        router, one, two = Router(), Router(), Router()
        router.handler(quote)
        one.include(router)
        two.include(router)

        assert names(one) == names(two) == ["Quote"]

    def test_a_taken_type_is_refused_and_nothing_is_taken_over(self) -> None:
        router, bus = Router(), Router()
        router.handler(other)
        router.handler(quote)
        router.middleware(side="outbound")(outgoing)
        bus.handler(quote)

        with pytest.raises(RegistrationError, match="both handle Quote"):
            bus.include(router)

        assert names(bus) == ["Quote"]
        assert bus._collected.outbound == []
        router.handler(tick)

    def test_including_a_router_twice_is_refused(self) -> None:
        router, bus = Router(), Router()
        router.handler(tick)
        bus.include(router)

        with pytest.raises(RegistrationError, match="registered already for Ticked"):
            bus.include(router)

    def test_a_router_takes_nothing_more_once_it_is_included(self) -> None:
        router, bus = Router(), Router()
        bus.include(router)

        for register in (router.handler, router.middleware):
            with pytest.raises(RegistrationError, match="included already; register first, then include"):
                register(quote)
        with pytest.raises(RegistrationError, match="included already"):
            router.include(Router())

    @pytest.mark.parametrize("what", [3, quote, None])
    def test_only_routers_can_be_included(self, what: Any) -> None:
        with pytest.raises(RegistrationError, match="include takes another Router"):
            Router().include(what)

    def test_a_router_cannot_include_itself(self) -> None:
        router = Router()
        with pytest.raises(RegistrationError, match="include takes another Router"):
            router.include(router)


async def tick(event: Ticked) -> None: ...
