"""The middleware with the exception handlers of a Starlette application."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from context_async_sqlalchemy._http.middleware import ASGIHTTPDBSessionMiddleware


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
        response = await handle(Request(scope, receive), failure)
        await response(scope, receive, send)


async def handle(request: Request, error: Exception) -> Response:
    """Return the answer of the application's exception handler; raise `error` if it has none."""
    by_class, by_status = request.scope.get("starlette.exception_handlers", ({}, {}))
    handler = by_status.get(error.status_code) if isinstance(error, HTTPException) else None
    if handler is None:
        handler = next((by_class[cls] for cls in type(error).__mro__ if cls in by_class), None)
    if handler is None:
        raise error
    return await call_handler(handler, request, error)


async def call_handler(
    handler: Callable[..., Any], connection: HTTPConnection, error: Exception
) -> Response:
    """Call an exception handler as Starlette does: a plain function runs in a thread."""
    if inspect.iscoroutinefunction(handler):
        return await handler(connection, error)  # type: ignore[no-any-return]
    return await run_in_threadpool(handler, connection, error)
