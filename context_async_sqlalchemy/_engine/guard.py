"""Guards on the connections of a connect's engines: each comes home clean, and is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from weakref import ref

from sqlalchemy import Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from context_async_sqlalchemy._engine.border import sync_engine_of
from context_async_sqlalchemy._engine.commits import check_commits
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.one_connection import take_turns
from context_async_sqlalchemy._engine.pool import count_connections, finish_idle
from context_async_sqlalchemy._engine.private_names import (
    greenlet_spawn,
    in_greenlet,
    pool_of,
    replace_of_dialect,
)
from context_async_sqlalchemy._engine.shield import keep, run_to_completion

_GUARD = "_context_async_sqlalchemy_guard"


def guard(engine: AsyncEngine) -> None:
    """Watch the connections of an engine from now on, until the caller calls `close_engine`."""
    sync_engine = sync_engine_of(engine)
    guard = _guard_of(sync_engine)
    if guard is None:
        take_turns(sync_engine.pool)
        count_connections(sync_engine)
        guard = _Guard(sync_engine)
        setattr(sync_engine.dialect, _GUARD, guard)
    guard.users += 1


@asynccontextmanager
async def closing(engine: AsyncEngine) -> AsyncGenerator[AsyncEngine]:
    """Close an engine at the end of a block, unless its creator has returned it to others, too."""
    guard(engine)
    try:
        yield engine
    finally:
        await run_to_completion(close_engine(engine))


async def close_engine(engine: AsyncEngine) -> None:
    """Close the connections of an engine: the idle ones now, the others as they come back.

    Nothing is closed while others use the engine, such as a connect whose creator returns it too.
    If the server is silent, this takes as long as the driver takes to terminate a connection.
    """
    guard = _guard_of(sync_engine_of(engine))  # a mock has none
    if guard is not None:
        guard.users = max(guard.users - 1, 0)
    if guard is None or not guard.users:
        # dispose() closes idle connections only. One that a session still holds would return to a
        # pool that is no longer used, and stay open there.
        await engine.dispose()
        await finish_closing()
    await finish_idle(engine)


async def finish_closing() -> None:
    """Wait for the connections that are being closed on this event loop.

    A loop that ends meanwhile cancels that, and aiosqlite's may then hang, or fail in its thread.
    """
    loop = asyncio.get_running_loop()
    if closing := [task for task in list(_closing) if task.get_loop() is loop]:
        await asyncio.wait(closing)


def _guard_of(engine: Engine) -> _Guard | None:
    # On the dialect, which the copies made by Engine.execution_options() share.
    guard: _Guard | None = getattr(engine.dialect, _GUARD, None)
    return guard


class _Guard:
    """Watches the connections of one engine, and of its copies."""

    def __init__(self, engine: Engine) -> None:
        self.users = 0  # with none left, a connection that comes back is closed
        self._engine = ref(engine)
        self._dialect = engine.dialect
        self._do_close = engine.dialect.do_close
        check_commits(engine)
        replace_of_dialect(engine.dialect, "do_close", self._close)
        event.listen(engine, "checkin", self._on_checkin)

    def _close(self, connection: DBAPIConnection) -> None:
        # A polite close may wait forever for a silent server. The connections of an engine that is
        # being retired are terminated instead, all at once.
        if self.users or not in_greenlet():
            self._do_close(connection)
            return
        keep(asyncio.create_task(self._terminate(connection)), _closing)

    async def _terminate(self, connection: DBAPIConnection) -> None:
        close = self._dialect.do_terminate if self._dialect.has_terminate else self._do_close
        try:
            await greenlet_spawn(close, connection)
        except Exception:
            logger.warning("A connection failed to close", exc_info=True)

    def _on_checkin(self, _: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        engine = self._engine()
        # Retired and in use again, an engine has another pool, and nobody looks into the first one.
        if not self.users or (engine is not None and pool_of(entry) is not engine.pool):
            entry.close()


_closing: set[asyncio.Task[None]] = set()  # of every engine, on every loop
