"""Each event loop has an engine of its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, text

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from tests.helpers.database import Database, make_connect
from tests.helpers.mocks import Creators


def test_another_event_loop_gets_an_engine_of_its_own(database_url: URL) -> None:
    connect = make_connect(database_url)

    async def select_one() -> object:
        async with new_non_ctx_session(connect) as session:
            return await session.scalar(text("SELECT 1"))

    with warnings.catch_warnings():
        # asyncpg warns of the connections that went down with the first loop.
        warnings.simplefilter("ignore", ResourceWarning)
        assert asyncio.run(select_one()) == 1
        assert asyncio.run(select_one()) == 1
        asyncio.run(connect.close())
        gc.collect()


async def test_two_loops_at_the_same_time_keep_their_engines_until_both_are_closed(
    database_url: URL, database: Database
) -> None:
    connect, closed = make_connect(database_url), threading.Event()
    pids: dict[str, set[int]] = {"here": set(), "there": set()}
    engines: dict[str, set[Any]] = {"here": set(), "there": set()}
    turns = [threading.Event() for _ in range(2)]

    async def use(place: str) -> None:
        async with new_non_ctx_session(connect) as session:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            assert pid is not None
            pids[place].add(pid)
            engines[place].add(connect.engine)

    async def there() -> None:
        for _ in range(5):
            await use("there")
            turns[0].set()
            await asyncio.to_thread(turns[1].wait, 10)
            turns[1].clear()
        while not closed.is_set():
            await asyncio.sleep(0.001)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
    for _ in range(5):
        await asyncio.to_thread(turns[0].wait, 10)
        turns[0].clear()
        await use("here")
        turns[1].set()
    assert len(pids["here"]) == len(pids["there"]) == 1
    assert len(engines["here"]) == len(engines["there"]) == 1
    assert engines["here"] != engines["there"]
    assert await database.connections() == 2

    await connect.close()  # each in its own loop
    async with asyncio.timeout(30):
        while await database.connections():
            await asyncio.sleep(0.001)
    closed.set()
    await thread


async def test_engines_of_two_loops_that_fail_to_close_are_both_heard_of(
    creators: Creators, caplog: pytest.LogCaptureFixture
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    closed, made = threading.Event(), threading.Event()

    async def there() -> None:
        await connect.create_session()
        creators.engines["a"][0].dispose.side_effect = OSError("no route there")
        made.set()
        await asyncio.to_thread(closed.wait, 10)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
    await asyncio.to_thread(made.wait, 10)
    await connect.create_session()
    creators.engines["a"][1].dispose.side_effect = OSError("no route here")
    with pytest.raises(OSError, match="no route here"):
        await connect.close()
    async with asyncio.timeout(30):
        while "no route there" not in caplog.text:
            await asyncio.sleep(0.001)
    closed.set()
    await thread


async def test_who_closes_a_connect_waits_for_what_another_loop_has_begun_to_close(
    creators: Creators,
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    made, began, ended = threading.Event(), threading.Event(), threading.Event()

    async def dispose() -> None:
        began.set()
        await asyncio.sleep(0.1)
        ended.set()

    async def there() -> None:
        await connect.create_session()
        creators.engines["a"][0].dispose.side_effect = dispose
        made.set()
        async with asyncio.timeout(10):
            while not began.is_set():
                await asyncio.sleep(0.001)
        await connect.close()
        assert ended.is_set()

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, there()))
    await asyncio.to_thread(made.wait, 10)
    await connect.close()
    await thread


@pytest.mark.parametrize("drivername", ["postgresql+asyncpg", "postgresql+psycopg", "sqlite"])
async def test_who_closes_a_connect_waits_for_a_connection_that_has_come_back_meanwhile(
    database_url: URL, tmp_path: Path, drivername: str
) -> None:
    url = database_url.set(drivername=drivername)
    connect = DBConnect.from_url(f"sqlite:///{tmp_path}/a" if drivername == "sqlite" else url)
    async with new_non_ctx_session(connect) as session:
        await session.execute(text("SELECT 1"))
        await connect.close()
    # A loop that ends in the middle of it would leave the connection open.
    await connect.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
