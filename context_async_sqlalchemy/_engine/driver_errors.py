"""What an error of the database means, by driver."""

import sys
import traceback
from collections.abc import Iterator
from enum import Enum

from sqlalchemy import Dialect
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    TimeoutError as PoolTimeoutError,
)

from context_async_sqlalchemy.exceptions import CommitOutcomeUnknownError


class TransientKind(Enum):
    """Why the same work may succeed if it is done again."""

    CONFLICT = "it lost against other work: serialization, a deadlock, a lock, a new schema"
    UNAVAILABLE = "the database could not be reached, or takes no connections now"


# https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATES = {
    "40001": TransientKind.CONFLICT,  # serialization_failure; CockroachDB and YugabyteDB use it too
    "40P01": TransientKind.CONFLICT,  # deadlock_detected
    "53300": TransientKind.UNAVAILABLE,  # too_many_connections
    "55P03": TransientKind.CONFLICT,  # lock_not_available
    "57P01": TransientKind.UNAVAILABLE,  # admin_shutdown
    "57P02": TransientKind.UNAVAILABLE,  # crash_shutdown
    "57P03": TransientKind.UNAVAILABLE,  # cannot_connect_now: starting up, or shutting down
    "08000": TransientKind.UNAVAILABLE,  # connection_exception
    "08001": TransientKind.UNAVAILABLE,  # sqlclient_unable_to_establish_sqlconnection
    "08003": TransientKind.UNAVAILABLE,  # connection_does_not_exist
    "08004": TransientKind.UNAVAILABLE,  # sqlserver_rejected_establishment_of_sqlconnection
    "08006": TransientKind.UNAVAILABLE,  # connection_failure
}
# https://dev.mysql.com/doc/mysql-errors/8.4/en/
_MYSQL_NUMBERS = {
    1040: TransientKind.UNAVAILABLE,  # too many connections
    1205: TransientKind.CONFLICT,  # lock wait timeout
    1213: TransientKind.CONFLICT,  # deadlock
    2002: TransientKind.UNAVAILABLE,  # a server that cannot be reached
    2003: TransientKind.UNAVAILABLE,
}
# The server has rolled back what took, or was idle for, too long, and has closed its connection.
_TIMED_OUT = {"25P03", "25P04"}  # idle_in_transaction_session_timeout, transaction_timeout
_SQLITE_BUSY = 5  # https://www.sqlite.org/rescode.html; the low byte of its extended codes


def is_transient_error(exc: BaseException) -> bool:
    """Return whether the same work may succeed if it is done again.

    True for a serialization failure, a deadlock, a lock that was not available, a connection that
    was lost or refused, a server that starts up, shuts down or has too many connections, a prepared
    statement that a change of the schema has made invalid, a busy SQLite database, and for MySQL's
    errors of these kinds. Decided by the SQLSTATE, the error
    number and what SQLAlchemy knows, of `exc`, its `__cause__`, and the members of an exception
    group. (psycopg has no SQLSTATE for a connection that was refused, whatever the reason.)

    Always False if a constraint was violated, if PostgreSQL says that the transaction took or was
    idle for too long, or if the outcome of a COMMIT is unknown.

    Args:
        exc: What was raised.
    """
    return transient_kind(exc) is not None


def transient_kind(exc: BaseException) -> TransientKind | None:
    """Return why `is_transient_error` says that the same work may succeed; None if it does not."""
    kinds = [kind for kind in map(_kind_of, _related(exc)) if kind is not None]
    return kinds[0] if kinds and not _forbids_repetition(exc) else None


def is_connect_timeout(exc: BaseException) -> bool:
    """Return whether there was no connection in time, from the server or from the pool.

    This is not transient: who has waited that long should not wait again. (The `TimeoutError` of a
    statement does not count: the server may still be busy with it.)
    """
    if isinstance(exc, PoolTimeoutError):
        return True
    return isinstance(exc, TimeoutError) and _comes_through(exc, "sqlalchemy.pool.")


def is_outcome_unknown(error: DBAPIError) -> bool:
    """Return whether `error` tells of a connection that was lost, perhaps during COMMIT."""
    if error.statement is not None or isinstance(error, InterfaceError):
        # A statement of the flush failed; or the driver saw that the connection was closed
        # already, and sent nothing.
        return False
    if _timed_out(error.orig) or _sent_nothing(error.orig):
        return False
    # The server may say so before the driver notices the end of the connection.
    return error.connection_invalidated or says_connection_is_lost(error.orig)


def says_connection_is_lost(error: BaseException | None) -> bool:
    """Return whether a driver's error says, by its SQLSTATE, that its connection is lost."""
    # Class 08 is a connection exception; 57P01 and 57P02 are shutdowns.
    sqlstate = getattr(error, "sqlstate", None) or ""
    return sqlstate.startswith(("08", "57P01", "57P02"))


def was_canceled(exc: BaseException) -> bool:
    """Return whether PostgreSQL ended a statement: it took too long, or somebody asked for it."""
    errors = (getattr(related, "orig", related) for related in _related(exc))
    return any(getattr(error, "sqlstate", None) == "57014" for error in errors)


