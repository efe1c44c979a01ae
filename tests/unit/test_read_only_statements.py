"""What a read-only session refuses to send, and what it lets through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pytest
from sqlalchemy import URL, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx
from tests.helpers.database import Database, checked_connect
from tests.helpers.models import Item

Mode = Literal[True, "snapshot"]
Write = Callable[[AsyncSession], Awaitable[object]]
NAMES = select(Item.name).order_by(Item.id)
every_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
every_mode = pytest.mark.parametrize("mode", [True, "snapshot"])


async def flush(session: AsyncSession) -> None:
    session.add(Item(name="a"))
    await session.flush()


async def autoflush(session: AsyncSession) -> None:
    session.add(Item(name="a"))
    await session.execute(NAMES)


async def change(session: AsyncSession) -> None:
    item = (await session.scalars(select(Item))).one()
    item.name = "a"
    await session.commit()


async def remove(session: AsyncSession) -> None:
    await session.delete((await session.scalars(select(Item))).one())
    await session.commit()


async def bulk(session: AsyncSession) -> None:
    await session.execute(insert(Item), [{"name": "a"}, {"name": "b"}])


async def bulk_save(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.bulk_save_objects([Item(name="a")]))


async def sync_flush(session: AsyncSession) -> None:
    session.add(Item(name="a"))
    await session.run_sync(lambda sync: sync.flush())


async def connection(session: AsyncSession) -> None:
    await (await session.connection()).execute(insert(Item).values(name="a"))


async def driver_sql(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.exec_driver_sql("INSERT INTO item (name) VALUES ('a')")


async def create_all(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.run_sync(Item.metadata.tables["item"].drop)


def executes(statement: Any) -> Write:
    return lambda session: session.execute(statement)


WRITES: dict[str, Write] = {
    "flush": flush,
    "autoflush": autoflush,
    "a changed object": change,
    "a deleted object": remove,
    "bulk": bulk,
    "bulk_save_objects": bulk_save,
    "run_sync": sync_flush,
    "connection().execute()": connection,
    "exec_driver_sql()": driver_sql,
    "DDL": create_all,
    "insert()": executes(insert(Item).values(name="a")),
    "insert().returning()": executes(insert(Item).values(name="a").returning(Item.id)),
    "update()": executes(update(Item).values(name="a")),
    "delete()": executes(delete(Item)),
    "cte()": executes(select(insert(Item).values(name="a").returning(Item.id).cte())),
    "with_for_update()": executes(select(Item).with_for_update()),
    "text()": executes(text("insert INTO item (name) VALUES ('a')")),
}


@every_mode
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
async def test_a_write_is_refused_before_it_is_sent(
    connect: DBConnect, database: Database, mode: Mode, write: Write
) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('there')")
    with pytest.raises(InvalidRequestError, match=r"(?s)is read-only.*read_only=False") as error:
        async with new_db_session_ctx():
            await write(await db_session(connect, read_only=mode))
    assert "item" in str(error.value)
    assert await database.names() == ["there"]


@every_mode
async def test_an_object_that_was_only_added_is_not_lost_in_silence(
    connect: DBConnect, database: Database, mode: Mode
) -> None:
    with pytest.raises(InvalidRequestError, match="session is read-only"):
        async with new_db_session_ctx():
            (await db_session(connect, read_only=mode)).add(Item(name="a"))
    assert await database.names() == []


async def test_an_object_that_was_added_to_both_is_not_stored_in_part(
    connect: DBConnect, database: Database
) -> None:
    with pytest.raises(InvalidRequestError, match="session is read-only"):
        async with new_db_session_ctx():
            (await db_session(connect)).add(Item(name="a"))
            await (await db_session(connect)).flush()
            reading = await db_session(connect, read_only=True)
            await reading.execute(NAMES)
            reading.add(Item(name="b"))
    assert await database.names() == []


REFUSED = [
    "/* why */ insert INTO item (name) VALUES ('a')",
    "-- why\nUPDATE item SET name = 'a'",
    "WITH a AS (SELECT 1) INSERT INTO item (name) VALUES ('a')",
    "WITH a AS (SELECT 1) UPDATE item SET name = 'a'",
    "WITH a AS (DELETE FROM item RETURNING id) SELECT * FROM a",
    "WITH a AS MATERIALIZED (UPDATE item SET name = 'a' RETURNING id) SELECT * FROM a",
    "WITH a AS (/* ' */ DELETE FROM item RETURNING id) SELECT ''",
    "SELECT name INTO other FROM item",
    "SELECT ')' INTO other",
    "SELECT 1; DELETE FROM item",
    "EXPLAIN ANALYZE DELETE FROM item",
    "EXPLAIN (ANALYZE, VERBOSE) INSERT INTO item (name) VALUES ('a')",
    "SELECT * FROM item FOR NO KEY UPDATE",
    "SELECT * FROM item FOR KEY SHARE",
    "SELECT * FROM item LOCK IN SHARE MODE",
    "LOCK TABLE item",
    "TRUNCATE item",
    "CREATE TABLE other (id int)",
    "CALL add_item()",
    "DO $$ BEGIN DELETE FROM item; END $$",
    "COPY item FROM STDIN",
    "SET LOCAL app.tenant = 'a'",
    "SET TRANSACTION READ WRITE",
    "COMMIT",
    "ROLLBACK",
    "PRAGMA user_version = 3",
    "REPLACE INTO item VALUES (1)",
    "VACUUM",
    "",
]


@pytest.mark.parametrize("statement", REFUSED)
async def test_what_may_do_more_than_read_is_refused(connect: DBConnect, statement: str) -> None:
    async with new_db_session_ctx():
        connection = await (await db_session(connect, read_only=True)).connection()
        with pytest.raises(InvalidRequestError, match="session is read-only"):
            await connection.exec_driver_sql(statement)


LET_THROUGH = [
    "SELECT 'FOR UPDATE; DELETE FROM item', 'into', \"name\" AS \"into\" FROM item",
    "SELECT $$; DROP TABLE item$$, $a$ FOR UPDATE $$ $a$",
    "select 1 -- INSERT INTO item\n",
    "/* a; b */ SELECT 1;",
    "(SELECT 1) UNION (SELECT 2)",
    "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT * FROM n",
    "VALUES (1), (2)",
    "TABLE item",
    "SHOW server_version",
    "EXPLAIN SELECT * FROM item",
    "EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM item",
    "SELECT count(*) AS update FROM item",
    "SELECT 'it''s; DELETE'",
]


@every_driver
@every_mode
async def test_what_reads_is_let_through(
    database_url: URL, database: Database, driver: str, mode: Mode
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with checked_connect(url, database) as connect, new_db_session_ctx():
        connection = await (await db_session(connect, read_only=mode)).connection()
        for statement in LET_THROUGH:
            await connection.exec_driver_sql(statement)


@pytest.fixture
async def writing_function(database: Database) -> None:
    await database.execute(
        "CREATE OR REPLACE FUNCTION add_item() RETURNS int LANGUAGE sql AS"
        " $$INSERT INTO item (name) VALUES ('f') RETURNING 1$$"
    )


@every_driver
async def test_in_a_snapshot_the_server_refuses_a_function_that_writes(
    database_url: URL, database: Database, driver: str, writing_function: None
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with checked_connect(url, database) as connect:
        with pytest.raises(DBAPIError, match="read-only transaction"):
            async with new_db_session_ctx():
                session = await db_session(connect, read_only="snapshot")
                await session.execute(text("SELECT add_item()"))
    assert await database.names() == []


async def test_a_function_that_writes_is_not_seen_elsewhere_as_the_page_says(
    connect: DBConnect, database: Database, writing_function: None
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect, read_only=True)
        await session.execute(text("SELECT add_item()"))
        assert await database.names() == ["f"]  # at once


@every_driver
async def test_what_needs_a_transaction_is_refused_with_the_way_out(
    database_url: URL, database: Database, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with checked_connect(url, database) as connect, new_db_session_ctx():
        session = await db_session(connect, read_only=True)
        with pytest.raises(InvalidRequestError, match=r'session.stream.*"snapshot"'):
            await session.stream(NAMES)
        with pytest.raises(InvalidRequestError, match=r'session.stream.*"snapshot"'):
            await session.execute(NAMES, execution_options={"yield_per": 1})
        with pytest.raises(InvalidRequestError, match=r'begin_nested.*"snapshot"'):
            async with session.begin_nested():
                await session.execute(NAMES)
        await session.rollback()
        assert (await session.scalars(NAMES)).all() == []


@every_driver
async def test_a_snapshot_streams_and_has_savepoints(
    database_url: URL, database: Database, driver: str
) -> None:
    await database.execute("INSERT INTO item (name) VALUES ('a'), ('b')")
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with checked_connect(url, database) as connect, new_db_session_ctx():
        session = await db_session(connect, read_only="snapshot")
        async with session.begin_nested():
            result = await session.stream_scalars(NAMES)
            assert [name async for name in result] == ["a", "b"]
        with pytest.raises(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("SELECT * FROM nothing"))
        assert (await session.scalars(NAMES)).all() == ["a", "b"]


async def test_sqlite_streams_without_a_transaction(sqlite_connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(sqlite_connect, read_only=True)
        result = await session.stream_scalars(NAMES)
        assert [name async for name in result] == []
