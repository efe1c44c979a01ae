"""The statements of a block are counted, with each driver: those of its tasks, and no others'."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading

import pytest
from sqlalchemy import ForeignKey, create_engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from context_async_sqlalchemy import DBConnect, atomic_db_session, db_session, new_db_session_ctx
from context_async_sqlalchemy._engine import observed
from context_async_sqlalchemy.observability import assert_queries, count_queries
from tests.helpers.models import Item
from tests.helpers.store import Store


async def select_one(connect: DBConnect) -> None:
    await (await db_session(connect)).execute(text("SELECT 1"))


async def test_statements_count_and_the_ends_of_transactions_do_not(store: Store) -> None:
    async with count_queries() as queries, new_db_session_ctx():
        session = await db_session(store.connect)
        await session.execute(text("SELECT 1"))
        await session.commit()
        async with session.begin_nested():
            session.add(Item(name="a"))
        async with atomic_db_session(store.connect, "append"):
            await session.execute(text("SELECT 2"))
    assert queries.statements[0] == "SELECT 1"
    assert queries.statements[1].startswith("INSERT INTO item")
    assert queries.statements[2] == "SELECT 2"
    assert len(queries) == 3


async def test_a_statement_that_fails_counts(store: Store) -> None:
    async with count_queries() as queries, new_db_session_ctx():
        session = await db_session(store.connect)
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT nonsense"))
        await session.rollback()
    assert queries.statements == ["SELECT nonsense"]


async def test_many_rows_and_a_streamed_result_are_one_statement_each(store: Store) -> None:
    names = [{"name": str(n)} for n in range(100)]
    async with new_db_session_ctx():
        session = await db_session(store.connect)
        with assert_queries(1):
            await session.execute(text("INSERT INTO item (name) VALUES (:name)"), names)
        with assert_queries(1) as queries:
            result = await session.stream_scalars(
                select(Item.name), execution_options={"yield_per": 7}
            )
            assert len([name async for name in result]) == 100
    assert "SELECT item.name" in queries.statements[0]


async def test_tasks_count_for_who_started_them_and_for_nobody_else(store: Store) -> None:
    at_once = asyncio.Barrier(3)

    async def work(number: int) -> int:
        async with count_queries() as queries, new_db_session_ctx():
            await (await db_session(store.connect)).connection()
            await at_once.wait()
            await asyncio.gather(*(select_one(store.connect) for _ in range(number)))
            await at_once.wait()
        return len(queries)

    async with asyncio.timeout(20):
        assert [*await asyncio.gather(work(1), work(2), work(4))] == [1, 2, 4]


async def test_what_a_task_does_after_the_block_does_not_count(store: Store) -> None:
    has_ended = asyncio.Event()

    async def later() -> None:
        await has_ended.wait()
        async with new_db_session_ctx():
            await select_one(store.connect)

    async with count_queries() as queries:
        task = asyncio.create_task(later())
    has_ended.set()
    await task
    assert queries.statements == []


async def test_a_block_inside_another_counts_for_both(store: Store) -> None:
    async with count_queries() as outer, new_db_session_ctx():
        await select_one(store.connect)
        with count_queries() as inner:
            await select_one(store.connect)
        await select_one(store.connect)
    assert (len(outer), len(inner)) == (3, 1)


async def test_another_number_is_an_error_that_lists_the_statements(store: Store) -> None:
    async with new_db_session_ctx():
        with pytest.raises(AssertionError) as raised, assert_queries(1):
            await select_one(store.connect)
            await (await db_session(store.connect)).execute(text("SELECT\n   2"))
        with pytest.raises(AssertionError, match=r"^1 queries were expected, and 0 were sent$"):
            async with assert_queries(1):
                pass
    assert str(raised.value) == (
        "1 queries were expected, and 2 were sent:\n  1. SELECT 1\n  2. SELECT 2"
    )


async def test_an_error_in_the_block_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="mine"), assert_queries(1):
        raise ValueError("mine")


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "count_parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    children: Mapped[list[Child]] = relationship()


class Child(Base):
    __tablename__ = "count_child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("count_parent.id"))


async def test_lazy_loads_count(sqlite_connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(sqlite_connect)
        await (await session.connection()).run_sync(Base.metadata.create_all)
        session.add_all([Parent(id=n, children=[Child(id=n)]) for n in (1, 2, 3)])
        await session.flush()
        session.expunge_all()
        parents = list(await session.scalars(select(Parent)))
        with assert_queries(3):
            await session.run_sync(lambda _: [parent.children for parent in parents])


async def test_engines_that_are_made_and_replaced_meanwhile_count(store: Store) -> None:
    if store.driver == "aiosqlite":
        pytest.skip("a file has no host")
    async with count_queries() as queries:
        for host in ("127.0.0.1", "localhost"):
            await store.connect.connect(host)
            async with new_db_session_ctx():
                await select_one(store.connect)
    assert queries.statements == ["SELECT 1", "SELECT 1"]


async def test_engines_that_others_have_made_count(store: Store) -> None:
    await store.connect.session_maker()
    assert store.connect.engine is not None
    engine = create_async_engine(store.connect.engine.url)
    copy = engine.execution_options(isolation_level="AUTOCOMMIT")
    with count_queries() as queries:
        async with async_sessionmaker(engine)() as session:
            await session.execute(text("SELECT 1"))
        async with AsyncSession(copy) as session:
            await session.execute(text("SELECT 2"))
        sync_engine = create_engine("sqlite://")
        with sync_engine.connect() as connection:
            connection.execute(text("SELECT 3"))
    sync_engine.dispose()
    await engine.dispose()
    assert queries.statements == ["SELECT 1", "SELECT 2", "SELECT 3"]


async def test_transaction_settings_do_not_count_wherever_they_are_sent(store: Store) -> None:
    if store.driver == "aiosqlite":
        pytest.skip("it has none")
    await store.connect.session_maker()
    assert store.connect.engine is not None
    settings = {"app.tenant": "1"}
    async with DBConnect.from_url(
        store.connect.engine.url, transaction_settings=lambda: settings
    ) as connect:
        with assert_queries(1):
            async with new_db_session_ctx():
                await select_one(connect)


LISTENS = """
from sqlalchemy import Engine
import context_async_sqlalchemy.fastapi_utils, context_async_sqlalchemy.test_utils
from context_async_sqlalchemy import observability
from context_async_sqlalchemy._engine import observed

