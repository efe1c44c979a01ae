"""How a context is settled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any
from unittest.mock import AsyncMock, Mock, patch

import asyncpg
import pytest
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    commit_all_sessions,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    put_db_session_to_context,
    rollback_all_sessions,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.mocks import connect_mock, session_mock
from tests.helpers.models import Item, Seat


@pytest.mark.parametrize(
    ("status", "committed"), [(200, True), (204, True), (302, True), (399, True), (400, False)]
)
async def test_the_status_decides(
    connect: DBConnect, database: Database, status: int, committed: bool
) -> None:
    async with new_db_session_ctx():
        (await db_session(connect)).add(Item(name="a"))
        await (await db_session(connect)).flush()
        await auto_commit_by_status_code(status)
        assert await database.names() == (["a"] if committed else [])
        assert connections_out(connect) == 0


async def test_the_same_session_goes_on_after_it_was_settled(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add(item := Item(name="a"))
        await commit_all_sessions()
        assert await db_session(connect) is session
        assert item in session
        item.name = "b"
        await commit_all_sessions()
        assert await database.names() == ["b"]
        item.name = "c"
        await session.flush()
        await rollback_all_sessions()
        assert connections_out(connect) == 0
        await session.refresh(item)
        assert item.name == "b"


async def test_a_session_without_a_transaction_is_left_alone() -> None:
    async with new_db_session_ctx():
        put_db_session_to_context(connect_mock(), session := session_mock())
        before_commit = Mock()
        await commit_all_sessions(before_commit)
        await rollback_all_sessions()
    session.commit.assert_not_awaited()
    session.rollback.assert_not_awaited()
    before_commit.assert_not_called()


async def test_every_session_is_flushed_before_one_is_committed(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    with pytest.raises(IntegrityError) as caught:
        async with new_db_session_ctx():
            (await db_session(connect)).add(Item(name="a"))
            second = await db_session(second_connect)
            second.add_all([Item(name="b"), Item(name="b")])
    assert await database.names() == []
    assert not hasattr(caught.value, "__notes__")


async def test_a_commit_that_fails_names_what_had_been_committed(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    with pytest.raises(IntegrityError) as caught:
        async with new_db_session_ctx():
            (await db_session(connect)).add(Item(name="a"))
            (await db_session(second_connect)).add_all([Seat(number=1), Seat(number=1)])
    assert await database.names() == ["a"]
    assert await database.seats() == []
    assert connect.engine is not None
    url = connect.engine.url
    assert caught.value.__notes__ == [
        f"Already committed when this happened: {url.host}/{url.database}"
    ]


async def test_a_session_without_an_engine_is_named_all_the_same() -> None:
    first, second = session_mock(in_transaction=True), session_mock(in_transaction=True)
    first.bind = None
    second.commit.side_effect = OSError("connection lost")
    with pytest.raises(OSError, match="connection lost") as caught:
        async with new_db_session_ctx():
            put_db_session_to_context(connect_mock("a"), first)
            put_db_session_to_context(connect_mock("b"), second)
    assert repr(first) in caught.value.__notes__[0]


async def test_before_commit_gets_each_session_and_may_open_another(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    called: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        called.append(session)
        other = await db_session(second_connect)
        if other not in called:
            other.add(Item(name="audit"))

    async with new_db_session_ctx(before_commit):
        session = await db_session(connect)
        session.add(Item(name="a"))
        other = await db_session(second_connect)
    assert called == [session, other]
    assert sorted(await database.names()) == ["a", "audit"]


async def test_before_commit_may_be_a_plain_function(
    connect: DBConnect, database: Database
) -> None:
    before_commit = Mock(return_value=None)
    async with new_db_session_ctx(before_commit):
        session = await db_session(connect)
        session.add(Item(name="a"))
    before_commit.assert_called_once_with(session)


async def test_a_session_opened_by_before_commit_is_flushed_before_one_is_committed(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    async def before_commit(_: AsyncSession) -> None:
        (await db_session(second_connect)).add_all([Item(name="b"), Item(name="b")])

    with pytest.raises(IntegrityError):
        async with new_db_session_ctx(before_commit):
            (await db_session(connect)).add(Item(name="a"))
    assert await database.names() == []


async def test_before_commit_that_raises_rolls_back(connect: DBConnect, database: Database) -> None:
    with pytest.raises(ValueError, match="no"):
        async with new_db_session_ctx(Mock(side_effect=ValueError("no"))):
            session = await db_session(connect)
            session.add(Item(name="a"))
            await session.flush()
    assert await database.names() == []


async def test_a_commit_of_several_databases_is_not_torn_by_a_cancellation() -> None:
    committing, release = asyncio.Event(), asyncio.Event()
    first, second = session_mock(in_transaction=True), session_mock(in_transaction=True)

    async def commit_first() -> None:
        committing.set()
        await release.wait()

    first.commit.side_effect = commit_first

    async def unit_of_work() -> None:
        async with new_db_session_ctx():
            put_db_session_to_context(connect_mock("a"), first)
            put_db_session_to_context(connect_mock("b"), second)

    task = asyncio.create_task(unit_of_work())
    await committing.wait()
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    second.commit.assert_awaited_once_with()


async def test_a_rollback_runs_to_completion_however_often_it_is_cancelled() -> None:
    rolling_back, release = asyncio.Event(), asyncio.Event()
    first, second = session_mock(in_transaction=True), session_mock(in_transaction=True)

    async def rollback_first() -> None:
        rolling_back.set()
        await release.wait()

    first.rollback.side_effect = rollback_first

    async def unit_of_work() -> None:
        async with new_db_session_ctx():
            put_db_session_to_context(connect_mock("a"), first)
            put_db_session_to_context(connect_mock("b"), second)
            try:
                await rollback_all_sessions()
            finally:
                rolled_back.append(second.rollback.await_count)

    rolled_back: list[int] = []
    task = asyncio.create_task(unit_of_work())
    await rolling_back.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rolled_back == [1]


async def test_an_error_while_rolling_back_is_logged_and_hides_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, healthy = session_mock(in_transaction=True), session_mock(in_transaction=True)
    broken.rollback.side_effect = OSError("connection lost")
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="the cause"):
        async with new_db_session_ctx():
            put_db_session_to_context(connect_mock("a"), broken)
            put_db_session_to_context(connect_mock("b"), healthy)
            raise ValueError("the cause")
    broken.invalidate.assert_awaited_once_with()
    healthy.rollback.assert_awaited_once_with()
    assert "connection lost" in caplog.text


async def test_a_connection_that_cannot_be_rolled_back_is_not_returned(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await database.terminate(pid)
        await rollback_all_sessions()
        assert await session.scalar(text("SELECT pg_backend_pid()")) != pid


@pytest.mark.parametrize("is_open", [False, True])
async def test_an_error_while_closing_is_logged_and_the_other_sessions_are_closed(
    connect: DBConnect, second_connect: DBConnect, caplog: pytest.LogCaptureFixture, is_open: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the listener failed")

    first, second = Item(name="first"), Item(name="second")
    async with new_db_session_ctx():
        broken, healthy = await db_session(connect), await db_session(second_connect)
        broken.add(first)
        healthy.add(second)
        await commit_all_sessions()
        event.listen(broken.sync_session, "persistent_to_detached", fail)
        if is_open:
            await broken.connection()
            await close_all_sessions()
    assert "the listener failed" in caplog.text
    assert inspect(second).detached
    assert connections_out(connect) == 0


async def test_a_session_class_that_overrides_close_is_respected(connect: DBConnect) -> None:
    closed = []

    class Session(AsyncSession):
        async def close(self) -> None:
            await super().close()
            closed.append(self)

    session = Session((await connect.create_session()).bind)
    async with new_db_session_ctx():
        put_db_session_to_context(connect, session)
    assert closed == [session]


async def test_a_close_that_is_patched_is_called(connect: DBConnect) -> None:
    session = await connect.create_session()
    with patch.object(session, "close", AsyncMock()) as close:
        async with new_db_session_ctx():
            put_db_session_to_context(connect, session)
        close.assert_awaited_once_with()
    with patch.object(AsyncSession, "close", autospec=True) as close:
        async with new_db_session_ctx():
            session = await db_session(connect)
        close.assert_awaited_once_with(session)


async def test_a_session_class_that_overrides_commit_is_respected(
    connect: DBConnect, database: Database
) -> None:
    committed = []

    class Session(AsyncSession):
        async def commit(self) -> None:
            await super().commit()
            committed.append(self)

    await connect.session_maker()
    async with new_db_session_ctx():
        put_db_session_to_context(connect, session := Session(connect.engine))
        session.add(Item(name="a"))
    assert committed == [session]
    assert await database.names() == ["a"]


async def test_close_all_sessions_keeps_the_context_open(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        first = await db_session(connect)
        first.add(Item(name="lost"))
        await first.flush()
        await close_all_sessions()
        assert connections_out(connect) == 0
        second = await db_session(connect)
        assert second is not first
        second.add(Item(name="kept"))
    assert await database.names() == ["kept"]


async def test_a_session_used_after_close_all_sessions_is_still_settled(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await close_all_sessions()
        session.add(Item(name="kept"))
        await session.flush()
    assert await database.names() == ["kept"]


async def test_a_session_opened_by_the_commit_of_another_is_committed_with_it(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    class Session(AsyncSession):
        async def commit(self) -> None:
            (await db_session(second_connect)).add(Item(name="outbox"))
            await super().commit()

    await connect.session_maker()
    async with new_db_session_ctx():
        put_db_session_to_context(connect, session := Session(connect.engine))
        session.add(Item(name="main"))
        await commit_all_sessions()
        assert sorted(await database.names()) == ["main", "outbox"]


@pytest.fixture
async def slow_commit(database: Database) -> AsyncGenerator[None]:
    """Make the COMMIT of a transaction that adds a seat take long."""
    await database.execute(
        "CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(20); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON seat"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION take_long()"
    )
    yield
    await database.execute("DROP FUNCTION take_long CASCADE")


async def add_seat(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        (await db_session(connect)).add(Seat(number=1))


async def add_seat_and_commit(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        (await db_session(connect)).add(Seat(number=1))
        await commit_db_session(connect)


async def add_seat_in_atomic_block(connect: DBConnect) -> None:
    async with new_db_session_ctx(), atomic_db_session(connect) as session:
        session.add(Seat(number=1))


@pytest.mark.usefixtures("slow_commit")
@pytest.mark.parametrize("unit_of_work", [add_seat, add_seat_and_commit, add_seat_in_atomic_block])
async def test_a_connection_lost_during_commit_is_an_unknown_outcome(
    connect: DBConnect,
    database: Database,
    unit_of_work: Callable[[DBConnect], Coroutine[Any, Any, None]],
) -> None:
    task = asyncio.create_task(unit_of_work(connect))
    async with asyncio.timeout(30):
        while not (pid := await database.pid_of("COMMIT%")):
            await asyncio.sleep(0)
    await database.terminate(pid)

    with pytest.raises(CommitOutcomeUnknownError, match="committed or not") as caught:
        await task

    assert isinstance(caught.value.__cause__, DBAPIError)
    assert connections_out(connect) == 0


async def test_a_connection_lost_before_commit_is_no_unknown_outcome(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(DBAPIError):
        async with new_db_session_ctx():
            session = await db_session(connect)
            session.add(Seat(number=1))
            await session.flush()
            await database.terminate(await session.scalar(text("SELECT pg_backend_pid()")))
            raw = await (await session.connection()).get_raw_connection()
            assert raw.driver_connection is not None
            async with asyncio.timeout(30):
                # Until the driver has noticed, it would send the COMMIT.
                while not raw.driver_connection.is_closed():
                    await asyncio.sleep(0)
    assert await database.seats() == []
    assert connections_out(connect) == 0


async def test_a_connection_lost_in_the_flush_of_a_commit_is_no_unknown_outcome(
    connect: DBConnect, database: Database
) -> None:
    # The second one is how asyncpg 0.30 may see it through PgBouncer; SQLAlchemy does not wrap it.
    with pytest.raises((DBAPIError, asyncpg.InternalClientError)):
        async with new_db_session_ctx():
            session = await db_session(connect)
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            session.add(Seat(number=1))
            await database.terminate(pid)
    assert await database.seats() == []


@pytest.mark.parametrize(
    ("sqlstate", "invalidated", "unknown"),
    [("57P01", False, True), ("08006", False, True), (None, True, True), ("23505", False, False)],
)
async def test_the_sqlstate_of_a_failed_commit_tells_a_lost_connection(
    sqlstate: str | None, invalidated: bool, unknown: bool
) -> None:
    driver_error = Exception("from the driver")
    driver_error.sqlstate = sqlstate  # type: ignore[attr-defined]
    session = session_mock(in_transaction=True)
    session.commit.side_effect = DBAPIError(None, None, driver_error, False, invalidated)
    with pytest.raises(CommitOutcomeUnknownError if unknown else DBAPIError):
        async with new_db_session_ctx():
            put_db_session_to_context(connect_mock(), session)
