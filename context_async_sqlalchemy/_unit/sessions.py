"""The session of a context for a connect, made on the first call."""

import asyncio
from functools import partial
from typing import Any, overload

from sqlalchemy.ext.asyncio import AsyncSession

from context_async_sqlalchemy._engine.border import real_session, threshold_of
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.written import count_written
from context_async_sqlalchemy._unit.context import DBSessionContext, current_context
from context_async_sqlalchemy._unit.leak_detection import detect_leaks
from context_async_sqlalchemy._unit.read_only import ReadOnly, chosen
from context_async_sqlalchemy._unit.session_block import make_shared, share
from context_async_sqlalchemy._unit.single_flight import create_once, session_maker_at_hand
from context_async_sqlalchemy.connect import DBConnect


@overload
async def db_session(connect: DBConnect[SessionT]) -> SessionT: ...  # as an argument of run_sync()


@overload
async def db_session(connect: DBConnect[SessionT], *, read_only: ReadOnly) -> SessionT: ...


async def db_session(connect: DBConnect[SessionT], *, read_only: ReadOnly = None) -> SessionT:
    """Return the session of the context for `connect`, made on the first call.

    Every coroutine and child task of the context gets the same one. It is committed or rolled
    back, and closed, when the context ends.

    Args:
        connect: The database.
        read_only: True for a session that sends each SELECT without a transaction; "snapshot" for
            one read-only transaction. Default None: as the middleware says, or else False.

    Raises:
        ContextNotInitiatedError: If there is no context, or it has ended (`ContextClosedError`).
        RuntimeError: If the context is that of a request which another event loop serves, or if the
            connect's own `before_create_session_handler` asks.
    """
    context = current_context()
    if context.loop is not None and context.loop is not asyncio.get_running_loop():
        # Its connection would be the other loop's, and so useless to the middleware that commits.
        raise RuntimeError(
            "This event loop is not the one that serves the request whose database session is "
            "asked for. In a function that runs in a thread call 'anyio.from_thread.run(f)', not "
            "'asyncio.run(f())'; or open a context here, with 'async with new_db_session_ctx():'."
        )
    if read_only or context.read_only_methods:
        connect = await chosen(context, connect, read_only)
    session: SessionT | None = context.by_key.get(connect.context_key)
    if session is None:
        session = await create_session(context, connect)
    return session


async def create_session(
    context: DBSessionContext, connect: DBConnect[SessionT], endpoint: object = None
) -> SessionT:
    """Make the session of a context for `connect`, unless another task does so meanwhile.

    Leak detection names the endpoint that it is made for, or else the line that asks for it.
    """
    key = connect.context_key
    is_creating = context.locks is not None and key in context.locks
    make = session_maker_at_hand(connect) if not is_creating else None
    if make is None or key in context.by_key:
        put = partial(_put, context, connect, threshold_of(connect), endpoint)
        return await create_once(context, connect, put)
    session = make_shared(make)
    _put(context, connect, connect.leak_detection_threshold, endpoint, session)
    return session


def _put(
    context: DBSessionContext,
    connect: DBConnect[Any],
    threshold: float | None,
    endpoint: object,
    session: AsyncSession,
) -> None:
    share(session)
    if threshold is not None:
        detect_leaks(real_session(session), threshold, connect, context.request, endpoint)
    count_written(session)
    context.put(connect.context_key, session, is_made=True)
