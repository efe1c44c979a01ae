"""The session of the context as a FastAPI dependency."""

# No `from __future__ import annotations`: with it, FastAPI 0.115 cannot read the annotations of an
# object's __call__.

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Generic, Unpack

import fastapi.routing
from fastapi import Response
from fastapi.requests import HTTPConnection
from sqlalchemy import URL

from context_async_sqlalchemy._engine.border import real_session, threshold_of
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.private_names import fastapi_has_answered, wrap_endpoints
from context_async_sqlalchemy._engine.release import close_sessions, refuse_further_use
from context_async_sqlalchemy._http.middleware import has_context, open_request_context
from context_async_sqlalchemy._unit.context import (
    DBSessionContext,
    current_context,
    is_test_context,
)
from context_async_sqlalchemy._unit.leak_detection import detect_leaks
from context_async_sqlalchemy._unit.lost_work import tell_of_lost_work
from context_async_sqlalchemy._unit.on_commit import watch_commits
from context_async_sqlalchemy._unit.sessions import create_session
from context_async_sqlalchemy._unit.settle import abandon, finish, is_success, settle_request
from context_async_sqlalchemy.asgi_types import Scope
from context_async_sqlalchemy.connect import ConnectOptions, DBConnect


class DBSessionDependency(Generic[SessionT]):
    """The session of the request, as a dependency.

        dependency = DBSessionDependency()
        Session = Annotated[AsyncSession, Depends(dependency)]

    It is the session that `await db_session(dependency.connect)` returns anywhere in the request.

    The middleware, if added, settles it. Without it, the first use in a request opens a context for
    the whole request, settled when the endpoint returns, before the response starts: committed if
    the status is below 400, otherwise rolled back, as after an exception. This does not cover
    streamed bodies and background tasks: they need the middleware.

    `DBSessionDependency[OurSession]()` tells a type checker the class of the sessions that the
    connect from `initialize` will make.

    Args:
        connect: The database. Default None: the one that `initialize` makes.
        manage_transactions: As in `initialize`. Default True.
    """

    def __init__(
        self, connect: DBConnect[SessionT] | None = None, *, manage_transactions: bool = True
    ) -> None:
        wrap_endpoints(fastapi.routing, _settle_after)
        self._connect = connect
        self._manages_transactions = manage_transactions
        self._is_owner = False

    @property
    def connect(self) -> DBConnect[SessionT]:
        """The database; a `RuntimeError` if it is not set yet."""
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

        Closes the connect that an earlier call made.

        Args:
            url: As in `DBConnect.from_url`.
            password: The password as it is, not percent-encoded. Default None: the one in the URL.
            manage_transactions: Whether to commit or roll back each request as one transaction.
                With False, the application begins and ends transactions itself: nothing is
                committed for it, and what is still open at the end of the request is rolled back.
                Default True.
            **options: The other options of `DBConnect.from_url`. `isolation_level` None, its
                default, means the default of the database.

        Raises:
            TypeError: If an option is unknown, or of the wrong type.
            ValueError: If the URL cannot be read, its driver is not async, or an option is invalid.
        """
        connect = DBConnect.from_url(url, password, **options)
        # Replace it before closing it: a request that uses a closed connect opens it again.
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
        """Yield the session; FastAPI calls this."""
        if connection.scope["type"] != "http":
            raise RuntimeError(
                "A WebSocket has no moment of success: open a context for each message, with "
                "'async with new_db_session_ctx():', and call 'await db_session(connect)' in it."
            )
        scope = connection.scope
        async with nullcontext() if has_context(scope) else _request_context(scope, response):
            # A test settles its own context, and checks the work before it rolls back.
            if self._manages_transactions or is_test_context():
                yield await create_session(current_context(), self.connect, scope.get("endpoint"))
            else:
                async with _unmanaged_session(self.connect, scope) as session:
                    yield session


@asynccontextmanager
async def _unmanaged_session(
    connect: DBConnect[SessionT], scope: Scope
) -> AsyncGenerator[SessionT]:
    """Yield the request's session, which only the application commits."""
    key = f"context_async_sqlalchemy.{connect.context_key}"
    if key in scope:
        yield scope[key]
        return
    context = current_context()
    session = scope[key] = await connect.create_session()
    if (threshold := threshold_of(connect)) is not None:
        detect_leaks(
            real_session(session), threshold, connect, context.request, scope.get("endpoint")
        )
    # Not `context.put`: the context would settle it.
    context.by_key.setdefault(connect.context_key, session)
    # The middleware's `attempts` does not repeat what the application has committed.
    watch_commits(context).watch(connect.context_key, session)
    try:
        yield session
    finally:
        del scope[key]
        if context.by_key.get(connect.context_key) is session:
            del context.by_key[connect.context_key]
        refuse_further_use(real_session(session))
        await close_sessions([real_session(session)])


class _Request:
    """A request whose context was opened by a dependency."""

    def __init__(self, context: DBSessionContext, scope: Scope, response: Response) -> None:
        self.context = context
        self.succeeded: bool | None = None  # until the endpoint has returned
        self._scope = scope
        self._response = response
        self._task = asyncio.current_task()

    def is_of(self, endpoint: object) -> bool:
        """Return whether `endpoint` was called for this request, and not for another.

        A child task may have inherited this request, or an endpoint may call another application.
        """
        is_here = self._task is asyncio.current_task() and not self.context.closed
        return is_here and self._scope.get("endpoint") is endpoint

    async def settle(self, returned: object) -> None:
        """Commit or roll back by the response status that follows from `returned`."""
        if isinstance(returned, Response):
            status = returned.status_code
        else:
            of_route = getattr(self._scope.get("route"), "status_code", None)
            status = self._response.status_code or of_route or 200
        self.succeeded = is_success(status)
        if not self.succeeded or self.context.rolls_back:
            tell_of_lost_work(self.context, status)
        await settle_request(self.context, commit=self.succeeded)


@asynccontextmanager
async def _request_context(scope: Scope, response: Response) -> AsyncGenerator[None]:
    request = _Request(open_request_context(scope), scope, response)
    _request.set(request)
    try:
        yield
    except BaseException as error:
        await abandon(request.context, error)
        raise
    if request.succeeded is None:
        # The endpoint was not called, as for invalid parameters; or, since dependencies end after
        # the answer, it is a generator from which FastAPI has streamed.
        request.succeeded = fastapi_has_answered(scope)
    await finish(request.context, commit=request.succeeded)


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def _settle_after(run: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Settle a request whose context was opened by a dependency when its endpoint returns.

    A dependency with `yield` ends before the response in FastAPI up to 0.117 and after it in later
    versions, with no choice before 0.121; and it never sees the response, which may be a 404.
    """

    async def run_and_settle(**arguments: Any) -> Any:
        returned = await run(**arguments)
        request = _request.get()
        if request is not None and request.is_of(arguments["dependant"].call):
            await request.settle(returned)
        return returned

    return run_and_settle
