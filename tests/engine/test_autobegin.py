"""Sessions that do not begin a transaction by themselves: `autobegin=False`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import URL, insert, select, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_commit,
    retry_on_transient_error,
    rollback_db_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.postgres import keep_on_primary
from context_async_sqlalchemy.starlette_utils import (
    StarletteHTTPDBSessionMiddleware,
    database_health,
)
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.database import Database
from tests.helpers.models import Item

DRIVERS = ["asyncpg", "psycopg"]


@pytest_asyncio.fixture(params=DRIVERS)
async def connect(request: pytest.FixtureRequest, database_url: URL) -> AsyncGenerator[DBConnect]:
    assert database_url.host is not None
    async with DBConnect.from_url(
        database_url.set(drivername=f"postgresql+{request.param}"),
        session_options={"autobegin": False},
        before_create_session_handler=keep_on_primary([database_url.host]),
        leak_detection_threshold=30,
    ) as connect:
        yield connect


async def write(connect: DBConnect, name: str) -> None:
    session = await db_session(connect)
    if not session.in_transaction():
        await session.begin()
    await session.execute(insert(Item).values(name=name))


async def test_a_connect_waits_until_its_database_is_ready(
    connect: DBConnect, database: Database
) -> None:
    await connect.ping()
    await connect.wait_until_ready(attempts=1)
    await connect.wait_until_ready(select(Item), attempts=1)
    with pytest.raises(Exception, match="nowhere"):
        await connect.wait_until_ready(select(text("1")).select_from(text("nowhere")), attempts=1)
    assert connect.pool_status().checked_out == 0


async def test_a_request_is_committed_and_health_is_told(
    connect: DBConnect, database: Database
) -> None:
    async def endpoint(request: Request) -> PlainTextResponse:
        status = int(request.path_params["status"])
        await write(connect, f"request {status}")
        return PlainTextResponse(status_code=status)

    routes = [Route("/health", database_health(connect)), Route("/{status}", endpoint)]
    app = Starlette(routes=routes)
    app.add_middleware(StarletteHTTPDBSessionMiddleware, attempts=2)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.get("/health")).status_code == 200
        for status in 201, 404:
            assert (await client.get(f"/{status}")).status_code == status
    assert await database.names() == ["request 201"]


async def test_every_block_is_committed(connect: DBConnect, database: Database) -> None:
    called: list[str] = []
    async with new_db_session_ctx():
        async with atomic_db_session(connect) as session:
            session.add(Item(name="atomic"))
            on_commit(connect, lambda: called.append("atomic"))
        async with atomic_db_session(connect) as session:
            async with atomic_db_session(connect, "savepoint"):
                session.add(Item(name="savepoint"))
            async with atomic_db_session(connect, "append"):
                session.add(Item(name="append"))
        await commit_db_session(connect)
        await rollback_db_session(connect)
    async with new_non_ctx_atomic_session(connect) as session:
        session.add(Item(name="committed early"))
        await session.commit()
    async with new_non_ctx_session(connect) as session, session.begin():
        session.add(Item(name="by hand"))
    async with new_non_ctx_atomic_session(connect) as session:
        session.add(Item(name="outside"))
    await run_in_new_ctx(write, connect, "new context")
    await retry_on_transient_error()(write)(connect, "retried")
    assert called == ["atomic"]
    written = ["atomic", "savepoint", "append", "committed early", "by hand", "outside"]
    assert await database.names() == [*written, "new context", "retried"]


async def test_a_test_shares_a_transaction(connect: DBConnect, database: Database) -> None:
    async with shared_transaction(connect) as session:
        await run_in_new_ctx(write, connect, "gone")
        await connect.ping()
        async with session.begin():
            assert list(await session.scalars(select(Item.name))) == ["gone"]
    assert await database.names() == []
