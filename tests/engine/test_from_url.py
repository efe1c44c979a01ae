"""DBConnect.from_url: from a database URL to sessions."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, NullPool, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    on_commit,
)
from tests.helpers.asgi import add
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.names import unique_name
from tests.helpers.postgres import PASSWORD_ROLE, free_port
from tests.helpers.raw import raw_of

SECRET = "pa@ss:w/o?r#d %41 ü"


async def test_a_url_is_all_it_takes(database_url: URL, database: Database) -> None:
    url = database_url.set(drivername="postgresql").render_as_string(hide_password=False)
    async with DBConnect.from_url(url) as connect:
        assert connect.engine is None
        assert connect.host == database_url.host
        async with new_db_session_ctx():
            session = await add(connect, "a")
            item = Item(name="b")
            session.add(item)
        assert await database.names() == ["a", "b"]
        assert item.name == "b"  # not expired by the commit
    await database.is_left_by_all()


async def test_a_file_of_sqlite_is_all_it_takes(tmp_path: Path) -> None:
    async with DBConnect.from_url(f"sqlite:///{tmp_path / 'a.db'}") as connect:
        assert connect.host is None
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(text("CREATE TABLE item (name TEXT)"))
            await session.execute(text("INSERT INTO item VALUES ('a')"))
        async with new_non_ctx_session(connect) as session:
            assert await session.scalar(text("SELECT name FROM item")) == "a"
        with pytest.raises(ValueError, match="an SQLite database is a file, and has no host 'b'"):
            await connect.change_host("b")


async def test_the_password_may_be_apart_and_hold_any_character(
    database_url: URL, database: Database
) -> None:
    role = unique_name(PASSWORD_ROLE)
    await database.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
    try:
        async with DBConnect.from_url(database_url.set(username=role), SECRET) as connect:
            await connect.ping()
    finally:
        await database.execute(f"DROP ROLE {role}")


async def test_the_query_of_a_url_is_read(database_url: URL, database: Database) -> None:
    url = URL.create(
        "postgresql",
        username=database_url.username,
        host=database_url.host,
        port=database_url.port,
        database=database_url.database,
        query={"application_name": "shop", "sslmode": "prefer", "channel_binding": "prefer"},
    )
    async with (
        DBConnect.from_url(url) as connect,
        new_non_ctx_session(connect) as session,
    ):
        assert await session.scalar(text("SHOW application_name")) == "shop"


async def test_the_options_reach_the_engine_and_the_sessions(database_url: URL) -> None:
    class OurSession(AsyncSession):
        pass

    async with DBConnect.from_url(
        database_url,
        pool_size=2,
        max_overflow=1,
        isolation_level="SERIALIZABLE",
        future=True,
        session_options={
            "class_": OurSession,
            "expire_on_commit": True,
            "autocommit": False,
            "future": True,
        },
    ) as connect:
        session = await connect.create_session()
        assert isinstance(session, OurSession)
        assert session.sync_session.expire_on_commit
        level = await session.scalar(text("SHOW transaction_isolation"))
        assert level == "serializable"
        assert connect.pool_status().capacity == 3
        await session.close()


@pytest.mark.parametrize("base", [AsyncSession, Session])
async def test_a_class_whose_sessions_need_a_tenant_is_asked_for_none_at_import(base: Any) -> None:
    tenant: ContextVar[str] = ContextVar("tenant")

    class OfTenant(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.info["tenant"] = tenant.get()

    option = "class_" if base is AsyncSession else "sync_session_class"
    options: dict[str, Any] = {"session_options": {option: OfTenant}}
    connect: DBConnect = DBConnect.from_url("sqlite://", **options)
    async with connect:
        with pytest.raises(LookupError):
            await connect.create_session()
        tenant.set("acme")
        assert (await connect.create_session()).info["tenant"] == "acme"


async def test_without_options_the_defaults_of_sqlalchemy_hold(database_url: URL) -> None:
    async with DBConnect.from_url(database_url) as connect:
        await connect.ping()
        assert connect.engine is not None
        pool: Any = connect.engine.pool
        assert (pool.size(), pool._max_overflow, pool._recycle, pool._pre_ping) == (
            5,
            10,
            -1,
            False,
        )


async def test_the_host_and_its_port_can_be_changed(database_url: URL) -> None:
    url = database_url.set(host="db.invalid", port=free_port())
    async with DBConnect.from_url(url) as connect:
        await connect.change_host(f"{database_url.host}:{database_url.port}")
        await connect.ping()
        assert connect.host == f"{database_url.host}:{database_url.port}"


async def test_a_handler_may_choose_the_host(database_url: URL) -> None:
    async def handler(connect: DBConnect) -> None:
        await connect.change_host("127.0.0.1")

    url = database_url.set(host="db.invalid")
    async with DBConnect.from_url(url, before_create_session_handler=handler) as connect:
        await connect.ping()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"url": ""}, ValueError, "cannot be read"),
        ({"url": "postgresql"}, ValueError, "cannot be read"),
        ({"url": "postgresql+psycopg2://h/d"}, ValueError, "'psycopg2' is not async"),
        ({"url": "sqlite+pysqlite://"}, ValueError, "'pysqlite' is not async"),
        ({"url": "postgresql://h/d", "password": "x"}, ValueError, "no user name"),
        ({"pool_sise": 5}, TypeError, "no engine option 'pool_sise'"),
        ({"session_options": {"autoflash": 1}}, TypeError, "autoflash"),
        ({"idle_timeout": 0}, ValueError, "idle_timeout must be more than 0 seconds, not 0"),
        ({"idle_timeout": -1}, ValueError, "idle_timeout must be more than 0 seconds, not -1"),
        ({"idle_timeout": 1, "min_idle": -1}, ValueError, "min_idle must be at least 0, not -1"),
        ({"min_idle": 1}, ValueError, "min_idle needs an idle_timeout"),
        ({"url": "sqlite://", "idle_timeout": 1}, ValueError, "a database in memory ends"),
        (
            {"url": "sqlite:///file::memory:?cache=shared&uri=true", "idle_timeout": 1},
            ValueError,
            "a database in memory ends",
        ),
        (
            {"url": "sqlite:///file:x?mode=memory&uri=true", "idle_timeout": 1},
            ValueError,
            "a database in memory ends",
        ),
        ({"poolclass": NullPool, "idle_timeout": 1}, ValueError, "of no use with NullPool"),
        ({"ping_after_idle": 0}, ValueError, "ping_after_idle must be more than 0 seconds"),
        ({"pool_size": -1}, ValueError, "pool_size must be at least 0, not -1"),
        ({"before_create_session_handler": 1}, TypeError, "must be callable, not int"),
    ],
)
def test_a_mistake_is_told_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DBConnect.from_url(**{"url": "postgresql://u@h/d"} | arguments)


async def test_the_password_is_shown_nowhere(
    database_url: URL, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    role = unique_name(PASSWORD_ROLE)
    await database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'another'")
    shown: list[str] = []
    try:
        for changes in ({}, {"port": free_port()}, {"database": "missing"}):
            url = database_url.set(username=role, **changes)
            connect = DBConnect.from_url(url, SECRET, echo=True, echo_pool="debug")
            with pytest.raises((DBAPIError, OSError, Exception)) as info:
                await connect.wait_until_ready(attempts=2, delay=0)
            shown += [repr(connect), repr(connect.engine), str(info.getrepr(showlocals=False))]
            shown += [str(info.value), repr(info.value), repr(connect.pool_status())]
            await connect.close()
    finally:
        await database.execute(f"DROP ROLE {role}")
    told = "\n".join([*shown, caplog.text])
    assert "not ready (attempt 2 of 2)" in told
    for secret in (SECRET, "pa%40ss", "pa@ss"):
        assert secret not in told


@pytest.mark.parametrize(
    ("options", "is_shown"),
    [
        ({}, False),
        ({"echo": True}, True),
        ({"hide_parameters": False}, True),
        ({"echo": True, "hide_parameters": True}, False),
    ],
)
async def test_parameters_are_hidden_unless_they_are_asked_for(
    database_url: URL, caplog: pytest.LogCaptureFixture, options: dict[str, Any], is_shown: bool
) -> None:
    value = "tell" + "tale"  # a traceback shows the lines of this file

    async def fail() -> None:
        async with new_non_ctx_session(connect) as session:
            question = text("SELECT 1 FROM missing WHERE name = :name")
            await session.execute(question, {"name": value})

    async with DBConnect.from_url(database_url, **options) as connect:
        with pytest.raises(DBAPIError) as caught:
            await fail()
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(text("SELECT 1"))
            on_commit(connect, fail)  # whose error is logged
    assert "missing" in caplog.text
    assert (value in caplog.text) is is_shown
    assert (value in str(caught.value)) is is_shown
    assert value in str(caught.value.params)


async def test_null_pool_is_counted_too(database_url: URL) -> None:
    async with DBConnect.from_url(database_url, poolclass=NullPool) as connect:
        assert connect.pool_status().checked_out == 0
        async with new_non_ctx_session(connect) as session:
            await session.connection()
            assert connect.pool_status().checked_out == 1
        assert connect.pool_status().checked_out == 0


async def test_a_rebooted_pool_loses_no_request_to_a_hot_connection(
    database_url: URL, database: Database
) -> None:
    async with DBConnect.from_url(database_url, pool_pre_ping=True) as connect:
        async with AsyncExitStack() as stack:
            new_session = partial(new_non_ctx_session, connect)
            sessions = [await stack.enter_async_context(new_session()) for _ in range(5)]
            drivers = [await raw_of(session) for session in sessions]
        for pid in await database.backends():
            await database.terminate(pid)
        # Between the last message of the server and the end of the connection, asyncpg answers
        # with an error by which SQLAlchemy's ping does not know that it is lost.
        async with asyncio.timeout(30):
            while not all(driver.is_closed() for driver in drivers):
                await asyncio.sleep(0.001)
        await connect.ping()
