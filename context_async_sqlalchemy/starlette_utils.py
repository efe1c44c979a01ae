"""For Starlette: the middleware, the lifespan, the health endpoint and the exception handlers."""

from __future__ import annotations

from typing import Unpack

from starlette.applications import Starlette

from context_async_sqlalchemy._http.dispatch import starlette_http_db_session_middleware
from context_async_sqlalchemy._http.errors import add_database_exception_handlers
from context_async_sqlalchemy._http.health import database_health
from context_async_sqlalchemy._http.lifespan import database_lifespan
from context_async_sqlalchemy._http.middleware import MiddlewareOptions
from context_async_sqlalchemy._http.starlette import StarletteHTTPDBSessionMiddleware
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback

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
    app.add_middleware(StarletteHTTPDBSessionMiddleware, before_commit=before_commit, **options)
