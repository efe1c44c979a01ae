"""The session of the context as a dependency of FastAPI."""

# No `from __future__ import annotations`: FastAPI 0.115 cannot read the annotations of an object's
# __call__ then.

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Any, Generic, Unpack

import fastapi.routing
from fastapi import Response
from fastapi.requests import HTTPConnection
from sqlalchemy import URL

from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.asgi_utils import has_context, open_request_context
from context_async_sqlalchemy.auto_commit import abandon, finish, is_success, settle
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import DBSessionContext, current_context, is_test_context
from context_async_sqlalchemy.engine import EngineOptions
from context_async_sqlalchemy.leak_detection import detect_leaks
from context_async_sqlalchemy.release import close_sessions, refuse_further_use
from context_async_sqlalchemy.session import create_session
from context_async_sqlalchemy.session_type import SessionOptions, SessionT


class ConnectOptions(EngineOptions, Generic[SessionT], total=False):
    """The options of `DBConnect.from_url`."""

    before_create_session_handler: Callable[[DBConnect[Any]], Awaitable[None]] | None
    session_options: SessionOptions[SessionT] | None
    ping_after_idle: float
    idle_timeout: float | None
    min_idle: int
    leak_detection_threshold: float | None


class DBSessionDependency(Generic[SessionT]):
    """The session of the request, as a dependency.

        dependency = DBSessionDependency()
        Session = Annotated[AsyncSession, Depends(dependency)]

    It is the session that `await db_session(dependency.connect)` returns anywhere in the request.

    With the middleware, that settles it. Without, the first use in a request opens a context that
    all the others share, and that is settled when the endpoint has returned, before the response
    starts: committed if the status is below 400, else rolled back, as after an exception. Of a
    streamed body and of background tasks that promise is not made; they need the middleware.

    `DBSessionDependency[OurSession]()` is for a type checker: the class of the sessions that the
    connect of `initialize` will make.

    Args:
        connect: The database. Default None: that of `initialize`.
        manage_transactions: As of `initialize`. Default True.
    """

    def __init__(
        self, connect: DBConnect[SessionT] | None = None, *, manage_transactions: bool = True
    ) -> None:
        _watch_endpoints()
        self._connect = connect
        self._manages_transactions = manage_transactions
        self._is_owner = False

    @property
    def connect(self) -> DBConnect[SessionT]:
        """The database.

        Raises:
            RuntimeError: If there is none yet.
        """
        if self._connect is None:
            raise RuntimeError(
                "This DBSessionDependency is not initialized: call "
                "'await dependency.initialize(url)' in the lifespan of the application, or make it "
                "with DBSessionDependency(connect)."
            )
        return self._connect

    async def initialize(
        self,
        url: str | URL,
        password: str | None = None,
        *,
        manage_transactions: bool = True,
        **options: Unpack[ConnectOptions[SessionT]],
    ) -> None:
        """Make the connect, in the lifespan of the application; opens nothing.

        One that an earlier call made is closed.

        Args:
            url: As of `DBConnect.from_url`.
            password: The password as it is, with nothing percent-encoded. Default None: that of the
                URL.
            manage_transactions: Whether a request is one transaction, committed for it. With False
                the application begins and ends transactions itself: nothing is committed for it,
                and what is open at the end of the request is rolled back. Default True.
            **options: What else `DBConnect.from_url` takes. `isolation_level` None, its default, is
                that of the database.

        Raises:
            TypeError: If an option is not known, or of the wrong type.
            ValueError: If the URL cannot be read, its driver is not async, or an option has no
                sense.
        """
        connect = DBConnect.from_url(url, password, **options)
        # First the new one: a request that used a connect meanwhile closed would open it again.
        replaced = self._connect if self._is_owner else None
        self._connect, self._is_owner = connect, True
        self._manages_transactions = manage_transactions
        if replaced is not None:
            await replaced.close()

    async def aclose(self) -> None:
        """Close the connect, in the lifespan of the application."""
        connect = self._connect
        if self._is_owner:
            self._connect, self._is_owner = None, False
        if connect is not None:
            await connect.close()

    async def __call__(
        self, connection: HTTPConnection, response: Response
    ) -> AsyncGenerator[SessionT]:
        """Yield the session; called by FastAPI."""
        if connection.scope["type"] != "http":
            raise RuntimeError(
                "A WebSocket has no moment of success: open a context for each message, with "
                "'async with new_db_session_ctx():', and call 'await db_session(connect)' in it."
            )
        connect = self.connect
        session: AbstractAsyncContextManager[SessionT]
        # A test settles itself, and looks at what was done before it rolls back.
        if self._manages_transactions or is_test_context():
            session = _managed_session(connect, connection.scope)
        else:
            session = _unmanaged_session(connect, connection.scope)
        if has_context(connection.scope):
            async with session as of_request:
                yield of_request
        else:
            async with _request_context(connection.scope, response), session as of_request:
                yield of_request


