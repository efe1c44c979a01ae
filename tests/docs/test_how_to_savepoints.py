"""The program of the how-to page on savepoints, run, and what becomes of what they undo."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, MissingGreenlet, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import DBConnect, atomic_db_session, db_session, new_db_session_ctx
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, make_connect
from tests.helpers.models import Base, Item
from tests.helpers.programs import Outside
from tests.helpers.serving import http_client


@pytest_asyncio.fixture
async def contacts(url: str, load: Callable[[str, str], Any]) -> AsyncGenerator[Any]:
    """Return the program of the contacts, served, with a client in it."""
    contacts = load("savepoints", url)
    async with http_client(contacts.app) as contacts.client:
        yield contacts
        assert connections_out(contacts.connect) == 0


ANN = {"email": "ann", "phones": ["1", "2"]}
BOB = {"email": "bob", "phones": ["2", "3"]}


async def test_a_contact_that_is_refused_and_a_phone_that_is_taken_are_lost_alone(
    contacts: Any, url: str
) -> None:
    response = await contacts.client.post("/imports/monday", json=[ANN, ANN, BOB])
    assert (response.status_code, response.json()) == (200, ["ann"])
    outside = Outside(url)
    emails = "SELECT email FROM imported_contact ORDER BY email"
    assert await outside.rows(emails) == ["ann", "bob"]
    phones = await outside.rows("SELECT number, email FROM contact_phone ORDER BY number")
    assert phones == [("1", "ann"), ("2", "ann"), ("3", "bob")]


async def test_an_import_that_fails_as_a_whole_leaves_nothing(contacts: Any, url: str) -> None:
    assert (await contacts.client.post("/imports/monday", json=[ANN])).status_code == 200
    assert (await contacts.client.post("/imports/monday", json=[BOB])).status_code == 500
    assert await Outside(url).rows("SELECT email FROM imported_contact") == ["ann"]


async def test_an_object_that_a_savepoint_has_expired_is_loaded_again(
    contacts: Any, url: str
) -> None:
    await contacts.client.post("/imports/monday", json=[ANN, BOB])
    for email, nickname, answer in ("ann", "a", "a"), ("bob", "a", None), ("bob", "b", "b"):
        response = await contacts.client.put(f"/contacts/{email}/nickname/{nickname}")
        assert (response.status_code, response.json()) == (200, answer)


async def test_what_becomes_of_objects_when_a_savepoint_is_undone(
    connect: DBConnect, database: Database
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        kept, changed = Item(name="kept"), Item(name="changed")
        session.add_all([kept, changed])
        added = Item(name="added")
        with suppress(ValueError):
            async with atomic_db_session(connect, "savepoint"):
                session.add(added)
                changed.name = "other"
                await session.flush()
                raise ValueError
        assert added not in session
        assert added.name == "added"
        assert kept.name == "kept"
        with pytest.raises(MissingGreenlet):
            assert changed.name
        await session.refresh(changed)
        assert changed.name == "changed"
    assert await database.names() == ["kept", "changed"]


async def test_a_failed_flush_undoes_the_transaction_on_every_database(
    connect: DBConnect, sqlite_connect: DBConnect
) -> None:
    for each in connect, sqlite_connect:
        async with new_db_session_ctx():
            session = await db_session(each)
            await session.execute(insert(Item).values(name="a"))
            session.add(Item(name="a"))
            with pytest.raises(IntegrityError):
                await session.flush()
            with pytest.raises(PendingRollbackError):
                await session.scalars(select(Item))
            await session.rollback()
            assert (await session.scalars(select(Item))).all() == []


async def test_a_failed_statement_undoes_the_transaction_on_postgresql_and_itself_on_sqlite(
    connect: DBConnect, sqlite_connect: DBConnect, database: Database
) -> None:
    async def write(each: DBConnect) -> AsyncSession:
        session = await db_session(each)
        await session.execute(insert(Item).values(name="a"))
        with pytest.raises(IntegrityError):
            await session.execute(insert(Item).values(name="a"))
        return session

    with pytest.raises(PendingRollbackError):
        async with new_db_session_ctx():
            session = await write(connect)
            with pytest.raises(DBAPIError, match="current transaction is aborted"):
                await session.execute(text("SELECT 1"))
    assert await database.names() == []
    async with new_db_session_ctx():
        session = await write(sqlite_connect)
        assert await session.scalar(select(Item.name)) == "a"


@pytest.mark.parametrize("is_from_url", [True, False])
async def test_a_savepoint_is_a_part_of_its_transaction_on_sqlite_only_if_begin_is_sent(
    tmp_path: Path, is_from_url: bool
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    connect = DBConnect.from_url(url) if is_from_url else make_connect(url)
    async with new_db_session_ctx():
        session = await db_session(connect)
        await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
    with suppress(ValueError):
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.scalars(select(Item))
            async with atomic_db_session(connect, "savepoint"):
                session.add(Item(name="a"))
            raise ValueError
    assert await Outside(url).rows("SELECT name FROM item") == ([] if is_from_url else ["a"])
    await connect.close()
