"""What SQLAlchemy's page on SQLite tells to do, so that a transaction begins where it should."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event


def begin_explicitly(engine: Engine) -> Engine:
    """Let the transactions of an engine begin with BEGIN; return it."""
    # https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#serializable-isolation-savepoints-transactional-ddl
    event.listen(engine, "connect", _let_the_driver_begin_nothing)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _let_the_driver_begin_nothing(connection: Any, _: object) -> None:
    connection.isolation_level = None
