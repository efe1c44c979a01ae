"""Rolling back and closing sessions: whatever happens, their connections come home."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from context_async_sqlalchemy.exceptions import ContextClosedError
from context_async_sqlalchemy.guards import connections_of, is_in_use
from context_async_sqlalchemy.shield import logger, run_to_completion

# SQLAlchemy's own, whatever a user's test, or an instrumentation, puts in its place later.
_CLOSE = AsyncSession.close


def is_in_transaction(session: AsyncSession) -> bool:
    """Return whether a transaction is open on `session`."""
    answer: object = session.in_transaction()
    if inspect.iscoroutine(answer):  # from a mock with nothing but async methods
        answer.close()
    return bool(answer)


def is_real(session: AsyncSession) -> bool:
    """Return whether `session` is SQLAlchemy's, and no mock of a user's test."""
    return isinstance(getattr(session, "sync_session", None), Session)


async def rollback_sessions(sessions: list[AsyncSession]) -> None:
    """Roll back all of `sessions`, even under cancellation and when one of them fails."""
    if sessions:
        await run_to_completion(_rollback_each(sessions))


async def close_sessions(sessions: list[AsyncSession]) -> None:
    """Close all of `sessions`, even under cancellation and when one of them fails to close.

    An error is logged: there is nothing left to save.
    """
    if all(map(_closes_at_once, sessions)):
        # Nothing can be torn then: spare the task, and the greenlet of AsyncSession.close(), which
        # is 3 % of a request with one statement.
        for session in sessions:
            _close_at_once(session)
    else:
        await run_to_completion(_close_each(sessions))


async def wait_until_idle(sessions: list[AsyncSession]) -> None:
    """Wait until no task is inside a statement of one of `sessions`."""
    while any(map(is_in_use, sessions)):  # noqa: ASYNC110  # SQLAlchemy has no event for it
        await asyncio.sleep(0.001)


def refuse_further_use(session: AsyncSession) -> None:
    """Let every later statement of `session` raise `ContextClosedError`."""
    # Every statement calls Session.get_bind() first, which is made to be overridden. A task that
    # has kept the session would otherwise take a connection that nobody returns.
    sync_session = getattr(session, "sync_session", None)
    if isinstance(sync_session, Session):
        sync_session.get_bind = _refuse_statement  # type: ignore[method-assign]


async def _rollback_each(sessions: list[AsyncSession]) -> None:
    for session in sessions:
        await _release(session, session.rollback, "roll back")


async def _close_each(sessions: list[AsyncSession]) -> None:
    for session in sessions:
        await _release(session, session.close, "close")


def _closes_at_once(session: AsyncSession) -> bool:
    """Return whether closing this session sends nothing to a server, and so waits for nothing."""
    sync_session = getattr(session, "sync_session", None)
    if not isinstance(sync_session, Session) or sync_session.in_transaction():
        return False
    # What a user has added to it may send a statement.
    return (
        getattr(session.close, "__func__", None) is _CLOSE
        and type(sync_session).close is Session.close
        and not sync_session.dispatch.persistent_to_detached
    )


def _close_at_once(session: AsyncSession) -> None:
    try:
        session.sync_session.close()
    except Exception:
        logger.exception("A database session failed to close")


async def _release(session: AsyncSession, method: Callable[[], Awaitable[None]], what: str) -> None:
    connections = connections_of(session)
    try:
        await (session.invalidate if is_in_use(session) else method)()
    except Exception:
        logger.exception("A database session failed to %s; its connection is discarded", what)
        await _discard(session, connections)


async def _discard(session: AsyncSession, connections: list[Connection]) -> None:
    try:
        await session.invalidate()
        for connection in connections:
            # SQLAlchemy loses the connection of a session if the ROLLBACK in its close() fails.
            if not connection.closed:
                connection.invalidate()
                connection.close()
    except Exception:
        sync_session = getattr(session, "sync_session", None)
        if isinstance(sync_session, Session):
            # A task is taking a connection: until it has it, SQLAlchemy refuses to invalidate.
            event.listen(sync_session, "after_begin", _refuse_connection)
        else:
            logger.exception("The connection of a database session could not be discarded")


def _refuse_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    connection.invalidate()
    raise ContextClosedError


def _refuse_statement(*_: Any, **__: Any) -> NoReturn:
    raise ContextClosedError
