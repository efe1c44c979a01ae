"""The session of the context as a FastAPI dependency."""

# No `from __future__ import annotations`: with it, FastAPI 0.115 cannot read the annotations of an
# object's __call__.

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any, Generic, Unpack

from fastapi import APIRouter
from fastapi.requests import HTTPConnection
from sqlalchemy import URL
from starlette.exceptions import HTTPException

from context_async_sqlalchemy._engine.border import real_session, threshold_of
from context_async_sqlalchemy._engine.options import SessionT
from context_async_sqlalchemy._engine.release import close_sessions, refuse_further_use
from context_async_sqlalchemy._http.same_request import has_context
from context_async_sqlalchemy._http.send import SCOPE_KEY, RequestContext
from context_async_sqlalchemy._http.starlette import StarletteHTTPDBSessionMiddleware
from context_async_sqlalchemy._unit.context import current_context, is_test_context
from context_async_sqlalchemy._unit.hidden import hidden
from context_async_sqlalchemy._unit.leak_detection import detect_leaks
from context_async_sqlalchemy._unit.on_commit import watch_commits
from context_async_sqlalchemy._unit.read_only import chosen
from context_async_sqlalchemy._unit.sessions import create_session
from context_async_sqlalchemy._unit.settle import is_success, settle
from context_async_sqlalchemy.asgi_types import ASGIApp, Receive, Scope, Send
from context_async_sqlalchemy.connect import ConnectOptions, DBConnect


class DBSessionDependency(Generic[SessionT]):
    """The session of the request, as a dependency.

        dependency = DBSessionDependency()
        Session = Annotated[AsyncSession, Depends(dependency)]

    It is the session that `await db_session(dependency.connect)` returns anywhere in the request.

    The middleware, if added, settles it. Without it, the first use in a request opens a context for
    the rest of the request, which is settled as the middleware would: before the response starts,
    committed if its status is below 400, otherwise rolled back, as after an exception. What a
    streamed body or a background task writes is committed when it ends.

    A request that no router of FastAPI handles, so that its response is not seen, is refused with a
    `RuntimeError`, unless the middleware is there.

    `DBSessionDependency[OurSession]()` tells a type checker the class of the sessions that the
    connect from `initialize` will make.

    Args:
        connect: The database. Default None: the one that `initialize` makes.
        manage_transactions: As in `initialize`. Default True.
    """

    def __init__(
        self, connect: DBConnect[SessionT] | None = None, *, manage_transactions: bool = True
    ) -> None:
        wrap_routers(APIRouter, _settle_requests)
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

    async def __call__(self, connection: HTTPConnection) -> AsyncGenerator[SessionT]:
        """Yield the session; FastAPI calls this."""
        if connection.scope["type"] != "http":
            raise RuntimeError(
                "A WebSocket has no moment of success: open a context for each message, with "
                "'async with new_db_session_ctx():', and call 'await db_session(connect)' in it."
            )
        scope = connection.scope
        async with nullcontext() if has_context(scope) else _opened_context(scope):
            context, connect = current_context(), self.connect
            if context.read_only_methods:
                connect = await chosen(context, connect, None)
            # A test settles its own context, and checks the work before it rolls back.
            if self._manages_transactions or is_test_context():
                yield await create_session(context, connect, scope.get("endpoint"))
            else:
                async with _unmanaged_session(connect, scope) as session:
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


class _ContextOnDemand(RequestContext):
    """The context of a request that opens with the first use of a dependency, if there is one."""

    def open(self) -> None:
        """Wait for a dependency."""
        self.closed, self.has_ended = True, False
        self._task = asyncio.current_task()
        self.scope[SCOPE_KEY] = self

    def forget(self) -> None:
        super().forget()
        self.has_ended = True

    def enter(self) -> None:
        super().enter()
        self.closed = False
        # A middleware of the router, or a route class, may call the endpoint in a task of its own.
        # The variable of that task ends with it, and only there could it be restored.
        if asyncio.current_task() is not self._task:
            self.token = None


class _MiddlewareOnDemand(StarletteHTTPDBSessionMiddleware):
    """The middleware around a router, for the requests that use a dependency."""

    context_class = _ContextOnDemand

    async def serve(
        self, app: ASGIApp, router: APIRouter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Call the router for anything that it is called for."""
        if scope["type"] != "http" or has_context(scope, router):
            await app(scope, receive, send)
            return
        with hidden() if SCOPE_KEY in scope else nullcontext():
            await self._serve(app, scope, receive, send, router)


@asynccontextmanager
async def _opened_context(scope: Scope) -> AsyncGenerator[None]:
    context = scope.get(SCOPE_KEY)
    if not isinstance(context, _ContextOnDemand) or context.has_ended:
        raise RuntimeError(
            "DBSessionDependency does not see how this request ends, and would not know whether to "
            "commit: it was not called by the router of a FastAPI application. Add the middleware, "
            "with 'add_fastapi_http_db_session_middleware(app)'; outside of a request use "
            "'async with new_db_session_ctx():' and 'await db_session(connect)'."
        )
    context.enter()
    try:
        yield
    except Exception as error:
        # Whatever a handler, or a route class that catches it, makes of it. A redirect is no error.
        if not (isinstance(error, HTTPException) and is_success(error.status_code)):
            await settle(context, commit=False)
        raise


def wrap_routers(
    router_class: type[Any], wrap: Callable[[Callable[..., Awaitable[None]]], Callable[..., Any]]
) -> None:
    """Wrap, once, the method by which every router of FastAPI is called."""
    # Nothing else lets a dependency know of the response that its request is answered with.
    call = router_class.__call__
    if getattr(call, "wrapped_by", None) != __name__:
        wrapped = wrap(call)
        wrapped.wrapped_by = __name__  # type: ignore[attr-defined]
        router_class.__call__ = wrapped


def _settle_requests(call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    middleware = _MiddlewareOnDemand(call)

    async def call_and_settle(
        router: APIRouter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await middleware.serve(partial(call, router), router, scope, receive, send)

    return call_and_settle
