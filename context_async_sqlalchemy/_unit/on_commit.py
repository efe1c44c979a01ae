"""What runs once a transaction has really been committed, and whether work is durable."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from context_async_sqlalchemy._engine.border import real_session
from context_async_sqlalchemy._engine.commits import note_commits
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import await_only, has_connections, is_committed
from context_async_sqlalchemy._engine.read_only import is_read_only
from context_async_sqlalchemy._engine.release import connections_of, rollback_sessions
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._unit.blocks import new_db_session_ctx
from context_async_sqlalchemy._unit.context import (
    DBSessionContext,
    current_context,
    is_test_context,
)
from context_async_sqlalchemy._unit.settle import AWAITED
from context_async_sqlalchemy.connect import DBConnect

Run: TypeAlias = Callable[[], Awaitable[None]]
"""Runs after a commit; does not raise."""


def on_commit(connect: DBConnect, callback: Callable[[], Awaitable[object] | object]) -> None:
    """Call a function once the open transaction of the context's session is committed.

    The commit waits for the callback, which runs when the connection is back in the pool, in a
    context of its own: what it writes through `db_session` is another transaction. It is not called
    if the transaction, or the savepoint that is open now, is rolled back, or if nobody can know
    whether it was committed. If no transaction is open, the callback waits for the next one; if
    none comes, it is called when the context is settled with a commit.

        on_commit(connect, partial(send_welcome_mail, user.email))

    Callbacks are called in order. The error of one is logged, and stops neither the others nor the
    response. A cancellation waits until all have been called.

    Args:
        connect: The database.
        callback: A function without parameters, async or not.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
        TypeError: If `callback` is not callable.
    """
    if not callable(callback):
        if inspect.iscoroutine(callback):
            callback.close()
        raise TypeError(
            f"callback must be a function, not {type(callback).__name__}: it is called later, "
            "without arguments; functools.partial(function, argument) gives it some"
        )
    context, key = current_context(), connect.context_key

    async def run() -> None:
        try:
            # In a test's context: the test looks at what the callback writes, and undoes it.
            async with nullcontext() if is_test_context() else new_db_session_ctx():
                result = callback()
                if inspect.isawaitable(result):
                    await result
        except (Exception, asyncio.CancelledError):
            logger.exception("A callback of on_commit failed: %s", _name(callback))
            # It may have begun a transaction on the session that was just committed.
            given = context.by_key.get(key)
            if given is not None and (session := real_session(given)).in_transaction():
                await rollback_sessions([session])

    watch_commits(context).after_commit(key, context.by_key.get(key), run)


def watch_commits(context: DBSessionContext) -> CommitWatch:
    """Watch the commits of every session of a context from now on."""
    if context.commits is None:
        context.commits = CommitWatch()
        for context_key, session in context.by_key.items():
            context.commits.watch(context_key, session)
    return context.commits


def _name(callback: object) -> str:
    # Not its repr: a partial's shows the arguments, which may be secret.
    function = getattr(callback, "func", callback)
    return getattr(function, "__qualname__", type(function).__name__)


@dataclass
class _Waiting:
    """A call that waits for the commit of a transaction; if that is None, of the next one."""

    run: Run
    context_key: str
    transaction: SessionTransaction | None


class CommitWatch:
    """Watches the transactions of a context's sessions."""

    def __init__(self) -> None:
        # A part of the work is durable, or may be: a COMMIT was sent and not refused, or a callback
        # has run.
        self.durable = False
        self._keys: dict[Session, str] = {}
        self._committing: list[SessionTransaction] = []
        self._waiting: list[_Waiting] = []
        self._ready: list[Run] = []
        self._is_holding = False

    def watch(self, context_key: str, session: AsyncSession) -> None:
        """Watch a session from now on."""
        session = real_session(session)
        sync_session = session.sync_session
        if is_read_only(session):
            return  # nothing of it is durable, though AUTOCOMMIT looks like it
        if sync_session not in self._keys:
            transaction = sync_session.get_transaction()
            if transaction is not None and is_committed(transaction):
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
        transaction = None
        if session is not None:
            sync_session = real_session(session).sync_session
            if sync_session in self._keys:
                transaction = (
                    sync_session.get_nested_transaction() or sync_session.get_transaction()
                )
            sync_session.info[AWAITED] = True
        self._waiting.append(_Waiting(run, context_key, transaction))

    async def settle(
        self,
        context: DBSessionContext,
        commit: bool,
        settle: Callable[[DBSessionContext, bool], Awaitable[None]],
    ) -> None:
        """Settle a context by `settle`, and run what has waited for its commits."""
        is_unsettled = True
        while is_unsettled:
            try:
                # Run between the commits of several databases, it would widen the gap between them.
                self._is_holding = True
                try:
                    await settle(context, commit)
                finally:
                    self._is_holding = False
                if commit:
                    self._ready += [w.run for w in self._waiting if w.transaction is None]
                self._drop(None)
            finally:
                has_run = await self._run()
            # A callback may have written through a session that it has kept.
            is_unsettled = has_run and commit and bool(context.in_transaction())

    async def _run(self) -> bool:
        """Run what is ready, in order, even under cancellation; return whether there was any."""
        ready, self._ready = self._ready, []
        if ready:
            self.durable = True
            await run_to_completion(_run_each(ready))
        return bool(ready)

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
                    session.info[AWAITED] = True

    def _on_commit(self, session: Session) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        assert transaction is not None
        self._committing.append(transaction)
        if transaction.parent is None and has_connections(transaction):
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
            await_only(self._run())

    def _drop(self, transaction: SessionTransaction | None) -> None:
        self._waiting = [w for w in self._waiting if w.transaction is not transaction]


def _enclosing(transaction: SessionTransaction) -> SessionTransaction | None:
    parent = transaction.parent
    while parent is not None and not parent.nested and parent.parent is not None:
        parent = parent.parent  # the transaction of a flush, which ends by itself
    return parent


async def _run_each(ready: list[Run]) -> None:
    for run in ready:
        await run()
