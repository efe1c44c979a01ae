"""Each test shares one transaction with the application, rolled back at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect

# In your project, write this in the top-level conftest.py instead of the import:
# pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]
from context_async_sqlalchemy.pytest_plugin import shared_session
from examples.workflows.database import connect, create_tables

__all__ = ["client", "db_connect", "session", "shared_session"]


@pytest_asyncio.fixture
async def db_connect() -> AsyncGenerator[DBConnect]:
    """Return the database, with its tables; check that no connection leaks."""
    await create_tables()
    yield connect
    assert connect.pool_status().checked_out == 0


@pytest.fixture
def session(shared_session: AsyncSession) -> AsyncSession:
    """Return the session of the shared transaction."""
    return shared_session


@pytest_asyncio.fixture
async def client(app: Any, session: AsyncSession) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client that calls the application on the test's event loop."""
    # Like a server, answer an exception with 500 instead of raising it here.
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
