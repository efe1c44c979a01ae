"""What would store something for real is refused, where a test has forgotten its transaction."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import InvalidRequestError
from starlette.requests import Request

from context_async_sqlalchemy import DBConnect, new_db_session_ctx, run_in_new_ctx
from context_async_sqlalchemy._testing.only_shared import refuse_other_connections
from context_async_sqlalchemy.postgres import keep_on_primary
from context_async_sqlalchemy.starlette_utils import database_health
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.shared import Served, names_after, names_in

REFUSED = "outside of a test's transaction"


async def test_without_the_transaction_of_a_test_nothing_is_stored(
    tested: DBConnect, served: Served, in_process: httpx.AsyncClient
) -> None:
    with refuse_other_connections():
        assert (await in_process.get("/add/a")).status_code == 500
        with pytest.raises(InvalidRequestError, match=REFUSED):
            await run_in_new_ctx(served.insert, "a")
        assert connections_out(tested) == 0
    assert await names_after(tested) == []
    assert (await in_process.get("/add/a")).status_code == 200
    assert await names_after(tested) == ["a"]


async def test_a_connection_that_the_pool_had_already_is_refused(
    tested: DBConnect, served: Served
) -> None:
    await names_after(tested)
    with refuse_other_connections():
        with pytest.raises(InvalidRequestError, match=REFUSED):
            await run_in_new_ctx(served.insert, "a")
        assert connections_out(tested) == 0
    assert await names_after(tested) == []


async def test_a_health_check_is_refused(tested: DBConnect) -> None:
    request = Request({"type": "http"})
    with refuse_other_connections():
        assert (await database_health(tested)(request)).status_code == 503
    assert (await database_health(tested)(request)).status_code == 200


async def test_a_look_for_the_primary_is_refused_and_the_test_goes_on(
    database_url: URL, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    host = f"{database_url.host}:{database_url.port}"
    async with DBConnect.from_url(
        database_url, before_create_session_handler=keep_on_primary([host])
    ) as connect:
        with refuse_other_connections():
            async with shared_transaction(connect) as session:
                await run_in_new_ctx(Served(connect).insert, "a")
                assert await names_in(session) == ["a"]
    assert f"The host {host} does not say what it is: InvalidRequestError" in caplog.messages
    assert await database.names() == []


def test_what_is_refused_is_not_even_connected(tmp_path: Path) -> None:
    connect = DBConnect.from_url(f"sqlite:///{tmp_path / 'real.db'}")
    with refuse_other_connections(), pytest.raises(InvalidRequestError, match=REFUSED):
        asyncio.run(connect.ping())
    assert list(tmp_path.iterdir()) == []


async def test_in_the_transaction_of_a_test_all_goes_on(
    tested: DBConnect, served: Served, in_process: httpx.AsyncClient
) -> None:
    with refuse_other_connections():
        async with shared_transaction(tested) as session:
            assert (await in_process.get("/add/a")).status_code == 200
            await run_in_new_ctx(served.insert, "b")
            assert await names_in(session) == ["a", "b"]
        assert connections_out(tested) == 0
    assert await names_after(tested) == []


async def test_another_engine_is_refused_beside_the_transaction_of_a_test(
    tested: DBConnect,
) -> None:
    other = DBConnect.from_url("sqlite://")
    with refuse_other_connections():
        async with shared_transaction(tested), other, new_db_session_ctx():
            session = await other.create_session()
            with pytest.raises(InvalidRequestError, match=REFUSED):
                await session.execute(text("SELECT 1"))
