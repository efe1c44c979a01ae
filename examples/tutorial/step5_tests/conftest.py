"""The tests have a database of their own, whatever `DATABASE_URL` says."""

import os

import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect

# Before the application is imported, which reads it.
os.environ["DATABASE_URL"] = os.environ.get(
    "TEST_DATABASE_URL", "sqlite:///test_step5.db"
)

from .app import app as application
from .database import connect
from .models import Book

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]

DUNE = "9780441013593"


@pytest.fixture
def db_connect() -> DBConnect:
    return connect


@pytest.fixture
def app() -> FastAPI:
    return application


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    with TestClient(application):  # its lifespan creates them
        pass


@pytest.fixture
async def book(shared_session: AsyncSession) -> Book:
    """Return the book of a library that has one."""
    book = Book(isbn=DUNE, title="Dune")
    shared_session.add(book)
    await shared_session.commit()
    return book
