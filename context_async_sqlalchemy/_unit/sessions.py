"""The session of a context is made once, however many tasks ask for it first."""

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType

from context_async_sqlalchemy._engine.border import real_session, threshold_of
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.written import count_written
from context_async_sqlalchemy._unit.context import DBSessionContext, current_context
from context_async_sqlalchemy._unit.leak_detection import detect_leaks
from context_async_sqlalchemy._unit.session_block import leave_open
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.exceptions import ContextClosedError


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
    creating = _creating.get()
    if key in creating and creating[key].locked():
        raise RuntimeError(
            f"the before_create_session_handler of {connect!r} asks for the session that is only "
            "made after it: use a connection of its own there"
        )
    # Two tasks may ask first at the same time, and the handler of the connect may really wait.
    lock = context.locks.setdefault(key, asyncio.Lock())
    async with lock:
        session: SessionT | None = context.by_key.get(key)
        if session is not None:
            return session
        token = _creating.set({**creating, key: lock})
        try:
            session = await connect.create_session()
        finally:
            _creating.reset(token)
        if context.closed:
            await session.close()
            raise ContextClosedError
        if (threshold := threshold_of(connect)) is not None:
            detect_leaks(real_session(session), threshold, connect, context.request, endpoint)
        count_written(session)
        context.put(key, session, is_made=True)
        leave_open(session, context)
        return session


# The locks of the creations in which this task is, or was started: it may outlive them.
_creating: ContextVar[Mapping[str, asyncio.Lock]] = ContextVar(
    "creating", default=MappingProxyType({})
)
