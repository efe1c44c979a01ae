"""Contexts that are not requests."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    is_context_initiated,
    new_db_session_ctx,
    run_in_new_ctx,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item


async def add_item(connect: DBConnect, name: str, *, fail: bool = False) -> AsyncSession:
    session = await db_session(connect)
    session.add(Item(name=name))
    await session.flush()
    if fail:
        raise ValueError("no")
    return session


async def test_a_block_commits_and_closes(connect: DBConnect, database: Database) -> None:
    async with new_db_session_ctx():
        await add_item(connect, "a")
    assert not is_context_initiated()
    assert connections_out(connect) == 0
    assert await database.names() == ["a"]


async def test_a_block_rolls_back_on_an_exception(connect: DBConnect, database: Database) -> None:
    with pytest.raises(ValueError, match="no"):
        async with new_db_session_ctx():
            await add_item(connect, "a", fail=True)
    assert not is_context_initiated()
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_block_whose_commit_fails_raises_and_closes(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(IntegrityError):
        async with new_db_session_ctx():
            (await db_session(connect)).add_all([Item(name="a"), Item(name="a")])
    assert not is_context_initiated()
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_an_inner_block_is_a_unit_of_work_of_its_own(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(ValueError, match="no"):
        async with new_db_session_ctx():
            outer = await add_item(connect, "outer")
            async with new_db_session_ctx():
                assert await add_item(connect, "inner") is not outer
            assert await db_session(connect) is outer
            raise ValueError("no")
    assert await database.names() == ["inner"]


async def test_a_cancelled_block_rolls_back(connect: DBConnect, database: Database) -> None:
    waiting = asyncio.Event()

    async def unit_of_work() -> None:
        async with new_db_session_ctx():
            await add_item(connect, "a")
            waiting.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(unit_of_work())
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_call_returns_the_result_and_commits(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        outer = await db_session(connect)
        inner = await run_in_new_ctx(add_item, connect, name="a")
        assert inner is not outer
        assert await db_session(connect) is outer
        assert await database.names() == ["a"]


async def test_a_call_that_raises_rolls_back_its_own_work_only(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        await add_item(connect, "outer")
        with pytest.raises(ValueError, match="no"):
            await run_in_new_ctx(add_item, connect, "inner", fail=True)
    assert await database.names() == ["outer"]


async def test_calls_run_concurrently_each_on_its_own_connection(connect: DBConnect) -> None:
    everyone_is_in = asyncio.Barrier(3)

    async def backend() -> int:
        session = await db_session(connect)
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        async with asyncio.timeout(30):
            await everyone_is_in.wait()
        assert isinstance(pid, int)
        return pid

    pids = await asyncio.gather(*(run_in_new_ctx(backend) for _ in range(3)))
    assert len(set(pids)) == 3


async def test_a_cancelled_caller_waits_until_the_call_has_rolled_back(
    connect: DBConnect, database: Database
) -> None:
    waiting = asyncio.Event()

    async def work() -> None:
        await add_item(connect, "a")
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(run_in_new_ctx(work))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connections_out(connect) == 0
    assert await database.names() == []
