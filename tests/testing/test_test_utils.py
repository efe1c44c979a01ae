"""The tools for users' tests, used as users use them: with fixtures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
    DBConnect,
    db_session,
    is_context_initiated,
    put_db_session_to_context,
)
from context_async_sqlalchemy.starlette_utils import add_starlette_http_db_session_middleware
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.mocks import connect_mock
from tests.helpers.models import Item, Seat


@pytest_asyncio.fixture
async def session(connect: DBConnect) -> AsyncGenerator[AsyncSession]:
    """Return the session of the test; the application shares its connection."""
    async with (
        rollback_session(connect) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(connect, session),
    ):
        yield session


@pytest_asyncio.fixture
async def client(connect: DBConnect) -> AsyncGenerator[httpx.AsyncClient]:
    async def rename(request: Request) -> JSONResponse:
        session = await db_session(connect)
        item = (await session.scalars(select(Item))).one()
        item.name = "renamed"
        await session.commit()
        return JSONResponse({})

    app = Starlette(routes=[Route("/", rename)])
    add_starlette_http_db_session_middleware(app)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_the_test_and_the_application_share_a_transaction_that_is_not_committed(
    session: AsyncSession, client: httpx.AsyncClient, database: Database
) -> None:
    session.add(item := Item(name="a"))
    await session.flush()

    assert (await client.get("/")).status_code == 200

    await session.refresh(item)
    assert item.name == "renamed"
    assert await database.names() == []


async def test_rollback_session_rolls_back(connect: DBConnect, database: Database) -> None:
    async with rollback_session(connect) as session:
        session.add(Item(name="a"))
        await session.flush()
    assert await database.names() == []


async def test_a_test_context_closes_its_sessions_only_if_asked_to() -> None:
    for auto_close in (False, True):
        session = AsyncMock(spec=AsyncSession)
        async with set_test_context(auto_close=auto_close):
            put_db_session_to_context(connect_mock(), session)
        assert session.close.await_count == auto_close
    assert not is_context_initiated()


async def test_a_test_context_that_closes_commits_what_its_block_has_done(
    connect: DBConnect, database: Database
) -> None:
    async with set_test_context(auto_close=True):
        session = await db_session(connect)
        session.add(Item(name="a"))
    assert await database.names() == ["a"]
    with pytest.raises(ContextClosedError):
        await session.execute(select(1))
    assert not is_context_initiated()


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_a_test_context_that_closes_rolls_back_a_block_that_raises(
    connect: DBConnect, database: Database, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        async with set_test_context(auto_close=True):
            (await db_session(connect)).add(Item(name="a"))
            await (await db_session(connect)).flush()
            raise error
    assert await database.names() == []
    assert not is_context_initiated()


async def test_a_test_context_that_closes_raises_the_error_of_its_commit(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(IntegrityError):
        async with set_test_context(auto_close=True):
            session = await db_session(connect)
            session.add_all([Seat(number=1), Seat(number=1)])
    assert connections_out(connect) == 0
    assert await database.seats() == []


async def test_a_test_context_that_does_not_close_commits_nothing(
    connect: DBConnect, database: Database
) -> None:
    async with set_test_context():
        await (await db_session(connect)).execute(insert(Item).values(name="a"))
    assert await database.names() == []
    assert connections_out(connect) == 0


async def test_a_test_context_closes_what_db_session_made_in_it(connect: DBConnect) -> None:
    async with set_test_context():
        await (await db_session(connect)).execute(select(1))
        assert connections_out(connect) == 1
    assert connections_out(connect) == 0


async def test_a_test_context_closes_no_session_twice() -> None:
    for auto_close in (False, True):
        connect = Mock(context_key="key", create_session=AsyncMock())
        async with set_test_context(auto_close=auto_close):
            session: Any = await db_session(connect)
        session.close.assert_awaited_once_with()


async def test_a_test_context_cannot_be_set_twice() -> None:
    async with set_test_context():
        with pytest.raises(ContextAlreadyInitiatedError):
            async with set_test_context():
                pytest.fail("the block must not run")


async def test_a_savepoint_session_needs_a_context(connect: DBConnect) -> None:
    async with rollback_session(connect) as session:
        with pytest.raises(ContextNotInitiatedError):
            async with put_savepoint_session_in_ctx(connect, session):
                pytest.fail("the block must not run")
