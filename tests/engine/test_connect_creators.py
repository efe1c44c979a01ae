"""What makes the engines of a connect: creators that wait, fail, keep, share or patch them."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from sqlalchemy import URL, create_engine, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import sessionmaker

from context_async_sqlalchemy import DBConnect, new_non_ctx_session
from tests.helpers.database import Database, make_connect
from tests.helpers.mocks import Creators, engine_mock


async def test_an_engine_that_was_put_there_by_hand_is_disposed_of(creators: Creators) -> None:
    connect = DBConnect(creators.engine, creators.session_maker, host="a")
    engine = connect._engine = engine_mock()
    await connect.close()
    engine.dispose.assert_awaited_once_with()

    engine = connect._engine = engine_mock()
    await connect.change_host("b")
    engine.dispose.assert_awaited_once_with()
    assert connect._engine is creators.engines["b"][0]


async def test_a_session_maker_that_was_put_there_by_hand_is_used(
    creators: Creators, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = DBConnect(creators.engine, creators.session_maker)
    connect._session_maker = session_maker = Mock()
    assert connect._session_maker is session_maker
    assert await connect.create_session() is session_maker.return_value
    assert creators.engines == {}
    await connect.close()
    assert connect._session_maker is None

    await connect.connect("a")
    made = connect._session_maker
    with monkeypatch.context() as patched:
        patched.setattr(connect, "_session_maker", session_maker)
        assert await connect.session_maker() is session_maker
    assert await connect.session_maker() is made
    # It is that of this event loop only.
    assert await asyncio.to_thread(asyncio.run, connect.session_maker()) is not made
    await connect.connect("b")
    assert connect._session_maker is not made


async def test_a_mock_that_a_creator_returns_again_is_disposed_of() -> None:
    engine = engine_mock()
    connect = DBConnect(Mock(return_value=engine), Mock(), host="a")
    await connect.connect("a")
    await connect.change_host("b")
    engine.dispose.assert_awaited_once_with()


@pytest.mark.parametrize("broken", ["engine", "session_maker", "handler"])
async def test_a_failing_creator_or_handler_leaves_the_engine_in_place(
    creators: Creators, broken: str
) -> None:
    fail = Mock(side_effect=OSError("no such host"))
    handler = AsyncMock()
    engine_creator = Mock(side_effect=creators.engine)
    session_maker_creator = Mock(side_effect=creators.session_maker)
    connect = DBConnect(
        engine_creator, session_maker_creator, host="a", before_create_session_handler=handler
    )
    await connect.create_session()
    part = {"engine": engine_creator, "session_maker": session_maker_creator, "handler": handler}
    part[broken].side_effect = fail

    with pytest.raises(OSError, match="no such host"):
        await (connect.create_session() if broken == "handler" else connect.change_host("b"))

    assert connect.host == "a"
    assert connect.engine == creators.engines["a"][0]
    handler.side_effect = None
    await connect.create_session()
    creators.engines["a"][0].dispose.assert_not_awaited()


async def test_a_creator_may_keep_its_engines(database_url: URL, database: Database) -> None:
    engines: dict[str, AsyncEngine] = {}

    def engine_of(host: str) -> AsyncEngine:
        return engines.setdefault(host, create_async_engine(database_url.set(host=host)))

    connect = DBConnect(engine_of, async_sessionmaker, host="127.0.0.1")
    pids = []
    for host in ("localhost", "127.0.0.1", "127.0.0.1"):
        await connect.connect(host)
        async with new_non_ctx_session(connect) as session:
            pids.append(await session.scalar(text("SELECT pg_backend_pid()")))
    assert pids[1] == pids[2]
    await connect.close()
    await database.is_left_by_all()


@pytest.mark.parametrize(
    "name", ["engine_creator", "session_maker_creator", "before_create_session_handler"]
)
def test_a_creator_that_is_not_callable_is_refused(creators: Creators, name: str) -> None:
    arguments: dict[str, Any] = {
        "engine_creator": creators.engine,
        "session_maker_creator": creators.session_maker,
    }
    with pytest.raises(TypeError, match=f"{name} must be callable, not str"):
        DBConnect(**arguments | {name: "postgresql://"})


async def _coroutine(_: object) -> None:
    """Stand for an async creator that returns nothing."""


@pytest.mark.parametrize(
    ("engine_creator", "message"),
    [
        (lambda _: None, "must return an AsyncEngine, not NoneType"),
        (lambda _: create_engine("sqlite://"), r"make it with create_async_engine\(\)"),
        (_coroutine, "must return an AsyncEngine, not NoneType"),
    ],
)
async def test_an_engine_creator_that_returns_the_wrong_thing_is_refused(
    creators: Creators, engine_creator: Any, message: str
) -> None:
    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    with pytest.raises(TypeError, match=message):
        await connect.create_session()
    assert connect.engine is None


@pytest.mark.parametrize(
    ("session_maker_creator", "message"),
    [
        (lambda _: None, "must return an async_sessionmaker, not NoneType"),
        (lambda _: sessionmaker(), "must return an async_sessionmaker, not sessionmaker"),
        (_coroutine, "must return an async_sessionmaker, not NoneType"),
    ],
)
async def test_a_session_maker_creator_that_returns_the_wrong_thing_is_refused(
    creators: Creators, session_maker_creator: Any, message: str
) -> None:
    connect = DBConnect(creators.engine, session_maker_creator, host="a")
    with pytest.raises(TypeError, match=message):
        await connect.create_session()


async def test_creators_may_be_awaited(creators: Creators) -> None:
    async def engine_creator(host: str) -> AsyncEngine:
        await asyncio.sleep(0)  # an access token is fetched
        return creators.engine(host)

    async def session_maker_creator(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
        await asyncio.sleep(0)
        return creators.session_maker(engine)

    connect = DBConnect(engine_creator, session_maker_creator, host="a")
    sessions = await asyncio.gather(*(connect.create_session() for _ in range(10)))
    assert len(creators.engines["a"]) == 1
    await asyncio.gather(*(connect.change_host("b") for _ in range(10)))
    assert len(creators.engines["b"]) == 1
    assert creators.engines["a"][0].dispose.await_count == 1
    assert {session.engine for session in sessions} == {creators.engines["a"][0]}  # type: ignore[attr-defined]
    await connect.close()
    assert creators.engines["b"][0].dispose.await_count == 1


async def test_sessions_are_made_on_the_old_host_while_the_engine_for_the_new_one_is_made(
    creators: Creators,
) -> None:
    release = asyncio.Event()

    async def engine_creator(host: str) -> AsyncEngine:
        if host == "b":
            await release.wait()
        return creators.engine(host)

    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    await connect.create_session()
    switching = asyncio.create_task(connect.change_host("b"))
    await asyncio.sleep(0)
    assert (await connect.create_session()).engine is creators.engines["a"][0]  # type: ignore[attr-defined]
    release.set()
    await switching
    assert connect.host == "b"
    assert (await connect.create_session()).engine is creators.engines["b"][0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_creator_that_fails_or_is_cancelled_leaves_nobody_stuck(
    creators: Creators, how: str
) -> None:
    started = asyncio.Event()
    calls = 0

    async def engine_creator(host: str) -> AsyncEngine:
        nonlocal calls
        calls += 1
        if calls == 1:
            started.set()
            if how == "fails":
                raise OSError("no token")
            await asyncio.Event().wait()
        return creators.engine(host)

    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    first = asyncio.create_task(connect.create_session())
    await started.wait()
    second = asyncio.create_task(connect.create_session())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises((OSError, asyncio.CancelledError)):
        await first
    assert await second
    assert calls == 2


@pytest.mark.parametrize("how", ["fails", "is cancelled", "returns the wrong thing"])
async def test_an_engine_without_a_sessionmaker_leaves_no_connection(
    database_url: URL, database: Database, how: str
) -> None:
    engines: list[AsyncEngine] = []  # so that it is not the garbage collector that closes them
    used = asyncio.Event()

    def engine_creator(_: str) -> AsyncEngine:
        engines.append(create_async_engine(database_url))
        return engines[-1]

    async def session_maker_creator(engine: AsyncEngine) -> Any:
        async with engine.connect() as connection:
            await connection.execute(select(1))
        used.set()
        if how == "fails":
            raise OSError("no such file")
        if how == "is cancelled":
            await asyncio.Event().wait()

    connect = DBConnect(engine_creator, session_maker_creator, host="a")
    making = asyncio.create_task(connect.create_session())
    await used.wait()
    if how == "is cancelled":
        making.cancel()
    with pytest.raises((OSError, asyncio.CancelledError, TypeError)):
        await making
    await connect.close()
    await database.is_left_by_all()


async def test_close_waits_for_an_engine_that_is_being_made(creators: Creators) -> None:
    release = asyncio.Event()

    async def engine_creator(host: str) -> AsyncEngine:
        await release.wait()
        return creators.engine(host)

    connect = DBConnect(engine_creator, creators.session_maker, host="a")
    making = asyncio.create_task(connect.create_session())
    await asyncio.sleep(0)
    closing = [asyncio.create_task(connect.close()) for _ in range(3)]
    await asyncio.sleep(0)
    release.set()
    await making
    await asyncio.gather(*closing)
    assert connect.engine is None
    assert creators.engines["a"][0].dispose.await_count == 1


async def test_an_engine_that_two_connects_share_is_closed_by_the_last(
    database_url: URL, database: Database
) -> None:
    shared = create_async_engine(database_url)
    copy = shared.execution_options(isolation_level="AUTOCOMMIT")
    one = DBConnect(lambda _: shared, async_sessionmaker, host="h")
    two = DBConnect(lambda _: copy, async_sessionmaker, host="h")
    await one.ping()
    [pid] = await database.backends()
    await two.ping()
    await two.close()
    await one.ping()
    assert await database.backends() == [pid]
    await one.close()
    await database.is_left_by_all()


async def test_an_engine_that_a_test_has_patched_is_closed(
    database_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = make_connect(database_url)
    await connect.ping()
    engine = connect.engine
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(connect, "_engine", engine_mock())
    assert connect._engine is engine
    await connect.close()
    await database.is_left_by_all()


async def test_copies_of_an_engine_do_not_pile_up(database_url: URL) -> None:
    base = create_async_engine(database_url)
    connect = DBConnect(
        lambda _: base.execution_options(isolation_level="READ COMMITTED"),
        async_sessionmaker,
        host="h",
    )
    commit = base.dialect.do_commit
    for _ in range(10):
        await connect.connect("h")
        async with new_non_ctx_session(connect) as session:
            await session.execute(text("SELECT 1"))
            await session.commit()
    assert getattr(base.dialect.do_commit, "__self__", None) is not commit
    assert base.dialect.do_commit.__self__._do_commit == commit  # type: ignore[attr-defined]
    await connect.close()
