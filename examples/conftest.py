"""The tests of the examples have a database of their own, whatever `DATABASE_URL` says.

It is on the server of `TEST_DATABASE_URL`, as in `make test`, or else a SQLite file.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import secrets
import tempfile
from collections.abc import Generator

import pytest
from sqlalchemy import NullPool, make_url, text

from context_async_sqlalchemy import DBConnect, new_non_ctx_session

# The workers of pytest-xdist inherit it from the process that has started the server.
SERVER = os.environ.get("TEST_DATABASE_URL")
# No other run has it, be it another worker, or another copy of the examples.
DATABASE = f"context_async_sqlalchemy_examples_{secrets.token_hex(8)}"

_directory = tempfile.TemporaryDirectory()

# An application reads where its database is when it is imported, which the next conftest.py does.
with pytest.MonkeyPatch.context() as patch:
    if SERVER is None:
        url = f"sqlite:///{_directory.name}/examples.db"
    else:
        url = make_url(SERVER).set(database=DATABASE).render_as_string(hide_password=False)
    patch.setenv("DATABASE_URL", url)
    importlib.import_module("examples.workflows.database")


def pytest_unconfigure() -> None:
    _directory.cleanup()


@pytest.fixture(scope="session", autouse=True)
def database() -> Generator[None]:
    """Create the database of this worker, where it is not a file, and drop it at the end."""
    asyncio.run(_on_server(f"CREATE DATABASE {DATABASE}"))
    yield
    asyncio.run(_on_server(f"DROP DATABASE {DATABASE} WITH (FORCE)"))


async def _on_server(statement: str) -> None:
    if SERVER is None:
        return
    connect = DBConnect.from_url(SERVER, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    async with connect, new_non_ctx_session(connect) as session:
        await session.execute(text(statement))
