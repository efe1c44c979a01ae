"""What SQLite ends without being asked is an error at the COMMIT, and nothing of it is stored."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    retry_on_transient_error,
    rollback_db_session,
)
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import add, app_of, call
from tests.helpers.connections import connections_out
from tests.helpers.database import make_connect
from tests.helpers.models import Base, Item
from tests.helpers.raw import raw_of
from tests.helpers.sqlite import begin_explicitly

TABLES = [
    "CREATE TABLE once (name UNIQUE ON CONFLICT ROLLBACK)",
    "CREATE TRIGGER refuse BEFORE INSERT ON item WHEN new.name = 'refused'"
    " BEGIN SELECT RAISE(ROLLBACK, 'refused'); END",
    "CREATE TRIGGER abort BEFORE INSERT ON item WHEN new.name = 'aborted'"
    " BEGIN SELECT RAISE(ABORT, 'aborted'); END",
]

Failure = Callable[[AsyncSession], Awaitable[Any]]


def of_a_url(file: Path) -> DBConnect:
    return DBConnect.from_url(f"sqlite:///{file}", pool_size=1, max_overflow=0)


def of_a_url_that_begins_immediately(file: Path) -> DBConnect:
    arguments: dict[str, Any] = {"isolation_level": "IMMEDIATE"}
    return DBConnect.from_url(f"sqlite:///{file}", connect_args=arguments)


def of_a_creator(file: Path) -> DBConnect:
    return make_connect(f"sqlite+aiosqlite:///{file}")


def of_a_creator_that_begins(file: Path) -> DBConnect:
    def create_engine(_: str) -> AsyncEngine:
        engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
        begin_explicitly(engine.sync_engine)
        return engine

    return DBConnect(create_engine, async_sessionmaker[AsyncSession], host="file")


WITH_SAVEPOINT = [of_a_url, of_a_url_that_begins_immediately]


@pytest_asyncio.fixture(params=[*WITH_SAVEPOINT, of_a_creator, of_a_creator_that_begins])
async def connect(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[DBConnect]:
    """Return a connect to a file with tables, and check that every connection comes home."""
    async with request.param(tmp_path / "test.db") as connect:
        async with new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            await connection.run_sync(Base.metadata.tables["item"].create)
            for statement in TABLES:
                await session.execute(text(statement))
        yield connect
        assert connections_out(connect) == 0


async def names(connect: DBConnect) -> list[str]:
    async with new_non_ctx_session(connect) as session:
        return list(await session.scalars(select(Item.name).order_by(Item.id)))


# What ends a transaction


async def insert_or_roll_back(session: AsyncSession) -> None:
    await session.execute(text("INSERT OR ROLLBACK INTO item VALUES (1, 'again'), (1, 'again')"))


async def be_refused_by_a_trigger(session: AsyncSession) -> None:
    await session.execute(insert(Item).values(name="refused"))


async def violate_a_constraint_that_rolls_back(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO once VALUES (1), (1)"))


async def fill_the_database(session: AsyncSession) -> None:
    await session.execute(text("PRAGMA max_page_count = 1"))  # not less than there are
    try:
        await session.execute(text("INSERT INTO once VALUES (zeroblob(1000000))"))
    finally:
        await session.execute(text("PRAGMA max_page_count = 4294967294"))


async def be_interrupted(session: AsyncSession) -> None:
    raw = await raw_of(session)
    endless = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    task = asyncio.ensure_future(session.execute(text(f"INSERT INTO once {endless}")))
    async with asyncio.timeout(30):
        while not task.done():  # before it has begun, nothing is interrupted
            await raw.interrupt()
            await asyncio.wait([task], timeout=0.01)
    await task


EVERY = [
    insert_or_roll_back,
    be_refused_by_a_trigger,
    violate_a_constraint_that_rolls_back,
    fill_the_database,
    be_interrupted,
]


async def insert_or_roll_back_at_the_driver(session: AsyncSession) -> None:
    with suppress(sqlite3.IntegrityError):
        await (await raw_of(session)).execute(
            "INSERT OR ROLLBACK INTO item VALUES (1, 'again'), (1, 'again')"
        )


@pytest.mark.parametrize("fail", EVERY)
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("is_nested", [False, True])
async def test_a_transaction_that_sqlite_has_ended_is_no_success(
    connect: DBConnect, fail: Failure, goes_on: bool, is_nested: bool
) -> None:
    with pytest.raises(SQLAlchemyError):  # a savepoint that is gone has another one
        async with new_db_session_ctx():
            session = await add(connect, "before")
            with suppress(DBAPIError):
                if is_nested:
                    async with session.begin_nested():
                        await fail(session)
                else:
                    await fail(session)
            if goes_on:
                await add(connect, "after")
    assert connections_out(connect) == 0
    assert await names(connect) == []
    async with new_db_session_ctx():
        await add(connect, "next")
    assert await names(connect) == ["next"]


@pytest.mark.parametrize("connect", WITH_SAVEPOINT, indirect=True)
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("is_nested", [False, True])
async def test_a_transaction_that_sqlite_has_ended_at_the_driver_is_no_success(
    connect: DBConnect, goes_on: bool, is_nested: bool
) -> None:
    await test_a_transaction_that_sqlite_has_ended_is_no_success(
        connect, insert_or_roll_back_at_the_driver, goes_on, is_nested
    )


async def test_a_request_whose_transaction_sqlite_has_ended_is_answered_with_an_error(
    connect: DBConnect,
) -> None:
    async def handler(_: Scope) -> int:
        session = await add(connect, "an order")
        with suppress(DBAPIError):
            await fill_the_database(session)
        await add(connect, "its entry in the log")
        return 200

    with pytest.raises(SQLAlchemyError):
        await call(app_of(handler))
    assert await names(connect) == []


async def test_a_transaction_that_sqlite_has_ended_is_not_repeated(connect: DBConnect) -> None:
    # What violates a constraint once does so again.
    calls = 0

    @retry_on_transient_error(attempts=3, wait_initial=0.001, wait_jitter=0)
    async def work() -> None:
        nonlocal calls
        calls += 1
        session = await add(connect, "before")
        with suppress(IntegrityError):
            await be_refused_by_a_trigger(session)
        await add(connect, "after")

    with pytest.raises(SQLAlchemyError):
        await work()
    assert calls == 1
    assert await names(connect) == []


async def test_an_atomic_block_that_sqlite_has_ended_is_no_success(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        with pytest.raises(SQLAlchemyError):
            async with atomic_db_session(connect) as session:
                await add(connect, "before")
                with suppress(IntegrityError):
                    await insert_or_roll_back(session)
        await add(connect, "after the block")
    assert await names(connect) == ["after the block"]


async def test_a_transaction_that_sqlite_has_ended_may_be_rolled_back(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "before")
        with suppress(IntegrityError):
            await insert_or_roll_back(session)
        await session.rollback()
        await add(connect, "after")
    assert await names(connect) == ["after"]


@pytest.mark.parametrize("fail", [insert_or_roll_back, insert_or_roll_back_at_the_driver])
@pytest.mark.parametrize("end", [None, commit_db_session, rollback_db_session])
async def test_a_session_whose_savepoints_sqlite_has_ended_may_be_closed(
    connect: DBConnect, fail: Failure, end: Any
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "before")
        for _ in range(2):
            await session.begin_nested()
        with suppress(IntegrityError, sqlite3.IntegrityError):
            await fail(session)
        if end is not None:
            # SQLAlchemy ends its savepoints, one by one, and is told that they are gone.
            with suppress(SQLAlchemyError):
                await end(connect)
        await close_db_session(connect)
        assert not session.in_transaction()
        assert connections_out(connect) == 0
        await add(connect, "after")
    assert await names(connect) == ["after"]


# What SQLite would commit is committed.


async def add_twice(session: AsyncSession) -> None:
    await session.execute(insert(Item).values([{"name": "twice"}, {"name": "twice"}]))


async def be_aborted_by_a_trigger(session: AsyncSession) -> None:
    await session.execute(insert(Item).values(name="aborted"))


async def read_what_is_not_there(session: AsyncSession) -> None:
    await session.execute(text("SELECT * FROM nothing"))


async def add_twice_at_the_driver(session: AsyncSession) -> None:
    await (await raw_of(session)).execute("INSERT INTO item VALUES (1, 'twice'), (1, 'twice')")


FORGIVEN = [
    add_twice,
    be_aborted_by_a_trigger,
    read_what_is_not_there,
    add_twice_at_the_driver,
]


@pytest.mark.parametrize("fail", FORGIVEN)
@pytest.mark.parametrize("savepoint", ["none", "SQLAlchemy's", "in SQL"])
async def test_a_statement_that_sqlite_undoes_alone_is_forgiven(
    connect: DBConnect, fail: Failure, savepoint: str
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "before")
        if savepoint == "SQLAlchemy's":
            with suppress(Exception):
                async with session.begin_nested():
                    await add(connect, "in the savepoint")
                    await fail(session)
        elif savepoint == "in SQL":
            await session.execute(text("SAVEPOINT mine"))
            await add(connect, "in the savepoint")
            with suppress(Exception):
                await fail(session)
            for sql in ("ROLLBACK TO mine", "RELEASE mine"):
                await session.execute(text(sql))
        else:
            with suppress(Exception):
                await fail(session)
        await add(connect, "after")
    assert await names(connect) == ["before", "after"]


@pytest.mark.parametrize(
    "statement",
    ["SELECT * FROM item", "CREATE TABLE other (a)", "PRAGMA user_version", "DELETE FROM item"],
)
async def test_a_transaction_that_writes_no_row_is_a_success(
    connect: DBConnect, statement: str
) -> None:
    async with new_db_session_ctx():
        await (await db_session(connect)).execute(text(statement))
    async with new_db_session_ctx():
        with suppress(DBAPIError):
            await (await db_session(connect)).execute(text("SELECT * FROM nothing"))
