"""SQLite's transactions, made whole: their beginning, their end, and foreign keys."""

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from context_async_sqlalchemy._engine.border import sync_engine_of

_HAS_SAVEPOINT = "context_async_sqlalchemy.has_savepoint"
_SAVEPOINT = "context_async_sqlalchemy"


def prepare_sqlite(engine: Engine) -> None:
    """Let the transactions of an engine hold all their statements; enforce its foreign keys."""
    event.listen(engine, "connect", _enforce_foreign_keys)
    event.listen(engine, "begin", begin)
    event.listen(engine, "checkin", _forget)


def begin(connection: Connection) -> None:
    """Begin a transaction with a savepoint, which is there as long as the transaction is."""
    # The driver would begin only before INSERT, UPDATE or DELETE: neither a savepoint nor DDL
    # before it would be part of the transaction. SQLAlchemy's page also tells to set this attribute
    # to None, but that means AUTOCOMMIT to SQLAlchemy; having begun already, the driver does not.
    fairy = connection.connection
    driver: Any = fairy.dbapi_connection
    level = driver.isolation_level
    fairy.info[_HAS_SAVEPOINT] = level is not None
    if level is not None:
        if level.upper() not in ("", "DEFERRED"):
            connection.exec_driver_sql(f"BEGIN {level}")
        # Outside of a transaction it is the same as BEGIN DEFERRED.
        # https://www.sqlite.org/lang_savepoint.html
        connection.exec_driver_sql(f"SAVEPOINT {_SAVEPOINT}")


def release_savepoint(connection: PoolProxiedConnection) -> bool:
    """Release the savepoint with which a transaction has begun, if so; return whether it is there.

    If it began the transaction, that is a COMMIT. SQLite ends a transaction without being asked,
    as in INSERT OR ROLLBACK, in a trigger, or if the disk is full; the driver then begins another
    one before the next write.
    """
    if not connection.info.pop(_HAS_SAVEPOINT, False):
        return True
    driver: Any = connection.dbapi_connection
    try:
        driver.run_async(lambda raw: raw.execute(f"RELEASE {_SAVEPOINT}"))
    except driver.dbapi.OperationalError as error:
        if "no such savepoint" not in str(error):
            raise
        return False
    return True


def check_foreign_keys_at_commit(engine: AsyncEngine) -> None:
    """Let an engine that enforces its foreign keys on SQLite look at them at each COMMIT only.

    To alter a table, a migration drops it, which deletes, or changes, what refers to it. This can
    be turned off outside a transaction only: https://www.sqlite.org/lang_altertable.html
    """
    sync_engine = sync_engine_of(engine)
    if event.contains(sync_engine, "connect", _enforce_foreign_keys):
        event.remove(sync_engine, "connect", _enforce_foreign_keys)
        event.listen(sync_engine, "commit", _check_foreign_keys)


def _enforce_foreign_keys(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _forget(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    entry.info.pop(_HAS_SAVEPOINT, None)


def _check_foreign_keys(connection: Connection) -> None:
    row = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    if row is None:
        return
    table, rowid, parent, _ = row
    error = connection.dialect.loaded_dbapi.IntegrityError(
        f"FOREIGN KEY constraint failed: row {rowid} of {table!r} refers to no row of {parent!r}"
    )
    raise IntegrityError("PRAGMA foreign_key_check", None, error)
