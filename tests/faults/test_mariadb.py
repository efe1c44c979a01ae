"""What is promised holds on MariaDB, with the drivers for MySQL."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy
from packaging.version import Version
from sqlalchemy import URL, insert, select, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    atomic_db_session,
    db_session,
    is_transient_error,
    new_db_session_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    roll_back_this_request,
)
from context_async_sqlalchemy.asgi_types import Scope
from tests.helpers.asgi import add, app_of, call, http_scope
from tests.helpers.cancelling import cancel_at
from tests.helpers.mariadb import mariadb, mariadb_binary
from tests.helpers.models import Item
from tests.helpers.programs import until

pytestmark = pytest.mark.skipif(
    mariadb_binary() is None, reason="mariadbd is not installed: apt-get install mariadb-server"
)
installed = Version(sqlalchemy.__version__)
PID = text("SELECT connection_id()")


@pytest.fixture(scope="module")
def server() -> Generator[URL]:
    with mariadb() as url:
        yield url


@pytest.fixture(params=["mariadb", "mysql+aiomysql"])
def url(server: URL, request: pytest.FixtureRequest) -> URL:
    return server.set(drivername=request.param)


@pytest_asyncio.fixture
async def connect(url: URL) -> AsyncGenerator[DBConnect]:
    """Return a connect to an empty table, and check that every connection comes home."""
    async with DBConnect.from_url(url) as connect:
        async with new_non_ctx_atomic_session(connect) as session:
            connection = await session.connection()
            await connection.run_sync(Item.metadata.tables["item"].drop, checkfirst=True)
            await connection.run_sync(Item.metadata.tables["item"].create)
        yield connect
        assert connect.pool_status().checked_out == 0


async def names(connect: DBConnect) -> list[str]:
    async with new_non_ctx_session(connect) as session:
        return list(await session.scalars(select(Item.name).order_by(Item.id)))


async def test_a_success_is_stored_and_a_refusal_is_not(connect: DBConnect) -> None:
    async def handler(scope: Scope) -> int:
        await add(connect, scope["path"])
        return 404 if scope["path"] == "/b" else 201

    app = app_of(handler)
    for path in ("/a", "/b", "/c"):
        await call(app, http_scope(path))
    with pytest.raises(IntegrityError):
        await call(app, http_scope("/a"))
    assert await names(connect) == ["/a", "/c"]


@pytest.mark.parametrize(("isolation_level", "rows"), [(None, 2), ("AUTOCOMMIT", None)])
async def test_a_request_that_marks_itself_is_rolled_back_and_its_rows_are_told_of(
    connect: DBConnect,
    caplog: pytest.LogCaptureFixture,
    isolation_level: Any,
    rows: int | None,
) -> None:
    caplog.set_level(logging.INFO, "context_async_sqlalchemy")

    async def handler(_: Scope) -> int:
        session = await db_session(connect)
        if isolation_level:
            await session.connection(execution_options={"isolation_level": isolation_level})
        await add(connect, "a", "b")
        roll_back_this_request()
        return 200

    await call(app_of(handler))
    assert await names(connect) == ([] if rows else ["a", "b"])
    assert ("rows: 2," in caplog.text) is bool(rows)


@pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
async def test_a_stream_that_another_task_cuts_off_says_so(connect: DBConnect) -> None:
    assert connect.engine is not None
    if connect.engine.driver == "asyncmy" and Version(version("asyncmy")) < Version("0.2.11"):
        pytest.skip("it reads the rest of the stream as the answer to the other statement")
    async with new_db_session_ctx():
        session = await db_session(connect)
        numbers = await session.stream(text("SELECT seq FROM seq_1_to_3000"))
        assert await numbers.fetchone() == (1,)
        assert await asyncio.create_task(session.scalar(text("SELECT 42"))) == 42
        with pytest.raises(InvalidRequestError, match="Another statement was executed"):
            await numbers.fetchone()


async def test_a_savepoint_fails_alone(connect: DBConnect) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
        with suppress(IntegrityError):
            async with atomic_db_session(connect, "savepoint"):
                await add(connect, "b", "a")
    assert await names(connect) == ["a"]


@pytest.mark.skipif(
    installed < Version("2.0.55") or Version("2.1") <= installed < Version("2.1.2"),
    reason="a connection whose return was cancelled waits for the garbage collector",
)
@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_a_request_is_cancelled_at_every_suspension(connect: DBConnect, kind: str) -> None:
    sent: list[str] = []

    async def handler(scope: Scope) -> int:
        await add(connect, scope["path"])
        return 201

    async def request(path: str) -> None:
        if await call(app_of(handler), http_scope(path)):
            sent.append(path)

    for number in itertools.count(1):
        suspensions = await cancel_at(number, request(f"/{number}"), kind)
        await until(lambda: connect.pool_status().checked_out == 0)
        assert set(sent) <= set(await names(connect))
        if suspensions < number:
            break
    assert "/1" not in await names(connect)
    assert sent[-1] == f"/{number}"


async def test_a_read_only_session_reads_refuses_writes_and_leaves_a_transaction(
    connect: DBConnect,
) -> None:
    async with new_db_session_ctx():
        await add(connect, "a")
    async with new_db_session_ctx():
        reading = await db_session(connect, read_only=True)
        assert list(await reading.scalars(select(Item.name))) == ["a"]
        with pytest.raises(InvalidRequestError, match="session is read-only"):
            await reading.execute(insert(Item).values(name="b"))
        await add(connect, "b")
        assert list(await reading.scalars(select(Item.name))) == ["a"]
        await (await db_session(connect)).commit()
        assert list(await reading.scalars(select(Item.name))) == ["a", "b"]  # no old snapshot
        result = await reading.stream_scalars(select(Item.name))
        assert [name async for name in result] == ["a", "b"]
        with pytest.raises(InvalidRequestError, match="is for PostgreSQL"):
            await db_session(connect, read_only="snapshot")
    await next_users_have_a_transaction(connect)


@pytest.mark.skipif(
    installed < Version("2.0.55") or Version("2.1") <= installed < Version("2.1.2"),
    reason="a connection whose return was cancelled waits for the garbage collector",
)
@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_a_request_that_reads_is_cancelled_at_every_suspension(
    connect: DBConnect, kind: str
) -> None:
    async def handler(_: Scope) -> int:
        await (await db_session(connect)).execute(select(Item.name))
        return 200

    for number in itertools.count(1):
        app = app_of(handler, read_only_methods={"GET"})
        suspensions = await cancel_at(number, call(app), kind)
        await until(lambda: connect.pool_status().checked_out == 0)
        if suspensions < number:
            break
    await next_users_have_a_transaction(connect)


async def next_users_have_a_transaction(connect: DBConnect) -> None:
    """Check that whoever takes one of the connections of the pool can roll back."""
    before = await names(connect)
    all_have_written = asyncio.Barrier(2)

    async def write_and_roll_back(name: str) -> None:
        async with new_non_ctx_session(connect) as session:
            await session.execute(insert(Item).values(name=name))
            async with asyncio.timeout(30):
                await all_have_written.wait()

    await asyncio.gather(write_and_roll_back("undone"), write_and_roll_back("undone, too"))
    assert await names(connect) == before


@asynccontextmanager
async def losing_the_commit(server: URL, is_heard: bool) -> AsyncGenerator[int]:
    """Pass on what clients and the server say until a COMMIT, which the server hears or not."""

    async def pass_on(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        upstream, to_server = await asyncio.open_connection(server.host, server.port)
        answering = asyncio.create_task(copy(upstream, to_client))
        try:
            while data := await client.read(65536):
                if data[5:] == b"COMMIT":  # after the length, the number and the kind of a packet
                    answering.cancel()
                    await asyncio.wait([answering])
                    if is_heard:
                        to_server.write(data)
                        await upstream.read(1)
                    break
                to_server.write(data)
        finally:
            to_server.close()
            to_client.close()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as relay:
        yield relay.sockets[0].getsockname()[1]


@pytest.mark.parametrize("is_heard", [False, True])
async def test_nobody_knows_what_became_of_a_commit_that_was_lost(
    connect: DBConnect, url: URL, is_heard: bool
) -> None:
    async with (
        losing_the_commit(url, is_heard) as port,
        DBConnect.from_url(url.set(port=port)) as losing,
    ):
        with pytest.raises(CommitOutcomeUnknownError) as caught:
            async with new_db_session_ctx():
                await add(losing, "a")
        assert not is_transient_error(caught.value)
        assert losing.pool_status().checked_out == 0
    assert await names(connect) == (["a"] if is_heard else [])


async def test_a_connection_that_was_killed_while_idle_is_replaced(
    connect: DBConnect, url: URL
) -> None:
    async def pid(connect: DBConnect) -> Any:
        async with new_non_ctx_session(connect) as session:
            return await session.scalar(PID)

    async def kill(pid: int) -> None:
        async with new_non_ctx_session(connect) as session:
            await session.execute(text(f"KILL {pid}"))

    async with DBConnect.from_url(url) as not_pinging:
        await kill(await pid(not_pinging))
        with pytest.raises(OperationalError) as caught:
            await pid(not_pinging)
        assert is_transient_error(caught.value)
    async with DBConnect.from_url(url, pool_pre_ping=True, ping_after_idle=0.001) as pinging:
        killed = await pid(pinging)
        await kill(killed)
        await asyncio.sleep(0.002)  # so that it is pinged
        assert await pid(pinging) != killed


async def test_a_request_that_was_chosen_by_a_deadlock_is_tried_again(connect: DBConnect) -> None:
    async with new_non_ctx_atomic_session(connect) as session:
        await session.execute(insert(Item).values([{"name": "a"}, {"name": "b"}]))
    mark = text("UPDATE item SET name = CONCAT(name, :mark) WHERE id = :number")
    both_have_one = asyncio.Barrier(2)
    attempts = 0

    async def handler(scope: Scope) -> int:
        nonlocal attempts
        attempts += 1
        session = await db_session(connect)
        first, second = scope["path"][1:]
        await session.execute(mark, {"mark": first, "number": first})
        if attempts <= 2:
            await both_have_one.wait()
        await session.execute(mark, {"mark": first, "number": second})
        return 201

    app = app_of(handler, attempts=3)
    answers = await asyncio.gather(*(call(app, http_scope(path)) for path in ("/12", "/21")))
    assert [messages[0]["status"] for messages in answers] == [201, 201]
    assert attempts == 3
    assert [sorted(name) for name in await names(connect)] == [["1", "2", "a"], ["1", "2", "b"]]


# What the server ends without being asked: https://mariadb.com/kb/en/innodb-deadlocks/

MARK = text("UPDATE item SET name = CONCAT(name, ' by ours') WHERE id = :number")
IS_WAITING = text("SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")


@asynccontextmanager
async def deadlock(connect: DBConnect) -> AsyncGenerator[None]:
    """Lock row 2, and wait for row 1, which the block has locked: it loses a deadlock over row 2.

    Row 2 is unlocked at the end, and the table has the two rows then that it had before.
    """
    async with new_non_ctx_session(connect) as other, new_non_ctx_session(connect) as observer:
        # InnoDB rolls the lighter one back.
        await other.execute(insert(Item).values([{"name": f"weight {n}"} for n in range(100)]))
        await other.execute(text("SELECT * FROM item WHERE id = 2 FOR UPDATE"))
        waiting = asyncio.create_task(other.execute(text("DELETE FROM item WHERE id = 1")))
        try:
            async with asyncio.timeout(30):
                while await observer.scalar(IS_WAITING) is None:
                    await asyncio.sleep(0.11)  # InnoDB keeps what it has told for 0.1 s
            yield
        finally:
            await asyncio.wait([waiting])
            await other.rollback()
    assert waiting.exception() is None, "the other one has lost"


async def lose_a_deadlock(connect: DBConnect, session: AsyncSession) -> None:
    """Fail in a transaction that has locked row 1."""
    async with deadlock(connect):
        with pytest.raises(DBAPIError) as caught:
            await session.execute(MARK, {"number": 2})
    raise caught.value


@pytest_asyncio.fixture
async def two_rows(connect: DBConnect) -> list[str]:
    """Make the rows 1 and 2; return their names."""
    async with new_non_ctx_atomic_session(connect) as session:
        await session.execute(insert(Item).values([{"name": "first"}, {"name": "second"}]))
    return ["first", "second"]


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_deadlock_that_is_swallowed_is_no_success(
    connect: DBConnect, two_rows: list[str], is_nested: bool, goes_on: bool
) -> None:
    with pytest.raises(SQLAlchemyError):  # a savepoint that is gone has another one
        async with new_db_session_ctx():
            session = await add(connect, "before")
            await session.execute(MARK, {"number": 1})
            with suppress(DBAPIError):
                if is_nested:
                    async with session.begin_nested():
                        await lose_a_deadlock(connect, session)
                else:
                    await lose_a_deadlock(connect, session)
            if goes_on:
                await add(connect, "after")
    assert await names(connect) == two_rows
    async with new_db_session_ctx():
        await add(connect, "next")
    assert await names(connect) == [*two_rows, "next"]


async def test_a_deadlock_in_a_savepoint_of_the_atomic_block_is_no_success(
    connect: DBConnect, two_rows: list[str]
) -> None:
    with pytest.raises(SQLAlchemyError):
        async with new_db_session_ctx():
            session = await add(connect, "before")
            await session.execute(MARK, {"number": 1})
            with suppress(DBAPIError):
                async with atomic_db_session(connect, "savepoint"):
                    await lose_a_deadlock(connect, session)
            await add(connect, "after")
    assert await names(connect) == two_rows


@pytest.mark.usefixtures("no_pauses")
async def test_a_request_that_has_swallowed_a_deadlock_is_tried_again(
    connect: DBConnect, two_rows: list[str]
) -> None:
    attempts = 0

    async def handler(_: Scope) -> int:
        nonlocal attempts
        attempts += 1
        session = await add(connect, "before")
        await session.execute(MARK, {"number": 1})
        if attempts == 1:
            with suppress(DBAPIError):
                await lose_a_deadlock(connect, session)
        await add(connect, "after")
        return 201

    assert (await call(app_of(handler, attempts=3)))[0]["status"] == 201
    assert attempts == 2
    assert await names(connect) == ["first by ours", "second", "before", "after"]


async def test_a_deadlock_is_forgiven_after_a_rollback(
    connect: DBConnect, two_rows: list[str]
) -> None:
    async with new_db_session_ctx():
        session = await add(connect, "before")
        await session.execute(MARK, {"number": 1})
        with suppress(DBAPIError):
            await lose_a_deadlock(connect, session)
        await session.rollback()
        await add(connect, "after")
    assert await names(connect) == [*two_rows, "after"]


@pytest.mark.parametrize("savepoint", ["none", "SQLAlchemy's", "in SQL"])
async def test_a_statement_that_the_server_undoes_alone_is_forgiven(
    connect: DBConnect, two_rows: list[str], savepoint: str
) -> None:
    async def fail(session: AsyncSession) -> None:
        with suppress(IntegrityError):
            await session.execute(insert(Item).values([{"name": "c"}, {"name": "c"}]))

    async with new_db_session_ctx():
        session = await add(connect, "before")
        if savepoint == "SQLAlchemy's":
            async with session.begin_nested():
                await fail(session)
        elif savepoint == "in SQL":
            await session.execute(text("SAVEPOINT mine"))
            await add(connect, "in the savepoint")
            await fail(session)
            await session.execute(text("ROLLBACK TO mine"))
        else:
            await fail(session)
        await add(connect, "after")
    assert await names(connect) == [*two_rows, "before", "after"]


async def test_a_lock_that_was_not_available_in_time_is_undone_alone(
    connect: DBConnect, two_rows: list[str]
) -> None:
    async with new_non_ctx_session(connect) as other:
        await other.execute(text("SELECT * FROM item WHERE id = 2 FOR UPDATE"))
        async with new_db_session_ctx():
            session = await add(connect, "before")
            await session.execute(text("SET SESSION innodb_lock_wait_timeout = 0"))
            with suppress(OperationalError):
                await session.execute(MARK, {"number": 2})
            await session.execute(text("SET SESSION innodb_lock_wait_timeout = DEFAULT"))
            await add(connect, "after")
    assert await names(connect) == [*two_rows, "before", "after"]
