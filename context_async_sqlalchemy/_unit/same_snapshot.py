"""Several sessions that see the same data of PostgreSQL, for queries at the same time."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from sqlalchemy import Pool, QueuePool, text
from sqlalchemy.exc import InvalidRequestError, TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from context_async_sqlalchemy._engine.border import is_mocked, real_session
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.pool import pool_status
from context_async_sqlalchemy._engine.private_names import replace_get_bind
from context_async_sqlalchemy._engine.read_only import READ_ONLY, SNAPSHOT, has_one_connection
from context_async_sqlalchemy._engine.release import close_sessions, connections_of
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._unit.context import contexts_here
from context_async_sqlalchemy._unit.read_only import reader_of
from context_async_sqlalchemy.connect import DBConnect

_TAKING = "_context_async_sqlalchemy_taking"  # an attribute of a pool


def same_snapshot(
    connect: DBConnect[SessionT], number: int
) -> AbstractAsyncContextManager[tuple[SessionT, ...]]:
    """Make sessions that only read and see the same data, each on a connection of its own.

        async with same_snapshot(connect, 2) as (first, second):
            users, members = await asyncio.gather(
                first.scalars(select(User)), second.scalars(select(Member))
            )

    They are in one state of the database, that of the beginning of the block, and in no context.
    Each has one transaction, REPEATABLE READ and READ ONLY, which the end of the block rolls back;
    a session whose transaction has ended is refused. A block waits up to `pool_timeout` for other
    blocks that are taking connections.

    Args:
        connect: The database: PostgreSQL.
        number: How many sessions, and connections, to take.

    Raises:
        InvalidRequestError: If it is another database; or if a session of the context holds a
            connection of this pool, as requests that each hold one and wait for more wait for each
            other.
        ValueError: If `number` is less than 1, or more than `pool_size` + `max_overflow`.
        TimeoutError: SQLAlchemy's, if there are no free connections in time.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, not {number}")
    return _same_snapshot(connect, number)


@asynccontextmanager
async def _same_snapshot(
    connect: DBConnect[SessionT], number: int
) -> AsyncGenerator[tuple[SessionT, ...]]:
    sessions = await _make(connect, number)
    try:
        engine = sessions[0].bind
        if isinstance(engine, AsyncEngine):  # or else they are of a test
            _check(engine, number)
            if sessions[0].info.get(READ_ONLY) == "snapshot":
                async with _taking(engine.sync_engine.pool):
                    await _begin(sessions)
        yield tuple(sessions)
    finally:
        await run_to_completion(_close(sessions))


async def _make(connect: DBConnect[SessionT], number: int) -> list[SessionT]:
    if not is_mocked(connect):
        # In the transaction of a test all are on one connection, and take turns at each statement.
        connect = reader_of(connect, True if connect._engines.is_pinned else "snapshot")
    if is_mocked(connect):  # or has a way of its own
        return [await connect.create_session() for _ in range(number)]
    make = await connect.session_maker()  # once: a handler may choose another host each time
    return [make() for _ in range(number)]


async def _close(sessions: list[SessionT]) -> None:
    # At the same time: each is a round trip.
    await asyncio.gather(*(close_sessions([real_session(session)]) for session in sessions))


def _check(engine: AsyncEngine, number: int) -> None:
    capacity = 1 if has_one_connection(engine) else pool_status(engine).capacity
    if capacity is not None and number > capacity:
        raise ValueError(
            f"same_snapshot() is to take {number} connections, and the pool has {capacity} at most "
            "(pool_size + max_overflow)"
        )
    pool = engine.sync_engine.pool
    for context in contexts_here():
        if context.is_test:
            continue
        for session in context.sessions:
            if any(connection.engine.pool is pool for connection in connections_of(session)):
                raise InvalidRequestError(_HOLDS)


@asynccontextmanager
async def _taking(pool: Pool) -> AsyncGenerator[None]:
    """Let one block at a time take its connections, so that no two wait for each other's."""
    lock: asyncio.Lock = vars(pool).setdefault(_TAKING, asyncio.Lock())
    seconds = pool.timeout() if isinstance(pool, QueuePool) else None
    try:
        async with asyncio.timeout(seconds):
            await lock.acquire()
    except TimeoutError:
        raise PoolTimeoutError(
            f"same_snapshot() has waited for {seconds:g} seconds (pool_timeout) while others were "
            "waiting for their connections"
        ) from None
    try:
        yield
    finally:
        lock.release()


async def _begin(sessions: list[SessionT]) -> None:
    first, *others = sessions
    await _take(first, {})
    snapshot = await first.scalar(text("SELECT pg_export_snapshot()"))
    errors: list[Exception] = []

    async def take(session: AsyncSession) -> None:
        # The error of one does not cancel the others: SQLAlchemy before 2.0.53 forgets a connection
        # that is being opened then, and before #13699 one that is being reset.
        try:
            await _take(session, {SNAPSHOT: snapshot})
        except Exception as error:
            errors.append(error)

    async with asyncio.TaskGroup() as tasks:
        for session in others:
            tasks.create_task(take(session))
    if errors:
        raise errors.pop(0)


async def _take(session: AsyncSession, options: dict[str, Any]) -> None:
    if not session.in_transaction():  # with autobegin=False
        await session.begin()
    await session.connection(execution_options=options)
    sync_session = session.sync_session
    transaction, own = sync_session.get_transaction(), sync_session.get_bind

    def get_bind(*args: Any, **options: Any) -> Any:
        # The next one would see other data, or be on a connection that nobody returns.
        if sync_session.get_transaction() is not transaction:
            raise InvalidRequestError(_ENDED)
        return own(*args, **options)

    replace_get_bind(sync_session, get_bind)


_HOLDS = (
    "same_snapshot() takes connections, and a session of this context holds one of the same pool: "
    "requests that each hold one and wait for more would wait for each other. Give it back before, "
    "with 'await commit_db_session(connect)', or, as in a request with an idempotency key, take "
    "the sessions from another connect. They see only what is committed, in any case."
)
_ENDED = (
    "This session is on the snapshot of same_snapshot(), and its transaction has ended, by a "
    "commit, a rollback, or the end of the block: for more queries, open another block"
)