@asynccontextmanager
async def _managed_session(connect: DBConnect[SessionT], scope: Scope) -> AsyncGenerator[SessionT]:
    context = current_context()
    session: SessionT | None = context.by_key.get(connect.context_key)
    if session is None:
        session = await create_session(context, connect, scope.get("endpoint"))
    yield session


@asynccontextmanager
async def _unmanaged_session(
    connect: DBConnect[SessionT], scope: Scope
) -> AsyncGenerator[SessionT]:
    """Yield the request's session that nobody but the application commits."""
    key = f"context_async_sqlalchemy.{connect.context_key}"
    if key in scope:
        yield scope[key]
        return
    context = current_context()
    session = scope[key] = await connect.create_session()
    if (threshold := connect.leak_detection_threshold) is not None:
        detect_leaks(session, threshold, connect, context.request, scope.get("endpoint"))
    # Not `context.put`: the context would settle it.
    context.by_key.setdefault(connect.context_key, session)
    # What the application has committed is not done again by `attempts` of the middleware.
    context.watch_commits().watch(connect.context_key, session)
    try:
        yield session
    finally:
        del scope[key]
        if context.by_key.get(connect.context_key) is session:
            del context.by_key[connect.context_key]
        refuse_further_use(session)
        await close_sessions([session])


class _Request:
    """A request whose context a dependency has opened.

    Attributes:
        context: That context.
        succeeded: Whether the response is a success; None while the endpoint has not returned.
    """

    def __init__(self, context: DBSessionContext, scope: Scope, response: Response) -> None:
        self.context = context
        self.succeeded: bool | None = None
        self._scope = scope
        self._response = response
        self._task = asyncio.current_task()

    def is_of(self, endpoint: object) -> bool:
        """Return whether `endpoint` was called for it, and not for another one.

        A task may have inherited it, or an endpoint call another application.
        """
        is_here = self._task is asyncio.current_task() and not self.context.closed
        return is_here and self._scope.get("endpoint") is endpoint

    async def settle(self, returned: object) -> None:
        """Commit or roll back by the status of the response that the endpoint's result becomes."""
        if isinstance(returned, Response):
            status = returned.status_code
        else:
            status = self._response.status_code or self._status_of_route() or 200
        self.succeeded = is_success(status)
        if not self.context.settles_late:
            await settle(self.context, commit=self.succeeded)

    async def finish(self) -> None:
        """End the context, and commit what was done since the endpoint has returned."""
        if self.succeeded is None:
            # Not called was an endpoint whose parameters are not valid, which FastAPI 0.117 and
            # older find out after the dependencies have ended. Later ones stream what a generator
            # yields that is an endpoint, and end the dependencies after that.
            self.succeeded = "fastapi_inner_astack" in self._scope
        await finish(self.context, commit=self.succeeded)

    def _status_of_route(self) -> int | None:
        return getattr(self._scope.get("route"), "status_code", None)


@asynccontextmanager
async def _request_context(scope: Scope, response: Response) -> AsyncGenerator[None]:
    request = _Request(open_request_context(scope), scope, response)
    _request.set(request)
    try:
        yield
    except BaseException as error:
        await abandon(request.context, error)
        raise
    else:
        await request.finish()


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def _watch_endpoints() -> None:
    """Settle a request whose context a dependency has opened when its endpoint has returned.

    A dependency that yields ends before the response in FastAPI up to 0.117 and after it since,
    with no other choice before 0.121; and it never sees the response, which may be a 404. This
    function of FastAPI is there to be wrapped (for profilers, as its source says), and does.
    """
    run = fastapi.routing.run_endpoint_function
    if getattr(run, "settles", False):
        return

    async def run_and_settle(**arguments: Any) -> Any:
        returned = await run(**arguments)
        request = _request.get()
        if request is not None and request.is_of(arguments["dependant"].call):
            await request.settle(returned)
        return returned

    run_and_settle.settles = True  # type: ignore[attr-defined]
    fastapi.routing.run_endpoint_function = run_and_settle
