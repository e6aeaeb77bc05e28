"""The answer of a write is its acknowledgement: what is committed, and when, decides about the
cache. On real servers."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Response
from sqlalchemy import String, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from respcache import Cache, RedisStore, SingleTenant, UndeclaredRead, cache_list, invalidate_cache
from respcache.context import Exchange, current
from respcache.core.serving_lease import Ack, Outcome
from respcache.writes.sqlalchemy import watch

pytestmark = pytest.mark.anyio
TENANT = "public"


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(20), default=TENANT)
    name: Mapped[str] = mapped_column(default="x")


class Secret(Base):
    __tablename__ = "secrets"
    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(20), default=TENANT)


class World:
    """An application over one database and one Valkey, with a client and the moments that tests
    look at."""

    def __init__(self, engine: AsyncEngine, cache: Cache) -> None:
        self.engine, self.cache = engine, cache
        self.app = FastAPI()
        self.wrapped = cache.wrap(self.app)
        self.http = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(self.wrapped, raise_app_exceptions=False),
            base_url="http://test",
        )
        self.calls = 0

        @self.app.get("/things")
        @cache_list("things", tables=["things"])
        async def list_things() -> list[str]:
            self.calls += 1
            async with AsyncSession(engine) as session:
                return list(await session.scalars(select(Thing.name).order_by(Thing.id)))

    async def names(self) -> list[str]:
        names: list[str] = (await self.http.get("/things")).json()
        return names

    async def warm(self) -> None:
        await self.names()
        assert "hit" in (await self.http.get("/things")).headers["cache-status"]


@pytest.fixture
async def world(empty_database_url: str, valkey_url: str) -> AsyncIterator[World]:
    engine = create_async_engine(empty_database_url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Thing), [{"id": 1, "tenant_id": TENANT}])
    cache = Cache(
        RedisStore(valkey_url, deadline_s=1), secret=b"k" * 32, resolver=SingleTenant(TENANT)
    )
    watching = watch(engine, cache, metadata=Base.metadata)
    await cache.connect()
    made = World(engine, cache)
    yield made
    await made.http.aclose()
    await cache.close()
    watching.close()
    await engine.dispose()


async def rename(session: AsyncSession, name: str) -> None:
    await session.execute(update(Thing).where(Thing.tenant_id == TENANT).values(name=name))


@pytest.mark.parametrize("status", [200, 204, 302, 404, 422, 500])
async def test_a_committed_change_invalidates_whatever_the_answer(
    world: World, status: int
) -> None:
    """The status says nothing about what was committed."""

    @world.app.post("/change")
    async def change() -> Response:
        async with AsyncSession(world.engine) as session, session.begin():
            await rename(session, "new")
        return Response(status_code=status)

    await world.warm()
    assert (await world.http.post("/change")).status_code == status
    assert await world.names() == ["new"]


async def test_an_error_after_the_commit_invalidates(world: World) -> None:
    """The handler raises; the change is there all the same."""

    @world.app.post("/change")
    async def change() -> None:
        async with AsyncSession(world.engine) as session, session.begin():
            await rename(session, "new")
        raise RuntimeError("after the commit")

    await world.warm()
    assert (await world.http.post("/change")).status_code == 500
    assert await world.names() == ["new"]


async def test_a_rollback_does_not_invalidate(world: World) -> None:
    """Nothing changed, so the entry stays."""

    @world.app.post("/change")
    async def change() -> None:
        async with AsyncSession(world.engine) as session:
            await rename(session, "never")
            await session.rollback()

    await world.warm()
    await world.http.post("/change")
    assert "hit" in (await world.http.get("/things")).headers["cache-status"]


async def test_the_answer_waits_for_a_commit_in_a_yield_dependency(world: World) -> None:
    """FastAPI closes such dependencies after it has sent the answer; the wrapper holds the answer
    until then."""
    order: list[str] = []

    async def session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(world.engine) as opened:
            yield opened
            await opened.commit()
            order.append("committed")

    @world.app.post("/change")
    async def change(opened: Annotated[AsyncSession, Depends(session)]) -> str:
        await rename(opened, "new")
        return "done"

    async def send(message: Any) -> None:
        order.append(message["type"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    await world.warm()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/change",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    await world.wrapped(scope, receive, send)
    assert order == ["committed", "http.response.start", "http.response.body"]
    assert await world.names() == ["new"]


async def test_an_answer_too_large_to_be_held_is_a_clear_error(world: World) -> None:
    """The buffer is bounded; the message says what to do, and nothing was committed."""

    async def session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(world.engine) as opened:
            yield opened
            await opened.commit()

    @world.app.post("/change")
    async def change(opened: Annotated[AsyncSession, Depends(session)]) -> Response:
        await rename(opened, "new")
        return Response(b"x" * 5_000_000)

    answer = await world.http.post("/change")
    assert answer.status_code == 500
    assert "commit before responding" in answer.json()["message"]


async def test_a_get_that_writes_is_neither_stored_nor_shared(world: World) -> None:
    """It invalidates like any write, its followers run their own handlers, and it is counted."""
    calls = 0

    @world.app.get("/visits")
    @cache_list("visits", tables=["things"])
    async def visit() -> int:
        nonlocal calls
        number = calls = calls + 1
        async with AsyncSession(world.engine) as session, session.begin():
            await rename(session, f"visit {number}")
        return number

    await world.warm()
    answers = await asyncio.gather(*(world.http.get("/visits") for _ in range(3)))
    assert sorted(answer.json() for answer in answers) == [1, 2, 3]
    assert await world.names() == ["visit 3"]
    assert world.cache.counters.of(TENANT, "visits").refusals["wrote"] == 1
    assert world.cache.counters.of(TENANT, "visits").stores == 0


async def test_a_get_that_writes_in_a_yield_dependency_is_held_and_not_stored(world: World) -> None:
    """The change is seen when the statement is sent, long before its commit."""

    async def session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(world.engine) as opened:
            yield opened
            await opened.commit()

    @world.app.get("/visits")
    @cache_list("visits", tables=["things"])
    async def visit(opened: Annotated[AsyncSession, Depends(session)]) -> str:
        await rename(opened, "visited")
        return "x"

    await world.warm()
    assert (await world.http.get("/visits")).headers[
        "cache-status"
    ] == "respcache; fwd=uri-miss; detail=wrote"
    assert await world.names() == ["visited"]


async def test_an_undeclared_table_is_not_stored_and_counted(world: World) -> None:
    """The declaration names things only; in tests it is an error."""

    @world.app.get("/secrets")
    @cache_list("secrets", tables=["things"])
    async def secrets() -> int:
        async with AsyncSession(world.engine) as session:
            return await session.scalar(select(func.count()).select_from(Secret)) or 0

    for _ in range(2):
        answer = await world.http.get("/secrets")
        assert (answer.json(), answer.headers["cache-status"]) == (
            0,
            "respcache; fwd=uri-miss; detail=undeclared-table",
        )
    assert world.cache.counters.of(TENANT, "secrets").refusals["undeclared-table"] == 2
    world.cache.options = dataclasses.replace(world.cache.options, strict_reads=True)
    strict = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(world.wrapped), base_url="http://test"
    )
    with pytest.raises(UndeclaredRead, match=r"/secrets reads secrets"):
        await strict.get("/secrets")
    await strict.aclose()


async def test_undeclared_text_is_not_stored(world: World) -> None:
    """A view is no known table."""

    @world.app.get("/raw")
    @cache_list("raw", tables=["things"])
    async def raw() -> int:
        async with AsyncSession(world.engine) as session:
            return await session.scalar(text("SELECT count(*) FROM pg_views")) or 0

    await world.http.get("/raw")
    assert (await world.http.get("/raw")).headers[
        "cache-status"
    ] == "respcache; fwd=uri-miss; detail=undeclared-sql"


async def test_a_background_task_invalidates_after_the_answer(world: World) -> None:
    """There is nothing left to hold: ``settled`` tells when its bump is confirmed."""

    async def later() -> None:
        async with AsyncSession(world.engine) as session, session.begin():
            await rename(session, "later")

    @world.app.post("/change")
    async def change(tasks: BackgroundTasks) -> str:
        tasks.add_task(later)
        return "accepted"

    await world.warm()
    await world.http.post("/change")
    await world.cache.settled()
    assert await world.names() == ["later"]


async def test_a_script_without_a_request_invalidates(world: World) -> None:
    """Workers and imports share the engine hooks; they await ``settled``."""
    await world.warm()
    assert current.get() is None
    async with AsyncSession(world.engine) as session, session.begin():
        session.add(Thing(id=2, name="second"))
    await world.cache.settled()
    assert await world.names() == ["x", "second"]


async def test_a_handler_without_hooks_declares_what_it_changes(world: World) -> None:
    """Whatever it writes to, its answer waits for the confirmation."""

    @world.app.post("/elsewhere")
    @invalidate_cache("things")
    async def change() -> Response:
        return Response(status_code=500)

    await world.warm()
    await world.http.post("/elsewhere")
    assert "fwd=stale" in (await world.http.get("/things")).headers["cache-status"]


async def test_a_value_made_in_an_old_snapshot_is_not_cached(world: World) -> None:
    """A session under REPEATABLE READ that began before ``get_or_set`` reads the past."""
    engine = world.engine.execution_options(isolation_level="REPEATABLE READ")
    token = current.set(Exchange())
    try:
        async with AsyncSession(engine) as session:
            await session.connection()

            async def read() -> list[str]:
                return list(await session.scalars(select(Thing.name)))

            assert await world.cache.get_or_set(TENANT, "things", {}, read, tables=["things"]) == [
                "x"
            ]
    finally:
        current.reset(token)
    assert world.cache.counters.of(TENANT, "things").stores == 0


async def test_a_slow_read_in_one_process_overtaken_by_a_write_in_another_is_never_served(
    world: World, valkey_url: str
) -> None:
    """Two caches on one Valkey: one fills slowly, the other writes."""
    entered, go = asyncio.Event(), asyncio.Event()

    @world.app.get("/slow")
    @cache_list("slow", tables=["things"])
    async def slow() -> list[str]:
        async with AsyncSession(world.engine) as session:
            names = list(await session.scalars(select(Thing.name)))
        entered.set()
        await go.wait()
        return names

    other = Cache(
        RedisStore(valkey_url, deadline_s=1), secret=b"k" * 32, resolver=SingleTenant(TENANT)
    )
    elsewhere = create_async_engine(world.engine.url)
    watching = watch(elsewhere, other, metadata=Base.metadata)
    await other.connect()
    try:
        filling = asyncio.create_task(world.http.get("/slow"))
        await entered.wait()
        async with AsyncSession(elsewhere) as session, session.begin():
            await rename(session, "new")
        await other.settled()
        go.set()
        assert (await filling).json() == ["x"]
        after = await world.http.get("/slow")
        assert (after.json(), "fwd=stale" in after.headers["cache-status"]) == (["new"], True)
    finally:
        await other.close()
        watching.close()
        await elsewhere.dispose()


async def test_a_request_that_is_cancelled_while_its_answer_waits_takes_no_bump_along(
    world: World,
) -> None:
    """Not even in the moment of the COMMIT, when nothing of the bump has been sent yet."""

    @world.app.post("/change")
    async def change() -> None:
        async with AsyncSession(world.engine) as session:
            async with session.begin():
                await rename(session, "new")
            request = asyncio.current_task()
            assert request is not None
            request.cancel()
            record = current.get()
            assert record is not None
            await record.settle()

    await world.warm()
    changing = asyncio.create_task(world.http.post("/change"))
    await asyncio.wait([changing])
    assert changing.cancelled()
    await world.cache.settled()
    assert await world.names() == ["new"]


async def test_two_who_settle_at_once_wait_for_the_same_bumps() -> None:
    """A child task that settles first does not let the answer out before."""
    sent = asyncio.get_running_loop().create_future()
    record = Exchange(bumps=[sent])
    both = [asyncio.create_task(record.settle()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(settling.done() for settling in both)
    sent.set_result(Ack(Outcome.PENDING))
    await asyncio.gather(*both)
    assert (record.bumps, record.outcome) == ([], Outcome.PENDING)


async def test_a_value_holds_what_its_request_has_written_before(world: World) -> None:
    """The answer of the write, made of it, is no older than the write."""

    async def read() -> list[str]:
        async with AsyncSession(world.engine) as session:
            return list(await session.scalars(select(Thing.name)))

    async def value() -> list[str]:
        return await world.cache.get_or_set(TENANT, "things", {}, read, tables=["things"])

    @world.app.post("/change")
    async def change() -> list[str]:
        async with AsyncSession(world.engine) as session:
            async with session.begin():
                await rename(session, "new")
            return await value()

    assert [await value(), await value()] == [["x"], ["x"]]
    assert (await world.http.post("/change")).json() == ["new"]


async def test_a_value_made_of_uncommitted_rows_is_not_cached(world: World) -> None:
    """They may be rolled back, which invalidates nothing."""

    async def value(session: AsyncSession) -> list[str]:
        async def read() -> list[str]:
            return list(await session.scalars(select(Thing.name)))

        return await world.cache.get_or_set(TENANT, "things", {}, read, tables=["things"])

    @world.app.post("/change")
    async def change() -> list[str]:
        async with AsyncSession(world.engine) as session:
            await rename(session, "uncommitted")
            seen = await value(session)
            await session.rollback()
        return seen

    assert (await world.http.post("/change")).json() == ["uncommitted"]
    async with AsyncSession(world.engine) as session:
        assert await value(session) == ["x"]


@pytest.mark.parametrize(
    ("module", "reason"), [("settings", "detail=other-module"), ("things", "stored")]
)
async def test_an_answer_made_of_a_value_that_only_its_module_invalidates_is_of_that_module(
    world: World, module: str, reason: str
) -> None:
    """Also where another value, in between, was made of it."""
    kept = ["old"]

    async def read() -> str:
        return kept[0]

    async def value() -> str:
        return await world.cache.get_or_set(TENANT, module, {}, read)

    @world.app.get("/made")
    @cache_list("things", tables=["things"])
    async def made() -> str:
        return await world.cache.get_or_set(TENANT, "things", {}, value, tables=["things"])

    @world.app.post("/set")
    @invalidate_cache(module)
    async def change() -> None:
        kept[0] = "new"

    assert reason in (await world.http.get("/made")).headers["cache-status"]
    await world.http.post("/set")
    assert (await world.http.get("/made")).json() == "new"


async def test_a_value_made_of_a_value_of_another_tenant_is_not_cached(world: World) -> None:
    """Whoever's request it is in: what invalidates the one does not reach the other."""
    kept = ["old"]

    async def read() -> str:
        return kept[0]

    async def ours() -> str:
        return await world.cache.get_or_set(TENANT, "things", {}, read)

    @world.app.get("/theirs")
    @cache_list("things")
    async def theirs() -> str:
        return await world.cache.get_or_set("another", "things", {}, ours)

    @world.app.get("/things-of-things")
    @cache_list("things")
    async def made() -> str:
        return await world.cache.get_or_set(TENANT, "things", {"of": "things"}, ours)

    @world.app.post("/set")
    @invalidate_cache("things")
    async def change() -> None:
        kept[0] = "new"

    paths = ("/theirs", "/things-of-things")
    assert [(await world.http.get(path)).json() for path in paths] == ["old", "old"]
    assert "hit" in (await world.http.get("/things-of-things")).headers["cache-status"]
    await world.http.post("/set")
    assert [(await world.http.get(path)).json() for path in paths] == ["new", "new"]


async def test_values_made_of_each_other_outside_of_requests_are_cached(world: World) -> None:
    """A script's, a background task's: they are of one tenant."""
    made: list[str] = []

    async def read() -> str:
        made.append("inner")
        return "x"

    async def between() -> str:
        made.append("outer")
        return await world.cache.get_or_set(TENANT, "things", {}, read)

    values = [
        await world.cache.get_or_set(TENANT, "things", {"of": "things"}, between) for _ in range(2)
    ]
    assert (values, made) == (["x", "x"], ["outer", "inner"])
