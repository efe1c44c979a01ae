"""`begin_with_first_statement` of from_url, where something fails, or the connection is another."""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import asyncpg
import pytest
import trustme
from sqlalchemy import URL, bindparam, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx, new_non_ctx_session
from context_async_sqlalchemy.test_utils import shared_transaction
from tests.helpers.connections import connections_out
from tests.helpers.database import LOST, Database, assert_clean
from tests.helpers.flight import (
    ADD,
    ADD_NUMBER,
    ONE,
    Flown,
    driver_of,
    is_one_transaction,
    is_plain,
    opened,
    opened_directly,
    warm,
)
from tests.helpers.pgbouncer import CONNECT_ARGS, pgbouncer, pgbouncer_binary
from tests.helpers.proxy import Call
from tests.helpers.tls import tls_server

pytestmark = pytest.mark.usefixtures("database")

# What fails


async def test_a_statement_that_fails_fails_its_transaction(
    flown: Flown, database: Database
) -> None:
    connect, wire = flown
    fail = text("INSERT INTO item (name) SELECT (1 / CAST(:n AS int))::text")
    for number in (1, 0):
        wire.start()
        async with new_non_ctx_session(connect) as session:
            if number:
                await session.execute(fail, {"n": number})
                await session.rollback()
                continue
            with pytest.raises(DBAPIError, match="division by zero"):
                await session.execute(fail, {"n": number})
            with pytest.raises(DBAPIError, match="current transaction is aborted"):
                await session.execute(ADD, {"name": "a"})
            with pytest.raises(PendingRollbackError, match="came to nothing"):
                await session.commit()
    assert [begin for begin, _ in wire.trips] == ["BEGIN;", "", ""]
    assert await database.names() == []


async def test_after_a_begin_that_has_failed_nothing_is_stored(
    flown: Flown, database: Database
) -> None:
    connect, wire = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        statement = await driver.prepare("INSERT INTO item (name) VALUES ('a')")
        for end in ("ROLLBACK;", "COMMIT;"):
            # As asyncpg begins a transaction; SERIALIZABLE on a hot standby fails so, too.
            await driver.execute("BEGIN AS IT IS NOT DONE;")
            wire.start()
            operations: list[Callable[[], Awaitable[Any]]] = [
                *(statement.fetch, statement.fetch, partial(driver.prepare, "SELECT 3")),
                partial(driver.copy_from_query, "SELECT 3", output=io.BytesIO()),
                partial(driver.copy_to_table, "item", source=io.BytesIO()),
            ]
            for operation in operations:
                async with asyncio.timeout(10):
                    with pytest.raises(asyncpg.PostgresSyntaxError, match="syntax error at or"):
                        await operation()
            assert len(wire.trips) == len(operations)
            assert driver.is_in_transaction()
            await driver.execute(end)
            assert len(wire.trips) == len(operations)
            assert not driver.is_in_transaction()
    assert await database.names() == []


@pytest.mark.parametrize("begin", ["BEGIN;", "BEGIN AS IT IS NOT DONE;"])
@pytest.mark.parametrize("way", ["in flight", "apart"])
async def test_a_statement_whose_answer_came_too_late_is_looked_after(
    begin: str, way: str, flown: Flown, database: Database
) -> None:
    connect, wire = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        statement = await driver.prepare("INSERT INTO item (name) VALUES ('a')")
        is_given_up, held = asyncio.Event(), asyncio.Event()
        notices: list[str] = []
        driver.add_log_listener(lambda _, notice: notices.append(notice.message))

        async def hold(call: Call) -> None:
            if "BEGIN" in call.begin + call.statement and not held.is_set():
                held.set()
                await is_given_up.wait()

        await driver.execute(begin)
        wire.decide = hold
        first = statement.fetch() if way == "in flight" else driver.prepare("SELECT 4")
        task = asyncio.create_task(first)
        await held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        is_given_up.set()
        assert driver.is_in_transaction()
        with suppress(asyncpg.PostgresError):
            await statement.fetch()
        assert driver.is_in_transaction()
        assert notices == []  # such as that there is already a transaction
        await driver.execute("ROLLBACK;")
        assert not driver.is_in_transaction()
        assert await driver.fetchval("SELECT count(*) FROM item") == 0
    assert await database.names() == []


async def test_a_transaction_in_doubt_is_rolled_back(flown: Flown, database: Database) -> None:
    connect, _ = flown
    async with new_non_ctx_session(connect) as session:
        driver = await driver_of(session)
        statement = await driver.prepare("SELECT pg_sleep(10)")
        transaction = driver.transaction()
        await transaction.start()
        with pytest.raises(TimeoutError):
            await statement.fetch(timeout=0.05)
        await transaction.rollback()
        assert await database.states() == []
        async with driver.transaction():
            assert await driver.fetchval("SELECT 1") == 1


# Connections


