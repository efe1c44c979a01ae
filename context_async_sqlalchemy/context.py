"""The context: the sessions of a unit of work, and the context variable that points at them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from context_async_sqlalchemy.commits import CommitWatch
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.exceptions import (
    ContextAlreadyInitiatedError,
    ContextClosedError,
    ContextNotInitiatedError,
)
from context_async_sqlalchemy.release import (
    close_sessions,
    is_in_transaction,
    is_real,
    refuse_further_use,
)
from context_async_sqlalchemy.session_type import SessionT
from context_async_sqlalchemy.shield import logger


class DBSessionContext:
    """The sessions of one unit of work, shared by all its tasks.

    Attributes:
        by_key: The session that `db_session` returns for each connect, by `context_key`.
        sessions: Every session to settle and to close, in the order they were made. One that was
            closed or replaced by hand stays here: somebody may still hold it and use it.
        made: The sessions among them that `db_session` made: the context alone owns them.
        loop: The event loop that serves the request; None if the context is not a request's.
        locks: They make the creation of a connect's session single-flight, by `context_key`.
        is_test: Whether a test opened it, which then also settles it.
        closed: Whether it has ended.
        settled_mocks: Sessions that were settled, and never say that their transaction has ended.
        settles_late: Whether a request settles only when the application has returned.
        commits: Watches its commits, if anything asks about them.
        used: Whether there may be anything to settle.
        request: The method and the path of the request, if the context is a request's.
        token: Restores the context variable; None once the context has ended.
    """

    def __init__(self) -> None:
        self.by_key: dict[str, Any] = {}  # a session of the class that the connect makes
        self.sessions: list[AsyncSession] = []
        self.made: list[AsyncSession] = []
        self.settled_mocks: list[AsyncSession] = []
        self.locks: dict[str, asyncio.Lock] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_test = False
        self.closed = False
        self.settles_late = False
        self.commits: CommitWatch | None = None
        self.used = False
        self.request: tuple[str, str] | None = None
        self.token: Token[DBSessionContext | None] | None = None

    def put(self, context_key: str, session: AsyncSession) -> None:
        """Make `session` the session that `db_session` returns for a connect."""
        self.used = True
        self.by_key[context_key] = session
        if session not in self.sessions:
            self.sessions.append(session)
        if self.commits is not None:
            self.commits.watch(context_key, session)

    def pop(self, context_key: str) -> AsyncSession | None:
        """Take out the session of a connect; it belongs to the caller then."""
        session: AsyncSession | None = self.by_key.pop(context_key, None)
        # A session that the application settles itself (`DBSessionDependency`) is in no list.
        if session is not None and session not in self.by_key.values() and session in self.sessions:
            self.sessions.remove(session)
            if session in self.made:
                self.made.remove(session)
        return session

    def in_transaction(self) -> list[AsyncSession]:
        """Return the sessions with an open transaction, in the order they were made."""
        return [
            session
            for session in self.sessions
            if session not in self.settled_mocks and is_in_transaction(session)
        ]

    def note_settled(self) -> None:
        """Settle only what is begun from now on."""
        # A mock of a user's test says at any time that it is in a transaction: one that was rolled
        # back with a 404 would be committed when the body ends.
        self.settled_mocks = [
            session
            for session in self.sessions
            if is_in_transaction(session) and not is_real(session)
        ]

    def watch_commits(self) -> CommitWatch:
        """Watch the commits of every session from now on."""
        if self.commits is None:
            self.used = True
            self.commits = CommitWatch()
            for context_key, session in self.by_key.items():
                self.commits.watch(context_key, session)
        return self.commits

    def enter(self) -> None:
        """Make it the context of this task."""
        self.token = _context.set(self)

    def leave(self) -> None:
        """Restore the context variable; a context that is left can be ended by any task."""
        token, self.token = self.token, None
        if token is not None:
            _restore(token)

    async def end(self, with_close: bool = True) -> None:
        """Restore the context variable, refuse whatever comes later, close every session."""
        if self.closed:
            return
        self.closed = True
        try:
            if _context.get() is not self:
                await self._end_forgotten()
        finally:
            try:
                self.leave()
            finally:
                if self.used:
                    await self._end_sessions(with_close)

    async def _end_sessions(self, with_close: bool) -> None:
        sessions, self.sessions = self.sessions, []
        made, self.made = self.made, []
        self.by_key.clear()
        if with_close:
            for session in made:
                refuse_further_use(session)
            await close_sessions(sessions)
        if self.commits is not None:
            self.commits.stop()

    async def _end_forgotten(self) -> None:
        inside = next((c for c in contexts_here() if c.token and c.token.old_value is self), None)
        if inside is None:
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
    context.enter()
    return context


def _restore(token: Token[DBSessionContext | None]) -> None:
    try:
        _context.reset(token)
    except ValueError as error:
        raise RuntimeError(
            "This database session context was opened in another task (or with another "
            "contextvars.Context), and has been closed now. Open and end a context in the "
            "same task: use 'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'."
        ) from error


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


def contexts_here() -> Iterator[DBSessionContext]:
    """Yield the context of this task, then the context that it was opened in, and so on."""
    context = _context.get()
    while context is not None:
        yield context
        outer = context.token.old_value if context.token is not None else None
        context = outer if isinstance(outer, DBSessionContext) else None


def init_db_session_ctx(force: bool = False) -> Token[DBSessionContext | None]:
    """Open a context by hand; `reset_db_session_ctx` ends it.

    For a middleware of your own; elsewhere `new_db_session_ctx` does both.

    Args:
        force: Open it even inside another one, which is restored afterwards. Default False.

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
    """End the context that `init_db_session_ctx` opened, and restore the one before it.

    What is still uncommitted is rolled back: settle first, with `auto_commit_by_status_code`,
    `commit_all_sessions` or `rollback_all_sessions`.

    Args:
        token: What `init_db_session_ctx` returned.
        with_close: Whether to close the sessions. Default True. With False the caller closes them.

    Raises:
        ValueError: If the token is not that of the current context; nothing is closed then.
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


def get_db_session_from_context(connect: DBConnect[SessionT]) -> SessionT | None:
    """Return the context's session for `connect`; None if nothing has asked for it yet.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    session: SessionT | None = current_context().by_key.get(connect.context_key)
    return session


def put_db_session_to_context(connect: DBConnect, session: AsyncSession) -> None:
    """Make `session` the context's session for `connect`.

    The context settles and closes it, and the session that it replaces, too.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
        TypeError: If it is a sync `Session`.
    """
    if isinstance(session, Session):
        raise TypeError("a context holds AsyncSession objects, not sync Session ones")
    current_context().put(connect.context_key, session)


def pop_db_session_from_context(connect: DBConnect[SessionT]) -> SessionT | None:
    """Take the session for `connect` out of the context; the caller settles and closes it.

    Returns:
        The session, or None if there was none.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    return cast("SessionT | None", current_context().pop(connect.context_key))
