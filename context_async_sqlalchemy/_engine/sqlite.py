"""What SQLite needs: transactions that begin with their first statement, and its foreign keys."""

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine.border import sync_engine_of


def prepare_sqlite(engine: Engine) -> None:
    """Let the transactions of an engine hold all their statements; enforce its foreign keys."""
    event.listen(engine, "connect", _enforce_foreign_keys)
    event.listen(engine, "begin", _begin)


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


def _begin(connection: Connection) -> None:
    # The driver would begin only before INSERT, UPDATE or DELETE: neither a savepoint nor DDL
    # before it would be part of the transaction. SQLAlchemy's page also tells to set this attribute
    # to None, but that means AUTOCOMMIT to SQLAlchemy; having begun already, the driver does not.
    driver: Any = connection.connection.dbapi_connection
    if driver.isolation_level is not None:
        connection.exec_driver_sql(f"BEGIN {driver.isolation_level}")


def _check_foreign_keys(connection: Connection) -> None:
    row = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    if row is None:
        return
    table, rowid, parent, _ = row
    error = connection.dialect.loaded_dbapi.IntegrityError(
        f"FOREIGN KEY constraint failed: row {rowid} of {table!r} refers to no row of {parent!r}"
    )
    raise IntegrityError("PRAGMA foreign_key_check", None, error)