def is_refused_commit(error: Exception, dialect: Dialect) -> bool:
    """Return whether a COMMIT that failed with a driver's error has certainly not taken place."""
    # SQLAlchemy's adapter of aiosqlite has no such class.
    if isinstance(error, getattr(dialect.loaded_dbapi, "InterfaceError", ())):
        return True  # the driver saw that the connection was closed already, and sent nothing
    if hasattr(error, "sqlite_errorcode") or _timed_out(error) or _sent_nothing(error):
        return True
    if _kind_of_mysql_number(error) is TransientKind.CONFLICT:
        return True  # as a cluster of MariaDB does
    # If it has a severity, PostgreSQL has sent it: asyncpg, whose errors SQLAlchemy wraps, gives an
    # SQLSTATE to values that it refuses to send, too. psycopg keeps the severity in `diag`.
    sent = error.__cause__ or error
    severity = getattr(getattr(sent, "diag", sent), "severity", None)
    return severity is not None and not says_connection_is_lost(error)


def classes_of_errors() -> list[type[Exception]]:
    """Return the classes of what a request may raise because of its database.

    SQLAlchemy does not wrap every error that drivers raise while they connect. If the application
    swallows an error of a transaction and goes on, its COMMIT raises `PendingRollbackError`.
    """
    classes: list[type[Exception]] = [DBAPIError, PendingRollbackError, PoolTimeoutError, OSError]
    try:
        import asyncpg
    except ImportError:
        return classes
    return [*classes, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError]


def _forbids_repetition(exc: BaseException) -> bool:
    # With what was being handled, too: code that fails while it looks whether the work was done
    # still does not know.
    return any(
        isinstance(error, CommitOutcomeUnknownError)
        or (isinstance(error, DBAPIError) and is_outcome_unknown(error))
        for error in _related(exc, with_context=True)
    ) or any(isinstance(error, IntegrityError) for error in _related(exc))


def _related(exc: BaseException, with_context: bool = False) -> Iterator[BaseException]:
    """Yield `exc`, the members of a group, their causes, and with `with_context` their contexts."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exc]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            waiting += error.exceptions
        if with_context:
            waiting.append(error.__context__)
        if not isinstance(error, DBAPIError):  # which knows more than the error of its driver
            waiting.append(error.__cause__)


def _sent_nothing(error: BaseException | None) -> bool:
    # asyncpg, whose connection was terminated and has not ended yet.
    return type(error).__name__ == "InternalClientError" and "cannot switch" in str(error)


def _timed_out(error: BaseException | None) -> bool:
    # asyncpg tells of a connection that was lost, with the server's error as the cause. If it had
    # been idle, it does not know why it was closed.
    return error is not None and any(
        getattr(related, "sqlstate", None) in _TIMED_OUT for related in _related(error)
    )


def _kind_of(error: BaseException) -> TransientKind | None:
    if _timed_out(error.orig if isinstance(error, DBAPIError) else error):
        return None  # it would take as long again
    if not isinstance(error, DBAPIError):
        # SQLAlchemy does not wrap all that a driver raises while it connects.
        kind = _kind_of_code(error)
        is_lost = _is_refused_connection(error) or _is_asyncpg_without_connection(error)
    elif is_outcome_unknown(error):
        return None
    else:
        kind = _kind_of_code(error.orig) or _kind_of_mysql_number(error.orig)
        is_lost = error.connection_invalidated or _is_psycopg_without_connection(error)
    return TransientKind.UNAVAILABLE if kind is None and is_lost else kind


def _is_refused_connection(error: BaseException) -> bool:
    # asyncio raises a plain OSError for a name with several addresses, and for "no route to host".
    if not (isinstance(error, ConnectionError) or type(error) is OSError):
        return False
    # Another service that hangs up has an error of the same type, and is none of our business.
    return error.__traceback__ is None or _comes_through(error, "sqlalchemy.")


def _comes_through(error: BaseException, package: str) -> bool:
    modules = (f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__))
    return any(module.startswith(package) for module in modules)


def _kind_of_code(error: BaseException | None) -> TransientKind | None:
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    if isinstance(sqlite_code, int) and sqlite_code & 0xFF == _SQLITE_BUSY:
        return TransientKind.CONFLICT
    sqlstate = getattr(error, "sqlstate", None)
    # A statement that was prepared before the schema has changed; the driver prepares it anew.
    if type(error).__name__ == "InvalidCachedStatementError" or (
        sqlstate == "0A000" and "cached plan must not change result type" in str(error)
    ):
        return TransientKind.CONFLICT
    return _SQLSTATES.get(sqlstate) if isinstance(sqlstate, str) else None


def _kind_of_mysql_number(error: BaseException | None) -> TransientKind | None:
    number = next(iter(getattr(error, "args", ())), None)
    return _MYSQL_NUMBERS.get(number) if isinstance(number, int) else None


def _is_asyncpg_without_connection(error: BaseException) -> bool:
    # Lost while it is set up; or used after the server has ended it, before asyncpg has noticed.
    asyncpg = sys.modules.get("asyncpg")
    if asyncpg is None or isinstance(error, ValueError):  # a ValueError of asyncpg's: a bad option
        return False
    return isinstance(error, (asyncpg.InterfaceError, asyncpg.InternalClientError))


def _is_psycopg_without_connection(error: DBAPIError) -> bool:
    is_psycopg = getattr(error.orig, "sqlstate", "") is None  # when it gets no connection
    return is_psycopg and isinstance(error, OperationalError) and error.statement is None
