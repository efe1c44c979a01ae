"""Mocks and fakes of users' tests, in the places of connects, engines and sessions."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock, create_autospec

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import URL, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    commit_all_sessions,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    put_db_session_to_context,
    rollback_all_sessions,
)
from context_async_sqlalchemy._engine.border import password_of
from context_async_sqlalchemy.fastapi_utils import (
    DBSessionDependency,
    add_fastapi_http_db_session_middleware,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.mocks import connect_mock, session_mock


class Fake:
    """A session as somebody writes it for a test; it says truthfully whether it has begun."""

    def __init__(self) -> None:
        self.has_begun = False
        self.calls: list[str] = []

    def add(self, _: object) -> None:
        self.has_begun = True

    def in_transaction(self) -> bool:
        return self.has_begun

    async def commit(self) -> None:
        self.has_begun = False
        self.calls.append("commit")

    async def rollback(self) -> None:
        self.has_begun = False
        self.calls.append("rollback")

    async def close(self) -> None:
        self.calls.append("close")


class FakeConnect:
    """A connect with no more than what is needed."""

    context_key = "fake"

    def __init__(self, session: Any) -> None:
        self.session = session

    async def create_session(self) -> Any:
        return self.session


async def test_a_fake_is_settled_whenever_it_has_begun() -> None:
    connect: Any = FakeConnect(session := Fake())
    async with new_db_session_ctx():
        assert await db_session(connect) is session
        session.add(object())
        await rollback_all_sessions()
        await commit_all_sessions()
        session.add(object())
        await commit_all_sessions()
        session.add(object())
    assert session.calls == ["rollback", "commit", "commit", "close"]


@pytest.mark.parametrize(
    "mock",
    [
        MagicMock(),
        AsyncMock(),
        MagicMock(spec=DBConnect),
        create_autospec(DBConnect, instance=True),
        FakeConnect(None),
    ],
    ids=["magic", "async", "spec", "autospec", "fake"],
)
async def test_a_mock_of_a_connect_may_make_real_sessions(
    connect: DBConnect, database: Database, mock: Any
) -> None:
    made = [await connect.create_session(), await connect.create_session()]
    mock.context_key = "mock"
    mock.create_session = AsyncMock(side_effect=made)
    async with new_db_session_ctx():
        assert await (await db_session(mock)).scalar(select(1)) == 1
    assert connections_out(connect) == 0


@pytest.mark.parametrize("has_middleware", [True, False])
async def test_a_mock_is_settled_once_in_a_request_with_a_dependency(has_middleware: bool) -> None:
    session = AsyncMock()
    connect: Any = Mock(context_key="key", create_session=AsyncMock(return_value=session))
    app, dependency = FastAPI(), Depends(DBSessionDependency(connect))
    if has_middleware:
        add_fastapi_http_db_session_middleware(app)

    async def endpoint(given: Any = dependency) -> None:
        assert given is session

    app.add_api_route("/", endpoint)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/")).status_code == 200
    session.commit.assert_awaited_once_with()
    session.close.assert_awaited_once_with()


async def test_an_engine_that_is_put_into_a_connect_twice_is_closed_with_it(
    connect: DBConnect, database_url: URL, database: Database
) -> None:
    engine = create_async_engine(database_url)
    connect._engine = engine
    connect._engine = engine
    async with engine.connect():
        pass
    await connect.close()
    await database.is_left_by_all()


async def test_before_commit_gets_the_mock_itself() -> None:
    session = AsyncMock()
    given: list[object] = []

    async def before_commit(session: AsyncSession) -> None:
        given.append(session)
        await session.execute(select(1))

    async with new_db_session_ctx(before_commit):
        put_db_session_to_context(connect_mock(), session)
    assert given == [session]
    session.execute.assert_awaited_once()
    session.commit.assert_awaited_once_with()


async def test_an_autospec_of_a_session_is_a_mock() -> None:
    session = create_autospec(AsyncSession(), instance=True)
    session.in_transaction.return_value = False
    connect: Any = Mock(context_key="key", create_session=AsyncMock(return_value=session))
    async with new_non_ctx_atomic_session(connect) as given:
        assert given is session
    async with new_db_session_ctx(), atomic_db_session(connect) as given:
        assert given is session
    assert session.commit.await_count == 2
    await asyncio.sleep(0)


async def test_a_block_around_a_mock_is_the_mocks_own() -> None:
    session = session_mock()
    block = type(session).__aexit__
    connect: Any = Mock(context_key="key", create_session=AsyncMock(return_value=session))
    async with new_db_session_ctx():
        async with await db_session(connect) as given:
            assert given is session.__aenter__.return_value
        session.__aexit__.assert_awaited_once_with(None, None, None)
    assert type(session).__aexit__ is block


def test_only_a_password_that_is_text_can_be_hidden() -> None:
    engine: Any = Mock(spec=["url"])
    engine.url.password = "secret"
    assert password_of(engine) == "secret"
    engine.url.password = object()
    assert password_of(engine) is None
    assert password_of(Mock(spec=["dispose"])) is None
    assert password_of(None) is None
