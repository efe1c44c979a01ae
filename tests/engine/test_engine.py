"""An engine from a URL: the driver, the options, SQLite as its documentation says, no password."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy
from sqlalchemy import URL, NullPool, make_url, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from context_async_sqlalchemy._engine.from_url import create_engine
from context_async_sqlalchemy._engine.options import EngineOptions
from context_async_sqlalchemy._engine.url import parse_url
from tests.helpers.database import Database
from tests.helpers.names import unique_name
from tests.helpers.postgres import PASSWORD_ROLE, free_port

# Not in one piece: a traceback shows the lines of this file.
SECRET = "tell" + "tale"
ODD_PASSWORD = " @:/?#&=%40+[]'\"\\ ü☃ %"


@asynccontextmanager
async def engine_for(url: URL | str, **options: Any) -> AsyncGenerator[AsyncEngine]:
    engine = create_engine(parse_url(url), **options)
    try:
        yield engine
    finally:
        await engine.dispose()


async def run(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def fetch(engine: AsyncEngine, query: str) -> list[Any]:
    async with engine.begin() as connection:
        return list((await connection.scalars(text(query))).all())


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


# The URL.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgresql://u@h/db", "postgresql+asyncpg"),
        ("postgres://u@h/db", "postgresql+asyncpg"),
        ("postgres+psycopg://u@h/db", "postgresql+psycopg"),
        ("postgresql+psycopg://u@h/db", "postgresql+psycopg"),
        ("sqlite://", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite://", "sqlite+aiosqlite"),
        ("mysql://u@h/db", "mysql+asyncmy"),
        ("mariadb://u@h/db", "mariadb+asyncmy"),
        ("mysql+aiomysql://u@h/db", "mysql+aiomysql"),
        ("mssql+aioodbc://u@h/db", "mssql+aioodbc"),
    ],
)
def test_the_async_driver_is_chosen_or_kept(given: str, expected: str) -> None:
    assert parse_url(given).drivername == expected
    assert parse_url(make_url(given)).drivername == expected


@pytest.mark.parametrize(
    ("drivername", "driver", "proposal"),
    [
        ("postgresql+psycopg2", "psycopg2", "postgresql+asyncpg"),
        ("sqlite+pysqlite", "pysqlite", "sqlite+aiosqlite"),
        ("mysql+pymysql", "pymysql", "mysql+asyncmy"),
        ("mssql", "pyodbc", "an async one"),
    ],
)
def test_a_sync_driver_is_refused_by_name(drivername: str, driver: str, proposal: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{driver}' is not async.*{re.escape(proposal)}"
    ) as caught:
        parse_url(f"{drivername}://u:{SECRET}@h/db")
    assert SECRET not in told(caught.value)


def test_an_unknown_driver_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'postgresql\+nosuch'"):
        parse_url("postgresql+nosuch://u@h/db")


def test_the_password_apart_is_taken_as_it_is_and_wins() -> None:
    assert parse_url("postgresql://u@h/db", ODD_PASSWORD).password == ODD_PASSWORD
    assert parse_url("postgresql://u:other@h/db", "a%40b").password == "a%40b"
    assert parse_url("postgresql://u:own%40@h/db", "").password == "own@"
    assert parse_url("postgresql://u:own@h/db").password == "own"


@pytest.mark.parametrize("url", ["postgresql://h/db", "sqlite://", f"postgresql://:{SECRET}@h/db"])
def test_a_password_without_a_user_name_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no user name") as caught:
        parse_url(url, SECRET)
    assert SECRET not in told(caught.value)


def test_a_password_in_the_query_is_hidden_as_one_before_the_host() -> None:
    url = parse_url(f"postgresql://h/db?user=u&password={SECRET}&sslmode=require")
    assert (url.username, url.password) == ("u", SECRET)
    assert SECRET not in repr(url)
    assert dict(url.query) == {"sslmode": "require"}


@pytest.mark.parametrize(
    "url",
    [
        "",
        f"nonsense {SECRET}",
        f"u:{SECRET}@h/db",
        f"postgresql://h:{SECRET}/db",  # where the port should be
        f"postgresql://u:a@{SECRET}@h/db",  # SQLAlchemy: the host is `telltale@h`
        f"postgresql://u:a@b/{SECRET}@h/db",
        f"postgresql://u:a@b?{SECRET}@h/db?sslmode=require",
    ],
)
def test_a_url_that_cannot_be_read_is_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="the database URL") as caught:
        parse_url(url)
    assert SECRET not in told(caught.value)
    assert caught.value.__context__ is None  # which whoever reports errors may have a look at


def test_an_at_sign_elsewhere_is_fine() -> None:
    assert parse_url("postgresql://u:p@h/db?application_name=a@b").host == "h"
    assert parse_url("sqlite:///a@b@c.db").database == "a@b@c.db"


def test_what_is_no_url_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not bytes"):
        parse_url(SECRET.encode())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        parse_url("postgresql://u@h/db", 5)  # type: ignore[arg-type]


# The options.

VALUES: dict[str, Any] = {
    "async_creator": lambda: None,
    "connect_args": {"timeout": 3},
    "echo": False,
    "echo_pool": False,
    "enable_from_linting": False,
    "execution_options": {"yield_per": 5},
    "future": True,
    "hide_parameters": True,
    "insertmanyvalues_page_size": 10,
    "isolation_level": "SERIALIZABLE",
    "json_deserializer": lambda value: value,
    "json_serializer": str,
    "label_length": 20,
    "logging_name": "name",
    "max_identifier_length": 50,
    "max_overflow": -1,
    "native_inet_types": True,
    "plugins": [],
    "pool_logging_name": "name",
    "pool_pre_ping": True,
    "pool_recycle": 60,
    "pool_reset_on_return": None,
    "pool_size": 0,
    "pool_timeout": 0.5,
    "pool_use_lifo": True,
    "poolclass": NullPool,
    "query_cache_size": 10,
    "skip_autocommit_rollback": True,
    "use_insertmanyvalues": False,
}


def test_sqlalchemy_knows_every_option_that_is_listed() -> None:
    assert VALUES.keys() == EngineOptions.__optional_keys__
    url = parse_url("postgresql://u@h/db")
    for name, value in VALUES.items():
        if name == "skip_autocommit_rollback" and sqlalchemy.__version__ < "2.0.43":
            continue
        create_engine(url, **{name: value})


def test_an_option_arrives_and_none_is_made_up() -> None:
    url = parse_url("postgresql://u@h/db")
    chosen = create_engine(url, pool_size=3, max_overflow=1, hide_parameters=True)
    plain = create_engine(url)
    its_own = create_async_engine(url)

    pool: Any = chosen.pool
    assert (pool.size(), pool._max_overflow, chosen.sync_engine.hide_parameters) == (3, 1, True)
    assert plain.pool.status() == its_own.pool.status()
    assert isinstance(plain.pool, type(its_own.pool))


def test_an_unknown_option_is_refused_by_name() -> None:
    # mypy sees it, too: without an error here, it would report the ignore.
    with pytest.raises(TypeError, match="no engine option 'pool_szie'") as caught:
        create_engine(parse_url("postgresql://u@h/db", SECRET), pool_szie=5)  # type: ignore[call-arg]
    assert SECRET not in told(caught.value)
    # SQLAlchemy has this one, which would make the URL a lie, and the driver a sync one.
    with pytest.raises(TypeError, match="no engine option 'creator'"):
        create_engine(parse_url("postgresql://u@h/db"), creator=object)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_size", -1),
        ("max_overflow", -2),
        ("pool_timeout", -0.1),
        ("pool_timeout", float("nan")),
        ("pool_recycle", -2),
        ("ping_after_idle", 0),
        ("ping_after_idle", -1),
        ("ping_after_idle", float("nan")),
    ],
)
def test_an_option_without_sense_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, not {value}"):
        create_engine(parse_url("postgresql://u@h/db"), **{name: value})  # type: ignore[arg-type]


def test_a_number_as_the_environment_has_it_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="pool_size must be a number, not str"):
        create_engine(parse_url("postgresql://u@h/db"), pool_size="5")  # type: ignore[arg-type]


# SQLite.


@pytest_asyncio.fixture(params=["file", "memory"])
async def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[AsyncEngine]:
    """Return an engine for a SQLite database with an empty table."""
    url = "sqlite://" if request.param == "memory" else file_url(tmp_path)
    async with engine_for(url) as engine:
        await run(engine, "CREATE TABLE item (name TEXT)")
        yield engine


def file_url(directory: Path) -> str:
    return f"sqlite:///{directory / 'test.db'}"


async def test_sqlite_rolls_back_ddl(sqlite: AsyncEngine) -> None:
    async with sqlite.connect() as connection:
        await connection.execute(text("CREATE TABLE other (name TEXT)"))
        await connection.rollback()
    assert await fetch(sqlite, "SELECT name FROM sqlite_master") == ["item"]


async def test_sqlite_rolls_back_a_savepoint_alone(sqlite: AsyncEngine) -> None:
    async with sqlite.begin() as connection:
        await connection.execute(text("INSERT INTO item VALUES ('kept')"))
        async with connection.begin_nested() as savepoint:
            await connection.execute(text("INSERT INTO item VALUES ('undone')"))
            await savepoint.rollback()
    assert await fetch(sqlite, "SELECT name FROM item") == ["kept"]


async def test_sqlite_rolls_back_a_savepoint_with_its_transaction(sqlite: AsyncEngine) -> None:
    async with sqlite.connect() as connection:
        # The driver by itself would not begin before SAVEPOINT, whose RELEASE then commits.
        async with connection.begin_nested():
            await connection.execute(text("INSERT INTO item VALUES ('undone')"))
        await connection.rollback()
    assert await fetch(sqlite, "SELECT name FROM item") == []


async def test_sqlite_reads_the_same_twice_in_a_transaction(tmp_path: Path) -> None:
    async with (
        engine_for(file_url(tmp_path)) as engine,
        engine_for(file_url(tmp_path), connect_args={"timeout": 0}) as impatient,
    ):
        await run(engine, "CREATE TABLE item (name TEXT)")
        async with engine.connect() as connection:
            await connection.execute(text("SELECT * FROM item"))
            with pytest.raises(OperationalError, match="locked"):
                await run(impatient, "INSERT INTO item VALUES ('in between')")


async def test_sqlite_enforces_foreign_keys(sqlite: AsyncEngine) -> None:
    await run(
        sqlite,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY)",
        "CREATE TABLE child (parent INTEGER REFERENCES parent (id))",
    )
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        await run(sqlite, "INSERT INTO child VALUES (1)")


async def test_sqlite_writers_wait_for_each_other(sqlite: AsyncEngine) -> None:
    async with sqlite.begin() as connection:
        await connection.execute(text("INSERT INTO item VALUES ('first')"))
        second = asyncio.create_task(run(sqlite, "INSERT INTO item VALUES ('second')"))
        # It can be done only by failing.
        done, _ = await asyncio.wait([second], timeout=0.2)
        assert not done
    await second
    assert await fetch(sqlite, "SELECT name FROM item") == ["first", "second"]


async def test_sqlite_waits_as_long_as_the_user_says(tmp_path: Path) -> None:
    async with (
        engine_for(file_url(tmp_path)) as engine,
        engine_for(file_url(tmp_path), connect_args={"timeout": 0}) as impatient,
    ):
        await run(engine, "CREATE TABLE item (name TEXT)")
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES ('first')"))
            with pytest.raises(OperationalError, match="locked"):
                await asyncio.wait_for(run(impatient, "INSERT INTO item VALUES ('second')"), 4)


async def test_sqlite_readers_who_write_wait_with_an_immediate_transaction(tmp_path: Path) -> None:
    url = file_url(tmp_path)
    async with engine_for(url, connect_args={"isolation_level": "IMMEDIATE"}) as engine:
        await run(engine, "CREATE TABLE counter (n INTEGER)", "INSERT INTO counter VALUES (0)")

        async def count() -> None:
            async with engine.begin() as connection:
                n = await connection.scalar(text("SELECT n FROM counter"))
                await asyncio.sleep(0)  # the others' turn
                await connection.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

        await asyncio.gather(*(count() for _ in range(5)))
        assert await fetch(engine, "SELECT n FROM counter") == [5]


async def test_sqlite_autocommit_of_the_engine_commits_each_statement(tmp_path: Path) -> None:
    async with (
        engine_for(file_url(tmp_path), isolation_level="AUTOCOMMIT") as engine,
        engine.connect() as connection,
    ):
        await connection.execute(text("CREATE TABLE item (name TEXT)"))
        assert await fetch(engine, "SELECT name FROM sqlite_master") == ["item"]


async def test_sqlite_autocommit_of_a_connection_ends_with_it(sqlite: AsyncEngine) -> None:
    async with sqlite.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("INSERT INTO item VALUES ('kept')"))
        await connection.rollback()
    async with sqlite.connect() as connection:
        await connection.execute(text("CREATE TABLE undone (name TEXT)"))
        await connection.rollback()
    assert await fetch(sqlite, "SELECT name FROM item") == ["kept"]
    assert await fetch(sqlite, "SELECT name FROM sqlite_master") == ["item"]


async def test_a_database_in_memory_is_one_whatever_the_size_of_the_pool() -> None:
    async with engine_for("sqlite://", pool_size=20, max_overflow=10, pool_recycle=0) as engine:
        await run(engine, "CREATE TABLE item (name TEXT)")
        writes = (run(engine, f"INSERT INTO item VALUES ('{i}')") for i in range(5))
        await asyncio.gather(*writes)
        assert len(await fetch(engine, "SELECT name FROM item")) == 5


async def test_a_rollback_in_memory_leaves_what_others_wrote(sqlite: AsyncEngine) -> None:
    async def insert(name: str, end: Callable[[Any], Awaitable[None]]) -> None:
        async with sqlite.connect() as connection:
            await connection.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})
            await asyncio.sleep(0)  # the other's turn
            await end(connection)

    await asyncio.gather(
        insert("kept", lambda connection: connection.commit()),
        insert("undone", lambda connection: connection.rollback()),
    )
    assert await fetch(sqlite, "SELECT name FROM item") == ["kept"]


async def test_a_poolclass_of_the_users_own_is_used_in_memory() -> None:
    async with engine_for("sqlite://", poolclass=NullPool) as engine:
        assert isinstance(engine.pool, NullPool)


def test_sqlite_refuses_the_drivers_other_way_to_begin() -> None:
    with pytest.raises(ValueError, match="isolation_level='AUTOCOMMIT'"):
        create_engine(parse_url("sqlite://"), connect_args={"autocommit": False})


# The password.


@pytest_asyncio.fixture
async def role(database: Database) -> AsyncGenerator[str]:
    """Return the name of a role that has the odd password."""
    name = unique_name(PASSWORD_ROLE)
    quoted = ODD_PASSWORD.replace("'", "''")
    await database.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{quoted}'")
    yield name
    await database.execute(f"DROP ROLE {name}")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_the_password_may_hold_any_character(
    database_url: URL, role: str, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}", username=role)
    async with engine_for(parse_url(url, ODD_PASSWORD)) as engine:
        assert await fetch(engine, "SELECT current_user") == [role]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_wrong_password_is_not_shown(
    database_url: URL,
    role: str,
    driver: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Where it has no handler, `echo` adds one to it, for good.
    monkeypatch.setattr(logging.getLogger("sqlalchemy"), "handlers", [logging.NullHandler()])
    caplog.set_level(logging.DEBUG)
    url = parse_url(database_url.set(drivername=f"postgresql+{driver}", username=role), SECRET)
    async with engine_for(url, echo="debug", echo_pool="debug") as engine:
        with pytest.raises(Exception, match="password authentication failed") as caught:
            await fetch(engine, "SELECT 1")
        assert SECRET not in told(caught.value) + repr(engine) + repr(engine.sync_engine)
    assert "Error on connect" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_connection_that_is_refused_shows_no_password(
    driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"postgresql+{driver}://u:{SECRET}@127.0.0.1:{free_port()}/db"
    async with engine_for(url) as engine:
        with pytest.raises(Exception, match=r"refused|Connect call failed") as caught:
            await fetch(engine, "SELECT 1")
    assert SECRET not in told(caught.value)
    assert SECRET not in caplog.text


async def test_no_password_is_logged_where_all_goes_well(
    database_url: URL,
    role: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("sqlalchemy"), "handlers", [logging.NullHandler()])
    caplog.set_level(logging.DEBUG)
    url = parse_url(database_url.set(username=role), ODD_PASSWORD)
    async with engine_for(url, echo="debug", echo_pool="debug") as engine:
        await fetch(engine, "SELECT 1")
    assert "SELECT 1" in caplog.text
    assert "Created new connection" in caplog.text
    assert "☃" not in caplog.text
