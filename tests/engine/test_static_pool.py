"""A pool of one connection, SQLAlchemy's StaticPool: one session at a time uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import StaticPool, event, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from context_async_sqlalchemy._engine import one_connection

MEMORY = "sqlite+aiosqlite://"
Session = async_sessionmaker[AsyncSession]


def of_a_creator(directory: Path) -> DBConnect:
    return DBConnect(lambda _: create_async_engine(MEMORY), Session, host="h")


def of_a_file(directory: Path) -> DBConnect:
    url = f"sqlite+aiosqlite:///{directory / 'a.db'}"
    return DBConnect(lambda _: create_async_engine(url, poolclass=StaticPool), Session, host="h")


def of_a_shared_engine(_: Path) -> DBConnect:
    engine = create_async_engine(MEMORY)
    return DBConnect(lambda _: engine, lambda engine: Session(engine), host="h")


def of_from_url(_: Path) -> DBConnect:
    options: dict[str, Any] = {"connect_args": {"check_same_thread": False}}
    return DBConnect.from_url("sqlite://", poolclass=StaticPool, **options)


def put_by_hand(_: Path) -> DBConnect:
    connect = DBConnect(lambda _: create_async_engine(MEMORY), Session, host="h")
    connect._engine = create_async_engine(MEMORY)
    connect._session_maker = Session(connect._engine)
    return connect


@pytest_asyncio.fixture(
    params=[of_a_creator, of_a_file, of_a_shared_engine, of_from_url, put_by_hand]
)
async def connect(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[DBConnect]:
    """Return a connect whose engine has a StaticPool, with an empty table."""
    make: Callable[[Path], DBConnect] = request.param
    async with make(tmp_path) as connect:
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("CREATE TABLE item (name TEXT)"))
            await session.commit()
        yield connect


async def names(connect: DBConnect) -> list[str]:
    async with new_non_ctx_session(connect) as session:
        return list(await session.scalars(text("SELECT name FROM item ORDER BY name")))


async def insert(session: AsyncSession, name: str) -> None:
    await session.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})


async def test_a_rollback_leaves_what_another_session_commits(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        await insert(session, "kept")

        async def write_and_roll_back() -> None:
            async with new_non_ctx_session(connect) as other:
                await insert(other, "undone")

        task = asyncio.create_task(write_and_roll_back())
        done, _ = await asyncio.wait([task], timeout=0.1)  # it can be done only by failing
        assert not done
        await session.commit()
    await task
    assert await names(connect) == ["kept"]


async def test_its_connection_is_counted_once(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        await insert(session, "a")
        task = asyncio.create_task(names(connect))
        await asyncio.wait([task], timeout=0.1)
        assert connect.pool_status().checked_out == 1
        await session.commit()
    assert await task == ["a"]
    assert connect.pool_status().checked_out == 0


async def test_who_waits_may_be_cancelled(connect: DBConnect) -> None:
    async with new_non_ctx_session(connect) as session:
        await insert(session, "a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(names(connect), 0.1)
        await session.commit()
    assert await names(connect) == ["a"]


async def test_who_waits_for_a_session_of_its_own_task_is_told(
    connect: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_connection, "TIMEOUT", 0.1)
    async with new_non_ctx_session(connect) as session:
        await insert(session, "a")
        with pytest.raises(PoolTimeoutError, match=r"StaticPool.*another session"):
            await names(connect)


async def test_it_stays_so_after_the_engine_was_disposed_of(tmp_path: Path) -> None:
    async with of_a_file(tmp_path) as connect:
        await connect.session_maker()
        assert connect.engine is not None
        await connect.engine.dispose()
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("CREATE TABLE item (name TEXT)"))
            await session.commit()
        await test_a_rollback_leaves_what_another_session_commits(connect)


async def test_a_session_in_flight_outlives_its_engine(tmp_path: Path) -> None:
    async with of_a_file(tmp_path) as connect:
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("CREATE TABLE item (name TEXT)"))
            await insert(session, "a")
            assert connect.engine is not None
            pool: Any = connect.engine.pool
            await connect.close()
            await session.commit()
        assert pool.connection.dbapi_connection is None
        assert await names(connect) == ["a"]


async def test_what_was_made_in_memory_before_is_there() -> None:
    engine = create_async_engine(MEMORY)
    attached: list[object] = []

    def attach(connection: Any, _: object) -> None:
        attached.append(connection)
        connection.execute("ATTACH ':memory:' AS other")

    event.listen(engine.sync_engine, "connect", attach)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE item (name TEXT)"))
        # Not yet returned when the connect takes the engine.
        async with DBConnect(lambda _: engine, Session, host="h") as connect:
            await connect.session_maker()
            await connection.execute(text("INSERT INTO item VALUES ('a')"))
            await connection.commit()
            await connection.close()
            assert await names(connect) == ["a"]
    assert len(attached) == 1


def test_an_engine_that_is_kept_serves_one_loop_after_the_other() -> None:
    engine = create_async_engine(MEMORY, connect_args={"timeout": 1})
    connect = DBConnect(lambda _: engine, Session, host="h")

    async def queue() -> list[None]:
        return await asyncio.gather(*(connect.ping() for _ in range(5)))

    assert asyncio.run(queue()) == [None] * 5
    assert asyncio.run(queue()) == [None] * 5
    asyncio.run(engine.dispose())
