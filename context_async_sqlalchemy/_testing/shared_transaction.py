"""One transaction for every connection taken from an engine, rolled back at the end."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, NullPool, Pool, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine

from context_async_sqlalchemy._engine import sqlite
from context_async_sqlalchemy._engine.private_names import replace_pool
from context_async_sqlalchemy._engine.read_only import READ_ONLY
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._testing.lent_connection import LentConnection
from context_async_sqlalchemy._testing.no_commit import ENDED, refuse_end
from context_async_sqlalchemy._testing.only_shared import connection_of_test
from context_async_sqlalchemy._testing.shared_connection import SharedConnection


@asynccontextmanager
async def share_connection(engine: AsyncEngine, timeout: float) -> AsyncGenerator[SharedConnection]:  # noqa: ASYNC109
    """Make every connection taken from `engine` a part of one, rolled back at the end.

    Each waits for its turn for up to `timeout` seconds.
    """
    sync_engine = engine.sync_engine
    if sync_engine.pool in _pools:
        raise RuntimeError(
            "a test's transaction is open already on this engine, which another connect has, too: "
            "one is enough for both"
        )
    if sync_engine.dialect.name not in ("postgresql", "sqlite"):
        raise NotImplementedError(
            "a test's transaction is for PostgreSQL and SQLite: no other database can be kept from "
            "a COMMIT by the driver, and MySQL commits with each CREATE TABLE"
        )
    async with connection_of_test(engine) as connection:
        shared = SharedConnection(connection, timeout)
        await shared.begin()
        pool = sync_engine.pool
        creator: Any = shared.lend  # returns all that SQLAlchemy needs of a DBAPIConnection
        replace_pool(sync_engine, NullPool(creator, dialect=sync_engine.dialect))
        _pools.add(sync_engine.pool)
        event.listen(sync_engine, "begin_twophase", _refuse_two_phases)
        event.listen(sync_engine, "before_cursor_execute", _see_statement, retval=True)
        event.listen(sync_engine, "after_cursor_execute", _end_statement)
        event.listen(sync_engine, "handle_error", _end_failed_statement)
        has_savepoint = event.contains(sync_engine, "begin", sqlite.begin)
        if has_savepoint:
            event.remove(sync_engine, "begin", sqlite.begin)
        try:
            yield shared
        finally:
            replace_pool(sync_engine, pool)
            event.remove(sync_engine, "begin_twophase", _refuse_two_phases)
            event.remove(sync_engine, "before_cursor_execute", _see_statement)
            event.remove(sync_engine, "after_cursor_execute", _end_statement)
            event.remove(sync_engine, "handle_error", _end_failed_statement)
            if has_savepoint:
                event.listen(sync_engine, "begin", sqlite.begin)
            await run_to_completion(shared.end())
        if shared.has_ended_early:
            raise RuntimeError(ENDED)


def _refuse_two_phases(*_: Any) -> None:
    raise InvalidRequestError(
        "In a test's transaction there is no commit in two phases: PostgreSQL would store it."
    )


def _see_statement(
    connection: Connection, _: Any, statement: str, parameters: Any, *__: Any
) -> tuple[str, Any]:
    lent = connection.connection.dbapi_connection
    if not isinstance(lent, LentConnection):
        return statement, parameters
    refuse_end(statement)
    # SQLAlchemy's page on SQLite recommends setting the driver to AUTOCOMMIT and sending BEGIN
    # explicitly.
    if connection.dialect.name == "sqlite" and statement.upper().startswith("BEGIN"):
        lent.autocommit = connection.get_execution_options().get(READ_ONLY) is True
        return "SELECT 1", ()
    return statement, parameters


def _end_statement(
    connection: Connection, _: Any, __: Any, ___: Any, context: Any, ____: Any
) -> None:
    lent = connection.connection.dbapi_connection
    # The rows of a server-side cursor are still to come.
    if isinstance(lent, LentConnection) and not context.execution_options.get("stream_results"):
        lent.end_statement()


def _end_failed_statement(context: ExceptionContext) -> None:
    if context.connection is not None and not context.connection.invalidated:
        lent = context.connection.connection.dbapi_connection
        if isinstance(lent, LentConnection) and isinstance(context.original_exception, Exception):
            lent.end_statement()


# The pools that lend a connection.
_pools: WeakSet[Pool] = WeakSet()
