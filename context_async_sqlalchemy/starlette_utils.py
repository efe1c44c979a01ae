"""The middleware for Starlette."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import Any, cast

from starlette.applications import Starlette
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from context_async_sqlalchemy.asgi_utils import (
    ASGIHTTPDBSessionMiddleware,
    has_context,
    open_request_context,
)
from context_async_sqlalchemy.auto_commit import (
    BeforeCommitCallback,
    finish,
    is_success,
    settle,
)
from context_async_sqlalchemy.context import DBSessionContext


class StarletteHTTPDBSessionMiddleware(ASGIHTTPDBSessionMiddleware):
    """`ASGIHTTPDBSessionMiddleware` for Starlette's `add_middleware`."""


def add_starlette_http_db_session_middleware(
    app: Starlette, before_commit: BeforeCommitCallback | None = None
) -> None:
    """Add the middleware to a Starlette application.

    Args:
        app: The application.
        before_commit: Called with each session that is about to be committed. Default None.
    """
    app.add_middleware(StarletteHTTPDBSessionMiddleware, before_commit=before_commit)


async def starlette_http_db_session_middleware(
    request: Request,
    call_next: RequestResponseEndpoint,
    before_commit: BeforeCommitCallback | None = None,
) -> Response:
    """Give a request a context, as a dispatch function for `BaseHTTPMiddleware`.

    Prefer `add_starlette_http_db_session_middleware`. `BaseHTTPMiddleware` runs the application in
    a task of its own and does not say when it ends, so that this function promises less: the
    context ends with the body, a background task gets `ContextClosedError`, and a streamed body
    that raises is not told from one that ends.

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
        await settle(context, commit=commit, before_commit=before_commit)
    except BaseException:
        await finish(context, commit=False)
        raise
    return _EndingResponse(response, context, before_commit)


class _EndingResponse(Response):
    """The response of a request, with whose end the context ends."""

    def __init__(
        self,
        response: Response,
        context: DBSessionContext,
        before_commit: BeforeCommitCallback | None,
    ) -> None:
        vars(self).update(vars(response))
        self._respond = type(response).__call__
        self._context = context
        self._before_commit = before_commit
        self.body_iterator = self._end_with_body(cast(StreamingResponse, response).body_iterator)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._respond(self, scope, receive, send)
        except BaseException:
            await finish(self._context, commit=False)
            raise

    async def _end_with_body(self, body: AsyncIterable[Any]) -> AsyncGenerator[Any]:
        # Not in __call__: the application may read the body and make another response of it.
        async for part in body:
            yield part
        await finish(self._context, commit=True, before_commit=self._before_commit)
