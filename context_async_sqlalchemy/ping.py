"""Ping only what was idle: no round trip for a connection that was alive a moment ago."""

from __future__ import annotations

from time import monotonic
from typing import Any

from sqlalchemy import Engine, PoolProxiedConnection, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry

_RETURNED_AT = "context_async_sqlalchemy.returned_at"


def ping_idle_connections(engine: Engine, after: float) -> None:
    """Ping a connection of `engine` when it is taken from the pool after it was idle for long.

    If it is dead, every connection of the pool that is as old is replaced, as SQLAlchemy's own
    `pool_pre_ping` does, which pings at every checkout and has to be off.

    Args:
        engine: The engine.
        after: How long a connection is idle before it is pinged, in seconds.
    """

    def note_time(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        entry.info[_RETURNED_AT] = monotonic()

    def ping(
        connection: DBAPIConnection, entry: ConnectionPoolEntry, _: PoolProxiedConnection
    ) -> None:
        # The pool clears `info` when it opens a connection: a new one has no time.
        returned_at = entry.info.get(_RETURNED_AT)
        if returned_at is None:
            return
        if _is_closed(entry) or (
            monotonic() - returned_at > after and not _answers(engine, connection)
        ):
            raise InvalidatePoolError

    event.listen(engine, "checkin", note_time)
    event.listen(engine, "checkout", ping)


def _is_closed(entry: ConnectionPoolEntry) -> bool:
    # asyncpg notices that the server has hung up while the connection is in the pool, and says so
    # without a round trip. Other drivers notice it when they are used.
    is_closed: bool = getattr(entry.driver_connection, "is_closed", bool)()
    return is_closed


def _answers(engine: Engine, connection: DBAPIConnection) -> bool:
    if engine.dialect.driver != "asyncpg":
        return engine.dialect._do_ping_w_event(connection)  # what the pool itself calls
    # SQLAlchemy's ping is four round trips here, the last one a ROLLBACK: a task that is cancelled
    # because the server is silent would wait for its answer forever.
    try:
        connection.run_async(_ping_asyncpg)
    except Exception:
        return False
    return True


async def _ping_asyncpg(driver: Any) -> None:
    try:
        await driver.execute("SELECT 1")
    except BaseException:
        # The pool would close it politely, and wait for the server again: for 2 seconds, and with
        # asyncpg 0.30 for more than 20.
        driver.terminate()
        raise
