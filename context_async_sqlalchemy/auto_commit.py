"""How a context is settled: committed or rolled back."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy.commits import is_awaited
from context_async_sqlalchemy.context import DBSessionContext, current_context
from context_async_sqlalchemy.exceptions import CommitOutcomeUnknownError
from context_async_sqlalchemy.guards import is_in_use, says_connection_is_lost
from context_async_sqlalchemy.release import close_sessions, rollback_sessions
from context_async_sqlalchemy.shield import run_to_completion

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

    If there are several, all are flushed before any is committed. If a step fails, what is not
    committed is rolled back, and a note on the error names what is committed.

    Args:
        before_commit: Called with each session that is about to be committed. Default None.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    await settle(current_context(), commit=True, before_commit=before_commit)


async def rollback_all_sessions() -> None:
    """Roll back every open transaction of the context.

    A session that fails to roll back is logged, and its connection discarded.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    await settle(current_context(), commit=False)


async def close_all_sessions() -> None:
    """Close every session of the context, which rolls back what is still open.

    The context stays open: `db_session` makes new sessions.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    context = current_context()
    context.by_key.clear()
    await close_sessions(context.sessions)


def commit_after_response() -> None:
    """Settle the context of this request when the application has returned, not before.

    For a body that reads a server-side cursor which the handler opened. The price: the client may
    be told of a success that then fails to commit, and the connection is held until the last byte
    is sent and the background tasks have ended. The status still decides between commit and
    rollback. Outside of a request this does nothing.

    Raises:
        ContextNotInitiatedError: If there is no context.
        ContextClosedError: If it has ended.
    """
    current_context().settles_late = True


def is_success(status_code: int) -> bool:
    """Return whether a request with this status is committed by default: below 400."""
    return status_code < 400


async def finish(
    context: DBSessionContext, *, commit: bool, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Settle and end a context: every unit of work ends here."""
    try:
        if context.used:
            await settle(context, commit=commit, before_commit=before_commit)
    finally:
        await context.end()


async def abandon(context: DBSessionContext, error: BaseException) -> None:
    """Roll back and end a context whose work failed with `error`."""
    _explain(error)
    await finish(context, commit=False)


async def settle(
    context: DBSessionContext, *, commit: bool, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Commit or roll back what is open in a context now."""
    commits = context.commits
    if commits is None:
        await _settle(context, commit, before_commit)
        return
    is_unsettled = True
    while is_unsettled:
        try:
            with commits.hold():
                await _settle(context, commit, before_commit)
            commits.settle(commit)
        finally:
            has_run = await commits.run()
        # A callback may have written through a session that it has kept.
        is_unsettled = has_run and commit and bool(context.in_transaction())


async def commit_session(session: AsyncSession) -> None:
    """Commit a session.

    Raises:
        CommitOutcomeUnknownError: If the connection was lost during COMMIT.
    """
    try:
        if is_awaited(session):
            # Cancelled during COMMIT, nobody would know whether to run what waits for it.
            await run_to_completion(session.commit())
        else:
            await session.commit()
    except DBAPIError as error:
        if is_outcome_unknown(error):
            raise CommitOutcomeUnknownError from error
        raise


def is_outcome_unknown(error: DBAPIError) -> bool:
    """Return whether `error` tells of a connection that was lost, perhaps during COMMIT."""
    if error.statement is not None or isinstance(error, InterfaceError):
        # A statement of the flush failed; or the driver saw that the connection was closed
        # already, and sent nothing.
        return False
    # The server may say so before the driver notices the end of the connection.
    return error.connection_invalidated or says_connection_is_lost(error.orig)


async def _settle(
    context: DBSessionContext, commit: bool, before_commit: BeforeCommitCallback | None
) -> None:
    sessions = context.in_transaction()
    if not sessions:
        return
    if commit:
        await _commit(context, sessions, before_commit)
    else:
        await rollback_sessions(sessions)


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
            await run_to_completion(_commit_each(context, committed))
        else:
            # Nothing can be torn here: spare the task. If the only COMMIT is cancelled, nobody was
            # told that it succeeded, and SQLAlchemy discards the connection.
            await _commit_each(context, committed)
    except BaseException as error:
        _explain(error)
        if committed:
            names = ", ".join(_name(session) for session in committed)
            error.add_note(f"Already committed when this happened: {names}")
        await rollback_sessions(context.in_transaction())
        raise


async def _flush(sessions: list[AsyncSession]) -> None:
    # What can fail should fail before anything is durable. A single session flushes as it commits.
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


async def _commit_each(context: DBSessionContext, committed: list[AsyncSession]) -> None:
    # Ask the context each time: the commit of one may open another, or a transaction of its own.
    while waiting := [s for s in context.in_transaction() if s not in committed]:
        if is_in_use(waiting[0]):
            raise InvalidRequestError(_CONCURRENT_USE)
        await commit_session(waiting[0])
        committed.append(waiting[0])


def _name(session: AsyncSession) -> str:
    url = getattr(getattr(session, "bind", None), "url", None)
    return f"{url.host or ''}/{url.database}" if url is not None else repr(session)


def _explain(error: BaseException) -> None:
    if _is_concurrent_use(error) and _CONCURRENT_USE not in getattr(error, "__notes__", ()):
        error.add_note(_CONCURRENT_USE)


_CONCURRENT_USE = (
    "Two tasks use the database session of one context at the same time. Await every task before "
    "the response starts and before the context ends; for concurrent queries give each a context "
    "of its own with 'await run_in_new_ctx(f)', or a session with "
    "'async with new_non_ctx_session(connect):'."
)


def _is_concurrent_use(error: BaseException) -> bool:
    # SQLAlchemy's code for an "illegal state change" of a session; asyncpg has no code for it.
    return getattr(error, "code", None) == "isce" or (
        isinstance(error, InterfaceError) and "another operation is in progress" in str(error)
    )
