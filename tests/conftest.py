"""Fixtures: a database for each worker, connects to it, and a view of what it really holds."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy import URL, NullPool, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import DBConnect
from tests.helpers.connections import connections_out
from tests.helpers.models import Base
from tests.helpers.pgbouncer import CONNECT_ARGS
from tests.helpers.postgres import postgres_server
from tests.helpers.programs import Outside, connects_of, load_program

_resources = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist workers inherit the environment of the process that starts them.
    if not hasattr(config, "workerinput") and "TEST_DATABASE_URL" not in os.environ:
        os.environ["TEST_DATABASE_URL"] = _resources.enter_context(postgres_server())
        _resources.callback(os.environ.pop, "TEST_DATABASE_URL")


def pytest_unconfigure() -> None:
    _resources.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Tests report in their teardown how many points they tried, and what they measured.
    reports = [r for r in terminalreporter.stats.get("", []) if r.when == "teardown"]
    properties = [prop for report in reports for prop in report.user_properties]
    points = sum(value for name, value in properties if name == "fault points")
    if points:
        terminalreporter.write_line(f"fault injection: {points} points tried")
    for name, value in properties:
        if name == "measured":
            terminalreporter.write_line(value)


def _server() -> URL:
    return make_url(os.environ["TEST_DATABASE_URL"]).set(drivername="postgresql+asyncpg")


@pytest.fixture(scope="session")
def database_url(worker_id: str) -> Generator[URL]:
    """Return the URL of this worker's own database."""
    server = _server()
    name = f"context_async_sqlalchemy_{worker_id}{os.environ.get('TEST_THROUGH', '')}"
    url = server.set(database=name)

    async def run(url: URL, *statements: str) -> None:
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        async with engine.connect() as connection:
            for statement in statements:
                await connection.execute(text(statement))

    async def create_tables() -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    drop = f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"
    asyncio.run(run(server, drop, f"CREATE DATABASE {name}"))
    asyncio.run(create_tables())
    yield url
    asyncio.run(run(server, drop))


class Database:
    """The real contents of the database, seen through a separate connection."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def empty(self) -> None:
        """Delete every row."""
        await self._connection.execute("TRUNCATE item, seat, purse, ledger RESTART IDENTITY")

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
        async with asyncio.timeout(10):
            while await self.backends():
                await asyncio.sleep(0.001)

    async def is_quiet(self) -> None:
        """Wait until no other connection is in a transaction, not even one that was just cut."""
        try:
            async with asyncio.timeout(10):
                while await self.states():
                    await asyncio.sleep(0.001)
        except TimeoutError:
            pytest.fail(f"a connection is still in a transaction: {await self.states()}")

    async def connections(self) -> int:
        """Return how many other connections there are."""
        return len(await self.backends())


@pytest_asyncio.fixture
async def database(database_url: URL) -> AsyncGenerator[Database]:
    """Empty the tables; return a view of what is committed."""
    url = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    # A test that left something open should fail, not hang.
    await connection.execute("SET lock_timeout = '10s'")
    database = Database(connection)
    await database.is_quiet()
    await database.empty()
    yield database
    await connection.close()


@pytest_asyncio.fixture
async def connect(database_url: URL, database: Database) -> AsyncGenerator[DBConnect]:
    """Return a connect to PostgreSQL, and check that every connection comes home."""
    async with checked_connect(database_url, database) as connect:
        yield connect


@pytest_asyncio.fixture
async def second_connect(database_url: URL, database: Database) -> AsyncGenerator[DBConnect]:
    """Return another connect, with its own engine."""
    async with checked_connect(database_url, database) as connect:
        yield connect


@pytest_asyncio.fixture
async def sqlite_connect(tmp_path: Path) -> AsyncGenerator[DBConnect]:
    """Return a connect to a SQLite file that has the table `item`."""
    connect = make_connect(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    await connect.session_maker()
    assert connect.engine is not None
    async with connect.engine.begin() as connection:
        await connection.run_sync(Base.metadata.tables["item"].create)
    yield connect
    assert connections_out(connect) == 0
    await connect.close()


def make_connect(url: URL | str, **options: Any) -> DBConnect:
    """Make a connect with the host of `url`, or "file" if it has none."""

    def create_engine(host: str) -> AsyncEngine:
        target = make_url(url)
        if "TEST_THROUGH" in os.environ and target.port == _server().port:
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


@pytest.fixture
def postgresql(database_url: URL, database: Database) -> str:
    """Return the URL of the database, emptied, for a program."""
    return database_url.render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database for a program: once SQLite, once PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'program.db'}"
    url: str = request.getfixturevalue("postgresql")
    return url


@pytest_asyncio.fixture
async def load(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Callable[[str, str], Any]]:
    """Return a function that loads a program for a database; its tables are dropped at the end."""
    loaded: list[tuple[Any, str]] = []

    def load(name: str, url: str) -> Any:
        program = load_program(monkeypatch, name, DATABASE_URL=url)
        loaded.append((program, url))
        return program

    yield load
    for program, url in loaded:
        for connect in connects_of(program):
            assert connect.engine is None, "the program has not closed its connect"
        async with Outside(url).connection() as connection:
            await connection.run_sync(program.Base.metadata.drop_all)
