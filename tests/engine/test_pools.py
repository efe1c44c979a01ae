"""What is in a pool, and closing what has lain there for long."""

from __future__ import annotations

import asyncio
import gc
import inspect
import warnings
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import URL, Engine, NullPool, Pool, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    DBConnect,
    PoolStatus,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
)
from tests.helpers.database import Database
from tests.helpers.proxy import Call, proxy

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


@pytest.mark.parametrize("driver", [*DRIVERS, "aiosqlite"])
async def test_listeners_are_those_of_the_engine(
    database_url: URL, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SQLAlchemy knows a listener by the address of its target and of its function. dispose() gives
    # the listeners of a pool to the next one, and the address to anybody: two pools that share it
    # lose each other's registrations when the garbage collector comes meanwhile.
    targets: list[Any] = []
    listen = event.listen

    def note(target: Any, identifier: str, fn: Any, **options: Any) -> None:
        # Not SQLAlchemy's closures, nor methods: each engine has its own.
        if inspect.isfunction(fn) and fn.__module__.startswith("context_async_sqlalchemy."):
            targets.append(target)
        listen(target, identifier, fn, **options)

    monkeypatch.setattr(event, "listen", note)
    is_sqlite = driver == "aiosqlite"
    url = URL.create("sqlite", database=str(tmp_path / "a.db")) if is_sqlite else database_url
    mode: Any = True if is_sqlite else "snapshot"
    async with DBConnect.from_url(
        url.set(drivername=f"{url.drivername.split('+')[0]}+{driver}")
    ) as connect:
        for _ in range(2):
            async with new_db_session_ctx():
                await (await db_session(connect)).execute(text("SELECT 1"))
                await (await db_session(connect, read_only=mode)).execute(text("SELECT 1"))
            await connect.close()
    assert any(isinstance(target, Engine) for target in targets)
    assert not [target for target in targets if isinstance(target, Pool)]


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


async def test_a_connection_that_its_driver_has_closed_is_not_kept(database_url: URL) -> None:
    async with DBConnect.from_url(database_url, pool_size=1, max_overflow=0) as connect:
        await connect.ping()
        assert connect.engine is not None
        raw = await connect.engine.raw_connection()
        driver: Any = raw.driver_connection
        driver.terminate()  # as after a time-out that the server does not answer
        raw.close()
        assert connect.pool_status().checked_out == 0
        await connect.ping()


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


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("library", ["asyncio", "anyio"])
@pytest.mark.parametrize("whose", ["a connect's", "another one's"])
async def test_a_statement_that_is_cancelled_is_cancelled_at_the_server(
    database_url: URL, database: Database, driver: str, library: str, whose: str
) -> None:
    async def work(connect: DBConnect) -> None:
        async with new_db_session_ctx():
            session = await db_session(connect)
            if whose == "another one's":
                await session.execute(text("SELECT 1"))  # from then on, it is known
                await session.commit()
            await session.execute(text("SELECT pg_sleep(60)"))

    url = database_url.set(drivername=f"postgresql+{driver}")
    other = create_async_engine(url)

    class Routed(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return other.sync_engine

    routed = {"sync_session_class": Routed} if whose == "another one's" else {}
    async with DBConnect.from_url(url, session_options=routed) as connect:  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            task = asyncio.create_task(work(connect)) if library == "asyncio" else None
            if task is None:
                tasks.start_soon(work, connect)
            await becomes(database.is_asleep)
            # anyio's scopes cancel again at each await.
            tasks.cancel_scope.cancel() if task is None else task.cancel()
        await database.is_quiet()
    await other.dispose()
    if task is not None:
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_cancellation_at_the_server_holds_nobody_up(database_url: URL) -> None:
    is_silent = False
    silence, is_held = asyncio.Event(), asyncio.Event()

    async def hold(_: Call) -> None:
        if is_silent:
            is_held.set()
            await silence.wait()

    async def work(connect: DBConnect) -> None:
        nonlocal is_silent
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("SELECT 1"))
            is_silent = True
            await session.execute(text("SELECT 2"))

    # The proxy is on this loop: it answers nothing while something blocks the process.
    async with proxy("127.0.0.1", database_url.port or 5432, hold) as port:
        url = database_url.set(drivername="postgresql+psycopg", host="127.0.0.1", port=port)
        async with DBConnect.from_url(url) as connect:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work, connect)
                await is_held.wait()
                tasks.cancel_scope.cancel()
            silence.set()
