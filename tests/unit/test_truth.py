"""What a COMMIT came to is told, whoever saw the statement that failed before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import URL, insert, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    commit_all_sessions,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
)
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import add, app_of, call
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, checked_connect
from tests.helpers.models import Item
from tests.helpers.raw import driver_of, raw_of

Failure = Callable[[AsyncSession, Database], Awaitable[Any]]


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def connect(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[DBConnect]:
    """Return a connect with each driver for PostgreSQL, and check its connections at the end."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    async with checked_connect(url, database) as connect:
        yield connect


async def add_twice(session: AsyncSession, _: Database) -> None:
    await session.execute(insert(Item), [{"name": "twice"}, {"name": "twice"}])


async def read_a_stream(session: AsyncSession, _: Database) -> None:
    rows = await session.stream(text("SELECT 1 / (700 - n) FROM generate_series(1, 1000) AS n"))
    async for __ in rows:
        pass


async def execute_at_the_driver(session: AsyncSession, _: Database) -> None:
    await (await raw_of(session)).execute("SELECT 1 / 0")


async def execute_many_at_the_driver(session: AsyncSession, _: Database) -> None:
    raw, rows = await raw_of(session), [("twice",), ("twice",)]
    if driver_of(session) == "asyncpg":
        await raw.executemany("INSERT INTO item (name) VALUES ($1)", rows)
    else:
        await raw.cursor().executemany("INSERT INTO item (name) VALUES (%s)", rows)


async def copy_at_the_driver(session: AsyncSession, _: Database) -> None:
    raw, rows = await raw_of(session), [("twice",), ("twice",)]
    if driver_of(session) == "asyncpg":
        await raw.copy_records_to_table("item", records=rows, columns=["name"])
    else:
        async with raw.cursor() as cursor, cursor.copy("COPY item (name) FROM STDIN") as copy:
            for row in rows:
                await copy.write_row(row)


async def be_cancelled_at_the_driver(session: AsyncSession, database: Database) -> None:
    raw = await raw_of(session)
    task = asyncio.ensure_future(raw.execute("SELECT pg_sleep(20)"))
    async with asyncio.timeout(30):
        while await database.pid_of("SELECT pg_sleep%") is None:
            await asyncio.sleep(0.001)
    task.cancel()
    await task


AT_THE_DRIVER = [
    execute_at_the_driver,
    execute_many_at_the_driver,
    copy_at_the_driver,
    be_cancelled_at_the_driver,
]
EVERY = [add_twice, read_a_stream, *AT_THE_DRIVER]
swallow = suppress(Exception, asyncio.CancelledError)
every_failure = pytest.mark.parametrize("fail", EVERY)


