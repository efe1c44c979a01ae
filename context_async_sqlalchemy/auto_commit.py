"""How a context is settled: committed or rolled back."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy.context import (
    DBSessionContext,
    current_context,
    invalidate,
    logger,
    run_to_completion,
)

BeforeCommitCallback: TypeAlias = Callable[[AsyncSession], Awaitable[None] | None]
"""Called with each session about to be committed automatically; may be a plain function."""


async def auto_commit_by_status_code(
    status_code: int, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Commit the sessions of the context if `status_code` is below 400, else roll them back.

    Args:
        status_code: The HTTP status of the response.
        before_commit: As for `commit_all_sessions`. Default None.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    await settle(current_context(), commit=is_success(status_code), before_commit=before_commit)


async def commit_all_sessions(before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit every open transaction of the context, in the order the sessions were made.

    With more than one, all are flushed before any is committed. If a step fails, what is not
    committed is rolled back, and a note on the error names what had been.

    Args:
        before_commit: Called with each session that is about to be committed. Default None.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    await settle(current_context(), commit=True, before_commit=before_commit)


async def rollback_all_sessions() -> None:
    """Roll back every open transaction of the context.

    A session that fails to roll back is logged, and its connection invalidated.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    await settle(current_context(), commit=False)


async def close_all_sessions() -> None:
    """Close every session of the context, which rolls back what is still open.

    The context stays open: `db_session` makes a new session.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    await current_context().close_sessions()


def is_success(status_code: int) -> bool:
    """Return whether a response with this status is committed by default: if it is below 400."""
    return status_code < 400


async def finish(
    context: DBSessionContext, *, commit: bool, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Settle and end a context: every unit of work ends here."""
    try:
        if context.sessions:
            await settle(context, commit=commit, before_commit=before_commit)
    finally:
        await context.end()


async def settle(
    context: DBSessionContext, *, commit: bool, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Commit or roll back what is open in a context now."""
    sessions = context.in_transaction()
    if not sessions:
        return
    if commit:
        await _commit(context, sessions, before_commit)
    else:
        await rollback_sessions(sessions)


async def rollback_sessions(sessions: list[AsyncSession]) -> None:
    """Roll back all of `sessions`, even under cancellation and when one of them fails."""
    if sessions:
        await run_to_completion(_rollback_each(sessions))


async def _commit(
    context: DBSessionContext,
    sessions: list[AsyncSession],
    before_commit: BeforeCommitCallback | None,
) -> None:
    committed: list[AsyncSession] = []
    try:
        await _flush(sessions)
        if before_commit is not None:
            await _call_before_commit(context, before_commit)
            sessions = context.in_transaction()
            await _flush(sessions)
        if len(sessions) > 1:
            # A cancellation between two commits would leave one database without the other.
            await run_to_completion(_commit_each(sessions, committed))
        else:
            # Nothing can be torn here: spare the task. Whoever is cancelled during its only COMMIT
            # has told nobody that it succeeded, and SQLAlchemy discards the connection.
            await _commit_each(sessions, committed)
    except BaseException as error:
        if committed:
            names = ", ".join(_name(session) for session in committed)
            error.add_note(f"Already committed when this happened: {names}")
        await rollback_sessions(context.in_transaction())
        raise


async def _flush(sessions: list[AsyncSession]) -> None:
    # What can fail shall fail before anything is durable. A single session flushes as it commits.
    if len(sessions) > 1:
        for session in sessions:
            await session.flush()


async def _call_before_commit(
    context: DBSessionContext, before_commit: BeforeCommitCallback
) -> None:
    called: list[AsyncSession] = []
    # Ask the context each time: the callback may open further sessions, or end a transaction.
    while waiting := [s for s in context.in_transaction() if s not in called]:
        called.append(waiting[0])
        result = before_commit(waiting[0])
        if inspect.isawaitable(result):
            await result


async def _commit_each(sessions: list[AsyncSession], committed: list[AsyncSession]) -> None:
    for session in sessions:
        await session.commit()
        committed.append(session)


async def _rollback_each(sessions: list[AsyncSession]) -> None:
    for session in sessions:
        try:
            await session.rollback()
        except Exception:
            logger.exception(
                "A database session failed to roll back; its connection is invalidated"
            )
            await invalidate(session)


def _name(session: AsyncSession) -> str:
    url = getattr(getattr(session, "bind", None), "url", None)
    return f"{url.host or ''}/{url.database}" if url is not None else repr(session)
