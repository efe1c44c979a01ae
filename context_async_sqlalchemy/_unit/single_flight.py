"""Whether a session has to be waited for; it is made once, however many tasks ask for it first."""

import asyncio
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType

from sqlalchemy.ext.asyncio import async_sessionmaker

from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._unit.context import DBSessionContext
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.exceptions import ContextClosedError


async def create_once(
    context: DBSessionContext, connect: DBConnect[SessionT], put: Callable[[SessionT], None]
) -> SessionT:
    """Make the session of a context for `connect` and `put` it there, unless another task does."""
    key = connect.context_key
    creating = _creating.get()
    if key in creating and creating[key].locked():
        raise RuntimeError(
            f"the before_create_session_handler of {connect!r} asks for the session that is only "
            "made after it: use a connection of its own there"
        )
    # Two tasks may ask first at the same time, and the handler of the connect may really wait.
    if context.locks is None:
        context.locks = {}
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
        put(session)
        return session


def session_maker_at_hand(connect: DBConnect[SessionT]) -> async_sessionmaker[SessionT] | None:
    """Return the sessionmaker of a connect if there is nothing to wait for before."""
    # A mock, and what a test has put in the place of a method, are asked in the ordinary way.
    creates = getattr(connect.create_session, "__func__", None) is CREATE
    if not creates or getattr(connect.session_maker, "__func__", None) is not SESSION_MAKER:
        return None
    return connect._engines.at_hand() if connect._before_create_session_handler is None else None


CREATE, SESSION_MAKER = DBConnect.create_session, DBConnect.session_maker

# The locks of the creations in which this task is, or was started: it may outlive them.
_creating: ContextVar[Mapping[str, asyncio.Lock]] = ContextVar(
    "creating", default=MappingProxyType({})
)
