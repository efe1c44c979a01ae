"""The commits of a context, watched: whether work is durable, and what to run after them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.util import await_only

from context_async_sqlalchemy.guards import connections_of, note_commits
from context_async_sqlalchemy.shield import run_to_completion

Run: TypeAlias = Callable[[], Awaitable[None]]
"""Runs after a commit; does not raise."""


@dataclass
class _Waiting:
    """A call that waits for the commit of a transaction; if that is None, of the next one."""

    run: Run
    context_key: str
    transaction: SessionTransaction | None


class CommitWatch:
    """Watches the transactions of a context's sessions.

    Attributes:
        durable: Whether a part of the work is durable, or may be: a COMMIT was sent and not
            refused, or a callback has run.
    """

    def __init__(self) -> None:
        self.durable = False
        self._keys: dict[Session, str] = {}
        self._committing: list[SessionTransaction] = []
        self._waiting: list[_Waiting] = []
        self._ready: list[Run] = []
        self._is_holding = False

    def watch(self, context_key: str, session: AsyncSession) -> None:
        """Watch a session from now on."""
        sync_session = getattr(session, "sync_session", None)
        if not isinstance(sync_session, Session):
            return  # users' tests pass mocks
        if sync_session not in self._keys:
            if _is_committed(sync_session.get_transaction()):
                return  # called by a listener: SQLAlchemy accepts no other one just now
            for name, listener in self._listeners():
                event.listen(sync_session, name, listener)
            for connection in connections_of(session):
                note_commits(connection, self)
        self._keys[sync_session] = context_key

    def stop(self) -> None:
        """Stop watching the sessions, but for those whose commit something still waits for."""
        awaited = {w.transaction.session for w in self._waiting if w.transaction is not None}
        for session in self._keys.keys() - awaited:
            del self._keys[session]
            for name, listener in self._listeners():
                event.remove(session, name, listener)

    def after_commit(self, context_key: str, session: AsyncSession | None, run: Run) -> None:
        """Call `run` once the open transaction is committed; without one, after the next one.

        If none begins before the context is settled, the settling counts as the commit.
        """
        sync_session = getattr(session, "sync_session", None)
        transaction = None
        if isinstance(sync_session, Session):
            transaction = sync_session.get_nested_transaction() or sync_session.get_transaction()
            if sync_session not in self._keys:
                transaction = None
            _awaited.add(sync_session)
        self._waiting.append(_Waiting(run, context_key, transaction))

    @contextmanager
    def hold(self) -> Generator[None]:
        """Let what becomes ready in this block wait until `run` is called."""
        # Run between the commits of several databases, it would widen the gap between them.
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False

    async def run(self) -> bool:
        """Run what is ready, in order, even under cancellation; return whether there was any."""
        ready, self._ready = self._ready, []
        if ready:
            self.durable = True
            await run_to_completion(_run_each(ready))
        return bool(ready)

    def settle(self, commit: bool) -> None:
        """Make ready, or drop, what waits for a transaction that has not begun."""
        if commit:
            self._ready += [w.run for w in self._waiting if w.transaction is None]
        self._drop(None)

    def _listeners(self) -> list[tuple[str, Callable[..., None]]]:
        return [
            ("after_transaction_create", self._on_create),
            ("after_begin", self._on_begin),
            ("after_commit", self._on_commit),
            ("after_transaction_end", self._on_end),
        ]

    def _on_begin(self, _: Session, __: SessionTransaction, connection: Connection) -> None:
        note_commits(connection, self)

    def _on_create(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            for waiting in self._waiting:
                if waiting.transaction is None and waiting.context_key == self._keys[session]:
                    waiting.transaction = transaction
                    _awaited.add(session)

    def _on_commit(self, session: Session) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        assert transaction is not None
        self._committing.append(transaction)
        if transaction.parent is None and transaction._connections:
            self.durable = True

    def _on_end(self, _: Session, transaction: SessionTransaction) -> None:
        # What is ready runs at the end of the transaction, not in its commit: only then the
        # connection is back in the pool.
        if transaction not in self._committing:
            self._drop(transaction)
            return
        self._committing.remove(transaction)
        enclosing = _enclosing(transaction)
        if enclosing is not None:
            for waiting in self._waiting:
                if waiting.transaction is transaction:
                    waiting.transaction = enclosing
            return
        self._ready += [w.run for w in self._waiting if w.transaction is transaction]
        self._drop(transaction)
        if self._ready and not self._is_holding:
            await_only(self.run())

    def _drop(self, transaction: SessionTransaction | None) -> None:
        self._waiting = [w for w in self._waiting if w.transaction is not transaction]


def is_awaited(session: AsyncSession) -> bool:
    """Return whether something may be waiting for the commit of this session."""
    return getattr(session, "sync_session", None) in _awaited


def _is_committed(transaction: SessionTransaction | None) -> bool:
    return transaction is not None and transaction._state is SessionTransactionState.COMMITTED


def _enclosing(transaction: SessionTransaction) -> SessionTransaction | None:
    parent = transaction.parent
    while parent is not None and not parent.nested and parent.parent is not None:
        parent = parent.parent  # the transaction of a flush, which ends by itself
    return parent


async def _run_each(ready: list[Run]) -> None:
    for run in ready:
        await run()


_awaited: WeakSet[Session] = WeakSet()
