"""The session of the context, and what users do with it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import Session

from context_async_sqlalchemy.auto_commit import commit_session
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import (
    DBSessionContext,
    current_context,
    get_db_session_from_context,
)
from context_async_sqlalchemy.exceptions import ContextClosedError
from context_async_sqlalchemy.guards import connections_of
from context_async_sqlalchemy.leak_detection import detect_leaks
from context_async_sqlalchemy.release import (
    close_sessions,
    is_in_transaction,
    rollback_sessions,
)
from context_async_sqlalchemy.session_type import SessionT
from context_async_sqlalchemy.shield import logger, run_to_completion

CurrentTransaction: TypeAlias = Literal["commit", "rollback", "append", "raise", "savepoint"]


async def db_session(connect: DBConnect[SessionT]) -> SessionT:
    """Return the session of the context for `connect`, made on the first call.

    Every coroutine and child task of the context gets the same one. It is committed or rolled
    back, and closed, when the context ends.

    Args:
        connect: The database.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
        RuntimeError: If the context is that of a request which another event loop serves.
    """
    context = current_context()
    if context.loop is not None and context.loop is not asyncio.get_running_loop():
        # Its connection would be the other loop's, and so useless to the middleware that commits.
        raise RuntimeError(
            "This event loop is not the one that serves the request whose database session is "
            "asked for. In a function that runs in a thread call 'anyio.from_thread.run(f)', not "
            "'asyncio.run(f())'; or open a context here, with 'async with new_db_session_ctx():'."
        )
    session: SessionT | None = context.by_key.get(connect.context_key)
    if session is None:
        session = await create_session(context, connect)
    return session


def atomic_db_session(
    connect: DBConnect[SessionT], current_transaction: CurrentTransaction = "commit"
) -> AbstractAsyncContextManager[SessionT]:
    """Run a block in a transaction of the context's session, committed at its end.

    An exception rolls it back.

        async with atomic_db_session(connect) as session:
            session.add(User(name="Ann"))

    Args:
        connect: The database.
        current_transaction: What to do with a transaction that is open already: "commit" (the
            default) and "rollback" end it before the block; "append" continues it, and the end of
            the block commits or rolls back both; "raise" refuses it; "savepoint" keeps it open, and
            an exception undoes the block only. If none is open, the block begins one in any case.

    Raises:
        CommitOutcomeUnknownError: If the connection was lost during COMMIT.
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
        InvalidRequestError: If a transaction is open and `current_transaction` is "raise".
        ValueError: If `current_transaction` is none of these.
    """
    if current_transaction not in get_args(CurrentTransaction):
        names = ", ".join(repr(name) for name in get_args(CurrentTransaction))
        raise ValueError(f"current_transaction must be one of {names}, not {current_transaction!r}")
    return _atomic_db_session(connect, current_transaction)


async def commit_db_session(connect: DBConnect) -> None:
    """Commit the context's session for `connect` now, if there is one.

    Raises:
        CommitOutcomeUnknownError: If the connection was lost during COMMIT.
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    session = get_db_session_from_context(connect)
    if session is not None:
        await commit_session(session)


async def rollback_db_session(connect: DBConnect) -> None:
    """Roll back the context's session for `connect` now, if there is one.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    session = get_db_session_from_context(connect)
    if session is not None:
        await session.rollback()


async def close_db_session(connect: DBConnect) -> None:
    """Close the context's session for `connect` now, if there is one.

    Its connection goes back to the pool; what was not committed is rolled back. `db_session` makes
    a new session if it is called again.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    session = current_context().by_key.pop(connect.context_key, None)
    if session is not None:
        await close_sessions([session])


@asynccontextmanager
async def new_non_ctx_session(connect: DBConnect[SessionT]) -> AsyncGenerator[SessionT]:
    """Make a session outside of any context, and close it at the end of the block.

    What the block does not commit is rolled back.

    Args:
        connect: The database.
    """
    session = await connect.create_session()
    try:
        yield session
    finally:
        await close_sessions([session])


