"""DBConnect: lazy, one engine at a time, on the right host."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, make_connect
from tests.helpers.mocks import Creators


async def test_nothing_is_made_before_the_first_session(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    assert connect.host == "a"
    assert (connect._engine, connect._session_maker, connect.engine) == (None, None, None)

    await connect.create_session()
    await connect.create_session()

    assert list(creators.engines) == ["a"]
    assert len(creators.engines["a"]) == 1
    assert connect.engine is connect._engine is creators.engines["a"][0]


async def test_close_disposes_and_the_next_session_makes_a_new_engine(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.close()
    await connect.create_session()

    await connect.close()
    await connect.close()

    assert connect._engine is None
    assert connect._session_maker is None
    creators.engines["a"][0].dispose.assert_awaited_once_with()
    await connect.create_session()
    assert len(creators.engines["a"]) == 2


async def test_change_host_puts_the_new_engine_in_place_before_it_retires_the_old_one(
    creators: Creators,
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    seen: list[object] = []
    creators.engines["a"][0].dispose.side_effect = lambda: seen.append(connect.engine)

    await connect.change_host("b")

    assert connect.host == "b"
    assert seen == [creators.engines["b"][0]]


async def test_change_host_to_the_same_host_does_nothing(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    await connect.change_host("a")
    creators.engines["a"][0].dispose.assert_not_awaited()


async def test_concurrent_changes_to_the_same_host_make_one_engine(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    await asyncio.gather(*(connect.change_host("b") for _ in range(10)))
    assert len(creators.engines["b"]) == 1


async def test_connect_makes_a_new_engine_even_for_the_same_host(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker)
    await connect.connect("a")
    await connect.connect("a")
    assert len(creators.engines["a"]) == 2
    creators.engines["a"][0].dispose.assert_awaited_once_with()


async def test_the_handler_runs_before_each_session_and_may_set_the_host(
    creators: Creators,
) -> None:
    hosts = iter(["a", "a", "b"])

    async def handler(connect: DBConnect) -> None:
        await connect.change_host(next(hosts))

    connect = DBConnect(
        creators.engine, creators.session_maker, before_create_session_handler=handler
    )
    sessions: list[Any] = [await connect.create_session() for _ in range(3)]
    a, b = creators.engines["a"][0], creators.engines["b"][0]
    assert [session.engine for session in sessions] == [a, a, b]


async def test_a_session_in_flight_finishes_on_the_old_engine_and_leaves_no_connection(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    async with new_non_ctx_session(connect) as first:
        await first.execute(text("SELECT 1"))
        async with new_non_ctx_session(connect) as second:
            await second.execute(text("SELECT 1"))
        assert await database.connections() == 2

        await connect.connect("localhost")

        assert await database.connections() == 1
        await first.execute(text("SELECT 1"))
        await first.commit()
        await database.is_left_by_all()
        await first.execute(text("SELECT 1"))
    await database.is_left_by_all()
    assert connections_out(connect) == 0
    await connect.close()


async def test_a_session_in_flight_leaves_no_connection_after_close(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    async with new_non_ctx_session(connect) as session:
        await session.execute(text("SELECT 1"))
        await connect.close()
        assert await database.connections() == 1
    await database.is_left_by_all()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_creator_that_keeps_its_engines_leaves_no_connection(
    driver: str, database_url: URL, database: Database
) -> None:
    engines: dict[str, AsyncEngine] = {}

    def keep(host: str) -> AsyncEngine:
        url = database_url.set(drivername=f"postgresql+{driver}", host=host)
        return engines.setdefault(host, create_async_engine(url))

    connect = DBConnect(keep, async_sessionmaker, "127.0.0.1")
    for end in "localhost", "127.0.0.1":
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("SELECT 1"))
            await connect.change_host("localhost")
            await connect.change_host(end)
        # Its connection came back to a pool that its engine, used again or not, has replaced.
        await database.is_left_by_all()
        await connect.change_host("127.0.0.1")
    await connect.close()


async def test_a_cancelled_change_of_hosts_leaves_no_connection(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    async with AsyncExitStack() as stack:
        for _ in range(5):
            session = await stack.enter_async_context(new_non_ctx_session(connect))
            await session.execute(text("SELECT 1"))
    assert await database.connections() == 5

    task = asyncio.create_task(connect.change_host("localhost"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert connect.host == "localhost"
    await database.is_left_by_all()


async def test_each_connect_has_a_context_key_of_its_own(creators: Creators) -> None:
    connects = [DBConnect(creators.engine, creators.session_maker) for _ in range(3)]
    assert len({connect.context_key for connect in connects}) == 3


def test_repr_names_the_connect_and_its_host(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    assert repr(connect) == f"<DBConnect {connect.context_key} host='a'>"


async def test_an_empty_host_is_refused(creators: Creators) -> None:
    with pytest.raises(ValueError, match=r"^host must not be empty$"):
        DBConnect(creators.engine, creators.session_maker, host="")
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    for change in (connect.connect, connect.change_host):
        with pytest.raises(ValueError, match=r"^host must not be empty$"):
            await change("")
    assert connect.host == "a"
    assert connect.engine is creators.engines["a"][0]


async def test_a_missing_host_is_refused(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker)
    with pytest.raises(ValueError, match=r"^host is not set$"):
        await connect.create_session()
    with pytest.raises(ValueError, match=r"^host is not set$"):
        await connect.session_maker()


async def test_a_connect_is_closed_by_async_with(creators: Creators) -> None:
    async with DBConnect(creators.engine, creators.session_maker, host="a") as connect:
        await connect.create_session()
    assert connect.engine is None
    assert creators.engines["a"][0].dispose.await_count == 1
    async with connect:
        pass  # nothing was opened


async def test_a_host_that_is_a_url_is_shown_without_its_password(creators: Creators) -> None:
    url = "postgresql+asyncpg://app:hunter2@db/shop"
    connect = DBConnect(creators.engine, creators.session_maker, host=url)
    assert "hunter2" not in repr(connect)
    assert "app:***@db/shop" in repr(connect)


async def test_an_engine_that_fails_to_close_is_logged_and_the_next_one_serves(
    creators: Creators, caplog: pytest.LogCaptureFixture
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    await connect.create_session()
    creators.engines["a"][0].dispose.side_effect = OSError("no route")
    await connect.change_host("b")
    [engine] = creators.engines["b"]
    assert connect.engine == engine
    assert "no route" in caplog.text
    engine.dispose.side_effect = OSError("no route either")
    with pytest.raises(OSError, match="no route either"):
        await connect.close()
    assert connect.engine is None
