"""The commits of a context, watched: what was made durable, and what is to run then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from context_async_sqlalchemy.shield import run_to_completion

Run: TypeAlias = Callable[[], Awaitable[None]]
"""What runs after a commit; does not raise."""


@dataclass
class _Waiting:
    """What runs once a transaction, or the next one of a connect, is committed."""

    run: Run
    context_key: str
    transaction: SessionTransaction | None


class CommitWatch:
    """Watches the transactions of a context's sessions.

    Attributes:
        committed: Whether any of it is durable: a transaction that had a connection was committed.
    """

    def __init__(self) -> None:
        self.committed = False
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
            event.listen(sync_session, "after_transaction_create", self._on_begin)
            event.listen(sync_session, "after_commit", self._on_commit)
            event.listen(sync_session, "after_transaction_end", self._on_end)
        self._keys[sync_session] = context_key

    def after_commit(self, context_key: str, session: AsyncSession | None, run: Run) -> None:
        """Run something once the transaction that is open now is committed, or else the next one.

        Should none begin until the context is settled, that counts as the commit.
        """
        sync_session = getattr(session, "sync_session", None)
        transaction = None
        if isinstance(sync_session, Session):
            transaction = sync_session.get_nested_transaction() or sync_session.get_transaction()
            _awaited.add(sync_session)
        self._waiting.append(_Waiting(run, context_key, transaction))

    @contextmanager
    def hold(self) -> Generator[None]:
        """Let what becomes ready wait for `run`."""
        # Between the commits of several databases it would widen the gap.
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False

    async def run(self) -> None:
        """Run what is ready, in order, even under cancellation."""
        ready, self._ready = self._ready, []
        if ready:
            await run_to_completion(_run_each(ready))

    def settle(self, commit: bool) -> None:
        """Make ready, or drop, what waits for a transaction that has not begun."""
        if commit:
            self._ready += [w.run for w in self._waiting if w.transaction is None]
        self._drop(None)

    def _on_begin(self, session: Session, transaction: SessionTransaction) -> None:
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
            self.committed = True

    def _on_end(self, _: Session, transaction: SessionTransaction) -> None:
        # Not before its end, when the connection is given back.
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
    """Return whether something may wait for the commit of this session."""
    return getattr(session, "sync_session", None) in _awaited


def _enclosing(transaction: SessionTransaction) -> SessionTransaction | None:
    parent = transaction.parent
    while parent is not None and not parent.nested and parent.parent is not None:
        parent = parent.parent  # that of a flush, which ends by itself
    return parent


async def _run_each(ready: list[Run]) -> None:
    for run in ready:
        await run()


_awaited: WeakSet[Session] = WeakSet()
