"""How a context is settled, its sessions committed or rolled back, and how a unit of work ends."""

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.border import given_session
from context_async_sqlalchemy._engine.commits import check_open_connections
from context_async_sqlalchemy._engine.driver_errors import is_concurrent_use, is_outcome_unknown
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.release import is_in_use, rollback_sessions
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy.exceptions import CommitOutcomeUnknownError

BeforeCommitCallback: TypeAlias = Callable[[AsyncSession], Awaitable[None] | None]
"""Called with each session about to be committed automatically; may be a plain function."""

AWAITED = "context_async_sqlalchemy.awaited"
"""In the `info` of a session for whose commit something has waited."""


def is_success(status_code: int) -> bool:
    """Return whether a request with this status is committed by default: below 400."""
    return status_code < 400


async def finish(
    context: DBSessionContext, *, commit: bool, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Settle and end a context: every one that is not ended by hand ends here."""
    try:
        if not context.is_settled():
            await settle(context, commit=commit, before_commit=before_commit)
    finally:
        await context.end()


async def abandon(
    context: DBSessionContext, error: BaseException, *, has_answered: bool = False
) -> None:
    """Roll back and end a context whose work failed with `error`, perhaps after its answer."""
    _explain(error)
    if has_answered and context.in_transaction():
        # The error is the server's to log, and says nothing of what had gone well before it.
        logger.warning(
            "A request failed after its response had started (%s): what is not committed, such as "
            "the work of an earlier background task, is rolled back.",
            context.name,
        )
    await finish(context, commit=False)


def settle(
    context: DBSessionContext, *, commit: bool, before_commit: BeforeCommitCallback | None = None
) -> Coroutine[Any, Any, None]:
    """Commit or roll back what is open in a context now."""
    commit = commit and not context.rolls_back
    if context.commits is None:
        return _settle(context, commit, before_commit)
    return context.commits.settle(context, commit, partial(_settle, before_commit=before_commit))


async def commit_session(session: AsyncSession) -> None:
    """Commit a session; if its connection is lost meanwhile, nobody can know the outcome."""
    if not (session.sync_session.autobegin or session.in_transaction()):
        return  # the application has committed, and SQLAlchemy would refuse
    check_open_connections(session)
    try:
        if AWAITED in session.info:
            # Cancelled during COMMIT, nobody would know whether to run what waits for it.
            await run_to_completion(session.commit())
        else:
            await session.commit()
    except DBAPIError as error:
        if is_outcome_unknown(error):
            raise CommitOutcomeUnknownError from error
        raise


async def _settle(
    context: DBSessionContext, commit: bool, before_commit: BeforeCommitCallback | None
) -> None:
    sessions = context.in_transaction()
    if sessions and commit:
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
        if before_commit is not None:
            if len(sessions) > 1:
                await _flush(sessions)
            await _call_before_commit(context, before_commit)
            sessions = context.in_transaction()
        if len(sessions) > 1:
            await _flush(sessions)
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
    for session in sessions:
        await session.flush()


async def _call_before_commit(
    context: DBSessionContext, before_commit: BeforeCommitCallback
) -> None:
    called: list[AsyncSession] = []
    # Ask the context each time: the callback may open further sessions, or end a transaction.
    while waiting := [s for s in context.in_transaction() if s not in called]:
        called.append(waiting[0])
        result = before_commit(given_session(waiting[0]))
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
    if is_concurrent_use(error):
        note_once(error, _CONCURRENT_USE)


def note_once(error: BaseException, note: str) -> None:
    """Add a note to an error that may pass here again."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


_CONCURRENT_USE = (
    "Two tasks use the database session of one context at the same time. Await every task before "
    "the response starts and before the context ends; for concurrent queries give each a context "
    "of its own with 'await run_in_new_ctx(f)', or a session with "
    "'async with new_non_ctx_session(connect):'."
)
