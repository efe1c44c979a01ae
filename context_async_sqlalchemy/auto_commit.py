"""Settling a context by hand, for a middleware of your own."""

from context_async_sqlalchemy._engine.checks import check_before_commit
from context_async_sqlalchemy._engine.release import close_sessions
from context_async_sqlalchemy._unit.context import current_context
from context_async_sqlalchemy._unit.lost_work import tell_of_lost_work
from context_async_sqlalchemy._unit.settle import (
    BeforeCommitCallback as BeforeCommitCallback,
    is_success,
    settle,
)


async def auto_commit_by_status_code(
    status_code: int, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Commit the sessions of the context if `status_code` is below 400, else roll them back.

    Args:
        status_code: The HTTP status of the response.
        before_commit: As for `commit_all_sessions`. Default None.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
        TypeError: If `before_commit` is not callable.
    """
    check_before_commit(before_commit)
    context, commit = current_context(), is_success(status_code)
    if not commit or context.rolls_back:
        tell_of_lost_work(context, status_code)
    await settle(context, commit=commit, before_commit=before_commit)


async def commit_all_sessions(before_commit: BeforeCommitCallback | None = None) -> None:
    """Commit every open transaction of the context, in the order the sessions were made.

    If there are several, all are flushed before any is committed. If a step fails, what is not
    committed is rolled back, and a note on the error names what is committed.

    Args:
        before_commit: Called with each session that is about to be committed. Default None.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
        TypeError: If `before_commit` is not callable.
    """
    check_before_commit(before_commit)
    await settle(current_context(), commit=True, before_commit=before_commit)


async def rollback_all_sessions() -> None:
    """Roll back every open transaction of the context.

    A session that fails to roll back is logged, and its connection discarded.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    await settle(current_context(), commit=False)


async def close_all_sessions() -> None:
    """Close every session of the context, which rolls back what is still open.

    The context stays open: `db_session` makes new sessions.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    context.by_key.clear()
    await close_sessions(context.sessions)


def commit_after_response() -> None:
    """Settle the context of this request when the application has returned, not before.

    For a body that reads a server-side cursor which the handler opened. The price: the client may
    be told of a success that then fails to commit, and the connection is held until the last byte
    is sent and the background tasks have ended. The status still decides between commit and
    rollback. Outside of a request of this library's middleware it does nothing.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    current_context().settles_late = True


def roll_back_this_request() -> None:
    """Let this request be rolled back, whatever its status, and whatever `commit_on` says.

    For what answers an error with 200, as GraphQL, JSON-RPC and MCP do. It ends nothing now. All
    that the context would commit from now on is rolled back: before the response starts, at the end
    of a streamed body, after a background task, by `commit_all_sessions`. What is committed already
    stays. In a block of `new_db_session_ctx`, it is that block which is rolled back. A test's own
    context (`set_test_context`) takes no notice, as of a status.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
    """
    context = current_context()
    if not context.is_test:
        context.rolls_back = True
