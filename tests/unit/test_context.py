"""The container and the context variable: opening, ending, refusing."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from contextvars import Context, ContextVar
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from context_async_sqlalchemy import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    close_all_sessions,
    commit_all_sessions,
    db_session,
    get_db_session_from_context,
    init_db_session_ctx,
    is_context_initiated,
    new_db_session_ctx,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
)
from context_async_sqlalchemy._engine.shield import run_to_completion
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.mocks import connect_mock, session_mock
from tests.helpers.models import Item


async def test_without_a_context_every_function_says_what_to_use() -> None:
    connect = connect_mock()
    for call in (get_db_session_from_context, pop_db_session_from_context):
        with pytest.raises(ContextNotInitiatedError, match="add the middleware"):
            call(connect)
    with pytest.raises(ContextNotInitiatedError, match="add the middleware"):
        put_db_session_to_context(connect, session_mock())
    for function in (commit_all_sessions, rollback_all_sessions, close_all_sessions):
        with pytest.raises(ContextNotInitiatedError, match="new_db_session_ctx"):
            await function()
    with pytest.raises(ContextNotInitiatedError, match="run_in_new_ctx"):
        await db_session(connect)


async def test_a_context_is_initiated_until_it_is_reset() -> None:
    assert not is_context_initiated()
    token = init_db_session_ctx()
    assert is_context_initiated()
    await reset_db_session_ctx(token)
    assert not is_context_initiated()


async def test_a_context_cannot_be_initiated_twice_but_by_force() -> None:
    token = init_db_session_ctx()
    put_db_session_to_context(connect_mock(), outer := session_mock())
    with pytest.raises(ContextAlreadyInitiatedError, match="new_db_session_ctx"):
        init_db_session_ctx()

    inner_token = init_db_session_ctx(force=True)
    assert get_db_session_from_context(connect_mock()) is None
    await reset_db_session_ctx(inner_token)

    assert get_db_session_from_context(connect_mock()) == outer
    outer.close.assert_not_awaited()
    await reset_db_session_ctx(token)
    outer.close.assert_awaited_once_with()


async def test_a_session_can_be_put_got_and_popped() -> None:
    async with new_db_session_ctx():
        assert pop_db_session_from_context(connect_mock()) is None
        put_db_session_to_context(connect_mock("a"), a := session_mock())
        put_db_session_to_context(connect_mock("b"), b := session_mock())
        assert get_db_session_from_context(connect_mock("a")) == a
        assert await db_session(connect_mock("b")) == b
        assert pop_db_session_from_context(connect_mock("a")) == a
        assert get_db_session_from_context(connect_mock("a")) is None
    a.close.assert_not_awaited()
    b.close.assert_awaited_once_with()


async def test_a_replaced_session_is_still_committed_and_closed() -> None:
    async with new_db_session_ctx():
        put_db_session_to_context(connect_mock(), first := session_mock(in_transaction=True))
        put_db_session_to_context(connect_mock(), first)
        put_db_session_to_context(connect_mock(), second := session_mock(in_transaction=True))
        assert get_db_session_from_context(connect_mock()) == second
    for session in (first, second):
        session.commit.assert_awaited_once_with()
        session.close.assert_awaited_once_with()


async def test_a_session_of_two_connects_is_settled_until_both_are_popped() -> None:
    async with new_db_session_ctx():
        session = session_mock(in_transaction=True)
        for key in "ab":
            put_db_session_to_context(connect_mock(key), session)
        assert pop_db_session_from_context(connect_mock("a")) == session
        await commit_all_sessions()
        session.commit.assert_awaited_once_with()
        assert pop_db_session_from_context(connect_mock("b")) == session
    session.close.assert_not_awaited()


async def test_a_mock_of_which_every_method_is_async_is_committed_and_closed() -> None:
    async with new_db_session_ctx():
        put_db_session_to_context(connect_mock(), session := AsyncMock())
    session.commit.assert_awaited_once_with()
    session.close.assert_awaited_once_with()


async def test_a_sync_session_is_refused() -> None:
    async with new_db_session_ctx():
        with pytest.raises(TypeError, match="AsyncSession"):
            put_db_session_to_context(connect_mock(), Session())  # type: ignore[arg-type]


async def test_reset_without_close_leaves_the_sessions_to_the_caller() -> None:
    token = init_db_session_ctx()
    put_db_session_to_context(connect_mock(), session := session_mock())
    await reset_db_session_ctx(token, with_close=False)
    session.close.assert_not_awaited()


async def test_reset_rolls_back_what_is_uncommitted(connect: DBConnect, database: Database) -> None:
    token = init_db_session_ctx()
    session = await db_session(connect)
    session.add(Item(name="lost"))
    await session.flush()
    assert connections_out(connect) == 1
    await reset_db_session_ctx(token)
    assert connections_out(connect) == 0
    assert await database.names() == []


@pytest.mark.parametrize("token", ["variable", "used", "outer", "nothing"])
async def test_a_foreign_token_is_refused_and_closes_nothing(token: str) -> None:
    used = init_db_session_ctx()
    await reset_db_session_ctx(used)
    outer = init_db_session_ctx()
    inner = init_db_session_ctx(force=True)
    put_db_session_to_context(connect_mock(), session := session_mock())
    tokens: dict[str, Any] = {
        "variable": ContextVar[int]("other").set(1),
        "used": used,
        "outer": outer,
        "nothing": None,
    }

    with pytest.raises(ValueError, match="not the one of the database session context here"):
        await reset_db_session_ctx(tokens[token])

    session.close.assert_not_awaited()
    assert get_db_session_from_context(connect_mock()) == session
    await reset_db_session_ctx(inner)
    await reset_db_session_ctx(outer)
    with pytest.raises(ValueError, match="once"):
        await reset_db_session_ctx(outer)


async def test_a_context_reset_in_another_task_is_closed_with_an_error() -> None:
    token = init_db_session_ctx()
    put_db_session_to_context(connect_mock(), session := session_mock())

    with pytest.raises(RuntimeError, match="opened in another task"):
        await asyncio.create_task(reset_db_session_ctx(token))

    session.close.assert_awaited_once_with()
    with pytest.raises(ContextClosedError, match="has ended"):
        await db_session(connect_mock())
    # The end of this task's own context variable: it may open another context now.
    assert not is_context_initiated()
    await reset_db_session_ctx(init_db_session_ctx())


async def test_a_task_that_outlives_its_context_is_refused(connect: DBConnect) -> None:
    ended = asyncio.Event()

    async def late() -> AsyncSession:
        await ended.wait()
        return await db_session(connect)

    async with new_db_session_ctx():
        task = asyncio.create_task(late())
    ended.set()

    with pytest.raises(ContextClosedError, match=r"was started in it.* context of its own"):
        await task
    assert connect.engine is None


async def test_close_all_sessions_closes_the_rest_when_one_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with new_db_session_ctx():
        for key in "abc":
            put_db_session_to_context(connect_mock(key), session_mock(in_transaction=True))
        a, b, c = (get_db_session_from_context(connect_mock(key)) for key in "abc")
        assert isinstance(b, MagicMock)
        b.close.side_effect = OSError("connection lost")
        with caplog.at_level(logging.ERROR, logger="context_async_sqlalchemy"):
            await close_all_sessions()
        assert is_context_initiated()
    for session in (a, b, c):
        assert isinstance(session, MagicMock)
        session.close.assert_awaited_with()
    b.invalidate.assert_awaited_with()
    assert caplog.records[0].exc_info is not None
    assert "connection lost" in caplog.text


async def test_an_invalidation_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    session = session_mock()
    session.close.side_effect = session.invalidate.side_effect = OSError("connection lost")
    async with new_db_session_ctx():
        put_db_session_to_context(connect_mock(), session)
    assert "could not be discarded" in caplog.text


async def test_work_runs_to_completion_however_often_its_task_is_cancelled() -> None:
    started, release = asyncio.Event(), asyncio.Event()
    done = []

    async def work() -> None:
        started.set()
        await release.wait()
        done.append("work")

    task = asyncio.create_task(run_to_completion(work()))
    await started.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["work"]


async def test_an_error_of_work_whose_task_was_cancelled_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await release.wait()
        raise OSError("connection lost")

    task = asyncio.create_task(run_to_completion(work()))
    await started.wait()
    task.cancel()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "connection lost" in caplog.text


async def test_contexts_of_concurrent_tasks_are_apart(connect: DBConnect) -> None:
    async def session_of_a_task() -> AsyncSession:
        async with new_db_session_ctx():
            await asyncio.sleep(0)
            return await db_session(connect)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(session_of_a_task(), context=Context()) for _ in range(10)]
    assert len({id(task.result()) for task in tasks}) == 10


async def test_a_pooled_connection_does_not_keep_the_session_that_opened_it(
    connect: DBConnect,
) -> None:
    # asyncpg keeps the context variables of whoever was there when it opened a connection.
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(select(1))
        kept = weakref.ref(session)
        del session
    gc.collect()
    assert kept() is None
