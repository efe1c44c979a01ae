"""Fixtures of the tests in one transaction with the application."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
)
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Base, Item
from tests.helpers.shared import Served, create_sqlite_engine, names_after


@pytest_asyncio.fixture(params=["asyncpg", "psycopg", "sqlite", "sqlite by hand", "legacy sqlite"])
async def tested(
    request: pytest.FixtureRequest, database: Database, database_url: URL, tmp_path: Path
) -> AsyncGenerator[DBConnect]:
    """Return a connect to each database, by each driver."""
    if request.param in ("asyncpg", "psycopg"):
        async with DBConnect.from_url(
            database_url.set(drivername=f"postgresql+{request.param}")
        ) as connect:
            yield connect
            assert connections_out(connect) == 0
        return
    url = URL.create("sqlite+aiosqlite", database=str(tmp_path / "test.db"))
    connect = DBConnect.from_url(url)
    if request.param != "sqlite":
        is_legacy = request.param == "legacy sqlite"
        connect = DBConnect(
            lambda _: create_async_engine(url) if is_legacy else create_sqlite_engine(url),
            lambda engine: async_sessionmaker(engine, expire_on_commit=False),
            host="file",
        )
    async with connect:
        async with new_non_ctx_atomic_session(connect) as session:
            await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
        yield connect
        assert connections_out(connect) == 0


@pytest.fixture
def served(tested: DBConnect) -> Served:
    return Served(tested)


@pytest_asyncio.fixture
async def in_process(served: Served) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=served.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest_asyncio.fixture
async def shared(tested: DBConnect) -> AsyncGenerator[AsyncSession]:
    """Return the session of a test's transaction; afterwards the connect is as before."""
    async with shared_transaction(tested) as session:
        yield session
    assert connections_out(tested) == 0
    assert await names_after(tested) == []
    async with new_db_session_ctx():
        (await db_session(tested)).add(Item(name="after"))
    assert await names_after(tested) == ["after"]
