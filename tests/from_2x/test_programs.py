"""Programs written for 2.1.9, which did the same there, run unchanged: sessions and contexts.

Each was run on 2.1.9, on PostgreSQL, when it was written. What differs is in the changelog, under
"From 2.x", and is in none of them.
"""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock

import pytest
from sqlalchemy import URL, insert, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
)

from context_async_sqlalchemy import (
    ContextAlreadyInitiatedError,
    ContextNotInitiatedError,
    DBConnect,
    atomic_db_session,
    auto_commit_by_status_code,
    close_all_sessions,
    close_db_session,
    commit_all_sessions,
    commit_db_session,
    db_session,
    get_db_session_from_context,
    init_db_session_ctx,
    is_context_initiated,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    pop_db_session_from_context,
    put_db_session_to_context,
    reset_db_session_ctx,
    rollback_all_sessions,
    rollback_db_session,
    run_in_new_ctx,
)
from tests.helpers.database import Database
from tests.helpers.from_2x import MakeConnect, add
from tests.helpers.models import Item, Seat

# The connect


async def test_a_connect_opens_nothing_until_it_is_used(connection: DBConnect) -> None:
    assert isinstance(connection.context_key, str)
    assert not connection._engine
    assert not connection._session_maker
    session = await connection.create_session()
    assert isinstance(connection._engine, AsyncEngine)
    assert await connection.session_maker() is connection._session_maker
    assert await session.scalar(select(1)) == 1
    await session.close()
    await connection.close()
    assert not connection._engine
    assert not connection._session_maker
    await connection.close()
    async with new_non_ctx_session(connection) as again:
        assert await again.scalar(select(1)) == 1


async def test_a_connect_changes_its_host(connection: DBConnect) -> None:
    await connection.session_maker()
    first, host = connection._engine, connection.host
    assert host is not None
    await connection.change_host(host)
    assert connection._engine is first
    await connection.connect(host)
    assert connection._engine is not first
    await connection.change_host("127.0.0.1" if host != "127.0.0.1" else "localhost")
    assert connection.host != host
    with pytest.raises(ValueError, match="host must not be empty"):
        await connection.change_host("")


async def test_the_handler_may_set_the_host(database_url: URL, make: MakeConnect) -> None:
    async def handler(connection: DBConnect) -> None:
        assert database_url.host is not None
        await connection.change_host(database_url.host)

    connection = make(host=None, before_create_session_handler=handler)
    async with new_non_ctx_session(connection) as session:
        assert await session.scalar(select(1)) == 1
    with pytest.raises(ValueError, match="host is not set"):
        await make(host=None).create_session()


async def test_a_session_in_flight_outlives_the_engine(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "a")
    await connection.close()
    await session.commit()
    await reset_db_session_ctx(token)
    assert await database.names() == ["a"]


# A context by hand


async def test_a_context_is_opened_and_ended_by_hand(connection: DBConnect) -> None:
    assert not is_context_initiated()
    with pytest.raises(ContextNotInitiatedError):
        await db_session(connection)
    token = init_db_session_ctx()
    assert is_context_initiated()
    assert get_db_session_from_context(connection) is None
    session = await asyncio.create_task(db_session(connection))
    assert await db_session(connection) is session
    with pytest.raises(ContextAlreadyInitiatedError):
        init_db_session_ctx()
    inner = init_db_session_ctx(force=True)
    assert await db_session(connection) is not session
    await reset_db_session_ctx(inner)
    assert pop_db_session_from_context(connection) is session
    assert pop_db_session_from_context(connection) is None
    put_db_session_to_context(connection, session)
    assert await db_session(connection) is session
    await reset_db_session_ctx(token, with_close=True)
    assert not is_context_initiated()


async def test_a_context_that_is_ended_without_closing_leaves_its_session(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "a")
    await reset_db_session_ctx(token, with_close=False)
    await session.commit()
    await session.close()
    assert await database.names() == ["a"]


