"""The application commits as usual; each test looks with its own session, and cleans up."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest_asyncio
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from examples.workflows.database import connect
from examples.workflows.models import Note
from tests.helpers.serving import http_client

__all__ = ["client", "session"]


@pytest_asyncio.fixture
async def client(app: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client of the application on a real server; check that no connection leaks."""
    async with http_client(app) as client:
        await client.get("/notes")  # once it answers, the tables exist
        yield client
        assert connect.pool_status().checked_out == 0
    assert connect.engine is None, "the application has not closed its connections"


@pytest_asyncio.fixture
async def session(client: httpx.AsyncClient) -> AsyncGenerator[AsyncSession]:
    """Return a session on its own connection; empty the tables at the end."""
    engine = await connect.create_engine()
    async with AsyncSession(engine) as session:
        yield session
        await session.rollback()
        await session.execute(delete(Note))
        await session.commit()
    await engine.dispose()
