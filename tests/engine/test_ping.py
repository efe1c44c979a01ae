"""Ping only what was idle: no round trip for the busy, no dead connection for anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine

from context_async_sqlalchemy._engine.from_url import create_engine
from context_async_sqlalchemy._engine.url import parse_url
from tests.helpers.database import LOST, Database
from tests.helpers.proxy import Call, Fault, proxy

PING = "SELECT 1"


class Wire:
    """What is sent to the server, and what becomes of a ping.

    Attributes:
        statements: What was sent since the list was last cleared.
        ping_fault: How each ping fails; None to let it through.
        ping_sent: Set when a ping arrives.
        ping_goes_on: While it is clear, a ping waits for it.
    """

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.ping_fault: Fault | None = None
        self.ping_sent = asyncio.Event()
        self.ping_goes_on = asyncio.Event()
        self.ping_goes_on.set()

    async def decide(self, call: Call) -> Fault | None:
        self.statements.append(call.statement)
        if call.statement != PING:
            return None
        self.ping_sent.set()
        await self.ping_goes_on.wait()
        return self.ping_fault


@asynccontextmanager
async def watched_engine(url: URL, **options: Any) -> AsyncGenerator[tuple[AsyncEngine, Wire]]:
    wire = Wire()
    assert url.host is not None
    assert url.port is not None
    async with (
        proxy(url.host, url.port, wire.decide) as port,
        pinging_engine(url.set(host="127.0.0.1", port=port), **options) as engine,
    ):
        yield engine, wire


@asynccontextmanager
async def pinging_engine(url: URL, **options: Any) -> AsyncGenerator[AsyncEngine]:
    engine = create_engine(parse_url(url), **{"pool_pre_ping": True} | options)
    yield engine
    assert checked_out(engine) == 0, "a connection is still out of the pool"
    await engine.dispose()


async def request(engine: AsyncEngine) -> int:
    """Read something, and return the server process that did it."""
    async with engine.begin() as connection:
        pid: int = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        return pid


async def fill(engine: AsyncEngine, count: int) -> list[int]:
    """Open connections, all of which go back to the pool; return their server processes."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(engine.connect()) for _ in range(count)]
        query = text("SELECT pg_backend_pid()")
        return [(await connection.execute(query)).scalar_one() for connection in connections]


async def is_noticed(engine: AsyncEngine, count: int) -> None:
    """Wait until asyncpg has heard the server hang up on this many connections in the pool."""
    pool: Any = engine.pool
    async with asyncio.timeout(5):
        while count > sum(r.driver_connection.is_closed() for r in pool._pool._queue._queue):
            await asyncio.sleep(0.001)


def checked_out(engine: AsyncEngine) -> int:
    pool: Any = engine.pool
    count: int = pool.checkedout()
    return count


async def test_a_busy_connection_costs_no_more_round_trips_than_without_a_ping(
    database_url: URL,
) -> None:
    sent = []
    for pings in (False, True):
        options = {"pool_pre_ping": pings, "ping_after_idle": 60}
        async with watched_engine(database_url, **options) as (engine, wire):
            await request(engine)
            wire.statements.clear()
            for _ in range(3):
                await request(engine)
            sent.append(wire.statements.copy())
    assert sent[0] == sent[1]
    assert len(sent[0]) < 15


async def test_a_connection_is_pinged_when_it_was_idle_for_longer(database_url: URL) -> None:
    async with watched_engine(database_url, ping_after_idle=0.02) as (engine, wire):
        pid = await request(engine)
        assert PING not in wire.statements, "a fresh one"
        await asyncio.sleep(0.03)
        wire.statements.clear()
        assert await request(engine) == pid
        assert wire.statements == [PING, "BEGIN;", "SELECT pg_backend_pid()", "COMMIT;"]


