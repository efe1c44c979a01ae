"""The tests have a database of their own, whatever `DATABASE_URL` says."""

import os

import pytest
from fastapi import FastAPI

from context_async_sqlalchemy import DBConnect

# Before the application is imported, which reads it.
os.environ["DATABASE_URL"] = os.environ.get(
    "TEST_DATABASE_URL", "sqlite:///test_library.db"
)

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]


@pytest.fixture
def db_connect() -> DBConnect:
    from .app import connect

    return connect


@pytest.fixture
def app() -> FastAPI:
    from .app import app

    return app
