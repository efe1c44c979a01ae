"""Exception handlers for database errors that are no fault of the application or the client."""

from functools import partial

from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from context_async_sqlalchemy._engine.driver_errors import (
    TransientKind,
    classes_of_errors,
    is_connect_timeout,
    transient_kind,
)
from context_async_sqlalchemy._engine.log import hide_password, logger
from context_async_sqlalchemy._engine.private_names import starlette_handlers
from context_async_sqlalchemy._http.replay import TO_TELL
from context_async_sqlalchemy._http.starlette import call_handler

_CONFLICT = "Another request was first. Send this one again."
_UNAVAILABLE = "The database is not available. Try again later."


def add_database_exception_handlers(app: Starlette, retry_after: int = 5) -> None:
    """Answer transient database errors with a specific status instead of 500.

    503 with `Retry-After`: the database cannot be reached, was lost, is starting up or shutting
    down, or has too many connections; or no connection was available in time, from it or the pool.

    409: the request lost a serialization race, a deadlock or a lock, SQLite was busy, or a
    migration came between. Not 503, which tells a load balancer that this process is unhealthy.

    Every other error, including a violated constraint and a COMMIT whose outcome is unknown, goes
    to the application's own handler for it, or becomes a 500 as before. No response shows a
    statement, a parameter or a password; the error is logged.

    With the middleware's `attempts=`, only the error of the last attempt is answered.

    Args:
        app: The application, before its first request. Its own handlers for an error, or for a more
            specific class, take precedence.
        retry_after: How long a client should wait before trying again, in seconds. Default 5.

    Raises:
        RuntimeError: If the application has started: it would ignore the handlers.
        ValueError: If `retry_after` is less than 0.
    """
    if app.middleware_stack is not None:
        raise RuntimeError("add the exception handlers before the application has started")
    if retry_after < 0:
        raise ValueError(f"retry_after must be at least 0 seconds, not {retry_after}")
    handler = _Handler(retry_after)
    for cls in classes_of_errors():
        if cls not in app.exception_handlers:  # the application's own comes first
            app.add_exception_handler(cls, handler.handle)


class _Handler:
    def __init__(self, retry_after: int) -> None:
        self._headers = {"Retry-After": str(retry_after)}

    async def handle(self, connection: HTTPConnection, error: Exception) -> Response:
        # An accepted WebSocket cannot be sent a response.
        if isinstance(connection, Request):
            response = self._response_to(error)
            if response is not None:
                _log(error, response.status_code, connection.scope)
                return response
        return await self._pass_on(connection, error)

    def _response_to(self, error: Exception) -> Response | None:
        kind = transient_kind(error)
        if kind is TransientKind.CONFLICT:
            return JSONResponse({"detail": _CONFLICT}, status_code=409)
        if kind is TransientKind.UNAVAILABLE or is_connect_timeout(error):
            return JSONResponse({"detail": _UNAVAILABLE}, status_code=503, headers=self._headers)
        return None

    async def _pass_on(self, connection: HTTPConnection, error: Exception) -> Response:
        """Do what would happen without this handler."""
        by_class, _ = starlette_handlers(connection.scope)
        for cls in type(error).__mro__:
            handler = by_class.get(cls)
            if handler is not None and handler != self.handle:
                return await call_handler(handler, connection, error)
        # To the server-error middleware, which answers 500.
        raise error


def _log(error: Exception, status: int, scope: Scope) -> None:
    # Not the whole message of SQLAlchemy, which includes the statement and its parameters.
    reason = getattr(error, "orig", None) or (error if not isinstance(error, DBAPIError) else "")
    tell = partial(
        logger.warning,
        "A request was answered with %s: %s: %s",
        status,
        type(error).__name__,
        hide_password(str(reason)),
    )
    if TO_TELL in scope:
        scope[TO_TELL].append(tell)
    else:
        tell()
