"""Contexts by hand, for a middleware of your own."""

from contextvars import Token
from typing import cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._unit.context import (
    DBSessionContext,
    contexts_here,
    current_context,
    open_context,
)
from context_async_sqlalchemy._unit.read_only import key_of
from context_async_sqlalchemy._unit.session_block import share
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.exceptions import (
    ContextAlreadyInitiatedError as ContextAlreadyInitiatedError,
    ContextClosedError as ContextClosedError,
    ContextNotInitiatedError as ContextNotInitiatedError,
)


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
    context = next(contexts_here(), None)
    return context is not None and not context.closed


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
    context = next(contexts_here(), None)
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
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    session: SessionT | None = context.by_key.get(key_of(context, connect))
    return session


def put_db_session_to_context(connect: DBConnect, session: AsyncSession) -> None:
    """Make `session` the context's session for `connect`.

    The context settles and closes it, and the session that it replaces, too.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
        TypeError: If it is a sync `Session`.
    """
    if isinstance(session, Session):
        raise TypeError("a context holds AsyncSession objects, not sync Session ones")
    context = current_context()
    share(session)
    context.put(connect.context_key, session)


def pop_db_session_from_context(connect: DBConnect[SessionT]) -> SessionT | None:
    """Take the session for `connect` out of the context; the caller settles and closes it.

    Returns:
        The session, or None if there was none.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    return cast("SessionT | None", context.pop(key_of(context, connect)))
