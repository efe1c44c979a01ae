"""The middleware, the lifespan, the health and the exception handlers for Starlette."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Unpack

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from context_async_sqlalchemy.asgi_utils import (
    ASGIHTTPDBSessionMiddleware,
    MiddlewareOptions,
    has_context,
    open_request_context,
)
from context_async_sqlalchemy.auto_commit import (
    BeforeCommitCallback,
    abandon,
    finish,
    is_success,
    settle,
)
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.context import DBSessionContext
from context_async_sqlalchemy.release import wait_until_idle
from context_async_sqlalchemy.shield import logger
from context_async_sqlalchemy.starlette_errors import (
    add_database_exception_handlers,
    call_handler,
)
from context_async_sqlalchemy.starlette_health import database_health

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_database_exception_handlers",
    "add_starlette_http_db_session_middleware",
    "database_health",
    "database_lifespan",
    "starlette_http_db_session_middleware",
]


class StarletteHTTPDBSessionMiddleware(ASGIHTTPDBSessionMiddleware):
    """`ASGIHTTPDBSessionMiddleware`, with the exception handlers of a Starlette application.

    A commit that fails is answered by the handler that the application has for such an exception,
    as if the endpoint had raised it. The handler gets a new `Request`: a body that the endpoint has
    read cannot be read again.
    """

    async def respond_to_failure(
        self, failure: Exception, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer with the application's exception handler; raise `failure` if it has none."""
        response = await _handle(Request(scope, receive), failure)
        await response(scope, receive, send)


def add_starlette_http_db_session_middleware(
    app: Starlette,
    before_commit: BeforeCommitCallback | None = None,
    **options: Unpack[MiddlewareOptions],
) -> None:
    """Add the middleware to a Starlette application.

    Args:
        app: The application.
        before_commit: Called with each session that is about to be committed. Default None.
        **options: What else `ASGIHTTPDBSessionMiddleware` takes.
    """
    app.add_middleware(StarletteHTTPDBSessionMiddleware, before_commit=before_commit, **options)


def database_lifespan(
    *connects: DBConnect, wait: bool = False
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Make the lifespan of an application, which closes the connects at its end.

        app = Starlette(lifespan=database_lifespan(connect, wait=True))

    Args:
        *connects: The databases.
        wait: Whether to wait until each of them answers, as `DBConnect.wait_until_ready` does by
            default; the application does not start if one does not. Default False.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for connect in connects:
                await stack.enter_async_context(connect)
            if wait:
                for connect in connects:
                    await connect.wait_until_ready()
            yield

    return lifespan


async def starlette_http_db_session_middleware(
    request: Request,
    call_next: RequestResponseEndpoint,
    before_commit: BeforeCommitCallback | None = None,
) -> Response:
    """Give a request a context, as a dispatch function for `BaseHTTPMiddleware`.

    Prefer `add_starlette_http_db_session_middleware`. `BaseHTTPMiddleware` runs the application in
    a task of its own and does not say when it ends, so this function promises less: the context
    ends with the body, a background task gets `ContextClosedError`, and a streamed body that raises
    cannot be told from one that ends.

    Args:
        request: The request.
        call_next: Calls the application.
        before_commit: Called with each session that is about to be committed. Default None.

    Returns:
        The response of the application; its context ends with its body.
    """
    if has_context(request.scope):
        return await call_next(request)

    context = open_request_context(request.scope)
    try:
        response = await call_next(request)
        commit = is_success(response.status_code)
        if not context.settles_late:
            try:
                # The application goes on with its body meanwhile, until this function reads it.
                await wait_until_idle(context.sessions)
                await settle(context, commit=commit, before_commit=before_commit)
                context.note_settled()
            except Exception as failure:
                response = await _handle(request, failure)
                await finish(context, commit=False)
                return response
        commit = commit or not context.settles_late
        end = partial(finish, context, commit=commit, before_commit=before_commit)
        if "body_iterator" in vars(response):
            context.leave()
            return _EndingResponse(response, end, context)
        await end()
    except BaseException as error:
        await abandon(context, error)
        raise
    return response


class _EndingResponse(Response):
    """The response of a request, which ends the context at its own end."""

    def __init__(
        self, response: Response, end: Callable[[], Awaitable[None]], context: DBSessionContext
    ) -> None:
        vars(self).update(vars(response))
        self._class = type(response)
        self._end = end
        self._context = context
        self.body_iterator = self._end_with_body(vars(response)["body_iterator"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = object.__new__(self._class)
            vars(response).update(vars(self))
            await response(scope, receive, send)
            if self._context.in_transaction():
                logger.warning(
                    "Another middleware has replaced the body of a response, and not read it: what "
                    "is not committed is rolled back."
                )
        except BaseException as error:
            await abandon(self._context, error)
            raise
        else:
            await finish(self._context, commit=False)

    async def _end_with_body(self, body: AsyncIterable[Any]) -> AsyncGenerator[Any]:
        # Not in __call__: another middleware may read the body and make another response of it,
        # which Starlette reads in another task.
        async for part in body:
            yield part
        self._context.enter()
        await self._end()


async def _handle(request: Request, error: Exception) -> Response:
    """Return the answer of the application's exception handler; raise `error` if it has none."""
    by_class, by_status = request.scope.get("starlette.exception_handlers", ({}, {}))
    handler = by_status.get(error.status_code) if isinstance(error, HTTPException) else None
    if handler is None:
        handler = next((by_class[cls] for cls in type(error).__mro__ if cls in by_class), None)
    if handler is None:
        raise error
    return await call_handler(handler, request, error)
