"""Sessions on connections of their own that see the same data, and what they wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from unittest.mock import AsyncMock

import pytest
import pytest_asyncio
from sqlalchemy import (
    URL,
    Connection,
    NullPool,
    StaticPool,
    event,
    func,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import (
    DBAPIError,
    InvalidRequestError,
    TimeoutError as PoolTimeoutError,
)
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
    same_snapshot,
)
from context_async_sqlalchemy._unit import same_snapshot as snapshots
from context_async_sqlalchemy.test_utils import set_test_context, shared_transaction
from tests.helpers.asgi import add
from tests.helpers.cancelling import Steps, cancel_at
from tests.helpers.cluster import primary_and_standby
from tests.helpers.connections import connections_out
from tests.helpers.database import LOST, Database, assert_clean, checked_connect
from tests.helpers.models import Item

SNAPSHOT = text("SELECT pg_current_snapshot()::text, pg_backend_pid()")
COUNT = select(func.count(Item.id))


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def connect(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[DBConnect]:
    """Return a connect with room for five connections, by each driver."""
    url = database_url.set(drivername=f"postgresql+{request.param}")
    async with checked_connect(url, database, max_overflow=0, pool_timeout=10) as connect:
        yield connect


async def seen_by(sessions: tuple[AsyncSession, ...]) -> tuple[set[str], set[int]]:
    """Return the snapshots and the backends of sessions, asked at the same time."""
    results = await asyncio.gather(*(session.execute(SNAPSHOT) for session in sessions))
    rows = [result.one() for result in results]
    return {row[0] for row in rows}, {row[1] for row in rows}


async def test_they_see_the_same_data_whatever_is_committed_meanwhile(
    connect: DBConnect, database: Database
) -> None:
    async def write() -> None:
        for number in range(1000):
            await database.execute(f"INSERT INTO item (name) VALUES ('{number}')")

    writing = asyncio.create_task(write())
    for _ in range(5):
        async with same_snapshot(connect, 4) as sessions:
            snapshots, backends = await seen_by(sessions)
            counts = await asyncio.gather(*(session.scalar(COUNT) for session in sessions))
            assert (len(snapshots), len(backends), len(set(counts))) == (1, 4, 1)
    assert not writing.done()
    writing.cancel()
    await asyncio.wait([writing])


async def test_their_queries_run_at_the_same_time(connect: DBConnect) -> None:
    async with same_snapshot(connect, 4) as sessions:
        began = time.monotonic()
        sleep = text("SELECT pg_sleep(0.2)")
        await asyncio.gather(*(session.execute(sleep) for session in sessions))
        assert time.monotonic() - began < 0.6


async def test_they_refuse_to_write_and_so_does_the_server(
    connect: DBConnect, database: Database
) -> None:
    async with same_snapshot(connect, 2) as sessions:
        for session in sessions:
            with pytest.raises(InvalidRequestError, match="session is read-only"):
                await session.execute(insert(Item).values(name="a"))
            with pytest.raises(DBAPIError, match="read-only transaction"):
                await session.execute(text("SELECT nextval('item_id_seq')"))
    assert await database.names() == []


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("asyncpg", {}),
        ("asyncpg", {"begin_with_first_statement": True}),
        ("psycopg", {}),
        ("asyncpg", {"session_options": {"autobegin": False}}),
        ("psycopg", {"poolclass": NullPool}),
    ],
)
async def test_each_has_the_settings_of_its_transaction(
    database_url: URL, database: Database, driver: str, options: Any
) -> None:
    def settings() -> Mapping[str, str]:
        return {"app.tenant": "ann"}

    url = database_url.set(drivername=f"postgresql+{driver}")
    connect = DBConnect.from_url(url, transaction_settings=settings, **options)
    async with connect, same_snapshot(connect, 3) as sessions:
        snapshots, backends = await seen_by(sessions)
        assert (len(snapshots), len(backends)) == (1, 3)
        for session in sessions:
            assert await session.scalar(text("SELECT current_setting('app.tenant')")) == "ann"
    await assert_clean(connect, database)


async def test_a_listener_that_has_a_query_as_it_begins_is_called_after(
    connect: DBConnect,
) -> None:
    def ask(connection: Connection) -> None:
        connection.execute(text("SELECT set_config('app.tenant', 'ann', true)"))

    await connect.session_maker()
    assert connect.engine is not None
    event.listen(connect.engine.sync_engine, "begin", ask)
    async with same_snapshot(connect, 3) as sessions:
        assert len((await seen_by(sessions))[0]) == 1
        assert await sessions[2].scalar(text("SELECT current_setting('app.tenant')")) == "ann"


async def test_more_than_the_pool_has_are_refused_at_once(connect: DBConnect) -> None:
    with pytest.raises(ValueError, match="take 6 connections, and the pool has 5 at most"):
        async with same_snapshot(connect, 6):
            pass
    with pytest.raises(ValueError, match="at least 1, not 0"):
        same_snapshot(connect, 0)
    assert connect.pool_status().checked_in == 0


async def test_many_blocks_at_once_wait_for_each_other_without_a_deadlock(
    connect: DBConnect,
) -> None:
    async def block(number: int) -> None:
        async with same_snapshot(connect, number) as sessions:
            snapshots, backends = await seen_by(sessions)
            assert (len(snapshots), len(backends)) == (1, number)

    async def request() -> None:
        async with new_db_session_ctx():
            await (await db_session(connect)).execute(text("SELECT pg_sleep(0.002)"))

    async with asyncio.timeout(8):  # less than pool_timeout
        await asyncio.gather(
            *(block(2 + number % 4) for number in range(20)), *(request() for _ in range(20))
        )


async def test_a_wait_for_connections_ends_with_pool_timeout(
    database_url: URL, database: Database
) -> None:
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.1}
    async with checked_connect(database_url, database, **options) as small:

        async def block() -> None:
            async with same_snapshot(small, 2):
                pass

        async with new_non_ctx_session(small) as session:
            await session.execute(text("SELECT 1"))
            errors = await asyncio.gather(*(block() for _ in range(3)), return_exceptions=True)
            assert [type(error) for error in errors] == [PoolTimeoutError] * 3
            assert any("same_snapshot() has waited for 0.1 seconds" in str(e) for e in errors)
            assert connections_out(small) == 1
        await block()


@pytest.mark.parametrize("read_only", [False, True, "snapshot"])
async def test_a_context_that_holds_a_connection_is_told_to_give_it_back(
    connect: DBConnect, second_connect: DBConnect, read_only: Any
) -> None:
    async def block() -> None:
        async with same_snapshot(connect, 2) as sessions:
            assert await sessions[1].scalar(COUNT) == 0

    async with new_db_session_ctx():
        other = await db_session(second_connect)
        await other.execute(text("SELECT 1"))  # that of another pool
        session = await db_session(connect, read_only=read_only)
        await block()
        await session.execute(text("SELECT 1"))
        for call in (block(), run_in_new_ctx(block)):
            with pytest.raises(InvalidRequestError, match="'await commit_db_session"):
                await call
        await (session.commit() if read_only else commit_db_session(connect))
        await block()


async def test_a_test_that_has_a_session_in_the_context_is_not_told_so(connect: DBConnect) -> None:
    async with set_test_context(auto_close=True):
        await add(connect, "a")
        await (await db_session(connect)).flush()
        async with same_snapshot(connect, 2) as sessions:
            assert await sessions[1].scalar(COUNT) == 0


async def test_a_session_whose_transaction_has_ended_is_refused(connect: DBConnect) -> None:
    async with same_snapshot(connect, 3) as sessions:
        async with sessions[0].begin_nested():
            assert await sessions[0].scalar(COUNT) == 0
        for session, end in zip(sessions, ("commit", "rollback", "close"), strict=True):
            await getattr(session, end)()
            with pytest.raises(InvalidRequestError, match="its transaction has ended"):
                await session.scalar(COUNT)
    async with same_snapshot(connect, 2) as sessions:
        pass
    for session in sessions:
        with pytest.raises(InvalidRequestError, match="its transaction has ended"):
            await session.execute(SNAPSHOT)
    assert connections_out(connect) == 0


async def test_an_error_of_one_query_brings_all_connections_home(connect: DBConnect) -> None:
    with pytest.raises(DBAPIError, match="division by zero"):
        async with same_snapshot(connect, 3) as sessions:
            queries = ("SELECT pg_sleep(0.5)", "SELECT pg_sleep(0.5)", "SELECT 1 / 0")
            await asyncio.gather(
                *(s.execute(text(q)) for s, q in zip(sessions, queries, strict=True))
            )
    # The fixture checks that the others, who are inside of theirs, are not there any more.


async def test_a_connection_that_is_lost_does_not_keep_the_others(
    connect: DBConnect, database: Database
) -> None:
    async with same_snapshot(connect, 3) as sessions:
        pid = await sessions[1].scalar(text("SELECT pg_backend_pid()"))
        assert pid is not None
        await database.terminate(pid)
        with pytest.raises(LOST):
            await sessions[1].scalar(COUNT)
        assert await sessions[0].scalar(COUNT) == await sessions[2].scalar(COUNT) == 0
    async with same_snapshot(connect, 5) as sessions:
        assert len((await seen_by(sessions))[1]) == 5


async def test_an_exporter_that_is_lost_is_the_error_of_the_block(
    connect: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalar = AsyncSession.scalar

    async def lose(session: AsyncSession, *args: Any, **options: Any) -> Any:
        snapshot = await scalar(session, *args, **options)
        pid = await scalar(session, text("SELECT pg_backend_pid()"))
        await database.terminate(pid)
        return snapshot

    monkeypatch.setattr(AsyncSession, "scalar", lose)
    with pytest.raises(DBAPIError, match="snapshot"):
        async with same_snapshot(connect, 3):
            pytest.fail("there is no snapshot")
    monkeypatch.undo()
    await assert_clean(connect, database)


async def test_a_failure_does_not_cancel_the_others_as_they_open_a_connection(
    connect: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, sessions, taken = snapshots._take, list[AsyncSession](), list[AsyncSession]()

    async def take_or_fail(session: AsyncSession, options: dict[str, Any]) -> None:
        sessions.append(session)
        if len(sessions) == 3:
            raise OSError("no route to host")
        await take(session, options)
        taken.append(session)

    monkeypatch.setattr(snapshots, "_take", take_or_fail)
    with pytest.raises(OSError, match="no route"):
        async with same_snapshot(connect, 5):
            pytest.fail("one session has no connection")
    assert len(sessions) == 5
    assert len(taken) == 4


async def warm(connect: DBConnect) -> None:
    """Fill the pool: before 2.0.53, SQLAlchemy forgets a connection that it opens."""
    async with same_snapshot(connect, 5):
        pass


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_a_cancellation_at_any_await_brings_all_connections_home(
    connect: DBConnect, database: Database, kind: str
) -> None:
    async def work() -> None:
        async with same_snapshot(connect, 3) as sessions:
            await seen_by(sessions)

    number = suspensions = 1
    while number <= suspensions:
        await warm(connect)
        suspensions = await cancel_at(number, work(), kind)
        await assert_clean(connect, database)
        number += 1
    assert number > 6


async def test_a_cancellation_while_the_snapshot_is_imported_brings_all_connections_home(
    connect: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, number, suspensions = snapshots._take, 1, 1

    async def work() -> None:
        async with same_snapshot(connect, 4) as sessions:
            await seen_by(sessions)

    async def take_and_cancel(session: AsyncSession, options: dict[str, Any]) -> None:
        # The tasks that import it have awaits of their own.
        nonlocal suspensions
        steps = Steps(take(session, options), number if options else 0, task.cancel)
        try:
            await steps
        finally:
            suspensions = max(suspensions, steps.suspensions)

    while number <= suspensions:
        await warm(connect)
        with monkeypatch.context() as patched:
            patched.setattr(snapshots, "_take", take_and_cancel)
            task = asyncio.create_task(work())
            await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        await assert_clean(connect, database)
        number += 1
    assert number > 3


async def test_the_handler_runs_once_for_all_of_them(database_url: URL, database: Database) -> None:
    calls = 0

    async def handler(connect: DBConnect) -> None:
        nonlocal calls
        calls += 1
        await connect.change_host(("127.0.0.1", "localhost")[calls % 2])

    connect = DBConnect.from_url(database_url, before_create_session_handler=handler)
    for number in (1, 2):
        async with same_snapshot(connect, 3) as sessions:
            assert len((await seen_by(sessions))[0]) == 1
        assert calls == number
    await connect.close()


async def test_a_connect_that_makes_sessions_in_its_own_way_makes_them_so(
    database_url: URL, database: Database
) -> None:
    class OurConnect(DBConnect[AsyncSession]):
        async def create_session(self) -> AsyncSession:
            session = await super().create_session()
            session.info["ours"] = True
            return session

    connect = OurConnect.from_url(database_url)
    async with connect, same_snapshot(connect, 2) as sessions:
        assert [session.info["ours"] for session in sessions] == [True, True]
        assert len((await seen_by(sessions))[0]) == 1


async def test_other_databases_are_refused_and_say_what_to_use(sqlite_connect: DBConnect) -> None:
    with pytest.raises(InvalidRequestError, match=r"(?s)same_snapshot\(\).*not sqlite.*run_in_new"):
        async with same_snapshot(sqlite_connect, 2):
            pass


async def test_a_pool_of_one_connection_has_no_second(database_url: URL) -> None:
    async with DBConnect.from_url(database_url, poolclass=StaticPool) as one:
        with pytest.raises(ValueError, match="the pool has 1 at most"):
            async with same_snapshot(one, 2):
                pass


async def test_a_mock_makes_the_sessions(database_url: URL) -> None:
    connect = DBConnect.from_url(database_url)
    connect.create_session = AsyncMock()  # type: ignore[method-assign]
    async with same_snapshot(connect, 2) as sessions:
        assert sessions == (connect.create_session.return_value,) * 2
    assert connect.create_session.return_value.close.await_count == 2


async def test_in_the_transaction_of_a_test_they_see_what_it_has_written(
    connect: DBConnect, database: Database
) -> None:
    async with shared_transaction(connect) as session:
        await session.execute(insert(Item).values(name="a"))
        for _ in range(2):
            async with same_snapshot(connect, 4) as sessions:
                counts = await asyncio.gather(*(reader.scalar(COUNT) for reader in sessions))
                assert counts == [1] * 4
                with pytest.raises(InvalidRequestError, match="session is read-only"):
                    await sessions[0].execute(insert(Item).values(name="b"))
        assert await session.scalar(COUNT) == 1
    assert await database.names() == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_on_a_standby_they_see_the_same_data_too(driver: str) -> None:
    with primary_and_standby() as (_, standby):
        url = make_url(standby.url).set(drivername=f"postgresql+{driver}")
        async with DBConnect.from_url(url) as connect:
            async with same_snapshot(connect, 3) as sessions:
                snapshots, backends = await seen_by(sessions)
                assert (len(snapshots), len(backends)) == (1, 3)
                assert await sessions[2].scalar(text("SELECT pg_is_in_recovery()"))
            assert connections_out(connect) == 0
            async with new_non_ctx_session(connect) as session:  # on one of theirs
                assert (await session.execute(SNAPSHOT)).one()[1] in backends
