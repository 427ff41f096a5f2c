"""Handlers whose annotations are strings, because of this import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import pytest

from catga_bus.context import BlockingContext, Context
from catga_bus.errors import RegistrationError
from catga_bus.handlers.dependencies import Depends
from catga_bus.handlers.router import Router
from catga_bus.messages import Request
from catga_bus.result import Err, Ok

if TYPE_CHECKING:
    from decimal import Decimal

    from catga_bus.handlers.registry import Handler


class Price(msgspec.Struct):
    cents: int


class Quote(Request[Price]):
    sku: str


def only_handler(router: Router) -> Handler:
    (handler,) = router._collected.registry.handlers()
    return handler


def test_module_level_names_are_found() -> None:
    router = Router()

    @router.handler
    async def quote(request: Quote, ctx: Context) -> Ok[Price] | Err: ...

    assert only_handler(router).message_types == (Quote,)
    assert only_handler(router).takes_context


def test_local_message_classes_are_found_in_the_decorating_frame() -> None:
    router = Router()

    class Local(Request[Price]):
        pass

    class Other(Request[None]):
        pass

    @router.handler(concurrency=2)
    def handle(request: Local | Other, ctx: BlockingContext) -> Price | None: ...

    assert only_handler(router).message_types == (Local, Other)


async def test_local_dependencies_are_found_in_the_decorating_frame() -> None:
    router = Router()

    def settings() -> int:
        return 7

    def repo(value: Annotated[int, Depends(settings)], request: Quote) -> str:
        return f"{request.sku}{value}"

    @router.handler
    async def handle(request: Quote, found: Annotated[str, Depends(repo)]) -> Price:
        return Price(len(found))

    assert await only_handler(router).call(Quote("abc"), None) == Price(4)


async def test_dependencies_are_still_found_after_the_frame_has_gone() -> None:
    def register(router: Router) -> Any:
        def settings() -> int:
            return 7

        def repo(value: Annotated[int, Depends(settings)]) -> int:
            return value

        @router.handler
        async def handle(request: Quote, found: Annotated[int, Depends(repo)]) -> Price:
            return Price(found)

        return settings

    router = Router()
    settings = register(router)
    router.dependency_overrides[settings] = lambda: 8

    assert await only_handler(router).call(Quote("abc"), None) == Price(8)


def test_names_in_the_closure_are_found() -> None:
    router = Router()

    def register(message_class: type[Quote]) -> None:
        async def handle(request: message_class) -> Price:  # type: ignore[valid-type]
            return Price(len(message_class.__name__))

        later(handle)

    def later(handle: Any) -> None:
        router.handler(handle)

    register(Quote)

    assert only_handler(router).message_types == (Quote,)


def test_a_name_for_type_checkers_only_is_no_error_beside_a_default() -> None:
    router = Router()

    @router.handler
    async def handle(request: Quote, limit: Decimal | None = None) -> Price: ...

    assert only_handler(router).call is handle


def test_a_name_for_type_checkers_only_is_an_error_without_a_default() -> None:
    async def handle(request: Quote, limit: Decimal) -> Price: ...

    with pytest.raises(RegistrationError, match="'limit': its annotation 'Decimal' cannot be resolved"):
        Router().handler(handle)


def test_a_dependency_whose_type_is_for_type_checkers_only_is_an_error() -> None:
    async def handle(request: Quote, limit: Annotated[Decimal | None, Depends(len)] = None) -> Price: ...

    with pytest.raises(RegistrationError, match="not under `if TYPE_CHECKING:`"):
        Router().handler(handle)


def test_a_return_type_for_type_checkers_only_is_not_looked_at() -> None:
    router = Router()

    @router.handler
    async def handle(request: Quote) -> Decimal: ...

    assert only_handler(router).message_types == (Quote,)
