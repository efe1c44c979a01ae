"""The program of the how-to page on concurrent queries, run, and what waits for what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.exc import (
    OperationalError,
    TimeoutError as PoolTimeoutError,
)

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    run_in_new_ctx,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Base, Item
from tests.helpers.programs import Outside, until
from tests.helpers.serving import http_client


@pytest_asyncio.fixture
async def visits(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the visits, served, with a client in it."""
    visits = load("concurrent_queries", url)
    async with http_client(visits.app) as visits.client:
        yield visits
        assert connections_out(visits.connect) == 0


async def test_queries_at_the_same_time_see_what_was_committed(visits: Any) -> None:
    for number, page in enumerate(["home", "news", "home"], start=1):
        response = await visits.client.post(f"/visits/{page}")
        assert (response.status_code, response.json()[0]) == (200, number)
    assert (await visits.client.get("/dashboard")).json() == [3, ["home", "news"]]
    response = await visits.client.get("/counts?pages=home,news,home,about,news")
    assert response.json() == [2, 1, 2, 0, 1]
    too_many = ",".join("a" * 21)
    assert (await visits.client.get(f"/counts?pages={too_many}")).status_code == 422


async def test_each_query_has_a_connection_and_a_semaphore_limits_them(visits: Any) -> None:
    assert (await visits.client.get("/dashboard")).status_code == 200
    assert visits.connect.pool_status().checked_in == 2
    pages = ",".join("abcdefgh")
    assert (await visits.client.get(f"/counts?pages={pages}")).status_code == 200
    assert visits.connect.pool_status().checked_in == 3


async def test_statements_at_once_on_one_session_run_one_after_another(
    connect: DBConnect, database: Database
) -> None:
    async def query() -> None:
        session = await db_session(connect)
        await session.execute(text("SELECT pg_sleep(0.1)"))

    async with new_db_session_ctx():
        await query()
        began = time.monotonic()
        await asyncio.gather(query(), query())
        assert time.monotonic() - began >= 0.2
        assert connections_out(connect) == 1


async def add(connect: DBConnect, name: str) -> None:
    session = await db_session(connect)
    session.add(Item(name=name))


async def test_what_runs_in_a_context_of_its_own_is_not_undone_with_the_rest(
    connect: DBConnect, database: Database
) -> None:
    async def fail() -> None:
        await add(connect, "lost")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        async with new_db_session_ctx():
            await add(connect, "of the caller")
            calls = [run_in_new_ctx(fail), run_in_new_ctx(add, connect, "kept")]
            await asyncio.gather(*calls)
    await until(lambda: connections_out(connect) == 0)
    assert await database.names() == ["kept"]


async def test_who_holds_a_connection_and_waits_for_another_may_wait_in_vain(
    postgresql: str, database: Database
) -> None:
    connect = DBConnect.from_url(postgresql, pool_size=2, max_overflow=0, pool_timeout=0.3)
    holding = asyncio.Barrier(2)

    async def request(commits: bool) -> None:
        async with new_db_session_ctx():
            await query()
            if commits:
                await commit_db_session(connect)
            await holding.wait()
            await run_in_new_ctx(query)

    async def query() -> None:
        await (await db_session(connect)).execute(text("SELECT 1"))

    outcomes = await asyncio.gather(request(False), request(False), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(PoolTimeoutError) >= 1
    await asyncio.gather(request(True), request(True))
    await connect.close()


async def test_a_call_that_writes_the_row_of_its_caller_waits_for_it(
    connect: DBConnect, database: Database
) -> None:
    async def request() -> None:
        async with new_db_session_ctx():
            await add(connect, "a")
            await (await db_session(connect)).flush()
            await run_in_new_ctx(add, connect, "a")

    waiting = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND query LIKE 'INSERT INTO item%'"
    )
    task = asyncio.create_task(request())
    await until(lambda: database.fetch(waiting))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_none(database)
    assert await database.names() == []


async def until_none(database: Database) -> None:
    async def is_idle() -> bool:
        return await database.states() == []

    await until(is_idle)


async def test_a_call_that_writes_beside_its_caller_fails_on_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    connect = DBConnect.from_url(url, connect_args={"timeout": 0.1})
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
    async with new_db_session_ctx():
        await add(connect, "a")
        await (await db_session(connect)).flush()
        with pytest.raises(OperationalError, match="database is locked"):
            await run_in_new_ctx(add, connect, "b")
        with pytest.raises(OperationalError, match="database is locked"):
            async with new_non_ctx_atomic_session(connect) as session:
                session.add(Item(name="c"))
    assert await Outside(f"sqlite+aiosqlite://{url[9:]}").rows("SELECT name FROM item") == ["a"]
    await connect.close()


async def test_a_caller_that_holds_a_database_in_memory_waits_for_itself() -> None:
    connect = DBConnect.from_url("sqlite://", pool_timeout=0.1)

    async def query() -> None:
        await (await db_session(connect)).execute(text("SELECT 1"))

    async with new_db_session_ctx():
        await query()
        with pytest.raises(PoolTimeoutError):
            await run_in_new_ctx(query)
        await commit_db_session(connect)
        await run_in_new_ctx(query)
    await connect.close()
