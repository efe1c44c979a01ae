"""In the transaction of a test, a request sends as many statements as it does without."""

from __future__ import annotations

from pathlib import Path

import httpx
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.testclient import TestClient

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.fastapi_utils import (
    add_fastapi_http_db_session_middleware,
    database_lifespan,
)
from context_async_sqlalchemy.observability import assert_queries, count_queries
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from tests.helpers.shared import Served


async def test_the_savepoints_of_a_shared_transaction_do_not_count(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    with assert_queries(1) as queries:
        assert (await in_process.get("/add/a")).status_code == 200
    assert queries.statements[0].startswith("INSERT INTO item")


async def test_without_a_shared_transaction_it_is_as_many(
    served: Served, in_process: httpx.AsyncClient
) -> None:
    with assert_queries(1):
        assert (await in_process.get("/add/a")).status_code == 200


async def test_the_savepoint_of_a_test_context_does_not_count(tested: DBConnect) -> None:
    async with (
        rollback_session(tested) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(tested, session),
        count_queries() as queries,
    ):
        inner = await db_session(tested)
        await inner.execute(text("SELECT 1"))
        await inner.commit()
    assert queries.statements == ["SELECT 1"]


def test_a_sync_client_is_counted(tmp_path: Path) -> None:
    connect = DBConnect.from_url(f"sqlite+aiosqlite:///{tmp_path}/test.db")
    app = FastAPI(lifespan=database_lifespan(connect))
    add_fastapi_http_db_session_middleware(app)

    @app.get("/")
    async def select() -> None:
        await (await db_session(connect)).execute(text("SELECT 1"))

    with TestClient(app) as client, assert_queries(2):
        client.get("/")
        client.get("/")
