"""The middleware for Starlette: as a class, and as a dispatch function for `BaseHTTPMiddleware`."""

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.base import RequestResponseEndpoint
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from context_async_sqlalchemy._engine.checks import check_before_commit
from context_async_sqlalchemy._engine.log import logger
from context_async_sqlalchemy._engine.private_names import starlette_handlers
from context_async_sqlalchemy._http.hand_over import see_hand_over
from context_async_sqlalchemy._http.messages import Streamed
from context_async_sqlalchemy._http.middleware import ASGIHTTPDBSessionMiddleware
from context_async_sqlalchemy._http.options import checked_methods, is_async, reading
from context_async_sqlalchemy._http.same_request import application_around, has_context
from context_async_sqlalchemy._http.send import RequestContext
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback, abandon, finish, is_success


class StarletteHTTPDBSessionMiddleware(ASGIHTTPDBSessionMiddleware):
    """`ASGIHTTPDBSessionMiddleware`, with the exception handlers of a Starlette application.

    A commit that fails is answered by the handler that the application, or a mounted one, has for
    such an exception, as if the endpoint had raised it. The handler gets a new `Request`: a body
    that the endpoint has read cannot be read again.
    """

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "dispatch"):
            raise TypeError(
                "StarletteHTTPDBSessionMiddleware is no BaseHTTPMiddleware, and would never call "
                "dispatch(): override __call__(scope, receive, send), or put another middleware "
                "around it"
            )

    async def respond_to_failure(
        self, failure: Exception, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer with the application's exception handler; raise `failure` if it has none."""
        response = await _handle(Request(scope, receive), failure)
        await response(scope, receive, send)


async def starlette_http_db_session_middleware(
    request: Request,
    call_next: RequestResponseEndpoint,
    before_commit: BeforeCommitCallback | None = None,
    read_only_methods: Collection[str] = frozenset(),
) -> Response:
    """Give a request a context, as a dispatch function for `BaseHTTPMiddleware`.

    Prefer `add_starlette_http_db_session_middleware`. `BaseHTTPMiddleware` runs the application in
    a task of its own and does not say when it ends, so this function promises less: the context
    ends with the body, and a background task gets `ContextClosedError`.

    Args:
        request: The request.
        call_next: Calls the application.
        before_commit: Called with each session that is about to be committed. Default None.
        read_only_methods: As for the middleware. Default: none.

    Returns:
        The response of the application; its context ends with its body.
    """
    check_before_commit(before_commit)
    context_class = reading(RequestContext, checked_methods(read_only_methods))
    if has_context(request.scope, starlette_http_db_session_middleware):
        return await call_next(request)

    see_hand_over(request.scope.get("app"))
    layer = starlette_http_db_session_middleware
    context = context_class(
        request.scope, layer, request.receive, _send_nothing, before_commit, is_success
    )
    context.open()
    try:
        try:
            response = await call_next(request)
            start: Message = {"status": response.status_code, "headers": response.raw_headers}
            if (settled := context.settle_by(start)) is not None:
                await settled
        except Exception:
            if context.failure is None:
                raise
            response = await _handle(request, context.failure)
            await finish(context, commit=False)
            context.forget()
            return response
        context.start = start
        if "body_iterator" in vars(response):
            context.leave()
            return _EndingResponse(response, context, Streamed(start))
        context.completed = True
        await finish(context, commit=context.succeeded(), before_commit=before_commit)
    except BaseException as error:
        await abandon(context, error)
        context.forget()
        raise
    context.forget()
    return response


class _EndingResponse(Response):
    """The response of a request, which ends the context at its own end."""

    def __init__(self, response: Response, context: RequestContext, streamed: Streamed) -> None:
        vars(self).update(vars(response))
        self._class = type(response)
        self._context = context
        self._streamed = streamed
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
            await abandon(self._context, error, has_answered=True)
            raise
        else:
            await finish(self._context, commit=False)
        finally:
            self._context.forget()

    async def _end_with_body(self, body: AsyncIterable[Any]) -> AsyncGenerator[Any]:
        # Not in __call__: another middleware may read the body and make another response of it,
        # which Starlette reads in another task.
        kept: list[Any] = []
        async for part in body:
            if self._is_last(part):
                kept.append(part)
            else:
                yield part
        if (error := self._context.error) is not None:
            self._context.error = None
            raise error  # which BaseHTTPMiddleware keeps to itself
        self._context.completed = not self._context.is_cut_off
        self._context.enter()
        commit, before_commit = self._context.succeeded(), self._context.before_commit
        await finish(self._context, commit=commit, before_commit=before_commit)
        for part in kept:
            yield part

    def _is_last(self, part: Any) -> bool:
        """Return whether a client takes the response for complete with a part of its body."""
        if isinstance(part, dict):  # of Starlette's BaseHTTPMiddleware: the path of a file
            return True
        body = part.encode(self.charset) if isinstance(part, str) else part
        return self._streamed.keeps({"type": "http.response.body", "body": body})


async def _send_nothing(_: Message) -> None:
    """Stand in for the `send` of the server, which a dispatch function does not see."""


async def _handle(request: Request, error: Exception) -> Response:
    """Return the application's answer to an error; raise it if what is around this answers it."""
    by_class, by_status = starlette_handlers(request.scope)
    handler = by_status.get(error.status_code) if isinstance(error, HTTPException) else None
    if handler is None:
        handler = next((by_class[cls] for cls in type(error).__mro__ if cls in by_class), None)
    if handler is None:
        return await _handle_server_error(request, error)
    try:
        return await call_handler(handler, request, error)
    except Exception as raised:
        return await _handle_server_error(request, raised)


async def _handle_server_error(request: Request, error: Exception) -> Response:
    """Answer as the ServerErrorMiddleware of a mounted application does, which is inside of this.

    As there, the error is raised when the response is sent, for the server to log.
    """
    app = request.scope.get("app")
    if app is application_around(request.scope) or not isinstance(app, Starlette):
        raise error
    middleware = ServerErrorMiddleware(app, debug=app.debug)
    handler = middleware.debug_response if app.debug else middleware.error_response
    for key, of_app in app.exception_handlers.items():
        if key in (500, Exception) and not app.debug:
            handler = of_app  # the last one, as in Starlette
    response = await call_handler(handler, request, error)

    async def fail() -> None:
        raise error

    tasks = BackgroundTasks([response.background] if response.background is not None else [])
    tasks.add_task(fail)
    response.background = tasks
    return response


async def respond_with_status(status: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as the application answers an `HTTPException` with this status."""
    response = await _handle(Request(scope, receive), HTTPException(status))
    await response(scope, receive, send)


async def call_handler(
    handler: Callable[..., Any], connection: HTTPConnection, error: Exception
) -> Response:
    """Call an exception handler as Starlette does: a plain function runs in a thread."""
    if is_async(handler):
        return await handler(connection, error)  # type: ignore[no-any-return]
    return await run_in_threadpool(handler, connection, error)