@pytest.mark.parametrize("options", [{}, {"pool_pre_ping": False}])
async def test_nothing_is_pinged_unless_asked_for(
    database_url: URL, options: dict[str, Any]
) -> None:
    wire = Wire()
    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, wire.decide) as port:
        url = parse_url(database_url.set(host="127.0.0.1", port=port))
        engine = create_engine(url, ping_after_idle=0.001, **options)
        await request(engine)
        await asyncio.sleep(0.002)
        await request(engine)
        await engine.dispose()
    assert PING not in wire.statements


async def test_one_dead_connection_makes_the_pool_replace_all_of_them(database_url: URL) -> None:
    async with watched_engine(database_url, ping_after_idle=0.01) as (engine, wire):
        before = await fill(engine, 3)
        await asyncio.sleep(0.02)
        wire.statements.clear()
        wire.ping_fault = Fault.LOST_BEFORE

        after = await fill(engine, 3)

        assert not set(before) & set(after)
        assert wire.statements.count(PING) == 1, "one was enough"
        assert wire.statements.count("connect") == 3


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("pings", [True, False])
async def test_the_first_request_after_the_server_hung_up_succeeds(
    database_url: URL, database: Database, driver: str, pings: bool
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with pinging_engine(url, pool_pre_ping=pings, ping_after_idle=0.01) as engine:
        for pid in await fill(engine, 2):
            await database.terminate(pid)
        await asyncio.sleep(0.02)
        if not pings:  # it is the ping that makes the difference
            with pytest.raises(LOST):
                await request(engine)
            return
        for _ in range(3):
            await request(engine)


async def test_asyncpg_knows_of_a_closed_connection_before_it_is_pinged(
    database_url: URL, database: Database
) -> None:
    async with watched_engine(database_url, ping_after_idle=60) as (engine, wire):
        for pid in await fill(engine, 2):
            await database.terminate(pid)
        await is_noticed(engine, 2)
        await fill(engine, 2)
        assert PING not in wire.statements


async def test_a_cancelled_ping_of_a_silent_server_ends_with_the_pool_whole(
    database_url: URL,
) -> None:
    async with watched_engine(database_url, ping_after_idle=0.01, pool_size=1) as (engine, wire):
        pid = await request(engine)
        await asyncio.sleep(0.02)
        wire.ping_goes_on.clear()
        task = asyncio.create_task(request(engine))
        await wire.ping_sent.wait()

        task.cancel()
        await asyncio.wait([task], timeout=1.5)
        assert task.cancelled()

        assert checked_out(engine) == 0
        wire.ping_goes_on.set()
        assert await request(engine) != pid, "nobody knows what is still on its way in it"


async def test_a_connection_that_answers_a_ping_with_an_error_is_replaced(
    database_url: URL,
) -> None:
    async with watched_engine(database_url, ping_after_idle=0.01) as (engine, wire):
        pid = await request(engine)
        await asyncio.sleep(0.02)
        wire.ping_fault = Fault.ERROR
        assert await request(engine) != pid


async def test_the_time_of_a_connection_is_that_of_its_last_use(database_url: URL) -> None:
    async with watched_engine(database_url, ping_after_idle=0.5) as (engine, wire):
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.7
        gaps = [0.0]
        while loop.time() < end:
            before = loop.time()
            await request(engine)
            await asyncio.sleep(0.01)
            gaps.append(loop.time() - before)
        if max(gaps) < 0.5:  # the machine was not too busy to tell
            assert PING not in wire.statements


async def test_the_ping_survives_dispose(database_url: URL, database: Database) -> None:
    async with pinging_engine(database_url, ping_after_idle=0.01) as engine:
        await request(engine)
        await engine.dispose()
        await database.terminate(await request(engine))
        await asyncio.sleep(0.02)
        await request(engine)


async def test_a_sqlite_connection_is_pinged_too() -> None:
    engine = create_engine(parse_url("sqlite://"), pool_pre_ping=True, ping_after_idle=0.001)
    for _ in range(2):
        async with engine.begin() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        await asyncio.sleep(0.002)
    await engine.dispose()
