"""Rolling back and closing sessions: whatever happens, their connections come home."""

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from sqlalchemy import Connection, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from context_async_sqlalchemy._engine import private_names
from context_async_sqlalchemy._engine.discard import invalidate
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._engine.turns import enter_blocks
from context_async_sqlalchemy.exceptions import ContextClosedError

# SQLAlchemy's own, whatever a user's test, or an instrumentation, puts in its place later.
_CLOSE = AsyncSession.close


async def rollback_sessions(sessions: Sequence[AsyncSession]) -> None:
    """Roll back all of `sessions`, even under cancellation and when one of them fails."""
    if sessions:
        await run_to_completion(_release_each(sessions, "roll back"))


async def close_sessions(sessions: Sequence[AsyncSession]) -> None:
    """Close all of `sessions`, even under cancellation and when one of them fails to close.

    An error is logged: there is nothing left to save.
    """
    if all(map(closes_at_once, sessions)):
        # Nothing can be torn then: spare the task, and the greenlet of AsyncSession.close(), which
        # is 3 % of a request with one statement.
        for session in sessions:
            close_at_once(session)
    else:
        await run_to_completion(_release_each(sessions, "close"))


def refuse_further_use(session: AsyncSession) -> None:
    """Let every later statement of `session` raise `ContextClosedError`."""
    # A task that has kept the session would otherwise take a connection that nobody returns.
    private_names.replace_get_bind(session.sync_session, _refuse_statement)


def closes_at_once(session: AsyncSession) -> bool:
    """Return whether closing this session sends nothing to a server, and so waits for nothing."""
    sync_session = session.sync_session
    close = type(sync_session).close
    # What a user has added to it may send a statement.
    return (
        not sync_session.in_transaction()
        and getattr(session.close, "__func__", None) is _CLOSE
        and getattr(close, "__wrapped__", close) is Session.close
        and not private_names.closing_calls_listeners(sync_session)
    )


def close_at_once(session: AsyncSession) -> None:
    """Close a session that `closes_at_once`."""
    try:
        Session.close(session.sync_session)  # no other task is inside of it
    except Exception:
        logger.exception("A database session failed to close")


def has_objects(session: AsyncSession) -> bool:
    """Return whether a session that `closes_at_once` has objects, which closing it would detach."""
    # A new one would have begun a transaction.
    return len(session.sync_session.identity_map) > 0


def is_in_use(session: AsyncSession, connections: Sequence[Connection]) -> bool:
    """Return whether a task is inside a statement of this session, or taking a connection for it.

    `connections` are its `connections_of`.

    Ending the transaction then fails in asyncpg, and SQLAlchemy takes it for ended all the same: it
    returns the connection to the pool with the transaction still open.
    """
    if not enter_blocks(session):  # or else this task may use it
        return True
    transaction = session.sync_session.get_transaction()
    return transaction is not None and (
        private_names.is_changing(transaction) or any(map(private_names.is_executing, connections))
    )


def connections_of(session: AsyncSession) -> list[Connection]:
    """Return the open connections of this session's transaction."""
    transaction = session.sync_session.get_transaction()
    return private_names.connections_of(transaction) if transaction is not None else []


async def _release_each(
    sessions: Sequence[AsyncSession], what: Literal["roll back", "close"]
) -> None:
    for session in sessions:
        connections = connections_of(session)
        end = session.close if what == "close" else session.rollback
        transaction = session.sync_session.get_transaction()
        if transaction is not None and private_names.is_connecting(transaction):
            await _discard(session, connections)  # who takes it is told, and nothing was done on it
            continue
        try:
            await (_discard(session, connections) if is_in_use(session, connections) else end())
        except Exception:
            logger.exception("A database session failed to %s; its connection is discarded", what)
            await _discard(session, connections)


async def _discard(session: AsyncSession, connections: list[Connection]) -> None:
    try:
        # First, so that the session sends nothing as it gives up its savepoints one by one: it
        # would stop at the first that fails.
        for connection in connections:
            if not (connection.closed or connection.invalidated):
                await invalidate(connection)
        await session.invalidate()
        for connection in connections:
            # SQLAlchemy loses the connection of a session if the ROLLBACK in its close() fails.
            connection.close()
    except Exception as error:
        # A task is taking a connection: until it has it, SQLAlchemy refuses to invalidate.
        event.listen(session.sync_session, "after_begin", _refuse_connection)
        if not isinstance(error, InvalidRequestError):
            logger.exception("The connection of a database session could not be discarded")


def _refuse_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    connection.invalidate()
    raise ContextClosedError


def _refuse_statement(*_: Any, **__: Any) -> NoReturn:
    raise ContextClosedError
