"""A context: the sessions of one unit of work, and the context variable that points at it."""

import asyncio
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.border import given_session, real_session, settle_once
from context_async_sqlalchemy._engine.commits import check_commits_of, check_open_connections
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.release import (
    close_at_once,
    close_sessions,
    closes_at_once,
    connections_of,
    has_objects,
    refuse_further_use,
)
from context_async_sqlalchemy.exceptions import ContextClosedError, ContextNotInitiatedError

if TYPE_CHECKING:
    from context_async_sqlalchemy._unit.on_commit import CommitWatch


class _Held(NamedTuple):
    session: AsyncSession  # to be settled and closed
    is_made: bool  # by `db_session`: the context alone owns it
    in_transaction: Callable[[], bool]


class DBSessionContext:
    """The sessions of one unit of work, shared by all its tasks."""

    request: tuple[str, str] | None = None  # its method and path
    read_only_methods: frozenset[str] = frozenset()  # of the middleware that opened it

    def __init__(self) -> None:
        # Not of the class: Python stores an attribute that its class has, too, in a slow way.
        self.by_key: dict[str, Any] = {}  # what `db_session` returns, by `context_key`
        # In the order they were made. A session that was closed or replaced by hand stays here:
        # somebody may still hold it and use it.
        self.held: tuple[_Held, ...] = ()
        self.commits: CommitWatch | None = None  # watches them, if anything asks about them
        self.closed = False
        self.token: Token[DBSessionContext | None] | None = None  # restores the context variable
        self.loop: asyncio.AbstractEventLoop | None = None  # that serves its request
        self.is_test = False  # a test opened it, and settles it
        self.settles_late = False  # when the application has returned, not before
        self.rolls_back = False  # whatever it would be settled with
        self.locks: dict[str, asyncio.Lock] | None = None  # of the sessions that are made now

    @property
    def sessions(self) -> list[AsyncSession]:
        """Every session to settle and to close, in the order they were made."""
        return [held.session for held in self.held]

    @property
    def name(self) -> str:
        """The request, for a log; without its query, which may be secret."""
        # The client chooses the path, and may put line breaks into it: a repr has none.
        return f"{self.request[0]} {self.request[1]!r}" if self.request else "outside of a request"

    def is_settled(self) -> bool:
        """Return whether there is nothing to commit or roll back, and no callback that waits."""
        if self.commits is not None:
            return False
        for held in self.held:  # noqa: SIM110  # a generator costs twice as much
            if held.in_transaction():
                return False
        return True

    def in_transaction(self) -> list[AsyncSession]:
        """Return the sessions with an open transaction, in the order they were made."""
        return [held.session for held in self.held if held.in_transaction()]

    def put(self, context_key: str, session: AsyncSession, is_made: bool = False) -> None:
        """Make `session` the session that `db_session` returns for a connect."""
        self.by_key[context_key] = session
        if not self.held or all(given_session(h.session) is not session for h in self.held):
            real = real_session(session)
            check_commits_of(real)
            if not is_made:
                check_open_connections(connections_of(real))
            # That of the stand-in for a mock, or else what the AsyncSession would call.
            asked = real.sync_session if real is session else real
            if asked is real and self.request is not None:
                settle_once(real)
            self.held += (_Held(real, is_made, asked.in_transaction),)
        if self.commits is not None:
            self.commits.watch(context_key, session)

    def pop(self, context_key: str) -> AsyncSession | None:
        """Take out the session of a connect; it belongs to the caller then."""
        session: AsyncSession | None = self.by_key.pop(context_key, None)
        if session is not None and session not in self.by_key.values():
            self.held = tuple(h for h in self.held if given_session(h.session) is not session)
        return session

    def note_commit(self) -> bool:
        """Note that a commit begins; return whether it is about to be cancelled."""
        return False

    def enter(self) -> None:
        """Make it the context of this task."""
        self.token = _context.set(self)

    def leave(self) -> None:
        """Restore the context variable; a context that is left can be ended by any task."""
        token, self.token = self.token, None
        try:
            if token is not None:
                _context.reset(token)
        except ValueError as error:
            raise RuntimeError(
                "This database session context was opened in another task (or with another "
                "contextvars.Context), and has been closed now. Open and end a context in the "
                "same task: use 'async with new_db_session_ctx():' or 'await run_in_new_ctx(f)'."
            ) from error

    def end_at_once(self) -> bool:
        """End it if there is nothing to wait for, as after most requests; return whether it has."""
        if self.closed:
            return True
        if self.commits is not None or _context.get() is not self:
            return False
        for held in self.held:
            if not closes_at_once(held.session):
                return False
        self.closed = True
        self.leave()
        for held in self.held:
            if held.is_made:
                refuse_further_use(held.session)
            if has_objects(held.session) or not held.is_made:
                close_at_once(held.session)
        self.held = ()
        self.by_key.clear()
        return True

    async def end(self, with_close: bool = True) -> None:
        """Restore the context variable; close every session and refuse what comes later, or not."""
        if self.closed or (with_close and self.end_at_once()):
            return
        self.closed = True
        try:
            if _context.get() is not self:
                await self._end_forgotten()
        finally:
            try:
                self.leave()
            finally:
                if self.held or self.commits is not None:
                    await self._end_sessions(with_close)

    async def close_made(self) -> None:
        """Close the sessions that `db_session` made."""
        await close_sessions([held.session for held in self.held if held.is_made])

    async def _end_sessions(self, with_close: bool) -> None:
        every, self.held = self.held, ()
        self.by_key.clear()
        if with_close:
            for held in every:
                if held.is_made:
                    refuse_further_use(held.session)
            await close_sessions([held.session for held in every])
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


def current_context() -> DBSessionContext:
    """Return the context of this task, or raise the error that there is none, or it has ended."""
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


def is_test_context() -> bool:
    """Return whether the context here is open and belongs to a test (`set_test_context`)."""
    context = _context.get()
    return context is not None and context.is_test and not context.closed
