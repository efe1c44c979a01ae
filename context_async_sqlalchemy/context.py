"""The container of a unit of work's sessions, and the context variable that points at it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import ContextVar, Token
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from context_async_sqlalchemy.connect import DBConnect

T = TypeVar("T")

logger = logging.getLogger("context_async_sqlalchemy")

_HINT = (
    "In a web application add the middleware; elsewhere open one with "
    "'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'; for a session "
    "in no context use 'async with new_non_ctx_session(connect):'."
)


class ContextNotInitiatedError(RuntimeError):
    """A session was asked for where there is no context to hold it."""

    def __init__(
        self, message: str = f"There is no database session context here. {_HINT}"
    ) -> None:
        super().__init__(message)


class ContextClosedError(ContextNotInitiatedError):
    """A session was asked for in a context that has ended, as by a task outliving its request."""

    def __init__(
        self, message: str = f"The database session context of this task has ended. {_HINT}"
    ) -> None:
        super().__init__(message)


class ContextAlreadyInitiatedError(RuntimeError):
    """A context was opened by hand inside another one."""

    def __init__(
        self,
        message: str = "There is a database session context already. To open another one inside "
        "it, use 'async with new_db_session_ctx():' or 'init_db_session_ctx(force=True)'.",
    ) -> None:
        super().__init__(message)


class Creation:
    """What makes the creation of a session single-flight.

    Attributes:
        lock: Held while the session is made.
        task: The task that makes it.
    """

    __slots__ = ("lock", "task")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.task: asyncio.Task[Any] | None = None


class DBSessionContext:
    """The sessions of one unit of work; one container, shared by all its tasks.

    Attributes:
        current: The session that `db_session` returns for each connect, by `context_key`.
        sessions: Every session to settle and to close, in the order they were made. One that was
            closed or replaced by hand stays here: somebody may still hold it and use it.
        creations: How far the session of each connect is made, by `context_key`.
        is_test: Whether a test opened it, which then also settles it.
        closed: Whether it has ended.
        settles_late: Whether a request settles only when the application has returned.
        token: What restores the context variable.
    """

    __slots__ = (
        "closed",
        "creations",
        "current",
        "is_test",
        "sessions",
        "settles_late",
        "token",
    )

    def __init__(self) -> None:
        self.current: dict[str, AsyncSession] = {}
        self.sessions: list[AsyncSession] = []
        self.creations: dict[str, Creation] = {}
        self.is_test = False
        self.closed = False
        self.settles_late = False
        self.token: Token[DBSessionContext | None] | None = None

    def put(self, context_key: str, session: AsyncSession) -> None:
        """Make `session` the one that `db_session` returns for a connect."""
        self.current[context_key] = session
        if session not in self.sessions:
            self.sessions.append(session)

    def pop(self, context_key: str) -> AsyncSession | None:
        """Take out the session of a connect, which is the caller's then."""
        session = self.current.pop(context_key, None)
        if session is not None:
            self.sessions.remove(session)
        return session

    def in_transaction(self) -> list[AsyncSession]:
        """Return the sessions with an open transaction, in the order they were made."""
        return [session for session in self.sessions if session.in_transaction()]

    async def close_sessions(self) -> None:
        """Close every session; an error is logged, for there is nothing left to save."""
        sessions, self.sessions = self.sessions, []
        self.current.clear()
        await close_sessions(sessions)

    async def end(self, with_close: bool = True) -> None:
        """Restore the context variable, refuse whatever comes later, close every session."""
        token, self.token = self.token, None
        if token is None:
            return
        self.closed = True
        if _context.get() is not self:
            await self._end_forgotten()
        try:
            _context.reset(token)
        except ValueError as error:
            raise RuntimeError(
                "This database session context was opened in another task (or with another "
                "contextvars.Context), and has been closed now. Open and end a context in the "
                "same task: use 'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'."
            ) from error
        finally:
            if with_close and self.sessions:
                sessions = self.sessions
                await self.close_sessions()
                for session in sessions:
                    _retire(session)


    async def _end_forgotten(self) -> None:
        inside = _context.get()
        if inside is None or inside.token is None or inside.token.old_value is not self:
            return
        logger.error(
            "A database session context was opened inside another one and never ended; what is "
            "uncommitted in it is rolled back. End it with 'await reset_db_session_ctx(token)', or "
            "use 'async with new_db_session_ctx():'."
        )
        await inside.end()


_context: ContextVar[DBSessionContext | None] = ContextVar("db_session_context", default=None)


def open_context() -> DBSessionContext:
    """Open a context, whatever is open already; `DBSessionContext.end` ends it."""
    context = DBSessionContext()
    context.token = _context.set(context)
    return context


def current_context() -> DBSessionContext:
    """Return the context of this task.

    Raises:
        ContextNotInitiatedError: If there is none.
        ContextClosedError: If it has ended.
    """
    context = _context.get()
    if context is None:
        raise ContextNotInitiatedError
    if context.closed:
        raise ContextClosedError
    return context


