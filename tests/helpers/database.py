"""A database of the tests: what it really holds, and connects to it that are checked."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import asyncpg
import pytest
import sqlalchemy
from packaging.version import Version
from sqlalchemy import URL, NullPool, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import DBConnect
from tests.helpers.connections import connections_out
from tests.helpers.names import unique_name
from tests.helpers.pgbouncer import CONNECT_ARGS

# What a statement on a connection that the server has ended raises: SQLAlchemy does not wrap what
# asyncpg raises if it is in the middle of noticing.
LOST = (DBAPIError, asyncpg.InternalClientError)

# Of what is nearly empty, this takes a tenth of the time of a TRUNCATE.
EMPTY = ";".join(
    f"DELETE FROM {table}; SELECT setval('{table}_id_seq', 1, false)"
    for table in ("item", "seat", "purse", "ledger")
)


# SQLAlchemy before 2.0.53 leaves a connection whose opening was cancelled to the garbage collector,
# which may come in any later test.
LEAVES_TO_THE_COLLECTOR = Version(sqlalchemy.__version__) < Version("2.0.53")


def collect_connections() -> None:
    """Let the garbage collector close the connections that SQLAlchemy has left to it."""
    if LEAVES_TO_THE_COLLECTOR:
        gc.collect()


def server_url() -> URL:
    return make_url(os.environ["TEST_DATABASE_URL"]).set(drivername="postgresql+asyncpg")


@contextmanager
def new_database(prefix: str) -> Generator[URL]:
    """Make an empty database; yield its URL; drop it at the end."""
    server = server_url()
    name = unique_name(prefix)

    async def run(statement: str) -> None:
        engine = create_async_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            await connection.execute(text(statement))

    asyncio.run(run(f"CREATE DATABASE {name}"))
    try:
        yield server.set(database=name)
    finally:
        asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


class Database:
    """The real contents of the database, seen through a separate connection."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def empty(self) -> None:
        """Delete every row, and number the next ones from 1."""
        await self._connection.execute(EMPTY)

    async def names(self) -> list[str]:
        """Return the names of the committed items, in the order they were made."""
        return [
            r["name"] for r in await self._connection.fetch("SELECT name FROM item ORDER BY id")
        ]

    async def seats(self) -> list[int]:
        """Return the numbers of the committed seats, in the order they were made."""
        rows = await self._connection.fetch("SELECT number FROM seat ORDER BY id")
        return [r["number"] for r in rows]

    async def states(self) -> list[str]:
        """Return the state and query of every other connection that is not idle."""
        rows = await self._connection.fetch(
            "SELECT state || ': ' || query AS state FROM pg_stat_activity"
            " WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND state <> 'idle' AND backend_type = 'client backend'"
        )
        return [r["state"] for r in rows]

    async def fetch(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        return [tuple(row) for row in await self._connection.fetch(statement)]

    async def execute(self, statements: str) -> None:
        """Run statements, each committed on its own."""
        await self._connection.execute(statements)

    async def pid_of(self, statement: str) -> int | None:
        """Return the PID of the backend running a statement LIKE this, if any."""
        pid: int | None = await self._connection.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND state = 'active' AND query LIKE $1 AND pid <> pg_backend_pid()",
            statement,
        )
        return pid

    async def is_asleep(self) -> bool:
        """Return whether another backend is inside pg_sleep(): not when it has only parsed it."""
        rows = await self.fetch(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event = 'PgSleep'"
        )
        return rows != []

    async def backends(self) -> list[int]:
        """Return the PID of every other connection."""
        rows = await self._connection.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return [r["pid"] for r in rows]

    async def terminate(self, pid: int) -> None:
        """End another connection on the server's side, and wait until it is gone."""
        assert await self._connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)

    async def terminate_any(self) -> None:
        """End one of the other connections, if any; it may end by itself first."""
        if backends := await self.backends():
            pid = random.choice(backends)
            await self._connection.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)

    async def is_left_by_all(self) -> None:
        """Wait until no other connection is left: a backend ends a moment after its client."""
        async with asyncio.timeout(30):
            while await self.backends():
                collect_connections()
                await asyncio.sleep(0.001)

    async def is_quiet(self) -> None:
        """Wait until no other connection is in a transaction, not even one that was just cut."""
        try:
            async with asyncio.timeout(30):
                while await self.states():
                    collect_connections()
                    await asyncio.sleep(0.001)
        except TimeoutError:
            pytest.fail(f"a connection is still in a transaction: {await self.states()}")

    async def connections(self) -> int:
        """Return how many other connections there are."""
        return len(await self.backends())


def make_connect(url: URL | str, **options: Any) -> DBConnect:
    """Make a connect with the host of `url`, or "file" if it has none."""

    def create_engine(host: str) -> AsyncEngine:
        target = make_url(url)
        if "TEST_THROUGH" in os.environ and target.port == server_url().port:
            # The application connects through PgBouncer; observers connect directly.
            target = target.set(port=int(os.environ["TEST_THROUGH"]))
            options.setdefault("connect_args", CONNECT_ARGS)
        return create_async_engine(
            target.set(host=host) if target.host else target, **{"pool_size": 5} | options
        )

    def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, expire_on_commit=False)

    return DBConnect(create_engine, create_session_maker, host=make_url(url).host or "file")


@asynccontextmanager
async def checked_connect(
    url: URL, database: Database, **options: Any
) -> AsyncGenerator[DBConnect]:
    """Make a connect for a test; at the end, the pool is whole and no transaction is open."""
    connect = make_connect(url, **options)
    yield connect
    try:
        assert connections_out(connect) == 0, "a connection is still out of the pool"
        await database.is_quiet()
    finally:
        await connect.close()


async def assert_clean(connect: DBConnect, database: Database) -> None:
    """Check that the pool is whole, and that nothing is in a transaction or a statement."""
    # It takes the server a moment to notice a connection that was cut.
    with suppress(TimeoutError):
        async with asyncio.timeout(30):
            while connections_out(connect) or await database.states():
                await asyncio.sleep(0.001)
            return
    assert (connections_out(connect), await database.states()) == (0, [])