@every_failure
async def test_a_failure_that_is_swallowed_is_no_success(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    with pytest.raises(PendingRollbackError) as caught:
        async with new_db_session_ctx():
            session = await add(connect, "a")
            with swallow:
                await fail(session, database)
    assert "begin_nested" in str(caught.value)
    assert connections_out(connect) == 0
    assert await database.names() == []
    async with new_db_session_ctx():
        await add(connect, "b")
    assert await database.names() == ["b"]


@pytest.mark.parametrize("fail", [add_twice, copy_at_the_driver])
async def test_a_request_that_swallowed_a_failure_is_answered_with_an_error(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    async def handler(_: Scope) -> int:
        session = await add(connect, "a")
        with swallow:
            await fail(session, database)
        return 201

    with pytest.raises(PendingRollbackError):
        await call(app_of(handler))
    assert await database.names() == []


async def end_an_atomic_block(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_db_session_ctx(), atomic_db_session(connect) as session:
        await work(session, database)


async def end_a_block_outside(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_non_ctx_atomic_session(connect) as session:
        await work(session, database)


async def commit_a_session_outside(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        await work(session, database)
        await session.commit()


async def commit_the_session(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await work(session, database)
        await session.commit()


async def commit_the_connection(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await work(session, database)
        await (await session.connection()).commit()


async def commit_the_database(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_db_session_ctx():
        await work(await db_session(connect), database)
        await commit_db_session(connect)


async def commit_all(connect: DBConnect, work: Failure, database: Database) -> None:
    async with new_db_session_ctx():
        await work(await db_session(connect), database)
        await commit_all_sessions()


@pytest.mark.parametrize(
    "commit",
    [
        end_an_atomic_block,
        end_a_block_outside,
        commit_a_session_outside,
        commit_the_session,
        commit_the_connection,
        commit_the_database,
        commit_all,
    ],
)
@pytest.mark.parametrize("fail", [add_twice, copy_at_the_driver])
async def test_whoever_commits_is_told(
    connect: DBConnect, database: Database, fail: Failure, commit: Any
) -> None:
    async def work(session: AsyncSession, database: Database) -> None:
        await session.execute(insert(Item).values(name="a"))
        with swallow:
            await fail(session, database)

    with pytest.raises(PendingRollbackError):
        await commit(connect, work, database)
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_the_error_that_was_swallowed_is_named_as_the_cause(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(PendingRollbackError) as caught:
        async with new_db_session_ctx():
            session = await db_session(connect)
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
    assert "division by zero" in str(caught.value.__cause__)


# What PostgreSQL would commit is committed.


@every_failure
@pytest.mark.parametrize("is_nested", [False, True])
async def test_a_failure_that_a_savepoint_in_sql_undoes_is_forgiven(
    connect: DBConnect, database: Database, fail: Failure, is_nested: bool
) -> None:
    async def undo(session: AsyncSession) -> None:
        await session.execute(text("SAVEPOINT mine"))
        with swallow:
            await fail(session, database)
        await session.execute(text("ROLLBACK TO mine"))

    async with new_db_session_ctx():
        session = await add(connect, "a")
        if is_nested:
            async with session.begin_nested():
                await undo(session)
        else:
            await undo(session)
        await add(connect, "b")
    assert await database.names() == ["a", "b"]


@pytest.mark.parametrize("fail", AT_THE_DRIVER)
async def test_a_failure_that_a_savepoint_of_the_driver_undoes_is_forgiven(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "a")
        with swallow:
            async with (await raw_of(session)).transaction():
                await fail(session, database)
        await add(connect, "b")
    assert await database.names() == ["a", "b"]


@every_failure
async def test_a_failure_that_leaves_a_savepoint_is_forgiven(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "a")
        with swallow:
            async with session.begin_nested():
                await fail(session, database)
        await add(connect, "b")
    assert await database.names() == ["a", "b"]


@every_failure
async def test_a_failure_that_is_swallowed_inside_a_savepoint_is_told_at_its_end(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    with pytest.raises((DBAPIError, PendingRollbackError)):
        async with new_db_session_ctx():
            session = await add(connect, "a")
            async with session.begin_nested():
                with swallow:
                    await fail(session, database)
    assert connections_out(connect) == 0
    assert await database.names() == []


@pytest.mark.parametrize("statement", ["ROLLBACK TO mine", "RELEASE mine"])
async def test_a_failure_after_a_savepoint_in_sql_is_no_success(
    connect: DBConnect, database: Database, statement: str
) -> None:
    with pytest.raises(PendingRollbackError):
        async with new_db_session_ctx():
            session = await add(connect, "a")
            for sql in ("SAVEPOINT mine", statement):
                await session.execute(text(sql))
            with swallow:
                await session.execute(text("SELECT 1 / 0"))
    assert await database.names() == []


@every_failure
async def test_a_failure_is_forgiven_after_a_rollback(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "a")
        with swallow:
            await fail(session, database)
        await session.rollback()
        await add(connect, "b")
    assert await database.names() == ["b"]


@every_failure
async def test_a_failure_is_forgiven_where_each_statement_is_its_own_transaction(
    connect: DBConnect, database: Database, fail: Failure
) -> None:
    assert await connect.session_maker()
    assert connect.engine is not None
    engine = connect.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with AsyncSession(engine) as session:
        with swallow:
            await fail(session, database)
        await session.execute(insert(Item).values(name="a"))
        await session.commit()
    assert "a" in await database.names()
