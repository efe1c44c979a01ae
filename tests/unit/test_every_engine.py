"""What is promised holds on every connection that a session uses, whoever made its engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import URL, insert, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    put_db_session_to_context,
    retry_on_transient_error,
)
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import app_of, call
from tests.helpers.cancelling import cancel_at
from tests.helpers.database import Database
from tests.helpers.failures import ConflictError
from tests.helpers.models import Base, Item, Seat
from tests.helpers.proxy import Call, Fault, proxy

ITEM, SEAT = Base.metadata.tables["item"], Base.metadata.tables["seat"]
DRIVERS_ERRORS = (DBAPIError, asyncpg.PostgresError, psycopg.Error)

Work = Callable[[], Any]
MakeConnect = Callable[[URL, AsyncEngine], DBConnect]


# How a session comes to an engine that no connect has made: for items, at least. The first argument
# is what the connect makes an engine for, the second is the other engine.


def get_bind_of_a_session(url: URL, other: AsyncEngine) -> DBConnect:
    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            clause = options.get("clause")
            of_seats = (mapper is not None and mapper.class_ is Seat) or (
                clause is not None and getattr(clause, "table", None) is SEAT
            )
            return super().get_bind(mapper, **options) if of_seats else other.sync_engine

    return DBConnect.from_url(url, session_options={"sync_session_class": RoutingSession})


def binds_of_a_session(url: URL, other: AsyncEngine) -> DBConnect:
    return DBConnect.from_url(url, session_options={"binds": {Item: other, ITEM: other}})


def a_sessionmaker_bound_elsewhere(url: URL, other: AsyncEngine) -> DBConnect:
    return DBConnect(
        lambda _: create_async_engine(url),
        lambda _: async_sessionmaker(other, expire_on_commit=False),
        host="that of the URL",
    )


def a_sessionmaker_bound_to_a_copy(url: URL, other: AsyncEngine) -> DBConnect:
    return a_sessionmaker_bound_elsewhere(url, other.execution_options(a=1))


WAYS = [
    get_bind_of_a_session,
    binds_of_a_session,
    a_sessionmaker_bound_elsewhere,
    a_sessionmaker_bound_to_a_copy,
]


@pytest.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
def url(request: pytest.FixtureRequest, database_url: URL, tmp_path: Path) -> URL:
    """Return the URL of a database with each driver."""
    if request.param == "aiosqlite":
        return URL.create("sqlite+aiosqlite", database=str(tmp_path / "test.db"))
    return database_url.set(drivername=f"postgresql+{request.param}")


@pytest_asyncio.fixture
async def other(url: URL, database: Database) -> AsyncGenerator[AsyncEngine]:
    """Return an engine of somebody else's, whose connections must all come home."""
    engine = create_async_engine(url)
    if url.drivername == "sqlite+aiosqlite":
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.tables["item"].create)
    yield engine
    pool: Any = engine.pool
    assert pool.checkedout() == 0
    await database.is_quiet()
    await engine.dispose()


