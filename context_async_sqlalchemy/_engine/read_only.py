"""Sessions that only read: on a copy of their engine, which refuses what may do more."""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import Connection, Engine, StaticPool, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

from context_async_sqlalchemy._engine.border import real_session, sync_engine_of
from context_async_sqlalchemy._engine.commits import check_commits
from context_async_sqlalchemy._engine.discard import invalidate
from context_async_sqlalchemy._engine.private_names import (
    CheckedConnection,
    await_only,
    takes_one_engine,
)
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._engine.transaction_settings import has_transaction_settings
from context_async_sqlalchemy._engine.url import is_in_memory

Mode: TypeAlias = Literal[True, "snapshot"]

READ_ONLY = "context_async_sqlalchemy.read_only"
"""In the `info` of a session that only reads, and in the options of its connections: its mode."""

TRANSACTIONS: Final = "transactions"
"""A mode of connections only: READ ONLY transactions, in which PostgreSQL refuses what writes."""

INSTEAD = "context_async_sqlalchemy.instead"
"""In the options of connections on which only reading makes sense: what to do instead."""

SNAPSHOT = "context_async_sqlalchemy.snapshot"
"""In the options of a connection: the exported snapshot that its transaction is to see."""

_COPIES = "_context_async_sqlalchemy_read_only"
_RESTORE = "_context_async_sqlalchemy_restore"


def is_read_only(session: AsyncSession) -> bool:
    """Return whether a session only reads, so that its commit makes nothing durable."""
    return READ_ONLY in session.info


def has_one_connection(engine: AsyncEngine) -> bool:
    """Return whether all sessions of an engine are on one connection, or nobody knows: a mock."""
    sync_engine = sync_engine_of(engine)
    in_memory = sync_engine.dialect.name == "sqlite" and is_in_memory(sync_engine.url)
    return in_memory or isinstance(sync_engine.pool, StaticPool)


def reading_engine(session: AsyncSession, connect: object, mode: Mode) -> AsyncEngine | None:
    """Return what a session that `connect` has made takes instead of its engine, to only read.

    None if the session is of a test.
    """
    engine = getattr(session, "bind", None)
    if real_session(session) is not session or isinstance(engine, AsyncConnection):
        return None
    if (
        not isinstance(engine, AsyncEngine)
        or session.sync_session.bind is not engine.sync_engine
        or not takes_one_engine(session.sync_session)
    ):
        raise InvalidRequestError(
            f"read_only needs sessions with one engine, and those of {connect!r} have 'binds', or "
            "a class that overrides get_bind(): make a DBConnect of its own for each engine, or "
            "ask with read_only=False"
        )
    if mode is True and has_transaction_settings(engine):
        raise InvalidRequestError(
            f"{connect!r} begins each transaction with transaction_settings, and a session with "
            "read_only=True has no transaction, so that a tenant, for one, would not be set: ask "
            "with read_only='snapshot', or read_only=False"
        )
    return copy_of(engine, mode)


def takes_what_it_is_given(session: AsyncSession) -> bool:
    """Return whether every session of these classes has the engine that it is made with."""
    # One that chooses for itself may be another tenant's each time.
    given, sync_given = type(session).__init__, type(session.sync_session).__init__
    return given is AsyncSession.__init__ and sync_given is Session.__init__


def copy_of(engine: AsyncEngine, mode: Mode | Literal["transactions"]) -> AsyncEngine:
    """Return a copy of an engine that only reads; it shares the pool, dialect, and listeners."""
    copies: dict[object, AsyncEngine] = vars(engine.sync_engine).setdefault(_COPIES, {})
    if mode not in copies:
        if mode == "snapshot" and engine.dialect.name != "postgresql":
            raise InvalidRequestError(
                "read_only='snapshot', and so same_snapshot(), is for PostgreSQL, not "
                f"{engine.dialect.name}: SQLAlchemy cannot begin a REPEATABLE READ, READ ONLY "
                "transaction there. Ask with read_only=False; for queries at the same time, use "
                "run_in_new_ctx()."
            )
        check_commits(engine.sync_engine)  # not first of a copy: the engine would not be heard
        if not copies:
            event.listen(engine.sync_engine, "reset", _restore)
        copies[mode] = copy = engine.execution_options(**{READ_ONLY: mode})
        _connect_by(copy.sync_engine, _CLASSES[mode])
    return copies[mode]


def _prepare(connection: Connection) -> None:
    # With isolation_level among the options of the copy, SQLAlchemy would not notice that setting
    # it, or setting it back, was cancelled: the connection would not come home. With SQLite, it
    # would not be set back to what it was.
    fairy = connection.connection
    try:
        fairy.info[_RESTORE] = _set(connection.dialect, fairy.dbapi_connection, connection)
    except BaseException:
        await_only(run_to_completion(invalidate(connection)))
        raise


