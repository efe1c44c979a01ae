"""What a COMMIT comes to, as the server or its driver says."""

from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from context_async_sqlalchemy._engine.driver_errors import is_refused_commit
from context_async_sqlalchemy._engine.private_names import (
    CommitWasRollbackError,
    let_commit_tell,
    replace_commit,
    takes_one_engine,
)
from context_async_sqlalchemy._engine.release import connections_of
from context_async_sqlalchemy._engine.sqlite import HAS_SAVEPOINT, release_savepoint

_CHECK = "_context_async_sqlalchemy_commits"
_ERROR = "context_async_sqlalchemy.error"
_HAS_ENDED = "context_async_sqlalchemy.has_ended"
_DURABLE = "context_async_sqlalchemy.durable"


class Durable(Protocol):
    """Work of which a part is durable, or may be."""

    durable: bool


def check_commits(engine: Engine) -> None:
    """Let each COMMIT of an engine that came to nothing raise, from now on."""
    # On the dialect, which the copies made by Engine.execution_options() share.
    if not hasattr(engine.dialect, _CHECK):
        setattr(engine.dialect, _CHECK, _Check(engine))


def note_commits(connection: Connection, work: Durable) -> None:
    """Note on `work` each commit of `connection`, until that is back in the pool."""
    check_commits(connection.engine)
    connection.info[_DURABLE] = work
    if _is_autocommit(connection):
        work.durable = True  # with each statement


def check_commits_of(session: AsyncSession) -> None:
    """Let each COMMIT of a session that came to nothing raise, whoever made the engine."""
    sync_session = session.sync_session
    engine = getattr(sync_session.bind, "engine", None)  # it may be bound to a connection
    if engine is not None:
        check_commits(engine)
    if engine is None or not takes_one_engine(sync_session):
        event.listen(sync_session, "after_begin", _check_connection)
    check_open_connections(session)


def check_open_connections(session: AsyncSession) -> None:
    """Do so for the connections that a session has now: a statement may name another engine."""
    for connection in connections_of(session):
        check_commits(connection.engine)


class _Check:
    """Commits the connections with one dialect."""

    def __init__(self, engine: Engine) -> None:
        self._dialect = engine.dialect
        self._do_commit = engine.dialect.do_commit
        replace_commit(engine.dialect, self._commit)
        event.listen(engine.pool, "checkin", _forget)
        event.listen(engine, "handle_error", _note_error)

    def _commit(self, connection: PoolProxiedConnection) -> None:
        info = getattr(connection, "info", {})
        error = info.pop(_ERROR, None)
        work: Durable | None = info.get(_DURABLE)
        was_durable, may_be_durable = work is None or work.durable, True
        if work is not None:
            work.durable = True
        try:
            self._ask_and_commit(connection, info.pop(_HAS_ENDED, False))
        except CommitWasRollbackError:
            may_be_durable = False
            raise PendingRollbackError(_CAME_TO_NOTHING) from error
        except Exception as commit_error:
            may_be_durable = not is_refused_commit(commit_error, self._dialect)
            raise
        finally:
            if work is not None:
                work.durable = was_durable or may_be_durable

    def _ask_and_commit(self, connection: PoolProxiedConnection, has_ended: bool) -> None:
        if has_ended:
            raise CommitWasRollbackError
        driver: Any = connection.driver_connection
        if self._dialect.driver == "asyncpg":
            let_commit_tell(driver)
        elif self._dialect.driver == "psycopg":
            if driver.info.transaction_status.name == "INERROR":
                raise CommitWasRollbackError
        elif self._dialect.driver == "aiosqlite":
            if not release_savepoint(connection):
                raise CommitWasRollbackError
            if not driver.in_transaction:
                return  # it was the whole of it
        self._do_commit(connection)


def _check_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    check_commits(connection.engine)


def _forget(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    for key in _ERROR, _HAS_ENDED, _DURABLE, HAS_SAVEPOINT:
        entry.info.pop(key, None)


def _note_error(context: ExceptionContext) -> None:
    connection, error = context.connection, context.original_exception
    if connection is None or context.is_disconnect or not isinstance(error, Exception):
        return
    # Of no weight for what the COMMIT comes to: it is named as the cause, and decides on a retry.
    connection.info[_ERROR] = error
    if _has_ended_transaction(connection.connection, error):
        connection.info[_HAS_ENDED] = True


def _has_ended_transaction(connection: PoolProxiedConnection, error: Exception) -> bool:
    """Return whether a statement that failed has ended its transaction, and others may follow.

    PostgreSQL lets none follow. MySQL, SQLite and their drivers begin another transaction.
    """
    driver: Any = connection.driver_connection
    sqlite_code = getattr(error, "sqlite_errorcode", 0)
    if sqlite_code & 0xFF > _SQLITE_ERROR:
        return not driver.in_transaction
    was_open = getattr(driver, "get_transaction_status", bool)  # asyncmy's and aiomysql's
    if not was_open():
        return False
    # An error says nothing of the transaction; the answer to a ping does.
    adapter: Any = connection.dbapi_connection
    adapter.run_async(lambda raw: raw.ping(reconnect=False))
    return not driver.get_transaction_status()


def _is_autocommit(connection: Connection) -> bool:
    # SQLAlchemy 2.0.41 has a method of the dialect for it.
    adapter: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite":
        return adapter.isolation_level is None
    if hasattr(adapter, "get_autocommit"):  # asyncmy's and aiomysql's
        return bool(adapter.get_autocommit())
    return getattr(adapter, "autocommit", False) is True


_SQLITE_ERROR = 1  # such as one of the syntax; https://www.sqlite.org/rescode.html

_CAME_TO_NOTHING = (
    "The COMMIT of this transaction came to nothing: the database has rolled it back, since a "
    "statement of it has failed. Run a statement that may fail in "
    "'async with session.begin_nested():', and do not go on after an error of another one."
)
