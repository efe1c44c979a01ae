"""Read-only sessions of a context: which session is meant, how it is settled, what is refused."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal
from unittest.mock import AsyncMock, Mock

import pytest
from sqlalchemy import URL, Column, MetaData, Table, Text, insert, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    close_all_sessions,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    on_commit,
    put_db_session_to_context,
    retry_on_transient_error,
)
from tests.helpers.asgi import add
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, checked_connect
from tests.helpers.mocks import Creators, connect_mock, session_mock
from tests.helpers.models import Item, Seat
from tests.helpers.names import unique_name

Mode = Literal[True, "snapshot"]
NAMES = select(Item.name).order_by(Item.id)
every_mode = pytest.mark.parametrize("mode", [True, "snapshot"])


async def test_the_writing_session_is_another_one_and_both_are_settled(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        reading = await db_session(connect, read_only=True)
        snapshot = await db_session(connect, read_only="snapshot")
        writing = await add(connect, "a")
        assert len({reading, snapshot, writing}) == 3
        assert await db_session(connect, read_only=True) is reading
        assert await db_session(connect, read_only="snapshot") is snapshot
        assert await db_session(connect, read_only=False) is writing
        assert await db_session(connect) is writing
        for session in reading, snapshot:
            assert (await session.scalars(NAMES)).all() == []
        assert connections_out(connect) == 3
        await commit_db_session(connect)
        assert (await reading.scalars(NAMES)).all() == ["a"]
        assert (await snapshot.scalars(NAMES)).all() == []
        await add(connect, "b")
    assert connections_out(connect) == 0
    assert await database.names() == ["a", "b"]
    with pytest.raises(ContextClosedError):
        await reading.execute(NAMES)


@every_mode
async def test_both_are_settled_when_the_context_raises(
    connect: DBConnect, database: Database, mode: Mode
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with new_db_session_ctx():
            await (await db_session(connect, read_only=mode)).execute(NAMES)
            await add(connect, "a")
            raise ZeroDivisionError
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_commit_that_fails_is_told_without_what_has_only_read(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(IntegrityError) as caught:
        async with new_db_session_ctx():
            await (await db_session(connect, read_only=True)).execute(NAMES)
            session = await db_session(connect)
            await session.execute(insert(Seat), [{"number": 1}, {"number": 1}])  # deferred
    assert getattr(caught.value, "__notes__", []) == []
    assert await database.seats() == []


@every_mode
async def test_it_may_be_committed_rolled_back_and_closed_by_hand(
    connect: DBConnect, mode: Mode
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect, read_only=mode)
        for end in (session.commit, session.rollback, session.close):
            await session.execute(NAMES)
            assert connections_out(connect) == 1
            await end()
            assert connections_out(connect) == 0
        async with session:
            await session.execute(NAMES)
        await close_all_sessions()
        assert connections_out(connect) == 0
        assert (await (await db_session(connect, read_only=mode)).scalars(NAMES)).all() == []


async def test_objects_are_still_there_after_the_context(
    connect: DBConnect, database: Database
) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a')")
    async with new_db_session_ctx():
        item = await (await db_session(connect, read_only=True)).scalar(select(Item))
    assert item is not None
    assert item.name == "a"


@every_mode
async def test_an_atomic_block_is_a_transaction_of_the_writing_session(
    connect: DBConnect, database: Database, mode: Mode
) -> None:
    async with new_db_session_ctx():
        reading = await db_session(connect, read_only=mode)
        async with atomic_db_session(connect) as session:
            assert session is not reading
            session.add(Item(name="a"))
    assert await database.names() == ["a"]


async def test_there_is_none_outside_of_a_context(connect: DBConnect) -> None:
    with pytest.raises(ContextNotInitiatedError):
        await db_session(connect, read_only=True)


@pytest.mark.parametrize("mode", ["snap", 1, 2, "True"])
async def test_an_unknown_mode_is_refused(connect: DBConnect, mode: Any) -> None:
    async with new_db_session_ctx():
        with pytest.raises(ValueError, match=f"'snapshot', not {mode!r}"):
            await db_session(connect, read_only=mode)


async def test_a_callback_of_on_commit_does_not_wait_for_it_but_for_the_context(
    connect: DBConnect,
) -> None:
    called: list[str] = []
    async with new_db_session_ctx():
        reading = await db_session(connect, read_only=True)
        await reading.execute(NAMES)
        on_commit(connect, lambda: called.append("a"))
        await reading.commit()
        await reading.execute(NAMES)
        assert called == []
    assert called == ["a"]


async def test_a_callback_waits_for_the_writing_session(
    connect: DBConnect, database: Database
) -> None:
    seen: list[list[str]] = []

    async def look() -> None:
        seen.append(await database.names())

    async with new_db_session_ctx():
        await (await db_session(connect, read_only=True)).execute(NAMES)
        on_commit(connect, look)
        await add(connect, "a")
        await commit_db_session(connect)
        assert seen == [["a"]]


@every_mode
async def test_what_has_only_read_is_repeated(
    connect: DBConnect, no_pauses: None, mode: Mode
) -> None:
    attempts = 0

    @retry_on_transient_error(attempts=2)
    async def work() -> None:
        nonlocal attempts
        attempts += 1
        session = await db_session(connect, read_only=mode)
        await session.execute(NAMES)
        await session.commit()
        if attempts == 1:
            await (await db_session(connect)).execute(text(FAILS))

    await work()
    assert attempts == 2


# A serialization failure.
FAILS = "DO $$ BEGIN RAISE EXCEPTION 'a' USING ERRCODE = '40001'; END $$"


@every_mode
async def test_a_session_of_the_users_class_is_one(
    database_url: URL, database: Database, mode: Mode
) -> None:
    class OurSession(AsyncSession):
        pass

    class OurSyncSession(Session):
        pass

    async with (
        DBConnect.from_url(
            database_url,
            session_options={"class_": OurSession, "sync_session_class": OurSyncSession},
        ) as connect,
        new_db_session_ctx(),
    ):
        session = await db_session(connect, read_only=mode)
        assert isinstance(session, OurSession)
        assert isinstance(session.sync_session, OurSyncSession)
        assert (await session.scalars(NAMES)).all() == []


async def test_a_connect_that_makes_sessions_in_its_own_way_makes_its_readers_so(
    database_url: URL, database: Database
) -> None:
    class OurConnect(DBConnect[AsyncSession]):
        async def create_session(self) -> AsyncSession:
            session = await super().create_session()
            session.info["ours"] = True
            return session

    async with OurConnect.from_url(database_url) as connect, new_db_session_ctx():
        session = await db_session(connect, read_only=True)
        assert session.info["ours"]
        with pytest.raises(InvalidRequestError, match="session is read-only"):
            await session.execute(insert(Item).values(name="a"))


async def test_a_copy_of_a_connect_has_its_own(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect, read_only=True)
        async with copy.deepcopy(connect) as copied:
            assert await db_session(copied, read_only=True) is not session
            assert copied.engine is not connect.engine


@every_mode
async def test_with_an_engine_in_autocommit_it_reads_and_refuses_writes(
    database_url: URL, database: Database, mode: Mode
) -> None:
    async with checked_connect(database_url, database, isolation_level="AUTOCOMMIT") as connect:
        async with new_db_session_ctx():
            session = await db_session(connect, read_only=mode)
            level = await session.scalar(text("SHOW transaction_isolation"))
            assert level == ("read committed" if mode is True else "repeatable read")
            with pytest.raises(InvalidRequestError, match="session is read-only"):
                await session.execute(insert(Item).values(name="a"))
        async with new_db_session_ctx():
            await add(connect, "b")
            assert await database.names() == ["b"]  # it is in AUTOCOMMIT again


async def test_a_session_that_prepares_its_commits_prepares_none(
    database_url: URL, database: Database
) -> None:
    url = database_url.set(drivername="postgresql+psycopg")
    async with (
        DBConnect.from_url(url, session_options={"twophase": True}) as connect,
        new_db_session_ctx(),
    ):
        assert (await (await db_session(connect, read_only=True)).scalars(NAMES)).all() == []


async def test_a_sessionmaker_with_several_engines_is_refused(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")

    class Choosing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return engine.sync_engine

    for maker in (
        async_sessionmaker(engine, binds={Item: engine}),
        async_sessionmaker(binds={Item: engine}),
        async_sessionmaker(engine, sync_session_class=Choosing),
        async_sessionmaker(),
    ):
        connect = DBConnect(lambda _: engine, lambda _, maker=maker: maker, "file")  # type: ignore[misc]
        async with connect, new_db_session_ctx():
            with pytest.raises(InvalidRequestError, match="sessions with one engine"):
                await db_session(connect, read_only=True)
            await db_session(connect, read_only=False)


# How the sessions of one sessionmaker come to be of several tenants.

tenant: ContextVar[str] = ContextVar("tenant")


def engine_of_tenant(engine: AsyncEngine) -> AsyncEngine:
    return engine.execution_options(schema_translate_map={None: tenant.get()})


def by_the_sessionmaker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    class Maker(async_sessionmaker[AsyncSession]):
        def __call__(self, **options: Any) -> AsyncSession:
            return super().__call__(**{"bind": engine_of_tenant(engine)} | options)

    return Maker(engine)


def by_the_class(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    class Chosen(AsyncSession):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"bind": engine_of_tenant(engine)})

    return async_sessionmaker(engine, class_=Chosen)


@every_mode
@pytest.mark.parametrize("make", [by_the_sessionmaker, by_the_class])
async def test_it_reads_what_belongs_to_the_tenant_of_its_own_session(
    database_url: URL, database: Database, make: Callable[[AsyncEngine], Any], mode: Mode
) -> None:
    names = Table("name", MetaData(), Column("name", Text))
    tenants = [unique_name("tenant") for _ in range(2)]
    for name in tenants:
        await database.execute(
            f"CREATE SCHEMA {name}; CREATE TABLE {name}.name AS SELECT '{name}' AS name"
        )
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    async with DBConnect(lambda _: engine, make, "h") as connect:
        for name in tenants * 2:
            tenant.set(name)
            async with new_db_session_ctx():
                session = await db_session(connect, read_only=mode)
                assert (await session.scalars(select(names))).all() == [name]
                with pytest.raises(InvalidRequestError, match="read-only"):
                    await session.execute(insert(names).values(name="a"))
    for name in tenants:
        await database.execute(f"DROP SCHEMA {name} CASCADE")


@every_mode
async def test_a_copy_of_its_engine_only_reads(connect: DBConnect, mode: Mode) -> None:
    async with new_db_session_ctx():
        engine = (await db_session(connect, read_only=mode)).bind
        assert isinstance(engine, AsyncEngine)
        copied = engine.execution_options(first=True).execution_options(second=True)
        async with copied.connect() as connection:
            assert (await connection.scalars(NAMES)).all() == []
            with pytest.raises(InvalidRequestError, match="read-only"):
                await connection.execute(insert(Item).values(name="a"))


async def test_a_sync_session_that_takes_another_engine_is_refused(database_url: URL) -> None:
    engine, other = (create_async_engine(database_url) for _ in range(2))

    class Elsewhere(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"bind": other.sync_engine})

    maker = async_sessionmaker(engine, sync_session_class=Elsewhere)
    async with DBConnect(lambda _: engine, lambda _: maker, "h") as connect, new_db_session_ctx():
        # SQLAlchemy 2.1 refuses it by itself.
        with pytest.raises(InvalidRequestError, match=r"sessions with one engine|translate bind"):
            await db_session(connect, read_only=True)


async def test_sqlite_has_no_snapshot_and_is_left_as_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"connect_args": {"isolation_level": "IMMEDIATE"}, "pool_size": 1}
    url = f"sqlite:///{tmp_path / 'a.db'}"
    async with DBConnect.from_url(url, max_overflow=0, **options) as connect:
        async with new_db_session_ctx():
            assert await (await db_session(connect, read_only=True)).scalar(text("SELECT 1")) == 1
            with pytest.raises(InvalidRequestError, match="is for PostgreSQL, not sqlite"):
                await db_session(connect, read_only="snapshot")
        async with new_db_session_ctx():
            connection = await (await db_session(connect)).connection()
            driver: Any = (await connection.get_raw_connection()).dbapi_connection
            assert driver.isolation_level == "IMMEDIATE"


def memory_by_url() -> DBConnect:
    return DBConnect.from_url("sqlite+aiosqlite://")


def memory_with_a_static_pool() -> DBConnect:
    return DBConnect(lambda _: create_async_engine("sqlite+aiosqlite://"), async_sessionmaker, "h")


@pytest.mark.parametrize("make", [memory_by_url, memory_with_a_static_pool])
async def test_where_there_is_one_connection_it_is_the_same_session(
    make: Callable[[], DBConnect],
) -> None:
    async with make() as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(Item.metadata.tables["item"].create)
        async with new_db_session_ctx():
            writing = await add(connect, "a")
            reading = await db_session(connect, read_only=True)
            assert (await reading.scalars(NAMES)).all() == ["a"]
            assert reading is writing
        with pytest.raises(ZeroDivisionError):
            async with new_db_session_ctx():
                reading, writing = await asyncio.gather(
                    db_session(connect, read_only=True), db_session(connect)
                )
                assert reading is writing
                await add(connect, "b")
                raise ZeroDivisionError
        async with new_db_session_ctx():
            reading = await db_session(connect, read_only=True)
            assert (await reading.scalars(NAMES)).all() == ["a"]


async def of_a_connect_mock() -> tuple[Any, Any]:
    connect, session = connect_mock(), session_mock()
    put_db_session_to_context(connect, session)
    return connect, session


async def of_creators_that_return_mocks() -> tuple[Any, Any]:
    creators = Creators()
    connect = DBConnect(creators.engine, creators.session_maker, "h")
    return connect, await db_session(connect)


async def of_a_method_that_is_a_mock() -> tuple[Any, Any]:
    connect, session = DBConnect(Mock(), Mock()), session_mock()
    connect.create_session = AsyncMock(return_value=session)  # type: ignore[method-assign]
    return connect, session


async def of_a_sessionmaker_put_by_hand() -> tuple[Any, Any]:
    connect, session = DBConnect(Mock(), Mock(), "h"), session_mock()
    connect._session_maker = Mock(return_value=session)
    return connect, session


async def of_a_function_in_the_place_of_a_method() -> tuple[Any, Any]:
    connect, session = DBConnect(Mock(), Mock()), session_mock()

    async def create_session() -> Any:
        return session

    connect.create_session = create_session  # type: ignore[method-assign]
    return connect, session


@pytest.mark.parametrize(
    "mock",
    [
        of_a_connect_mock,
        of_creators_that_return_mocks,
        of_a_method_that_is_a_mock,
        of_a_sessionmaker_put_by_hand,
        of_a_function_in_the_place_of_a_method,
    ],
)
async def test_the_mock_of_a_test_is_what_it_is(
    mock: Callable[[], Awaitable[tuple[Any, Any]]],
) -> None:
    async with new_db_session_ctx():
        connect, session = await mock()
        assert await db_session(connect, read_only=True) is session
        assert await db_session(connect, read_only="snapshot") is session
        assert await db_session(connect) is session


async def test_a_handler_may_change_the_host_before_it_is_made(
    database_url: URL, database: Database
) -> None:
    chosen: list[str] = []

    async def choose(connect: DBConnect) -> None:
        chosen.append("a")
        await connect.change_host(str(database_url.host))

    async with (
        DBConnect.from_url(
            database_url.set(host="nowhere.example"), before_create_session_handler=choose
        ) as connect,
        new_db_session_ctx(),
    ):
        assert (await (await db_session(connect, read_only=True)).scalars(NAMES)).all() == []
    assert chosen
