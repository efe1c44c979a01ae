"""Callbacks that are called once a transaction has really been committed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import current_context, is_test_context
from context_async_sqlalchemy.release import is_in_transaction, rollback_sessions
from context_async_sqlalchemy.run_in_new_context import new_db_session_ctx
from context_async_sqlalchemy.shield import logger


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
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
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
            session = context.by_key.get(key)
            if session is not None and is_in_transaction(session):
                await rollback_sessions([session])

    context.watch_commits().after_commit(key, context.by_key.get(key), run)


def _name(callback: object) -> str:
    # Not its repr: a partial's shows the arguments, which may be secret.
    function = getattr(callback, "func", callback)
    return getattr(function, "__qualname__", type(function).__name__)
