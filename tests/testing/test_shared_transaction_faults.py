"""What a shared transaction withstands, and what it refuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import URL, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette

from context_async_sqlalchemy import (
    DBConnect,
    db_session,
    new_db_session_ctx,
    new_non_ctx_session,
    run_in_new_ctx,
)
from context_async_sqlalchemy.pytest_plugin import shared_client
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.programs import Outside, until
from tests.helpers.shared import Served, names_after, names_in

__all__ = ["shared_client"]  # a fixture

postgresql_only = pytest.mark.parametrize("tested", ["asyncpg", "psycopg"], indirect=True)


@postgresql_only
async def test_a_context_works_after_a_statement_around_it_has_failed(
    shared: AsyncSession, served: Served, tested: DBConnect
) -> None:
    await run_in_new_ctx(served.insert, "a")
    with suppress(IntegrityError):
        async with new_db_session_ctx():
            session = await db_session(tested)
            try:
                await session.execute(insert(Item).values(name="a"))
            except IntegrityError:
                await run_in_new_ctx(served.insert, "audit")
                raise
    await run_in_new_ctx(served.insert, "b")
    assert "b" in await names_in(shared)


@postgresql_only
async def test_a_request_works_after_a_statement_of_the_test_has_failed(
    shared: AsyncSession, served: Served
) -> None:
    await run_in_new_ctx(served.insert, "a")
    with pytest.raises(IntegrityError):
        await shared.execute(insert(Item).values(name="a"))
    await run_in_new_ctx(served.insert, "b")
    await shared.rollback()


async def test_in_autocommit_a_failed_statement_leaves_the_connection_usable(
    database_url: URL, database: Database
) -> None:
    async with DBConnect.from_url(database_url, isolation_level="AUTOCOMMIT") as connect:
        served = Served(connect)
        async with shared_transaction(connect) as session, new_db_session_ctx():
            await served.insert("a")
            with suppress(IntegrityError):
                await (await db_session(connect)).execute(insert(Item).values(name="a"))
            await run_in_new_ctx(served.insert, "b")
            assert await names_in(session) == ["a", "b"]


async def test_in_autocommit_one_that_ends_leaves_those_inside_it_alone(
    database_url: URL, database: Database
) -> None:
    async with DBConnect.from_url(database_url, isolation_level="AUTOCOMMIT") as connect:
        served = Served(connect)
        async with shared_transaction(connect) as session:
            has_begun, may_go_on = asyncio.Event(), asyncio.Event()

            async def child() -> None:
                await served.insert("a")
                has_begun.set()
                await may_go_on.wait()
                await served.insert("b")

            async with new_non_ctx_session(connect) as outer:
                await outer.scalar(select(1))
                task = asyncio.create_task(run_in_new_ctx(child))
                await has_begun.wait()
            may_go_on.set()
            await task
            assert await names_in(session) == ["a", "b"]


async def test_what_goes_past_sqlalchemy_is_rolled_back(
    connect: DBConnect, database: Database
) -> None:
    async with shared_transaction(connect), new_non_ctx_session(connect) as session:
        raw: Any = await (await session.connection()).get_raw_connection()
        await raw.driver_connection.copy_records_to_table(
            "item", records=[(1, "copied")], columns=["id", "name"]
        )
    assert await database.names() == []


@postgresql_only
async def test_two_phase_commit_is_refused(tested: DBConnect, database: Database) -> None:
    async with (
        shared_transaction(tested),
        AsyncSession(tested.engine, twophase=True) as session,
    ):
        session.add(Item(name="a"))
        with pytest.raises(InvalidRequestError):
            await session.commit()
    assert await database.names() == []


@postgresql_only
async def test_a_read_only_transaction_is_read_only_and_the_next_one_is_not(
    tested: DBConnect,
) -> None:
    served = Served(tested)
    options = {"postgresql_readonly": True, "postgresql_deferrable": True}
    try:
        async with shared_transaction(tested), new_non_ctx_session(tested) as session:
            await session.connection(execution_options=options)
            with pytest.raises(DBAPIError):
                await session.execute(insert(Item).values(name="a"))
    finally:
        await run_in_new_ctx(served.insert, "after")


async def test_a_task_inside_a_statement_does_not_fail_the_commit_around_it(
    shared: AsyncSession, served: Served, tested: DBConnect
) -> None:
    is_sqlite = tested.engine is not None and tested.engine.dialect.name == "sqlite"
    slowly = (
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 1000000)"
        " SELECT count(*) FROM c"
        if is_sqlite
        else "SELECT pg_sleep(0.3)"
    )
    has_begun = asyncio.Event()

    async def look_slowly() -> None:
        session = await db_session(tested)
        await session.scalar(select(1))
        has_begun.set()
        await session.execute(text(slowly))

    async with new_db_session_ctx():
        await served.insert("a")
        task = asyncio.create_task(run_in_new_ctx(look_slowly))
        await has_begun.wait()
        await asyncio.sleep(0)
    await task
    assert await names_in(shared) == ["a"]


async def test_the_end_in_the_middle_of_a_statement_leaves_nothing(tested: DBConnect) -> None:
    served = Served(tested)
    for steps in range(60):
        has_begun = asyncio.Event()

        async def add(has_begun: asyncio.Event = has_begun) -> None:
            await (await db_session(tested)).connection()
            has_begun.set()
            await served.insert("late")

        async with shared_transaction(tested):
            task = asyncio.create_task(run_in_new_ctx(add))
            await has_begun.wait()
            for _ in range(steps):
                await asyncio.sleep(0)
        await asyncio.wait([task])
        task.exception()  # it was refused, or has come in time
        assert connections_out(tested) == 0
        assert await names_after(tested) == []


@pytest.mark.parametrize("tested", ["psycopg"], indirect=True)
async def test_the_end_does_not_wait_for_a_task_that_outlives_it(
    tested: DBConnect, database: Database
) -> None:
    async def sleep() -> None:
        await (await db_session(tested)).execute(text("SELECT pg_sleep(3)"))

    async with shared_transaction(tested) as session:
        task = asyncio.create_task(run_in_new_ctx(sleep))
        await until(lambda: database.pid_of("SELECT pg_sleep%"))
        await session.rollback()
        start = time.monotonic()
    took = time.monotonic() - start
    await asyncio.wait([task])
    task.exception()
    assert took < 2

    async def has_woken_up() -> bool:
        return await database.states() == []

    await until(has_woken_up)  # the server sleeps to the end


async def test_the_engine_itself_is_in_the_transaction(
    shared: AsyncSession, tested: DBConnect
) -> None:
    assert tested.engine is not None
    async with tested.engine.begin() as connection:
        await connection.execute(insert(Item).values(name="a"))
    async with tested.engine.begin():
        pass  # a transaction without a statement
    async with tested.engine.connect() as connection:
        await connection.execute(insert(Item).values(name="not committed"))
    assert await names_in(shared) == ["a"]


@postgresql_only
async def test_a_connection_that_is_lost_at_the_end_is_not_used_again(
    tested: DBConnect, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with shared_transaction(tested) as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        await session.commit()
        await database.terminate(pid)
    assert "failed to roll back" in caplog.text
    async with shared_transaction(tested) as session:
        await run_in_new_ctx(Served(tested).insert, "a")
        assert await names_in(session) == ["a"]


async def test_two_connects_of_one_engine_need_one_transaction(tested: DBConnect) -> None:
    await tested.session_maker()
    engine = tested.engine
    assert engine is not None
    async with (
        DBConnect(lambda _: engine, async_sessionmaker, host="same") as other,
        shared_transaction(tested) as session,
    ):
        with pytest.raises(RuntimeError, match="one is enough for both"):
            async with shared_transaction(other):
                pytest.fail("the block must not run")
        await run_in_new_ctx(Served(other).insert, "a")
        assert await names_in(session) == ["a"]
    assert await names_after(tested) == []


@postgresql_only
async def test_a_constraint_that_the_test_adds_is_checked(shared: AsyncSession) -> None:
    shared.add(Item(name="a"))
    await shared.commit()
    await shared.execute(text("CREATE TABLE visit (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
    await shared.execute(text("INSERT INTO visit VALUES (1), (1)"))
    with pytest.raises(IntegrityError):
        await shared.commit()


async def test_a_commit_leaves_those_inside_it_alone(
    shared: AsyncSession, served: Served, tested: DBConnect
) -> None:
    has_begun, may_go_on = asyncio.Event(), asyncio.Event()

    async def child() -> None:
        await served.insert("child")
        has_begun.set()
        await may_go_on.wait()
        await served.insert("child's second")

    async with new_db_session_ctx():
        await served.insert("parent")
        task = asyncio.create_task(run_in_new_ctx(child))
        await has_begun.wait()
    may_go_on.set()
    await task
    assert await names_in(shared) == ["parent", "child", "child's second"]


async def test_a_context_inside_may_begin_while_the_first_statement_around_it_runs(
    shared: AsyncSession, served: Served
) -> None:
    async with new_db_session_ctx():
        await asyncio.gather(served.insert("a"), run_in_new_ctx(served.insert, "b"))
    assert sorted(await names_in(shared)) == ["a", "b"]


async def test_what_a_listener_has_noted_on_the_connection_is_there(tested: DBConnect) -> None:
    await tested.session_maker()
    assert tested.engine is not None
    event.listen(
        tested.engine.sync_engine, "connect", lambda _, entry: entry.info.update(tenant="acme")
    )
    await tested.engine.dispose()
    async with shared_transaction(tested), new_non_ctx_session(tested) as session:
        assert (await (await session.connection()).get_raw_connection()).info["tenant"] == "acme"


@pytest.fixture
def db_connect(postgresql: str) -> DBConnect:
    return DBConnect.from_url(postgresql)


@pytest.fixture
def app(db_connect: DBConnect) -> Starlette:
    served = Served(db_connect)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        yield
        await run_in_new_ctx(served.insert, "at the end")

    return Starlette(lifespan=lifespan)


@pytest.fixture
def nothing_is_left(postgresql: str) -> Generator[None]:
    yield
    assert asyncio.run(Outside(postgresql).rows("SELECT name FROM item")) == []


@pytest.mark.usefixtures("nothing_is_left", "shared_client")
def test_what_the_application_writes_at_its_end_is_rolled_back() -> None:
    pass
