"""Guards on an engine's connections, against what drivers and SQLAlchemy let pass."""

from __future__ import annotations

import asyncio
from typing import Protocol

from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from context_async_sqlalchemy.shield import logger

_FAILED = "context_async_sqlalchemy.failed_transaction"
_GUARD = "_context_async_sqlalchemy_guard"
_DURABLE = "context_async_sqlalchemy.durable"


class Durable(Protocol):
    """Work that a COMMIT makes durable.

    Attributes:
        durable: Whether a part of it is durable, or may be.
    """

    durable: bool


def guard(engine: AsyncEngine) -> None:
    """Watch the connections of an engine from now on, until the caller calls `retire`."""
    sync_engine = getattr(engine, "sync_engine", None)
    if not isinstance(sync_engine, Engine):
        return  # users' tests pass mocks
    guard = _guard_of(engine)
    if guard is None:
        guard = _Guard(sync_engine)
        setattr(sync_engine.dialect, _GUARD, guard)
    guard.users += 1


async def retire(engine: AsyncEngine) -> None:
    """Close the connections of an engine: the idle ones now, the others as they come back.

    Nothing is closed while others use the engine, such as a connect whose creator returns it too.
    If the server is silent, this takes as long as the driver takes to terminate a connection.
    """
    guard = _guard_of(engine)
    if guard is None:
        await engine.dispose()
        return
    guard.users = max(guard.users - 1, 0)
    if guard.users == 0:
        # dispose() closes idle connections only. One that a session still holds would return to a
        # pool that is no longer used, and stay open there.
        await engine.dispose()
        await guard.finish_closing()


def _guard_of(engine: AsyncEngine) -> _Guard | None:
    # On the dialect, which the copies made by Engine.execution_options() share.
    dialect = getattr(getattr(engine, "sync_engine", None), "dialect", None)
    guard = getattr(dialect, _GUARD, None)
    return guard if isinstance(guard, _Guard) else None


def is_in_use(session: AsyncSession) -> bool:
    """Return whether a task is inside a statement of this session, or taking a connection for it.

    Ending the transaction then fails in asyncpg, and SQLAlchemy takes it for ended all the same: it
    returns the connection to the pool with the transaction still open.
    """
    transaction = _transaction_of(session)
    if transaction is None:
        return False
    if transaction._current_fn is not None:
        return True
    for connection in _open_connections(transaction):
        # SQLAlchemy's adapters have this lock for drivers that do not queue statements themselves.
        lock = getattr(connection.connection.dbapi_connection, "_execute_mutex", None)
        if lock is not None and lock.locked():
            return True
    return False


def note_commits(connection: Connection, work: Durable) -> None:
    """Note on `work` each commit of `connection`, until that is back in the pool."""
    connection.info[_DURABLE] = work


def connections_of(session: AsyncSession) -> list[Connection]:
    """Return the open connections of this session's transaction."""
    transaction = _transaction_of(session)
    return _open_connections(transaction) if transaction is not None else []


def says_connection_is_lost(error: BaseException | None) -> bool:
    """Return whether a driver's error says, by its SQLSTATE, that its connection is lost."""
    # Class 08 is a connection exception; 57P01 and 57P02 are shutdowns.
    sqlstate = getattr(error, "sqlstate", None) or ""
    return sqlstate.startswith(("08", "57P01", "57P02"))


def _open_connections(transaction: SessionTransaction) -> list[Connection]:
    # SQLAlchemy 2.0 has no public name for this.
    connections = {connection for connection, *_ in transaction._connections.values()}
    return [c for c in connections if not (c.closed or c.invalidated)]


def _transaction_of(session: AsyncSession) -> SessionTransaction | None:
    sync_session = getattr(session, "sync_session", None)
    return sync_session.get_transaction() if isinstance(sync_session, Session) else None


