"""What users get wrong: each mistake has a clear error, and every connection comes home."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import URL, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    ASGIHTTPDBSessionMiddleware,
    ContextClosedError,
    DBConnect,
    commit_db_session,
    db_session,
    init_db_session_ctx,
    is_context_initiated,
    new_db_session_ctx,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    run_in_new_ctx,
)
from context_async_sqlalchemy._engine.private_names import await_only
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from tests.helpers.asgi import add, app_of, call, respond
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, assert_clean, make_connect
from tests.helpers.models import Item
from tests.helpers.serving import http_client

HINT = "run_in_new_ctx"


def told(error: BaseException | None) -> str:
    """Return the message of an error, with its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


async def outcome(awaitable: Awaitable[Any]) -> BaseException | None:
    """Return the error that `awaitable` raised, of any kind, if it did."""
    try:
        await awaitable
    except BaseException as error:
        return error
    return None


async def statement_is_running(database: Database) -> None:
    async with asyncio.timeout(30):
        while not any(state.startswith("active") for state in await database.states()):
            await asyncio.sleep(0)


def app_with_child(
    connect: DBConnect,
    database: Database,
    child: Callable[[], Awaitable[Any]],
    tasks: list[asyncio.Task[Any]],
    *,
    write_first: bool,
    status: int,
    late: bool,
) -> ASGIApp:
    """Make an application that responds while a child task is inside a statement."""

    @ASGIHTTPDBSessionMiddleware
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if write_first:
            await add(connect, "a")
        if late:
            await respond(send, status)
        tasks.append(asyncio.ensure_future(child()))
        await statement_is_running(database)
        if not late:
            await respond(send, status)

    return app


@pytest.mark.parametrize("write_first", [True, False])
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("late", [False, True])
async def test_a_child_task_inside_a_statement_when_its_context_is_settled(
    connect: DBConnect, database: Database, write_first: bool, status: int, late: bool
) -> None:
    async def child() -> None:
        session = await db_session(connect)
        await session.execute(text("SELECT pg_sleep(20)"))

    tasks: list[asyncio.Task[Any]] = []
    app = app_with_child(
        connect, database, child, tasks, write_first=write_first, status=status, late=late
    )
    error = await outcome(call(app))

    if status == 200 or late:
        assert HINT in told(error)
    assert await outcome(tasks[0]) is not None
    await assert_clean(connect, database)
    assert await database.names() == (["a"] if write_first and late and status == 200 else [])
    await call(app_of(lambda _: add_ok(connect)))
    assert "after" in await database.names()


