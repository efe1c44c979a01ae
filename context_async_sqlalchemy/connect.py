"""DBConnect: an engine and its sessionmaker, lazily, and the host they talk to."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from context_async_sqlalchemy.guards import guard, retire
from context_async_sqlalchemy.shield import run_to_completion

_numbers = itertools.count(1)


class DBConnect:
    """One database as the application sees it.

    Make it at import time: nothing is opened until a session is asked for. The engine belongs to
    the event loop that made it; used on another loop, the connect makes itself a new one.

    Args:
        engine_creator: Called with the host; returns the `AsyncEngine` for it.
        session_maker_creator: Called with that engine; returns its `async_sessionmaker`.
        host: The host to talk to. Default None: `before_create_session_handler` sets it.
        before_create_session_handler: Awaited with this connect before each session is made; may
            call `change_host`. Default None.

    Attributes:
        context_key: The key of this connect's session in a context; unique in the process.

    Raises:
        TypeError: If a creator or the handler is not callable.
        ValueError: If `host` is empty.
    """

    def __init__(
        self,
        engine_creator: Callable[[str], AsyncEngine],
        session_maker_creator: Callable[[AsyncEngine], async_sessionmaker[AsyncSession]],
        host: str | None = None,
        before_create_session_handler: Callable[[DBConnect], Awaitable[None]] | None = None,
    ) -> None:
        _check_callable("engine_creator", engine_creator)
        _check_callable("session_maker_creator", session_maker_creator)
        if before_create_session_handler is not None:
            _check_callable("before_create_session_handler", before_create_session_handler)
        if host is not None:
            _check_host(host)

        self.context_key = f"connect-{next(_numbers)}"
        self._engine_creator = engine_creator
        self._session_maker_creator = session_maker_creator
        self._host = host
        self._before_create_session_handler = before_create_session_handler
        self._engine: AsyncEngine | None = None
        self._session_maker: async_sessionmaker[AsyncSession] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<DBConnect {self.context_key} host={self._host!r}>"

    @property
    def host(self) -> str | None:
        """The host that new sessions talk to; None if none was given yet."""
        return self._host

    @property
    def engine(self) -> AsyncEngine | None:
        """The engine in use; None until the first session, and after `close`."""
        return self._engine

    async def connect(self, host: str) -> None:
        """Make the engine for `host` and put it in the place of the one in use.

        Sessions in flight finish on the engine they began with; its connections are closed as they
        come back. If a creator fails, the engine in use stays.

        Args:
            host: The host to talk to from now on.

        Raises:
            TypeError: If a creator returns something that cannot be used.
            ValueError: If `host` is empty.
        """
        _check_host(host)
        retired = self._engine_to_retire()
        self._open(host)
        # A creator may keep its engines, and return the one in use.
        if retired is not None and retired is not self._engine:
            await run_to_completion(retire(retired))

    async def change_host(self, host: str) -> None:
        """Switch to `host` as `connect` does; do nothing if it is the host already.

        Args:
            host: The host to talk to from now on.

        Raises:
            TypeError: If a creator returns something that cannot be used.
            ValueError: If `host` is empty.
        """
        if host != self._host:
            await self.connect(host)

    async def create_session(self) -> AsyncSession:
        """Make a session that belongs to the caller, in no context.

        Raises:
            TypeError: If a creator returns something that cannot be used.
            ValueError: If there is no host.
        """
        session: object = (await self.session_maker())()
        if isinstance(session, Session):
            raise TypeError(
                f"the sessionmaker of {self!r} makes sync sessions: "
                "session_maker_creator must return an async_sessionmaker"
            )
        return session  # type: ignore[return-value]  # duck-typed: users' tests pass mocks

    async def session_maker(self) -> async_sessionmaker[AsyncSession]:
        """Run the handler, then return the sessionmaker, made on the first call.

        Raises:
            TypeError: If a creator returns something that cannot be used.
            ValueError: If there is no host.
        """
        if self._before_create_session_handler is not None:
            await self._before_create_session_handler(self)
        if self._session_maker is not None and not self._is_of_another_loop():
            return self._session_maker
        if self._host is None:
            raise ValueError("host is not set")
        return self._open(self._host)

    async def close(self) -> None:
        """Dispose of the engine, if there is one. A session asked for later makes a new one."""
        retired = self._engine_to_retire()
        self._engine = self._session_maker = self._loop = None
        if retired is not None:
            await run_to_completion(retire(retired))

    def _open(self, host: str) -> async_sessionmaker[AsyncSession]:
        # Not a coroutine: with no await between the check of a caller and the assignment here,
        # concurrent callers make one engine, without a lock.
        loop = asyncio.get_running_loop()
        engine = _check_engine(self._engine_creator(host))
        session_maker = _check_session_maker(self._session_maker_creator(engine))
        guard(engine)
        self._host, self._loop = host, loop
        self._engine, self._session_maker = engine, session_maker
        return session_maker

    def _engine_to_retire(self) -> AsyncEngine | None:
        # The connections of another loop's engine cannot be used here, nor closed: asyncpg would
        # wait on a loop that does not run. Such an engine is only dropped.
        return None if self._is_of_another_loop() else self._engine

    def _is_of_another_loop(self) -> bool:
        return self._loop is not None and self._loop is not asyncio.get_running_loop()


def _check_host(host: str) -> None:
    if not host:
        raise ValueError("host must not be empty")


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")


def _check_engine(engine: Any) -> AsyncEngine:
    _check_not_coroutine("engine_creator", engine)
    if isinstance(engine, Engine) or not hasattr(engine, "dispose"):
        raise TypeError(
            f"engine_creator must return an AsyncEngine, not {type(engine).__name__}: "
            "make it with create_async_engine()"
        )
    return engine  # type: ignore[no-any-return]  # duck-typed: users' tests pass mocks


def _check_session_maker(session_maker: Any) -> async_sessionmaker[AsyncSession]:
    _check_not_coroutine("session_maker_creator", session_maker)
    if not callable(session_maker):
        raise TypeError(
            "session_maker_creator must return an async_sessionmaker, "
            f"not {type(session_maker).__name__}"
        )
    return session_maker  # type: ignore[no-any-return]  # duck-typed: users' tests pass mocks


def _check_not_coroutine(creator: str, made: object) -> None:
    if inspect.iscoroutine(made):
        made.close()
        raise TypeError(f"{creator} must be a plain function, not a coroutine function")
