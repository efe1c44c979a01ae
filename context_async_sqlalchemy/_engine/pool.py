"""The connections of a pool: counted, pinged after they were idle, and closed in the end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Dialect, Engine, PoolProxiedConnection, QueuePool, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine import private_names
from context_async_sqlalchemy._engine.border import sync_engine_of
from context_async_sqlalchemy._engine.fair_pool import count_waiting
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.shield import keep

_IDLE = "_context_async_sqlalchemy_idle"
_RETURNED_AT = "context_async_sqlalchemy.returned_at"


@dataclass(frozen=True)
class PoolStatus:
    """The connections of a pool, counted.

    Attributes:
        size: The most idle connections that the pool keeps open.
        checked_in: The idle connections. Without `idle_timeout`, a place in the pool whose
            connection was invalidated counts as one.
        checked_out: The connections in use.
        overflow: The connections beyond `size`.
        capacity: The most connections at a time; None if there is no limit.
        waiting: How many wait for a connection, if `from_url` made the pool.
    """

    size: int = 0
    checked_in: int = 0
    checked_out: int = 0
    overflow: int = 0
    capacity: int | None = None
    waiting: int = 0


def pool_status(engine: AsyncEngine) -> PoolStatus:
    """Count the connections of `engine`, which is guarded."""
    sync_engine = sync_engine_of(engine)
    pool = sync_engine.pool
    if not isinstance(pool, QueuePool):  # NullPool and others do not count themselves
        count = _counts.get(sync_engine.dialect)
        return PoolStatus(checked_out=count.checked_out if count is not None else 0)
    size, limit = pool.size(), private_names.max_overflow(pool)
    idle = _idle_of(sync_engine)
    return PoolStatus(
        size=size,
        # The pool itself also counts slots whose connection was closed.
        checked_in=pool.checkedin() if idle is None else idle.count(),
        checked_out=pool.checkedout(),
        overflow=max(pool.overflow(), 0),
        capacity=None if size == 0 or limit < 0 else size + limit,
        waiting=count_waiting(pool),
    )


def count_connections(engine: Engine) -> None:
    """Count the connections in use from now on, if the pool does not."""
    if not isinstance(engine.pool, QueuePool):
        _counts[engine.dialect] = _Count(engine)


async def open_connections(engine: AsyncEngine, number: int) -> None:
    """Open `number` connections, or as many as the pool of `engine` keeps."""
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        return
    async with AsyncExitStack() as stack:
        for _ in range(min(number, pool.size() or number)):
            await stack.enter_async_context(engine.connect())


def close_idle_connections(engine: AsyncEngine, timeout: float, min_idle: int) -> None:
    """Close, from now on, the connections of `engine` that were idle for `timeout` seconds.

    The `min_idle` that were used last are kept all the same.
    """
    idle = _IdleConnections(engine.sync_engine, timeout, min_idle)
    setattr(engine.sync_engine, _IDLE, idle)


def ping_idle_connections(engine: Engine, after: float) -> None:
    """Ping a connection when it is taken from the pool after it was idle for `after` seconds.

    If it is dead, every connection of the pool that is as old is replaced, as SQLAlchemy's own
    `pool_pre_ping` does, which pings at every checkout and has to be off.
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
        # asyncpg notices that the server has hung up while the connection is in the pool, and says
        # so without a round trip. Other drivers notice it when they are used.
        is_closed = getattr(entry.driver_connection, "is_closed", bool)
        if is_closed() or (monotonic() - returned_at > after and not _answers(engine, connection)):
            raise InvalidatePoolError

    event.listen(engine, "checkin", note_time)
    event.listen(engine, "checkout", ping)


async def finish_idle(engine: AsyncEngine) -> None:
    """End `close_idle_connections`, with its timer and its tasks."""
    idle = _idle_of(sync_engine_of(engine))
    if idle is not None:
        await idle.finish()


def _idle_of(engine: Engine) -> _IdleConnections | None:
    # An attribute of the engine: in a dictionary with weak keys it would keep its own key alive.
    idle: _IdleConnections | None = getattr(engine, _IDLE, None)
    return idle


def _answers(engine: Engine, connection: DBAPIConnection) -> bool:
    if engine.dialect.driver != "asyncpg":
        return private_names.ping(engine.dialect, connection)
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


class _Count:
    def __init__(self, engine: Engine) -> None:
        self.checked_out = 0
        event.listen(engine, "checkout", self._on_checkout)
        event.listen(engine, "checkin", self._on_checkin)
        event.listen(engine, "detach", self._on_checkin)

    def _on_checkout(self, *_: object) -> None:
        self.checked_out += 1

    def _on_checkin(self, *_: object) -> None:
        self.checked_out -= 1


class _IdleConnections:
    """The idle connections of a pool and since when they are, the longest idle one first."""

    def __init__(self, engine: Engine, timeout: float, min_idle: int) -> None:
        self._dialect = engine.dialect
        self._timeout = timeout
        self._min_idle = min_idle
        self._since: dict[ConnectionPoolEntry, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._is_finished = False
        event.listen(engine, "checkout", self._on_checkout)
        event.listen(engine, "checkin", self._on_checkin)

    def count(self) -> int:
        return sum(entry.dbapi_connection is not None for entry in self._since)

    async def finish(self) -> None:
        self._is_finished = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._since.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    def _on_checkout(
        self, _: DBAPIConnection, entry: ConnectionPoolEntry, __: PoolProxiedConnection
    ) -> None:
        self._since.pop(entry, None)

    def _on_checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        if self._is_finished:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # the garbage collector returns what a loop has left behind
            return
        self._since[entry] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout, self._close_expired, loop)

    def _close_expired(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        # The pool has since closed what was invalid, and what it had no room for.
        self._since = {e: t for e, t in self._since.items() if e.dbapi_connection is not None}
        spare = len(self._since) - self._min_idle
        for entry, since in list(islice(self._since.items(), max(spare, 0))):
            remaining = since + self._timeout - loop.time()
            if remaining > 0:
                self._timer = loop.call_later(remaining, self._close_expired, loop)
                break
            del self._since[entry]
            connection = private_names.take_out(entry)
            assert connection is not None
            keep(loop.create_task(self._close(connection)), self._closing)

    async def _close(self, connection: DBAPIConnection) -> None:
        try:
            await private_names.greenlet_spawn(self._dialect.do_terminate, connection)
        except Exception:
            logger.warning("An idle connection failed to close", exc_info=True)


# By dialect, which the copies made by Engine.execution_options() share, as they share the pool.
_counts: WeakKeyDictionary[Dialect, _Count] = WeakKeyDictionary()
