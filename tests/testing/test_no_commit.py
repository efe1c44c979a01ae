"""What would reach the database for real while the transaction of a test is open is refused."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import aiosqlite
import httpx
import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.routing import Route

from context_async_sqlalchemy import DBConnect, new_non_ctx_session, run_in_new_ctx
from context_async_sqlalchemy._testing.no_commit import has_ended
from context_async_sqlalchemy.starlette_utils import database_health
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.shared import Served, names_after, names_in

INSERT = "INSERT INTO item (id, name) VALUES (7, 'stored')"

TEXTS = ["COMMIT", " end", "Rollback", "COMMIT AND CHAIN", "ROLLBACK  WORK", "ABORT"]
postgresql_only = pytest.mark.parametrize("tested", ["asyncpg", "psycopg"], indirect=True)
sqlite_only = pytest.mark.parametrize(
    "tested", ["sqlite", "sqlite by hand", "legacy sqlite"], indirect=True
)


async def raw_of(session: AsyncSession) -> Any:
    """Return the connection of the driver itself."""
    return (await (await session.connection()).get_raw_connection()).driver_connection


@pytest.mark.parametrize("statement", TEXTS)
async def test_the_end_of_a_transaction_as_text_is_refused_and_the_test_goes_on(
    statement: str, shared: AsyncSession, tested: DBConnect
) -> None:
    async with new_non_ctx_session(tested) as session:
        await session.execute(insert(Item).values(name="a"))
        with pytest.raises(InvalidRequestError, match=r"await session.commit\(\)"):
            await session.execute(text(statement))
        with pytest.raises(InvalidRequestError, match="as text"):
            await (await session.connection()).exec_driver_sql(statement)
        await session.commit()
    assert await names_in(shared) == ["a"]


async def test_a_rollback_to_a_savepoint_as_text_is_none(shared: AsyncSession) -> None:
    for statement in (
        "SAVEPOINT a",
        INSERT,
        "ROLLBACK TO a",
        "ROLLBACK TRANSACTION TO SAVEPOINT a",
    ):
        await shared.execute(text(statement))
    assert await names_in(shared) == []


@pytest.mark.parametrize("statement", ["/* all of it */ COMMIT", "-- all of it\nEND"])
@postgresql_only
async def test_postgresql_refuses_what_does_not_look_like_a_commit(
    statement: str, tested: DBConnect, database: Database
) -> None:
    with pytest.raises(RuntimeError, match="was ended"):
        async with shared_transaction(tested) as session:
            session.add(Item(name="a"))
            await session.flush()
            with pytest.raises(DBAPIError, match="COMMIT in the transaction of a test"):
                await session.execute(text(statement))
            with pytest.raises(StatementError, match="was ended"):
                await session.execute(text(INSERT))
            await session.rollback()
            with pytest.raises(StatementError, match="was ended"):
                await run_in_new_ctx(Served(tested).insert, "b")
    assert await database.names() == []


@pytest.mark.parametrize("statement", ["/* all of it */ COMMIT", "-- all of it\nROLLBACK"])
@sqlite_only
async def test_sqlite_refuses_what_does_not_look_like_a_commit(
    statement: str, shared: AsyncSession
) -> None:
    shared.add(Item(name="a"))
    await shared.flush()
    with pytest.raises(DBAPIError, match="not authorized"):
        await shared.execute(text(statement))
    assert await names_in(shared) == ["a"]


@pytest.mark.parametrize("commit", ["text", "method", "several"])
async def test_a_commit_by_the_driver_itself_stores_nothing(commit: str, tested: DBConnect) -> None:
    async with new_non_ctx_session(tested) as session:
        driver = session.get_bind().dialect.driver
    with suppress(RuntimeError):
        async with shared_transaction(tested) as session:
            session.add(Item(name="a"))
            await session.flush()
            raw = await raw_of(session)
            several = raw.executescript if driver == "aiosqlite" else raw.execute
            by = {
                "text": lambda: raw.execute("COMMIT"),
                "several": lambda: several("SELECT 1; COMMIT"),
            }
            if driver != "asyncpg":
                by["method"] = raw.commit
            if commit in by:
                with pytest.raises(Exception, match=r"COMMIT in the transaction|not authorized"):
                    await by[commit]()
            with suppress(StatementError):
                await session.execute(text(INSERT))
                await session.commit()
    assert await names_after(tested) == []


@postgresql_only
async def test_a_rollback_by_the_driver_is_told_by_the_next_statement_and_at_the_end(
    tested: DBConnect, database: Database
) -> None:
    with pytest.raises(RuntimeError, match="did not go through SQLAlchemy"):
        async with shared_transaction(tested) as session:
            raw = await raw_of(session)
            await raw.execute("ROLLBACK")
            with pytest.raises(StatementError, match="did not go through SQLAlchemy"):
                await run_in_new_ctx(Served(tested).insert, "a")
    assert await database.names() == []


@sqlite_only
async def test_a_statement_that_ends_the_transaction_of_sqlite_is_told(tested: DBConnect) -> None:
    with pytest.raises(RuntimeError, match="was ended"):
        async with shared_transaction(tested) as session:
            await session.execute(text(INSERT))
            with pytest.raises(DBAPIError):
                await session.execute(text(INSERT.replace("INSERT", "INSERT OR ROLLBACK")))
            await session.rollback()
            with pytest.raises(StatementError, match="was ended"):
                await run_in_new_ctx(Served(tested).insert, "a")
    assert await names_after(tested) == []


async def test_the_error_of_a_test_is_not_hidden_by_the_end_of_its_transaction(
    connect: DBConnect,
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with shared_transaction(connect) as session:
            await (await raw_of(session)).execute("ROLLBACK")
            raise ZeroDivisionError


async def test_no_engine_is_made_that_would_commit_for_real(
    tested: DBConnect, shared: AsyncSession
) -> None:
    with pytest.raises(RuntimeError, match="would commit for real"):
        await tested.create_engine()
    app = Starlette(routes=[Route("/health", database_health(tested))])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://test"
    ) as client:
        assert (await client.get("/health")).status_code == 200, "it only looks"


@pytest.mark.parametrize("driver", ["asyncmy", "aiomysql"])
async def test_a_database_that_cannot_keep_a_test_in_its_transaction_is_refused(
    driver: str,
) -> None:
    pytest.importorskip(driver)
    async with DBConnect.from_url(f"mysql+{driver}://nobody@127.0.0.1:1/test") as connect:
        with pytest.raises(NotImplementedError, match="for PostgreSQL and SQLite"):
            async with shared_transaction(connect):
                pytest.fail("the block must not run")


async def test_sqlite_is_asked_while_its_thread_is_inside_a_statement() -> None:
    has_begun = threading.Event()

    def wait() -> None:
        has_begun.set()
        time.sleep(0.1)  # and then needs the interpreter, while SQLite lets no other thread in

    async with aiosqlite.connect(":memory:") as connection:
        driver = SimpleNamespace(driver_connection=connection)
        await connection.create_function("wait", 0, wait)
        task = asyncio.create_task(connection.execute_fetchall("SELECT wait()"))
        await asyncio.sleep(0)
        assert has_begun.wait(20)
        assert has_ended(driver)
        await task
        await connection.execute("BEGIN")
        assert not has_ended(driver)


async def test_a_sqlite_connection_that_is_being_closed_says_so() -> None:
    async with aiosqlite.connect(":memory:") as connection:
        closing = asyncio.create_task(connection.close())
        await asyncio.sleep(0)  # it has been asked to
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            has_ended(SimpleNamespace(driver_connection=connection))
        await closing
