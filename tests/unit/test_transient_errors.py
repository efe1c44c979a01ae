"""Which errors are transient."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    OperationalError,
    TimeoutError as PoolTimeoutError,
)

from context_async_sqlalchemy import (
    CommitOutcomeUnknownError,
    DBConnect,
    commit_db_session,
    is_transient_error,
    new_db_session_ctx,
    new_non_ctx_session,
    rollback_db_session,
)
from tests.helpers.asgi import add
from tests.helpers.database import Database, make_connect
from tests.helpers.failures import (
    be_one_too_many,
    be_refused,
    be_terminated_between_statements,
    be_terminated_inside_a_statement,
    commit_session_itself,
    connect_with,
    deadlock,
    divide_by_zero,
    error_of,
    fail_to_lock,
    fail_to_serialize,
    violate_a_constraint,
)
from tests.helpers.proxy import Call, Fault, proxy


@pytest.mark.parametrize(
    "work",
    [
        fail_to_serialize,
        deadlock,
        fail_to_lock,
        be_terminated_between_statements,
        be_terminated_inside_a_statement,
        be_refused,
        be_one_too_many,
    ],
)
async def test_what_may_succeed_the_next_time_is_transient(
    serializable: DBConnect, database: Database, work: Any
) -> None:
    error = await error_of(work(serializable, database))
    assert is_transient_error(error), repr(error)


async def exhaust_the_pool(connect: DBConnect, _: Database) -> None:
    async with AsyncExitStack() as stack:
        for _number in range(6):
            session = await stack.enter_async_context(new_non_ctx_session(connect))
            await session.connection()


async def use_a_failed_transaction(connect: DBConnect, _: Database) -> None:
    async with new_non_ctx_session(connect) as session:
        for statement in ("SELECT 1/0", "SELECT 1"):
            error = await error_of(session.execute(text(statement)))
        raise error


@pytest.mark.parametrize(
    "work", [violate_a_constraint, divide_by_zero, exhaust_the_pool, use_a_failed_transaction]
)
async def test_what_would_fail_again_is_not_transient(
    serializable: DBConnect, database: Database, work: Any
) -> None:
    error = await error_of(work(serializable, database))
    assert not is_transient_error(error), repr(error)


async def test_a_login_that_is_refused_is_not_transient(connect: DBConnect) -> None:
    error = await error_of(connect_with(connect, username="nobody"))
    assert not is_transient_error(error), repr(error)


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER, "terminated"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_lost_commit_is_never_transient_whoever_commits(
    database_url: URL, database: Database, fault: Any, driver: str
) -> None:
    async def lose_commit(call: Call) -> Fault | None:
        if not call.statement.startswith("COMMIT"):
            return None
        if isinstance(fault, Fault):
            return fault
        await database.terminate(call.pid)
        return None

    assert database_url.host is not None
    assert database_url.port is not None
    async with proxy(database_url.host, database_url.port, lose_commit) as port:
        url = database_url.set(drivername=f"postgresql+{driver}", host="127.0.0.1", port=port)
        lossy = make_connect(url)
        for commit in (commit_db_session, commit_session_itself):
            async with new_db_session_ctx():
                await add(lossy, f"by {commit.__name__}")
                error = await error_of(commit(lossy))
                assert not is_transient_error(error), repr(error)
                assert not is_transient_error(
                    BaseExceptionGroup("", [error, ConnectionResetError()])
                )
                assert (commit is commit_db_session) == isinstance(error, CommitOutcomeUnknownError)
                await rollback_db_session(lossy)
        await lossy.close()


async def test_a_busy_sqlite_database_is_transient(tmp_path: Path) -> None:
    connect = make_connect(
        f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", connect_args={"timeout": 0}
    )
    async with new_non_ctx_session(connect) as one, new_non_ctx_session(connect) as two:
        await one.execute(text("CREATE TABLE item (name TEXT UNIQUE)"))
        await one.execute(text("INSERT INTO item VALUES ('a')"))
        busy = await error_of(two.execute(text("INSERT INTO item VALUES ('b')")))
        assert is_transient_error(busy)
        double = await error_of(one.execute(text("INSERT INTO item VALUES ('a')")))
        assert not is_transient_error(double)
    await connect.close()


def mysql_error(number: int) -> OperationalError:
    """Make what the drivers for MySQL raise: PyMySQL's errors, with their number first."""
    return OperationalError("UPDATE …", {}, Exception(number, "…"))


@pytest.mark.parametrize(
    ("number", "transient"), [(1205, True), (1213, True), (1040, True), (1064, False)]
)
def test_the_numbers_of_mysql_are_known(number: int, transient: bool) -> None:
    assert is_transient_error(mysql_error(number)) is transient


DEADLOCK = mysql_error(1213)
DUPLICATE = IntegrityError("INSERT …", {}, sqlite3.IntegrityError("UNIQUE"))
UNKNOWN = CommitOutcomeUnknownError()


def caused_by(cause: BaseException) -> Exception:
    error = Exception("cannot book the room")
    error.__cause__ = cause
    return error


def while_handling(error: BaseException, earlier: BaseException) -> BaseException:
    error.__context__ = earlier
    return error


def in_a_circle() -> Exception:
    one, two = Exception(), Exception()
    one.__cause__, two.__cause__ = two, one
    return one


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (DEADLOCK, True),
        (caused_by(caused_by(DEADLOCK)), True),
        (ExceptionGroup("", [caused_by(DEADLOCK)]), True),
        (ExceptionGroup("", [ValueError(), ExceptionGroup("", [DEADLOCK])]), True),
        (caused_by(ExceptionGroup("", [DEADLOCK])), True),
        (while_handling(mysql_error(1205), DUPLICATE), True),
        (ConnectionRefusedError(), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.InternalClientError("cannot switch to state 11"), True),
        (asyncpg.exceptions.ClientConfigurationError("`sslmode` is wrong"), False),
        (ExceptionGroup("", [DEADLOCK, DUPLICATE]), False),
        (ExceptionGroup("", [DEADLOCK, UNKNOWN]), False),
        (while_handling(ConnectionRefusedError(), UNKNOWN), False),
        (while_handling(ValueError(), DEADLOCK), False),
        (DUPLICATE, False),
        (UNKNOWN, False),
        (in_a_circle(), False),
        (KeyError(1213), False),
        (TimeoutError(), False),
        (PoolTimeoutError(), False),
        (socket.gaierror(), False),
        (asyncio.CancelledError(), False),
        (DBAPIError("SELECT 1", {}, Exception()), False),
    ],
)
def test_causes_and_groups_are_looked_into(error: BaseException, transient: bool) -> None:
    assert is_transient_error(error) is transient
