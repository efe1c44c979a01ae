"""Fixtures of the tests of requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import URL, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from context_async_sqlalchemy import DBConnect
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Base
from tests.helpers.programs import Outside
from tests.helpers.store import Store


@pytest_asyncio.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
async def store(
    request: pytest.FixtureRequest, database_url: URL, database: Database, tmp_path: Path
) -> AsyncGenerator[Store]:
    """Return a database with each driver; at the end, no connection is out or in a transaction."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    if request.param == "aiosqlite":
        url = URL.create("sqlite+aiosqlite", database=str(tmp_path / "store.db"))
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.tables["item"].create)
    async with DBConnect.from_url(url) as connect:
        outside = Outside(url.render_as_string(hide_password=False))
        yield Store(request.param, connect, outside)
        assert connections_out(connect) == 0
        await database.is_quiet()
