"""What is in a pool, and closing what has lain there for long."""

from __future__ import annotations

import asyncio
import gc
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, NullPool, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import DBConnect, PoolStatus, new_non_ctx_session
from tests.helpers.database import Database

DRIVERS = ["asyncpg", "psycopg"]


@asynccontextmanager
async def in_use(connect: DBConnect, count: int) -> AsyncGenerator[list[AsyncSession]]:
    """Hold `count` connections."""
    async with AsyncExitStack() as stack:
        sessions = []
        for _ in range(count):
            session = await stack.enter_async_context(new_non_ctx_session(connect))
            await session.connection()
            sessions.append(session)
        yield sessions


async def becomes(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            result = condition()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.001)


async def test_a_pool_is_counted(database_url: URL) -> None:
    async with DBConnect.from_url(database_url, pool_size=2, max_overflow=1) as connect:
        assert connect.pool_status() == PoolStatus(0, 0, 0, 0, None)
        async with in_use(connect, 1):
            assert connect.pool_status() == PoolStatus(2, 0, 1, 0, 3)
            async with in_use(connect, 2):
                assert connect.pool_status() == PoolStatus(2, 0, 3, 1, 3)
        assert connect.pool_status() == PoolStatus(2, 2, 0, 0, 3)
    assert connect.pool_status() == PoolStatus(0, 0, 0, 0, None)


async def test_a_pool_without_a_limit_says_so(database_url: URL) -> None:
    for options in ({"max_overflow": -1}, {"pool_size": 0}):
        connect = DBConnect.from_url(database_url, **options)  # type: ignore[arg-type]
        async with connect, in_use(connect, 7):
            assert connect.pool_status().capacity is None
            assert connect.pool_status().checked_out == 7


@pytest.mark.parametrize("driver", DRIVERS)
async def test_idle_connections_are_closed_but_for_a_few(
    database_url: URL, database: Database, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with DBConnect.from_url(url, idle_timeout=0.05, min_idle=1) as connect:
        async with in_use(connect, 4):
            assert connect.pool_status().checked_out == 4
        assert connect.pool_status().checked_in == 4

        async def one_is_left() -> bool:
            return await database.connections() == 1

        await becomes(one_is_left)
        assert connect.pool_status() == PoolStatus(5, 1, 0, 0, 15)
        async with in_use(connect, 3) as sessions:
            for session in sessions:
                assert await session.scalar(text("SELECT 1")) == 1
            assert await database.connections() == 3
    await database.is_left_by_all()


async def test_idle_connections_of_sqlite_are_closed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    async with DBConnect.from_url(url, idle_timeout=0.01) as connect:
        async with in_use(connect, 2):
            pass
        await becomes(lambda: connect.pool_status().checked_in == 0)
        await connect.ping()


async def test_a_connection_in_use_is_never_closed(database_url: URL, database: Database) -> None:
    connect = DBConnect.from_url(database_url, idle_timeout=0.01)
    async with connect, in_use(connect, 2) as sessions:
        pids = [await session.scalar(text("SELECT pg_backend_pid()")) for session in sessions]
        async with in_use(connect, 2):
            pass

        async def two_are_left() -> bool:
            return sorted(await database.backends()) == sorted(filter(None, pids))

        await becomes(two_are_left)
        for session in sessions:
            assert await session.scalar(text("SELECT 1")) == 1


async def test_a_connection_is_not_handed_out_while_it_is_closed(
    database_url: URL, database: Database
) -> None:
    """Take connections at the moment at which others are closed, again and again."""
    async with DBConnect.from_url(database_url, idle_timeout=0.001, pool_size=5) as connect:

        async def use() -> None:
            for pause in (0, 0.0005, 0.001, 0.0015, 0.002) * 20:
                async with new_non_ctx_session(connect) as session:
                    assert await session.scalar(text("SELECT 1")) == 1
                await asyncio.sleep(pause)

        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(use())
        assert connect.pool_status().checked_out == 0


async def test_a_busy_pool_keeps_what_is_used(database_url: URL, database: Database) -> None:
    async with DBConnect.from_url(database_url, idle_timeout=0.2) as connect:
        async with in_use(connect, 3):
            pass

        async def one_is_left() -> bool:
            await connect.ping()  # the last one that was returned, again and again
            return await database.connections() == 1

        await becomes(one_is_left)
        [pid] = await database.backends()
        await connect.ping()
        assert await database.backends() == [pid]


@pytest.mark.parametrize("end", ["close", "change_host"])
async def test_a_connect_that_is_closed_leaves_no_task_and_no_timer(
    database_url: URL, database: Database, end: str
) -> None:
    tasks = asyncio.all_tasks()
    loop: Any = asyncio.get_running_loop()
    connect = DBConnect.from_url(database_url, idle_timeout=60)
    async with in_use(connect, 3):
        pass
    assert [h for h in loop._scheduled if not h.cancelled()]
    if end == "change_host":
        await connect.change_host("localhost")
        await database.is_left_by_all()
    else:
        await connect.close()
    gc.collect()
    assert asyncio.all_tasks() == tasks
    assert not [h for h in loop._scheduled if not h.cancelled() and "_close_expired" in repr(h)]
    await connect.close()


def test_the_connections_of_loops_that_have_ended_are_not_kept(database_url: URL) -> None:
    connect = DBConnect.from_url(database_url, idle_timeout=60)
    engines = weakref.WeakSet[Any]()

    async def use() -> None:
        await connect.ping()
        engines.add(connect.engine)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nobody has closed them
        for _ in range(5):
            asyncio.run(use())
        asyncio.run(connect.close())
        gc.collect()
    assert len(engines) <= 1


async def test_a_session_that_comes_back_after_the_end_starts_no_timer(
    database_url: URL, database: Database
) -> None:
    connect = DBConnect.from_url(database_url, idle_timeout=60)
    async with in_use(connect, 1):
        await connect.close()
    loop: Any = asyncio.get_running_loop()
    assert not [h for h in loop._scheduled if not h.cancelled() and "_close_expired" in repr(h)]
    await database.is_left_by_all()


async def test_a_detached_connection_is_in_use_no_longer(database_url: URL) -> None:
    async with DBConnect.from_url(database_url, poolclass=NullPool) as connect:
        await connect.ping()
        assert connect.engine is not None
        raw = await connect.engine.raw_connection()
        assert connect.pool_status().checked_out == 1
        driver = raw.driver_connection
        raw.detach()
        assert connect.pool_status().checked_out == 0
        assert driver is not None
        await driver.close()


async def test_the_copies_of_an_engine_are_counted_together(database_url: URL) -> None:
    base = create_async_engine(database_url, poolclass=NullPool)
    connect = DBConnect(
        lambda _: base.execution_options(compiled_cache=None), async_sessionmaker, host="a"
    )
    async with connect:
        async with in_use(connect, 1):
            await connect.connect("b")
            gc.collect()  # the copy that is used no longer
            assert connect.pool_status().checked_out == 1
        assert connect.pool_status().checked_out == 0
