"""How a context is settled, its sessions committed or rolled back, and how a unit of work ends."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.border import given_session
from context_async_sqlalchemy._engine.commits import check_open_connections, has_one_commit
from context_async_sqlalchemy._engine.driver_errors import is_outcome_unknown
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.read_only import is_read_only
from context_async_sqlalchemy._engine.release import rollback_sessions
from context_async_sqlalchemy._engine.release_in_turn import connections_to_end
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy._unit.notes import name_of
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
    connections = connections_to_end(session)
    check_open_connections(connections)
    try:
        if not (is_one := has_one_commit(session, connections)):
            await session.flush()  # what may fail, or wait, comes before the first COMMIT
        if AWAITED in session.sync_session.info or not is_one:
            # Cancelled, one would lack the other, or nobody would know whether to run what waits.
            await run_to_completion(session.commit())
        else:
            await session.commit()
    except DBAPIError as error:
        if is_outcome_unknown(error) and not is_read_only(session):
            raise CommitOutcomeUnknownError from error
        raise


def _settle(
    context: DBSessionContext, commit: bool, before_commit: BeforeCommitCallback | None
) -> Coroutine[Any, Any, None]:
    sessions = context.in_transaction()
    if sessions and commit:
        return _commit(context, sessions, before_commit)
    return rollback_sessions(sessions)


async def _commit(
    context: DBSessionContext,
    sessions: list[AsyncSession],
    before_commit: BeforeCommitCallback | None,
) -> None:
    committed: list[AsyncSession] = []
    try:
        if context.note_commit():
            for _ in range(20):  # rounds of the loop: from task to task it takes two or three
                await asyncio.sleep(0)
        if before_commit is not None or len(sessions) > 1:
            for session in sessions:
                connections_to_end(session)  # before anything would wait for it
        if before_commit is not None:
            if len(sessions) > 1:
                await _flush(sessions)
            await _call_before_commit(context, before_commit)
            sessions = context.in_transaction()
        if len(sessions) > 1:
            await _flush(sessions)
        committing = _commit_each(context, sessions, committed)
        # A cancellation between two commits would leave one database without the other. Of the only
        # one, nobody was told that it has succeeded, and SQLAlchemy discards the connection.
        await (run_to_completion(committing) if len(sessions) > 1 else committing)
    except BaseException as error:
        if names := [name_of(session) for session in committed if not is_read_only(session)]:
            error.add_note(f"Already committed when this happened: {', '.join(names)}")
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
    while waiting := [s for s in context.in_transaction() if not (s in called or is_read_only(s))]:
        called.append(waiting[0])
        result = before_commit(given_session(waiting[0]))
        if inspect.isawaitable(result):
            await result


async def _commit_each(
    context: DBSessionContext, waiting: list[AsyncSession], committed: list[AsyncSession]
) -> None:
    while waiting:
        await commit_session(waiting[0])
        committed.append(waiting[0])
        # The commit of one may open another, or a transaction of its own.
        waiting = [s for s in context.in_transaction() if s not in committed]
