"""A dependency from its making to its end: initialized, replaced, closed, missing."""


# No `from __future__ import annotations`: FastAPI reads annotations that name local variables.

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, WebSocket
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect
from context_async_sqlalchemy.fastapi_utils import DBSessionDependency
from tests.helpers.database import Database
from tests.helpers.dependency import served
from tests.helpers.serving import http_client


async def test_an_application_made_for_each_test_may_have_a_dependency_each_time(
    connect: DBConnect, database: Database
) -> None:
    for _ in range(sys.getrecursionlimit()):
        dependency = DBSessionDependency(connect)
    async with served(dependency, database) as client:
        assert (await client.post("/shared?user=ann")).status_code == 200


async def test_initialize_decides_who_manages_transactions(
    database_url: URL, database: Database
) -> None:
    dependency = DBSessionDependency()
    await dependency.initialize(database_url, manage_transactions=False)
    async with served(dependency, database) as client:
        assert (await client.post("/own")).status_code == 200
        assert await database.names() == ["committed"]
        await dependency.initialize(database_url)
        assert (await client.post("/shared?user=ann")).status_code == 200
    assert await database.names() == ["committed", "ann", "service", "endpoint"]
    await dependency.aclose()


@pytest.mark.parametrize("isolation_level", [None, "SERIALIZABLE"])
async def test_it_is_initialized_and_closed_in_the_lifespan(
    database_url: URL, database: Database, isolation_level: Any
) -> None:
    dependency = DBSessionDependency()
    levels: list[str] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        await dependency.initialize(
            database_url, database_url.password, isolation_level=isolation_level, pool_size=2
        )
        yield
        await dependency.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(dependency)]) -> int | None:
        levels.append((await session.execute(text("SHOW transaction_isolation"))).scalar_one())
        return dependency.connect.pool_status().capacity

    for _ in range(2):
        async with http_client(app) as client:
            assert (await client.post("/")).json() == 12
            connect = dependency.connect
        assert connect.engine is None
        with pytest.raises(RuntimeError, match="not initialized"):
            _ = dependency.connect
    assert levels == [(isolation_level or "read committed").lower()] * 2


async def test_it_is_initialized_with_a_password_of_its_own() -> None:
    dependency = DBSessionDependency()
    await dependency.initialize("postgresql://app@db.example.com/shop", "p@ss/word")
    engine = await dependency.connect.create_engine()
    assert (engine.url.username, engine.url.password) == ("app", "p@ss/word")


async def test_initialized_twice_it_closes_the_first_connect(tmp_path: Any) -> None:
    dependency = DBSessionDependency()
    await dependency.initialize(f"sqlite:///{tmp_path / 'first.db'}", isolation_level=None)
    first = dependency.connect
    await first.ping()
    with pytest.raises(ValueError, match="cannot be read"):
        await dependency.initialize("")
    assert first.engine is not None
    await dependency.initialize("sqlite://", manage_transactions=False)
    assert first.engine is None
    await dependency.aclose()
    await dependency.aclose()


async def test_no_request_sees_a_connect_that_is_being_closed(tmp_path: Any) -> None:
    dependency = DBSessionDependency()
    url = f"sqlite:///{tmp_path / 'test.db'}"
    await dependency.initialize(url)
    first = dependency.connect
    await first.ping()
    replacing = [asyncio.create_task(dependency.initialize(url)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not replacing[0].done()
    second = dependency.connect
    assert second is not first
    await asyncio.gather(*replacing)
    assert dependency.connect is second
    await second.ping()
    closing = asyncio.create_task(dependency.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    with pytest.raises(RuntimeError, match="not initialized"):
        _ = dependency.connect
    await closing
    assert (first.engine, second.engine) == (None, None)


async def test_a_connect_that_was_given_is_closed_and_kept(connect: DBConnect) -> None:
    dependency = DBSessionDependency(connect)
    await connect.ping()
    await dependency.aclose()
    assert connect.engine is None
    assert dependency.connect is connect


async def test_before_it_is_initialized_a_request_is_told_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()

    @app.post("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(DBSessionDependency())],
    ) -> None: ...

    with caplog.at_level(logging.ERROR):
        async with http_client(app, log_level="error") as client:
            assert (await client.post("/")).status_code == 500
    assert "await dependency.initialize(url)" in caplog.text


async def test_a_websocket_is_told_what_to_do(connect: DBConnect) -> None:
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(
        websocket: WebSocket,
        session: Annotated[AsyncSession, Depends(DBSessionDependency(connect))],
    ) -> None: ...

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(_: Any) -> None: ...

    scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "app": app}
    with pytest.raises(RuntimeError, match="new_db_session_ctx"):
        await app(scope, receive, send)
