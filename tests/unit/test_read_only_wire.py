"""What a read-only session sends, and what it leaves to the next user of its connection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio
from sqlalchemy import URL, event, insert, literal, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    db_session,
    new_db_session_ctx,
    run_in_new_ctx,
)
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import add, app_of, call
from tests.helpers.cancelling import cancel_at
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, assert_clean, checked_connect
from tests.helpers.models import Item
from tests.helpers.programs import until
from tests.helpers.proxy import Call, Fault, proxy

Mode = Literal[True, "snapshot"]
Use = Callable[[AsyncSession], Awaitable[None]]
NAMES = select(Item.name).order_by(Item.id)
every_driver = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
every_mode = pytest.mark.parametrize("mode", [True, "snapshot"])


class Wire:
    """What goes to the server, and fails if it begins like `fails`."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.fails: tuple[str, Fault] | None = None

    async def decide(self, call: Call) -> Fault | None:
        self.sent.append(call.statement)
        is_it = self.fails is not None and call.statement.startswith(self.fails[0])
        return self.fails[1] if self.fails is not None and is_it else None


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest_asyncio.fixture(params=["asyncpg", "psycopg"])
async def wired(
    request: pytest.FixtureRequest, database_url: URL, database: Database, wire: Wire
) -> AsyncGenerator[DBConnect]:
    """Return a connect with one connection, whose round trips from now on are in `wire`."""
    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, wire.decide) as port:
        url = database_url.set(
            drivername=f"postgresql+{request.param}", host="127.0.0.1", port=port
        )
        async with checked_connect(url, database, pool_size=1, max_overflow=0) as connect:
            async with new_db_session_ctx():  # it connects, and prepares the statement
                await (await db_session(connect)).execute(NAMES)
            wire.sent.clear()
            yield connect


async def read(connect: DBConnect, mode: Mode = True) -> list[str]:
    return list(await (await db_session(connect, read_only=mode)).scalars(NAMES))


async def test_a_select_is_one_round_trip(wired: DBConnect, wire: Wire) -> None:
    await run_in_new_ctx(read, wired)
    assert [sent[:6] for sent in wire.sent] == ["SELECT"]


async def test_the_select_of_a_request_is_one_round_trip(wired: DBConnect, wire: Wire) -> None:
    async def handle(_: Scope) -> int:
        await (await db_session(wired)).execute(NAMES)
        return 200

    await call(app_of(handle, read_only_methods={"GET"}))
    assert [sent[:6] for sent in wire.sent] == ["SELECT"]


async def test_a_snapshot_is_one_transaction(wired: DBConnect, wire: Wire) -> None:
    await run_in_new_ctx(read, wired, "snapshot")
    assert [sent.split()[0].strip(";") for sent in wire.sent] == ["BEGIN", "SELECT", "COMMIT"]
    assert "REPEATABLE READ" in wire.sent[0]
    assert "READ ONLY" in wire.sent[0]


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER])
async def test_the_commit_of_a_snapshot_that_is_lost_is_no_unknown_outcome(
    wired: DBConnect, wire: Wire, fault: Fault
) -> None:
    wire.fails = "COMMIT", fault
    with pytest.raises(DBAPIError) as caught:
        await run_in_new_ctx(read, wired, "snapshot")
    assert not isinstance(caught.value, CommitOutcomeUnknownError)
    wire.fails = None
    assert await run_in_new_ctx(read, wired) == []


async def has_a_transaction(connect: DBConnect, database: Database) -> None:
    """Check that the next session on a connection can write, and roll back."""
    before = await database.names()
    with pytest.raises(ZeroDivisionError):
        async with new_db_session_ctx():
            session = await add(connect, "undone")
            assert await session.scalar(text("SHOW transaction_isolation")) == "serializable"
            raise ZeroDivisionError
    assert await database.names() == before


async def fails(session: AsyncSession) -> None:
    with pytest.raises(DBAPIError):
        await session.execute(text("SELECT * FROM nothing"))
    await session.rollback()


async def is_refused(session: AsyncSession) -> None:
    with pytest.raises(InvalidRequestError):
        await session.execute(insert(Item).values(name="a"))


async def is_lost(session: AsyncSession) -> None:
    with pytest.raises(DBAPIError):
        await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    await session.rollback()


async def reads(session: AsyncSession) -> None:
    await session.execute(NAMES)


