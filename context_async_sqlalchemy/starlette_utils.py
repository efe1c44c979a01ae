"""For Starlette: the middleware, the lifespan, the health endpoint and the exception handlers."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Unpack

from sqlalchemy import MetaData
from starlette.applications import Starlette

from context_async_sqlalchemy._engine.pool import open_connections
from context_async_sqlalchemy._engine.wrong_module import says_where
from context_async_sqlalchemy._http.errors import add_database_exception_handlers
from context_async_sqlalchemy._http.health import database_health
from context_async_sqlalchemy._http.middleware import MiddlewareOptions
from context_async_sqlalchemy._http.starlette import (
    StarletteHTTPDBSessionMiddleware,
    starlette_http_db_session_middleware,
)
from context_async_sqlalchemy._unit.settle import BeforeCommitCallback
from context_async_sqlalchemy.connect import DBConnect
from context_async_sqlalchemy.session import new_non_ctx_atomic_session

__all__ = [
    "StarletteHTTPDBSessionMiddleware",
    "add_database_exception_handlers",
    "add_starlette_http_db_session_middleware",
    "database_health",
    "database_lifespan",
    "starlette_http_db_session_middleware",
]

if not TYPE_CHECKING:  # which would take every name for one that is there
    __getattr__ = says_where(__name__)


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
    *connects: DBConnect,
    wait: bool = False,
    warm: int = 0,
    create_tables: MetaData | None = None,
) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Make the lifespan of an application, which closes the connects at its end.

        app = Starlette(lifespan=database_lifespan(connect, wait=True))

    Args:
        *connects: The databases.
        wait: Whether to wait until each of them answers, as `DBConnect.wait_until_ready` does by
            default; the application does not start if one does not. Default False.
        warm: How many connections to open to each of them before the first request, at most as many
            as its pool keeps; the application does not start if that fails. Default 0.
        create_tables: The tables to create where they are missing, such as `Base.metadata`, for as
            long as there are no migrations: it changes no table that exists, and two processes that
            start at once may collide. With one connect only. Default None.

    Raises:
        ValueError: If `warm` is less than 0, or there are `create_tables` for several connects.
    """
    if warm < 0:
        raise ValueError(f"warm must be at least 0 connections, not {warm}")
    if create_tables is not None and len(connects) != 1:
        raise ValueError(
            f"create_tables needs one connect, not {len(connects)}: for more databases, call "
            "create_all for each of them in a lifespan of your own"
        )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for connect in connects:
                await stack.enter_async_context(connect)
            if wait:
                for connect in connects:
                    await connect.wait_until_ready()
            for connect in connects if warm else ():
                await connect.session_maker()
                if connect.engine is not None:
                    await open_connections(connect.engine, warm)
            if create_tables is not None:
                async with new_non_ctx_atomic_session(*connects) as session:
                    await session.run_sync(lambda sync: create_tables.create_all(sync.connection()))
            yield

    return lifespan
