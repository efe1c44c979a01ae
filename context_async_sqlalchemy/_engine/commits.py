"""What a COMMIT comes to, as the server or its driver says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from sqlalchemy import Connection, Engine, Transaction, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from context_async_sqlalchemy._engine.cancel_at_server import cancel_at_server
from context_async_sqlalchemy._engine.discard import note_discarded
from context_async_sqlalchemy._engine.driver_errors import is_refused_commit
from context_async_sqlalchemy._engine.private_names import (
    CommitWasRollbackError,
    has_failed_to_begin,
    let_commit_tell,
    replace_of_dialect,
    takes_one_engine,
)
from context_async_sqlalchemy._engine.sqlite import release_savepoint

_CHECK = "_context_async_sqlalchemy_commits"
_NOTED = "context_async_sqlalchemy.noted"


class Durable(Protocol):
    """Work of which a part is durable, or may be."""

    durable: bool


def check_commits(engine: Engine) -> None:
    """Let each COMMIT of an engine that came to nothing raise, from now on."""
    # On the dialect, which the copies made by Engine.execution_options() share.
    if not hasattr(engine.dialect, _CHECK):
        setattr(engine.dialect, _CHECK, _Check(engine))


def note_commits(connection: Connection, work: Durable) -> None:
    """Note on `work` the commit of the transaction of `connection`."""
    check_commits(connection.engine)
    _noted_of(connection).work = work
    if is_autocommit(connection):
        work.durable = True  # with each statement


def check_commits_of(session: AsyncSession) -> None:
    """Let each COMMIT of a session that came to nothing raise, whoever made the engine."""
    sync_session = session.sync_session
    engine = getattr(sync_session.bind, "engine", None)  # it may be bound to a connection
    if engine is not None:
        check_commits(engine)
    if engine is None or not takes_one_engine(sync_session):
        event.listen(sync_session, "after_begin", _check_connection)


def check_open_connections(connections: list[Connection]) -> None:
    """Do so for the connections that a session has now: a statement may name another engine."""
    for connection in connections:
        if not hasattr(connection.dialect, _CHECK):
            check_commits(connection.engine)


def has_one_commit(session: AsyncSession, connections: list[Connection]) -> bool:
    """Return whether a session with these connections sends one COMMIT, on its own engine."""
    if len(connections) > 1 or not takes_one_engine(session.sync_session):
        return False
    # Its flush opens that of its own engine, if a statement has named another one before.
    own = getattr(session.sync_session.bind, "engine", None)
    return not connections or connections[0].engine is own


@dataclass
class _Noted:
    """What is known of the transaction of a connection."""

    transaction: Transaction | None
    error: Exception | None = None  # the last one; named as the cause, and decides on a retry
    has_ended: bool = False
    work: Durable | None = None


class _Check:
    """Commits the connections with one dialect."""

    def __init__(self, engine: Engine) -> None:
        self._dialect = engine.dialect
        self._do_commit = engine.dialect.do_commit
        self._commit_and_ask = _COMMIT.get(engine.dialect.driver, _commit_unasked)
        replace_of_dialect(engine.dialect, "do_commit", self._commit)
        event.listen(engine, "checkin", _clean)
        cancel_at_server(engine)
        note_discarded(engine)
        event.listen(engine, "handle_error", _note_error)

    def _commit(self, connection: PoolProxiedConnection) -> None:
        noted: _Noted | None = connection.info.pop(_NOTED, None)
        work = noted.work if noted is not None else None
        if work is None or work.durable:
            self._ask_and_commit(connection, noted)
            return
        work.durable = True
        try:
            self._ask_and_commit(connection, noted)
        except PendingRollbackError:
            work.durable = False
            raise
        except Exception as error:
            work.durable = not is_refused_commit(error, self._dialect)
            raise

    def _ask_and_commit(self, connection: PoolProxiedConnection, noted: _Noted | None) -> None:
        if noted is not None and (noted.transaction is None or not noted.transaction.is_active):
            noted = None  # of another transaction
        try:
            if noted is not None and noted.has_ended:
                raise CommitWasRollbackError  # noqa: TRY301  # as the driver does
            self._commit_and_ask(connection, self._do_commit)
        except CommitWasRollbackError:
            self._dialect.do_rollback(connection)  # the driver may have begun another one
            cause = noted.error if noted is not None else None
            raise PendingRollbackError(_CAME_TO_NOTHING) from cause


_DoCommit: TypeAlias = Callable[[Any], None]


def _commit_asyncpg(connection: PoolProxiedConnection, do_commit: _DoCommit) -> None:
    let_commit_tell(connection.driver_connection)
    do_commit(connection)


def _commit_psycopg(connection: PoolProxiedConnection, do_commit: _DoCommit) -> None:
    driver: Any = connection.driver_connection
    if driver.pgconn.transaction_status == _IN_ERROR:
        raise CommitWasRollbackError
    do_commit(connection)


def _commit_aiosqlite(connection: PoolProxiedConnection, do_commit: _DoCommit) -> None:
    if not release_savepoint(connection):
        raise CommitWasRollbackError
    driver: Any = connection.driver_connection
    if driver.in_transaction:  # the savepoint was not the whole of it
        do_commit(connection)


def _commit_unasked(connection: PoolProxiedConnection, do_commit: _DoCommit) -> None:
    do_commit(connection)


_COMMIT = {"asyncpg": _commit_asyncpg, "psycopg": _commit_psycopg, "aiosqlite": _commit_aiosqlite}


def _check_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    check_commits(connection.engine)


def _clean(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    entry.info.pop(_NOTED, None)
    driver = entry.driver_connection
    is_closed = getattr(driver, "is_closed", bool)  # asyncpg's, which may close it by itself
    is_in_transaction = getattr(driver, "is_in_transaction", bool)
    if is_closed() or is_in_transaction() or has_failed_to_begin(driver):
        entry.invalidate()


def _note_error(context: ExceptionContext) -> None:
    connection, error = context.connection, context.sqlalchemy_exception
    if connection is None or context.is_disconnect or not isinstance(error, DBAPIError):
        return
    noted = _noted_of(connection)
    noted.error = error
    if not noted.has_ended and _has_ended_transaction(connection.connection, error.orig):
        noted.has_ended = True
        event.listen(connection, "before_cursor_execute", _refuse_statement)


def _refuse_statement(connection: Connection, *_: Any) -> None:
    # It would be another transaction, or be stored at once.
    noted = _noted_of(connection)
    if noted.has_ended:
        raise PendingRollbackError(_CAME_TO_NOTHING) from noted.error


def _noted_of(connection: Connection) -> _Noted:
    noted: _Noted | None = connection.info.get(_NOTED)
    transaction = connection.get_transaction()
    if noted is None or noted.transaction is not transaction:
        noted = connection.info[_NOTED] = _Noted(transaction)
    return noted


def _has_ended_transaction(connection: PoolProxiedConnection, error: BaseException | None) -> bool:
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


def is_autocommit(connection: Connection) -> bool:
    """Return whether each statement on a connection is a commit."""
    # SQLAlchemy 2.0.41 has a method of the dialect for it.
    adapter: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite":
        return adapter.isolation_level is None
    driver: Any = connection.connection.driver_connection
    if hasattr(driver, "get_autocommit"):  # asyncmy's and aiomysql's
        return bool(driver.get_autocommit())
    return getattr(adapter, "autocommit", False) is True


_IN_ERROR = 3  # https://www.postgresql.org/docs/current/libpq-status.html
_SQLITE_ERROR = 1  # such as one of the syntax; https://www.sqlite.org/rescode.html

_CAME_TO_NOTHING = (
    "The COMMIT of this transaction came to nothing: the database has rolled it back, since a "
    "statement of it has failed. Run a statement that may fail in "
    "'async with session.begin_nested():', and do not go on after an error of another one."
)
