"""The session of a context for a connect, made on the first call."""

import asyncio
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from context_async_sqlalchemy._engine.border import real_session, threshold_of
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.written import count_written
from context_async_sqlalchemy._unit.context import DBSessionContext, current_context
from context_async_sqlalchemy._unit.leak_detection import detect_leaks
from context_async_sqlalchemy._unit.session_block import leave_open
from context_async_sqlalchemy._unit.single_flight import create_once
from context_async_sqlalchemy.connect import DBConnect


async def db_session(connect: DBConnect[SessionT]) -> SessionT:
    """Return the session of the context for `connect`, made on the first call.

    Every coroutine and child task of the context gets the same one. It is committed or rolled
    back, and closed, when the context ends.

    Args:
        connect: The database.

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
    make = _session_maker_at_hand(connect) if key not in context.locks else None
    if make is None or key in context.by_key:
        put = partial(_put, context, connect, threshold_of(connect), endpoint)
        return await create_once(context, connect, put)
    session: SessionT = make()
    _put(context, connect, connect.leak_detection_threshold, endpoint, session)
    return session


def _session_maker_at_hand(connect: DBConnect[SessionT]) -> async_sessionmaker[SessionT] | None:
    """Return the sessionmaker of a connect if there is nothing to wait for before."""
    # A mock, and what a test has put in the place of a method, are asked in the ordinary way.
    creates = getattr(connect.create_session, "__func__", None) is _CREATE
    if not creates or getattr(connect.session_maker, "__func__", None) is not _SESSION_MAKER:
        return None
    return connect._engines.at_hand() if connect._before_create_session_handler is None else None


def _put(
    context: DBSessionContext,
    connect: DBConnect[Any],
    threshold: float | None,
    endpoint: object,
    session: AsyncSession,
) -> None:
    if threshold is not None:
        detect_leaks(real_session(session), threshold, connect, context.request, endpoint)
    count_written(session)
    context.put(connect.context_key, session, is_made=True)
    leave_open(session, context)


_CREATE, _SESSION_MAKER = DBConnect.create_session, DBConnect.session_maker
