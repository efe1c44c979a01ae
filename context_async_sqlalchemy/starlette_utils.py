"""For Starlette: the middleware, the lifespan, the health endpoint and the exception handlers."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Unpack

from starlette.applications import Starlette

from context_async_sqlalchemy._http.errors import add_database_exception_handlers
from context_async_sqlalchemy._http.health import database_health
from context_async_sqlalchemy._http.middleware import MiddlewareOptions
from context_async_sqlalchemy._http.starlette import (
    StarletteHTTPDBSessionMiddleware,
    starlette_http_db_session_middleware,
)
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback
from context_async_sqlalchemy.connect import DBConnect

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_database_exception_handlers",
    "add_starlette_http_db_session_middleware",
    "database_health",
    "database_lifespan",
    "starlette_http_db_session_middleware",
]


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
    # Starlette makes it when the first request comes: bad options are refused now.
    StarletteHTTPDBSessionMiddleware(app, before_commit, **options)
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