@pytest.mark.parametrize(
    ("status", "names"), [(200, ["a"]), (302, ["a"]), (399, ["a"]), (400, []), (500, [])]
)
async def test_the_status_decides(
    status: int, names: list[str], connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    await add(connection, "a")
    await auto_commit_by_status_code(status)
    await reset_db_session_ctx(token)
    assert await database.names() == names


async def test_all_sessions_are_committed_rolled_back_and_closed(
    make: MakeConnect, database: Database
) -> None:
    one, two = make(), make()
    token = init_db_session_ctx()
    await add(one, "a")
    await add(two, "b")
    await commit_all_sessions()
    assert sorted(await database.names()) == ["a", "b"]
    await add(one, "c")
    await add(two, "d")
    await rollback_all_sessions()
    session = await add(one, "e")
    await close_all_sessions()
    assert not session.in_transaction()
    await reset_db_session_ctx(token)
    assert sorted(await database.names()) == ["a", "b"]


async def test_before_commit_is_awaited_for_a_transaction(connection: DBConnect) -> None:
    called: list[AsyncSession] = []

    async def before_commit(session: AsyncSession) -> None:
        called.append(session)

    token = init_db_session_ctx()
    session = await db_session(connection)
    await commit_all_sessions(before_commit)
    await add(connection, "a")
    await rollback_all_sessions()
    assert called == []
    await add(connection, "b")
    await auto_commit_by_status_code(status_code=200, before_commit=before_commit)
    assert called == [session]
    await reset_db_session_ctx(token)


async def test_a_session_in_a_context_may_be_a_mock(connection: DBConnect) -> None:
    mock = AsyncMock(spec=AsyncSession)
    mock.in_transaction.return_value = True
    token = init_db_session_ctx()
    put_db_session_to_context(connection, mock)
    await commit_all_sessions()
    await rollback_all_sessions()
    await reset_db_session_ctx(token)
    counts = (mock.commit.await_count, mock.rollback.await_count, mock.close.await_count)
    assert counts == (1, 1, 1)


# The session


async def test_a_session_is_committed_rolled_back_and_closed_by_hand(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "a")
    await commit_db_session(connection)
    await add(connection, "b")
    await rollback_db_session(connection)
    assert await db_session(connection) is session
    await close_db_session(connection)
    assert get_db_session_from_context(connection) is None
    assert await add(connection, "c") is not session
    await commit_db_session(connection)
    await reset_db_session_ctx(token)
    assert await database.names() == ["a", "c"]


async def test_a_commit_that_fails_is_raised(connection: DBConnect, database: Database) -> None:
    token = init_db_session_ctx()
    session = await db_session(connection)
    session.add_all([Seat(number=1), Seat(number=1)])
    with pytest.raises(IntegrityError):
        await commit_db_session(connection)
    await reset_db_session_ctx(token)
    assert await database.seats() == []


@pytest.mark.parametrize(
    ("mode", "stored", "stored_if_it_fails"),
    [
        ("commit", ["before", "in"], ["before"]),
        ("rollback", ["in"], []),
        ("append", ["before", "in"], []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_atomic_block_ends_an_open_transaction_or_goes_on_with_it(
    mode: Any,
    stored: list[str],
    stored_if_it_fails: list[str],
    fails: bool,
    connection: DBConnect,
    database: Database,
) -> None:
    token = init_db_session_ctx()
    session = await add(connection, "before")
    try:
        async with atomic_db_session(connection, mode) as same:
            assert same is session
            await add(connection, "in")
            if fails:
                raise LookupError
    except LookupError:
        assert fails
    assert not session.in_transaction()
    await reset_db_session_ctx(token)
    assert await database.names() == (stored_if_it_fails if fails else stored)


async def test_an_atomic_block_may_refuse_an_open_transaction(
    connection: DBConnect, database: Database
) -> None:
    token = init_db_session_ctx()
    async with atomic_db_session(connect=connection, current_transaction="raise"):
        await add(connection, "a")
    await add(connection, "b")
    with pytest.raises(InvalidRequestError):
        async with atomic_db_session(connection, "raise"):
            pytest.fail("the block must not run")
    await reset_db_session_ctx(token)
    assert await database.names() == ["a"]


async def test_sessions_without_a_context(connection: DBConnect, database: Database) -> None:
    async with new_non_ctx_session(connection) as session:
        await session.execute(insert(Item).values(name="not committed"))
    async with new_non_ctx_session(connection) as session:
        await session.execute(insert(Item).values(name="a"))
        await session.commit()
    async with new_non_ctx_atomic_session(connection) as session:
        assert session.in_transaction()
        await session.execute(insert(Item).values(name="b"))
    with pytest.raises(LookupError):
        async with new_non_ctx_atomic_session(connection) as session:
            await session.execute(insert(Item).values(name="fails"))
            raise LookupError
    assert await database.names() == ["a", "b"]


async def test_calls_in_new_contexts_are_apart(connection: DBConnect, database: Database) -> None:
    async def work(name: str, *, fails: bool = False) -> AsyncSession:
        session = await add(connection, name)
        if fails:
            raise LookupError(name)
        return session

    token = init_db_session_ctx()
    outer = await add(connection, "outer, rolled back")
    sessions = await asyncio.gather(
        run_in_new_ctx(work, "a"), run_in_new_ctx(work, name="b", fails=False)
    )
    with pytest.raises(LookupError):
        await run_in_new_ctx(work, "c", fails=True)
    assert len({outer, *sessions}) == 3
    assert await db_session(connection) is outer
    await reset_db_session_ctx(token)
    assert sorted(await database.names()) == ["a", "b"]
