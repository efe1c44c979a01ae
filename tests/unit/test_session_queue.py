"""Tasks of a context use its session at the same time: what each pair of operations does."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import pytest_asyncio
import sqlmodel
from sqlalchemy import URL, event, insert, literal, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, foreign, registry, relationship
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from context_async_sqlalchemy import (
    DBConnect,
    atomic_db_session,
    close_db_session,
    db_session,
    new_db_session_ctx,
    rollback_db_session,
)
from tests.helpers.cancelling import cancel_at
from tests.helpers.connections import connections_out
from tests.helpers.database import Database
from tests.helpers.models import Base, Item
from tests.helpers.programs import ROOT

Operation: TypeAlias = Callable[[AsyncSession, str], Awaitable[object]]

PAGE = (ROOT / "docs/how-to/concurrent-queries.md").read_text()
ROWS = (
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300) SELECT i FROM n"
)


async def execute(session: AsyncSession, name: str) -> None:
    await session.execute(insert(Item).values(name=name))


async def stream(session: AsyncSession, _: str) -> None:
    result = await session.stream(text(ROWS))
    assert len([row async for row in result]) == 300


async def flush(session: AsyncSession, name: str) -> None:
    session.add(Item(name=name))
    await session.flush()


async def refresh(session: AsyncSession, _: str) -> None:
    await session.refresh(session.info["item"])


async def get(session: AsyncSession, _: str) -> None:
    assert await session.get(Item, 2) is not None


async def merge(session: AsyncSession, _: str) -> None:
    await session.merge(Item(id=3, name="third"))


async def begin_nested(session: AsyncSession, name: str) -> None:
    async with session.begin_nested():
        await execute(session, name)


async def commit(session: AsyncSession, _: str) -> None:
    await session.commit()


async def rollback(session: AsyncSession, _: str) -> None:
    await session.rollback()


async def close(session: AsyncSession, _: str) -> None:
    await session.close()


async def run_sync(session: AsyncSession, name: str) -> None:
    def work(sync_session: Session) -> None:
        with sync_session.begin_nested():
            sync_session.execute(insert(Item).values(name=name))
        sync_session.execute(text("SELECT 1"))

    await session.run_sync(work)


OPERATIONS: list[Operation] = [
    *(execute, stream, flush, refresh, get, merge, begin_nested, run_sync, commit, rollback, close)
]
BY_NAME = {operation.__name__: operation for operation in OPERATIONS}
WRITES = {execute, flush, begin_nested, run_sync}


@asynccontextmanager
async def connected(
    url: URL, database: Database, tmp_path: Path, driver: str, **options: Any
) -> AsyncGenerator[DBConnect]:
    """Make a connect with one connection to a database that has three items."""
    target: URL | str = url.set(drivername=f"postgresql+{driver}")
    if driver == "aiosqlite":
        target = f"sqlite:///{tmp_path / 'test.db'}"
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.5} | options
    async with DBConnect.from_url(target, **options) as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            if driver == "aiosqlite":
                await (await session.connection()).run_sync(Base.metadata.tables["item"].create)
            session.add_all([Item(name=name) for name in ("first", "second", "third")])
        yield connect
        async with asyncio.timeout(10):
            while connections_out(connect):
                await asyncio.sleep(0.001)
        await database.is_quiet()


@pytest_asyncio.fixture(params=["asyncpg", "psycopg", "aiosqlite"])
async def one_connection(
    request: pytest.FixtureRequest, database_url: URL, database: Database, tmp_path: Path
) -> AsyncGenerator[DBConnect]:
    async with connected(database_url, database, tmp_path, request.param) as connect:
        yield connect


@pytest_asyncio.fixture
async def connect(
    database_url: URL, database: Database, tmp_path: Path
) -> AsyncGenerator[DBConnect]:
    options = {"pool_size": 5, "pool_timeout": 30}
    async with connected(database_url, database, tmp_path, "asyncpg", **options) as connect:
        yield connect


@asynccontextmanager
async def session_of(connect: DBConnect, is_cold: bool = False) -> AsyncGenerator[AsyncSession]:
    """Open a context whose session has no connection yet; at the end, it is usable."""
    async with new_db_session_ctx(), asyncio.timeout(10):
        session = await db_session(connect)
        session.info["item"] = await session.get(Item, 1)
        await session.commit()
        if is_cold:
            assert connect.engine is not None
            await connect.engine.dispose()
        yield session
        if not session.is_active:  # a cancelled flush
            await session.rollback()
        assert await session.scalar(text("SELECT 42")) == 42


async def names(connect: DBConnect) -> list[str]:
    async with new_db_session_ctx():
        session = await db_session(connect)
        return list(await session.scalars(select(Item.name).where(Item.id > 3).order_by(Item.id)))


async def together(session: AsyncSession, operations: Sequence[Operation], name: str) -> list[Any]:
    """Start operations in tasks, in this order; return the error of each, or None."""
    works = [work(session, f"{name} {n}") for n, work in enumerate(operations)]
    return await asyncio.gather(*works, return_exceptions=True)


def kept(operations: Sequence[Operation], name: str) -> list[str]:
    """Return what operations have written, one after another."""
    written: list[str] = []
    for number, operation in enumerate(operations):
        if operation in WRITES:
            written.append(f"{name} {number}")
        if operation in (rollback, close):
            written.clear()
    return written


def table() -> dict[tuple[str, str], str]:
    """Return what the page says of each pair: the one that begins, the one that comes meanwhile."""
    rows_of_page = [line.strip() for line in PAGE.splitlines()]  # which may be folded
    lines = [line.strip("| ").split("|") for line in rows_of_page if line.startswith("| ")]
    cells = [[cell.strip(" `") for cell in line] for line in lines]
    head = next(line for line in cells if line[0] == "begins")
    rows = [line for line in cells if line[0] in BY_NAME]
    return {
        (row[0], meanwhile): cell
        for row in rows
        for names, cell in zip(head[1:], row[1:], strict=True)
        for meanwhile in re.findall(r"\w+", names)
    }


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        *(("asyncpg", {}), ("psycopg", {}), ("aiosqlite", {})),
        ("asyncpg", {"pool_pre_ping": True, "ping_after_idle": 1e-9}),
    ],
)
async def test_each_pair_does_what_the_page_says(
    database_url: URL, database: Database, tmp_path: Path, driver: str, options: dict[str, Any]
) -> None:
    seen = {}
    expected: list[str] = []
    async with connected(database_url, database, tmp_path, driver, **options) as connect:
        for pair in itertools.product(OPERATIONS, repeat=2):
            key = pair[0].__name__, pair[1].__name__
            async with session_of(connect, is_cold=not options) as session:
                first, second = await together(session, pair, " ".join(key))
            assert connections_out(connect) == 0
            seen[key] = "its error" if first else "error" if second else "waits"
            assert type(first or second) in (type(None), InvalidRequestError)
            expected += kept(pair, " ".join(key))
        assert sorted(await names(connect)) == sorted(expected)
    assert seen == table()


async def test_three_tasks_do_not_block_each_other(one_connection: DBConnect) -> None:
    expected: list[str] = []
    works = [flush, begin_nested, run_sync, commit]
    for number, triple in enumerate(itertools.product(works, repeat=3)):
        async with session_of(one_connection) as session:
            assert await together(session, triple, f"{number}") == [None] * 3
        expected += kept(triple, f"{number}")
    assert sorted(await names(one_connection)) == sorted(expected)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_who_is_cancelled_at_any_point_lets_the_next_one_in(
    connect: DBConnect, operation: Operation, kind: str
) -> None:
    number, suspensions = 1, 1
    while suspensions >= number - 1:  # until one was not cancelled
        async with session_of(connect) as session:
            work = operation(session, f"{number}")
            first = asyncio.create_task(cancel_at(number, work, kind))
            await asyncio.sleep(0)
            others = [asyncio.create_task(get(session, "")) for _ in range(2)]
            suspensions = await first
            await asyncio.wait(others)  # each does, or is refused: a connection may be discarded
            await session.rollback()
        assert connections_out(connect) == 0
        number += 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_who_is_cancelled_while_waiting_leaves_nothing(
    connect: DBConnect, operation: Operation, kind: str
) -> None:
    async with session_of(connect) as session:
        first = asyncio.create_task(execute(session, "first to come"))
        await asyncio.sleep(0)
        waiting = [cancel_at(1, operation(session, f"{number}"), kind) for number in range(2)]
        await asyncio.gather(*waiting, get(session, ""))
        await first
    added = ["0", "1"] if operation is flush else []
    assert await names(connect) == ["first to come", *added]


async def test_four_resolvers_of_each_request_are_answered_on_a_cold_pool(
    connect: DBConnect,
) -> None:
    async def resolve(number: int) -> int | None:
        session = await db_session(connect)
        return await session.scalar(select(literal(number)))

    async def request() -> list[int | None]:
        async with new_db_session_ctx():
            return await asyncio.gather(*map(resolve, range(4)))

    assert await asyncio.gather(*(request() for _ in range(120))) == [[0, 1, 2, 3]] * 120


async def test_a_task_in_a_loop_lets_the_others_in(one_connection: DBConnect) -> None:
    async with session_of(one_connection) as session:
        task = asyncio.create_task(get(session, ""))
        statements = 0
        while not task.done():
            await session.execute(text("SELECT 1"))
            statements += 1
            assert statements < 20


async def undone(session: AsyncSession, name: str, inside: asyncio.Event) -> None:
    async with session.begin_nested():
        await flush(session, name)
        inside.set()
        await asyncio.sleep(0.01)
        await session.execute(text("SELECT 1"))
        raise ZeroDivisionError


@pytest.mark.parametrize("work", [execute, flush, begin_nested, run_sync])
async def test_a_savepoint_undoes_nothing_of_another_task(
    one_connection: DBConnect, work: Operation
) -> None:
    async with session_of(one_connection) as session:
        inside = asyncio.Event()
        task = asyncio.create_task(undone(session, "undone", inside))
        await inside.wait()
        await work(session, "kept")
        with pytest.raises(ZeroDivisionError):
            await task
    assert await names(one_connection) == ["kept"]


async def test_the_savepoint_of_an_atomic_block_is_held_like_another(
    one_connection: DBConnect,
) -> None:
    async def block() -> None:
        async with atomic_db_session(one_connection, "savepoint") as session:
            inside.set()
            await asyncio.sleep(0.01)
            await execute(session, "undone")
            raise ZeroDivisionError

    async with session_of(one_connection) as session:
        inside = asyncio.Event()
        await execute(session, "before")
        task = asyncio.create_task(block())
        await inside.wait()
        await execute(session, "kept")
        with pytest.raises(ZeroDivisionError):
            await task
    assert await names(one_connection) == ["before", "kept"]


async def test_tasks_that_are_created_in_a_savepoint_are_inside_of_it(
    one_connection: DBConnect,
) -> None:
    async with session_of(one_connection) as session:
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                await asyncio.gather(*(flush(session, f"undone {n}") for n in range(3)))
                raise ZeroDivisionError
        async with session.begin_nested():
            await asyncio.gather(*(begin_nested(session, f"{n}") for n in range(3)))
    assert await names(one_connection) == ["0", "1", "2"]


async def test_a_savepoint_that_waits_for_another_task_is_named_in_an_error(
    one_connection: DBConnect,
) -> None:
    async with session_of(one_connection) as session:
        inside = asyncio.Event()

        async def other() -> None:
            await inside.wait()
            await execute(session, "other")

        task = asyncio.create_task(other())
        with pytest.raises(InvalidRequestError, match="Does the block wait for this task"):
            async with session.begin_nested():
                inside.set()
                await task


async def test_a_savepoint_whose_task_is_cancelled_as_it_waits_to_end_is_undone(
    one_connection: DBConnect,
) -> None:
    async with session_of(one_connection) as session:
        inside = asyncio.Event()

        children: list[asyncio.Task[None]] = []

        async def block() -> None:
            async with session.begin_nested():
                await execute(session, "undone")
                children.append(asyncio.create_task(get(session, "")))
                await asyncio.sleep(0)
                inside.set()

        await execute(session, "kept")
        task = asyncio.create_task(block())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await children[0]
    assert await names(one_connection) == ["kept"]


async def in_a_flush(session: AsyncSession, name: str) -> asyncio.Task[None]:
    """Return a task that waits for the database in a flush."""
    task = asyncio.create_task(flush(session, name))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_what_is_changed_during_a_flush_is_stored(one_connection: DBConnect) -> None:
    async with session_of(one_connection) as session:
        item, second = session.info["item"], await session.get(Item, 2)
        assert second is not None
        item.name = "in the flush"
        task = await in_a_flush(session, "new")
        second.name = "by another task"
        item.name = "again by another task"
        session.add_all([Item(name="a"), Item(name="b")])
        await session.flush()
        await task
    async with new_db_session_ctx():
        session = await db_session(one_connection)
        stored = set(await session.scalars(select(Item.name)))
    assert stored == {"again by another task", "by another task", "third", "new", "a", "b"}


@pytest.mark.parametrize("end", [rollback, close])
async def test_what_is_added_while_another_task_rolls_back_is_stored(
    one_connection: DBConnect, end: Operation
) -> None:
    async with session_of(one_connection) as session:
        await execute(session, "undone")
        task = asyncio.ensure_future(end(session, ""))
        await asyncio.sleep(0)
        await flush(session, "kept")
        await task
    assert await names(one_connection) == ["kept"]


class OwnSession(Session):
    pass


ITEMS, SEATS = Base.metadata.tables["item"], Base.metadata.tables["seat"]


class Lazy(AsyncAttrs, DeclarativeBase):
    metadata = Base.metadata
    registry = registry(metadata=Base.metadata)


class Owner(Lazy):
    __table__ = ITEMS
    seats: Mapped[list[OwnedSeat]] = relationship(
        primaryjoin=lambda: ITEMS.c.id == foreign(SEATS.c.number),
        viewonly=True,
    )


class OwnedSeat(Lazy):
    __table__ = SEATS


async def test_objects_are_loaded_lazily_by_two_tasks(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await session.execute(insert(OwnedSeat), [{"number": n} for n in (1, 2)])
        owners = list(await session.scalars(select(Owner).order_by(ITEMS.c.id)))
        seats = await asyncio.gather(*(owner.awaitable_attrs.seats for owner in owners))
    assert [len(found) for found in seats] == [1, 1, 0]


async def test_a_session_class_of_the_users_own_queues(database_url: URL) -> None:
    connect = DBConnect.from_url(database_url, session_options={"sync_session_class": OwnSession})
    async with connect as own:
        for _ in range(2):
            async with new_db_session_ctx():
                session = await db_session(own)
                assert isinstance(session.sync_session, OwnSession)
                statements = [session.scalar(select(literal(n))) for n in range(3)]
                assert await asyncio.gather(*statements) == [0, 1, 2]


async def test_a_listener_that_executes_is_inside_of_the_call(connect: DBConnect) -> None:
    seen: list[int | None] = []

    def look(session: Session, *_: object) -> None:
        seen.append(session.scalar(text("SELECT 1")))

    async with session_of(connect) as session:
        for name in ("before_flush", "after_flush", "before_commit"):
            event.listen(session.sync_session, name, look)
        await asyncio.gather(flush(session, "a"), flush(session, "b"), commit(session, ""))
    assert seen[:5] == [1] * 5
    assert await names(connect) == ["a", "b"]


async def test_tasks_that_use_sqlmodels_exec_queue(database_url: URL) -> None:
    connect = DBConnect.from_url(database_url, session_options={"class_": SQLModelSession})
    async with connect as own:
        for _ in range(2):
            async with new_db_session_ctx():
                session = await db_session(own)
                statements = (sqlmodel.select(literal(n)) for n in (1, 2))
                results = await asyncio.gather(*map(session.exec, statements))
                assert [result.one() for result in results] == [1, 2]


@pytest.mark.parametrize("end", [rollback_db_session, close_db_session])
async def test_ending_it_by_hand_waits_for_what_a_sibling_is_inside_of(
    connect: DBConnect, database: Database, end: Callable[[DBConnect], Awaitable[None]]
) -> None:
    async with new_db_session_ctx():
        session = await db_session(connect)
        await execute(session, "a")
        sleeping = asyncio.create_task(session.scalar(text("SELECT 42 FROM pg_sleep(0.1)")))
        async with asyncio.timeout(10):
            while not await database.is_asleep():
                await asyncio.sleep(0.001)
        await end(connect)
        assert await sleeping == 42
        assert connections_out(connect) == 0
    assert await database.names() == ["first", "second", "third"]


async def test_ending_it_by_hand_waits_no_longer_for_a_block_than_for_a_connection(
    database_url: URL, database: Database
) -> None:
    is_inside, is_over = asyncio.Event(), asyncio.Event()

    async def stay(session: AsyncSession) -> None:
        async with session.begin_nested():
            await execute(session, "a")
            is_inside.set()
            await is_over.wait()

    async with DBConnect.from_url(database_url, pool_timeout=0.05) as connect:
        async with new_db_session_ctx():
            staying = asyncio.create_task(stay(await db_session(connect)))
            await is_inside.wait()
            async with asyncio.timeout(10):
                with pytest.raises(InvalidRequestError, match="is inside a block"):
                    await rollback_db_session(connect)
                await close_db_session(connect)  # nothing is left to save
            assert connections_out(connect) == 0
            is_over.set()
            await staying  # SQLAlchemy says nothing of a block whose session was closed
        assert connections_out(connect) == 0
    assert await database.names() == []