async def test_a_ping_of_the_pool_needs_no_begin(database_url: URL, database: Database) -> None:
    options = {"pool_pre_ping": True, "ping_after_idle": 1e-9}
    async with opened(database_url, **options) as (connect, wire):
        for _ in range(2):
            wire.start()
            async with new_db_session_ctx():
                assert await (await db_session(connect)).scalar(ONE) == 1
            assert wire.trips[1:] == [("BEGIN;", "SELECT 1"), ("", "COMMIT;")]
        await assert_clean(connect, database)


async def test_a_connection_that_is_lost_is_replaced(flown: Flown, database: Database) -> None:
    connect, _ = flown
    for pid in await database.backends():
        await database.terminate(pid)
    with pytest.raises(LOST):
        async with new_db_session_ctx():
            await (await db_session(connect)).execute(ADD, {"name": "a"})
    async with new_db_session_ctx():
        await (await db_session(connect)).execute(ADD, {"name": "b"})
    assert await database.names() == ["b"]


async def test_a_connection_that_is_given_back_begins_anew(flown: Flown) -> None:
    connect, _ = flown
    engine = connect.engine
    assert engine is not None
    raw = await engine.raw_connection()
    driver: Any = raw.driver_connection
    transaction = driver.transaction()
    await transaction.start()
    raw.close()
    async with new_non_ctx_session(connect) as session:
        assert await driver_of(session) is not driver
        assert await is_one_transaction(session)
    assert connections_out(connect) == 0


async def test_a_connection_that_somebody_else_opens_begins_so_too(database_url: URL) -> None:
    arguments = {"host": database_url.host, "port": database_url.port}
    secret = {"user": database_url.username, "password": database_url.password}
    target = arguments | secret | {"database": database_url.database}
    async with DBConnect.from_url(
        database_url,
        async_creator=partial(asyncpg.connect, **target),
        begin_with_first_statement=True,
    ) as connect:
        await warm(connect)
        async with new_non_ctx_session(connect) as session:
            assert await is_one_transaction(session)
            assert not await is_plain(session)


async def test_begin_rides_inside_tls(database_url: URL) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["postgresql"])
    trustme.CA().issue_cert("localhost").configure_cert(context)
    host, port = database_url.host, database_url.port
    assert host is not None
    assert port is not None
    async with (
        tls_server(host, port, context, takes_plain=False) as server,
        opened_directly(
            database_url.set(port=server.port, query={"sslmode": "require"})
        ) as connect,
    ):
        for size in (1, 1_000_000):
            async with new_non_ctx_session(connect) as session:
                name = text("SELECT :name").bindparams(bindparam("name", "a" * size))
                assert len(await session.scalar(name)) == size
                assert await is_one_transaction(session)
        assert server.seen == ["TLS"]


@pytest.mark.skipif(pgbouncer_binary() is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("has_names", [False, True])
async def test_behind_pgbouncer_a_transaction_is_whole(
    has_names: bool, database_url: URL, database: Database
) -> None:
    # One without max_prepared_statements keeps names apart only as long as it has one connection.
    arguments: dict[str, Any] = {} if has_names else {"connect_args": CONNECT_ARGS}
    with pgbouncer(database_url, default_pool_size=1) as through:
        async with opened(through, **arguments) as (connect, wire):
            for name in "ab":
                wire.start()
                async with new_db_session_ctx():
                    await (await db_session(connect)).execute(ADD, {"name": name})
                assert (wire.trips[0][0] == "BEGIN;") is has_names
                for parameter, message in (("x", "invalid input"), (1 << 31, "invalid input")):
                    with pytest.raises(DBAPIError, match=message):
                        async with new_db_session_ctx():
                            session = await db_session(connect)
                            await session.execute(ADD_NUMBER, {"number": parameter})
                with pytest.raises(DBAPIError, match="duplicate key"):
                    async with new_db_session_ctx():
                        session = await db_session(connect)
                        await session.execute(
                            text("INSERT INTO item (id, name) SELECT id, name FROM item")
                        )
    assert await database.names() == ["a", "b"]


def test_on_uvloop_it_rides_too(database_url: URL) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def look() -> None:
        async with opened(database_url) as (connect, wire):
            for _ in range(2):
                async with new_non_ctx_session(connect) as session:
                    assert await is_one_transaction(session)
                    await session.rollback()
            assert [begin for begin, _ in wire.trips] == ["BEGIN;", "", ""] * 2

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(look())


async def test_in_a_transaction_that_is_shared_with_a_test_nothing_begins(
    database_url: URL, database: Database
) -> None:
    async with opened(database_url) as (connect, _):
        async with shared_transaction(connect):
            for name in "ab":
                async with new_db_session_ctx():
                    await (await db_session(connect)).execute(ADD, {"name": name})
            async with new_non_ctx_session(connect) as session:
                assert await session.scalar(text("SELECT count(*) FROM item")) == 2
        assert await database.names() == []
