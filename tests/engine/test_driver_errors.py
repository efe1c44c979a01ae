"""What an error of the server means, as each driver tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from importlib.metadata import version

import pytest
import pytest_asyncio
from packaging.version import Version
from sqlalchemy import URL, text
from sqlalchemy.exc import DBAPIError

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    db_session,
    is_transient_error,
    new_db_session_ctx,
    new_non_ctx_session,
    retry_on_transient_error,
)
from tests.helpers.database import LOST, Database

TOO_LONG = "transaction_timeout"
IDLE = "idle_in_transaction_session_timeout"


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def connect(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[DBConnect]:
    """Return a connect with each driver."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    async with DBConnect.from_url(url, pool_size=2, max_overflow=0) as connect:
        yield connect
        assert connect.pool_status().checked_out == 0
        await database.is_quiet()


async def set_timeout(connect: DBConnect, name: str) -> None:
    session = await db_session(connect)
    if await session.scalar(text("SELECT count(*) FROM pg_settings WHERE name = :n"), {"n": name}):
        await session.execute(text(f"SET {name} = '100ms'"))
        await session.execute(text("INSERT INTO item (name) VALUES ('a')"))
    else:
        pytest.skip(f"this server has no {name}")


async def is_ended(database: Database) -> None:
    """Wait until the server has ended the only other connection."""
    async with asyncio.timeout(30):
        while await database.backends():
            await asyncio.sleep(0.001)


async def test_work_that_takes_too_long_is_not_repeated(
    connect: DBConnect, database: Database
) -> None:
    calls = 0

    @retry_on_transient_error(attempts=3, wait_initial=0.001, wait_jitter=0)
    async def work() -> None:
        nonlocal calls
        calls += 1
        await set_timeout(connect, TOO_LONG)
        await (await db_session(connect)).execute(text("SELECT pg_sleep(10)"))

    with pytest.raises(DBAPIError) as caught:
        await work()
    # asyncpg passes on what the server has said since 0.32; before, it tells of a lost connection.
    is_told = "due to transaction timeout" in str(caught.value)
    assert is_told or Version(version("asyncpg")) < Version("0.32")
    assert calls == (1 if is_told else 3)
    assert await database.names() == []


@pytest.mark.parametrize("name", [TOO_LONG, IDLE])
async def test_a_commit_after_the_server_has_rolled_back_is_not_of_unknown_outcome(
    connect: DBConnect, database: Database, name: str
) -> None:
    with pytest.raises(LOST) as caught:
        async with new_db_session_ctx():
            await set_timeout(connect, name)
            await is_ended(database)
    assert not isinstance(caught.value, CommitOutcomeUnknownError)
    assert await database.names() == []
    # psycopg passes on why; asyncpg has only seen that the connection was closed.
    is_told = connect.engine is not None and connect.engine.dialect.driver == "psycopg"
    assert is_transient_error(caught.value) is not is_told


async def test_a_statement_that_a_change_of_the_schema_made_invalid_is_repeated(
    connect: DBConnect, database: Database
) -> None:
    calls = 0

    @retry_on_transient_error(attempts=3, wait_initial=0.001, wait_jitter=0)
    async def read() -> int:
        nonlocal calls
        calls += 1
        row = (await (await db_session(connect)).execute(text("SELECT * FROM changing"))).one()
        return len(row)

    await database.execute("CREATE TABLE changing AS SELECT 1 AS a")
    try:
        # psycopg prepares a statement that a connection has executed five times.
        async with new_non_ctx_session(connect) as a, new_non_ctx_session(connect) as b:
            for session in [a, b] * 7:
                await session.execute(text("SELECT * FROM changing"))
            # With a rollback, psycopg would forget them.
            await a.commit()
            await b.commit()
        await database.execute("ALTER TABLE changing ADD COLUMN b int")
        assert await read() == 2
        assert calls > 1
    finally:
        await database.execute("DROP TABLE changing")
