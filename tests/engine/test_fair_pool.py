"""Who has waited longest for a connection gets the next one, whoever asks in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest
from sqlalchemy import URL, AsyncAdaptedQueuePool, NullPool, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy._engine.fair_pool import _FairQueue, _Line


@pytest.fixture(params=[False, True], ids=["FIFO", "LIFO"])
async def engine(database_url: URL, request: pytest.FixtureRequest) -> AsyncGenerator[AsyncEngine]:
    async with DBConnect.from_url(
        database_url, pool_size=1, max_overflow=0, pool_timeout=5, pool_use_lifo=request.param
    ) as connect:
        await connect.ping()
        assert connect.engine is not None
        yield connect.engine


async def held_and_waited_for(
    engine: AsyncEngine, *tasks: Coroutine[Any, Any, Any]
) -> tuple[AsyncConnection, list[asyncio.Task[Any]]]:
    """Take the only connection, and let tasks wait for it."""
    held = await engine.connect()
    waiting = [asyncio.create_task(task) for task in tasks]
    for _ in range(5):
        await asyncio.sleep(0)
    return held, waiting


async def use(engine: AsyncEngine, name: str, order: list[str]) -> None:
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
        order.append(name)


async def test_who_waits_is_not_overtaken_by_who_asks_before_it_runs(engine: AsyncEngine) -> None:
    order: list[str] = []
    held, waiting = await held_and_waited_for(
        engine, use(engine, "first", order), use(engine, "second", order)
    )
    await held.close()  # without a pause
    await use(engine, "newcomer", order)
    await asyncio.gather(*waiting)
    assert order == ["first", "second", "newcomer"]


async def test_a_connection_for_one_that_was_cancelled_goes_to_the_next(
    engine: AsyncEngine,
) -> None:
    order: list[str] = []
    held, (first, second, last) = await held_and_waited_for(
        engine, *(use(engine, name, order) for name in ("first", "second", "last"))
    )
    first.cancel()  # while it waits
    await asyncio.wait([first])
    await held.close()
    second.cancel()  # when it has got the connection, and not run
    async with asyncio.timeout(5):
        await last
    assert order[-1] == "last"  # Python 3.11 may give it to the second all the same


async def test_the_pool_logs_where_sqlalchemys_does(engine: AsyncEngine) -> None:
    name = f"{AsyncAdaptedQueuePool.__module__}.{AsyncAdaptedQueuePool.__name__}"
    assert f"{type(engine.pool).__module__}.{type(engine.pool).__name__}" == name


async def test_one_that_is_cancelled_just_before_a_connection_comes_back_is_passed_over() -> None:
    queue = _FairQueue(_Line(None), 1)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    queue.put_nowait("a connection")
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert queue.get_nowait() == "a connection"


# How many may wait


def of(database: str, url: URL) -> URL | str:
    return "sqlite://" if database == "memory" else url.set(drivername=f"postgresql+{database}")


@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "memory"])
@pytest.mark.parametrize("limit", [0, 2])
async def test_whoever_would_be_one_too_many_to_wait_is_refused_at_once(
    database_url: URL, database: str, limit: int
) -> None:
    async with DBConnect.from_url(
        of(database, database_url), pool_size=1, max_overflow=0, max_waiting=limit
    ) as connect:
        await connect.ping()
        engine, order = connect.engine, list[str]()
        assert engine is not None
        waiters = (use(engine, str(number), order) for number in range(limit))
        held, waiting = await held_and_waited_for(engine, *waiters)
        for _ in range(3):
            assert connect.pool_status().waiting == limit
            async with asyncio.timeout(5):  # less than pool_timeout
                with pytest.raises(PoolTimeoutError, match=f"max_waiting is {limit}"):
                    await use(engine, "one too many", order)
        await held.close()
        await asyncio.gather(*waiting)
        assert len(order) == limit
        assert connect.pool_status().waiting == 0
        await use(engine, "later", order)


async def test_who_has_given_up_waits_no_longer(database_url: URL) -> None:
    async with DBConnect.from_url(
        database_url, pool_size=1, max_overflow=0, pool_timeout=0.05, max_waiting=1
    ) as connect:
        await connect.ping()
        engine, order = connect.engine, list[str]()
        assert engine is not None
        held, (cancelled,) = await held_and_waited_for(engine, use(engine, "cancelled", order))
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert connect.pool_status().waiting == 0
        with pytest.raises(PoolTimeoutError, match="connection timed out"):
            await use(engine, "out of time", order)
        assert connect.pool_status().waiting == 0
        await held.close()
        assert order == []


async def test_those_who_wait_for_the_pool_before_this_one_count(database_url: URL) -> None:
    async with DBConnect.from_url(
        database_url, pool_size=1, max_overflow=0, max_waiting=1
    ) as connect:
        await connect.ping()
        engine, order = connect.engine, list[str]()
        assert engine is not None
        held, waiting = await held_and_waited_for(engine, use(engine, "before", order))
        await engine.dispose(close=False)
        async with engine.connect():
            with pytest.raises(PoolTimeoutError, match="max_waiting is 1"):
                await use(engine, "one too many", order)
        await held.close()
        await asyncio.gather(*waiting)
        assert order == ["before"]


async def test_an_engine_has_a_line_of_its_own(database_url: URL) -> None:
    async with DBConnect.from_url(
        database_url, pool_size=1, max_overflow=0, max_waiting=1
    ) as connect:
        await connect.ping()
        old, order = connect.engine, list[str]()
        assert old is not None
        held, waiting = await held_and_waited_for(old, use(old, "old", order))
        await connect.connect("localhost")
        await connect.ping()
        assert connect.pool_status().waiting == 0
        await held.close()
        await asyncio.gather(*waiting)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_waiting": -1}, "max_waiting must be at least 0, not -1"),
        ({"max_waiting": "5"}, "max_waiting must be an int, not str"),
        ({"max_waiting": True}, "max_waiting must be an int, not bool"),
        ({"max_waiting": 5, "poolclass": NullPool}, "leave poolclass out"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(options: Any, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        DBConnect.from_url("postgresql://localhost/shop", **options)
