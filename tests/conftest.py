"""Fixtures: a database for each worker, connects to it, and a view of what it really holds."""

# ruff: noqa: E402 - pytest must know of the helpers that assert before they are imported

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
import stamina
from sqlalchemy import URL, NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from context_async_sqlalchemy import DBConnect

# So that a failed assertion shows its values: by itself, pytest cares for tests and conftests only.
pytest.register_assert_rewrite(
    *("tests.helpers.database", "tests.helpers.dependency", "tests.helpers.failures"),
    *("tests.helpers.integrations", "tests.helpers.shared"),
)

from tests.helpers.connections import connections_out
from tests.helpers.database import (
    LEAVES_TO_THE_COLLECTOR,
    Database,
    checked_connect,
    collect_connections,
    make_connect,
    new_database,
)
from tests.helpers.models import Base
from tests.helpers.names import unique_name
from tests.helpers.postgres import postgres_server
from tests.helpers.programs import Outside, connects_of, load_program

_resources = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is imported: there is hardly any garbage yet
    if LEAVES_TO_THE_COLLECTOR:
        config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
    # pytest-xdist workers inherit the environment of the process that starts them.
    if not hasattr(config, "workerinput") and "TEST_DATABASE_URL" not in os.environ:
        os.environ["TEST_DATABASE_URL"] = _resources.enter_context(postgres_server())
        _resources.callback(os.environ.pop, "TEST_DATABASE_URL")


def pytest_unconfigure() -> None:
    _resources.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    # What was imported stays: a test that collects garbage need not go through it, for 0.3 seconds.
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # Hypothesis looks for who refers to something


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


@pytest.fixture(scope="session")
def database_url() -> Generator[URL]:
    """Return the URL of a database that this worker has made for itself, and drops at the end."""

    async def create_tables(url: URL) -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    with new_database("context_async_sqlalchemy") as url:
        asyncio.run(create_tables(url))
        yield url


@pytest_asyncio.fixture
async def database(database_url: URL) -> AsyncGenerator[Database]:
    """Empty the tables; return a view of what is committed."""
    url = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url)
    # A test that left something open should fail, not hang.
    await connection.execute("SET lock_timeout = '10s'")
    database = Database(connection)
    if await database.backends():
        collect_connections()
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


@pytest.fixture
def postgresql(database_url: URL, database: Database) -> str:
    """Return the URL of the database, emptied, for a program."""
    return database_url.render_as_string(hide_password=False)


@pytest_asyncio.fixture
async def role_url(database_url: URL, database: Database) -> AsyncGenerator[URL]:
    """Return the URL of a role that is no superuser, as whom row level security holds."""
    name = unique_name("context_async_sqlalchemy_tenants")
    await database.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD '{name}';"
        f"GRANT CREATE ON DATABASE {database_url.database} TO {name};"
        f"GRANT CREATE ON SCHEMA public TO {name}"
    )
    yield database_url.set(username=name, password=name)
    await database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


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


@pytest.fixture
def no_pauses() -> Generator[None]:
    """Let stamina make three attempts, without a pause between them."""
    with stamina.set_testing(True, attempts=3):
        yield