@asynccontextmanager
async def new_non_ctx_atomic_session(connect: DBConnect[SessionT]) -> AsyncGenerator[SessionT]:
    """Make a session outside of any context, and commit it at the end of the block.

    An exception rolls it back.

    Args:
        connect: The database.
    """
    async with new_non_ctx_session(connect) as session:
        await _begin(session)
        yield session
        await commit_session(session)


async def create_session(
    context: DBSessionContext, connect: DBConnect[SessionT], endpoint: object = None
) -> SessionT:
    """Make the session of a context for `connect`, unless another task does so meanwhile.

    Args:
        context: The context.
        connect: The database.
        endpoint: The endpoint that it is made for, to be named by leak detection. Default None: the
            line that asks for it is named.
    """
    key = connect.context_key
    creating = _creating.get()
    if key in creating and creating[key].locked():
        raise RuntimeError(
            f"the before_create_session_handler of {connect!r} asks for the session that is only "
            "made after it: use a connection of its own there"
        )
    # Two tasks may ask first at the same time, and the handler of the connect may really wait.
    lock = context.locks.setdefault(key, asyncio.Lock())
    async with lock:
        session: SessionT | None = context.by_key.get(key)
        if session is not None:
            return session
        token = _creating.set({**creating, key: lock})
        try:
            session = await connect.create_session()
        finally:
            _creating.reset(token)
        if context.closed:
            await session.close()
            raise ContextClosedError
        threshold = getattr(connect, "leak_detection_threshold", None)
        if isinstance(threshold, int | float):  # users' tests pass mocks
            detect_leaks(session, threshold, connect, context.request, endpoint)
        context.put(key, session)
        context.made.append(session)
        return session


# The locks of the creations in which this task is, or was started: it may outlive them.
_creating: ContextVar[Mapping[str, asyncio.Lock]] = ContextVar(
    "creating", default=MappingProxyType({})
)


@asynccontextmanager
async def _atomic_db_session(
    connect: DBConnect[SessionT], current_transaction: CurrentTransaction
) -> AsyncGenerator[SessionT]:
    session = await db_session(connect)
    if is_in_transaction(session):
        if current_transaction == "savepoint":
            async with _savepoint(session):
                yield session
            return
        if current_transaction == "raise":
            raise InvalidRequestError(
                "A transaction is open already on the database session of this context: commit it "
                'first, or choose "commit", "rollback", "append" or "savepoint" as '
                "current_transaction."
            )
        if current_transaction == "commit":
            await commit_session(session)
        elif current_transaction == "rollback":
            await session.rollback()
    if not is_in_transaction(session):
        await _begin(session)
    try:
        yield session
        await commit_session(session)
    except BaseException:
        await rollback_sessions([session])
        raise


async def _begin(session: AsyncSession) -> None:
    transaction = session.begin()
    if inspect.isawaitable(transaction):  # not that of a mock with the spec of AsyncSession
        await transaction


@asynccontextmanager
async def _savepoint(session: AsyncSession) -> AsyncGenerator[None]:
    savepoint = await session.begin_nested()
    try:
        yield
        # After a flush that has failed, SQLAlchemy's own block would end the savepoint silently.
        if _is_open(session, savepoint):
            await savepoint.commit()
    except BaseException:
        if _is_open(session, savepoint):
            await run_to_completion(_rollback(session, savepoint))
        elif is_in_transaction(session):
            await rollback_sessions([session])  # the block ended the savepoint, and went on
        raise


def _is_open(session: AsyncSession, savepoint: AsyncSessionTransaction) -> bool:
    # The block may have ended it, or the transaction around it.
    sync_session = getattr(session, "sync_session", None)
    if not isinstance(sync_session, Session):
        return True  # users' tests pass mocks
    transaction = sync_session.get_nested_transaction()
    while transaction is not None and transaction is not savepoint.sync_transaction:
        transaction = transaction.parent
    return transaction is not None


async def _rollback(session: AsyncSession, savepoint: AsyncSessionTransaction) -> None:
    connections = connections_of(session)
    try:
        await savepoint.rollback()
    except Exception:
        logger.exception("A savepoint failed to roll back; its connection is discarded")
        # Otherwise a commit of the transaction around it would store what was to be undone.
        for connection in connections:
            connection.invalidate()
