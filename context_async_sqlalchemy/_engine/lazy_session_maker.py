"""A sessionmaker that can be had before there is an engine, and finds it when it is called."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from context_async_sqlalchemy._engine.created import WouldWaitError
from context_async_sqlalchemy._engine.engines import Engines, SessionMaker
from context_async_sqlalchemy._engine.private_names import (
    await_only,
    replace_get_bind,
    takes_one_engine,
)


class LazySessionMaker(async_sessionmaker[Any]):
    """What `DBConnect.lazy_session_maker` returns.

    Args:
        engines: Those of the connect.
        session_maker: Runs the handler of the connect, and returns the sessionmaker for the host
            that it leaves. None if there is no handler.
    """

    def __init__(
        self, engines: Engines, session_maker: Callable[[], Awaitable[SessionMaker]] | None
    ) -> None:
        super().__init__()
        self.kw = {}  # without defaults: those of the connect's own sessionmaker hold
        self._engines = engines
        self._session_maker = session_maker

    def __call__(self, **options: Any) -> Any:
        """Make a session, with these options instead of those of the connect's sessionmaker."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(_NO_LOOP) from None
        engines = self._engines
        if self._session_maker is not None and engines.needs_host and engines.host.now is None:
            raise RuntimeError(_NOT_YET.format("its before_create_session_handler sets the host"))
        try:
            session = engines.get_now()(**{**self.kw, **options})
        except WouldWaitError:
            raise RuntimeError(_NOT_YET.format("its creators are async functions")) from None
        if self._session_maker is not None and "bind" not in options:
            _run_before_first_statement(self._session_maker, session)
        return session


def _run_before_first_statement(
    session_maker: Callable[[], Awaitable[SessionMaker]], session: AsyncSession
) -> None:
    sync_session = session.sync_session
    own = sync_session.get_bind

    def get_bind(*args: Any, **options: Any) -> Any:
        chosen = await_only(session_maker())().bind
        if chosen is not session.bind:
            if not takes_one_engine(sync_session):
                raise InvalidRequestError(
                    "The before_create_session_handler has changed the host, and this session has "
                    "'binds', or a class that overrides get_bind(): make it with "
                    "'await connect.create_session()'"
                )
            session.bind, sync_session.bind = chosen, chosen.sync_engine
        replace_get_bind(sync_session, own)
        return own(*args, **options)

    replace_get_bind(sync_session, get_bind)


_NO_LOOP = (
    "The sessionmaker of connect.lazy_session_maker() was called where no event loop runs, such as "
    "at import time or in a thread. Its engine belongs to an event loop: call it in an async "
    "function."
)
_NOT_YET = (
    "The connect of this sessionmaker has no engine yet on this event loop, and cannot make one "
    "without waiting: {}. Call 'await connect.session_maker()' first, such as in the lifespan of "
    "the application; and again after 'await connect.close()'."
)
