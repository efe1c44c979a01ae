"""A sessionmaker that is had at import time, and finds its engine when it is called."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, make_connect
from tests.helpers.mocks import Creators
from tests.helpers.models import Item


def test_it_is_an_async_sessionmaker_and_makes_nothing_at_import_time(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    make = connect.lazy_session_maker()
    assert isinstance(make, async_sessionmaker)
    assert issubclass(make.class_, AsyncSession)
    assert creators.engines == {}


async def test_its_sessions_are_on_the_engine_of_the_connect_and_counted(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    make = connect.lazy_session_maker()
    async with make.begin() as session:
        assert session.bind is connect.engine
        session.add(Item(name="a"))
        await session.flush()
        assert connect.pool_status().checked_out == 1
    assert (await connect.create_session()).bind is session.bind
    assert connections_out(connect) == 0
    assert await database.names() == ["a"]
    await connect.close()
    await database.is_left_by_all()


async def test_its_options_come_before_those_of_the_connect_and_are_its_own(
    database_url: URL,
) -> None:
    class Session(AsyncSession):
        pass

    connect = DBConnect.from_url(database_url, session_options={"class_": Session, "info": {1: 2}})
    make, other = connect.lazy_session_maker(), connect.lazy_session_maker()
    make.configure(autoflush=False)
    session = make()
    assert isinstance(session, Session)
    assert session.info == {1: 2}
    sync = session.sync_session
    assert (sync.autoflush, sync.expire_on_commit) == (False, False)
    assert make(autoflush=True, expire_on_commit=True).sync_session.expire_on_commit
    assert other().sync_session.autoflush
    await connect.close()


async def test_it_follows_the_host_and_leaves_no_connection_on_the_old_one(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url.set(host="127.0.0.1"))
    make = connect.lazy_session_maker()
    for host in ("localhost", "127.0.0.1"):
        async with make() as session:
            await session.execute(text("SELECT 1"))
        if host == "localhost":
            await connect.change_host(host)
        else:
            connect.host = host
        async with make() as session:
            await session.execute(text("SELECT 1"))
            assert session.bind is connect.engine
            assert connect.engine is not None
            assert connect.engine.url.host == connect.host
    await connect.close()
    await database.is_left_by_all()


async def test_each_event_loop_has_its_engine_and_a_thread_without_one_is_told(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    make = connect.lazy_session_maker()

    async def engine_used() -> AsyncEngine:
        async with make() as session:
            assert await session.scalar(text("SELECT 1")) == 1
            assert isinstance(session.bind, AsyncEngine)
            return session.bind

    async def on_a_loop_of_its_own() -> AsyncEngine:
        engine = await engine_used()
        await engine.dispose()
        return engine

    here = await engine_used()
    there = await asyncio.to_thread(asyncio.run, on_a_loop_of_its_own())
    assert here is not there
    assert await engine_used() is here
    with pytest.raises(RuntimeError, match=r"no event loop runs.*call it in an async function"):
        await asyncio.to_thread(make)
    await connect.close()


async def test_what_awaitable_creators_make_has_to_be_there_already(database_url: URL) -> None:
    begun, going_on = asyncio.Event(), asyncio.Event()
    calls = 0

    async def create_engine(host: str) -> AsyncEngine:
        nonlocal calls
        calls += 1
        begun.set()
        await going_on.wait()
        return create_async_engine(database_url)

    connect = DBConnect(create_engine, async_sessionmaker, host="a")
    make = connect.lazy_session_maker()
    with pytest.raises(RuntimeError, match=r"'await connect.session_maker\(\)' first"):
        make()
    assert calls == 0  # not begun, and then given up

    making = asyncio.create_task(connect.session_maker())
    await begun.wait()
    with pytest.raises(RuntimeError, match="creators are async functions"):
        make()
    going_on.set()
    await making
    async with make() as session:
        assert await session.scalar(text("SELECT 1")) == 1
    await connect.close()
    with pytest.raises(RuntimeError, match=r"again after 'await connect.close\(\)'"):
        make()
    assert calls == 1


async def test_after_close_it_makes_a_new_engine_as_the_connect_does(database_url: URL) -> None:
    connect = make_connect(database_url)
    make = connect.lazy_session_maker()
    engines = set()
    for _ in range(2):
        async with make() as session:
            await session.execute(text("SELECT 1"))
            engines.add(session.bind)
        await connect.close()
        assert connect.engine is None
    assert len(engines) == 2


async def test_a_creator_that_fails_raises_and_is_called_again(database_url: URL) -> None:
    errors = [OSError("no such host")]

    def create_engine(host: str) -> AsyncEngine:
        if errors:
            raise errors.pop()
        return create_async_engine(database_url)

    connect = DBConnect(create_engine, async_sessionmaker)
    make = connect.lazy_session_maker()
    with pytest.raises(ValueError, match="host is not set"):
        make()
    connect.host = "a"
    with pytest.raises(OSError, match="no such host"):
        make()
    async with make() as session:
        assert await session.scalar(text("SELECT 1")) == 1
    await connect.close()


async def test_the_handler_runs_once_before_the_first_statement_and_chooses_the_host(
    database_url: URL, database: Database
) -> None:
    hosts: list[str] = ["127.0.0.1", "localhost"]
    errors: list[Exception] = []
    calls = 0

    async def handler(connect: DBConnect) -> None:
        nonlocal calls
        calls += 1
        if errors:
            raise errors.pop()
        await connect.change_host(hosts[0])

    def create_engine(host: str) -> AsyncEngine:
        return create_async_engine(database_url.set(host=host))

    connect = DBConnect(create_engine, async_sessionmaker, None, handler)
    make = connect.lazy_session_maker()
    with pytest.raises(RuntimeError, match="its before_create_session_handler sets the host"):
        make()
    await connect.session_maker()
    for host in ("127.0.0.1", "localhost"):
        hosts[0], calls = host, 0
        async with make() as session:
            assert calls == 0
            for _ in range(2):
                await session.execute(text("SELECT 1"))
            assert calls == 1
            assert session.bind is connect.engine
            assert connect.engine is not None
            assert connect.engine.url.host == host
    errors.append(OSError("no token"))
    async with make() as session:
        with pytest.raises(OSError, match="no token"):
            await session.execute(text("SELECT 1"))
        assert await session.scalar(text("SELECT 1")) == 1
        assert connections_out(connect) == 1
    await connect.close()
    await database.is_left_by_all()


async def test_a_handler_cannot_move_a_session_that_routes_by_itself(
    database_url: URL, database: Database
) -> None:
    async def handler(connect: DBConnect) -> None:
        await connect.change_host("localhost")

    def create_session_maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        return async_sessionmaker(engine, binds={Item: engine})

    def create_engine(host: str) -> AsyncEngine:
        return create_async_engine(database_url.set(host=host))

    connect = DBConnect(create_engine, create_session_maker, "127.0.0.1", handler)
    make = connect.lazy_session_maker()
    async with make() as session:
        with pytest.raises(InvalidRequestError, match="has changed the host"):
            await session.scalars(select(Item))
    async with make() as session:  # it is there now
        assert (await session.scalars(select(Item))).all() == []
    await connect.close()


async def test_in_the_transaction_of_a_test_its_sessions_are_part_of_it(
    database_url: URL, database: Database
) -> None:
    connect = make_connect(database_url)
    make: Any = connect.lazy_session_maker()
    async with shared_transaction(connect) as session:
        connect.host = "localhost"
        async with make.begin() as its_own:
            its_own.add(Item(name="a"))
        assert (await session.scalars(select(Item.name))).all() == ["a"]
    assert await database.names() == []
    await connect.close()
