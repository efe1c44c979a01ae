"""db_session, and what users do with it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import URL, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    rollback_db_session,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, checked_connect
from tests.helpers.models import Item


async def test_children_and_tasks_get_the_same_session(connect: DBConnect) -> None:
    async def child() -> AsyncSession:
        return await db_session(connect)

    async with new_db_session_ctx():
        # A child task asks first: its parent still sees the session.
        first = await asyncio.create_task(child())
        assert await db_session(connect) is first
        assert await child() is first
        assert set(await asyncio.gather(child(), child())) == {first}


async def test_no_connection_is_taken_before_the_first_statement(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        assert connections_out(connect) == 0
        await session.execute(text("SELECT 1"))
        assert connections_out(connect) == 1


class SlowConnect(DBConnect):
    """A connect whose handler really waits, and counts its calls."""

    def __init__(self) -> None:
        super().__init__(
            lambda _: Mock(spec=["dispose"]),
            lambda _: async_sessionmaker(),
            host="a",
            before_create_session_handler=self._wait,
        )
        self.calls = 0
        self.waiting = asyncio.Event()
        self.release = asyncio.Event()
        self.error: Exception | None = None

    async def _wait(self, _: DBConnect) -> None:
        self.calls += 1
        self.waiting.set()
        await self.release.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error


async def test_concurrent_first_calls_get_one_session() -> None:
    connect = SlowConnect()
    async with new_db_session_ctx():
        tasks = [asyncio.create_task(db_session(connect)) for _ in range(5)]
        await connect.waiting.wait()
        connect.release.set()
        assert len(set(await asyncio.gather(*tasks))) == 1
    assert connect.calls == 1


async def test_a_cancelled_creation_is_tried_again_by_who_waits() -> None:
    connect = SlowConnect()
    async with new_db_session_ctx():
        first = asyncio.create_task(db_session(connect))
        second = asyncio.create_task(db_session(connect))
        await connect.waiting.wait()
        first.cancel()
        connect.release.set()
        session = await second
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await db_session(connect) is session
    assert connect.calls == 2


async def test_a_failed_creation_is_tried_again_by_the_next_call() -> None:
    connect = SlowConnect()
    connect.error = OSError("no such host")
    connect.release.set()
    async with new_db_session_ctx():
        with pytest.raises(OSError, match="no such host"):
            await db_session(connect)
        assert isinstance(await db_session(connect), AsyncSession)


async def test_a_session_made_after_its_context_ended_is_closed_and_refused() -> None:
    connect = SlowConnect()
    async with new_db_session_ctx():
        task = asyncio.create_task(db_session(connect))
        await connect.waiting.wait()
    connect.release.set()
    with pytest.raises(ContextClosedError):
        await task


async def test_a_handler_that_asks_for_the_session_it_precedes_is_told_so() -> None:
    async def handler(connect: DBConnect) -> None:
        await db_session(connect)

    connect = DBConnect(
        lambda _: Mock(spec=["dispose"]),
        lambda _: async_sessionmaker(),
        host="a",
        before_create_session_handler=handler,
    )
    async with new_db_session_ctx():
        with pytest.raises(RuntimeError, match="before_create_session_handler"):
            await db_session(connect)


async def test_a_handler_whose_child_task_asks_for_that_session_is_told_so() -> None:
    async def handler(connect: DBConnect) -> None:
        await asyncio.gather(db_session(connect))

    connect = DBConnect(
        lambda _: Mock(spec=["dispose"]),
        lambda _: async_sessionmaker(),
        host="a",
        before_create_session_handler=handler,
    )
    async with new_db_session_ctx():
        with pytest.raises(RuntimeError, match="before_create_session_handler"):
            await db_session(connect)


async def test_a_task_that_a_handler_has_begun_may_ask_for_a_session_later() -> None:
    tasks: list[asyncio.Task[AsyncSession]] = []
    made = asyncio.Event()

    async def refresh(connect: DBConnect) -> AsyncSession:
        await made.wait()
        async with new_db_session_ctx():
            return await db_session(connect)

    async def handler(connect: DBConnect) -> None:
        if not tasks:
            tasks.append(asyncio.create_task(refresh(connect)))

    connect = DBConnect(
        lambda _: Mock(spec=["dispose"]),
        lambda _: async_sessionmaker(),
        host="a",
        before_create_session_handler=handler,
    )
    async with new_db_session_ctx():
        session = await db_session(connect)
        made.set()
        assert await tasks[0] is not session


@pytest.mark.parametrize("commit", ["session", "function", "atomic", "outside"])
async def test_a_transaction_with_a_failed_statement_is_not_committed(
    connect: DBConnect, database: Database, commit: str
) -> None:
    async def write(session: AsyncSession) -> None:
        await session.execute(insert(Item).values(name="a"))
        with suppress(IntegrityError):
            await session.execute(insert(Item).values(name="a"))

    async def unit_of_work() -> None:
        if commit == "outside":
            async with new_non_ctx_atomic_session(connect) as session:
                await write(session)
        elif commit == "atomic":
            async with atomic_db_session(connect) as session:
                await write(session)
        else:
            session = await db_session(connect)
            await write(session)
            await (session.commit() if commit == "session" else commit_db_session(connect))

    with pytest.raises(PendingRollbackError, match="begin_nested") as caught:
        async with new_db_session_ctx():
            await unit_of_work()
    assert isinstance(caught.value.__cause__, Exception)
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_failed_statement_in_a_savepoint_is_forgiven(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add(Item(name="a"))
        await session.flush()
        with suppress(IntegrityError):
            async with session.begin_nested():
                await session.execute(insert(Item).values(name="a"))
        session.add(Item(name="b"))
    assert await database.names() == ["a", "b"]


async def test_a_failed_statement_is_forgiven_after_a_rollback(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        for _ in range(2):
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
        await session.rollback()
        session.add(Item(name="a"))
    assert await database.names() == ["a"]


async def test_a_failed_statement_is_forgiven_where_each_is_its_own_transaction(
    database_url: URL, database: Database
) -> None:
    async with checked_connect(database_url, database, isolation_level="AUTOCOMMIT") as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
            await session.execute(insert(Item).values(name="a"))
        assert await database.names() == ["a"]


async def test_a_failed_statement_is_forgiven_where_it_does_not_abort(
    sqlite_connect: DBConnect,
) -> None:
    async with new_db_session_ctx():
        session = await db_session(sqlite_connect)
        await session.execute(insert(Item).values(name="a"))
        with suppress(IntegrityError):
            await session.execute(insert(Item).values(name="a"))
    async with new_non_ctx_session(sqlite_connect) as session:
        assert await session.scalar(select(func.count(Item.id))) == 1


async def test_a_value_the_driver_refuses_to_send_does_not_abort(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="a"))
        with suppress(DBAPIError):
            await session.execute(insert(Item).values(name=1))
    assert await database.names() == ["a"]


async def test_commit_rollback_and_close_by_hand(connect: DBConnect, database: Database) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add(Item(name="committed"))
        await commit_db_session(connect)
        assert connections_out(connect) == 0
        assert await database.names() == ["committed"]

        session.add(Item(name="rolled back"))
        await session.flush()
        await rollback_db_session(connect)
        assert connections_out(connect) == 0

        session.add(Item(name="closed"))
        await session.flush()
        await close_db_session(connect)
        assert connections_out(connect) == 0

        assert await db_session(connect) is not session
        (await db_session(connect)).add(Item(name="new session"))
    assert await database.names() == ["committed", "new session"]


async def test_what_is_done_through_a_session_closed_by_hand_is_not_lost(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await close_db_session(connect)
        session.add(Item(name="kept"))
        await session.flush()
    assert await database.names() == ["kept"]


async def test_commit_rollback_and_close_without_a_session_do_nothing(
    connect: DBConnect,
) -> None:
    async with new_db_session_ctx():
        await commit_db_session(connect)
        await rollback_db_session(connect)
        await close_db_session(connect)
    assert connect.engine is None


@pytest.mark.parametrize("function", [commit_db_session, rollback_db_session, close_db_session])
async def test_commit_rollback_and_close_need_a_context(function: Any, connect: DBConnect) -> None:
    with pytest.raises(ContextNotInitiatedError):
        await function(connect)


async def test_a_session_outside_the_context_is_closed_and_rolled_back(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        async with new_non_ctx_session(connect) as session:
            assert session is not await db_session(connect)
            session.add(Item(name="a"))
            await session.commit()
            session.add(Item(name="b"))
            await session.flush()
        assert connections_out(connect) == 0
        assert await database.names() == ["a"]


class _SyncSession(Session):
    """Sends a statement when it is closed."""

    def close(self) -> None:
        self.execute(text("SELECT 1"))
        super().close()


class _AsyncSession(AsyncSession):
    """Sends a statement when it is closed."""

    async def close(self) -> None:
        await self.execute(text("SELECT pg_sleep(0)"))
        await super().close()


@pytest.mark.parametrize(
    "options", [{"sync_session_class": _SyncSession}, {"class_": _AsyncSession}]
)
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_session_may_send_a_statement_as_it_is_closed(
    database_url: URL,
    database: Database,
    caplog: pytest.LogCaptureFixture,
    options: Any,
    is_cancelled: bool,
) -> None:
    async def use(connect: DBConnect) -> None:
        async with new_non_ctx_session(connect):
            if is_cancelled:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()

    async with DBConnect.from_url(database_url, session_options=options) as connect:
        task = asyncio.create_task(use(connect))
        await asyncio.wait([task])
        assert task.cancelled() is is_cancelled
        assert connections_out(connect) == 0
    assert caplog.text == ""


async def test_a_listener_may_send_a_statement_as_a_session_is_closed(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[object] = []

    def listen(session: Session, _: object) -> None:
        heard.append(session.scalar(select(1)))

    async with new_non_ctx_session(connect) as session:
        event.listen(session.sync_session, "persistent_to_detached", listen)
        item = Item(name="a")
        session.add(item)
        await session.commit()
    assert heard == [1]
    assert connections_out(connect) == 0
    assert caplog.text == ""


async def test_an_atomic_session_outside_the_context_commits(
    connect: DBConnect, database: Database
) -> None:
    async with new_non_ctx_atomic_session(connect) as session:
        session.add(Item(name="a"))
    with pytest.raises(ValueError, match="no"):
        async with new_non_ctx_atomic_session(connect) as session:
            session.add(Item(name="b"))
            await session.flush()
            raise ValueError("no")
    assert connections_out(connect) == 0
    assert await database.names() == ["a"]


async def test_sessions_work_on_sqlite(sqlite_connect: DBConnect) -> None:
    async with new_db_session_ctx():
        (await db_session(sqlite_connect)).add(Item(name="a"))
    with pytest.raises(ValueError, match="no"):
        async with new_db_session_ctx():
            session = await db_session(sqlite_connect)
            session.add(Item(name="b"))
            await session.flush()
            raise ValueError("no")
    async with new_non_ctx_session(sqlite_connect) as session:
        assert await session.scalar(select(func.count(Item.id))) == 1


@pytest.mark.parametrize("name", ["create_session", "session_maker"])
async def test_what_a_test_puts_in_the_place_of_a_method_is_called_on_an_open_connect_too(
    connect: DBConnect, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async with new_db_session_ctx():
        await db_session(connect)  # opens it
    method, calls = getattr(connect, name), 0

    async def patched() -> Any:
        nonlocal calls
        calls += 1
        return await method()

    monkeypatch.setattr(connect, name, patched)
    async with new_db_session_ctx():
        await db_session(connect)
    assert calls == 1


@pytest.mark.parametrize("name", ["create_session", "session_maker"])
async def test_so_is_what_a_subclass_overrides(connect: DBConnect, name: str) -> None:
    calls = 0

    async def overridden(self: Any) -> Any:
        nonlocal calls
        calls += 1
        return await getattr(super(kind, self), name)()

    kind: Any = type("Kind", (type(connect),), {name: overridden})
    connect.__class__ = kind
    async with new_db_session_ctx():
        await db_session(connect)
    async with new_db_session_ctx():
        await db_session(connect)
    assert calls == 2


async def test_whoever_asks_while_another_task_waits_for_the_engine_gets_its_session(
    connect: DBConnect,
) -> None:
    gate, is_made = asyncio.Event(), asyncio.Event()

    async def create(_: str) -> Any:
        engine = await connect.create_engine()
        await gate.wait()
        is_made.set()  # which wakes the one who asks last before the one who waits for the engine
        return engine

    slow = DBConnect(create, lambda engine: async_sessionmaker(engine), "host")

    async def ask_when_made() -> AsyncSession:
        await is_made.wait()
        return await db_session(slow)

    async def ask_elsewhere() -> None:
        async with new_db_session_ctx():
            await db_session(slow)

    async with slow:
        making = asyncio.create_task(ask_elsewhere())
        await asyncio.sleep(0)
        async with new_db_session_ctx():
            waiting, last = (asyncio.create_task(f) for f in (db_session(slow), ask_when_made()))
            await asyncio.sleep(0)
            gate.set()
            assert await waiting is await last
        await making


async def test_an_open_connect_makes_the_next_session_for_the_host_that_was_set_since() -> None:
    hosts: list[str] = []

    def create(host: str) -> Any:
        hosts.append(host)
        return Mock(spec=["dispose"])

    connect = DBConnect(create, lambda _: async_sessionmaker(), "one")
    for host in ("one", "other"):
        connect.host = host
        async with new_db_session_ctx():
            await db_session(connect)
    assert hosts == ["one", "other"]


async def test_an_open_connect_makes_the_next_session_by_what_was_put_there(
    connect: DBConnect,
) -> None:
    async with new_db_session_ctx():
        await db_session(connect)
    put: Any = Mock(side_effect=connect._session_maker)
    connect._session_maker = put
    async with new_db_session_ctx():
        await db_session(connect)
    assert put.call_count == 1
