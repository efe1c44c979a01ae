"""The tests have a database of their own, whatever `DATABASE_URL` says."""

import os

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect

# Before the application is imported, which reads it.
os.environ["DATABASE_URL"] = os.environ.get(
    "TEST_DATABASE_URL", "sqlite:///test_library.db"
)

DUNE = {"isbn": "9780441013593", "title": "Dune"}

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
def client(shared_client: TestClient) -> TestClient:
    """Return a client of a library that has one book."""
    assert shared_client.post("/books", json=DUNE).status_code == 201
    return shared_client