async def names(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list(await connection.scalars(select(Item.name).order_by(Item.id)))


async def fail(session: AsyncSession, is_at_the_driver: bool, **elsewhere: Any) -> None:
    """Run a statement that ends the transaction, or ruins it."""
    # A copy: SQLAlchemy takes the engine out of what it is given.
    arguments: Any = elsewhere["bind_arguments"].copy()
    connection = await session.connection(bind_arguments=arguments)
    how = "OR ROLLBACK " if connection.dialect.name == "sqlite" else ""
    statement = f"INSERT {how}INTO item (name) VALUES ('twice'), ('twice')"
    if is_at_the_driver:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await raw.execute(statement)
    else:
        await session.execute(text(statement), **elsewhere)


ITEMS: dict[str, Any] = {"bind_arguments": {"mapper": Item.__mapper__}}


@pytest.fixture(params=[False, True])
def is_at_the_driver(request: pytest.FixtureRequest, url: URL) -> bool:
    """Say whether a statement is run at the driver, where that can tell what came of it."""
    # aiosqlite cannot: these engines begin without a savepoint of ours.
    return bool(request.param) and url.drivername != "sqlite+aiosqlite"


@pytest.mark.parametrize("make", WAYS)
async def test_a_failure_that_is_swallowed_is_no_success(
    url: URL, other: AsyncEngine, make: MakeConnect, is_at_the_driver: bool
) -> None:
    async with make(url, other) as connect:

        async def handler(_: Scope) -> int:
            session = await db_session(connect)
            await session.execute(insert(Item).values(name="a"))
            with suppress(*DRIVERS_ERRORS):
                await fail(session, is_at_the_driver, **ITEMS)
            return 201

        with pytest.raises(PendingRollbackError):
            await call(app_of(handler))
        assert await names(other) == []


@pytest.mark.parametrize("is_bound", [True, False])
async def test_a_failure_in_a_session_that_somebody_has_put_is_no_success(
    url: URL, other: AsyncEngine, is_at_the_driver: bool, is_bound: bool
) -> None:
    async with DBConnect.from_url(url) as connect:

        async def handler(_: Scope) -> int:
            session = AsyncSession(other) if is_bound else AsyncSession(binds={Item: other})
            await session.execute(insert(Item).values(name="a"))
            put_db_session_to_context(connect, session)
            assert await db_session(connect) is session
            with suppress(*DRIVERS_ERRORS):
                await fail(session, is_at_the_driver, **ITEMS)
            return 201

        with pytest.raises(PendingRollbackError):
            await call(app_of(handler))
        assert await names(other) == []


async def test_a_failure_on_an_engine_that_a_statement_has_named_is_no_success(
    url: URL, other: AsyncEngine, is_at_the_driver: bool
) -> None:
    if url.get_backend_name() == "sqlite":
        pytest.skip("its error is noted only from the second transaction on, as the page says")
    elsewhere: dict[str, Any] = {"bind_arguments": {"bind": other.sync_engine}}
    async with DBConnect.from_url(url) as connect:

        async def handler(_: Scope) -> int:
            session = await db_session(connect)
            await session.execute(text("INSERT INTO item (name) VALUES ('a')"), **elsewhere)
            with suppress(*DRIVERS_ERRORS):
                await fail(session, is_at_the_driver, **elsewhere)
            return 201

        with pytest.raises(PendingRollbackError):
            await call(app_of(handler))
        assert await names(other) == []


@pytest.mark.parametrize("make", WAYS)
async def test_what_is_right_is_committed(url: URL, other: AsyncEngine, make: MakeConnect) -> None:
    async with make(url, other) as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            session.add(Item(name="a"))
            with suppress(DBAPIError):
                async with session.begin_nested():
                    await session.execute(
                        insert(Item).values([{"name": "twice"}, {"name": "twice"}])
                    )
            await session.execute(insert(Item).values(name="b"))
        assert await names(other) == ["a", "b"]


async def commit_at_the_end(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        await write_on_both_engines(connect)


async def commit_by_hand(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        await write_on_both_engines(connect)
        await commit_db_session(connect)


async def commit_outside_of_a_context(connect: DBConnect) -> None:
    async with new_non_ctx_atomic_session(connect) as session:
        await session.execute(insert(Item).values(name="a"))
        session.add(Seat(number=1))


@asynccontextmanager
async def aclosing_engine(engine: AsyncEngine) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await engine.dispose()


async def write_on_both_engines(connect: DBConnect) -> None:
    session = await db_session(connect)
    assert (await session.scalars(select(Item))).all() == []
    session.add_all([Item(name="a"), Seat(number=1)])


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("work", [commit_at_the_end, commit_by_hand, commit_outside_of_a_context])
async def test_a_cancellation_does_not_commit_one_engine_of_a_session_without_the_other(
    database_url: URL, database: Database, driver: str, work: Any, kind: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    other = create_async_engine(url)
    async with get_bind_of_a_session(url, other) as connect, aclosing_engine(other):
        outcomes = await outcomes_of_cancelling(partial(work, connect), kind, database)
    assert outcomes == {(0, 0), (1, 1)}


async def test_nor_one_that_a_statement_has_named_without_that_of_the_session(
    database_url: URL, database: Database
) -> None:
    other = create_async_engine(database_url)

    async def work() -> None:
        async with new_db_session_ctx():
            session = await db_session(connect)
            elsewhere = {"bind": other.sync_engine}
            await session.execute(insert(ITEM).values(name="a"), bind_arguments=elsewhere)
            session.add(Seat(number=1))

    async with DBConnect.from_url(database_url) as connect, aclosing_engine(other):
        outcomes = await outcomes_of_cancelling(work, "asyncio", database)
    assert outcomes == {(0, 0), (1, 1)}


async def outcomes_of_cancelling(work: Work, kind: str, database: Database) -> set[tuple[int, int]]:
    """Cancel work at each of its suspensions; return how many items and seats there were."""
    outcomes, number, suspensions = set(), 0, 0
    while number <= suspensions:
        number += 1
        await database.empty()
        await work()  # what was cancelled before has cost connections
        await database.empty()
        suspensions = await cancel_at(number, work(), kind, pause=0.01)
        await database.is_quiet()
        outcomes.add((len(await database.names()), len(await database.seats())))
    return outcomes


# Nothing that is partly committed is repeated.


async def run_in_a_request(work: Work) -> None:
    async def handler(_: Scope) -> int:
        await work()
        return 201

    await call(app_of(handler, attempts=3))


async def run_with_retries(work: Work) -> None:
    await retry_on_transient_error(attempts=3, wait_initial=0.001, wait_jitter=0)(work)()


every_repetition = pytest.mark.parametrize("repeat", [run_in_a_request, run_with_retries])


@pytest.mark.usefixtures("no_pauses")
@every_repetition
@pytest.mark.parametrize("make", WAYS)
async def test_what_was_committed_elsewhere_is_not_repeated(
    url: URL, other: AsyncEngine, make: MakeConnect, repeat: Any
) -> None:
    runs = 0
    async with make(url, other) as connect:

        async def work() -> None:
            nonlocal runs
            runs += 1
            session = await db_session(connect)
            session.add(Item(name=f"run {runs}"))
            await session.commit()
            raise ConflictError

        with pytest.raises(ConflictError) as caught:
            await repeat(work)
        assert "had been committed" in caught.value.__notes__[0]
        assert await names(other) == ["run 1"]


@pytest.mark.usefixtures("no_pauses")
@every_repetition
@pytest.mark.parametrize("make", WAYS)
async def test_what_was_not_committed_elsewhere_is_repeated(
    url: URL, other: AsyncEngine, make: MakeConnect, repeat: Any
) -> None:
    runs = 0
    async with make(url, other) as connect:

        async def work() -> None:
            nonlocal runs
            runs += 1
            session = await db_session(connect)
            session.add(Item(name=f"run {runs}"))
            await session.flush()
            if runs == 1:
                raise ConflictError

        await repeat(work)
        assert await names(other) == ["run 2"]


@asynccontextmanager
async def failing_at_the_second_commit(url: URL) -> AsyncGenerator[URL]:
    """Put a proxy in front of a server, which says that the second COMMIT has lost a race."""
    commits = 0

    async def fail(call: Call) -> Fault | None:
        nonlocal commits
        commits += call.statement.startswith("COMMIT")
        return Fault.ERROR if commits == 2 and call.statement.startswith("COMMIT") else None

    assert url.host is not None
    assert url.port is not None
    async with proxy(url.host, url.port, fail) as port:
        yield url.set(host="127.0.0.1", port=port)


def two_engines_by_get_bind(url: URL, other: AsyncEngine) -> tuple[DBConnect, Any, Any]:
    return get_bind_of_a_session(url, other), {}, {}


def two_engines_by_binds(url: URL, other: AsyncEngine) -> tuple[DBConnect, Any, Any]:
    return binds_of_a_session(url, other), {}, {}


def two_engines_by_name(url: URL, other: AsyncEngine) -> tuple[DBConnect, Any, Any]:
    return DBConnect.from_url(url), {"bind_arguments": {"bind": other.sync_engine}}, {}


def two_engines_of_its_own(url: URL, other: AsyncEngine) -> tuple[DBConnect, Any, Any]:
    third = create_async_engine(url)
    items = {"bind_arguments": {"bind": other.sync_engine}}
    return DBConnect.from_url(url), items, {"bind_arguments": {"bind": third.sync_engine}}


@pytest.mark.usefixtures("no_pauses")
@every_repetition
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(
    "make",
    [two_engines_by_get_bind, two_engines_by_binds, two_engines_by_name, two_engines_of_its_own],
)
async def test_a_session_of_which_one_engine_was_committed_is_not_repeated(
    database_url: URL, database: Database, driver: str, make: Any, repeat: Any
) -> None:
    runs = 0
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with failing_at_the_second_commit(url) as failing:
        other = create_async_engine(failing)
        connect, for_items, for_seats = make(failing, other)

        async def work() -> None:
            nonlocal runs
            runs += 1
            session = await db_session(connect)
            # A Table, not a model: its engine is that of the mapper, whatever is named.
            await session.execute(insert(ITEM).values(name=f"run {runs}"), **for_items)
            await session.execute(insert(SEAT).values(number=runs), **for_seats)

        with pytest.raises(DBAPIError, match="injected") as caught:
            await repeat(work)
        await connect.close()
        await other.dispose()
        for arguments in (for_items, for_seats):
            if arguments:
                await AsyncEngine(arguments["bind_arguments"]["bind"]).dispose()
    assert any("Not tried again" in note for note in caught.value.__notes__)
    assert runs == 1
    # Nobody knows the order in which a session commits its connections.
    assert (await database.names(), await database.seats()) in [(["run 1"], []), ([], [1])]


@pytest.mark.usefixtures("no_pauses")
@every_repetition
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_session_that_was_put_and_is_committed_is_not_repeated(
    database_url: URL, database: Database, driver: str, repeat: Any
) -> None:
    runs = 0
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with failing_at_the_second_commit(url) as failing:
        first, second = DBConnect.from_url(failing), DBConnect.from_url(failing)
        engine = create_async_engine(failing)

        async def work() -> None:
            nonlocal runs
            runs += 1
            put_db_session_to_context(first, AsyncSession(engine))
            for connect, model in (first, Item), (second, Seat):
                values = {"name": f"run {runs}"} if model is Item else {"number": runs}
                await (await db_session(connect)).execute(insert(model).values(**values))

        with pytest.raises(DBAPIError, match="injected") as caught:
            await repeat(work)
        for close in (first.close, second.close, partial(engine.dispose)):
            await close()
    assert any("Not tried again" in note for note in caught.value.__notes__)
    assert runs == 1
    assert await database.names() == ["run 1"]
    assert await database.seats() == []
