"""Whose turn it is to use a connection that is lent to many."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.private_names import await_only
from context_async_sqlalchemy._engine.release import connections_of
from context_async_sqlalchemy._testing.lent_connection import LentConnection
from context_async_sqlalchemy._unit.context import contexts_here


class Turns:
    """The turns on a connection, each from the first statement of a transaction to its end.

    A transaction waits for the end of the one before it, unless it begins inside that one.
    """

    def __init__(self, timeout: float) -> None:
        # With an open transaction, each inside the one before it. The last one has the turn.
        self.open: list[LentConnection] = []
        self.enclosing: AsyncSession | None = None  # inside whose transaction others may begin
        self.have_ended = False
        self._timeout = timeout
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Wake everything that waits for a turn."""
        self.have_ended = True
        self._notify()

    def begin(self, lent: LentConnection) -> None:
        """Give the turn to `lent`, which may begin."""
        # The driver prepares each distinct statement: use as few savepoint names as possible.
        lent.depth = self.open[-1].depth + 1 if self.open else 0
        self.open.append(lent)
        lent.has_begun = True
        _open_here.set((*(other for other in _open_here.get() if other in self.open), lent))

    def end(self, lent: LentConnection, and_inside: bool = False) -> None:
        """Give the turn back; with `and_inside`, also end those inside its transaction."""
        lent.has_begun = False
        if lent in self.open:
            index = self.open.index(lent)
            del self.open[index : None if and_inside else index + 1]
        self._notify()

    def has(self, lent: LentConnection) -> bool:
        """Return whether `lent` has the turn."""
        return bool(self.open) and self.open[-1] is lent

    # The next two are called inside SQLAlchemy's greenlet.

    def wait_to_begin(self) -> None:
        """Wait until another transaction may begin, or raise that it takes too long."""
        self._wait_until(self._may_begin)

    def wait_for(self, lent: LentConnection) -> None:
        """Wait until `lent` has the turn again, or its transaction has ended.

        It must not wait for a transaction that its own task has begun.
        """
        self._notify()  # those waiting to begin look again: its session has its connection by now
        if not self.has(lent) and self.open[-1] in _open_here.get():
            raise InvalidRequestError(_INTERLEAVED)
        self._wait_until(lambda: self.has(lent) or lent not in self.open)

    def _may_begin(self) -> bool:
        if not self.open:
            return True
        holder = self.open[-1]
        if holder.is_discarded:
            return False
        if holder in _open_here.get():
            return True
        # A context's session may have begun in a child task, as in a gather().
        sessions = [s for context in contexts_here() for s in context.sessions]
        if self.enclosing is not None:
            sessions.append(self.enclosing)
        return any(
            connection.connection.dbapi_connection is holder
            for session in sessions
            for connection in connections_of(session)
        )

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            await_only(self._wait(condition))

    async def _wait(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                while not (condition() or self.have_ended):
                    await self._changed.wait()
        except TimeoutError:
            raise InvalidRequestError(_NO_TURN.format(timeout=self._timeout)) from None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


# Those whose transaction was begun in this task, or in its parent task before it was created.
_open_here: ContextVar[tuple[LentConnection, ...]] = ContextVar("open_here", default=())

_INTERLEAVED = (
    "This task has begun another transaction on the connection of the test, and not ended it: end "
    "the inner one before going on with the outer one. In a test, all sessions share a connection."
)
_NO_TURN = (
    "Another session has had a transaction open on the connection of the test for more than "
    "{timeout} seconds. In a test, all sessions share a connection, and take turns: does the one "
    "that holds it wait for this one?"
)
