"""The tests have a database of their own, whatever `DATABASE_URL` says."""

import os

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect

# Before the application is imported, which reads it.
os.environ["DATABASE_URL"] = os.environ.get(
    "TEST_DATABASE_URL", "sqlite:///test_step1.db"
)

from .app import app as application, connect

pytest_plugins = ["context_async_sqlalchemy.pytest_plugin"]


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