def init_db_session_ctx(force: bool = False) -> Token[DBSessionContext | None]:
    """Open a context by hand; `reset_db_session_ctx` ends it.

    For a middleware of your own; elsewhere `new_db_session_ctx` does both.

    Args:
        force: Open it even inside another one, which is back afterwards. Default False.

    Returns:
        The token for `reset_db_session_ctx`.

    Raises:
        ContextAlreadyInitiatedError: If a context is open and `force` is not set.
    """
    if is_context_initiated() and not force:
        raise ContextAlreadyInitiatedError
    token = open_context().token
    assert token is not None
    return token


def is_context_initiated() -> bool:
    """Return whether there is a context here that has not ended."""
    context = _context.get()
    return context is not None and not context.closed


def is_test_context() -> bool:
    """Return whether the context here is open and belongs to a test (`set_test_context`)."""
    context = _context.get()
    return context is not None and context.is_test and not context.closed


async def reset_db_session_ctx(
    token: Token[DBSessionContext | None], with_close: bool = True
) -> None:
    """End the context that `init_db_session_ctx` opened; the one before it is back.

    What is still uncommitted is rolled back: settle first, with `auto_commit_by_status_code`,
    `commit_all_sessions` or `rollback_all_sessions`.

    Args:
        token: What `init_db_session_ctx` returned.
        with_close: Whether to close the sessions. Default True; with False they are the caller's.

    Raises:
        ValueError: If the token is not that of the context here; nothing is closed then.
        RuntimeError: If the context was opened in another task; it is closed all the same.
    """
    context = _context.get()
    if context is None or context.token is None or context.token is not token:
        raise ValueError(
            "The token is not the one of the database session context here. Pass what "
            "init_db_session_ctx() returned, once, in the same task, and end an inner context "
            "before the outer one; 'async with new_db_session_ctx():' does all that."
        )
    await context.end(with_close)


def get_db_session_from_context(connect: DBConnect) -> AsyncSession | None:
    """Return the context's session for `connect`, or None if it was not asked for yet.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    return current_context().current.get(connect.context_key)


def put_db_session_to_context(connect: DBConnect, session: AsyncSession) -> None:
    """Make `session` the context's session for `connect`.

    The context settles and closes it, and also one that it replaces.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
        TypeError: If it is a sync `Session`.
    """
    if isinstance(session, Session):
        raise TypeError("a context holds AsyncSession objects, not sync Session ones")
    current_context().put(connect.context_key, session)


def pop_db_session_from_context(connect: DBConnect) -> AsyncSession | None:
    """Take the session for `connect` out of the context; the caller settles and closes it.

    Returns:
        The session, or None if there was none.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    return current_context().pop(connect.context_key)


async def close_sessions(sessions: list[AsyncSession]) -> None:
    """Close all of `sessions`, even under cancellation and when one of them fails to close."""
    if any(session.in_transaction() for session in sessions):
        await run_to_completion(_close_each(sessions))
    else:
        # Nothing is sent to a server then, so that nothing can be torn: spare the task.
        await _close_each(sessions)


async def _close_each(sessions: list[AsyncSession]) -> None:
    for session in sessions:
        try:
            await session.close()
        except Exception:
            logger.exception("A database session failed to close; its connection is invalidated")
            await invalidate(session)


async def invalidate(session: AsyncSession) -> None:
    """Discard the connections of a session that failed to roll back or to close."""
    try:
        await session.invalidate()
    except Exception:
        sync_session = getattr(session, "sync_session", None)
        if isinstance(sync_session, Session):
            # Another task is taking a connection, and SQLAlchemy lets nobody else in meanwhile.
            event.listen(sync_session, "after_begin", _refuse_connection)
        else:
            logger.exception("The connection of a database session could not be invalidated")


def _refuse_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    connection.invalidate()
    raise ContextClosedError


def _retire(session: AsyncSession) -> None:
    # Session.get_bind() is what every statement asks first, and is made to be overridden. Whoever
    # kept the session would otherwise take a connection that nobody returns.
    sync_session = getattr(session, "sync_session", None)
    if isinstance(sync_session, Session):
        sync_session.get_bind = _refuse_statement  # type: ignore[method-assign]


def _refuse_statement(*_: Any, **__: Any) -> NoReturn:
    raise ContextClosedError


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in a task of its own and wait for its end, however often the caller is cancelled.

    asyncio cancels once; an anyio cancel scope cancels again at every await. The cancellation is
    raised when the work has ended; an error of the work is logged then.
    """
    task = asyncio.create_task(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as cancelled:
            cancellation = cancelled
    if cancellation is None:
        return task.result()
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("A database session failed after its task was cancelled", exc_info=error)
    raise cancellation
