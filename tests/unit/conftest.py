"""Fixtures of the tests of a unit of work."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from sqlalchemy import URL

from context_async_sqlalchemy import DBConnect
from tests.helpers.calls import Calls
from tests.helpers.database import Database, checked_connect


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def serializable(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[DBConnect]:
    """Return a connect whose transactions are SERIALIZABLE, with each driver for PostgreSQL."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    options = {"isolation_level": "SERIALIZABLE", "pool_timeout": 0.1, "max_overflow": 0}
    async with checked_connect(url, database, **options) as connect:
        yield connect


@pytest.fixture
def calls() -> Calls:
    return Calls()
