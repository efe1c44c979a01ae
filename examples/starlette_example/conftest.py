"""The tests have a database of their own, whatever `DATABASE_URL` says.

It is a SQLite file, or else on the PostgreSQL server of `TEST_DATABASE_URL`, whose user must be
allowed to create databases.
"""

import asyncio
import os
import secrets
from collections.abc import Generator
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import NullPool, make_url, text

from context_async_sqlalchemy import DBConnect, new_non_ctx_session

SERVER = os.environ.get("TEST_DATABASE_URL")
DATABASE = f"workflows_{secrets.token_hex(8)}"  # others may test on this server at the same time
DIRECTORY = TemporaryDirectory()

if SERVER is None:
    url = f"sqlite:///{DIRECTORY.name}/workflows.db"
else:
    url = (
        make_url(SERVER)
        .set(database=DATABASE)
        .render_as_string(hide_password=False)
    )

# The application reads where its database is when it is imported.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DATABASE_URL", url)
    from . import app  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def database() -> Generator[None]:
    """Create the database; drop it at the end."""
    with DIRECTORY:
        if SERVER is not None:
            asyncio.run(execute(SERVER, f"CREATE DATABASE {DATABASE}"))
        yield
        if SERVER is not None:
            asyncio.run(execute(SERVER, f"DROP DATABASE {DATABASE}"))


async def execute(server: str, statement: str) -> None:
    connect = DBConnect.from_url(
        server, isolation_level="AUTOCOMMIT", poolclass=NullPool
    )
    async with connect, new_non_ctx_session(connect) as session:
        await session.execute(text(statement))
