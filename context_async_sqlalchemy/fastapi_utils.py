"""For FastAPI: what there is for Starlette, and the session as a dependency."""

from typing import TYPE_CHECKING, Unpack

from fastapi import FastAPI

from context_async_sqlalchemy._engine.wrong_module import says_where
from context_async_sqlalchemy._http.dependency import DBSessionDependency
from context_async_sqlalchemy._http.middleware import MiddlewareOptions
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback
from context_async_sqlalchemy.starlette_utils import (
    add_database_exception_handlers,
    add_starlette_http_db_session_middleware,
    database_health,
    database_lifespan,
    starlette_http_db_session_middleware as fastapi_http_db_session_middleware,
)

__all__ = [
    "DBSessionDependency",
    "add_database_exception_handlers",
    "add_fastapi_http_db_session_middleware",
    "database_health",
    "database_lifespan",
    "fastapi_http_db_session_middleware",
]

if not TYPE_CHECKING:  # which would take every name for one that is there
    __getattr__ = says_where(__name__)


def add_fastapi_http_db_session_middleware(
    app: FastAPI,
    before_commit: BeforeCommitCallback | None = None,
    **options: Unpack[MiddlewareOptions],
) -> None:
    """Add the middleware to a FastAPI application.

    Args:
        app: The application.
        before_commit: Called with each session before it is committed. Default None.
        **options: The other options of `ASGIHTTPDBSessionMiddleware`.
    """
    add_starlette_http_db_session_middleware(app, before_commit, **options)