@pytest.mark.parametrize("first", ["the request", "its child"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_others_open_in_the_place_of_a_connection_that_two_tasks_discard_is_not_lost(
    database_url: URL, database: Database, driver: str, first: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with DBConnect.from_url(url, pool_size=1, max_overflow=0) as connect:

        async def pid() -> Any:
            async with new_non_ctx_session(connect) as session:
                return await session.scalar(text("SELECT pg_backend_pid()"))

        await pid()
        assert connect.engine is not None
        dialect: Any = connect.engine.dialect
        terminate = dialect.do_terminate
        is_closed, may_go_on = asyncio.Event(), asyncio.Event()

        def terminate_slowly(connection: Any) -> None:
            dialect.do_terminate = terminate  # once
            terminate(connection)
            is_closed.set()
            await_only(may_go_on.wait())

        dialect.do_terminate = terminate_slowly

        async def child() -> None:
            session = await db_session(connect)
            await session.execute(text("SELECT pg_sleep(2)"))

        async def handler(_: Scope) -> int:
            tasks.append(asyncio.create_task(child()))
            await statement_is_running(database)
            if first == "its child":
                tasks[0].cancel()
                await is_closed.wait()
            return 400

        tasks: list[asyncio.Task[Any]] = []
        request = asyncio.create_task(outcome(call(app_of(handler))))
        await is_closed.wait()
        await outcome(tasks[0] if first == "the request" else request)
        other = asyncio.create_task(pid())
        async with asyncio.timeout(30):
            while not (other.done() or connect.pool_status().waiting):
                await asyncio.sleep(0)
        may_go_on.set()
        await outcome(asyncio.gather(request, *tasks))
        assert await pid() == await other


async def add_ok(connect: DBConnect) -> int:
    await add(connect, "after")
    return 200


@pytest.mark.parametrize("status", [200, 400])
async def test_a_child_task_that_is_taking_a_connection_when_its_context_ends(
    connect: DBConnect, database: Database, status: int
) -> None:
    assert (await connect.session_maker()) is not None
    assert connect.engine is not None
    blockers = [await connect.engine.connect() for _ in range(15)]
    tasks: list[asyncio.Task[Any]] = []

    async def child() -> None:
        await add(connect, "a")

    async def handler(_: Scope) -> int:
        tasks.append(asyncio.create_task(child()))
        await asyncio.sleep(0)
        return status

    error = await outcome(call(app_of(handler)))
    for blocker in blockers:
        await blocker.close()

    if status == 200:
        assert HINT in told(error)
    assert isinstance(await outcome(tasks[0]), ContextClosedError)
    await assert_clean(connect, database)
    assert await database.names() == []


async def test_two_tasks_that_use_one_session_at_once_take_turns(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await asyncio.gather(add(connect, "a"), add(connect, "b"))
        return 200

    await call(app_of(handler))

    await assert_clean(connect, database)
    assert await database.names() == ["a", "b"]


async def in_a_group(*awaitables: Coroutine[Any, Any, Any]) -> None:
    async with asyncio.TaskGroup() as group:
        for awaitable in awaitables:
            group.create_task(awaitable)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "sqlite"])
@pytest.mark.parametrize("together", [asyncio.gather, in_a_group])
@pytest.mark.parametrize("is_request", [True, False])
async def test_two_tasks_that_use_a_session_first_get_one_connection_and_no_log(
    database_url: URL,
    database: Database,
    sqlite_connect: DBConnect,
    caplog: pytest.LogCaptureFixture,
    driver: str,
    together: Callable[..., Awaitable[Any]],
    is_request: bool,
) -> None:
    connect = make_connect(database_url.set(drivername=f"postgresql+{driver}"))
    if driver == "sqlite":
        connect = sqlite_connect
    await connect.close()  # so that no connection is open

    async def handler(_: Scope) -> int:
        await together(add(connect, "a"), add(connect, "b"))
        return 200

    async def block() -> None:
        async with new_db_session_ctx():
            await handler({})

    await (call(app_of(handler)) if is_request else block())

    assert [record.getMessage() for record in caplog.records] == []
    await assert_clean(connect, database)
    assert connect.pool_status().checked_in == 1
    async with new_db_session_ctx():
        names = await (await db_session(connect)).scalars(select(Item.name))
        assert sorted(names) == ["a", "b"]
    await connect.close()


async def test_a_session_kept_after_its_request_is_refused(
    connect: DBConnect, database: Database
) -> None:
    sessions: list[AsyncSession] = []

    async def handler(_: Scope) -> int:
        sessions.append(await add(connect, "a"))
        return 200

    await call(app_of(handler))
    session = sessions[0]
    for use in (
        session.execute(text("SELECT 1")),
        session.get(Item, 1),
        session.connection(),
        session.scalar(text("SELECT 1")),
    ):
        with pytest.raises(ContextClosedError, match=HINT):
            await use
    session.add(Item(name="late"))
    with pytest.raises(ContextClosedError, match=HINT):
        await session.commit()
    await session.close()
    await assert_clean(connect, database)
    assert await database.names() == ["a"]


async def test_a_session_kept_after_a_block_is_refused(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
    with pytest.raises(ContextClosedError, match=HINT):
        await session.execute(text("SELECT 1"))
    assert connections_out(connect) == 0


class _ClosingSession(AsyncSession):
    async def close(self) -> None:
        await self.execute(text("SELECT 1"))
        await super().close()


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_close_that_sends_a_statement_is_refused_in_a_context_and_logged(
    database_url: URL, database: Database, caplog: pytest.LogCaptureFixture, is_open: bool
) -> None:
    options: Any = {"class_": _ClosingSession}
    async with DBConnect.from_url(database_url, session_options=options) as connect:
        token = init_db_session_ctx()
        if is_open:
            await (await db_session(connect)).execute(text("SELECT 1"))
        else:
            await db_session(connect)
        await reset_db_session_ctx(token)
        await assert_clean(connect, database)
    assert "A database session failed to close" in caplog.text
    assert "ContextClosedError" in caplog.text


async def test_a_session_that_somebody_else_made_is_theirs_again_after_the_context(
    connect: DBConnect,
) -> None:
    async with new_non_ctx_session(connect) as session:
        async with new_db_session_ctx():
            put_db_session_to_context(connect, session)
        assert await session.scalar(text("SELECT 1")) == 1


async def test_a_session_that_was_popped_is_its_takers_after_the_context(
    connect: DBConnect,
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        assert pop_db_session_from_context(connect) is session
    assert await session.scalar(text("SELECT 1")) == 1
    await session.close()


async def test_a_block_that_ends_in_another_task_is_closed_with_an_error(
    connect: DBConnect, database: Database
) -> None:
    block = new_db_session_ctx()
    await block.__aenter__()
    await add(connect, "a")

    error = await outcome(asyncio.create_task(close(block)))

    assert isinstance(error, RuntimeError)
    assert "opened in another task" in str(error)
    await assert_clean(connect, database)
    with pytest.raises(ContextClosedError):
        await db_session(connect)


async def close(block: Any) -> None:
    await block.__aexit__(None, None, None)


async def test_a_context_opened_by_hand_and_never_ended_is_ended_with_its_request(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(_: Scope) -> int:
        init_db_session_ctx(force=True)
        await add(connect, "forgotten")
        return 200

    await call(app_of(handler))

    assert "reset_db_session_ctx" in caplog.text
    await assert_clean(connect, database)
    assert await database.names() == []


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_contexts_that_were_never_ended_are_ended_with_the_one_around_them(
    connect: DBConnect, database: Database, is_cancelled: bool
) -> None:
    async def work() -> None:
        async with new_db_session_ctx():
            await add(connect, "around")
            await commit_db_session(connect)
            for name in ("forgotten", "and the one in it"):
                init_db_session_ctx(force=True)
                await add(connect, name)
            if is_cancelled:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()

    with suppress(asyncio.CancelledError):
        await work()

    assert not is_context_initiated()
    assert connections_out(connect) == 0
    assert await database.names() == ["around"]


async def test_a_server_started_inside_a_context_gives_each_request_its_own(
    connect: DBConnect, database: Database
) -> None:
    sessions = []

    async def handler(scope: Scope) -> int:
        sessions.append(await add(connect, scope["path"]))
        return 200

    async with new_db_session_ctx():
        sessions.append(await db_session(connect))
        async with http_client(app_of(handler)) as client:
            for path in ("/a", "/b"):
                assert (await client.get(path)).status_code == 200
        assert await database.names() == ["/a", "/b"]
        assert await db_session(connect) is sessions[0]
    assert len(set(sessions)) == 3


async def test_concurrent_queries_have_their_own_contexts(
    connect: DBConnect, database: Database
) -> None:
    async def handler(_: Scope) -> int:
        await asyncio.gather(*(run_in_new_ctx(add, connect, name) for name in "abc"))
        return 400

    await call(app_of(handler))
    assert sorted(await database.names()) == ["a", "b", "c"]
