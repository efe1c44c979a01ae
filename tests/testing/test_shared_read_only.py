"""Read-only sessions in the transaction of a test: they see what it has not committed."""

from __future__ import annotations

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect, db_session, new_db_session_ctx, run_in_new_ctx
from context_async_sqlalchemy.test_utils import (
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
)
from tests.helpers.asgi import add
from tests.helpers.database import Database
from tests.helpers.models import Item
from tests.helpers.shared import names_in

NAMES = select(Item.name).order_by(Item.id)
postgresql_only = pytest.mark.parametrize("tested", ["asyncpg", "psycopg"], indirect=True)


async def test_it_sees_what_the_test_has_not_committed(
    shared: AsyncSession, tested: DBConnect
) -> None:
    await shared.execute(insert(Item).values(name="a"))

    async def read() -> list[str]:
        return await names_in(await db_session(tested, read_only=True))

    assert await run_in_new_ctx(read) == ["a"]
    async with new_db_session_ctx():
        assert await read() == ["a"]
        await shared.execute(insert(Item).values(name="b"))
        assert await read() == ["a", "b"]


async def test_it_and_the_writing_session_of_a_request_take_turns_at_each_statement(
    shared: AsyncSession, tested: DBConnect
) -> None:
    async with new_db_session_ctx():
        reading = await db_session(tested, read_only=True)
        for name in ("a", "b"):
            await names_in(reading)
            await add(tested, name)
        assert await names_in(reading) == ["a", "b"]  # all are on one connection
        await (await db_session(tested)).rollback()
        assert await names_in(reading) == []
        await add(tested, "c")
    assert await names_in(shared) == ["c"]


async def test_a_write_is_refused_there_too(shared: AsyncSession, tested: DBConnect) -> None:
    async with new_db_session_ctx():
        reading = await db_session(tested, read_only=True)
        with pytest.raises(InvalidRequestError, match="session is read-only"):
            await reading.execute(insert(Item).values(name="a"))
        await add(tested, "b")
    assert await names_in(shared) == ["b"]


async def test_a_read_that_fails_leaves_the_work_of_the_test_alone(
    shared: AsyncSession, tested: DBConnect
) -> None:
    await shared.execute(insert(Item).values(name="a"))
    async with new_db_session_ctx():
        reading = await db_session(tested, read_only=True)
        with pytest.raises(DBAPIError):
            await reading.execute(text("SELECT * FROM nothing"))
        await shared.execute(insert(Item).values(name="b"))
        assert await names_in(reading) == ["a", "b"]
    assert await names_in(shared) == ["a", "b"]


@postgresql_only
async def test_a_snapshot_is_a_savepoint_in_which_the_server_refuses_writes(
    shared: AsyncSession, tested: DBConnect, database: Database
) -> None:
    await database.execute(
        "CREATE OR REPLACE FUNCTION add_item() RETURNS int LANGUAGE sql AS"
        " $$INSERT INTO item (name) VALUES ('f') RETURNING id$$"
    )
    await add_and_commit(shared, "a")
    async with new_db_session_ctx():
        reading = await db_session(tested, read_only="snapshot")
        assert await names_in(reading) == ["a"]
        with pytest.raises(DBAPIError, match="read-only transaction"):
            await reading.execute(text("SELECT add_item()"))
        await reading.rollback()
    assert await names_in(shared) == ["a"]


async def add_and_commit(session: AsyncSession, name: str) -> None:
    session.add(Item(name=name))
    await session.commit()


async def test_with_a_session_that_a_test_has_put_there_it_is_that_one(
    connect: DBConnect, database: Database
) -> None:
    async with (
        rollback_session(connect) as session,
        set_test_context(),
        put_savepoint_session_in_ctx(connect, session) as savepoint,
    ):
        await add(connect, "a")
        assert await db_session(connect, read_only=True) is savepoint
        assert await db_session(connect, read_only="snapshot") is savepoint
        assert await names_in(await db_session(connect, read_only=True)) == ["a"]
    assert await database.names() == []


async def test_in_the_context_of_a_test_it_is_the_one_session(
    connect: DBConnect, database: Database
) -> None:
    async with set_test_context():
        reading = await db_session(connect, read_only=True)
        assert await add(connect, "a") is reading
        assert await names_in(reading) == ["a"]
        await reading.rollback()
    assert await database.names() == []