class _Guard:
    """Watches the connections of one engine, and of its copies.

    Attributes:
        users: How many use the engine. With none left, a connection that comes back is closed.
    """

    def __init__(self, engine: Engine) -> None:
        self.users = 0
        self._dialect = engine.dialect
        self._do_commit = engine.dialect.do_commit
        self._do_close = engine.dialect.do_close
        self._closing: set[asyncio.Task[None]] = set()
        engine.dialect.do_close = self._close  # type: ignore[assignment]
        event.listen(engine.pool, "checkin", self._on_checkin)
        # Not the event "commit": it would make every statement of the engine slower.
        engine.dialect.do_commit = self._check_and_commit  # type: ignore[assignment]
        if isinstance(engine.dialect, PGDialect):
            event.listen(engine, "handle_error", self._on_error)

    async def finish_closing(self) -> None:
        """Wait for the connections that are being closed."""
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, connection: DBAPIConnection) -> None:
        # A polite close may wait forever for a silent server. The connections of an engine that is
        # being retired are terminated instead, all at once.
        if self.users or not in_greenlet():
            self._do_close(connection)
            return
        task = asyncio.get_running_loop().create_task(self._terminate(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _terminate(self, connection: DBAPIConnection) -> None:
        close = self._dialect.do_terminate if self._dialect.has_terminate else self._do_close
        try:
            await greenlet_spawn(close, connection)
        except Exception:
            logger.warning("A connection failed to close", exc_info=True)

    def _on_checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        entry.info.pop(_FAILED, None)
        entry.info.pop(_DURABLE, None)
        # Drivers other than asyncpg have neither name.
        driver = entry.driver_connection
        is_in_transaction = getattr(driver, "is_in_transaction", bool)
        # asyncpg does not forget a transaction whose BEGIN has failed (SERIALIZABLE on a hot
        # standby): every later one on that connection would be a SAVEPOINT, and fail.
        if is_in_transaction() or getattr(driver, "_top_xact", None) is not None:
            entry.invalidate()
        elif not self.users:
            entry.close()

    def _on_error(self, context: ExceptionContext) -> None:
        connection, error = context.connection, context.original_exception
        if connection is None or context.is_disconnect or not _is_from_server(error):
            return
        if getattr(connection.connection.dbapi_connection, "autocommit", False):
            return
        known = connection.info.get(_FAILED)
        if known is None or not known[0].is_active:
            failed = connection.get_nested_transaction() or connection.get_transaction()
            connection.info[_FAILED] = failed, error

    def _check_and_commit(self, connection: PoolProxiedConnection) -> None:
        info = getattr(connection, "info", {})
        failed, error = info.get(_FAILED, (None, None))
        if failed is not None and failed.is_active:
            raise PendingRollbackError(
                "A statement of this transaction has failed, and PostgreSQL would answer its "
                "COMMIT with a ROLLBACK: nothing of it would be stored. Roll back; or run a "
                "statement that may fail in 'async with session.begin_nested():'."
            ) from error
        work: Durable | None = info.get(_DURABLE)
        if work is None or work.durable:
            self._do_commit(connection)
            return
        work.durable = True
        try:
            self._do_commit(connection)
        except Exception as commit_error:
            work.durable = not self._is_refused(commit_error)
            raise

    def _is_refused(self, error: Exception) -> bool:
        """Return whether a COMMIT that failed with `error` has certainly not taken place."""
        if isinstance(error, self._dialect.loaded_dbapi.InterfaceError):
            return True  # the driver saw that the connection was closed already, and sent nothing
        if type(error).__name__ == "InternalClientError" and "cannot switch" in str(error):
            return True  # the same for asyncpg, before the end of a connection that was terminated
        if hasattr(error, "sqlite_errorcode"):
            return True
        return _is_from_server(error) and not says_connection_is_lost(error)


def _is_from_server(error: BaseException) -> bool:
    # asyncpg, whose errors SQLAlchemy wraps, also gives an SQLSTATE to values that it refuses to
    # send. Only an error of the server has a severity; psycopg keeps it in `diag`.
    original = error.__cause__ or error
    return bool(
        getattr(original, "severity", None)
        or getattr(getattr(original, "diag", None), "severity", None)
    )
