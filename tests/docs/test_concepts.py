"""The page *Core concepts*: what it says of its program is so; and the order of the glossary."""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy.exc import IntegrityError

from context_async_sqlalchemy import commit_all_sessions, db_session, new_db_session_ctx
from examples import concepts
from tests.helpers.connections import connections_out
from tests.helpers.programs import ROOT, Outside


class Stored:
    """What the two databases hold, which are one on PostgreSQL."""

    def __init__(self, shop_url: str, journal_url: str) -> None:
        self.databases = Outside(shop_url), Outside(journal_url)

    async def articles(self) -> Sequence[Any]:
        return await self.databases[0].rows("SELECT article FROM concepts_order ORDER BY id")

    async def entries(self) -> Sequence[Any]:
        return await self.databases[1].rows("SELECT text FROM concepts_entry ORDER BY id")


@pytest_asyncio.fixture
async def stored(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Stored]:
    is_sqlite = url.startswith("sqlite")
    journal_url = f"sqlite+aiosqlite:///{tmp_path / 'journal.db'}" if is_sqlite else url
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("JOURNAL_URL", journal_url)
    importlib.reload(concepts)
    stored = Stored(url, journal_url)
    for database in stored.databases:
        async with database.connection() as connection:
            await connection.run_sync(concepts.Base.metadata.create_all)
    yield stored
    for connect in (concepts.shop, concepts.journal):
        assert connections_out(connect) == 0
        await connect.close()
    for database in stored.databases:
        async with database.connection() as connection:
            await connection.run_sync(concepts.Base.metadata.drop_all)


async def test_the_program_stores_orders_and_entries(stored: Stored) -> None:
    await concepts.main()
    articles = ["tea", "milk", "bread", "butter"]
    assert await stored.articles() == articles
    assert await stored.entries() == [f"{article} was ordered" for article in articles]


async def test_a_connect_makes_its_engine_and_opens_a_connection_when_it_is_needed(
    stored: Stored,
) -> None:
    async with new_db_session_ctx():
        assert concepts.shop.engine is None
        session = await db_session(concepts.shop)
        assert concepts.shop.engine is not None
        assert connections_out(concepts.shop) == 0
        await session.connection()
        assert connections_out(concepts.shop) == 1


async def test_tasks_of_a_context_share_a_session_for_each_connect(stored: Stored) -> None:
    async with new_db_session_ctx():
        await asyncio.gather(concepts.place_order("tea"), concepts.place_order("milk"))
        orders, entries = await db_session(concepts.shop), await db_session(concepts.journal)
        assert [order.article for order in orders.new] == ["tea", "milk"]
        assert len(entries.new) == 2
        assert orders is not entries


async def test_what_is_in_one_context_is_committed_together_or_not_at_all(stored: Stored) -> None:
    with pytest.raises(IntegrityError):
        await concepts.place_both("tea", None)  # type: ignore[arg-type]
    assert await stored.articles() == await stored.entries() == []


async def test_what_is_settled_stays_whatever_comes_next(stored: Stored) -> None:
    with pytest.raises(IntegrityError):
        await concepts.place_each("tea", None)  # type: ignore[arg-type]
    assert await stored.articles() == ["tea"]
    assert await stored.entries() == ["tea was ordered"]


async def test_a_session_and_its_objects_go_on_after_a_commit(stored: Stored) -> None:
    async with new_db_session_ctx():
        session = await db_session(concepts.shop)
        order = concepts.Order(article="tea")
        session.add(order)
        await commit_all_sessions()
        assert order in session
        assert await db_session(concepts.shop) is session
        order.article = "green " + order.article
    assert await stored.articles() == ["green tea"]


def test_the_glossary_is_in_alphabetical_order() -> None:
    terms = re.findall("^## (.+)$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 30
    assert terms == sorted(terms, key=str.lower)
