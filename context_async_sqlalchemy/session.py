"""The session of the context, and sessions without one."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from context_async_sqlalchemy._engine.border import real_session
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.release import close_sessions
from context_async_sqlalchemy._engine.release_in_turn import close_in_turn
from context_async_sqlalchemy._unit.atomic import (
    CurrentTransaction as CurrentTransaction,
    atomic_db_session as atomic_db_session,
)
from context_async_sqlalchemy._unit.context import current_context
from context_async_sqlalchemy._unit.read_only import key_of
from context_async_sqlalchemy._unit.same_snapshot import same_snapshot as same_snapshot
from context_async_sqlalchemy._unit.sessions import db_session as db_session
from context_async_sqlalchemy._unit.settle import commit_session
from context_async_sqlalchemy.connect import DBConnect


async def commit_db_session(connect: DBConnect) -> None:
    """Commit the context's session for `connect` now, if there is one.

    Raises:
        CommitOutcomeUnknownError: If the connection was lost during COMMIT.
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    session = context.by_key.get(key_of(context, connect))
    if session is not None:
        await commit_session(real_session(session))


async def rollback_db_session(connect: DBConnect) -> None:
    """Roll back the context's session for `connect` now, if there is one.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    session = context.by_key.get(key_of(context, connect))
    if session is not None:
        await session.rollback()


async def close_db_session(connect: DBConnect) -> None:
    """Close the context's session for `connect` now, if there is one.

    Its connection goes back to the pool; what was not committed is rolled back. `db_session` makes
    a new session if it is called again.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    session = context.by_key.pop(key_of(context, connect), None)
    if session is not None:
        await close_in_turn(real_session(session))


@asynccontextmanager
async def new_non_ctx_session(connect: DBConnect[SessionT]) -> AsyncGenerator[SessionT]:
    """Make a session outside of any context, and close it at the end of the block.

    What the block does not commit is rolled back.
    """
    session = await connect.create_session()
    try:
        yield session
    finally:
        await close_sessions([real_session(session)])


@asynccontextmanager
async def new_non_ctx_atomic_session(connect: DBConnect[SessionT]) -> AsyncGenerator[SessionT]:
    """Make a session outside of any context, and commit it at the end of the block.

    An exception rolls it back.
    """
    async with new_non_ctx_session(connect) as session:
        real = real_session(session)
        await real.begin()
        yield session
        await commit_session(real)