def listens():
    return Engine._has_events, Engine.raw_connection is observed._wait

assert listens() == (False, False)
with observability.count_queries():
    assert listens() == (True, True)
"""


def test_nobody_listens_before_somebody_asks() -> None:
    subprocess.run([sys.executable, "-c", LISTENS], check=True, timeout=60)


def test_other_threads_may_send_statements_when_counting_begins_and_ends() -> None:
    errors: list[Exception] = []
    has_ended = threading.Event()

    def send() -> None:
        engine = create_engine("sqlite://")
        while not has_ended.is_set():
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
            except Exception as error:
                errors.append(error)
        engine.dispose()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=send)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(2000):
            with count_queries() as queries:
                pass
            assert queries.statements == []
    finally:
        has_ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


def test_the_statement_of_a_transaction_is_known_by_how_it_begins() -> None:
    of_transaction = [
        "BEGIN",
        "begin immediate",
        "COMMIT;",
        " ROLLBACK TO SAVEPOINT a",
        "RELEASE a",
    ]
    of_transaction += ["SAVEPOINT a", "START  TRANSACTION READ ONLY", "PREPARE TRANSACTION 'a'"]
    others = ["PREPARE a AS SELECT 1", "SELECT 1 -- COMMIT", "ENDLESS", "COMMITS", "INSERT INTO a"]
    assert all(re.match(observed._OF_TRANSACTION, text) for text in of_transaction)
    assert not any(re.match(observed._OF_TRANSACTION, text) for text in others)
