"""A child task that is inside a statement when the response starts is refused with its request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import URL, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
)
from context_async_sqlalchemy._engine.private_names import lock_of
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import add, app_of, call
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Base, Item

# Each takes as long as it is let: until its connection is closed, or it is interrupted.
SLOW = {
    "postgresql": "SELECT pg_sleep(20)",
    "sqlite": "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 3000000)"
    " SELECT count(*) FROM n",
}


@pytest_asyncio.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
async def connect(
    request: pytest.FixtureRequest, database_url: URL, database: Database, tmp_path: Path
) -> AsyncGenerator[DBConnect]:
    """Return a connect with each driver, and check that every connection comes home."""
    if request.param == "aiosqlite":
        connect: DBConnect = DBConnect.from_url(f"sqlite:///{tmp_path / 'test.db'}")
        async with new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            await connection.run_sync(Base.metadata.tables["item"].create)
    else:
        connect = DBConnect.from_url(database_url.set(drivername=f"postgresql+{request.param}"))
    async with connect:
        yield connect
        async with asyncio.timeout(30):
            while connections_out(connect) or await database.states():
                await asyncio.sleep(0.001)


async def names(connect: DBConnect) -> list[str]:
    async with new_non_ctx_session(connect) as session:
        return list(await session.scalars(select(Item.name).order_by(Item.id)))


def slow_statement(session: AsyncSession) -> Any:
    return text(SLOW[session.get_bind().dialect.name])


class InStatement(asyncio.Event):
    """Is set when a slow statement of an engine is about to be sent."""

    def __init__(self, connect: DBConnect) -> None:
        super().__init__()
        assert connect.engine is not None
        event.listen(connect.engine.sync_engine, "before_cursor_execute", self._on_execute)

    def _on_execute(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        if statement in SLOW.values():
            self.set()


@pytest.mark.parametrize("status", [201, 409])
@pytest.mark.parametrize("writes_first", [True, False])
async def test_a_request_whose_child_is_inside_a_statement_is_no_success(
    connect: DBConnect, database: Database, status: int, writes_first: bool
) -> None:
    async with new_non_ctx_session(connect) as session:
        adapter = (await (await session.connection()).get_raw_connection()).dbapi_connection
        if session.get_bind().dialect.driver == "aiosqlite" and lock_of(adapter) is None:
            pytest.skip("SQLAlchemy 2.0 does not say that SQLite executes a statement")
    is_executing = InStatement(connect)
    tasks: list[asyncio.Task[None]] = []

    async def child() -> None:
        session = await add(connect, "by the child")
        await session.execute(slow_statement(session))
        await add(connect, "by the child, later")

    async def handler(_: Scope) -> int:
        if writes_first:
            await add(connect, "a")
        tasks.append(asyncio.create_task(child()))
        await is_executing.wait()
        return status

    sent: list[Any] = []
    error: Exception | None = None
    try:
        sent = await call(app_of(handler))
    except Exception as raised:
        error = raised
    statuses = [message["status"] for message in sent if "status" in message]
    assert (statuses == [409]) if status == 409 else (error is not None and statuses == [])
    if status == 201:
        assert "A task still uses the database session" in str(error)
    # It must not go on in the transaction of a later request.
    (result,) = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(result, Exception)
    for pid in await database.backends():
        if await database.pid_of("SELECT pg_sleep%") == pid:
            await database.terminate(pid)
    assert await names(connect) == []


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_request_whose_child_has_ended_is_a_success(
    connect: DBConnect, is_cancelled: bool
) -> None:
    async with new_non_ctx_session(connect) as session:
        await session.connection()
    holds = asyncio.Event()

    async def child() -> None:
        await add(connect, "by the child")
        holds.set()
        if is_cancelled:
            await asyncio.Event().wait()  # not in a statement

    async def handler(_: Scope) -> int:
        await add(connect, "a")
        task = asyncio.create_task(child())
        await holds.wait()
        task.cancel()
        await asyncio.wait([task])
        return 201

    assert (await call(app_of(handler)))[0]["status"] == 201
    assert await names(connect) == ["a", "by the child"]
