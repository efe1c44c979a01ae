"""A statement that was cancelled ends at the server, too, though its connection is closed at once.

The drivers ask the server to cancel it, and wait. An anyio cancel scope, which a BaseHTTPMiddleware
has, cancels that again: the statement would go on until its end, with its locks. So it would in the
thread of SQLite.
"""

import asyncio
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine, PoolProxiedConnection, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import in_greenlet, take_cancellations
from context_async_sqlalchemy._engine.shield import keep


def cancel_at_server(engine: Engine) -> None:
    """Do so for the connections of an engine, if they are PostgreSQL's or SQLite's."""
    if engine.dialect.driver == "asyncpg":
        event.listen(engine, "invalidate", _go_on_cancelling)
    elif engine.dialect.driver == "psycopg":
        event.listen(engine, "checkout", _keep_address)
        event.listen(engine, "invalidate", _cancel)
    elif engine.dialect.driver == "aiosqlite":
        event.listen(engine, "invalidate", _interrupt)


def _go_on_cancelling(
    _: DBAPIConnection, entry: ConnectionPoolEntry, __: BaseException | None
) -> None:
    for task in take_cancellations(entry.driver_connection):
        keep(task, _cancelling)


def _keep_address(
    _: DBAPIConnection, entry: ConnectionPoolEntry, __: PoolProxiedConnection
) -> None:
    if _ADDRESS in entry.info:
        return
    from psycopg import capabilities  # the engine's driver, so it is there

    driver: Any = entry.driver_connection
    if capabilities.has_cancel_safe():  # libpq 17; the way before it holds up the whole process
        entry.info[_ADDRESS] = driver.pgconn.cancel_conn()


def _cancel(_: DBAPIConnection, entry: ConnectionPoolEntry, error: BaseException | None) -> None:
    # psycopg has closed the connection already, and nothing of it is left to ask.
    if isinstance(error, asyncio.CancelledError) and _ADDRESS in entry.info:
        keep(asyncio.create_task(_send(entry.info.pop(_ADDRESS))), _cancelling)


def _interrupt(_: DBAPIConnection, entry: ConnectionPoolEntry, __: BaseException | None) -> None:
    # Its thread would go on until the end. Nor does sqlite3 end the transaction of a connection
    # that is closed before the last cursor is collected as garbage.
    driver: Any = entry.driver_connection
    if not in_greenlet():  # the garbage collector calls
        return
    with suppress(ValueError, StopIteration):  # it is closed already; it has not waited
        for operation in driver.rollback, driver.interrupt:
            # Begun, and not waited for: in the queue of its thread, it is before the closing.
            begun: asyncio.Future[None] = operation().send(None)
            begun.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _send(request: Any) -> None:
    """Send a request to cancel; https://www.postgresql.org/docs/current/libpq-cancel.html."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_SECONDS):
            request.start()
            while (wait_for := _WAIT_FOR.get(request.poll())) is not None:
                ready, descriptor = asyncio.Event(), request.socket
                add, remove = (getattr(loop, f"{what}_{wait_for}") for what in ("add", "remove"))
                add(descriptor, ready.set)
                try:
                    await ready.wait()
                finally:
                    remove(descriptor)
    except Exception as error:
        logger.info("A statement could not be cancelled at the server: %s", type(error).__name__)
    finally:
        request.finish()


_WAIT_FOR = {1: "reader", 2: "writer"}  # PGRES_POLLING_READING, PGRES_POLLING_WRITING
_SECONDS = 5.0
_ADDRESS = "context_async_sqlalchemy.address"
_cancelling: set[asyncio.Task[None]] = set()
