"""How many rows a connection has written, for those who log at INFO."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.commits import is_autocommit
from context_async_sqlalchemy._engine.log import logger


def count_written(session: AsyncSession) -> None:
    """Count what the engine of `session` writes from now on, if anybody reads of it."""
    if logger.isEnabledFor(logging.INFO):
        # Nobody can be asked afterwards: PostgreSQL's pg_stat_xact_user_tables has the rows of the
        # transactions before this one, too, until the server has passed them on.
        engine = getattr(getattr(session, "bind", None), "sync_engine", None)
        if isinstance(engine, Engine) and not event.contains(
            engine, "after_cursor_execute", _count
        ):
            event.listen(engine, "after_cursor_execute", _count)


def rows_written(connection: Connection) -> int:
    """Return how many rows a connection has written that a rollback would undo."""
    rows = _rows.get(connection, 0)
    return 0 if rows and is_autocommit(connection) else rows


def _count(
    connection: Connection,
    cursor: DBAPICursor,
    _: str,
    parameters: Any,
    context: DefaultExecutionContext,
    executemany: bool,
) -> None:
    rows = cursor.rowcount
    if context.isinsert or context.isupdate or context.isdelete:
        if rows < 0:
            # asyncpg does not tell of an executemany(), nor SQLAlchemy 2.0's SQLite of a RETURNING.
            rows = len(parameters) if executemany and cursor.description is None else 1
    elif cursor.description is not None:  # a query, whose rows were read
        return
    if rows > 0:
        _rows[connection] = _rows.get(connection, 0) + rows


# A session takes another Connection for each transaction.
_rows: WeakKeyDictionary[Connection, int] = WeakKeyDictionary()
