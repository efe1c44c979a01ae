"""The tests have a database of their own, whatever `DATABASE_URL` says."""

import os
from collections.abc import AsyncGenerator

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect

# Before the application is imported, which reads it.
os.environ["DATABASE_URL"] = os.environ.get(
    "TEST_DATABASE_URL", "sqlite:///test_library.db"
)

DUNE = "9780441013593"

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]


@pytest.fixture
def db_connect() -> DBConnect:
    from .database import connect

    return connect


@pytest.fixture
def app() -> FastAPI:
    from .app import app

    return app


@pytest.fixture
async def session(shared_session: AsyncSession) -> AsyncSession:
    """Return the test's session, in a library that has one book."""
    from .models import Base, Book

    connection = await shared_session.connection()
    await connection.run_sync(Base.metadata.create_all)
    shared_session.add(Book(isbn=DUNE, title="Dune"))
    await shared_session.commit()
    return shared_session


@pytest.fixture
async def client(
    app: FastAPI, session: AsyncSession
) -> AsyncGenerator[httpx.AsyncClient]:
    """Return a client that calls the application on the test's event loop."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test"
    ) as client:
        yield client
