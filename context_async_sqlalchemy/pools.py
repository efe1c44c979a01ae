"""The connections of a pool: counting them, and closing those that were idle for long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from weakref import WeakKeyDictionary

from sqlalchemy import Dialect, Engine, Pool, PoolProxiedConnection, QueuePool, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import greenlet_spawn

from context_async_sqlalchemy.shield import logger

_IDLE = "_context_async_sqlalchemy_idle"


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
    """

    size: int = 0
    checked_in: int = 0
    checked_out: int = 0
    overflow: int = 0
    capacity: int | None = None


def pool_status(engine: AsyncEngine) -> PoolStatus:
    """Count the connections of `engine`, for which `count_connections` was called before."""
    pool = getattr(engine, "pool", None)
    if not isinstance(pool, Pool):  # users' tests pass mocks
        return PoolStatus()
    if not isinstance(pool, QueuePool):  # NullPool and others do not count themselves
        count = _counts.get(engine.dialect)
        return PoolStatus(checked_out=count.checked_out if count is not None else 0)
    size, limit = pool.size(), pool._max_overflow
    idle = _idle_of(engine)
    return PoolStatus(
        size=size,
        # The pool itself also counts slots whose connection was closed.
        checked_in=pool.checkedin() if idle is None else idle.count(),
        checked_out=pool.checkedout(),
        overflow=max(pool.overflow(), 0),
        capacity=None if size == 0 or limit < 0 else size + limit,
    )


def count_connections(engine: AsyncEngine) -> None:
    """Count the connections in use from now on, if the pool does not."""
    sync_engine = getattr(engine, "sync_engine", None)
    if not isinstance(sync_engine, Engine):
        return  # users' tests pass mocks
    if not isinstance(sync_engine.pool, QueuePool) and sync_engine.dialect not in _counts:
        _counts[sync_engine.dialect] = _Count(sync_engine)


def close_idle_connections(engine: AsyncEngine, timeout: float, min_idle: int) -> None:
    """Close, from now on, the connections of `engine` that were idle for long.

    Args:
        engine: The engine.
        timeout: How long a connection may be idle, in seconds.
        min_idle: How many idle connections to keep all the same: those that were used last.
    """
    idle = _IdleConnections(engine.sync_engine, timeout, min_idle)
    setattr(engine.sync_engine, _IDLE, idle)


async def finish_closing(engine: AsyncEngine) -> None:
    """End `close_idle_connections`, with its timer and its tasks."""
    idle = _idle_of(engine)
    if idle is not None:
        await idle.finish()


def _idle_of(engine: AsyncEngine) -> _IdleConnections | None:
    # An attribute of the engine: in a dictionary with weak keys it would keep its own key alive.
    idle = getattr(getattr(engine, "sync_engine", None), _IDLE, None)
    return idle if isinstance(idle, _IdleConnections) else None


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
            # Closing awaits, and nobody may be given the connection meanwhile: it is taken out of
            # its slot, where the pool will open another one.
            connection = entry.dbapi_connection
            assert connection is not None
            entry.dbapi_connection = None  # type: ignore[misc]  # declared read-only
            task = loop.create_task(self._close(connection))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, connection: DBAPIConnection) -> None:
        try:
            await greenlet_spawn(self._dialect.do_terminate, connection)
        except Exception:
            logger.warning("An idle connection failed to close", exc_info=True)


# By dialect, which the copies made by Engine.execution_options() share, as they share the pool.
_counts: WeakKeyDictionary[Dialect, _Count] = WeakKeyDictionary()
