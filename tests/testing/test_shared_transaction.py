"""One transaction for the test and the application, as users have it: with a fixture."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest
from sqlalchemy import URL, insert, select, text
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Base, Item, Seat
from tests.helpers.serving import http_client
from tests.helpers.shared import Served, names_after, names_in


async def test_the_test_sees_what_a_request_commits(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/add/a")).status_code == 200
    assert await names_in(shared) == ["a"]
    assert served.called == ["a"]


async def test_a_request_sees_what_the_test_has_flushed_or_committed(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="a"))
    await shared.commit()
    shared.add(Item(name="b"))
    await shared.flush()
    assert (await in_process.get("/add/a")).status_code == 409
    assert (await in_process.get("/add/b")).status_code == 409
    assert (await in_process.get("/add/c")).status_code == 200
    assert await names_in(shared) == ["a", "b", "c"]
    assert served.called == ["c"]


async def test_a_4xx_undoes_what_the_request_wrote(
    shared: AsyncSession, served: Served, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="a"))
    await shared.flush()
    assert (await in_process.get("/refuse/b")).status_code == 422
    assert (await in_process.get("/crash/c")).status_code == 500
    assert await names_in(shared) == ["a"]
    assert served.called == []


async def test_a_swallowed_error_is_no_success(
    shared: AsyncSession, in_process: httpx.AsyncClient, tested: DBConnect
) -> None:
    assert (await in_process.get("/add/a")).status_code == 200
    is_sqlite = tested.engine is not None and tested.engine.dialect.name == "sqlite"
    assert (await in_process.get("/swallow/a")).status_code == (200 if is_sqlite else 500)
    assert (await in_process.get("/add/b")).status_code == 200
    assert await names_in(shared) == ["a", "b"]


async def test_everything_that_a_request_opens_is_in_the_transaction(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/nested/a")).status_code == 200
    suffixes = ["", " in a context", " in 0", " in 1", " in 2", " in no context", " atomic"]
    assert await names_in(shared) == [f"a{suffix}" for suffix in [*suffixes, " at the end"]]


async def test_atomic_sessions_of_every_mode_work(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/modes/a")).status_code == 200
    assert await names_in(shared) == [f"a {n}" for n in range(1, 8)]


async def test_a_body_and_a_background_task_are_committed(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/stream/a")).text == "a"
    assert (await in_process.get("/background/b")).status_code == 200
    assert await names_in(shared) == ["a", "a in the body", "b", "b in the background"]


async def test_what_was_committed_inside_a_failed_request_is_undone_with_it(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    assert (await in_process.get("/outer_fails/a")).status_code == 400
    assert await names_in(shared) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_everything_is_rolled_back_however_the_test_ends(
    tested: DBConnect, error: type[BaseException]
) -> None:
    served = Served(tested)
    with pytest.raises(error):
        async with shared_transaction(tested) as session:
            await run_in_new_ctx(served.insert, "a")
            session.add(Item(name="b"))
            await session.flush()
            raise error
    assert await names_after(tested) == []
    assert connections_out(tested) == 0


async def test_each_of_two_databases_has_a_transaction_of_its_own(
    connect: DBConnect, second_connect: DBConnect, database: Database
) -> None:
    async def insert(suffix: str) -> None:
        for number, each in enumerate((connect, second_connect)):
            session = await db_session(each)
            session.add(Item(name=f"{number} {suffix}"))
            await session.flush()

    async def fail() -> None:
        await insert("undone")
        raise ZeroDivisionError

    async with shared_transaction(connect) as one, shared_transaction(second_connect) as two:
        await asyncio.gather(*(run_in_new_ctx(insert, suffix) for suffix in "ab"))
        with pytest.raises(ZeroDivisionError):
            await run_in_new_ctx(fail)
        assert sorted(await names_in(one)) == ["0 a", "0 b"]
        assert sorted(await names_in(two)) == ["1 a", "1 b"]
    assert await database.names() == []


async def test_only_one_transaction_is_open_for_a_connect(tested: DBConnect) -> None:
    async with shared_transaction(tested) as session:
        with pytest.raises(RuntimeError, match="open already"):
            async with shared_transaction(tested):
                pytest.fail("the block must not run")
        assert await names_in(session) == []


async def test_a_connect_that_is_closed_meanwhile_is_still_in_the_transaction(
    tested: DBConnect, in_process: httpx.AsyncClient
) -> None:
    async with shared_transaction(tested) as session:
        assert (await in_process.get("/add/a")).status_code == 200
        await tested.close()
        assert (await in_process.get("/add/b")).status_code == 200
        assert await names_in(session) == ["a", "b"]
    assert tested.engine is None
    async with shared_transaction(tested):
        pass
    assert tested.engine is not None, "it was closed again"


async def test_a_handler_that_changes_the_host_does_not_leave_the_transaction(
    database_url: URL, database: Database
) -> None:
    hosts = itertools.cycle(["127.0.0.1", "localhost"])

    async def change_host(connect: DBConnect) -> None:
        await connect.change_host(next(hosts))

    connect = DBConnect.from_url(database_url, before_create_session_handler=change_host)
    served = Served(connect)
    async with connect:
        async with shared_transaction(connect) as session:
            for name in "abc":
                await run_in_new_ctx(served.insert, name)
            assert await names_in(session) == ["a", "b", "c"]
            assert await database.names() == []
        assert connections_out(connect) == 0
    assert await database.names() == []


async def test_a_deferred_constraint_is_checked_when_a_request_commits(connect: DBConnect) -> None:
    served = Served(connect)
    transport = httpx.ASGITransport(app=served.app)
    async with (
        shared_transaction(connect) as session,
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        for number, status in (1, 200), (2, 200), (1, 409), (3, 200):
            assert (await client.get(f"/seat/{number}")).status_code == status
        numbers = await session.scalars(select(Seat.number).order_by(Seat.number))
        assert list(numbers) == [1, 2, 3]
        # Still deferred: two that change places do so one after the other.
        session.add(Seat(number=1))
        await session.flush()
        await session.rollback()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "sqlite"])
async def test_in_autocommit_each_statement_is_a_transaction(
    driver: str, database_url: URL, database: Database, tmp_path: Path
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    if driver == "sqlite":
        url = URL.create("sqlite", database=str(tmp_path / "test.db"))
    async with DBConnect.from_url(url, isolation_level="AUTOCOMMIT") as connect:
        if driver == "sqlite":
            async with new_non_ctx_session(connect) as session:
                await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
        served = Served(connect)
        transport = httpx.ASGITransport(app=served.app)
        async with (
            shared_transaction(connect) as session,
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            assert (await client.get("/refuse/a")).status_code == 422
            assert (await client.get("/swallow/b")).status_code == 200
            async with new_db_session_ctx():
                with pytest.raises(DBAPIError):
                    await (await db_session(connect)).execute(text("SELECT * FROM nothing"))
                await served.insert("c")
            assert await names_in(session) == ["a", "b", "c"]
        assert connections_out(connect) == 0
        assert await names_after(connect) == []
        async with new_db_session_ctx():
            await served.insert("d")
            assert await names_after(connect) == ["d"]


@pytest.mark.parametrize("tested", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_a_transaction_with_autocommit_of_its_own_is_not_undone(
    shared: AsyncSession, tested: DBConnect
) -> None:
    async with new_non_ctx_session(tested) as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await session.execute(insert(Item).values(name="a"))
        await session.rollback()
    async with new_non_ctx_session(tested) as session:
        await session.execute(insert(Item).values(name="b"))
    assert await names_in(shared) == ["a"]


async def test_an_isolation_level_asked_for_by_a_request_is_left_alone(
    shared: AsyncSession, in_process: httpx.AsyncClient
) -> None:
    shared.add(Item(name="test"))
    await shared.commit()
    assert (await in_process.get("/level/a")).status_code == 200
    assert await names_in(shared) == ["test", "a"]


async def test_a_lost_connection_is_told_and_the_next_test_works(
    connect: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(connect)
    async with shared_transaction(connect) as session:
        await run_in_new_ctx(served.insert, "a")
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await database.terminate(pid)
        with pytest.raises(DBAPIError):
            await run_in_new_ctx(served.insert, "b")
        with pytest.raises(StatementError, match="was lost"):
            await run_in_new_ctx(served.insert, "c")
    assert connections_out(connect) == 0
    async with shared_transaction(connect) as session:
        await run_in_new_ctx(served.insert, "d")
        assert await names_in(session) == ["d"]


async def test_a_context_is_inside_a_session_of_no_context(
    shared: AsyncSession, served: Served
) -> None:
    async with new_non_ctx_session(served.connect) as session:
        await session.execute(insert(Item).values(name="a"))
        await run_in_new_ctx(served.insert, "b")
        await session.commit()
    assert await names_in(shared) == ["a", "b"]


async def test_a_real_server_is_in_the_transaction(shared: AsyncSession, served: Served) -> None:
    async with http_client(served.app) as client:
        # The task of this connection is older than the transaction that the test begins now.
        assert (await client.get("/refuse/b")).status_code == 422
        await shared.scalar(select(1))
        responses = await asyncio.gather(*(client.get(f"/nested/{n}") for n in range(5)))
        assert {response.status_code for response in responses} == {200}
        assert (await client.get("/refuse/a")).status_code == 422
    assert len(await names_in(shared)) == 5 * 8


async def test_a_failure_while_the_transaction_is_opened_leaves_nothing(
    connect: DBConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        broken = AsyncMock(side_effect=ZeroDivisionError)
        patch.setattr(AsyncConnection, "get_raw_connection", broken)
        with pytest.raises(ZeroDivisionError):
            async with shared_transaction(connect):
                pytest.fail("the block must not run")
    assert connections_out(connect) == 0
    async with shared_transaction(connect) as session:
        assert await names_in(session) == []
