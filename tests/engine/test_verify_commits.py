"""`verify_commits` of from_url: a COMMIT whose connection was lost is looked up."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
import stamina
from sqlalchemy import URL, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, PendingRollbackError

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    db_session,
    is_transient_error,
    new_db_session_ctx,
    new_non_ctx_session,
    on_commit,
    retry_on_transient_error,
)
from context_async_sqlalchemy._engine import verify_commits
from context_async_sqlalchemy.asgi_types import Message, Scope
from tests.helpers.asgi import app_of, call
from tests.helpers.calls import Calls
from tests.helpers.connections import connections_out
from tests.helpers.database import Database, assert_clean
from tests.helpers.flight import ADD, ONE, Flown, Wire
from tests.helpers.pgbouncer import CONNECT_ARGS, pgbouncer, pgbouncer_binary
from tests.helpers.postgres import free_port, new_server, use_again
from tests.helpers.proxy import TASK_NAME, Call, Fault, proxy
from tests.helpers.raw import raw_of

ASK = "SELECT xid"
INSERT, ANOTHER = (f"INSERT INTO own_item VALUES ('{name}')" for name in "ab")


@asynccontextmanager
async def opened(url: URL, driver: str = "asyncpg", **options: Any) -> AsyncGenerator[Flown]:
    """Open a connect with one connection, through a proxy."""
    wire = Wire()
    assert url.host is not None
    async with proxy(url.host, url.port or 5432, wire.note) as port:
        target = url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=port)
        given = {"pool_size": 1, "max_overflow": 0, "verify_commits": True}
        async with DBConnect.from_url(target, **(given | options)) as connect:
            for _ in range(2):  # the drivers prepare what they send
                async with new_non_ctx_session(connect) as session:
                    await session.execute(text("CREATE TEMPORARY TABLE nothing () ON COMMIT DROP"))
                    await session.execute(ADD, {"name": "warm"})
                    await session.execute(text("DELETE FROM item"))
                    await session.commit()
            wire.start()
            yield connect, wire


@pytest.fixture(params=["asyncpg", "psycopg", "in flight"])
async def verified(
    request: pytest.FixtureRequest, database_url: URL, database: Database
) -> AsyncGenerator[Flown]:
    options: dict[str, Any] = {"driver": request.param}
    if request.param == "in flight":
        options = {
            "begin_with_first_statement": True,
            "transaction_settings": lambda: {"app.tenant": "acme"},
        }
    async with opened(database_url, **options) as (connect, wire):
        yield connect, wire
        await assert_clean(connect, database)


def first(statement: str, fault: Fault) -> Callable[[Call], Fault | None]:
    """Let the first round trip with a statement fail."""
    faults = [fault]

    def decide(call: Call) -> Fault | None:
        return faults.pop() if faults and call.statement.startswith(statement) else None

    return decide


async def write(
    connect: DBConnect, calls: Calls, name: str = "a", attempts: int = 1, statement: Any = ADD
) -> list[Message]:
    """Serve a request that writes a row."""

    async def handler(_: Scope) -> int:
        calls.append("handler")
        session = await db_session(connect)
        await session.execute(statement, {"name": name} if statement is ADD else {})
        on_commit(connect, calls.callback("committed"))
        return 201

    with stamina.set_testing(True, attempts=attempts):
        return await call(app_of(handler, attempts=attempts))


# What it comes to


async def test_a_commit_whose_answer_is_lost_is_a_success(
    verified: Flown, database: Database
) -> None:
    connect, wire = verified
    calls = Calls()
    wire.decide = first("COMMIT", Fault.LOST_AFTER)
    sent = await write(connect, calls)
    assert sent[0]["status"] == 201
    assert calls == ["handler", "committed"]
    assert await database.names() == ["a"]
    assert connections_out(connect) == 0
    assert (await write(connect, calls, "b"))[0]["status"] == 201
    assert await database.names() == ["a", "b"]


async def test_a_commit_that_never_arrived_is_repeated_and_done_once(
    verified: Flown, database: Database
) -> None:
    connect, wire = verified
    calls = Calls()
    wire.decide = first("COMMIT", Fault.LOST_BEFORE)
    assert (await write(connect, calls, attempts=2))[0]["status"] == 201
    assert calls == ["handler", "handler", "committed"]
    assert await database.names() == ["a"]


async def test_without_another_attempt_the_error_says_that_nothing_is_committed(
    verified: Flown, database: Database
) -> None:
    connect, wire = verified
    calls = Calls()
    wire.decide = first("COMMIT", Fault.LOST_BEFORE)
    with pytest.raises(InterfaceError, match="not committed") as caught:
        await write(connect, calls)
    assert is_transient_error(caught.value)
    assert calls == ["handler"]
    assert await database.names() == []


async def test_a_function_that_is_retried_is_done_once(verified: Flown, database: Database) -> None:
    connect, wire = verified

    @retry_on_transient_error(attempts=3)
    async def work(name: str) -> None:
        await (await db_session(connect)).execute(ADD, {"name": name})

    for name, fault in ("a", Fault.LOST_BEFORE), ("b", Fault.LOST_AFTER):
        wire.decide = first("COMMIT", fault)
        with stamina.set_testing(True, attempts=3):
            await work(name)
    assert await database.names() == ["a", "b"]


async def test_a_transaction_that_only_read_is_repeated(verified: Flown) -> None:
    connect, wire = verified
    for fault in Fault.LOST_BEFORE, Fault.LOST_AFTER:
        calls = Calls()
        wire.decide = first("COMMIT", fault)
        assert (await write(connect, calls, attempts=2, statement=ONE))[0]["status"] == 201
        assert calls == ["handler", "handler", "committed"]


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER])
async def test_a_connection_that_is_lost_before_commit_is_known_to_have_committed_nothing(
    verified: Flown, database: Database, fault: Fault
) -> None:
    connect, wire = verified
    calls = Calls()
    wire.decide = first(ASK, fault)
    assert (await write(connect, calls, attempts=2))[0]["status"] == 201
    assert calls == ["handler", "handler", "committed"]
    assert await database.names() == ["a"]


async def test_a_failure_that_was_swallowed_is_told_as_ever(verified: Flown) -> None:
    connect, _ = verified
    with pytest.raises(PendingRollbackError) as caught:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(ONE)
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1 / 0"))
    assert "division by zero" in str(caught.value.__cause__)


async def test_each_of_two_databases_has_its_own_outcome(
    verified: Flown, database: Database, connect: DBConnect
) -> None:
    first_connect, wire = verified
    wire.decide = first("COMMIT", Fault.LOST_AFTER)
    async with new_db_session_ctx():
        await (await db_session(first_connect)).execute(ADD, {"name": "a"})
        await (await db_session(connect)).execute(ADD, {"name": "b"})
    assert await database.names() == ["a", "b"]
    wire.decide = first("COMMIT", Fault.LOST_BEFORE)
    with pytest.raises(InterfaceError, match="not committed"):
        async with new_db_session_ctx():
            await (await db_session(first_connect)).execute(ADD, {"name": "c"})
            await (await db_session(connect)).execute(ADD, {"name": "d"})
    assert await database.names() == ["a", "b"]


async def test_a_connection_of_sqlalchemy_goes_on_after_its_commit_was_looked_up(
    verified: Flown, database: Database
) -> None:
    connect, wire = verified
    assert connect.engine is not None
    async with connect.engine.connect() as connection:
        wire.decide = first("COMMIT", Fault.LOST_AFTER)
        for name in "ab":
            await connection.execute(ADD, {"name": name})
            await connection.commit()
    assert await database.names() == ["a", "b"]


async def test_a_role_without_privileges_may_ask(role_url: URL) -> None:
    async with DBConnect.from_url(role_url) as owner, new_non_ctx_session(owner) as session:
        await session.execute(text("CREATE TABLE own_item (name text)"))
        await session.commit()
    async with opened_plainly(role_url) as (connect, wire):
        wire.decide = first("COMMIT", Fault.LOST_AFTER)
        async with new_db_session_ctx():
            await (await db_session(connect)).execute(text(INSERT))


@asynccontextmanager
async def opened_plainly(url: URL, **options: Any) -> AsyncGenerator[Flown]:
    """Open a connect, through a proxy, where there is no table `item`."""
    wire = Wire()
    assert url.host is not None
    async with proxy(url.host, url.port or 5432, wire.note) as port:
        target = url.set(host="127.0.0.1", port=port)
        async with DBConnect.from_url(target, verify_commits=True, **options) as connect:
            yield connect, wire


@pytest.mark.skipif(pgbouncer_binary() is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_it_is_looked_up_through_pgbouncer(
    driver: str, database_url: URL, database: Database
) -> None:
    options = {"connect_args": CONNECT_ARGS} if driver == "asyncpg" else {}
    if driver == "psycopg":
        options = {"connect_args": {"prepare_threshold": None}}
    with pgbouncer(database_url) as url:
        async with opened(url, driver, **options) as (connect, wire):
            for name, fault in ("a", Fault.LOST_BEFORE), ("b", Fault.LOST_AFTER):
                wire.decide = first("COMMIT", fault)
                assert (await write(connect, Calls(), name, attempts=2))[0]["status"] == 201
    assert await database.names() == ["a", "b"]


# A COMMIT that takes its time


@asynccontextmanager
async def slow_commits(database: Database) -> AsyncGenerator[None]:
    """Let the commit of an item wait until an advisory lock is free."""
    await database.execute(
        """CREATE FUNCTION wait_for_lock() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock(4711);
        IF NEW.name = 'refused' THEN RAISE 'refused'; END IF; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait_for_lock(); SELECT pg_advisory_lock(4711)"""
    )
    try:
        yield
    finally:
        await database.execute("SELECT pg_advisory_unlock_all()")
        await database.is_quiet()
        await database.execute("DROP TRIGGER slow ON item; DROP FUNCTION wait_for_lock")


async def commit_and_lose(
    connect: DBConnect, database: Database, name: str = "a"
) -> asyncio.Task[None]:
    """Begin to commit an item, and lose the connection while the server is at it."""
    raws: list[Any] = []

    async def commit() -> None:
        async with new_db_session_ctx():
            session = await db_session(connect)
            await session.execute(ADD, {"name": name})
            raws.append(await raw_of(session))

    committing = asyncio.create_task(commit())
    async with asyncio.timeout(20):
        while await database.pid_of("COMMIT%") is None:
            await asyncio.sleep(0.001)
    cut(raws[0])
    return committing


def cut(raw: Any) -> None:
    if isinstance(raw, asyncpg.Connection):
        raw.terminate()
    else:
        with socket.socket(fileno=os.dup(raw.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)


async def is_asked(database: Database) -> None:
    """Wait until the server has been asked what became of a transaction."""
    async with asyncio.timeout(20):
        while not await database.fetch(
            "SELECT FROM pg_stat_activity WHERE query LIKE '%pg_xact_status%'"
            " AND state = 'idle' AND datname = current_database() AND pid <> pg_backend_pid()"
        ):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("name", ["a", "refused"])
async def test_a_commit_that_is_in_progress_is_asked_for_again(
    verified: Flown, database: Database, name: str
) -> None:
    connect, _ = verified
    async with slow_commits(database):
        committing = await commit_and_lose(connect, database, name)
        await is_asked(database)
        assert not committing.done()
        await database.execute("SELECT pg_advisory_unlock(4711)")
        if name == "a":
            await committing
        else:
            with pytest.raises(InterfaceError, match="not committed"):
                await committing
        assert await database.names() == [name] * (name == "a")


async def test_at_the_deadline_the_outcome_is_unknown(
    database_url: URL, database: Database
) -> None:
    async with (
        opened(database_url, verify_timeout=0.2) as (connect, _),
        slow_commits(database),
    ):
        committing = await commit_and_lose(connect, database)
        with pytest.raises(CommitOutcomeUnknownError) as caught:
            await committing
        cause = caught.value.__cause__
        assert isinstance(cause, DBAPIError)
        assert cause.orig is not None
        assert "in progress" in "".join(cause.orig.__notes__)
        assert connections_out(connect) == 0


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_cancellation_ends_the_search(
    driver: str, database_url: URL, database: Database
) -> None:
    # Not through a proxy in this process, for whose answer libpq's cancel would wait in vain.
    url = database_url.set(drivername=f"postgresql+{driver}")
    async with (
        DBConnect.from_url(url, pool_size=1, verify_commits=True) as connect,
        slow_commits(database),
    ):
        committing = await commit_and_lose(connect, database)
        await is_asked(database)
        committing.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(3):
                await committing
        assert connections_out(connect) == 0


async def test_a_driver_that_answers_a_cancellation_with_an_error_asks_no_more(
    database_url: URL, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = 0

    async def ask_later(*_: object) -> str:  # as psycopg does with SQLAlchemy 2.0.40, at times
        nonlocal asks
        asks += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError from None
        raise AssertionError

    monkeypatch.setattr(verify_commits, "_ask_later", ask_later)
    async with opened(database_url, verify_timeout=0.1) as (connect, wire):
        wire.decide = first("COMMIT", Fault.LOST_AFTER)
        tasks = asyncio.all_tasks()
        with pytest.raises(CommitOutcomeUnknownError):
            await write(connect, Calls())
        async with asyncio.timeout(5):
            while [t for t in asyncio.all_tasks() - tasks if t.get_name() != TASK_NAME]:
                await asyncio.sleep(0.001)
    assert asks == 1


async def test_a_server_that_says_nothing_leaves_it_unknown(
    database_url: URL, database: Database
) -> None:
    async with opened(database_url, verify_timeout=0.2) as (connect, wire):
        lost = first("COMMIT", Fault.LOST_AFTER)
        wire.decide = lambda call: Fault.LOST_BEFORE if call.pid == 0 else lost(call)
        with pytest.raises(CommitOutcomeUnknownError):
            await write(connect, Calls(), attempts=2)
        wire.decide = lambda _: None
    assert await database.names() == ["a"]


# A server that gives the number of the transaction to another one


async def test_after_a_crash_the_commit_of_another_transaction_is_not_taken_for_it() -> None:
    with new_server("127.0.0.1", free_port(), "-c wal_writer_delay=10s") as server:
        server.psql("CREATE TABLE own_item (name text)")
        xids: list[str] = []

        async def crash(call: Call) -> None:
            if call.statement.startswith("COMMIT"):
                os.kill(call.pid, signal.SIGKILL)
                await asyncio.to_thread(use_again, server, xids[0], ANOTHER)

        async with opened_plainly(make_url(server.url)) as (connect, wire):
            with pytest.raises(CommitOutcomeUnknownError):
                async with new_db_session_ctx():
                    session = await db_session(connect)
                    await session.execute(text(INSERT))
                    xids += await session.scalars(text("SELECT pg_current_xact_id()::text"))
                    wire.decide = crash
        assert server.psql("SELECT count(*) FROM own_item WHERE name = 'a'") == "0"


# What it costs


@pytest.mark.parametrize(("in_flight", "begin"), [(False, [("", "BEGIN;")]), (True, [])])
async def test_it_costs_a_round_trip(
    database_url: URL, database: Database, in_flight: bool, begin: list[tuple[str, str]]
) -> None:
    async with opened(database_url, begin_with_first_statement=in_flight) as (connect, wire):
        await write(connect, Calls())
        assert len(wire.trips) == len(begin) + 3
        assert wire.trips[-2][1].startswith(ASK)
        assert wire.trips[-1] == ("", "COMMIT;")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_has_no_transaction_is_not_asked_for(
    driver: str, database_url: URL, database: Database
) -> None:
    async with opened(database_url, driver) as (connect, wire):
        async with new_db_session_ctx():
            await (await db_session(connect, read_only=True)).execute(ONE)
        async with new_non_ctx_session(connect) as session:
            await session.connection()
            await session.commit()
        assert not [trip for trip in wire.trips if trip[1].startswith((ASK, "COMMIT"))]


async def test_without_the_option_nothing_is_added(database_url: URL, database: Database) -> None:
    async with opened(database_url, verify_commits=False) as (connect, wire):
        await write(connect, Calls())
        assert [statement for _, statement in wire.trips][-1] == "COMMIT;"
        assert len(wire.trips) == 3
        assert connect.engine is not None
        assert not connect.engine.sync_engine.dispatch.commit


# What is refused


@pytest.mark.parametrize("url", ["sqlite://", "mysql://db.example.com/shop"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="verify_commits needs PostgreSQL"):
        DBConnect.from_url(url, verify_commits=True)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="verify_timeout must be more than 0"):
        DBConnect.from_url(
            "postgresql://db.example.com/shop", verify_commits=True, verify_timeout=seconds
        )
