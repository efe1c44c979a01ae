"""Atomic blocks, and savepoints in them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
from sqlalchemy import URL, insert
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    db_session,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
)
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, checked_connect
from tests.helpers.models import Item
from tests.helpers.proxy import Call, Fault, proxy


async def test_an_atomic_block_commits(connect: DBConnect, database: Database) -> None:
    async with new_db_session_ctx():
        async with atomic_db_session(connect) as session:
            assert session is await db_session(connect)
            session.add(Item(name="a"))
        assert connections_out(connect) == 0
        assert await database.names() == ["a"]


async def test_an_atomic_block_rolls_back_on_an_exception(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        with pytest.raises(ValueError, match="no"):
            async with atomic_db_session(connect) as session:
                session.add(Item(name="a"))
                await session.flush()
                raise ValueError("no")
        assert connections_out(connect) == 0
        (await db_session(connect)).add(Item(name="b"))
    assert await database.names() == ["b"]


async def test_an_atomic_block_whose_commit_fails_rolls_back(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        with pytest.raises(IntegrityError):
            async with atomic_db_session(connect) as session:
                session.add_all([Item(name="a"), Item(name="a")])
        assert connections_out(connect) == 0
        (await db_session(connect)).add(Item(name="b"))
    assert await database.names() == ["b"]


@pytest.mark.parametrize(
    ("current_transaction", "after_success", "after_failure"),
    [
        ("commit", ["before", "inside"], ["before"]),
        ("rollback", ["inside"], []),
        ("append", ["before", "inside"], []),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_atomic_block_after_an_open_transaction(
    connect: DBConnect,
    database: Database,
    current_transaction: Any,
    after_success: list[str],
    after_failure: list[str],
    fails: bool,
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="before"))
        try:
            async with atomic_db_session(connect, current_transaction):
                await session.execute(insert(Item).values(name="inside"))
                if fails:
                    raise ValueError
        except ValueError:
            assert fails
        assert connections_out(connect) == 0
        assert await database.names() == (after_failure if fails else after_success)


async def test_an_atomic_block_refuses_an_open_transaction(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx(), atomic_db_session(connect, "raise") as session:
        session.add(Item(name="a"))
        with pytest.raises(InvalidRequestError, match="open already"):
            async with atomic_db_session(connect, "raise"):
                pytest.fail("the block must not run")
    assert await database.names() == ["a"]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_savepoint_undoes_its_block_only(
    connect: DBConnect, database: Database, fails: bool
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add(Item(name="before"))  # not flushed yet
        with suppress(ValueError):
            async with atomic_db_session(connect, "savepoint") as inside:
                assert inside is session
                session.add(Item(name="inside"))
                if fails:
                    raise ValueError
        assert await database.names() == []
        session.add(Item(name="after"))
    assert await database.names() == (
        ["before", "after"] if fails else ["before", "inside", "after"]
    )


async def test_a_savepoint_whose_statement_fails_undoes_its_block_only(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add(Item(name="a"))
        with pytest.raises(IntegrityError):
            async with atomic_db_session(connect, "savepoint"):
                session.add(Item(name="a"))
        session.add(Item(name="b"))
    assert await database.names() == ["a", "b"]


async def test_savepoints_nest(connect: DBConnect, database: Database) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="a"))
        async with atomic_db_session(connect, "savepoint"):
            await session.execute(insert(Item).values(name="b"))
            with pytest.raises(ValueError, match="no"):
                async with atomic_db_session(connect, "savepoint"):
                    await session.execute(insert(Item).values(name="c"))
                    raise ValueError("no")
            await session.execute(insert(Item).values(name="d"))
    assert await database.names() == ["a", "b", "d"]


@pytest.mark.parametrize("fails", [False, True])
async def test_without_a_transaction_a_savepoint_is_a_transaction(
    connect: DBConnect, database: Database, fails: bool
) -> None:
    async with new_db_session_ctx():
        with suppress(ValueError):
            async with atomic_db_session(connect, "savepoint") as session:
                await session.execute(insert(Item).values(name="a"))
                if fails:
                    raise ValueError
        assert connections_out(connect) == 0
        assert await database.names() == ([] if fails else ["a"])


async def test_a_failed_flush_that_a_savepoint_swallowed_is_an_error_at_its_end(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        session.add(Item(name="a"))
        with pytest.raises(PendingRollbackError):
            async with atomic_db_session(connect, "savepoint"):
                session.add(Item(name="b"))
                await session.flush()
                session.add(Item(name="a"))
                with suppress(IntegrityError):
                    await session.flush()
        session.add(Item(name="c"))
    assert await database.names() == ["a", "c"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_block_may_end_the_transaction_around_its_savepoint(
    connect: DBConnect, database: Database, end: str, fails: bool
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(insert(Item).values(name="a"))
        with suppress(ValueError):
            async with atomic_db_session(connect, "savepoint"):
                await getattr(session, end)()
                await session.execute(insert(Item).values(name="b"))
                if fails:
                    raise ValueError
    ended = ["a"] if end == "commit" else []
    assert await database.names() == (ended if fails else [*ended, "b"])


async def test_what_a_savepoint_could_not_undo_is_not_committed(
    database_url: URL, database: Database
) -> None:
    async def refuse_rollback(call: Call) -> Fault | None:
        return Fault.ERROR if call.statement.startswith("ROLLBACK TO") else None

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, refuse_rollback) as port:
        url = database_url.set(host="127.0.0.1", port=port)
        async with checked_connect(url, database) as connect:
            with pytest.raises(PendingRollbackError):
                async with new_db_session_ctx():
                    session = await db_session(connect)
                    await session.execute(insert(Item).values(name="a"))
                    with suppress(ValueError):
                        async with atomic_db_session(connect, "savepoint"):
                            await session.execute(insert(Item).values(name="b"))
                            raise ValueError
    assert await database.names() == []


async def test_an_unknown_current_transaction_is_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match="'commit', 'rollback', 'append', 'raise', 'savepoint', not 'join'"
    ):
        atomic_db_session(Mock(), "join")  # type: ignore[arg-type]


async def test_an_atomic_block_works_with_autobegin_off(
    connect: DBConnect, database: Database
) -> None:
    maker = await connect.session_maker()
    maker.configure(autobegin=False)
    async with new_db_session_ctx(), atomic_db_session(connect) as session:
        session.add(Item(name="a"))
    assert await database.names() == ["a"]


@pytest.mark.parametrize("kind", [AsyncMock, MagicMock])
async def test_a_mock_with_the_methods_of_a_session_is_used_in_atomic_blocks(kind: Any) -> None:
    session = kind(spec=AsyncSession)
    session.in_transaction.return_value = False
    connect: Any = Mock(spec=DBConnect, context_key="key")
    connect.create_session = AsyncMock(return_value=session)
    async with new_db_session_ctx():
        async with atomic_db_session(connect) as given:
            assert given is session
        async with new_non_ctx_atomic_session(connect) as given:
            assert given is session
    assert session.commit.await_count == 2