def _set(dialect: Any, driver: Any, connection: Connection) -> Callable[[], None]:
    """Set what a transaction on a connection of the driver is; return what sets it back."""
    if dialect.name == "sqlite":
        level, driver.isolation_level = driver.isolation_level, None
        return partial(setattr, driver, "isolation_level", level)
    mode = connection.get_execution_options()[READ_ONLY]
    if mode != TRANSACTIONS:
        level = "AUTOCOMMIT" if mode is True else "REPEATABLE READ"
        dialect.set_isolation_level(driver, level)
    if mode is not True:
        dialect.set_readonly(driver, True)

    def restore() -> None:
        if mode != TRANSACTIONS:
            dialect.reset_isolation_level(driver)
        if mode is not True:
            dialect.set_readonly(driver, None)  # False is READ WRITE to psycopg, also on a standby

    return restore


def _restore(_: DBAPIConnection, entry: ConnectionPoolEntry, state: PoolResetState) -> None:
    restore: Callable[[], None] | None = entry.info.pop(_RESTORE, None)
    if restore is not None and state.asyncio_safe:  # or else it is closed
        restore()


def _connect_by(engine: Engine, cls: type[Connection]) -> Engine:
    """Let an engine, and the copies that are made of it, have connections of a class."""
    copy = engine.execution_options

    def copy_again(**options: Any) -> Engine:
        return _connect_by(copy(**options), cls)

    vars(engine).update(connect=partial(cls, engine), execution_options=copy_again)
    return engine


class _InTransaction(CheckedConnection):
    """A connection whose transactions are READ ONLY."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _prepare(self)


class _InSnapshot(_InTransaction):
    """A connection whose transaction reads one snapshot."""

    def execution_options(self, **options: Any) -> Connection:
        if SNAPSHOT in options:
            _set_snapshot(self, options[SNAPSHOT])
        return super().execution_options(**options)

    def check(self, context: Any) -> None:
        if (refusal := self.refusal(context)) is not None:
            context.cursor.close()  # or psycopg warns of that of a stream
            raise InvalidRequestError(refusal)

    def refusal(self, context: Any) -> str | None:
        if _reads(context.statement):
            return None
        instead = self.get_execution_options().get(INSTEAD, _ANOTHER_SESSION)
        return (
            "This session is read-only, and a statement may do more than read: "
            f"{context.statement[:200]}\n{instead}"
        )


class _InAutocommit(_InSnapshot):
    """A connection without transactions."""

    def refusal(self, context: Any) -> str | None:
        # PostgreSQL has cursors in a transaction only.
        is_stream = context.execution_options.get("stream_results", False)
        if is_stream and self.dialect.name == "postgresql":
            return _NEEDS_TRANSACTION.format("session.stream() or yield_per")
        if context.statement.startswith("SAVEPOINT"):
            return _NEEDS_TRANSACTION.format("begin_nested()")
        return super().refusal(context)


_CLASSES: dict[object, type[Connection]] = {
    True: _InAutocommit,
    "snapshot": _InSnapshot,
    TRANSACTIONS: _InTransaction,
}


def _set_snapshot(connection: Connection, snapshot: str) -> None:
    # Not a statement of SQLAlchemy's: before its "begin", where listeners, such as that of
    # transaction_settings, have queries. After one it is too late.
    # https://www.postgresql.org/docs/current/sql-set-transaction.html
    statement = f"SET TRANSACTION SNAPSHOT '{snapshot}'"
    driver = connection.dialect.loaded_dbapi
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
    except driver.Error as error:
        raise DBAPIError.instance(statement, None, error, driver.Error) from error
    finally:
        cursor.close()


@lru_cache(maxsize=256)
def _reads(statement: str) -> bool:
    sql = _NO_SQL.sub(" ", statement)
    return bool(_READS.match(sql)) and not _WRITES_OR_LOCKS.search(sql)


_ANOTHER_SESSION = (
    "Use 'await db_session(connect, read_only=False)', which is another session, or take the "
    "method of this request out of read_only_methods."
)

_NEEDS_TRANSACTION = (
    "A session with read_only=True has no transaction, and {} needs one: ask with "
    "'await db_session(connect, read_only=\"snapshot\")', or read_only=False."
)

# Literals, names in quotes, and comments.
_NO_SQL = re.compile(
    r"""'[^']*'|"[^"]*"|`[^`]*`|\$(|[a-z_]\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/""",
    re.IGNORECASE | re.DOTALL,
)
_READS = re.compile(
    r"[\s(]*(?:EXPLAIN(?:\s+(?:ANALYZE|VERBOSE|QUERY\s+PLAN)\b|\s*\([^)]*\))*)?[\s(]*"
    r"(?:SELECT|WITH|VALUES|TABLE|SHOW|DESCRIBE|PRAGMA(?!.*=)|BEGIN|SAVEPOINT|RELEASE"
    r"|ROLLBACK\s+TO)\b",
    re.IGNORECASE | re.DOTALL,
)
# SELECT INTO; what writes in a common table expression, or after one; a lock that AUTOCOMMIT would
# let go of at once; a second statement.
_WRITES_OR_LOCKS = re.compile(
    r"\bINTO\b"
    r"|\bAS\s*(?:(?:NOT\s+)?MATERIALIZED\s*)?\(\s*(?:INSERT|UPDATE|DELETE|MERGE)\b"
    r"|\)\s*(?:INSERT|UPDATE|DELETE|MERGE)\b"
    r"|\bFOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|SHARE|KEY\s+SHARE)\b|\bLOCK\s+IN\s+SHARE\b"
    r"|;\s*\S",
    re.IGNORECASE,
)
