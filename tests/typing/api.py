"""The public API as type checkers see it. This file is never run: mypy and pyright, both strict, must accept it.

A line that must be an error carries the ignore comments of both checkers; they report an ignore that is not needed, so
a mistake that is no longer found fails the check like a mistake in the file.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Annotated, Any, Generic, NoReturn, TypeVar, assert_never, assert_type

import msgspec

from catga_bus import (
    BlockingBus,
    BlockingContext,
    BreakerChange,
    BreakerOptions,
    BreakerState,
    Bulkhead,
    Bus,
    CallError,
    CallNext,
    ChangeKind,
    Check,
    CheckStatus,
    Command,
    Context,
    Depends,
    Err,
    Event,
    Fence,
    Health,
    NodeInfo,
    NodeStatus,
    Ok,
    Outcome,
    Outgoing,
    RateLimiter,
    Request,
    Result,
    RetryOptions,
    Router,
    Stored,
    Transaction,
)

T = TypeVar("T")


class Price(msgspec.Struct):
    cents: int


class Receipt(msgspec.Struct, frozen=True):
    id: str


class Quote(Request[Price]):
    sku: str
    count: int = 1


class FrozenQuote(Request[Price], frozen=True):
    sku: str


class SlowQuote(Quote, idempotent=False, partition_by="sku"):
    patience: float = 1.0


class Page(Request[list[T]], Generic[T]):
    number: int


class Prices(Page[Price]):
    newest: bool = False


class FrozenPage(Request[T], Generic[T], frozen=True):
    number: int


class FrozenPrices(FrozenPage[tuple[Price, ...]], frozen=True):
    newest: bool = False


class Debit(Command[Receipt], partition_by="account", kw_only=True):
    account: str
    cents: int


class Forget(Command[None], type_name="bank.Forget"):
    account: str


class Debited(Event, partition_by="account"):
    account: str
    cents: int


class Ticked(Event, durable=False, frozen=True):
    n: int


bus = Bus("billing", url="nats://127.0.0.1:4222", send_timeout=2.0)
router = Router()


async def send_infers_the_reply() -> None:
    assert_type(await bus.send(Quote("a")), Ok[Price] | Err)
    assert_type(await bus.send(FrozenQuote("a"), timeout=1.0, node="billing-1"), Ok[Price] | Err)
    assert_type(await bus.send(SlowQuote("a", 2, 3.0)), Ok[Price] | Err)
    assert_type(await bus.send(Prices(3, newest=True)), Ok[list[Price]] | Err)
    assert_type(await bus.send(FrozenPrices(3)), Ok[tuple[Price, ...]] | Err)
    assert_type(await bus.send(Page[int](3)), Ok[list[int]] | Err)
    assert_type(await bus.send(Debit(account="a", cents=3)), Ok[Receipt] | Err)
    assert_type(await bus.send(Forget("a")), Ok[None] | Err)


async def nodes_are_known() -> None:
    assert_type(bus.node, NodeInfo)
    assert_type(bus.nodes(), list[NodeInfo])
    assert_type(bus.nodes("billing", "online")[0].status, NodeStatus)
    assert_type(bus.nodes(status=NodeStatus.FAULTED)[0].zone, str | None)
    async for change in bus.watch_nodes(max_pending=10):
        assert_type(change.kind, ChangeKind)
        assert_type(change.node, NodeInfo | None)
        assert_type(change.missed, int)
    assert_type(bus.statistics().nodes.deaths, int)


async def breakers_tell_what_changes() -> None:
    async for change in bus.watch_breakers(max_pending=10):
        assert_type(change, BreakerChange)
        assert_type(change.after, BreakerState)
        assert_type(change.node, str | None)
        assert_type(change.missed, int)
    assert_type(bus.statistics().calls.held_back, int)


async def requests_go_where_they_fit() -> None:
    assert_type(await bus.send(Quote("a"), where=lambda node: node.zone == "eu-1"), Ok[Price] | Err)
    await bus.send(Quote("a"), where="eu-1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def send_through_variables(request: Request[T], command: Command[T], pick: Callable[[], Request[Price]]) -> T:
    assert_type(await bus.send(pick()), Ok[Price] | Err)
    assert_type((await bus.send(command)).unwrap(), T)
    return (await bus.send(request)).unwrap()


async def a_request_of_a_subclass_serves_for_the_class(sale: "Request[SalePrice]") -> Request[Price]:
    return sale


class SalePrice(Price):
    was: int


async def results_are_taken_apart() -> Price:
    result = await bus.send(Quote("a"))
    assert_type(result.unwrap(), Price)
    if result.is_ok is True:
        assert_type(result, Ok[Price])
    else:
        assert_type(result, Err)
    if isinstance(result, Err):
        assert_type(result.error(), CallError)
        assert_type(result.outcome, Outcome)
        assert_type(result.unwrap, Callable[[], NoReturn])
        result.unwrap()
    assert_type(result, Ok[Price])
    return result.value


async def a_match_is_exhaustive() -> int:
    result = await bus.send(Quote("a"))
    match result:
        case Ok(price):
            assert_type(price, Price)
            return price.cents
        case Err("OUT_OF_STOCK", message):
            assert_type(message, str)
            return 0
        case Err() as refused:
            assert_type(refused, Err)
            return -1
        case _:
            assert_never(result)


async def a_match_that_forgets_err_is_an_error() -> int:
    result = await bus.send(Quote("a"))
    match result:
        case Ok(price):
            return price.cents
        case _:
            assert_never(result)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def send_takes_requests_and_commands_only() -> None:
    await bus.send(Ticked(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.send("Quote")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.publish(Quote("a"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.broadcast(Price(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.send(Quote("a"), 2.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await bus.send(Quote("a"), timeout="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def events_are_told() -> None:
    calls: list[Callable[[Event], Coroutine[Any, Any, object]]] = [bus.publish, bus.broadcast]
    for call in calls:
        await call(Ticked(1))
        await call(Debited("a", 1))
    assert_type(await bus.publish(Debited("a", 1), key="b", timeout=2.0), Stored | None)


async def commands_are_stored() -> None:
    assert_type(await bus.enqueue(Debit(account="a", cents=1), key=7, delay=1.0), Stored)
    await bus.enqueue(Quote("a"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bus.enqueue(Debit(account="a", cents=1), key=1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def constructors_are_checked(request: Quote, frozen: FrozenQuote) -> None:
    Quote("a", 2)
    Quote(sku="a", count=2)
    Quote(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Quote("a", count="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Quote()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Quote("a", 2, 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Quote("a", colour="red")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Debit("a", 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Prices("three")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(Quote("a").sku, str)
    request.count = 3
    request.count = "3"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    frozen.sku = "b"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class Repo:
    def find(self, sku: str) -> Price | None: ...


def get_repo() -> Repo:
    return Repo()


async def get_session(repo: Annotated[Repo, Depends(get_repo)], ctx: Context) -> AsyncIterator[Repo]:
    assert_type(ctx.message_id, str)
    yield repo


def get_lines() -> Iterator[str]:
    yield "line"


@bus.handler
async def quote(request: Quote) -> Price:
    return Price(1)


@bus.handler(max_attempts=5, concurrency=64, timeout=10.0, retry=RetryOptions(first=1.0, longest=60.0))
async def debit(command: Debit, ctx: Context, repo: Annotated[Repo, Depends(get_session)]) -> Receipt | Err:
    assert_type(repo, Repo)
    if repo.find("a") is None:
        return Err("INSUFFICIENT_FUNDS", "balance too low", {"account": command.account})
    await ctx.publish(Debited(command.account, command.cents))
    await ctx.broadcast(Ticked(1))
    assert_type(await ctx.send(Quote("a"), timeout=1.0), Ok[Price] | Err)
    assert_type(await ctx.send(Forget("a"), node="n"), Ok[None] | Err)
    assert_type(await ctx.send(Quote("a"), where=lambda node: node.zone == "eu-1"), Ok[Price] | Err)
    assert_type(ctx.remaining, float)
    assert_type(ctx.key, str | None)
    assert_type(ctx.attempt, int)
    assert_type(ctx.fence, Fence | None)
    assert_type(await ctx.enqueue(Debit(account="a", cents=1), key="b"), Stored)
    tx = await ctx.transaction()
    assert_type(tx, Transaction)
    assert_type(await tx.execute("insert into debits values (?)", (command.cents,)), int)
    assert_type(await tx.fetch("select 1"), list[tuple[Any, ...]])
    return Receipt(id=ctx.message_id)


@router.handler
def blocking(request: FrozenQuote | Forget, ctx: BlockingContext) -> Ok[Price] | None:
    assert_type(ctx.send(Quote("a")), Ok[Price] | Err)
    assert_type(ctx.send(Debit(account="a", cents=1), timeout=1.0), Ok[Receipt] | Err)
    ctx.publish(Ticked(1))
    ctx.broadcast(Ticked(1))
    assert_type(ctx.enqueue(Debit(account="a", cents=1)), Stored)
    assert_type(ctx.transaction().execute("delete from debits"), int)
    return Ok(Price(1))


@router.handler(concurrency=2)
async def on_tick(event: Ticked, *, line: Annotated[str, Depends(get_lines, use_cache=False)]) -> None:
    assert_type(line, str)


class Desk:
    async def prices(self, request: Prices) -> list[Price]:
        return []


bus.handler(Desk().prices)
Router().handler(timeout=3)(Desk().prices)


async def decorators_keep_the_type_of_the_function() -> None:
    assert_type(await quote(Quote("a")), Price)
    assert_type(blocking(Forget("a"), BlockingContext), Ok[Price] | None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await on_tick(Ticked(1), line="a")
    await quote("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await on_tick(Ticked(1))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def wrong_options_are_found() -> None:
    bus.handler(concurency=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    bus.handler(timeout="3")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    bus.handler(retry=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    bus.handler(64)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    Depends(get_repo())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@bus.middleware
async def audit(message: Any, ctx: Context, call_next: CallNext) -> Result:
    result = await call_next(message)
    assert_type(result, Ok[Any] | Err)
    return result


@router.middleware(side="inbound")
async def narrow(message: object, ctx: Context, call_next: CallNext) -> Ok[Any] | Err:
    return Err("CLOSED") if ctx.remaining < 1.0 else await call_next(message)


@bus.middleware(side="outbound")
async def stamp(message: Any, ctx: Outgoing, call_next: CallNext) -> Result:
    assert_type(ctx.parent, Context | None)
    return await call_next(message)


class Audit:
    async def __call__(self, message: Any, ctx: Context, call_next: CallNext) -> Result:
        return await call_next(message)


assert_type(bus.middleware(Audit()), Audit)
bus.middleware(stamp, side="outbound")
assert_type(bus.middleware(RateLimiter(rate=50.0, only=(Quote, Ticked)), side="outbound"), RateLimiter)
assert_type(router.middleware(Bulkhead(max_running=8, max_waiting=16)), Bulkhead)
BreakerOptions(failure_rate=0.5, open_seconds=2.0)


@bus.handler(
    concurrency=64, middleware=[RateLimiter(rate=100.0, burst=10, max_wait=0.5), Bulkhead(max_running=8), audit]
)
async def limited(request: FrozenQuote) -> Price:
    return Price(1)


async def short(message: Any, call_next: CallNext) -> Result:
    return await call_next(message)


def middleware_of_another_shape_is_found() -> None:
    bus.middleware(short)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    bus.middleware(stamp)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    bus.middleware(side="outbound")(audit)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    bus.middleware(audit, side="outbound")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    bus.handler(middleware=[stamp])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    RateLimiter(100.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RateLimiter(rate="100/s")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Bulkhead(max_waiting=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    BreakerOptions(rate=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def routers_are_included() -> None:
    bus.include(router)
    router.include(Router())
    bus.include(quote)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bus.dependency_overrides[get_repo] = lambda: Repo()


async def a_bus_is_a_context_manager() -> None:
    async with Bus("client") as client:
        assert_type(client, Bus)
        assert_type(await client.send(Quote("a")), Ok[Price] | Err)


def the_blocking_bus_infers_the_same() -> None:
    with BlockingBus("client") as client:
        assert_type(client, BlockingBus)
        assert_type(client.send(Quote("a")), Ok[Price] | Err)
        assert_type(client.send(Prices(1), timeout=1.0, node="n"), Ok[list[Price]] | Err)
        assert_type(client.send(Forget("a")), Ok[None] | Err)
        assert_type(client.send(Quote("a")).unwrap(), Price)
        assert_type(client.send(Quote("a"), where=lambda node: node.is_ready), Ok[Price] | Err)
        assert_type(client.node, NodeInfo)
        assert_type(client.nodes(status="online"), list[NodeInfo])
        client.publish(Ticked(1))
        client.broadcast(Ticked(1))
        client.send(Ticked(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def health_is_a_value() -> None:
    health = bus.health()
    assert_type(health, Health)
    assert_type(health.live, bool)
    assert_type(health.ready, bool)
    for check in health.checks:
        assert_type(check, Check)
        assert_type(check.status, CheckStatus)
        assert_type(check.value, bool | int | float | str | None)
    health.ready = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
