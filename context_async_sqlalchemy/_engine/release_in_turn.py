"""Rolling back and closing a session that other tasks may be inside of: it waits for them."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from sqlalchemy import Connection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.release import (
    close_sessions,
    connections_of,
    is_in_use,
    rollback_sessions,
)
from context_async_sqlalchemy._engine.shield import run_to_completion
from context_async_sqlalchemy._engine.turns import has_turn, turn_of

_Release: TypeAlias = Callable[[Sequence[AsyncSession]], Awaitable[None]]


def connections_to_end(session: AsyncSession) -> list[Connection]:
    """Return the connections of a session whose transaction is about to end; let no task be inside.

    Raises:
        InvalidRequestError: If one is.
    """
    connections = connections_of(session)
    if is_in_use(session, connections):
        raise InvalidRequestError(_IN_USE)
    return connections


async def rollback_in_turn(session: AsyncSession) -> None:
    """Roll back a session as `rollback_sessions` does, once no other task is inside of it."""
    await _in_turn(session, rollback_sessions)


async def close_in_turn(session: AsyncSession) -> None:
    """Close a session as `close_sessions` does, once no other task is inside of it."""
    await _in_turn(session, close_sessions)


async def _in_turn(session: AsyncSession, release: _Release) -> None:
    if has_turn(session.sync_session):
        await release([session])
    else:
        await run_to_completion(_wait_and_release(session, release))


async def _wait_and_release(session: AsyncSession, release: _Release) -> None:
    try:
        async with turn_of(session):
            await release([session])
    except InvalidRequestError:  # a block takes too long, or waits for this task
        await release([session])


_IN_USE = (
    "A task still uses the database session of this context, or waits for its turn. Await every "
    "task before the response starts and before the context ends, or give it a context of its own "
    "with 'await run_in_new_ctx(f)', or a session with 'async with new_non_ctx_session(connect):'."
)
