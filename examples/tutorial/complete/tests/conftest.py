"""The tests have a database of their own, whatever `DATABASE_URL` says."""

import os
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.config import Config
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
    from library.database import connect

    return connect


@pytest.fixture
def app() -> FastAPI:
    from library.app import app

    return app


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    """Create the tables as a deployment does."""
    config = Config(Path(__file__).parents[1] / "alembic.ini")
    command.upgrade(config, "head")


@pytest.fixture
async def session(shared_session: AsyncSession) -> AsyncSession:
    """Return the test's session, in a library that has one book."""
    from library.models import Book

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