@every_driver
@every_mode
@pytest.mark.parametrize("use", [reads, fails, is_refused, is_lost])
async def test_the_next_user_of_the_connection_has_a_transaction(
    database_url: URL, database: Database, driver: str, mode: Mode, use: Use
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    options = {"isolation_level": "SERIALIZABLE", "pool_size": 1, "max_overflow": 0}
    async with checked_connect(url, database, **options) as connect:
        async with new_db_session_ctx():
            await use(await db_session(connect, read_only=mode))
        await has_a_transaction(connect, database)
        with pytest.raises(ZeroDivisionError):
            async with new_db_session_ctx():
                await read(connect, mode)
                raise ZeroDivisionError
        await has_a_transaction(connect, database)


@every_driver
@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_it_has_one_after_a_cancellation_at_every_suspension(
    database_url: URL, database: Database, driver: str, kind: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    options = {"isolation_level": "SERIALIZABLE", "pool_size": 1, "max_overflow": 0}

    async def handle(_: Scope) -> int:
        await (await db_session(connect)).execute(NAMES)
        return 200

    async with checked_connect(url, database, **options) as connect:
        await has_a_transaction(connect, database)
        for number in itertools.count(1):
            app = app_of(handle, read_only_methods={"GET"})
            suspensions = await cancel_at(number, call(app), kind)
            await assert_clean(connect, database)
            await has_a_transaction(connect, database)
            if suspensions < number:
                break


@every_driver
async def test_it_has_one_after_the_pool_has_overflowed(
    database_url: URL, database: Database, driver: str
) -> None:
    url = database_url.set(drivername=f"postgresql+{driver}")
    options = {"isolation_level": "SERIALIZABLE", "pool_size": 1, "max_overflow": 2}
    async with checked_connect(url, database, **options) as connect:
        all_have_read = asyncio.Barrier(3)

        async def read_together() -> None:
            await read(connect)
            async with asyncio.timeout(30):
                await all_have_read.wait()

        await asyncio.gather(*(run_in_new_ctx(read_together) for _ in range(3)))
        await has_a_transaction(connect, database)


async def test_two_tasks_share_it_and_their_statements_queue(
    connect: DBConnect, database: Database
) -> None:
    sessions: list[AsyncSession] = []

    async def child(number: int) -> int | None:
        session = await db_session(connect, read_only=True)
        sessions.append(session)
        result: int | None = await session.scalar(select(literal(number)))
        return result

    async with new_db_session_ctx():
        # The first statement takes the connection: SQLAlchemy lets no other task do so meanwhile.
        assert await child(0) == 0
        assert await asyncio.gather(*map(child, range(5))) == [0, 1, 2, 3, 4]
        assert connections_out(connect) == 1
    assert len(set(sessions)) == 1


async def test_many_tasks_that_ask_first_get_one(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        asked = [db_session(connect, read_only=True) for _ in range(5)]
        others = [db_session(connect) for _ in range(5)]
        sessions = await asyncio.gather(*asked, *others)
        assert (len(set(sessions[:5])), len(set(sessions))) == (1, 2)


async def test_a_listener_of_the_engine_hears_of_its_statements(connect: DBConnect) -> None:
    heard: list[str] = []
    async with new_db_session_ctx():
        await read(connect)
    assert connect.engine is not None
    event.listen(
        connect.engine.sync_engine,
        "before_cursor_execute",
        lambda _, __, statement, *___: heard.append(statement),
    )
    async with new_db_session_ctx():
        await read(connect)
    assert [statement[:6] for statement in heard] == ["SELECT"]


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_with_sqlite_it_has_one_after_a_cancellation_at_every_suspension(
    tmp_path: Path, kind: str
) -> None:
    async def handle(_: Scope) -> int:
        await (await db_session(connect)).execute(NAMES)
        return 200

    url = f"sqlite:///{tmp_path / 'a.db'}"
    async with DBConnect.from_url(url, pool_size=1, max_overflow=0) as connect:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await (await session.connection()).run_sync(Item.metadata.tables["item"].create)
        for number in itertools.count(1):
            app = app_of(handle, read_only_methods={"GET"})
            suspensions = await cancel_at(number, call(app), kind)
            await until(lambda: connections_out(connect) == 0)
            with pytest.raises(ZeroDivisionError):
                async with new_db_session_ctx():
                    await add(connect, "undone")
                    raise ZeroDivisionError
            assert await run_in_new_ctx(read, connect) == []
            if suspensions < number:
                break
